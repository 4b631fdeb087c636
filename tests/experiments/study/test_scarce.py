"""Few images and wrong labels: the grid, the choice of strengths, and what is looked at when."""

import numpy as np
import pytest

from experiments.study.archive import Archive
from experiments.study.questions import pretrained, scarce, shared
from experiments.study.trials import with_dependencies
from tests.experiments.study.test_pretrained import stored


def strength(trial):
    """Of a control; None of other arms."""
    return trial.treatment.decay or trial.treatment.average


def choice(best=(1e-2, 0.9)):
    """An archive in which these strengths of the controls have the highest validation AUC."""
    found = stored(scarce.selection_grid())
    for trial in scarce.selection_grid():
        if strength(trial) in best:
            found.records[trial.hash]["result"]["val"]["auc"] = 0.9
    return found


def both(archive, other):
    """Both archives in one."""
    records, arrays = (
        {**a, **b} for a, b in ((archive.records, other.records), (archive.arrays, other.arrays))
    )
    return Archive(records, arrays, {**archive.labels, **other.labels})


@pytest.fixture
def three_seeds(monkeypatch):
    monkeypatch.setattr(scarce, "SEEDS", range(3))


def test_the_grid_is_that_of_the_protocol():
    trials = scarce.comparison_grid(choice())
    assert len(trials) == 10 * 9 * 5 and with_dependencies(trials) == list(trials)
    assert len(scarce.selection_grid()) == 9 * 6
    assert {trial.backbone.seed for trial in trials}.isdisjoint(scarce.SELECTION_SEEDS)
    assert all(trial.treatment.statistics == "renewed" for trial in trials)


def test_a_strength_is_chosen_by_mean_validation_auc():
    found = choice()
    assert scarce.chosen(scarce.selection(found)) == {"decay": 1e-2, "ema": 0.9}
    assert {strength(t) for t in scarce.comparison_grid(found)} == {None, 1e-2, 0.9}
    assert "**0.9000**" in scarce.strengths_table(found)
    some = stored([t for t in scarce.selection_grid() if t.treatment.decay != 1e-4])
    assert set(scarce.chosen(scarce.selection(some))) == {"ema"}
    assert scarce.comparison_grid(some) == ()
    # A strength with which a training diverges is not chosen.
    lost = next(t for t in scarce.selection_grid() if t.treatment.decay == 1e-2)
    records = {one: row for one, row in found.records.items() if one != lost.hash}
    some = Archive(records, found.arrays, found.labels, {lost.hash: "epoch 1"})
    assert scarce.chosen(scarce.selection(some))["decay"] != 1e-2
    assert "| weight decay 0.01 | diverged |" in scarce.strengths_table(some)


def test_nothing_is_looked_at_before_all_trials_are_stored(three_seeds):
    found = scarce.analyse(both(choice(), stored(scarce.comparison_grid(choice())[1:])))
    assert set(found) == {"selection", "planned", "stored", "diverged"}
    assert found["planned"] - found["stored"] == 1


def test_the_answer(three_seeds):
    trials = scarce.comparison_grid(choice())
    found = scarce.analyse(both(choice(), stored(trials, {"paper": 2.0})))
    settings = [row["mean"] for row in found["intervals"]["paper - none"].values()]
    paper = found["means"]["paper"]
    # The seed is the unit: settings of a seed share weights and images.
    assert len(settings) == 9 and paper["trials"] == 3
    assert paper["mean"] == pytest.approx(np.mean(settings)) and paper["mean"] > 0.05
    rows = {arm: list(found["intervals"][f"{arm} - none"].values()) for arm in scarce.ARMS}
    # Holm's correction over nine settings and two arms; three seeds have p = 0.25 at least.
    assert all(row["p_holm"] == 1 for arm in scarce.MERGING for row in rows[arm])
    assert not any("p_holm" in row for row in rows["ema"])
    text = scarce.table(found)
    assert "| 2,000 images, 40 % wrong labels |" in text
    assert "mean of the settings, 3 seeds" in text and "p 1.00" in text
    shown = scarce.overview(found)
    assert shown.verdict.startswith("undecided") and "seeds would decide" in shown.verdict
    assert shown.trials == "27"
    assert "| 250 images | 0.00 % |" not in scarce.merged_table(found)
    assert scarce.merged_table(found).count("%") == 9 * 2 + 6  # Six settings name wrong labels.
    scarce.figure(found)


def test_a_significant_setting_decides():
    row, other = {"mean": 0.01, "p_holm": 0.01}, {"mean": -0.01, "p_holm": 0.5}
    means = {"paper": {"mean": 0.0, "p_holm": 1.0, "p_equivalent": 0.01}}
    for settings, words in (
        ([other], "no effect"),
        ([row, other], "helps"),
        ([row, other | {"p_holm": 0.01}], "no effect"),
    ):
        by_name = {f"setting {number}": one for number, one in enumerate(settings)}
        found = {"intervals": {"paper - none": by_name}, "means": means}
        assert scarce.conclusion(found) == words
    # Where settings contradict each other, they are listed next to the verdict of the mean.
    both = {"setting 0": "helps", "setting 1": "harms"}
    assert scarce.significant_settings(found) == both


def test_scores_of_trials_that_choose_a_strength_are_not_stored():
    keeps = scarce.QUESTION.keeps_scores
    assert not any(map(keeps, scarce.selection_grid()))
    assert all(map(keeps, scarce.comparison_grid(choice())))


def test_no_trial_is_of_two_questions():
    assert not {t.hash for t in pretrained.QUESTION.trials} & {
        t.hash for t in scarce.QUESTION.trials
    }
    assert not shared.is_complete({"planned": 0, "stored": 0})
