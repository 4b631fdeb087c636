import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from inmerge_jax.errors import UsageError
from inmerge_jax.training import workdir
from inmerge_jax.training.environment import environment
from inmerge_jax.training.metrics_file import append_metrics
from inmerge_jax.training.workdir import diff_configs, prepare_workdir

CONFIG = {
    "model": {"name": "resnet18", "width": 1.0},
    "rule": {"probability": 0.3, "threshold": 0.3, "partner": "random"},
    "seeds": (0, 1),
    "data_dir": Path("data"),
    "note": None,
}


def changed(**rule):
    return {**CONFIG, "rule": {**CONFIG["rule"], **rule}}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(folder):
    (folder / "results.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    """An unfinished run that has written something."""
    folder = prepare_workdir(tmp_path / "runs" / "a", CONFIG)
    append_metrics(folder / "seed0" / "backbone" / "metrics.jsonl", {"epoch": 1})
    return folder


def test_new_run_saves_its_configuration_and_environment(run):
    assert json.loads((run / "config.json").read_text()) == {
        **CONFIG,
        "seeds": [0, 1],
        "data_dir": "data",
    }
    saved = json.loads((run / "environment.json").read_text())
    assert {key: saved[key] for key in saved if key != "started"} == {
        key: value for key, value in environment().items() if key != "started"
    }


def test_empty_folder_will_do(tmp_path):
    assert prepare_workdir(tmp_path, CONFIG) == tmp_path
    assert sorted(os.listdir(tmp_path)) == ["config.json", "environment.json"]


@pytest.mark.parametrize("left", ["environment.json", ".config.json.0f", ".environment.json.0f"])
def test_start_that_was_killed_at_once_counts_as_empty(tmp_path, left):
    (tmp_path / left).write_text("{")
    with pytest.raises(UsageError, match="there is no run"):
        prepare_workdir(tmp_path, CONFIG, resume=True)
    prepare_workdir(tmp_path, CONFIG)
    assert json.loads((tmp_path / "environment.json").read_text())["python"]


@pytest.mark.parametrize(
    ("finished", "resume", "words"),
    [
        (False, False, ["unfinished run", "`resume`", "`overwrite`"]),
        (True, False, ["finished run", "`overwrite`"]),
        (True, True, ["finished run", "`overwrite`"]),
    ],
)
def test_refuses_a_folder_in_use(run, finished, resume, words):
    if finished:
        finish(run)
    before = contents(run)
    with pytest.raises(UsageError) as raised:
        prepare_workdir(run, CONFIG, resume=resume)
    for word in (str(run), *words):
        assert word in str(raised.value)
    assert contents(run) == before


def test_refuses_to_resume_nothing(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match=f"`resume`: there is no run in {folder}"):
            prepare_workdir(folder, CONFIG, resume=True)
    assert os.listdir(tmp_path) == []


def test_refuses_both_options(run):
    with pytest.raises(UsageError, match="`resume` and `overwrite`"):
        prepare_workdir(run, CONFIG, resume=True, overwrite=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("names", [["thesis.tex"], ["config.json"], ["results.json", "a/b"]])
def test_never_touches_a_folder_of_something_else(tmp_path, options, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} holds files but no run"):
        prepare_workdir(tmp_path, CONFIG, **options)
    assert contents(tmp_path) == before


def test_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        prepare_workdir(tmp_path / "file", CONFIG, overwrite=True)
    with pytest.raises(UsageError, match="cannot write .*choose another folder$"):
        prepare_workdir(tmp_path / "file" / "inside", CONFIG)


def test_resume_keeps_everything_and_notes_where(run):
    started = json.loads((run / "environment.json").read_text())
    before = contents(run)
    for times in (1, 2):
        assert prepare_workdir(run, CONFIG, resume=True) == run
        after = contents(run)
        noted = json.loads(after.pop(run / "environment.json"))
        assert len(noted.pop("resumed")) == times and noted == started
        assert after.items() <= before.items()


def test_changes_since_the_start_are_reported(run):
    assert workdir.environment_changes(run) == ()
    prepare_workdir(run, CONFIG, resume=True)
    assert workdir.environment_changes(run) == ()
    noted = json.loads((run / "environment.json").read_text())
    noted["resumed"] += [{**noted["resumed"][0], "cpus": 96}]
    (run / "environment.json").write_text(json.dumps(noted))
    assert workdir.environment_changes(run) == (f"cores: {noted['cpus']} there, 96 now",)


def test_resume_names_the_fields_that_differ(run):
    config = {**changed(probability=0.5), "seeds": (0, 1, 2), "new": {"field": True}}
    del config["note"]
    before = contents(run)
    with pytest.raises(UsageError) as raised:
        prepare_workdir(run, config, resume=True)
    assert str(raised.value).splitlines()[1:-1] == [
        "  rule.probability: 0.3 there, 0.5 now",
        "  seeds: [0, 1] there, [0, 1, 2] now",
        "  note: null there, absent now",
        "  new.field: absent there, true now",
    ]
    assert contents(run) == before


def test_images_may_lie_elsewhere_but_must_be_the_same(tmp_path):
    data = {"name": "chestxray14", "data_dir": "/old", "file": None, "content_sha256": "ab"}
    prepare_workdir(tmp_path, {"data": data})
    prepare_workdir(
        tmp_path, {"data": data | {"data_dir": "/new", "file": "/new/a.npz"}}, resume=True
    )
    with pytest.raises(UsageError) as raised:
        prepare_workdir(
            tmp_path, {"data": data | {"data_dir": "/new", "content_sha256": "c"}}, resume=True
        )
    assert str(raised.value).splitlines()[1:-1] == ['  data.content_sha256: "ab" there, "c" now']


def test_a_folder_of_images_may_move_but_is_no_other_data_set(tmp_path):
    data = {"name": "folder:/old/scans", "content_sha256": "ab"}
    prepare_workdir(tmp_path, {"data": data})
    prepare_workdir(tmp_path, {"data": data | {"name": "folder:gs://b/scans"}}, resume=True)
    for other, line in (
        ({"content_sha256": "c"}, '  data.content_sha256: "ab" there, "c" now'),
        ({"name": "tfds:scans"}, '  data.name: "folder:/old/scans" there, "tfds:scans" now'),
    ):
        with pytest.raises(UsageError) as raised:
            prepare_workdir(tmp_path, {"data": data | other}, resume=True)
        assert str(raised.value).splitlines()[1:-1] == [line]


def test_resume_with_a_damaged_configuration(run):
    (run / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        prepare_workdir(run, CONFIG, resume=True)
    (run / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        prepare_workdir(run, CONFIG, resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_restarts_and_spares_the_targets_of_links(run, tmp_path, finished):
    if finished:
        finish(run)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    prepare_workdir(run, changed(probability=0.5), overwrite=True)
    assert sorted(os.listdir(run)) == ["config.json", "environment.json"]
    assert json.loads((run / "config.json").read_text())["rule"]["probability"] == 0.5
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def test_overwrite_of_an_empty_folder_is_a_start(tmp_path):
    prepare_workdir(tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / "config.json").exists()


def test_overwrite_cut_short_leaves_an_unfinished_run(run, monkeypatch):
    finish(run)

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prepare_workdir(run, CONFIG, overwrite=True)
    with pytest.raises(UsageError, match="unfinished run"):
        prepare_workdir(run, CONFIG)


def test_overwrite_cut_short_at_the_last_file_leaves_an_empty_folder(run, monkeypatch):
    remove, removed = workdir.remove, []

    def die_at_the_last(path):
        if len(list(run.iterdir())) == 1:
            raise KeyboardInterrupt
        remove(path)
        removed.append(path.name)

    monkeypatch.setattr(workdir, "remove", die_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        prepare_workdir(run, CONFIG, overwrite=True)
    monkeypatch.undo()
    assert removed and prepare_workdir(run, CONFIG) == run


def test_differences_are_field_by_field():
    @dataclasses.dataclass
    class Inner:
        alpha: float = 0.8
        sizes: tuple = (1, 2)

    old = {"a": dataclasses.asdict(Inner()), "b": np.float32(0.5), "c": {}, "d": {"e": 1}}
    assert diff_configs(old, json.loads(json.dumps({**old, "b": 0.5}))) == ()
    new = {"a": {"alpha": 0.9, "sizes": [1, 2]}, "b": 0.5, "c": {"x": 1}, "d": 2}
    assert diff_configs(old, new) == (
        ("a.alpha", "0.8", "0.9"),
        ("c", "{}", "absent"),
        ("d.e", "1", "absent"),
        ("c.x", "absent", "1"),
        ("d", "absent", "2"),
    )


def test_configuration_that_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        prepare_workdir(tmp_path / "a", {"x": object()})
    assert not (tmp_path / "a").exists()


def test_full_disk_at_the_start_leaves_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workdir, "write_json", full)
    with pytest.raises(UsageError, match="No space left"):
        prepare_workdir(tmp_path / "a", CONFIG)
    monkeypatch.undo()
    assert prepare_workdir(tmp_path / "a", CONFIG)
