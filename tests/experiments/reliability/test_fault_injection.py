import json
import re

import pytest
from jax._src import compiler

from experiments import tables
from experiments.benchmarks.timing import machine
from experiments.reliability import fault_injection, jobs
from tests.long import LONG


def job(output):
    def evidence(folder):
        return {"count": (folder / "count").read_text()}

    options, resume = (str(output),), ("--resume",)
    return jobs.Job("tests.experiments.slow_count", options, output, resume, "done", evidence)


@pytest.mark.parametrize(
    ("phase", "moment", "innermost"),
    [(fault_injection.EVALUATION, 0.0, "evaluate"), (fault_injection.STEP, 0.1, "train_stage")],
)
def test_a_command_is_killed_at_the_chosen_moment_and_resumes(tmp_path, phase, moment, innermost):
    output = tmp_path / "run"
    row = fault_injection.kill_and_resume(job(output), moment, phase, {"count": "10"})
    assert row["doing"] == phase and row["innermost"] == innermost
    assert row["seconds"] >= moment and not output.exists()
    assert row["resumed_from"].startswith(
        "epoch 3" if phase == fault_injection.EVALUATION else "epoch "
    )
    assert row["differences"] == []


@pytest.mark.parametrize(
    ("later", "files"), [(0.0, 0), *(pytest.param(later, 1, marks=LONG) for later in (0.15, 0.35))]
)
def test_a_checkpoint_is_left_unfinished(tmp_path, later, files):
    output = tmp_path / "run"
    row = fault_injection.kill_and_resume(
        job(output), 0.0, fault_injection.CHECKPOINT, {"count": "10"}, later
    )
    assert (row["doing"], row["unfinished"]) == (fault_injection.CHECKPOINT, files)
    assert row["resumed_from"].startswith("epoch 7") and row["differences"] == []
    told = "1 file" if files == 1 else "0 files"
    assert f"checkpoint write ({told} of it there)" in fault_injection.markdown(
        {"rows": [{"aimed_at": fault_injection.CHECKPOINT, **row, "machine": machine()}]}
    )


@LONG
def test_a_moment_after_the_end_is_moved_forward_and_a_difference_is_reported(tmp_path):
    row = fault_injection.kill_and_resume(
        job(tmp_path / "run"), 2.0, fault_injection.STEP, {"count": "9", "more": 1}
    )
    assert row["seconds"] < 2.0 and row["doing"] == fault_injection.STEP
    assert row["differences"] == ["count", "more"]
    stored = {"rows": [{"aimed_at": fault_injection.STEP, **row, "machine": machine()}]}
    assert "**no: count, more**" in fault_injection.markdown(stored)


def test_twenty_kills_cover_every_phase():
    assert len(fault_injection.ROWS) == 20
    phases = {phase for _, phase in fault_injection.ROWS}
    assert phases >= {
        fault_injection.STEP,
        fault_injection.EVALUATION,
        fault_injection.CHECKPOINT,
        fault_injection.REDUCING,
    }
    assert phases - {None} <= set(fault_injection._PHASES)


def test_phases_are_detected_by_functions_of_the_project():
    code = "\n".join(path.read_text() for path in (tables.ROOT / "inmerge_jax").rglob("*.py"))
    known = set(re.findall(r"^def (\w+)\(", code, re.MULTILINE))
    jax_own = {"compile_or_get_cached", "backend_compile_and_load"}
    assert set().union(*fault_injection._PHASES.values()) - jax_own <= known
    assert all(callable(getattr(compiler, name)) for name in jax_own)


@pytest.mark.parametrize(
    ("functions", "phase"),
    [
        (["divide", "prefetch_to_device", "train_stage", "main"], fault_injection.STEP),
        (["save_checkpoint", "run_on_primary", "train_stage", "main"], fault_injection.CHECKPOINT),
        (["run_on_primary", "train_stage", "main"], "between epochs"),
        (["<lambda>", "unreplicate", "train_stage", "main"], "between epochs"),
        (["<module>"], "start or end"),
        ([], "one long call, such as an import or a compilation"),
    ],
)
def test_a_phase_is_read_off_the_stack(functions, phase):
    assert fault_injection._phase([("file.py", name) for name in functions]) == phase


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"seed": 1, "training": None}, "rows of another seed, 1, not of 0"),
        ({"seed": 0, "training": "--epochs 3"}, "rows of another training, --epochs 3, not of"),
    ],
)
def test_rows_of_another_command_are_not_taken_for_this_ones(tmp_path, capsys, stored, words):
    path = tmp_path / "kills.json"
    path.write_text(json.dumps({**stored, "rows": []}))
    assert fault_injection.main(["--output", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert fault_injection.main(["--output", str(path), "--rows", "21"]) == 2
    assert "--rows 21: choose 1 to 20" in capsys.readouterr().err
    for damaged, said in (("{", "Expecting"), ("[]", "holds no JSON object): delete it")):
        path.write_text(damaged)
        assert fault_injection.main(["--output", str(path)]) == 2
        assert said in capsys.readouterr().err


def test_what_is_left_is_no_pass(tmp_path, capsys):
    for minutes in ("0", "nan"):
        assert (
            fault_injection.main(["--output", str(tmp_path / "none.json"), "--minutes", minutes])
            == 1
        )
        assert "0 kills, 0 with differences; 20 are left" in capsys.readouterr().out


def test_the_stored_kills_were_all_survived():
    stored = fault_injection.read(tables.RESULTS / "kills.json")
    assert [row["number"] for row in stored["rows"]] == list(range(len(fault_injection.ROWS)))
    assert not any(row["differences"] for row in stored["rows"])
    assert all(row["aimed_at"] in (row["doing"], "any moment") for row in stored["rows"])


def test_times_are_no_evidence():
    line = {"epoch": 1, "seconds": 2.5, "inner": [{"images_per_second": 3.0, "loss": 0.5}]}
    assert jobs.timeless(line) == {"epoch": 1, "inner": [{"loss": 0.5}]}
