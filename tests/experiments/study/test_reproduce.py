"""Trials that are retrained: which, and what they are compared with."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.study import archive, reproduce, runner, stages
from experiments.study.questions import QUESTIONS
from experiments.study.trials import Backbone, Trial
from inmerge_jax.errors import UsageError

CONFIG = reproduce.ReproduceConfig()


def test_trials_of_every_question_that_trains_are_drawn():
    for question in QUESTIONS.values():
        trials = reproduce.drawn(question, CONFIG)
        stored = [t for t in question.stored(archive.read()) if not t.is_backbone]
        assert bool(trials) == bool(stored) and len(trials) <= CONFIG.count
        for trial in trials:
            shortest = sorted(map(reproduce.seconds, stored))[: CONFIG.count]
            assert reproduce.seconds(trial) <= max(CONFIG.limit, *shortest)
        if trials and reproduce.seconds(trials[0]) <= CONFIG.limit:
            short = [t for t in stored if reproduce.seconds(t) <= CONFIG.limit]
            assert len(set(trials)) == min(CONFIG.count, len(short))
        one = reproduce.drawn(question, dataclasses.replace(CONFIG, count=1))
        assert one == trials[:1]
        # Of trials that are all longer, the shortest.
        some = reproduce.drawn(question, dataclasses.replace(CONFIG, limit=0))
        assert len(some) == len(trials)


def test_the_stored_rows_are_of_the_drawn_trials():
    stored = json.loads(CONFIG.output.read_bytes())
    assert all(stored[name] == getattr(CONFIG, name) for name in ("seed", "limit"))
    assert stored["count"] <= CONFIG.count  # A larger count adds trials to the stored ones.
    drawn = reproduce.all_drawn(CONFIG)
    wanted = {one.hash for trial in drawn for one in (trial, trial.first())}
    assert {row["trial"] for row in stored["rows"]} <= wanted
    records = archive.read().records
    for row in stored["rows"]:
        assert row["auc"][0] == records[row["trial"]]["result"]["test"]["auc"]


def test_another_seed_draws_other_trials():
    first, other = (
        [reproduce.drawn(q, dataclasses.replace(CONFIG, seed=seed)) for q in QUESTIONS.values()]
        for seed in (0, 1)
    )
    assert first != other and max(map(len, first)) == 2


@pytest.mark.long
def test_a_trial_is_compared_with_the_stored_one(tmp_path):
    trial = Trial(Backbone("phantom", "vgg11", 0, 1, 0.1))
    paths = stages.Paths(tmp_path, tmp_path / "runs", tmp_path / "results")
    runner.run_trials([trial], paths)
    dataset = stages.plan_of(trial, paths).dataset
    archive.keep(trial, paths.trial(trial), paths.results, dataset)
    row = reproduce.compared(trial, [paths, paths])
    assert row["between_them"] == row["from_stored"] == 0 and len(set(row["auc"])) == 1
    scores = archive.read(paths.results).scores(trial) + np.float32(0.25)
    archive.add(paths.results, {}, {f"scores/{trial.hash}": scores})
    row = reproduce.compared(trial, [paths, paths])
    assert row["between_them"] == 0 and 0.24 < row["from_stored"] < 0.26


def test_rows_of_another_draw_are_refused(tmp_path):
    path = tmp_path / "again.json"
    path.write_text(json.dumps({"seed": 0, "count": 3, "limit": CONFIG.limit, "rows": []}))
    with pytest.raises(UsageError, match="has trials of --count 3, not 2"):
        reproduce.main(["--output", str(path)])
