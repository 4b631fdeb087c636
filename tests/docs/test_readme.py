"""README.md is short, and its sample runs as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "README.md").read_text().splitlines()


def test_it_has_at_most_120_lines():
    assert len(LINES) <= 120


def test_installation_is_within_the_first_40_lines():
    assert "## Installation" in LINES[:40]
    assert any(line.startswith("pip install .") for line in LINES[:40])


def test_the_sample_trains_and_merges(capsys, recwarn):
    (sample,) = re.findall(r"```python\n(.*?)```", "\n".join(LINES), re.DOTALL)
    exec(compile(sample, "README.md", "exec"), {})
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("layer")
    assert len(rows) == 2 and all(int(row.split()[-2]) > 0 for row in rows)
    assert not [warning for warning in recwarn if "has merged" in str(warning.message)]


@pytest.mark.parametrize("name", ["CITATION.cff", "CONTRIBUTING.md", "LICENSE"])
def test_it_links_the_project_files(name):
    assert f"({name})" in "\n".join(LINES)
