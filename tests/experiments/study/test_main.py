"""The study's command: from an empty archive to an answer, retraining, and bad input."""

import dataclasses
import os

import numpy as np
import pytest

from experiments.study import archive, stages
from experiments.study import command as study
from experiments.study.analysis import groups
from experiments.study.questions.question import Overview, Question
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.errors import UsageError

START = Backbone("phantom", "vgg11", 0, 1, 0.05)
TRIALS = (
    Trial(START, "finetune", 1),
    Trial(START, "inmerge", 1, treatment=Treatment("merge", threshold=-1.0)),
)


def analyse(stored):
    (group,) = groups(TRIALS, stored)
    return group.interval(("inmerge", "finetune"))


QUESTION = Question(
    name="phantom",
    title="A title",
    hypothesis="One helps.",
    trials=TRIALS,
    analyse=analyse,
    table=lambda found: f"seeds: {found['seeds']}",
    figure=lambda found: None,
    overview=lambda found: Overview("effect", "1", "undecided"),
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    # Not the cache of whoever runs the tests.
    monkeypatch.setattr(study, "enable_compilation_cache", lambda: None)
    monkeypatch.setitem(study.QUESTIONS, "phantom", QUESTION)
    return ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


def run(options, *more):
    return study.main(["phantom", *options, *more])


@pytest.mark.long
def test_from_an_empty_archive_to_an_answer(options, tmp_path, capsys):
    assert run(options, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "3 trials are missing" in text and TRIALS[0].hash in text
    assert not (tmp_path / "runs").exists()

    assert run(options, "--analyse") == 2
    assert "holds no trial of phantom" in capsys.readouterr().err

    assert run(options, "--minutes", "0.000001") == 2
    assert run(options) == 0
    text = capsys.readouterr().out
    assert "seeds: 1" in text and "effect (1 trials): undecided" in text
    assert len(archive.read(tmp_path / "results").records) == 3
    assert run(options, "--dry-run") == 0
    assert "0 trials are missing" in capsys.readouterr().out

    # Retrained, and compared with what is stored.
    again = ["--output", str(tmp_path / "again"), *options[2:], "--only", TRIALS[1].hash]
    assert run(again) == 0
    record = archive.read(tmp_path / "results").records[TRIALS[1].hash]
    auc = record["result"]["test"]["auc"]
    assert f"test AUC {auc:.6f}, stored: {auc:.6f}" in capsys.readouterr().out
    result = record["result"] | {"test": record["result"]["test"] | {"auc": auc + 0.1}}
    archive.add(tmp_path / "results", {TRIALS[1].hash: record | {"result": result}}, {})
    assert run(again) == 1

    # A measurement of weights is not taken from another training than the stored one.
    measured = []
    with_weights = dataclasses.replace(
        QUESTION,
        measure=lambda trial, paths: measured.append(trial.hash),
        measured=lambda trial, stored: trial.hash == TRIALS[0].first().hash,
    )
    study.QUESTIONS["phantom"] = with_weights
    assert run(options) == 0
    assert measured == [TRIALS[0].hash]
    assert f"{TRIALS[1].hash} {TRIALS[1].name} differs" in capsys.readouterr().err


@pytest.mark.long
def test_trials_that_follow_from_stored_ones_are_trained_by_the_same_command(options, capsys):
    backbone = TRIALS[0].first()

    def later(stored):
        return TRIALS if backbone.hash in stored.records else ()

    study.QUESTIONS["phantom"] = dataclasses.replace(QUESTION, trials=(backbone,), later=later)
    assert run(options, "--dry-run") == 0
    assert "1 trials are missing" in capsys.readouterr().out
    assert run(options) == 0
    assert "seeds: 1" in capsys.readouterr().out
    assert run(options, "--dry-run") == 0
    assert "0 trials are missing" in capsys.readouterr().out


def test_weights_of_second_stages_are_deleted_once_measured(tmp_path, monkeypatch, capsys):
    paths = stages.Paths(tmp_path, tmp_path / "runs", tmp_path / "results", 1)
    trials = [TRIALS[0].first(), *TRIALS]
    stored = archive.Archive({trial.hash: {} for trial in trials})
    monkeypatch.setattr(archive, "read", lambda folder: stored)
    monkeypatch.setattr(study, "differs", lambda trial, paths: False)

    def left(**changes):
        question = dataclasses.replace(QUESTION, **changes)
        for trial in trials:
            (paths.trial(trial) / "checkpoints").mkdir(parents=True, exist_ok=True)
            study.keep(question, trial, paths)
        return [trial.arm for trial in trials if (paths.trial(trial) / "checkpoints").exists()]

    def fail(trial, paths):
        raise UsageError("no room")

    assert left(keeps_weights=False) == ["backbone"]
    assert left() == ["backbone", "finetune", "inmerge"]
    unmeasured = {"measure": fail, "measured": lambda trial, stored: False}
    assert left(keeps_weights=False, **unmeasured) == ["backbone", "finetune", "inmerge"]
    assert "not measured" in capsys.readouterr().err


def test_an_incomplete_answer_is_not_given(options, tmp_path, capsys):
    from tests.experiments.study.test_archive import record

    archive.add(tmp_path / "results", {TRIALS[0].hash: record(TRIALS[0])}, {})
    assert run(options, "--analyse") == 0
    assert "incomplete: 1 of 3 trials are stored" in capsys.readouterr().out


def test_trials_of_another_folder_are_imported(options, tmp_path, capsys):
    from tests.experiments.study.test_archive import LABELS, record

    def put(folder, *trials, dirty=False, cpus=2, diverged=()):
        records = {}
        for trial in trials:
            records[trial.hash] = record(trial)
            records[trial.hash]["trained"]["git"] = {"commit": "abc", "dirty": dirty}
            records[trial.hash]["trained"]["cpus"] = cpus
        arrays = {f"scores/{one}": np.eye(3, 2, dtype=np.float32) for one in records}
        lost = {trial.hash: "epoch 1" for trial in diverged}
        archive.add(tmp_path / folder, records, arrays, {"phantom": LABELS}, lost)

    target = ["--results", str(tmp_path / "results")]
    start = TRIALS[0].first()
    put("results", start)
    put("more", *TRIALS)
    assert study.main(["import", str(tmp_path / "more"), *target]) == 0
    assert "2 of 2 trials are new" in capsys.readouterr().out
    found = archive.read(tmp_path / "results")
    assert set(found.records) == {trial.hash for trial in (start, *TRIALS)}
    np.testing.assert_array_equal(found.scores(TRIALS[1]), np.eye(3, 2))

    # Those whose counterparts are missing stay out: a pair is trained on one machine.
    put("some", start, TRIALS[0])
    part = ["--results", str(tmp_path / "part")]
    assert study.main(["import", str(tmp_path / "some"), *part]) == 0
    text = capsys.readouterr().out
    assert "0 of 2 trials are new" in text and "2 trials are left out" in text
    assert not archive.read(tmp_path / "part").records

    # The other half of a group from another machine stays out too, and so does a mark of
    # divergence, which may not occur elsewhere.
    put("part", start, TRIALS[0])
    put("other half", start, TRIALS[1], cpus=64)
    assert study.main(["import", str(tmp_path / "other half"), *part]) == 0
    assert "0 of 2 trials are new" in capsys.readouterr().out
    put("lost", start, diverged=TRIALS[1:])
    assert study.main(["import", str(tmp_path / "lost"), "--results", str(tmp_path / "no")]) == 0
    assert not archive.read(tmp_path / "no").diverged
    # One of a finished group comes along.
    put("finished", start, TRIALS[0], diverged=TRIALS[1:])
    assert study.main(["import", str(tmp_path / "finished"), "--results", str(tmp_path / "x")]) == 0
    assert set(archive.read(tmp_path / "x").diverged) == {TRIALS[1].hash}

    part = ["--results", str(tmp_path / "none yet")]
    other = Trial(dataclasses.replace(START, seed=7), "finetune", 1)
    put("dirty", TRIALS[0].first(), dirty=True)
    put("unknown", other)
    for folder, message in (
        ("none", "holds no trials; give the --results of a question"),
        ("dirty", "was trained with uncommitted changes"),
        ("unknown", f"the trial {other.hash} is of no question of this version"),
    ):
        assert study.main(["import", str(tmp_path / folder), *part]) == 2
        assert message in capsys.readouterr().err
    assert not archive.read(tmp_path / "none yet").records


def test_a_pair_is_not_trained_on_two_kinds_of_processors(options, tmp_path, capsys):
    from tests.experiments.study.test_archive import record

    archive.add(tmp_path / "results", {TRIALS[0].hash: record(TRIALS[0])}, {})
    assert run(options) == 2
    text = capsys.readouterr().err
    assert "was trained on a, b with 2 cores, and others of its backbone are missing" in text
    assert "--results" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_two_commands_share_the_trials(options, tmp_path, monkeypatch, capsys):
    """The second waits until the first has trained the backbone, and finds nothing else to do."""
    from experiments.study import runner, stages
    from inmerge_jax.locking import lock

    paths = stages.Paths(tmp_path, tmp_path / "runs", tmp_path / "results")
    held = lock(paths.trial(TRIALS[0].first()))
    waited = []

    def wait(stop):
        waited.append(len(archive.read(paths.results).records))
        held.__exit__(None, None, None)

    monkeypatch.setattr(study, "wait", wait)
    held.__enter__()
    assert run(options) == 0
    assert waited == [0] and "another process trains it" in capsys.readouterr().out
    assert len(archive.read(paths.results).records) == 3
    assert all(runner.finished(trial, paths) for trial in TRIALS)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_of_the_process(options, capsys):
    before = os.sched_getaffinity(0)
    core = str(min(before))
    try:
        assert run(options, "--dry-run", "--cores", core) == 0
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
    assert run(options, "--dry-run", "--cores", "9999") == 2
    assert f"--cores 9999: choose some of {core}" in capsys.readouterr().err
    assert os.sched_getaffinity(0) == before


def test_help_and_bad_input(options, capsys):
    with pytest.raises(SystemExit) as end:
        run(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--dry-run" in text and "One helps." in text
    for words, message in (
        (("--only", "0000"), "--only 0000: not in phantom, which has: --dry-run lists them"),
        (("--data", "breast"), "--data breast: not in phantom, which has: phantom"),
        (("--models", "vgg11", "resnet"), "--models resnet: not in phantom, which has: vgg11"),
    ):
        assert run(options, *words) == 2
        assert message in capsys.readouterr().err
    assert study.main(["nothing"]) == 2
    assert "nothing: unknown; choose from pretrained" in capsys.readouterr().err
    assert study.main([]) == 2 and study.main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out
    assert study.main(["verify", "--fast"]) == 2


def test_trials_are_chosen_by_data_network_and_seed():
    grid = tuple(
        Trial(Backbone(data, model, seed, 1))
        for data in ("phantom", "breastmnist")
        for model in ("vgg11", "resnet18")
        for seed in (0, 1)
    )
    question = dataclasses.replace(QUESTION, trials=grid)

    def found(**options):
        trials = study.chosen(question, study.StudyConfig(**options))
        return {(c.backbone.data, c.backbone.model, c.backbone.seed) for c in trials}

    assert len(found()) == 8
    assert found(data=("phantom",), seeds=1) == {("phantom", m, 0) for m in ("vgg11", "resnet18")}
    assert found(models=("resnet18",), data=("phantom", "breastmnist"), seeds=1) == {
        (data, "resnet18", 0) for data in ("phantom", "breastmnist")
    }
    assert found(only=(grid[0].hash,)) == {("phantom", "vgg11", 0)}


def test_missing_trials_are_listed_with_the_time_of_the_same_network(capsys):
    stored = archive.read()
    known = archive.trial_of(next(iter(stored.records.values())))
    other = Trial(dataclasses.replace(known.backbone, seed=99))
    study.show([other, TRIALS[0].first()], stored, "nowhere")
    lines = capsys.readouterr().out.splitlines()
    assert other.hash in lines[0] and lines[0].split()[2] == "min"
    assert "unknown" in lines[1] and lines[2].startswith("2 trials are missing")


def test_an_estimate_is_of_such_a_machine_else_of_images_of_the_same_size(capsys):
    record = next(iter(archive.read().records.values()))
    known = archive.trial_of(record)
    start = dataclasses.replace(known.backbone, data="breastmnist", seed=99)

    def stored(data, processor, seconds):
        trial = Trial(dataclasses.replace(start, data=data))
        own = stages.images_of(trial)
        return {
            "config": trial.described(),
            "result": {"seconds": seconds * own},
            "trained": record["trained"] | {"processor": processor, "cpus": 1},
        }

    def minutes(*records):
        rows = {str(index): row for index, row in enumerate(records)}
        study.show([Trial(start)], archive.Archive(rows), "this one with 1 cores")
        return float(capsys.readouterr().out.split()[1])

    images = stages.images_of(Trial(start))
    slow, other = stored("breastmnist", "another", 0.6), stored("retinamnist", "this one", 0.06)
    fast = stored("breastmnist", "this one", 0.3)
    assert minutes(slow, fast, other) == pytest.approx(0.3 * images / 60, abs=0.06)
    assert minutes(slow, other) == pytest.approx(0.6 * images / 60, abs=0.06)
    assert minutes(other) == pytest.approx(0.06 * images / 60, abs=0.06)
