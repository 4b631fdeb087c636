import json
import os
import shutil

import pytest

from inmerge_jax.cli import input_speed
from inmerge_jax.cli.data import main
from inmerge_jax.data.chestxray14.images import find_images
from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.errors import UsageError
from tests.data.chestxray14.nih import make, make_nih


def test_the_rows_of_a_build_are_made_of_its_two_halves():
    stored = {
        **{"size": 224, "batch_size": 64},
        "reading": [{"workers": 0, "images_per_second": 1557.22}],
        "reducing": {
            **{"from": [1024, 1024], "to": 224},
            "rates": [{"workers": 2, "images_per_second": 120.0}],
        },
    }
    plain = input_speed.rows(stored)
    assert plain == [
        ("reading and decoding at 224 px, batch 64", "0 (threads)", "1,557.2", "0.02 h"),
        ("reducing 1024 x 1024 to 224 px", "2", "120.0", "0.26 h"),
    ]
    stored["building"] = {"images": 1000, "writing": 480.0}
    more = input_speed.rows(stored)
    assert more[:2] == plain
    assert more[2][:3] == ("writing and verifying records of 224 px, 1,000 images", "1", "480.0")
    # An image takes 1/120 s and then 1/480 s: 5/480.
    assert more[3][1:] == ("2", "96.0", "0.32 h")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """NIH's folder and a build of it."""
    place = tmp_path_factory.mktemp("measured")
    make(make_nih(place / "nih"), place / "data")
    return place / "nih", place / "data"


def measure(data, output, *more):
    return main(["measure", "--data-dir", str(data), "--output", str(output), *map(str, more)])


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing may be measured."""
    monkeypatch.setattr(input_speed, "read_rate", None)
    monkeypatch.setattr(input_speed, "reduce_rate", None)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(folders, tmp_path, capsys, unmeasured, seconds):
    assert measure(folders[1], tmp_path / "rates.json", f"--seconds={seconds}") == 2
    assert f"--seconds {float(seconds)}: give a time above 0" in capsys.readouterr().err
    assert not (tmp_path / "rates.json").exists()


def test_an_output_that_cannot_be_written_is_refused_first(folders, tmp_path, capsys, unmeasured):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "rates.json", tmp_path / "file" / "more" / "rates.json"):
        assert measure(folders[1], output) == 2
        said = capsys.readouterr().err
        assert f"--output {output} cannot be written: {tmp_path / 'file'}" in said
    assert measure(folders[1], tmp_path) == 2
    assert "cannot be written: it is a folder; choose another" in capsys.readouterr().err


def test_other_bad_input_is_found_before_anything_is_measured(
    folders, tmp_path, capsys, unmeasured
):
    assert measure(folders[1], tmp_path / "a.json", "--images", tmp_path / "none") == 2
    assert "there is no such folder" in capsys.readouterr().err
    data = shutil.copytree(folders[1], tmp_path / "data")
    (data / "speed.json").write_text("{")
    assert measure(data, tmp_path / "a.json") == 2
    assert "speed.json is damaged" in capsys.readouterr().err


def test_the_shortest_time_measures_one_batch(folders):
    data = load_chestxray14(folders[1])
    rate = input_speed.read_rate(data.train, 8, 0, 1e-9)
    assert rate.images == 8 and rate.to_dict()["images_per_second"] > 0


def test_what_is_measured_is_stored(folders, tmp_path, monkeypatch):
    rate = input_speed.Rate(1, 60, 2.0)
    monkeypatch.setattr(input_speed, "read_rate", lambda *_: rate)
    monkeypatch.setattr(input_speed, "reduce_rate", lambda *_: rate)
    output = tmp_path / "new" / "rates.json"
    assert measure(folders[1], output, "--images", folders[0]) == 0
    stored = json.loads(output.read_bytes())
    assert stored["building"] == json.loads((folders[1] / "speed.json").read_bytes())
    assert stored["reducing"]["files"] == 60 and len(stored["reading"]) == 3


def test_the_time_to_reduce_images_does_not_grow_with_their_number(folders, monkeypatch):
    paths = sorted(find_images(folders[0]).values())
    rate = input_speed.reduce_rate(paths, 32, 1, 1e-9)
    assert rate.images == 8 < len(paths)


def die(*_):
    os._exit(9)


def test_a_killed_process_is_reported(folders, monkeypatch):
    monkeypatch.setattr(input_speed, "_reduced_bytes", die)
    paths = sorted(find_images(folders[0]).values())[:2]
    with pytest.raises(UsageError, match="one of the 1 processes .* was killed"):
        input_speed.reduce_rate(paths, 32, 1, 0.1)
