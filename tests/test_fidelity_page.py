"""docs/fidelity.md is complete, and the tests that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "fidelity.md").read_text()
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## Point by point")[2].partition("\n## ")[0].splitlines()
    if line.startswith("|")
]
ROWS = TABLE[2:]


def test_every_row_is_full():
    assert len(ROWS) >= 15
    for row in ROWS:
        assert len(row) == len(TABLE[0]) and all(row), row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_of_a_row_exist(row):
    if row[-1].startswith("(none): "):
        return
    for test in row[-1].split(", "):
        (file, name) = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test).groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
