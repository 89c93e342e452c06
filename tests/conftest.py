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
    with jax.enable_x64(True):
        yield
