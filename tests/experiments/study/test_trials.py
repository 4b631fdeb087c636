import dataclasses

import pytest

from experiments.study import archive
from experiments.study.questions import QUESTIONS
from experiments.study.trials import Backbone, Treatment, Trial, with_dependencies

START = Backbone("phantom", "vgg11", 0, 2, 0.1)


def test_the_hash_is_that_of_what_decides_the_result():
    trial = Trial(START, "inmerge", 3, treatment=Treatment("merge"))
    assert len(trial.hash) == 10
    assert dataclasses.replace(trial, arm="another name").hash == trial.hash
    for changed in (
        dataclasses.replace(trial, epochs=4),
        dataclasses.replace(trial, learning_rate=1e-3),
        dataclasses.replace(trial, treatment=Treatment("noise")),
        *(
            dataclasses.replace(trial, treatment=dataclasses.replace(trial.treatment, **other))
            for other in (
                {"alpha": 0.5},
                {"threshold": 0.1},
                {"quantile": 0.5},
                {"partner": "random"},
                {"skip": 3},
                {"every": 0},
                {"probability": 0.1},
            )
        ),
        *(
            dataclasses.replace(trial, backbone=dataclasses.replace(START, **other))
            for other in ({"seed": 1}, {"width": 0.2}, {"optimizer": "sgd"}, {"epochs": 3})
        ),
    ):
        assert changed.hash != trial.hash


def test_what_has_no_effect_does_not_change_the_hash():
    plain = Trial(START, "finetune", 3)
    assert dataclasses.replace(plain, treatment=Treatment(alpha=0.1)).hash == plain.hash
    adaptive = Trial(START, "a", 3, treatment=Treatment("merge", quantile=0.5))
    other = dataclasses.replace(
        adaptive, treatment=dataclasses.replace(adaptive.treatment, threshold=0.9)
    )
    assert other.hash == adaptive.hash
    whole = dataclasses.replace(START, width=1)
    assert Trial(whole).hash == Trial(dataclasses.replace(START, width=1.0)).hash
    named = dataclasses.replace(START, learning_rate=START.rate)
    assert Trial(named).hash == Trial(START).hash


def test_the_hash_is_the_same_in_every_process_and_version():
    assert Trial(START).hash == "1ae1ea816c"
    assert Trial(START, "x", 3, treatment=Treatment("merge")).hash == "667f8d2367"


def test_backbones_come_first_and_once():
    trials = [Trial(START, "a", 1), Trial(START, "b", 2), Trial(START), Trial(START, "c", 1)]
    assert [trial.arm for trial in with_dependencies(trials)] == ["backbone", "a", "b"]


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda question: question.name)
def test_arms_of_a_grid_have_distinct_names(question):
    seen = {}
    for trial in question.planned(archive.read()):
        key = (trial.backbone, trial.arm)
        assert seen.setdefault(key, trial.hash) == trial.hash


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stem", "imagenet"),
        ("weights", "edges"),
        ("images", 250),
        ("wrong_labels", 0.2),
        ("class_weights", "balanced"),
    ],
)
def test_defaults_of_later_fields_are_not_named_so_that_older_hashes_stand(field, value):
    start = Backbone("chestxray14", "vgg16", 0, 4)
    assert Trial(start).hash == "9927e1e683"
    other = Trial(dataclasses.replace(start, **{field: value}))
    assert other.hash != Trial(start).hash
    assert other.described()["backbone"][field] == value


@pytest.mark.parametrize(("field", "value"), [("average", 0.9), ("statistics", "renewed")])
@pytest.mark.parametrize("kind", ["none", "merge", "variant"])
def test_how_weights_are_evaluated_counts_for_every_treatment(kind, field, value):
    plain = Treatment(kind)
    other = dataclasses.replace(plain, **{field: value})
    assert Trial(START, "a", 3, treatment=other).hash != Trial(START, "a", 3, treatment=plain).hash
    assert field not in plain.described() and other.described()[field] == value


@pytest.mark.parametrize(
    ("field", "value"), [("until", 0.5), ("along", "norm"), ("layers", "redundant")]
)
def test_the_last_fields_count_for_variants_alone(field, value):
    for kind, counts in (("variant", True), ("merge", False), ("none", False)):
        plain = Treatment(kind)
        other = dataclasses.replace(plain, **{field: value})
        assert (other.described() != plain.described()) == counts


def test_layers_that_are_chosen_by_redundancy_skip_none():
    plain = Treatment("variant", layers="redundant")
    assert dataclasses.replace(plain, skip=3).described() == plain.described()


def test_trials_of_other_learning_rates_have_other_names():
    starts = [Backbone("chestxray14", "vgg16", 0, 4, learning_rate=x) for x in (None, 1e-3, 3e-4)]
    assert Trial(starts[0]).name == Trial(starts[1]).name
    assert Trial(starts[2]).name == "chestxray14 vgg16 lr 0.0003 seed 0 backbone"


def test_a_single_stage_starts_from_new_weights():
    start = Backbone("bloodmnist_like_few", "resnet18", 0, 0, 0.25, images=250, wrong_labels=0.2)
    trials = [Trial(start, arm, 30, 1e-3, Treatment("merge")) for arm in ("a",)]
    assert with_dependencies(trials) == trials
    assert trials[0].first() is trials[0] and not trials[0].is_backbone
    assert "250 images 20% wrong" in trials[0].name
