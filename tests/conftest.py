"""Eight virtual devices for the whole suite; strict promotion where a test asks."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers of the same run inherit it, so what one has compiled is not compiled
    # again: a quarter of the time. JAX reads these when it is imported.
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if "XLA_FLAGS" not in os.environ and (
    tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
):
    # Compiling is most of the time, and the older way to emit code nearly halves it.
    # Newer versions of JAX have only the other; there, and once a week, it is tested.
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)

# What JAX has traced and compiled stays, and is not worth looking through so often.
gc.set_threshold(50_000, 20, 100)


def needs_xla(*, since: tuple[int, ...], reason: str) -> pytest.MarkDecorator:
    """Skips where the compiler, which comes with JAX, is older than JAX `since`.

    For what only it can give: results are right, but rounded more, or cost more.
    """
    version = ".".join(map(str, since))
    return pytest.mark.skipif(
        jax.__version_info__ < since, reason=f"before JAX {version} XLA {reason}"
    )


stores_no_squares = needs_xla(
    since=(0, 10, 2), reason="stores the squares of the gradients that it adds up"
)


def pytest_collection_finish():
    """Nothing that is imported by now is garbage."""
    gc.freeze()


@pytest.fixture
def strict():
    """Refuses implicit changes of dtype and rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def configured(name, value):
    """As a context `jax_enable_x64` has another name in older versions of JAX."""
    before = jax.config.read(name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture
def x64():
    with configured("jax_enable_x64", True):
        yield


def optimizations(are_left_out):
    return configured("jax_disable_most_optimizations", are_left_out)


@pytest.fixture(scope="module")
def quick_to_compile():
    """Without XLA's optimizations: for the examples, whose runs are short."""
    with optimizations(are_left_out=True):
        yield


def is_default(config) -> bool:
    """Whether the slow tests are left out; once a week all is compiled as for users."""
    return config.getoption("-m") == "not slow"


@pytest.fixture(scope="module")
def quick_by_default(request):
    with optimizations(are_left_out=is_default(request.config)):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Those of the documentation are short, too."""
    if not isinstance(item, pytest.DoctestItem) or not is_default(item.config):
        return (yield)
    with optimizations(are_left_out=True):
        return (yield)
