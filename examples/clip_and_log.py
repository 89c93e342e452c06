"""Clips gradients, logs their norms, and survives a bad batch."""

import jax
import jax.numpy as jnp
import optax

import optaxclip


def main(num_steps: int = 200) -> dict[str, jax.Array]:
    """Fits a line to points of which one batch is NaN; returns the parameters."""
    x = jax.random.normal(jax.random.key(0), (num_steps, 32))
    y = (3 * x - 1).at[num_steps // 2].set(jnp.nan)
    params = {"slope": jnp.zeros([]), "offset": jnp.zeros([])}
    tx = optaxclip.stabilize(optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(0.1)))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss_of(params):
            return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    for i in range(num_steps):
        params, opt_state = step(params, opt_state, x[i], y[i])
        if i % 50 == 0:  # or every step, to a dashboard
            metrics = optaxclip.metrics(opt_state, params)
            print(i, *(f"{name}={metrics[name]:.3g}" for name in list(metrics)[:4]))
    print(optaxclip.explain(opt_state, params))
    return params


if __name__ == "__main__":
    main()
