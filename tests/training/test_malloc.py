"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys

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
