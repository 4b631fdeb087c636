"""A command that compiles one program, for the tests of what a start compiles."""

import jax
import numpy as np


def main(options):
    jax.config.update(
        "jax_compilation_cache_dir", options[options.index("--compilation-cache-dir") + 1]
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.jit(lambda x: x * 2 + 1)(np.float32(1))
    return 3 if "--fail" in options else 0
