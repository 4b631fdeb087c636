"""Schedules of the rule, merging at some updates, and merging in a single stage."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import MergeRule, quantile
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError
from inmerge_jax.training import train
from inmerge_jax.training.experiment import make_context
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.resolve import config_dict, resolve_recipe
from inmerge_jax.training.rule_schedule import RuleSchedule
from inmerge_jax.training.run_spec import make_run_spec
from tests.training.test_train import check_resumption, run

TINY = (
    "--phantom.train 32 --phantom.val 8 --phantom.test 8 --size 16 --model vgg11_bn --width 0.05 "
    "--batch-size 8 --skip 3 --epochs 5 --devices 1 --compilation-cache-dir None"
).split()
START = MergeRule(probability=0.8, threshold=-0.5, alpha=0.7)
END = dataclasses.replace(START, probability=0.2, threshold=0.5)


def numbers(schedule, step):
    rule = jax.jit(schedule)(jnp.int32(step))
    return [float(rule.probability), float(rule.threshold), float(rule.alpha)]


def test_the_numbers_move_from_start_to_end():
    linear = RuleSchedule(START, END, first=10, last=20)
    assert numbers(linear, 10) == pytest.approx([0.8, -0.5, 0.7])
    assert numbers(linear, 15) == pytest.approx([0.5, 0.0, 0.7])
    assert numbers(linear, 20) == numbers(linear, 25) == pytest.approx([0.2, 0.5, 0.7])
    assert numbers(linear, 9)[0] == 0.0, "nothing merges before the first update"
    cosine = dataclasses.replace(linear, shape="cosine")
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert numbers(cosine, 12)[0] < numbers(linear, 12)[0] + 0.6 * 0.2
    assert numbers(dataclasses.replace(cosine, last=18), 12) == pytest.approx(
        [0.8 - 0.6 * quarter, -0.5 + quarter, 0.7]
    )
    assert numbers(cosine, 20) == pytest.approx([0.2, 0.5, 0.7])
    every = dataclasses.replace(linear, every=4)
    assert [n for n in range(25) if numbers(every, n)[0] > 0] == [10, 14, 18, 22]
    shares = RuleSchedule(MergeRule(0.3, quantile(0.5)), MergeRule(0.3, quantile(0.9)), 0, 4)
    assert float(shares(jnp.int32(2)).threshold.share) == pytest.approx(0.7)


ALL = MergeRule(probability=1.0, threshold=-1.0, alpha=0.8)
STEPS = 3
"""Updates of an epoch of the tiny data set; a stage has nine."""


LATE = RuleSchedule(ALL, dataclasses.replace(ALL, probability=0.5), first=3, last=8, every=3)
"""Once per epoch, from the second epoch on, with probabilities 1 and 0.7."""


def late(folder):
    result, _ = run(folder, rule=LATE, number=0, merge_from_epoch=2)
    return result, read_metrics(folder / "metrics.jsonl")


@pytest.mark.long
def test_a_single_stage_is_the_backbone_until_it_merges(tmp_path):
    result, lines = late(tmp_path / "late")
    assert [line["selected"] for line in lines] == [line["merged"] for line in lines]
    assert lines[0]["selected"] == [0, 0] and lines[1]["selected"] == [8, 8]
    assert 4 < sum(lines[2]["selected"]) < 16
    assert result["merged"] == np.sum([line["merged"] for line in lines], 0).tolist()
    assert result["warnings"] == []
    run(tmp_path / "backbone")
    backbone = read_metrics(tmp_path / "backbone" / "metrics.jsonl")
    assert lines[0]["train_loss"] == pytest.approx(backbone[0]["train_loss"], rel=1e-5)
    assert lines[1]["train_loss"] != pytest.approx(backbone[1]["train_loss"], rel=1e-3)


def test_a_tested_epoch_before_the_first_merge_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "best_epoch", lambda history, select: 1)
    result, _ = late(tmp_path)
    (warning,) = result["warnings"]
    assert "epoch 1, which is tested, comes before the first merge" in warning
    assert sum(result["merged"]) > 0


@pytest.mark.long
def test_interrupted_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    check_resumption(tmp_path, monkeypatch, late, 5)


@pytest.mark.long
def test_the_warning_comes_after_the_first_epoch_that_should_merge(tmp_path):
    nothing = dataclasses.replace(ALL, threshold=1.0)
    schedule = RuleSchedule(nothing, nothing, first=STEPS, last=8)
    result, text = run(tmp_path, rule=schedule, merge_from_epoch=2)
    (warning,) = result["warnings"]
    assert "epoch 2 merged none of the 48 selected kernels" in warning and warning in text


def spec_of(options):
    return make_run_spec(parse_config([*TINY, *options.split()]))


def test_options_become_the_schedule_of_their_stage():
    spec = spec_of("--merging-epochs 2 --probability-end 0 --threshold-end 0.9 --merge-every 3")
    end = MergeRule(0.0, 0.9, 0.8)
    assert spec.schedule == RuleSchedule(MergeRule(), end, first=0, last=7, every=3)
    assert 0.9 in make_context(spec).thresholds and not spec.single_stage
    spec = spec_of("--quantile 0.5 --quantile-end 0.9 --rule-schedule cosine --merge-every epoch")
    assert spec.schedule.end.threshold == quantile(0.9)
    assert (spec.schedule.every, spec.schedule.shape) == (4, "cosine")
    spec = spec_of("--merge-from-epoch 3")
    assert (spec.schedule.first, spec.schedule.last, spec.single_stage) == (8, 19, True)
    assert spec.config.arms == ("backbone", "inmerge")
    assert spec_of("--merge-from-epoch 1").schedule == MergeRule()
    spec = spec_of("--seeds 1")
    assert spec.schedule is spec.rule, "the default is the plain rule, and its program"


def test_the_configuration_holds_them_where_they_are_given():
    def kept(options):
        config = parse_config(options.split())
        return config_dict(config, resolve_recipe(config.recipe), 1)

    assert set(kept("")["rule"]) == {"threshold", "partner", "probability", "alpha", "skip"}
    rule = kept("--merge-every epoch --probability-end 0 --merge-from-epoch 2")["rule"]
    assert (rule["merge_every"], rule["probability_end"], rule["merge_from_epoch"]) == (
        "epoch",
        0.0,
        2,
    )
    assert kept("--merge-from-epoch 2")["arms"] == ["backbone", "inmerge"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--probability-end 2", r"`probability_end` 2\.0: choose a number in \[0, 1\]"),
        ("--threshold-end -2", r"`threshold_end` -2\.0: choose a number in \[-1, 1\]"),
        ("--quantile-end 0.5", "give `quantile` too"),
        ("--quantile 0.5 --quantile-end 2", "choose a number in"),
        ("--quantile 0.5 --threshold-end 0.5", "give `quantile_end`"),
        ("--rule-schedule cosine", "nothing moves"),
        ("--merge-every 0", "`merge_every` 0: choose 1 or more, or epoch"),
        ("--merge-from-epoch 6", "`merge_from_epoch` 6: choose 1 to 5"),
        ("--merge-from-epoch 0", "`merge_from_epoch` 0: choose 1 to 5"),
        ("--merge-from-epoch 2 --merging-epochs 3", "leave out `merging_epochs` 3"),
        ("--merge-from-epoch 2 --arms finetune inmerge", "leave out `arms` finetune inmerge"),
        ("--merge-from-epoch 2 --arms backbone", "leave out `arms` backbone"),
        ("--merge-from-epoch 2 --arms backbone finetune inmerge", "leave out `arms` backbone fin"),
        ("--merge-every 2 --preset released", "`preset` released merges before each validation"),
        ("--merge-from-epoch 1 --preset released", "`preset` released merges before each valid"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        spec_of(options)


@pytest.mark.long
def test_a_single_stage_run_compares_inmerge_with_the_backbone(tmp_path, capsys):
    options = "--epochs 2 --merge-from-epoch 2 --threshold -1".split()
    assert main([*TINY, *options, "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["arms"]) == ["backbone", "inmerge"]
    backbone, inmerge = (
        read_metrics(tmp_path / "run" / "seed0" / arm / "metrics.jsonl") for arm in results["arms"]
    )
    assert backbone[0]["train_loss"] == pytest.approx(inmerge[0]["train_loss"], rel=1e-2)
    assert backbone[0]["learning_rate"] == inmerge[0]["learning_rate"]
    assert not any(inmerge[0]["merged"]) and any(inmerge[1]["merged"])
    said = " ".join(capsys.readouterr().out.split())
    assert "test AUC of inmerge \N{MINUS SIGN} backbone" in said and "2 epochs, batch 8" in said
    assert "merge_from_epoch" in (tmp_path / "run" / "table.md").read_text()
    assert "finetune was not run" not in (tmp_path / "run" / "report.html").read_text()
