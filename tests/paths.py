"""Where tests find real data that is not part of the project."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("INMERGE_SHARED", Path(__file__).parents[2] / "shared"))
MEDMNIST = SHARED / "data" / "medmnist"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skips a test, naming the file, where the real data is not at hand."""
    return pytest.mark.skipif(not path.exists(), reason=f"needs real data at {path}")
