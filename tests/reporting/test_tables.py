import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from inmerge_jax.reporting.formatting import signed
from inmerge_jax.reporting.runs import read_run
from inmerge_jax.reporting.summary import summarize
from inmerge_jax.reporting.tables import make_report, markdown_rows, to_rich
from tests.reporting.folder import edit, markdown, write_run


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


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
    for column, results in enumerate(stored.values(), 1):
        for result in results:
            test = result["test"]
            expected = f"{test['auc']:.3f} / {test['acc']:.3f}"
            assert row(text, result["seed"])[column] == expected
    merged = [sum(layer) / 3 for layer in zip(*(r["merged"] for r in stored["inmerge"]))]  # noqa: B905
    for name, count in zip(stored["inmerge"][0]["layers"], merged, strict=True):
        assert (
            row(text, name.removesuffix("/kernel"))[3]
            == f"{count:,.{0 if count == int(count) else 1}f}"
        )


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


def test_headline_states_difference_interval_seeds_and_merges(folder):
    stored = json.loads((folder / "results.json").read_text())["arms"]
    aucs = {arm: [result["test"]["auc"] for result in found] for arm, found in stored.items()}
    interval = stats.ttest_rel(aucs["inmerge"], aucs["finetune"]).confidence_interval(0.95)
    mean = np.mean(np.subtract(aucs["inmerge"], aucs["finetune"]))
    ends = f"[{signed(interval.low)}, {signed(interval.high)}]"
    merged = " ".join(f"{sum(result['merged']):,}" for result in stored["inmerge"])
    assert markdown(folder).splitlines()[0] == (
        "phantom: test AUC of inmerge \u2212 finetune, mean paired difference "
        f"{signed(mean)}, 95% interval {ends}; seeds: 3; kernels merged by seed: {merged}"
    )


def test_differences_have_an_interval_over_seeds_and_a_margin_over_images(folder):
    summary = summarize(read_run(folder))
    low, high = summary.differences["finetune", "backbone"]["acc"].interval
    margin = summary.sampling.margin["finetune", "backbone"]["acc"]
    cells = row(markdown(folder), "finetune \u2212 backbone, ACC")
    assert cells[2:] == [f"[{signed(low)}, {signed(high)}]", f"{margin:.3f}"]


def test_one_seed_has_no_interval(tmp_path):
    text = markdown(write_run(tmp_path / "run", seeds=(5,)))
    assert row(text, "inmerge \u2212 finetune, AUC")[2] == "n/a (one seed)"
    assert "\u00b1" not in row(text, "inmerge")[1]


def test_seeds_that_coincide_get_no_interval(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0, 1))
    edit(folder, set_auc(0.75))
    cells = row(markdown(folder), "inmerge \u2212 finetune, AUC")
    assert cells[1:3] == ["+0.000", "n/a (equal seeds)"]


def test_nothing_merged_is_said_in_headline_and_note(tmp_path):
    text = markdown(write_run(tmp_path / "run", merging=False))
    assert "NOTHING WAS MERGED" in text.splitlines()[0]
    assert "\n- NOTHING WAS MERGED: no selected kernel had a partner" in text
    alone = markdown(write_run(tmp_path / "alone", arms=("inmerge",), merging=False))
    assert "NOTHING WAS MERGED" in alone.splitlines()[0]


def test_merges_mostly_in_shortcuts_are_noted(folder, tmp_path):
    assert "shortcut" not in markdown(folder)
    other = write_run(tmp_path / "run")

    def rename(results):
        for result in results["arms"]["inmerge"]:
            result["layers"][0] = "Block_2/shortcut_conv/kernel"
            result["merged"] = [60, 20, 10, 10]

    edit(other, rename)
    for path in other.rglob("similarity.json"):
        path.unlink()
    assert "- Share of the merges in 1x1 shortcut convolutions: 60%." in markdown(other)


def test_undefined_auc_is_shown_not_dropped(tmp_path):
    folder = write_run(tmp_path / "run")
    edit(folder, set_auc(None, ("inmerge",)))
    text = markdown(folder)
    assert row(text, "inmerge")[1] == "n/a (0 of 3 seeds defined)"
    assert row(text, "inmerge \u2212 finetune, AUC")[1:3] == ["n/a", "n/a"]
    assert "mean paired difference n/a" in text.splitlines()[0]


def test_a_missing_arm_is_shown_as_not_run(tmp_path):
    text = markdown(write_run(tmp_path / "run", arms=("backbone", "inmerge")))
    assert row(text, "finetune")[1:3] == ["not run", "not run"]
    assert "no paired difference, arms that were run: backbone, inmerge" in text


def test_published_row_is_labelled(tmp_path):
    folder = write_run(tmp_path / "run", name="breastmnist")
    edit(folder, lambda results: results["model"].update(width=1.0))
    edit(folder, lambda results: results["dataset"].update(title="breastmnist"))
    assert row(markdown(folder), "resnet18 28 px, published")[1:3] == ["0.901", "0.863"]


def test_merging_beyond_the_paper_is_noted(folder):
    assert "extends the paper" not in markdown(folder)
    edit(folder, lambda results: results["rule"].update(units=["heads", "neurons"]))
    assert "Units that merge: heads, neurons. This extends the paper" in markdown(folder)


def test_the_rule_is_compared_with_the_released_codes(folder):
    text = markdown(folder)
    assert row(text, "threshold")[1:] == ["0.1", "0.3"]
    assert row(text, "skip")[1:] == ["4", "10"]
    edit(folder, lambda results: results["rule"].update(quantile=0.9))
    assert row(markdown(folder), "threshold")[1:] == ["quantile 0.9 of each layer", "0.3"]
    edit(folder, lambda results: results["rule"].update(units=["heads", "neurons"]))
    assert row(markdown(folder), "units")[1] == "heads, neurons"


def test_means_of_layers_add_up_and_a_layer_without_pairs_has_none(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0, 1))
    for path in folder.rglob("similarity.json"):
        stored = json.loads(path.read_text())
        for layers in stored.values():
            layers[4]["above"] = dict.fromkeys(layers[4]["above"])
        path.write_text(json.dumps(stored))
    edit(folder, lambda r: r["arms"]["inmerge"][0]["merged"].__setitem__(0, 3))
    edit(folder, lambda r: r["arms"]["inmerge"][1]["merged"].__setitem__(0, 4))
    (table,) = (t for t in make_report(read_run(folder)).tables if "layer" in t.kinds)
    merged = [float(cells[3].replace(",", "")) for cells in table.rows]
    assert table.rows[0][3] == "3.5" and sum(merged[:-1]) == pytest.approx(merged[-1], abs=0.3)
    assert table.rows[0][-1] == "n/a" and table.rows[1][-1] == "21.00%"


def test_pairs_above_are_counted_at_the_runs_own_threshold(tmp_path):
    folder = write_run(tmp_path / "run")
    (layers,) = (t for t in make_report(read_run(folder)).tables if "layer" in t.kinds)
    assert layers.columns[-1] == "pairs above 0.1 before" and layers.rows[0][-1] == "21.00%"
    edit(folder, lambda results: results["rule"].update(threshold=0.15))
    (layers,) = (t for t in make_report(read_run(folder)).tables if "layer" in t.kinds)
    assert layers.columns[-1] == "merged of selected"


def test_markdown_rows_align_and_escape():
    assert markdown_rows(("a", "b", "c"), [("1|2", "", "x")], "rll") == (
        "| a | b | c |\n| ---: | --- | --- |\n| 1\\|2 |  | x |"
    )
