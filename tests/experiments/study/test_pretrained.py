"""The primary question: its grid, the choice of learning rates, and what is looked at when."""

import dataclasses

import numpy as np
import pytest

from experiments.study import statistics
from experiments.study.archive import Archive, Labels
from experiments.study.questions import pretrained
from experiments.study.render import difference
from experiments.study.trials import with_dependencies
from inmerge_jax.training.metrics import compute_metrics

IMAGES, SEEDS = 40, 4
DATA = ("breastmnist_64", "retinamnist_64", "chestxray14_rgb")
LAYERS = ["conv10/kernel", "conv11/kernel"]


def record(trial, scores, labels, val=0.8):
    metrics = compute_metrics(labels.labels, scores, labels.task)
    layers = LAYERS if trial.treatment.kind in ("merge", "released") else []
    above = 0.02 if trial.arm == "backbone" else 0.01
    similar = [{"name": name, "above": {"0.3": above}} for name in LAYERS]
    result = {"test": {"auc": metrics.auc, "acc": metrics.acc}, "steps": 4}
    result |= {"val": {"auc": val, "same": 0.5}}
    result |= {"layers": layers, "kernels": [512] * len(layers), "seconds": 1.0}
    result |= {"merged": [30, 60] if layers else [], "selected": [100, 100] if layers else []}
    result |= {"merged_by_epoch": [[10, 20], [20, 40]]} if layers else {}
    return {"arm": trial.arm, "result": result, "similarity": {"before": similar, "after": similar}}


def stored(trials, gains=None, val=None):
    """An archive of these trials, whose scores are random; `gains` by arm shift the positives."""
    labels = Labels(np.tile([0, 1], IMAGES // 2).astype(np.int32), "binary-class", None)
    records, arrays = {}, {}
    for trial in with_dependencies(trials):
        rng = np.random.default_rng([trial.backbone.seed, len(trial.backbone.data)])
        logits = labels.labels + rng.standard_normal(IMAGES)
        logits += (gains or {}).get(trial.arm, 0) * labels.labels
        p = 1 / (1 + np.exp(-logits))
        scores = np.stack([1 - p, p], 1).astype(np.float32)
        reached = (val or {}).get(trial.backbone.rate, 0.8)
        records[trial.hash] = record(trial, scores, labels, reached)
        arrays[f"scores/{trial.hash}"] = scores
    return Archive(records, arrays, {trial.backbone.data: labels for trial in trials})


BEST = {1e-4: 0.5, 1e-3: 0.95}
"""Validation AUC by learning rate; 0.8 for others."""


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(pretrained, "LOOKS", (SEEDS, 2 * SEEDS, 3 * SEEDS))
    monkeypatch.setattr(pretrained, "RECIPES", {data: pretrained.RECIPES[data] for data in DATA})


def comparison():
    return pretrained.comparison_grid(stored(pretrained.selection_grid(), val=BEST))


def test_the_grid_is_that_of_the_protocol():
    trials = comparison()
    assert len(trials) == 16 * 5 * 4 and len(with_dependencies(trials)) == 16 * 5 * 5
    assert {trial.backbone.seed for trial in trials}.isdisjoint(pretrained.SELECTION_SEEDS)
    for trial in trials:
        assert trial.backbone.rate == 1e-3 and trial.learning_rate == pytest.approx(1e-4)
        assert trial.epochs == trial.backbone.epochs
        assert trial.treatment.skip == 10 and trial.treatment.probability == 0.3
    assert len(pretrained.selection_grid()) == 5 * 4 * 3


def test_a_learning_rate_is_chosen_by_mean_validation_auc():
    trials = pretrained.selection_grid()
    found = pretrained.selection(stored(trials, val=BEST))
    assert pretrained.chosen(found) == dict.fromkeys(pretrained.RECIPES, 1e-3)
    rates = found["breastmnist_64"]
    assert rates[1e-3]["auc"] == [0.95] * 3 and rates[1e-3]["accepted"]
    assert not rates[1e-4]["accepted"]
    text = pretrained.rates_table(stored(trials, val=BEST))
    assert "**0.950 (0.950 to 0.950)**" in text
    assert "0.500 (0.500 to 0.500), not accepted" in text
    some = stored([trial for trial in trials if trial.backbone.rate < 3e-3])
    assert pretrained.chosen(pretrained.selection(some)) == {}
    assert pretrained.comparison_grid(some) == ()
    # A data set whose rate is chosen need not wait for the others, but no answer is given.
    one = [t for t in trials if t.backbone.data == "retinamnist_64"]
    grid = pretrained.comparison_grid(stored(one, val=BEST))
    assert len(grid) == 16 * 4 and {t.backbone.data for t in grid} == {"retinamnist_64"}
    archive = stored((*one, *grid), val=BEST)
    assert set(pretrained.analyse(archive)) == {"selection", "planned", "stored", "diverged"}
    assert pretrained.comparison_grid(archive) == grid
    assert not pretrained.QUESTION.is_complete(archive)


def test_a_rate_whose_backbones_are_not_accepted_is_not_chosen():
    trials = pretrained.selection_grid()
    for field, value in (("auc", 0.59), ("same", 1.0)):
        found = stored(trials, val=BEST)
        (bad,) = (
            t
            for t in trials
            if (t.backbone.data, t.backbone.rate, t.backbone.seed) == ("retinamnist_64", 1e-3, 101)
        )
        found.records[bad.hash]["result"]["val"][field] = value
        rates = pretrained.chosen(pretrained.selection(found))
        assert rates == {**dict.fromkeys(pretrained.RECIPES, 1e-3), "retinamnist_64": 3e-4}
        assert "not accepted" in pretrained.rates_table(found)
        # Of images with several labels, the same one may have the highest score.
        labels = found.labels["retinamnist_64"]._replace(task="multi-label, binary-class")
        found.labels["retinamnist_64"] = labels
        rates = pretrained.chosen(pretrained.selection(found))
        assert rates["retinamnist_64"] == (1e-3 if field == "same" else 3e-4)


def test_a_data_set_without_an_accepted_rate_is_not_compared():
    trials = pretrained.selection_grid()
    found = stored(trials, val=BEST)
    for trial in trials:
        if trial.backbone.data == "retinamnist_64":
            found.records[trial.hash]["result"]["val"]["same"] = 1.0
    assert "retinamnist_64" not in pretrained.chosen(pretrained.selection(found))
    grid = pretrained.comparison_grid(found)
    assert {t.backbone.data for t in grid} == set(pretrained.RECIPES) - {"retinamnist_64"}
    assert not pretrained.is_selected(found)
    archive = stored((*trials, *pretrained.replaced_grid(), *grid), val=BEST)
    archive.records.update({t.hash: found.records[t.hash] for t in trials})
    archive.arrays.update({f"corrupted/{t.hash}": np.zeros((7, 3, IMAGES)) for t in grid})
    assert not pretrained.QUESTION.left(archive)
    # Nothing is left to train, but there is no answer.
    assert not pretrained.QUESTION.is_complete(archive)


def test_a_rate_that_diverges_is_not_chosen():
    trials = pretrained.selection_grid()
    found = stored(trials, val=BEST)
    lost = [t for t in trials if t.backbone.rate == 1e-3 and t.backbone.data == "retinamnist_64"]
    for trial in lost:
        del found.records[trial.hash]
    found = dataclasses.replace(found, diverged={lost[0].hash: "epoch 1"})
    rates = pretrained.chosen(pretrained.selection(found))
    assert rates["retinamnist_64"] == 3e-4 and rates["breastmnist_64"] == 1e-3
    assert "diverged" in pretrained.rates_table(found)


def test_backbones_of_a_replaced_recipe_are_kept_and_count_for_nothing():
    (*others,) = pretrained.replaced_grid()
    assert {(t.backbone.data, t.backbone.epochs, t.backbone.class_weights) for t in others} == {
        ("breastmnist_64", 5, None),
        ("breastmnist_64", 10, None),
        ("chestxray14_rgb", 5, None),
    }
    assert not {t.hash for t in others} & {t.hash for t in pretrained.selection_grid()}
    assert set(others) <= set(pretrained.QUESTION.trials)
    found = stored((*pretrained.selection_grid(), *others), val=BEST)
    for trial in others:
        found.records[trial.hash]["result"]["val"]["auc"] = 1.0
    assert pretrained.chosen(pretrained.selection(found))["breastmnist_64"] == 1e-3
    assert pretrained.selection(found)["breastmnist_64"][1e-4]["auc"] == [0.5] * 3


def test_nothing_is_looked_at_before_all_trials_are_stored(few):
    trials = (*pretrained.selection_grid(), *comparison())
    archive = stored(trials[:-1], val=BEST)
    found = pretrained.analyse(archive)
    assert set(found) == {"selection", "planned", "stored", "diverged"}
    assert found["planned"] - found["stored"] == 1
    for one in trials:
        archive.arrays[f"corrupted/{one.hash}"] = np.zeros((7, 3, IMAGES), np.uint8)
    question = pretrained.QUESTION
    assert trials[-1] in question.planned(archive) and trials[-1] not in question.stored(archive)
    assert question.left(archive)[-1] == trials[-1]
    # A trial that diverged is a missing pair.
    lost = dataclasses.replace(archive, diverged={trials[-1].hash: "epoch 2"})
    assert trials[-1] not in question.left(lost)
    found = pretrained.analyse(lost)
    pairs = {arm: row["auc"]["trials"] for arm, row in found["pooled"].items()}
    assert sorted(pairs.values()) == [11, 12, 12]
    assert f"Diverged, and missing from all pairs: {trials[-1].name}" in pretrained.table(found)


def test_predictions_of_corrupted_images_are_left_to_measure(few):
    trials = (*pretrained.selection_grid(), *comparison())
    left = pretrained.QUESTION.left(stored(trials, val=BEST))
    one_label = {t for t in comparison() if t.backbone.data in ("breastmnist_64", "retinamnist_64")}
    assert set(left) & set(trials) == one_label


def scattered(trials):
    """An archive in which the paper's rule gains or loses 0.03 by turns."""
    archive = stored(trials, val=BEST)
    for trial in trials:
        if trial.arm == "paper":
            archive.records[trial.hash]["result"]["test"]["auc"] += (
                0.03 * (-1) ** trial.backbone.seed
            )
    return archive


def test_a_look_follows_if_the_last_one_is_undecided(few):
    first = comparison()
    assert {t.backbone.seed for t in first} == set(range(SEEDS))
    selected = pretrained.selection_grid()
    # Equal scores are no effect, which decides; large differences of both signs do not.
    assert pretrained.comparison_grid(stored((*selected, *first), val=BEST)) == first
    undecided = scattered((*selected, *first))
    both = pretrained.comparison_grid(undecided)
    assert {t.backbone.seed for t in both} == set(range(2 * SEEDS)) and set(first) < set(both)
    # The primary outcome needs two arms; these have their backbones.
    later = set(both) - set(first)
    assert {t.arm for t in later} == {"finetune", "paper"}
    assert {t.backbone.seed for t in later} == set(range(SEEDS, 2 * SEEDS))
    found = pretrained.analyse(undecided)
    assert found["planned"] - found["stored"] == 3 * SEEDS * len(DATA) and "pooled" not in found
    third = pretrained.comparison_grid(scattered((*selected, *both)))
    assert {t.backbone.seed for t in set(third) - set(both)} == set(range(2 * SEEDS, 3 * SEEDS))
    # There are no more looks.
    last = scattered((*selected, *third))
    assert set(pretrained.comparison_grid(last)) == set(third)
    pooled = pretrained.analyse(last)["pooled"]
    assert pooled["paper"]["auc"]["trials"] == 3 * SEEDS * len(DATA)
    assert pooled["released"]["auc"]["trials"] == SEEDS * len(DATA)
    assert "| number of pairs |  |  | 36 | 12 | 12 |" in pretrained.table(pretrained.analyse(last))
    # After a look that decides, further trials do not count.
    decided = stored((*selected, *third), val=BEST)
    assert pretrained.comparison_grid(decided) == first
    assert pretrained.analyse(decided)["pooled"]["paper"]["auc"]["trials"] == SEEDS * len(DATA)


def test_no_look_follows_if_no_number_of_pairs_would_decide(few):
    """The effect differs between data sets: clear over pairs, unclear in the mixed model."""
    first, selected = comparison(), pretrained.selection_grid()
    archive = stored((*selected, *first), val=BEST)
    effects = dict(zip(DATA, (-0.09, -0.01, -0.02), strict=True))
    for trial in first:
        if trial.arm == "paper":
            gain = effects[trial.backbone.data] + 0.001 * (-1) ** trial.backbone.seed
            archive.records[trial.hash]["result"]["test"]["auc"] += gain
    assert pretrained.comparison_grid(archive) == first
    found = pretrained.analyse(archive)
    paper = found["pooled"]["paper"]
    assert statistics.needed(paper["auc"], paper["mixed"]) == float("inf")
    assert pretrained.conclusion(paper) == "undecided"
    sets = paper["mixed"]["needed_sets"]
    assert pretrained.overview(found).verdict == (
        f"harms on these data sets; undecided for others ({sets:.0f} data sets would decide)"
    )
    assert f"| data sets that would decide |  |  | {sets:.0f} |" in pretrained.table(found)


def test_the_answer(few):
    trials = (*pretrained.selection_grid(), *comparison())
    found = pretrained.analyse(stored(trials, {"paper": 2.0}, BEST))
    pairs = len(DATA) * SEEDS
    paper, released = (found["pooled"][arm] for arm in ("paper", "released"))
    assert paper["auc"]["trials"] == pairs
    # Equal scores are pairs too, with a difference of zero.
    assert released["auc"]["mean"] == 0 and released["auc"]["trials"] == pairs
    means = [row["mean"] for row in found["intervals"]["paper - finetune"].values()]
    assert paper["auc"]["mean"] == pytest.approx(np.mean(means))
    assert paper["mixed"]["mean"] == pytest.approx(np.mean(means), abs=1e-9)
    assert pretrained.conclusion(paper) == "helps"
    for by_arm in found["merges"].values():
        assert by_arm["paper"] == {
            LAYERS[0]: pytest.approx([0.2, 0.4]),
            LAYERS[1]: pytest.approx([0.4, 0.8]),
        }
    assert found["similarity"][LAYERS[0]]["backbone"] == pytest.approx(0.02)
    text = pretrained.table(found)
    assert "mean of all pairs" in text and "mixed model" in text
    short = pretrained.short_table(found)
    gain = difference(paper["auc"], 4)
    assert f"(paper) | {gain} |" in short and f"| {pairs} |" in short
    assert "| 20 40 |" in pretrained.merges_table(found)
    similar = pretrained.similarity_table(found)
    assert "| before training | 2.00 % | 2.00 % |" in similar
    assert "| paper | 1.00 % | 1.00 % |" in similar
    assert pretrained.overview(found).verdict == "helps"
    pretrained.figure(found)


def test_a_verdict_needs_both_analyses():
    clear, unclear = {"p_holm": 0.001, "mean": 0.01}, {"p_holm": 0.03, "mean": 0.01}
    assert statistics.verdict(unclear) == "helps"
    assert pretrained.conclusion({"auc": clear, "mixed": clear}) == "helps"
    assert pretrained.conclusion({"auc": clear, "mixed": unclear}) == "undecided"
