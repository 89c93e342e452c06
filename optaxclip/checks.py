"""The errors of arguments, at the earliest moment. Internal."""

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

State = TypeVar("State")
STATIC = "optax.inject_hyperparams takes it in static_args="
"""Ends the error of an argument that decides which program is made."""


def known_value(name: str, value: Any) -> float | None:
    """The value of a number; None for a JAX array, which may be traced.

    Raises the error of an argument that is not a single real number.
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        raise ValueError(f"{name} must be a single number, not {value!r}")
    # To read a JAX array would wait for the device, and fail under `jit`.
    return None if isinstance(value, jax.Array) else float(value)


def check_scheduled(value: Any) -> None:
    """Raises the error of what a schedule gave, if that is no number."""
    if not _is_number(value):
        raise TypeError(f"a schedule must give a number, not {value!r}")


def _is_number(value: Any) -> bool:
    """Whether it is a real number, or an array of these."""
    # NumPy's bfloat16 is no `numbers.Real`.
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return is_real(value.dtype)
    # True is a number for Python, and as a limit surely a mistake.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, fits: Callable[[float], bool], what: str
) -> None:
    """Raises the error of a number that is known and does not fit."""
    known = known_value(name, value)
    if known is not None and not fits(known):
        raise ValueError(f"{name} must be {what}, not {value!r}")


def check_length(name: str, value: Any, least: int) -> int:
    """A whole number; raises the error of what is none, or too small or large."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}; {STATIC}")
    # Twice of it has to fit an int32, as `2 * snapshot_every` does.
    if not least <= int(value) < 2**30:
        raise ValueError(f"{name} must be >= {least} and < 2**30, not {value!r}")
    return int(value)


def is_real(dtype: Any) -> bool:
    """Whether values of a dtype are real numbers, and no flags."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_by_name(**functions: Any) -> None:
    """Raises the error of a `where`, `stacked` or the like that is no function."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            # `inject_hyperparams` calls it with the count, unless it is static.
            hint = f"; {STATIC}" if isinstance(value, jax.Array) else ""
            raise TypeError(
                f"{name} must be a function of a leaf's name, not {value!r}{hint}"
            )


def check_label(label: Any) -> None:
    """Raises the error of a label that is no name."""
    if not isinstance(label, str) or not label:
        raise TypeError(f"label must be a name, not {label!r}")


def check_transformation(name: str, value: Any) -> None:
    """Raises the error of an optimizer that is none, or was not called."""
    # A class has both methods too, before it is called.
    if isinstance(value, type) or not all(
        callable(getattr(value, method, None)) for method in ("init", "update")
    ):
        call = f"; call it: {value.__name__}(...)" if inspect.isfunction(value) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, not {value!r}{call}"
        )


def with_extra_args(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes any extra arguments.

    It gets all but those that are for us, `value=` and `tag=`, where it does not name
    them: it would refuse them, as `optax.contrib.sam` does.
    """
    # Optax goes by the type alone, and so would drop those of `optax.MultiSteps`.
    if _takes_any(inner.update):
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    taking = optax.with_extra_args_support(inner)
    known = inspect.signature(inner.update).parameters
    refused = {"value", "tag"} - set(known)

    def update(updates, state, params=None, **extra_args):
        extra_args = {k: x for k, x in extra_args.items() if k not in refused}
        return taking.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def own_state(state: Any, label: str, kind: type[State]) -> State:
    """The state under a label; the error of one that `init` did not make."""
    found = state.get(label) if isinstance(state, Mapping) else None
    if not isinstance(found, kind):
        made = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"state must be what init gave, {{{label!r}: {kind.__name__}}}, not {made}"
        )
    return found


def check_leaves(made_for: list, found: list, updates: Any, params: Any) -> None:
    """Raises the error of updates with other leaves than `init` was given.

    Args:
      made_for: Shapes of the norms in the state.
      found: The same of the updates.
      updates: Names the leaves in the message.
      params: Likewise, where they are known.
    """
    if made_for == found:
        return

    def names(tree):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/") or "array"
            for path, _ in jax.tree.leaves_with_path(tree)
        ]
        return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") or "none"

    trees = f"updates: {names(updates)}"
    if params is not None:
        trees += f"; params: {names(params)}"
    raise ValueError(
        f"the updates do not have the leaves that init was given: norms {found}, "
        f"in the state {made_for}; {trees}. Give init only what has a gradient, and "
        "put a wrapper of parameters, such as optax.lookahead, outside"
    )


def check_structure(old: Any, new: Any) -> None:
    """Raises the error of an optimizer whose state changes its structure."""
    old, new = map(jax.tree.structure, (old, new))
    if old != new:
        raise ValueError(
            "the optimizer inside changes the structure of its state, as optax.monitor "
            "does in its first step, so a skipped step cannot keep the old one: put it "
            f"outside; from {old} to {new}"
        )


def _takes_any(update: Callable) -> bool:
    """Whether it takes extra arguments by any name."""
    kinds = [x.kind for x in inspect.signature(update).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def value_of(extra_args: dict[str, Any]) -> Any:
    """The loss that the training loop gives; None for none."""
    # Extra arguments that nobody takes are dropped in silence, and with it a rule.
    if "loss" in extra_args and "value" not in extra_args:
        raise TypeError("give the loss as value=, the name that Optax has for it")
    return extra_args.get("value")
