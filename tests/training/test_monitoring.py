"""Scalars for TensorBoard, in step with metrics.jsonl through interruptions; profiles."""

import json
import struct

import pytest

from inmerge_jax.cli.options import parse_config
from inmerge_jax.errors import UsageError
from inmerge_jax.training import monitoring
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.monitoring import StageMonitor
from inmerge_jax.training.resolve import config_dict, resolve_recipe
from inmerge_jax.training.run_spec import make_run_spec
from tests.long import LONG
from tests.training import tiny
from tests.training.test_train import check_resumption, evidence, run

TINY = (
    "--phantom.train 40 --phantom.val 8 --phantom.test 8 --size 16 --model vgg11 --width 0.05 "
    "--batch-size 8 --skip 3 --devices 1"
).split()


def monitored(folder, rule=tiny.ALWAYS, **options):
    with StageMonitor(folder, **options) as monitor:
        return run(folder, rule=rule, monitor=monitor)[0]


def scalars(folder):
    """{tag: {step: value}}, read record by record; each point is there once."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = (folder / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            points = found.setdefault(value.tag, {})
            assert event.step not in points, f"{value.tag} has step {event.step} twice"
            points[event.step] = value.simple_value
    return found


def check_scalars(folder, result):
    lines, found = read_metrics(folder / "metrics.jsonl"), scalars(folder)
    for tag, name in {
        "loss/train": "train_loss",
        "loss/val": "val_loss",
        "metrics/val_auc": "val_auc",
        "metrics/val_acc": "val_acc",
        "learning_rate": "learning_rate",
    }.items():
        assert found[tag] == pytest.approx({line["step"]: line[name] for line in lines})
    for place, layer in enumerate(result["layers"]):
        for tag, name in {"merged": "merged", "merged_similarity": "similarity"}.items():
            expected = {line["step"]: line[name][place] for line in lines}
            assert found[f"{tag}/{layer}"] == pytest.approx(expected)
        similarity = json.loads((folder / "similarity.json").read_text())
        expected = {
            0: similarity["before"][place],
            3 * result["best_epoch"]: similarity["after"][place],
        }
        for tag in ("mean", "nearest"):
            points = {step: entry[tag] for step, entry in expected.items()}
            assert found[f"similarity_{tag}/{layer}"] == pytest.approx(points)


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path):
    check_scalars(tmp_path, monitored(tmp_path, tensorboard=True))


@LONG
@pytest.mark.parametrize(
    "first",
    [True, False],
    ids=["from the start", "from the resumption on"],
)
def test_a_resumed_run_loses_and_repeats_no_point(tmp_path, monkeypatch, first):
    check_resumption(
        tmp_path,
        monkeypatch,
        lambda folder: monitored(folder, tensorboard=first),
        7,
        lambda folder: check_scalars(folder, monitored(folder, tensorboard=True)),
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UsageError, match="cannot write .*tensorboard"):
        monitored(tmp_path, tensorboard=True)


@LONG
def test_a_profile_of_updates_is_written_once_and_changes_nothing(tmp_path):
    monitored(tmp_path / "traced", rule=None, profile=1)
    (trace,) = (tmp_path / "traced" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    run(tmp_path / "plain")
    assert evidence(tmp_path / "traced") == evidence(tmp_path / "plain")


def test_the_updates_after_the_warm_up_are_traced(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(monitoring.jax.profiler, "start_trace", lambda path: seen.append("start"))
    monkeypatch.setattr(monitoring.jax.profiler, "stop_trace", lambda: seen.append("stop"))
    with StageMonitor(tmp_path, profile=5, steps_per_execution=2) as monitor:
        monitor.epoch_started(9)  # Resumed within an epoch: too few updates are left.
        for _ in range(4):
            monitor.dispatched(0)
        assert seen == []
        for _ in range(2):
            monitor.epoch_started(11)
            for number in range(1, 7):
                monitor.dispatched(0)
                seen.append(number)
    assert seen == [1, "start", 2, 3, 4, "stop", 5, 6, 1, 2, 3, 4, 5, 6]
    seen.clear()
    with pytest.raises(KeyboardInterrupt), StageMonitor(tmp_path, profile=1) as monitor:
        monitor.epoch_started(3)
        for _ in range(2):
            monitor.dispatched(0)
        raise KeyboardInterrupt
    assert seen == ["start", "stop"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--profile 0", r"`profile` 0: an epoch has 5 updates.*first 2 are not.*choose 1 to 3"),
        ("--profile 4", "choose 1 to 3"),
        ("--profile 1 --batch-size 20", "an epoch has 2 updates.*leave it out"),
        ("--profile 1 --output gs://bucket/run", "gs:/+bucket/run"),
        ("--tensorboard --output gs://bucket/run", "gs:/+bucket/run"),
    ],
)
def test_what_is_impossible_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_run_spec(parse_config([*TINY, *options.split()]))


def test_a_missing_package_is_named_before_training(monkeypatch):
    monkeypatch.setattr(monitoring.importlib.util, "find_spec", lambda name: None)
    make_run_spec(parse_config(TINY))
    with pytest.raises(UsageError, match="`tensorboard` needs a package: pip install tensorboardX"):
        make_run_spec(parse_config([*TINY, "--tensorboard"]))


def test_a_run_and_its_continuation_may_differ():
    plain, logged = (
        config_dict(config, resolve_recipe(config.recipe), 1)
        for config in (parse_config([]), parse_config("--tensorboard --profile 2".split()))
    )
    assert plain == logged and "logging" not in plain
