"""Keeping compiled programs from one start of a command to the next."""

from pathlib import Path

import jax

PROGRAMS = Path("~/.cache/inmerge_jax/xla")
"""Where they are kept, unless another folder is named."""


def keep_programs(folder: Path = PROGRAMS) -> None:
    """Makes JAX keep all programs that it compiles in `folder`, and look for them there."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
