"""Do the updates of Adam show an explosion before its gradients and loss do?

    python tests/benchmarks/leading.py [--part test]

On the runs of the zoo with Adam, without protection, two more signals are judged by the
default limit on the norm: the norm of the updates, and the largest RMS_t of a leaf,
`sqrt(mean(g**2 / max(v, eps**2)))` (Wortsman et al., arXiv:2304.13013, section 3.4),
which also gets their fixed limit of 2.3. A rule would be worth having if it noticed
more explosions, or the same ones earlier, without more false alarms on healthy runs.
"""

import datetime
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optaxclip
import zoo
from detection import NUM_EARLY
from optaxclip.explosions.rules import NORM_LIMIT
from tasks.running import HEALTHY, compiled, train

EPS = 1e-8
STABLE = 2.3
"""From here on Wortsman et al. speak of a spike of RMS_t."""


class WatchedState(NamedTuple):
    """The signals of all steps."""

    inner: Any
    num_steps: jax.Array
    rms: jax.Array


def adam_state(state: Any) -> Any:
    """Of the only Adam in a state; None for none."""

    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    return found[0] if len(found) == 1 else None


def watched(optimizer: Any) -> Any:
    """The optimizer, with a record of what the default rules and the others see."""
    inner = optax.chain(
        optaxclip.detect_explosions(window=STEPS),
        optimizer,
        optaxclip.record("updates", window=STEPS),
    )

    def init(params):
        state = inner.init(params)
        return WatchedState(state, jnp.zeros([], jnp.int32), jnp.zeros(STEPS))

    def update(updates, state, params=None, **extra_args):
        found, new = inner.update(updates, state.inner, params, **extra_args)
        adam = adam_state(new)
        correction = 1 - 0.999**adam.count

        def squared_rms(g, v):
            return jnp.mean(g**2 / jnp.maximum(v / correction, EPS**2))

        of_leaves = jax.tree.leaves(jax.tree.map(squared_rms, updates, adam.nu))
        rms = state.rms.at[state.num_steps].set(jnp.sqrt(jnp.max(jnp.stack(of_leaves))))
        return found, WatchedState(new, state.num_steps + 1, rms)

    return optax.GradientTransformationExtraArgs(init, update)


STEPS = 600


@jax.jit
def exceeds(values: jax.Array) -> jax.Array:
    """Bool `[steps]`: where a signal is above the default limit on a norm."""

    def step(state, value):
        limit, state = NORM_LIMIT.update(value, state, None)
        return state, (value > limit) & jnp.isfinite(value)

    return jax.lax.scan(step, NORM_LIMIT.init(jnp.ones([])), values)[1]


def flags_of(name: str) -> list[dict[str, np.ndarray]] | None:
    """For each seed the steps that each rule flags; None for a run without Adam."""
    run = zoo.run_of(name)
    params = jax.eval_shape(run.task.init, jax.random.key(0))
    state = jax.eval_shape(lambda: run.optimizer(1e-3).init(params))
    if run.task.players or run.steps != STEPS or adam_state(state) is None:
        return None
    states = train(run, watched).state["all"]
    compiled.cache_clear()
    found = []
    for seed in range(len(states.rms)):
        state = jax.tree.map(lambda x, seed=seed: x[seed], states)
        kept = optaxclip.history(state.inner, label="explosions")
        updates = optaxclip.history(state.inner, label="updates")
        # An optimizer that collects gradients is not called in every step.
        num_steps = len(kept.step)
        rms = state.rms[:num_steps]
        found.append(
            {
                "default rules": kept.fired.any(axis=1),
                "norm of the updates": np.asarray(exceeds(updates.norm)),
                "RMS_t": np.asarray(exceeds(rms)),
                f"RMS_t > {STABLE}": np.asarray(rms > STABLE),
            }
        )
    return found


def main(part: zoo.Part = "tune") -> None:
    """Prints what each rule adds to the default ones.

    Args:
        part: Of the zoo.
    """
    healthy, exploding = [], []
    for name in zoo.names():
        if zoo.part_of(name) == part and (found := flags_of(name)) is not None:
            is_healthy = zoo.kind_of(name) == HEALTHY
            (healthy if is_healthy else exploding).extend(found)
    print(
        f"{len(healthy)} healthy and {len(exploding)} exploding seeds with Adam, part "
        f"{part}; JAX {jax.__version__} on {jax.devices()[0].platform}, "
        f"{datetime.date.today()}."
    )
    base = "default rules"
    for rule in healthy[0]:
        early, late = (
            1e4 * float(np.mean([np.mean(flags[rule][part]) for flags in healthy]))
            for part in (slice(1, NUM_EARLY), slice(NUM_EARLY, None))
        )
        first = [
            [np.flatnonzero(flags[x]) for x in (base, rule)] for flags in exploding
        ]
        num = sum(len(own) > 0 for _, own in first)
        alone = sum(len(own) > 0 and not len(other) for other, own in first)
        leads = [other[0] - own[0] for other, own in first if len(own) and len(other)]
        print(
            f"{rule}: notices {num}, {alone} of them alone; median lead over the "
            f"default rules {np.median(leads):g} steps, earlier in "
            f"{sum(x > 0 for x in leads)} of {len(leads)}; {late:.1f} flags in 10,000 "
            f"steps of healthy runs, early {early:.1f}."
        )


if __name__ == "__main__":
    tyro.cli(main)
