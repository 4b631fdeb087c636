"""Relative links and anchors of README.md and docs/ resolve; the site lists every page."""

import json
import re
from pathlib import Path

import pytest

from experiments.tables import PUBLISHED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted(DOCS.rglob("*.ipynb")),
]


# Made by `make docs`, one for each page of results.
BUILT = {
    DOCS / "figures" / "results" / Path(page).with_suffix(".svg")
    for page in ("beyond-convolutions.md", *(question.page for question in PUBLISHED.values()))
}


def text_of(path):
    """The Markdown of a page, without its code blocks."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading):
    """The anchor that GitHub and MkDocs give a heading of ASCII words."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(path):
    """The anchors of a page's headings, and of its API entries."""
    text = text_of(path)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {slug(heading) for heading in headings} | set(
        re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    )


def broken(path):
    """The links of a page that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() and target not in BUILT:
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    assert not list(broken(path))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](other.md) [d](https://example.org)")
    assert list(broken(page)) == ["#two: no such heading", "other.md: no such file"]


def test_the_navigation_lists_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"(\S+\.(?:md|ipynb))$", nav, re.MULTILINE)
    pages = [path for path in PAGES if path.is_relative_to(DOCS)]
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in pages)


def test_every_example_is_included():
    included = re.findall(
        r'^ *--8<-- "(examples/\w+\.py)"$', (DOCS / "examples.md").read_text(), re.M
    )
    programs = [path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__"]
    assert sorted(included) == sorted(str(path.relative_to(ROOT)) for path in programs)
