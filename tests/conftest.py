"""Eight simulated CPU devices and settings for fast compilation, before jax is imported."""

import gc
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Each worker has a folder: JAX does not write entries atomically.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / "inmerge-jax-test-cache" / _WORKER),
)
# Tests and the processes that they start compile many small programs more than once.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Source lines in programs are read in profiles alone, and take time at each lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Tracing allocates many objects that live long, which each collection visits again.
gc.set_threshold(100_000, 20, 50)
