"""Published tables are those of the stored results, and so is every number in the answers."""

import json
import re

import numpy as np
import pytest

from experiments import tables
from experiments.benchmarks.timing import Row, ratio_row
from experiments.study.statistics import MARGIN
from experiments.tables import PUBLISHED
from inmerge_jax.errors import UsageError
from tests.long import long_unless

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
NUMBER = re.compile(
    rf"(?<![\w.,/{TIMES}-])([+{MINUS}]?)(\d+(?:,\d{{3}})*(?:\.\d+)?)( %)?(?![\w/]|\.\d)"
)


# `make docs` checks every page, and so does .ci/run.
_ANALYSED = (
    *("README.md", "docs/results/index.md"),
    *(f"docs/results/{question.page}" for question in PUBLISHED.values()),
)


@pytest.mark.parametrize("page", long_unless(lambda page: page not in _ANALYSED, tables.PAGES))
def test_every_page_is_up_to_date(page):
    text = (tables.ROOT / page).read_text()
    assert tables.render(text, page) == text, "run python -m experiments.tables"


@pytest.mark.long
def test_a_number_typed_by_hand_is_noticed():
    readme = (tables.ROOT / "README.md").read_text()
    begin = "<!-- begin main -->"
    assert begin in readme
    forged = readme.replace(begin, begin + "\n\nAUC 0.999")
    assert tables.render(forged) == readme


def test_a_missing_place_is_an_error():
    with pytest.raises(UsageError, match="needs the lines <!-- begin main -->"):
        tables.render("# nothing")


def test_the_cost_of_an_arm_has_an_interval_of_neighbouring_steps(tmp_path):
    plain = np.linspace(1, 2, 12)
    factors = [0.5, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8, 2, 9]
    seconds = {"paper": (plain * factors).tolist(), "plain": plain.tolist()}
    other = Row("step, vgg16", "", 3.0, 3.0, 3.0)
    rows = [ratio_row("step, vgg16", seconds, "paper", "plain"), *(other,) * 4]
    around = {"cpus": 2, "started": "2026-01-01", "git": {"commit": "a" * 40, "dirty": False}}
    section = {"environment": around, "rows": [row.to_dict() for row in rows]}
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"arms": section}))
    # The third and the tenth of twelve: 0.5 to the 12th times 1 + 12 + 66 is 0.019 below each.
    assert "| vgg16 | 1.50 s | 1.400 [1.000, 1.800] | 3, 3 | 3, 3.000 |" in tables.arms_table(path)


def leaves(value):
    """Every number in nested dicts and lists."""
    if isinstance(value, dict):
        return [x for one in value.values() for x in leaves(one)]
    if isinstance(value, list | tuple):
        return [x for one in value for x in leaves(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def settings(question):
    """The numbers of a question's treatments, and the margin of its verdicts."""
    described = [trial.treatment.described() for trial in question.trials]
    return {abs(x) for x in leaves(described)} | {MARGIN}


def unknown_numbers(text, analysis, allowed):
    """Numbers in `text` that are neither allowed nor a rounded number of the analysis."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    known, found = leaves(analysis), []
    for sign, digits, percent in NUMBER.findall(text):
        decimals = len(digits.partition(".")[2])
        value = float(digits.replace(",", "")) * (-1 if sign == MINUS else 1)
        scaled = [100 * x for x in known] if percent else known
        if not sign:
            scaled = [abs(x) for x in scaled]
        if not (value in allowed or any(round(x, decimals) == value for x in scaled)):
            found.append(sign + digits + percent)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_of_an_answer_is_of_the_stored_results(name):
    question = PUBLISHED[name]
    page = (tables.ROOT / "docs" / "results" / question.page).read_text()
    answer = page.partition("## Answer\n")[2].partition("\n## ")[0]
    assert len(NUMBER.findall(answer)) >= 4 and "**Verdict: " in answer
    analysis = tables.analysis(name)
    assert not unknown_numbers(answer, analysis, settings(question))
    wrong = ["+7.0123", f"{MINUS}0.9567", "98,765", "43.21 %"]
    forged = f"{answer}\nThe difference is {wrong[0]} [{wrong[1]}] of {wrong[2]}, or {wrong[3]}."
    assert unknown_numbers(forged, analysis, settings(question)) == wrong


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_handwritten_verdict_is_the_computed_one(name):
    question = PUBLISHED[name]
    page = (tables.ROOT / "docs" / "results" / question.page).read_text()
    verdict = re.search(r"\*\*Verdict: (.*?)\.\*\*", page, re.DOTALL)[1].replace("\n", " ")
    for part in question.overview(tables.analysis(name)).verdict.split("; "):
        words, pairs = re.fullmatch(
            r"(.*?)(?: \(([\d,]+ (?:pairs|data sets)) would decide\))?", part
        ).groups()
        named = ["descriptive"] if words.startswith("descriptive") else words.split(": ")
        assert all(name in verdict for name in named)
        assert pairs is None or pairs in verdict


@pytest.mark.parametrize("page", ["README.md", "docs/results/index.md"])
def test_the_first_sentence_about_results_is_the_primary_verdict(page):
    text = " ".join((tables.ROOT / page).read_text().replace("\n> ", " ").split())
    first = text.partition("**Status.** " if page == "README.md" else "# Results ")[2]
    first = first.partition("From random weights")[0]
    shown = PUBLISHED["pretrained"].overview(tables.analysis("pretrained"))
    number, interval = shown.effect.partition(": ")[2].split(" ", 1)
    assert f"{number} {interval} over {shown.trials} pairs" in first
    here, others = shown.verdict.split("; ")
    assert f"{here.partition(' on ')[0]} on the five data sets" in first
    assert others.partition(" for")[0] in first


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_page_of_results_is_short(name):
    page = (tables.ROOT / "docs" / "results" / PUBLISHED[name].page).read_text()
    assert len(page.splitlines()) <= 80
    for row in re.findall(r"^\| --- .*$", page, re.MULTILINE):
        assert row.count("|") - 1 <= 6
    command = f"python -m experiments.study {name}"
    assert command in page and f"](../figures/results/{PUBLISHED[name].page[:-3]}.svg)" in page


@pytest.mark.long
def test_every_question_has_a_figure_and_plain_numbers(tmp_path):
    assert tables.main(["--figures", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    pages = ("beyond-convolutions.md", *(question.page for question in PUBLISHED.values()))
    assert names == {page.replace(".md", ".svg") for page in pages}
    assert all("<svg " in path.read_text() for path in tmp_path.iterdir())
    for name in PUBLISHED:
        json.dumps(tables.analysis(name))
    assert tables.main(["--nothing"]) == 2


def test_the_provenance_on_the_index_is_counted_from_the_archive():
    page = (tables.ROOT / "docs" / "results" / "index.md").read_text()
    trained = [record["trained"] for record in tables.published_records().values()]
    changed = sum(one["git"]["dirty"] for one in trained)
    unknown = sum(one["processor"] is None for one in trained)
    words = " ".join(page.split())
    assert f"{changed} of the {len(trained)} trainings ran with uncommitted changes" in words
    assert f"for {unknown} the processor was not recorded" in words
