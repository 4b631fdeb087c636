"""Cases are measured one by one, each stored when it is there, within the time."""

import json

import pytest

from experiments.benchmarks.accelerator import session as sessions
from experiments.benchmarks.accelerator.session import PARTS, Session, check_folder, read_part
from inmerge_jax.errors import UsageError

AROUND = {
    "tiny": False,
    "device": "chip",
    "platform": "gpu",
    "devices": 1,
    "driver": "1.2",
    "commit": "a" * 40,
    "source": "b" * 64,
    "environment": {
        "variables": {"XLA_FLAGS": "--xla_a=1"},
        "git": {"commit": "a" * 40, "dirty": False},
        "devices": {"kinds": ["chip"], "processes": 1},
        "packages": {"jax": "1.0", "torch": "2.0"},
        "cpus": 2,
    },
}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    return now


def begin(folder, seconds=100.0):
    session = Session(folder, seconds, started=0.0, around=AROUND)
    for part in PARTS:
        session.enters(part)
    return session


def test_a_case_is_stored_as_soon_as_it_is_measured(tmp_path, clock):
    session = begin(tmp_path)
    seen = []

    def second():
        seen.append(read_part(tmp_path, "merge")["cases"]["first"]["value"])
        return {"value": 2}

    session.attempt("merge", "first", 1, lambda: {"value": 1})
    session.attempt("merge", "second", 1, second)
    assert seen == [1]
    assert read_part(tmp_path, "merge")["cases"]["second"]["commit"] == AROUND["commit"]


def test_a_case_that_the_time_does_not_suffice_for_is_skipped(tmp_path, clock):
    session = begin(tmp_path)
    clock[0] = 35.0
    session.attempt("merge", "fits", 5.0, lambda: {"value": 1})
    session.attempt("merge", "too long", 5.1, lambda: pytest.fail("was measured"))
    stored = read_part(tmp_path, "merge")
    assert list(stored["cases"]) == ["fits"]
    assert stored["skipped"] == {"too long": "needs about 5 s; 5 s were left"}
    # What earlier parts left is added to the later ones.
    assert session.left("step") == 100 * PARTS["step"] - 35


def test_a_case_that_fails_is_reported_and_the_next_one_follows(tmp_path, clock, capsys):
    session = begin(tmp_path)

    def broken():
        raise ZeroDivisionError("no such chip")

    session.attempt("merge", "broken", 1, broken)
    session.attempt("merge", "next", 1, lambda: {"value": 1})
    stored = read_part(tmp_path, "merge")
    assert stored["failed"]["broken"].endswith("ZeroDivisionError: no such chip\n")
    assert list(stored["cases"]) == ["next"]
    assert "no such chip" in capsys.readouterr().out


def test_a_second_run_measures_what_is_missing(tmp_path, clock):
    session = begin(tmp_path)
    session.attempt("merge", "done", 1, lambda: {"value": 1})
    session.attempt("merge", "failed", 1, lambda: 1 / 0)
    session.attempt("merge", "long", 1000, dict)
    again = begin(tmp_path, seconds=10_000)
    # What failed stays failed until it succeeds.
    assert set(again.found["merge"]["failed"]) == {"failed"}
    assert again.found["merge"]["skipped"] == {}
    again.attempt("merge", "done", 1, lambda: pytest.fail("was measured twice"))
    for name in ("failed", "long"):
        again.attempt("merge", name, 1, lambda: {"value": 2})
    stored = read_part(tmp_path, "merge")
    assert list(stored["cases"]) == ["done", "failed", "long"] and stored["failed"] == {}


def test_what_the_end_of_the_time_cuts_off_is_reported(tmp_path, clock):
    session = begin(tmp_path)
    session.attempt("merge", "done", 1, lambda: {"value": 1})
    session.attempt("merge", "long", 1, lambda: session.cut_off(["merge", "trials"]) or {})
    assert set(read_part(tmp_path, "merge")["skipped"]) == {"long", "further cases"}
    assert read_part(tmp_path, "trials")["skipped"] == {"all cases": "not begun"}
    assert read_part(tmp_path, "step")["skipped"] == {}, "was not to be run"
    begin(tmp_path).cut_off(["step"])
    assert read_part(tmp_path, "step")["skipped"] == {"all cases": "not begun"}


@pytest.mark.parametrize("name", ["source", "device", "devices", "driver", "tiny"])
def test_a_folder_of_other_results_is_refused(name, tmp_path, clock):
    begin(tmp_path)
    check_folder(tmp_path, AROUND)
    with pytest.raises(UsageError, match=rf"correctness.json has {name} .*choose another folder"):
        check_folder(tmp_path, {**AROUND, name: "other"})


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("packages", "jax", "1.1", "jax 1.0, but this is 1.1"),
        ("packages", "torch", "2.1", "torch 2.0, but this is 2.1"),
        ("variables", "XLA_FLAGS", "", "XLA_FLAGS --xla_a=1, but this is None"),
    ],
)
def test_a_folder_of_another_environment_is_refused(part, name, value, words, tmp_path, clock):
    begin(tmp_path)
    env = AROUND["environment"]
    other = {**env, part: {**env[part], name: value}}
    with pytest.raises(UsageError, match=f"{words}: choose another folder"):
        check_folder(tmp_path, {**AROUND, "environment": other})
    # The digest of the source says whether the commit matters.
    check_folder(tmp_path, {**AROUND, "environment": {**env, "git": {"commit": 1, "dirty": 0}}})


def test_damaged_and_foreign_files_are_named(tmp_path, clock):
    (tmp_path / "step.json").write_text("{")
    with pytest.raises(UsageError, match=r"step.json is damaged"):
        read_part(tmp_path, "step")
    (tmp_path / "step.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UsageError, match="step.json has no .*cases"):
        read_part(tmp_path, "step")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output .*file.*cannot be written"):
        check_folder(tmp_path / "file" / "folder", AROUND)
