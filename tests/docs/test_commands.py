"""The commands that the documentation prints have options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from inmerge_jax.cli.options import parse_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page):
    """The `inmerge train` commands of a page's code blocks."""
    text = page.read_text().replace("\\\n", " ")
    for match in re.findall(r"^ {4}.*?\binmerge train ([^&|\n\"]*)", text, re.MULTILINE):
        line = match.partition("#")[0].strip()
        if not set("$.").intersection(line.split()[-1]) and "$" not in line:
            yield line


FOUND = [(page.name, line) for page in PAGES for line in commands(page)]


def test_commands_are_found():
    assert len(FOUND) >= 6


@pytest.mark.parametrize(("page", "line"), FOUND)
def test_training_commands_parse(page, line):
    if line != "--help":
        parse_config(shlex.split(line))
