import io
import json
import re

import pytest
from rich.console import Console

from inmerge_jax.reporting.runs import read_run
from inmerge_jax.reporting.tables import main, make_report, markdown, to_rich
from tests.reporting.folder import edit, write_run


def row(text, name, table=0):
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


def set_auc(value, arms=("backbone", "finetune", "inmerge")):
    def change(results):
        for arm in arms:
            for result in results["arms"][arm]:
                result["test"]["auc"] = value

    return change


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "three")


def test_markdown_prints_the_stored_numbers(folder):
    stored = json.loads((folder / "results.json").read_text())["arms"]
    text = markdown(folder)
    for arm, results in stored.items():
        tests = [result["test"] for result in results]
        expected = [f"{test['auc']:.3f} / {test['acc']:.3f}" for test in tests]
        assert row(text, arm, table=1)[1:] == expected
    merged = [sum(layer) / 3 for layer in zip(*(r["merged"] for r in stored["inmerge"]))]  # noqa: B905
    for name, count in zip(stored["inmerge"][0]["layers"], merged, strict=True):
        assert row(text, name.removesuffix("/kernel"))[3] == f"{count:,.0f}"


def test_every_markdown_row_has_as_many_cells_as_its_header(folder):
    for block in re.findall(r"(?:^\|.*\n)+", markdown(folder), re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_terminal_table_has_the_same_cells(folder):
    report = make_report(read_run(folder))
    console = Console(file=io.StringIO(), width=200)
    console.print(to_rich(report))
    printed = console.file.getvalue()
    for table in report.tables:
        for cells in table.rows:
            assert all(cell in printed for cell in cells)


def test_headline_says_when_the_interval_includes_zero(folder, tmp_path):
    assert "interval includes zero" in markdown(folder)
    clear = write_run(tmp_path / "clear")

    def lift(results):
        for index, result in enumerate(results["arms"]["inmerge"]):
            other = results["arms"]["finetune"][index]["test"]["auc"]
            result["test"]["auc"] = other + 0.002 + 0.0001 * index

    edit(clear, lift)
    text = markdown(clear)
    assert "interval excludes zero: over these seeds merging did better" in text
    assert "it is smaller than that, so other test images may show otherwise" in text


def test_one_seed_claims_nothing(tmp_path):
    text = markdown(write_run(tmp_path / "run", seeds=(5,)))
    assert "(one seed: no interval)" in row(text, "inmerge \u2212 finetune")[1]
    assert "That shows no effect either way" in text
    assert "\u00b1" not in row(text, "inmerge")[1]


def test_seeds_that_coincide_get_no_interval(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0, 1))
    edit(folder, set_auc(0.75))
    text = markdown(folder)
    assert row(text, "inmerge \u2212 finetune")[1] == "+0.000 (equal by chance: no interval)"


def test_nothing_merged_is_said_first(tmp_path):
    text = markdown(write_run(tmp_path / "run", merging=False))
    assert text.splitlines()[0].startswith("phantom: nothing was merged")
    assert "NOTHING WAS MERGED" in text


def test_undefined_auc_is_shown_not_dropped(tmp_path):
    folder = write_run(tmp_path / "run")
    edit(folder, set_auc(None, ("inmerge",)))
    text = markdown(folder)
    assert row(text, "inmerge")[1] == "n/a (0 of 3 seeds defined)"
    assert row(text, "inmerge \u2212 finetune")[1].startswith("n/a")
    assert "the test AUC is undefined for every seed" in text


def test_a_missing_arm_is_shown_as_not_run(tmp_path):
    text = markdown(write_run(tmp_path / "run", arms=("backbone", "inmerge")))
    assert row(text, "finetune")[1:3] == ["not run", "not run"]
    assert "no comparison is possible" in text


def test_published_row_is_labelled(tmp_path):
    folder = write_run(tmp_path / "run", name="breastmnist")
    edit(folder, lambda results: results["model"].update(width=1.0))
    edit(folder, lambda results: results["dataset"].update(title="breastmnist"))
    assert row(markdown(folder), "resnet18 28 px, published")[1:3] == ["0.901", "0.863"]


def test_rule_that_is_not_the_papers_is_explained(folder):
    text = markdown(folder)
    assert "threshold 0.1 (there 0.3), skip 4 (there 10)" in text
    assert "0.40% of the median layer's kernel pairs" in text


def test_a_threshold_that_adapts_is_explained(folder):
    edit(folder, lambda results: results["rule"].update(quantile=0.9))
    text = markdown(folder)
    assert "skip 4 (there 10), each layer's quantile 0.9 as its threshold (there 0.3)" in text
    assert "threshold 0.1" not in text and "above 0.3." in text


def test_the_released_codes_rule_is_named_so(tmp_path):
    folder = write_run(tmp_path / "run")
    edit(folder, lambda results: results["rule"].update(threshold=0.3, skip=10))
    assert "The rule is the released code's" in markdown(folder)


def test_command_line(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == markdown(folder)
    assert main([str(tmp_path / "absent")]) == 2
    assert "no results.json" in capsys.readouterr().err
    assert main([]) == 2
