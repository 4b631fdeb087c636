"""Each case of docs/interruptions.md has its tests, which exist."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "interruptions.md").read_text()
TESTS = {
    "SIGKILL or a crash": (
        "tests/training/test_resume.py::test_killed_mid_epoch_and_resumed_is_bit_identical",
        "tests/training/test_resume.py::test_killed_while_it_writes_a_checkpoint_and_resumed_is_bit_identical",
        "tests/training/test_train.py::test_a_kill_while_a_second_checkpoint_of_an_epoch_is_written_keeps_the_first",
    ),
    "SIGTERM (preemption), once or more": (
        "tests/training/test_resume.py::test_stopped_by_signals_and_resumed_is_bit_identical",
        "tests/training/test_preemption.py::test_stopped_again_and_again_is_bit_identical_and_repeats_no_update",
    ),
    "Ctrl-C": (
        "tests/training/test_preemption.py::test_signals_are_noted_and_only_a_second_ctrl_c_interrupts",
    ),
    "one of several processes is killed": (
        "tests/training/test_multihost.py::test_a_run_that_loses_process_1_resumes_to_the_bits_of_one_process",
        "tests/training/test_multihost.py::test_a_run_that_loses_process_0_resumes_to_the_bits_of_one_process",
    ),
    "SIGTERM in one of several processes": (
        "tests/training/test_multihost.py::test_a_signal_in_process_1_stops_all_processes_and_the_run_resumes",
    ),
    "one of several processes never appears": (
        "tests/training/test_multihost.py::test_a_process_that_never_appears_ends_the_others",
    ),
    "a second start in the same folder": (
        "tests/training/test_workdir_lock.py::test_a_second_start_of_a_run_is_refused_and_the_first_continues",
    ),
    "SIGKILL of a process that writes a `gs://` folder": (
        "tests/training/test_lease.py::test_another_process_is_named_and_no_obstacle_once_it_is_killed",
    ),
    "a lease is lost, as after a long loss of network": (
        "tests/training/test_lease.py::test_a_process_that_loses_its_lease_ends",
    ),
    "interruption or damage of a run in a bucket": (
        "tests/training/test_buckets.py::test_the_life_of_a_run_in_a_bucket",
        "tests/training/test_buckets.py::test_a_stage_in_a_bucket_resumes_to_the_bits_of_a_local_one",
        "tests/training/test_buckets.py::test_damage_in_a_bucket_is_detected_and_skipped",
    ),
    "killed between results and report": (
        "tests/training/test_resume.py::test_a_run_that_only_lacks_its_report_gets_it",
    ),
    "full disk, also on SIGTERM": (
        "tests/training/test_full_disk.py::test_the_command_ends_with_status_2_and_resumes",
        "tests/training/test_full_disk.py::test_a_stage_resumes_from_the_last_valid_checkpoint",
    ),
    "damaged checkpoint": (
        "tests/training/test_train.py::test_a_damaged_checkpoint_falls_back_to_the_latest_valid_one",
        "tests/training/test_preemption.py::test_a_damaged_checkpoint_is_reported_and_skipped",
        "tests/training/test_checkpointing.py::test_every_flipped_byte_is_seen",
    ),
    "a stage's best checkpoint is damaged or gone": (
        "tests/training/test_train.py::test_a_damaged_best_checkpoint_starts_the_stage_again",
    ),
    "the second stage of a seed had started from other backbone weights": (
        "tests/training/test_resume.py::test_a_second_stage_of_another_backbone_is_trained_again",
    ),
    "`--output` with a backslash or balanced brackets": (
        "tests/training/test_checkpointing.py::test_a_folder_whose_name_orbax_cannot_read_is_refused_or_works",
    ),
    "the package for buckets is missing": (
        "tests/training/test_buckets.py::test_without_the_package_a_run_ends_at_once",
    ),
    "non-finite loss": (
        "tests/training/test_train.py::test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint",
    ),
    "other options": (
        "tests/training/test_resume.py::test_resuming_with_another_configuration_names_the_difference",
    ),
    "a folder of images that moved": (
        "tests/training/test_workdir.py::test_a_folder_of_images_may_move_but_is_no_other_data_set",
    ),
    "other processor, packages, commit, ... (see [resume](#resume))": (
        "tests/training/test_resume.py::test_resuming_under_other_conditions_is_said_and_kept_in_the_results",
    ),
    "images changed since the run began": (
        "tests/data/chestxray14/test_build.py::test_a_run_is_not_resumed_on_images_that_changed",
    ),
    "a test image cannot be decoded": (
        "tests/training/test_resume.py::test_test_images_that_cannot_be_read_end_a_run_before_it_trains",
    ),
    "truncated or damaged MedMNIST file": (
        "tests/data/test_medmnist.py::test_a_damaged_file_is_never_half_loaded",
    ),
    "SIGKILL of a worker process that reads images, as by the OOM killer": (
        "tests/data/test_workers.py::test_a_command_that_lost_a_worker_comes_to_its_end",
    ),
    "build of ChestX-ray14 killed at any time": (
        "tests/data/chestxray14/test_build.py::test_a_killed_build_resumes_to_the_same_bytes",
    ),
    "images changed since a build": (
        "tests/data/chestxray14/test_build.py::test_a_finished_build_of_images_that_changed_is_not_taken_for_theirs",
    ),
    "truncated PNG in a build, or one of another size": (
        "tests/data/chestxray14/test_build.py::test_a_damaged_image_stops_the_build_and_is_named",
    ),
    "damaged ArrayRecord shard": (
        "tests/data/chestxray14/test_build.py::test_a_shard_cut_short_is_refused_before_training",
        "tests/data/chestxray14/test_build.py::test_a_flipped_byte_in_a_shard_stops_reading",
    ),
}
"""Event, as the page has it, to the tests of its behaviour."""


def events():
    """The first cells of the page's table."""
    text = PAGE.partition("## Cases")[2].partition("## Kills")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [re.match(r"\| (.*?) \| .* \|$", row)[1] for row in rows]


def test_every_case_of_the_page_has_a_test_and_every_test_a_case():
    assert len(TESTS) >= 20
    assert events() == list(TESTS)


@pytest.mark.parametrize("place", sorted({place for places in TESTS.values() for place in places}))
def test_the_test_of_a_case_exists(place):
    file, _, name = place.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), "train --data breastmnist --output runs/long\n"),
        (("config.json",), "train --data breastmnist --output runs/long --resume\n"),
        (("config.json", "table.md"), ""),
    ],
)
def test_the_restart_script_starts_or_resumes_a_run(tmp_path, files, expected):
    (script,) = re.findall(r"(?:^    .*\n)+", PAGE[PAGE.index("    run=runs/long") :], re.M)[:1]
    command = tmp_path / "inmerge"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    for name in files:
        (tmp_path / "runs/long").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/long" / name).touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-eu"], input=script, cwd=tmp_path, env=env, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, expected)
