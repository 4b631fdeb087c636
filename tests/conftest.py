"""Eight simulated CPU devices for every test, set before jax is imported."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "inmerge-jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# `make test` draws fewer examples than `make coverage`, which is a part of `make test-long`.
settings.register_profile("thorough", max_examples=50)
settings.register_profile("quick", max_examples=15)
settings.load_profile("thorough")


@pytest.fixture(autouse=True, scope="module")
def clear_caches_after_long_tests(request: pytest.FixtureRequest):
    """Frees the compiled programs of a file, which would otherwise fill the memory."""
    yield
    if request.config.getoption("markexpr") == "long":
        import jax

        jax.clear_caches()
        gc.collect()
