"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource, sys
from inmerge_jax.training.environment import configure_malloc

print(configure_malloc() if sys.argv[1] == "keep" else "left")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 50_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def child(argument, **variables):
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, argument],
        env={**{k: v for k, v in os.environ.items() if "MALLOC_" not in k}, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator isn't glibc's")
def test_the_second_allocation_of_a_size_faults_no_page_in():
    answer, faults = child("keep")
    assert answer == "True" and int(faults) < 100
    answer, faults = child("leave")
    assert answer == "left" and int(faults) > 1000


def test_the_users_own_settings_win():
    assert child("keep", MALLOC_TOP_PAD_="1000")[0] == "False"


def test_an_accelerator_keeps_the_allocator_as_it_is():
    assert child("keep", JAX_PLATFORMS="cuda")[0] == "False"
    assert child("keep", JAX_PLATFORMS="tpu,cpu")[0] == "False"
    assert child("keep", JAX_PLATFORMS="")[0] == child("keep", JAX_PLATFORMS="cpu")[0]


ORDER = """
import sys
from jax._src import xla_bridge
from inmerge_jax.training import environment

started, own = [], environment.configure_malloc
def configure_malloc():
    started.append(xla_bridge.backends_are_initialized() or "pandas" in sys.modules)
    return own()
environment.configure_malloc = configure_malloc

from {module} import main
main({arguments})
print("before:", started[0], "at the end:", "pandas" in sys.modules)
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        # Both stop at bad input, after the devices have been counted.
        ("inmerge_jax.cli.train", ["--data", "phantom", "--batch-size", "0"]),
        ("experiments.study.__main__", ["pretrained", "--data-dir", "missing", "--only", "none"]),
    ],
)
def test_the_allocator_is_configured_before_other_threads_exist(tmp_path, module, arguments):
    """JAX's threads may get the arena of a thread that exists, which gives memory back."""
    done = subprocess.run(
        [sys.executable, "-c", ORDER.format(module=module, arguments=arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "before: False at the end: True" in done.stdout, done.stderr
