"""What experiments.reliability.scaling stores holds what docs/scaling.md says of it."""

import json

import numpy as np
import pytest

from experiments import tables
from experiments.reliability import scaling

ROWS = json.loads((tables.RESULTS / "scaling.json").read_bytes())


def test_differences():
    one = [1.0, 2.0], {"first a": np.array([1.0, 2.0]), "last a": np.zeros(3)}
    other = [1.0, 2.5], {"first a": np.array([1.0, 1.5]), "last a": np.ones(3)}
    found = scaling._differences(other, one)
    assert found == pytest.approx({"loss": 0.25, "first": 0.5, "parameter": 1.0})
    assert scaling._differences(one, one) == {"loss": 0, "first": 0, "parameter": 0}


def test_the_stored_rows_are_all_cases_and_the_same_training():
    assert [(row["devices"], row["processes"]) for row in ROWS] == list(scaling.CASES)
    for row in ROWS:
        assert row["replicas_equal"] and row["processes_equal"] and row["merged"] > 0
        assert row["one_device"]["first"] < 1e-6, "weights after one update"
        np.testing.assert_allclose(row["losses"][:3], ROWS[0]["losses"][:3], rtol=1e-6)
        assert row["one_device"]["loss"] < 2e-3  # Rounding at a ReLU's kink, ten updates on.
        double = row["float64"]
        assert double["replicas_equal"] and double["processes_equal"]
        assert double["merged"] == row["merged"]
        for other in ("one_device", "one_process"):
            assert double[other]["loss"] < 1e-13 and double[other]["parameter"] < 1e-13
        assert row["collectives"]["merging"] == row["collectives"]["plain"]
    sent = [row["collectives"]["merging"] for row in ROWS if row["devices"] > 1]
    assert all(kinds == sent[0] for kinds in sent), "no more of them with more devices"


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert scaling.main(["--keep", str(tmp_path / "file" / "folder")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert scaling.main(["--steps", "1"]) == 2
    assert "--steps 1: choose 2 or more" in capsys.readouterr().err


def test_a_difference_is_in_the_table():
    for name in ("replicas_equal", "processes_equal"):
        assert "**differ**" in scaling.markdown([{**ROWS[-1], name: False}])
    assert "**differ**" not in scaling.markdown(ROWS)
