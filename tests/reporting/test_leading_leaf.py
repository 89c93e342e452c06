"""The leaf that led is told by its name."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"a": jnp.ones(2), "rnn": {"hh": jnp.ones((2, 3)), "b": jnp.ones(3)}}


def grads_with(name: str, value: float) -> Any:
    def grad(path, x):
        is_it = jax.tree_util.keystr(path, simple=True, separator="/") == name
        return jnp.full_like(x, value if is_it else 1.0)

    return jax.tree_util.tree_map_with_path(grad, PARAMS)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e6, "a"),
        (jnp.nan, "rnn/hh"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                (1e6, "rnn/b"),
                (1e6, "rnn/hh"),
                (jnp.nan, "a"),
                (jnp.nan, "rnn/b"),
            )
        ),
    ],
)
def test_it_is_the_one_that_has_grown_or_is_nonfinite(name, value):
    tx = optax.chain(
        optaxclip.detect_explosions(), optaxclip.record("last"), optax.sgd(0.1)
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(20):
        _, state = update(grads_with("", 1.0), state)
    assert optaxclip.leading_leaf(state, PARAMS) is None
    _, state = update(grads_with(name, value), state)
    found = optaxclip.leading_leaf(state, PARAMS)
    assert found == name
    index = int(optaxclip.metrics(state)["explosions/leading_leaf"])
    assert optaxclip.leaf_names(PARAMS)[index] == name
    assert f"{name!r}" in optaxclip.explain(state, PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    for params in (shapes, train_state):
        assert optaxclip.leading_leaf(state, params) == name
    # It stays that of the last explosion.
    for _ in range(3):
        _, state = update(grads_with("", 1.0), state)
    assert optaxclip.leading_leaf(state, PARAMS) == name


@pytest.mark.slow
def test_layers_and_masks_are_named():
    tx = optax.masked(
        optaxclip.detect_explosions(stacked=lambda name: name == "rnn/hh"),
        {"a": False, "rnn": True},
    )
    grads = grads_with("", 1.0)
    grads["rnn"]["hh"] = grads["rnn"]["hh"].at[1].set(jnp.inf)
    _, state = tx.update(grads, tx.init(PARAMS))
    assert optaxclip.leading_leaf(state, PARAMS) == "rnn/hh[1]"


def test_which_state_is_meant():
    with pytest.raises(ValueError, match="found no state of detect_explosions"):
        optaxclip.leading_leaf(optaxclip.record().init(PARAMS), PARAMS)
    tx = optax.chain(
        optaxclip.detect_explosions(),
        optaxclip.skip_explosions(optax.sgd(0.1), label="skip"),
    )
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"give label=, one of \['explosions', 'skip"):
        optaxclip.leading_leaf(state, PARAMS)
    assert optaxclip.leading_leaf(state, PARAMS, label="skip") is None
    with pytest.raises(ValueError, match="with the label 'x'"):
        optaxclip.leading_leaf(state, PARAMS, label="x")
    runs = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match="reads one run"):
        optaxclip.leading_leaf(runs, PARAMS, label="skip")
    with pytest.raises(ValueError, match="does not have the structure"):
        optaxclip.leading_leaf(state, {"a": 1}, label="skip")
