"""The chest phantom of volumes."""

import functools

import numpy as np
import pytest

from inmerge_jax.data import DataConfig, PhantomConfig, load_dataset, make_phantom_volume
from inmerge_jax.data.phantom import FINDINGS, NO_FINDING
from inmerge_jax.errors import UsageError


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_volume_depends_on_seed_split_and_index_alone(multi_label):
    options = {"size": 16, "multi_label": multi_label}
    many = make_phantom_volume(train=6, val=4, test=3, seed=5, **options)
    few = make_phantom_volume(train=2, val=1, test=5, seed=5, **options)
    for a, b, count in (
        (many.train, few.train, 2),
        (many.val, few.val, 1),
        (few.test, many.test, 3),
    ):
        np.testing.assert_array_equal(a.images[:count], b.images[:count])
        np.testing.assert_array_equal(a.labels[:count], b.labels[:count])
    other = make_phantom_volume(train=6, val=1, test=1, seed=6, **options)
    parts = (many.train, many.val, many.test, other.train)
    volumes = {volume.tobytes() for part in parts for volume in part.images}
    assert len(volumes) == 6 + 4 + 3 + 6
    assert many.modality == "volume" and many.train.images.shape == (6, 16, 16, 16, 1)
    assert many.classes == (FINDINGS if multi_label else (NO_FINDING, *FINDINGS))
    assert many.train.labels.shape == ((6, 5) if multi_label else (6,))


def test_the_options_of_the_phantom_are_read():
    phantom = PhantomConfig(train=3, val=2, test=1, findings=("mass",), difficulty=2, seed=4)
    data = load_dataset(DataConfig(name="phantom3d", size=20, phantom=phantom))
    again = make_phantom_volume(
        size=20, train=3, val=2, test=1, findings=("mass",), difficulty=2, seed=4
    )
    np.testing.assert_array_equal(data.train.images, again.train.images)
    assert data.size_text == "20 voxels a side" and data.task == "binary-class"
    with pytest.raises(UsageError, match="`size` 15"):
        load_dataset(DataConfig(name="phantom3d", size=15))


def test_sizes_share_their_anatomy():
    small, large = (
        make_phantom_volume(size=size, train=5, val=1, test=1, difficulty=0.25).train
        for size in (16, 48)
    )
    np.testing.assert_array_equal(small.labels, large.labels)
    reduced = large.images.reshape(5, 16, 3, 16, 3, 16, 3).astype(float).mean((2, 4, 6))
    likeness = np.corrcoef(small.images.reshape(5, -1), reduced.reshape(5, -1))[:5, 5:]
    assert np.diag(likeness).min() > 0.95
    assert (likeness.argmax(1) == np.arange(5)).all()


@functools.cache
def make_pairs(finding: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels that a finding adds to the same patients, and where, by axis."""
    other = "mass" if finding != "mass" else "nodule"
    options = {"size": 16, "train": 100, "val": 1, "test": 1, "multi_label": True}
    shown = make_phantom_volume(findings=(finding,), **options).train
    plain = make_phantom_volume(findings=(other,), **options).train
    kept = (shown.labels[:, 0] == 1) & (plain.labels[:, 0] == 0)
    return (shown.images[kept].astype(float) - plain.images[kept])[..., 0]


@pytest.mark.parametrize(
    ("finding", "sign"),
    [("nodule", 1), ("mass", 1), ("effusion", 1), ("cardiomegaly", 1), ("pneumothorax", -1)],
)
def test_a_finding_changes_its_own_patient_where_it_is(finding, sign):
    change = make_pairs(finding)
    assert len(change) > 8
    assert (sign * change.mean((1, 2, 3)) >= 0).mean() > 0.8
    assert (change == 0).mean() > 0.5, "all else about the patient is the same"
    extent = np.abs(change).sum((1, 2, 3))
    assert extent.max() > 4 * extent.min()


def test_findings_lie_where_they_belong():
    where = {finding: np.abs(make_pairs(finding)).mean(0) for finding in FINDINGS}
    place = {
        finding: [np.average(np.arange(16), weights=map_.sum(other)) for other in ((1, 2), (0, 2))]
        for finding, map_ in where.items()
    }
    heads, fronts = ({name: at[axis] for name, at in place.items()} for axis in (0, 1))
    assert heads["pneumothorax"] < heads["effusion"]
    assert fronts["pneumothorax"] < fronts["effusion"], "air rises, fluid sinks, in the supine"
    heart = where["cardiomegaly"]
    assert heart[..., 8:].sum() > heart[..., :8].sum(), "the heart is on the left"


def test_neither_trivial_nor_hopeless():
    """What ridge regression on voxels knows about an enlarged heart: much, and not all."""
    data = make_phantom_volume(size=16, train=300, val=1, test=200, findings=("cardiomegaly",))
    x, x_test = (s.images.reshape(len(s), -1) / 255.0 - 0.4 for s in (data.train, data.test))
    target = 2.0 * data.train.labels - 1
    weights = x.T @ np.linalg.solve(x @ x.T + 30 * np.eye(len(x)), target)
    scores, ill = x_test @ weights, data.test.labels == 1
    auc = (scores[ill][:, None] > scores[~ill]).mean()
    assert 0.70 < auc < 0.985
