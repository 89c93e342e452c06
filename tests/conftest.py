"""Eight virtual devices for the whole suite; strict promotion where a test asks."""

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)


@pytest.fixture
def strict():
    """Refuses implicit changes of dtype and rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    before = jax.config.read("jax_enable_x64")  # as a context its name differs
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def quick_to_compile():
    """Without XLA's optimisations: for the examples, whose runs are short."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
