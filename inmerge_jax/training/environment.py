"""The environment of a process: what it runs on, and the settings of its allocator and compiler."""

import ctypes
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from inmerge_jax.buckets import in_bucket

_NUMERIC = (
    "jax jaxlib libtpu jax-cuda12-plugin jax-cuda13-plugin nvidia-cudnn-cu12 nvidia-cudnn-cu13 "
    "flax optax numpy grain pillow"
).split()
_OTHERS = (
    "inmerge-jax orbax-checkpoint tensorstore scipy scikit-learn medmnist tensorflow-datasets torch"
).split()
_VECTORS = ("avx512f", "avx2", "avx")
_VARIABLES = (
    "JAX_PLATFORMS XLA_FLAGS LIBTPU_INIT_ARGS NVIDIA_TF32_OVERRIDE JAX_ENABLE_X64 "
    "JAX_DEFAULT_MATMUL_PRECISION JAX_DEFAULT_PRNG_IMPL JAX_THREEFRY_PARTITIONABLE "
    "JAX_RANDOM_SEED_OFFSET JAX_DISABLE_MOST_OPTIMIZATIONS"
).split()
_SIMULATED = "--xla_force_host_platform_device_count"


def environment() -> dict[str, Any]:
    """Describes the environment of this process as a JSON-serializable dict.

    Keys: started (ISO time with zone), command, python, platform, cpus, processor (see
    `processor`), packages (versions of installed packages), devices (backend, count, kinds,
    processes), variables (environment variables that affect JAX's numerics), git (commit and dirty
    flag of the checkout that holds this package, or None).
    """
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cores(),
        "processor": processor(),
        "packages": dict(_versions()),
        "devices": {
            "backend": jax.default_backend(),
            "count": jax.device_count(),
            "kinds": sorted({device.device_kind for device in jax.devices()}),
            "processes": jax.process_count(),
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "git": _git(Path(__file__).parent),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Name and vector extension of the first processor, such as "AMD EPYC, family 25, avx2".

    Speed and rounding on CPU depend on both. None if /proc/cpuinfo does not say.
    """
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return None
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in found:
        return None
    vectors = [name for name in _VECTORS if name in found.get("flags", "").split()]
    family = [
        f"{word.split()[-1]} {found[word]}" for word in ("cpu family", "model") if word in found
    ]
    return ", ".join([found["model name"], *family, *vectors[:1]])


def diff_environments(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """Differences between two environments that may change a training bit for bit.

    Compares `numerics_fingerprint`, the processor, and the numbers of cores and processes, which
    affect rounding only. The number of devices is part of a run's configuration.

    Args:
      before: an earlier result of `environment`.
      now: a later one.
    """
    old, new = ({**_rounding(one), **numerics_fingerprint(one)} for one in (before, now))
    return tuple(
        f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    )


def _rounding(env: dict[str, Any]) -> dict[str, Any]:
    found = {
        "processor": env.get("processor"),
        "cores": env["cpus"],
        "processes": env["devices"]["processes"],
    }
    return {name: value for name, value in found.items() if value}


def numerics_fingerprint(env: dict[str, Any]) -> dict[str, Any]:
    """The part of an `environment` that must be equal in all processes of a run.

    Kind of device, versions of packages that compute or decode, environment variables, and the
    checkout's commit ("with changes" if it is dirty). Missing values have no entry.
    """
    variables = dict(env["variables"])
    variables.pop("JAX_PLATFORMS", None)  # Implied by the kind of device.
    flags = variables.pop("XLA_FLAGS", "").split()
    commit, dirty = env["git"]["commit"], env["git"]["dirty"]
    found = {
        "devices": ", ".join(env["devices"]["kinds"]),
        **{name: env["packages"].get(name) for name in _NUMERIC},
        "commit": f"{commit} with changes" if commit and dirty else commit,
        "XLA_FLAGS": " ".join(flag for flag in flags if not flag.startswith(_SIMULATED)),
        **variables,
    }
    return {name: value for name, value in found.items() if value}


def available_cores() -> int:
    """Number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> Iterator[tuple[str, str]]:
    for name in (*_NUMERIC, *_OTHERS):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _git(folder: Path) -> dict[str, Any]:
    def run(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another project's checkout.
    if run("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    # Generated results and pages do not affect what a command computes.
    written = (":(top,exclude)experiments/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    status = run("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written)
    return {"commit": run("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
_STEP = 64 * 2**20


def configure_malloc() -> bool:
    """Configures glibc's allocator to keep freed memory, where JAX will run on CPU.

    XLA's CPU backend allocates its buffers at every step. By default glibc returns large buffers to
    the system, and the next step faults in every page again. With these settings the process keeps
    its peak size, and a step is a quarter to a third shorter.

    Call it before the imports of packages that start threads, such as pandas, and before anything
    that starts JAX's backend, such as `jax.devices()`. An arena that another thread has by then may
    be given to JAX's threads, and it does shrink.

    Returns:
      Whether the settings were applied. With an accelerator's plugin, without glibc, or if
      `MALLOC_...` environment variables are set, nothing changes.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not _will_run_on_cpu():
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wishes = {_TRIM_THRESHOLD: -1, _TOP_PAD: _STEP, _MMAP_MAX: 0, _ARENA_MAX: 1}
    return all([mallopt(what, value) == 1 for what, value in wishes.items()])


def _will_run_on_cpu() -> bool:
    """Whether JAX will choose the CPU. To ask JAX itself would start its backend."""
    if platforms := jax.config.jax_platforms:  # type: ignore[attr-defined]
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


COMPILATION_CACHE = Path("~/.cache/inmerge_jax/xla")
"""Default folder of the compilation cache."""


def enable_compilation_cache(folder: Path = COMPILATION_CACHE) -> None:
    """Enables JAX's persistent compilation cache in `folder`, for all programs.

    Of several processes, JAX lets process 0 alone write to it. A process that has its program waits
    in vain for those that compile it: all have to see the same folder, see `multihost.is_shared`.

    Args:
      folder: local or in a bucket.
    """
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    place = folder if in_bucket(folder) else Path(folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", os.fspath(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if in_bucket(place):
        # XLA's own cache, of tuned kernels, knows local files alone.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX reads the settings once, at the first compilation.
    reset_cache()
