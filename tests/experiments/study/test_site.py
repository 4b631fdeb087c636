"""The page of all answers, as a browser shows it; and the stored answers that it shows."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from experiments import report, tables
from experiments.study import pages, store, telling
from experiments.study.all_questions import QUESTIONS, cell_rows
from experiments.study.cells import with_backbones
from experiments.study.question import RESULTS, Kept

ANSWERED = [question for question in QUESTIONS if question.stored() is not None]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOT = tables.ROOT / "site" / "screenshot.png"
PROBE = """<script>
window.addEventListener("load", () => {
  const broken = [...document.images].filter((image) => !image.naturalWidth).length;
  const empty = [...document.querySelectorAll("figure svg")].filter((svg) => {
    const box = svg.getBoundingClientRect();
    return box.width < 100 || box.height < 60;
  }).length;
  const wide = document.documentElement.scrollWidth > window.innerWidth + 1;
  const requests = performance.getEntriesByType("resource").length;
  const figures = document.querySelectorAll("figure").length;
  const inner = window.innerWidth;
  const found = JSON.stringify({ broken, empty, wide, requests, figures, inner });
  parent.document.body.dataset.probe = found;
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report.build(tmp_path_factory.mktemp("site") / "index.html")


def browse(page, *options):
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *options]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_whole(page, width):
    probed = page.with_name(f"probed{width}.html")
    content = page.read_text().replace("</body>", PROBE + "</body>")
    # In a frame, since the browser's own window is never narrower than 500 px.
    frame = f'<iframe style="border: 0" width="{width}" height="900" srcdoc="{{}}"></iframe>'
    probed.write_text(f"<!doctype html><body>{frame.format(html.escape(content))}")
    done = browse(probed, "--dump-dom", "--window-size=1300,1000")
    probe = re.search(r'data-probe="([^"]+)"', done.stdout)
    assert probe, done.stderr
    assert json.loads(html.unescape(probe[1])) == {
        "broken": 0,
        "empty": 0,
        "wide": False,
        "requests": 0,
        "figures": sum(
            len(question.figures(question.stored()["analysis"])) for question in ANSWERED
        ),
        "inner": width,
    }
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_a_screenshot_is_kept(page):
    SCREENSHOT.parent.mkdir(exist_ok=True)
    browse(page, f"--screenshot={SCREENSHOT}", "--window-size=1200,6000")
    with Image.open(SCREENSHOT) as picture:
        assert picture.size == (1200, 6000)
        assert len(set(picture.convert("L").resize((120, 600)).tobytes())) > 20


def test_it_asks_for_nothing_from_elsewhere(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "@import" not in text and "url(http" not in text


def rows_of(page):
    """The cells of every row of every table, as text."""
    return [
        tuple(html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL))
        for row in re.findall(r"<tr.*?</tr>", page.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize("question", ANSWERED, ids=lambda question: question.name)
def test_its_tables_hold_the_stored_numbers(question, page):
    text, rows = page.read_text(), rows_of(page)
    stored = question.stored()
    for table in question.tables(stored["analysis"]):
        wanted, size = list(table.rows), len(table.rows)
        assert any(rows[start : start + size] == wanted for start in range(len(rows))), table.title
    text = html.unescape(text)
    for _, line in telling.lines(question, stored):
        assert line in text


def test_the_first_questions_numbers_stand_where_they_belong(page):
    """Read off the JSON here, not by the code that makes the tables."""
    rows = rows_of(page)
    groups = json.loads((RESULTS / "study" / "main_effect.json").read_bytes())["analysis"]["groups"]

    def after(first):
        return rows[next(i for i, row in enumerate(rows) if row[:1] == (first,)) :]

    def signed(value):
        return f"{value:+.3f}".replace("-", "\u2212")

    for name, group in groups.items():
        for arm, found in group["arms"].items():
            auc, acc = (
                f"{found[m]['mean']:.3f} \u00b1 {found[m]['sd']:.3f}" for m in ("auc", "acc")
            )
            assert after(f"{name}: {arm}")[0][3:5] == (auc, acc)
        below = after(f"{name} ({group['images']:,} images): finetune itself")
        for arm in ("inmerge", "inmerge, adaptive"):
            row = next(row for row in below if row[0] == arm)
            for column, metric in ((3, "auc"), (4, "acc")):
                gap = group["differences"][f"{arm} - finetune"][metric]
                mean, low, high = (signed(gap[what] + 0.0) for what in ("mean", "low", "high"))
                assert row[column] == f"{mean} [{low}, {high}]"


@pytest.mark.parametrize("question", ANSWERED, ids=lambda question: question.name)
def test_an_unfinished_answer_says_so(question):
    stored = question.stored()
    run = dict(telling.lines(question, stored))["What was run"]
    assert (stored["finished"] < stored["planned"]) == ("not complete" in run)


@pytest.mark.long
@pytest.mark.parametrize("question", ANSWERED, ids=lambda question: question.name)
def test_the_stored_answer_is_that_of_the_kept_cells(question):
    """Means, deviations and shares are computed anew; the draws of the bootstrap are not."""
    if not question.cells:
        pytest.skip("this question measures, and has no cells")
    stored, grid = question.stored(), with_backbones(question.cells)
    assert stored["planned"] == len(grid)
    assert stored["finished"] == len(Kept.of(grid).cells), f"run experiments.{question.name}"
    rows = {row.cell.hash: row for row in cell_rows(question)}
    for group in stored["analysis"].get("groups", {}).values():
        for arm, hashes in group.get("cells", {}).items():
            seeds = group["arms"][arm]["auc"]["seeds"]
            assert seeds == pytest.approx([rows[one].auc for one in hashes], abs=1e-6)


def assert_close(one, two):
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_close(one[name], two[name])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    else:
        assert one == two


@pytest.mark.long
def test_a_sceptic_gets_the_same_analysis(tmp_path):
    question = next(question for question in ANSWERED if question.name == "adaptive")
    again = json.loads(json.dumps(question.analyse(Kept.of(with_backbones(question.cells)))))
    assert_close(again, question.stored()["analysis"])


def test_figures_are_up_to_date():
    wanted = pages.figures()
    found = {path.name: path.read_text() for path in tables.FIGURES.glob("*.svg")}
    assert found.keys() == wanted.keys() and found == wanted, "run python -m experiments.tables"


def test_kept_cells_name_no_folder_of_a_machine():
    for path in store.CELLS.glob("*.json"):
        text = path.read_text()
        assert "/work" not in text and "/tmp" not in text and "/home" not in text, path
