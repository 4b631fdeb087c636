"""Kernel similarity: which networks and layers its shares are of."""

import numpy as np
import pytest

from experiments.study.archive import Archive
from experiments.study.questions import main_effect, similarity
from experiments.study.trials import with_dependencies


def layer(name, share, kernels=10):
    return {"name": name, "kernels": kernels, "above": {"0.3": share}, "maximum": share} | {
        "quantiles": {"0.99": share}
    }


LAYERS = ["conv1/kernel", "layer2_0/conv1/kernel", "layer2_0/shortcut_conv/kernel"]


@pytest.fixture
def found(monkeypatch):
    """ResNet-18 at quarter width with both optimizers, SGD untrained, and at full width."""
    names = frozenset(LAYERS[2:])
    monkeypatch.setattr(similarity, "pointwise", lambda model: names)
    records = {}
    for trial in with_dependencies(similarity.QUESTION.trials):
        start = trial.backbone
        if start.model != "resnet18" or start.data != "breastmnist":
            continue
        if (start.optimizer, start.width) == ("adam", 1):
            continue
        deep = {"backbone": 0.02, "finetune": 0.02, "inmerge": 0.25}[trial.arm]
        layers = [layer(LAYERS[0], 0.5), layer(LAYERS[1], deep), layer(LAYERS[2], 1.0)]
        narrow_sgd = start.optimizer == "sgd" and start.width != 1
        result = {"test": {"auc": 0.4 if narrow_sgd else 0.9}, "layers": LAYERS[1:]}
        result |= {"merged": [3, 7], "selected": [900, 100]}
        records[trial.hash] = {
            "result": result,
            "similarity": {"before": layers, "after": layers},
        }
    return similarity.analyse(Archive(records))


def test_shares_are_of_networks_that_learned_and_of_kernels_larger_than_1x1(found):
    assert len(found["networks"]) == 3 and len(found["summary"]) == 2
    row = found["summary"]["quarter width, ADAM, BreastMNIST"]
    assert row["networks"] == 1 and row["none"] == 0
    assert row["above"]["backbone"] == 0.02 and row["above"]["inmerge"] == 0.25
    assert row["highest"] == 0.02 and row["shallow"] == 0.5


def test_merges_are_counted_by_kernel_size(found):
    larger, small = found["merged"]["larger"], found["merged"]["1x1"]
    assert (larger["merged"], larger["selected"]) == (9, 2700)
    assert (small["merged"], small["selected"]) == (21, 300)
    assert found["most"]["layer"] == LAYERS[1] and found["most"]["merged"] == 3
    assert found["most"]["quantile 99 %"]["inmerge"] == 0.25


@pytest.mark.long
def test_convolutions_of_1x1_are_known_from_their_shapes():
    assert similarity.pointwise("vgg11") == frozenset()
    assert all("shortcut_conv" in name for name in similarity.pointwise("resnet18"))
    bottlenecks = similarity.pointwise("resnet50")
    assert "layer4_2/conv1/kernel" in bottlenecks and "layer4_2/conv3/kernel" in bottlenecks
    assert "layer4_2/conv2/kernel" not in bottlenecks


def test_depth_is_divided_into_tenths():
    bins = similarity._binned([layer("one", 0.1), layer("two", 0.3)])
    assert bins[0] == 0.1 and bins[5] == 0.3 and bins[1] is None and len(bins) == similarity.BINS
    assert np.isfinite([x for x in bins if x is not None]).all()


def test_networks_of_full_width_are_those_of_the_main_effect():
    full = [trial for trial in similarity.grid() if trial.backbone.width == 1]
    theirs = {trial.hash for trial in main_effect.grid()}
    assert sum(trial.hash in theirs for trial in full) == 12 and len(full) == 15
    assert {trial.backbone.seed for trial in full} == {0}
