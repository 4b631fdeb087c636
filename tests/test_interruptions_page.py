"""The tests that docs/interruptions.md names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(
    r"`(tests/[\w/]+\.py)::(test_\w+)` \|$",
    (ROOT / "docs" / "interruptions.md").read_text(),
    re.MULTILINE,
)


def test_every_row_names_one():
    text = (ROOT / "docs" / "interruptions.md").read_text()
    text = text.partition("## Cases")[2].partition("## Kills")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(NAMED) == len(rows) - 2 >= 20


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_of_a_row_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
