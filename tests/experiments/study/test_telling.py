"""What is said of results that say little: one seed, one class, batch statistics of few seeds."""

import json
from types import SimpleNamespace

import numpy as np

from experiments.study import batch_statistics, question, telling
from experiments.study.question import _in_shortcuts, add_holm, told


def difference(seeds, p_holm):
    row = {"mean": 0.1, "low": 0.05, "high": 0.15, "half_width": 0.05, "p": 0.001, "p_images": 0.2}
    row |= {"seeds_error": 0.0, "images_error": 0.025, "seeds": [0.1] * seeds}
    return row if p_holm is None else row | {"p_holm": p_holm, "comparisons": 4}


def group(seeds, p_holm=0.2, identical=()):
    rows = {metric: difference(seeds, p_holm) for metric in ("auc", "acc")}
    return {
        "images": 1050,
        "arms": {"b": {metric: row | {"sd": 0.02} for metric, row in rows.items()}},
        "differences": {"a - b": rows},
        "identical": {"a - b": list(identical)},
        "merged": {"a": 0.25},
    }


def test_holms_correction_leaves_out_one_training_and_the_same_network_twice():
    groups = [group(1, None), group(3, None), group(3, None, [0, 1, 2]), group(3, None, [1])]
    groups.append(group(3, None, [0, 2]))
    groups[3]["differences"]["a - b"]["auc"]["p"] = 0.5
    add_holm(groups, [("a", "b")])
    rows = [one["differences"]["a - b"]["auc"] for one in groups]
    assert [row.get("p_holm") for row in rows] == [None, 0.004, None, 0.5, None]
    assert [told(row) for row in rows] == [False, True, False, False, False]
    assert rows[1]["comparisons"] == 4, "of both metrics"


def test_a_row_of_one_seed_is_warned_of_wherever_it_is():
    few = group(3)
    few["differences"]["c - b"] = group(1)["differences"]["a - b"]
    assert telling.ONE_SEED in telling.could_tell({"data": few}, "a - b")
    text = telling.could_tell({"data": group(2)}, "a - b")
    assert telling.ONE_SEED not in text
    assert "is 0.070 to 0.070 in AUC and 0.070 to 0.070 in ACC, by row" in text
    assert text.endswith("missed in AUC on every data set here, and in ACC on every data set here.")
    # 2.50 + 0.84 standard errors: 0.05 over four comparisons, and four times out of five.
    assert "needs up to 0.083 in AUC and up to 0.083 in ACC" in text


def test_data_that_resolve_little_are_named():
    fine = group(3)
    for metric in ("auc", "acc"):
        fine["differences"]["a - b"][metric]["images_error"] = 0.001
    text = telling.could_tell({"coarse": group(3), "fine": fine}, "a - b")
    assert text.endswith("may well have been missed in AUC on coarse, and in ACC on coarse.")
    assert "0.003 to 0.070 in AUC" in text
    fine["differences"]["a - b"]["acc"]["images_error"] = 0.02
    text = telling.could_tell({"fine": fine}, "a - b")
    assert text.endswith("may well have been missed in ACC on every data set here.")


def test_what_no_difference_could_show_is_said():
    many = group(2)
    many["differences"]["a - b"]["auc"]["seeds_error"] = 0.1
    text = telling.could_tell({"data": many}, "a - b")
    assert "needs in some rows more than there can be in AUC and up to" in text


def test_what_does_not_differ_at_all_could_not_be_seen():
    same = {"data": group(2, None, [0, 1])}
    assert telling.could_tell(same, "a - b") == "Nothing differs in two seeds, so far."
    assert telling.could_tell({}, "a - b").startswith("Nothing differs")
    assert telling.could_tell({"data": group(1, None)}, "a - b").startswith("Nothing differs")
    assert telling.could_tell({"data": group(3, 0.2, [0, 1])}, "a - b").startswith("Nothing")
    (_, row) = telling.difference_table("title", same, "b").rows
    assert row[-6:] == ("", "", "same", "", "", "") and row[1] == "2"
    (_, row) = telling.difference_table("title", {"data": group(3, None, [0, 1])}, "b").rows
    assert row[-6:] == ("", "", "one seed", "", "0.20", "") and row[1] == "3, 2 same"


def test_what_could_be_seen_stands_in_the_table():
    table = telling.difference_table("title", {"data": group(3)}, "b")
    column = table.columns.index("detectable, ACC")
    assert [row[column] for row in table.rows] == ["", "0.070"]
    assert table.rows[0][0] == "data (1,050 images): b itself"
    (_, row) = telling.difference_table("title", {"data": group(1)}, "b").rows
    assert row[column : column + 2] == ("", "one seed")


def test_networks_that_know_one_class_are_named():
    groups = {
        "one": {"same": {"a": [0.995, 0.7], "b": [0.5, 0.6]}},
        "learned": {"same": {"a": [0.98, 0.9]}},
    }
    assert "one: a (1 of 2)." in telling.one_answer(groups)
    assert "learned" not in telling.one_answer(groups)
    assert telling.one_answer({"learned": groups["learned"]}) == ""


def test_with_several_labels_an_answer_is_the_set_of_findings():
    scores = np.array([[0.9, 0.1], [0.8, 0.4], [0.6, 0.7], [0.1, 0.2]])
    assert question._most_frequent(scores, "multi-label, binary-class") == 0.5
    assert question._most_frequent(scores, "multi-class") == 0.5
    assert question._most_frequent(scores * 0.5, "multi-label, binary-class") == 1.0


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


def test_renewed_differences_are_paired_by_training():
    def arm(*values):
        return {"each": [{kind: dict.fromkeys(("auc", "acc", "loss"), v)
                          for kind in ("running", "renewed")} for v in values]}  # fmt: skip

    groups = {
        "one": {"merge": arm(0.5, 0.75), "any": arm(0.25, 0.25)},
        "two": {"merge": arm(0.5), "any": arm(0.5)},
        "empty": {},
    }
    row = batch_statistics.paired(groups, "merge")["any"]
    assert row["trainings"] == 3 and row["renewed"]["auc"]["mean"] == 0.25
    (printed,) = batch_statistics.paired_table(groups, "merge").rows
    assert printed[:2] == ("merge - any", "3")
