"""What is said of results that say little: one seed, one class, batch statistics of few seeds."""

import json
from types import SimpleNamespace

import pytest

from experiments.study import batch_statistics, telling
from experiments.study.question import _in_shortcuts, told


def difference(seeds, p_holm):
    return {"mean": 0.1, "low": 0.05, "high": 0.15, "half_width": 0.05, "p_holm": p_holm} | {
        "seeds": [0.1] * seeds
    }


@pytest.mark.parametrize(
    ("seeds", "p_holm", "expected"), [(1, 0.0, False), (2, 0.04, True), (2, 0.06, False)]
)
def test_nothing_is_told_from_one_training(seeds, p_holm, expected):
    assert told(difference(seeds, p_holm)) is expected


def test_a_row_of_one_seed_is_warned_of_wherever_it_is():
    def group(seeds):
        rows = {"a - b": {"auc": difference(3, 0)}, "c - b": {"auc": difference(seeds, 0)}}
        return {"images": 50, "differences": rows}

    assert telling.ONE_SEED in telling.could_tell({"data": group(1)}, "a - b")
    text = telling.could_tell({"data": group(2)}, "a - b")
    assert telling.ONE_SEED not in text and text.endswith("may well have been missed on data.")
    assert "here 0.071 to 0.071" in text


def test_what_could_be_told_stands_in_the_table():
    metrics = {"auc": difference(3, 0.2), "acc": difference(3, 0.2)}
    rows = {name: {**row, "p": 0.1, "p_images": 0.1, "sd": 0.02} for name, row in metrics.items()}
    group = {
        "images": 1050,
        "arms": {"b": rows},
        "differences": {"a - b": rows},
        "merged": {"a": 0.25},
    }
    table = telling.difference_table("title", {"data": group}, "b")
    column = table.columns.index("could tell")
    assert [row[column] for row in table.rows] == ["", "0.071"]
    assert table.rows[0][0] == "data (1,050 images)"


def test_networks_that_know_one_class_are_named():
    groups = {
        "one": {"same": {"a": [0.995, 0.7], "b": [0.5, 0.6]}},
        "labels": {"same": {"a": [None, None]}},
    }
    assert "one: a (1 of 2)." in telling.one_answer(groups)
    assert "labels" not in telling.one_answer(groups)
    assert telling.one_answer({"labels": groups["labels"]}) == ""


def kept_cells(folder, measured):
    """Two arms with two seeds, of which the hashes in `measured` have a measurement."""
    arms = {
        arm: {seed: SimpleNamespace(hash=f"{arm}{seed}") for seed in (0, 1)}
        for arm in ("merge", "finetune")
    }
    one = {"auc": 0.5, "acc": 0.25, "loss": 1.0}
    entries = {name: {"running": one, "renewed": one | {"acc": 0.75}} for name in measured}
    (folder / "study").mkdir()
    (folder / "study" / batch_statistics.FILE).write_text(json.dumps(entries))
    return SimpleNamespace(
        by_arm=lambda: arms,
        record=lambda cell: {"result": {"best_epoch": 2 + int(cell.hash[-1])}},
        folder=folder / "cells",
    )


def test_batch_statistics_are_compared_over_the_seeds_of_all_arms(tmp_path):
    kept = kept_cells(tmp_path, ["merge0", "finetune0", "finetune1"])
    found = batch_statistics.summary(kept)
    assert [(row["seeds"], row["epoch"]) for row in found.values()] == [(1, 2), (1, 2)]
    assert "ACC 0.250 to 0.250" in batch_statistics.told(found)
    assert "ACC 0.750 to 0.750" in batch_statistics.told(found)
    rows = batch_statistics.table({"data": found}).rows
    assert [row[0] for row in rows] == ["data: finetune", "merge"]
    assert rows[0][1:] == ("1", "2.0", "0.500", "0.500", "0.250", "0.750", "1.000", "1.000")


def test_without_a_whole_seed_nothing_is_said(tmp_path):
    found = batch_statistics.summary(kept_cells(tmp_path, ["merge0", "finetune1"]))
    assert found == {} and batch_statistics.told(found) == ""


def test_merges_in_shortcuts_are_counted_and_told():
    layers = ["layer3_0/conv1/kernel", "layer3_0/shortcut_conv/kernel"]
    one = {"layers": layers, "merged": [10, 20], "kernels": [30, 10]}
    two = {"layers": layers, "merged": [0, 10], "kernels": [30, 10]}
    shares = _in_shortcuts([one, two])
    assert shares == {"merged": 0.75, "kernels": 0.25}
    assert _in_shortcuts([{"layers": [], "merged": [], "kernels": []}]) is None
    assert _in_shortcuts([one | {"merged": [0, 0]}]) is None
    groups = {
        "residual": {"shortcuts": {"a": shares, "b": None}},
        "plain": {"shortcuts": {"a": {"merged": 0.0, "kernels": 0.0}}},
    }
    text = telling.in_shortcuts(groups, ("a", "b"))
    assert text.endswith("a: residual 75% of 25%.")
    assert telling.in_shortcuts({"plain": groups["plain"]}, ("a",)) == ""
