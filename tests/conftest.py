"""Eight simulated CPU devices for every test, set before jax is imported."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "inmerge-jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(autouse=True, scope="module")
def forget_programs_of_long_tests(request: pytest.FixtureRequest):
    """Without it, the programs of the long tests grow to 12 GB in each worker."""
    yield
    if request.config.getoption("markexpr") == "long":
        import jax

        jax.clear_caches()
        gc.collect()
