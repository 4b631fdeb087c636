"""The programs in examples/ run as they are, and merge."""

import importlib
import re
from pathlib import Path

import pytest

from tests.long import long_unless

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


QUICK = ("nnx",)


@pytest.mark.parametrize("name", long_unless(QUICK, NAMES))
def test_an_example_trains_and_merges(name, capsys):
    importlib.import_module(f"examples.{name}").main()
    printed = capsys.readouterr().out
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == 2 and max(losses) < 3
    *_, table = printed.partition("layer ")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows and sum(int(row[-2]) for row in rows) > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 120
