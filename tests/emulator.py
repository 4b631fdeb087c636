"""The emulator of Cloud Storage, for tests that are skipped where it cannot start."""

import contextlib

import pytest

from experiments.reliability import emulator


@contextlib.contextmanager
def cloud_storage(bucket):
    """Serves an empty bucket; yields the URL for STORAGE_EMULATOR_HOST."""
    for name in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(name, reason=f"buckets are tested with the package {name}")
    with contextlib.ExitStack() as served:
        try:
            url = served.enter_context(emulator.cloud_storage(bucket))
        except OSError as error:
            pytest.skip(f"the emulator of Cloud Storage cannot start: {error}")
        yield url
