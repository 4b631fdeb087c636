import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inmerge_jax.data import make_phantom
from inmerge_jax.data.phantom import FINDINGS, NO_FINDING
from inmerge_jax.errors import UsageError


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    n, height = images.shape[:2]
    k = height // size
    return images.astype(float).reshape(n, size, k, size, k).mean((2, 4))


def same(a, b, count: int) -> None:
    np.testing.assert_array_equal(a.images[:count], b.images[:count])
    np.testing.assert_array_equal(a.labels[:count], b.labels[:count])


@settings(max_examples=12, deadline=None)
@given(
    size=st.integers(16, 70),
    count=st.integers(1, 9),
    findings=st.lists(st.sampled_from(FINDINGS), min_size=1, unique=True).map(tuple),
    multi_label=st.booleans(),
    difficulty=st.floats(0.25, 4),
    seed=st.integers(0, 2**40),
)
def test_any_size_count_and_findings(size, count, findings, multi_label, difficulty, seed):
    data = make_phantom(
        size=size,
        train=count,
        val=1,
        test=2,
        findings=findings,
        multi_label=multi_label,
        difficulty=difficulty,
        seed=seed,
    )
    assert data.train.images.shape == (count, size, size, 1)
    assert data.train.images.dtype == np.uint8
    assert len(data.val) == 1 and len(data.test) == 2
    if multi_label:
        assert data.classes == findings and data.task == "multi-label, binary-class"
        assert data.train.labels.shape == (count, len(findings))
        assert data.train.labels.dtype == np.uint8 and data.train.labels.max() <= 1
    else:
        assert data.classes == (NO_FINDING, *findings)
        assert data.task == ("binary-class" if len(findings) == 1 else "multi-class")
        assert data.train.labels.shape == (count,) and data.train.labels.dtype == np.int32
        assert 0 <= data.train.labels.min() and data.train.labels.max() <= len(findings)
    # An image, not a blank or a clipped one.
    assert data.train.images.std((1, 2, 3)).min() > 10


@pytest.mark.parametrize("multi_label", [False, True])
def test_an_image_depends_on_seed_split_and_index_alone(multi_label):
    many = make_phantom(train=300, val=6, test=6, multi_label=multi_label, seed=5)
    few = make_phantom(train=4, val=2, test=300, multi_label=multi_label, seed=5)
    same(many.train, few.train, 4)
    same(many.val, few.val, 2)
    same(many.test, few.test, 6)


def test_seeds_and_splits_show_other_patients():
    data = make_phantom(train=4, val=4, test=4, seed=0)
    other = make_phantom(train=4, val=4, test=4, seed=1)
    images = [*data.train.images, *data.val.images, *data.test.images, *other.train.images]
    assert len({image.tobytes() for image in images}) == 16


def test_sizes_share_their_anatomy():
    small = make_phantom(size=28, train=6, val=1, test=1, difficulty=0.25)
    large = make_phantom(size=112, train=6, val=1, test=1, difficulty=0.25)
    np.testing.assert_array_equal(small.train.labels, large.train.labels)
    reduced = shrink(large.train.images[..., 0], 28)
    flat = lambda images: images.reshape(6, -1).astype(float)  # noqa: E731
    likeness = np.corrcoef(flat(small.train.images), flat(reduced))[:6, 6:]
    assert np.diag(likeness).min() > 0.95
    assert (likeness.argmax(1) == np.arange(6)).all()


def test_findings_are_balanced():
    single = make_phantom(size=16, train=1200, val=1, test=1)
    counts = np.bincount(single.train.labels, minlength=6)
    # 200 expected of each; six standard deviations are 77.
    assert np.abs(counts - 200).max() < 77
    several = make_phantom(size=16, train=1200, val=1, test=1, multi_label=True)
    share = several.train.labels.mean(0)
    assert np.abs(share - 0.3).max() < 6 * np.sqrt(0.3 * 0.7 / 1200)
    # Independent of each other: no pair of findings goes together.
    assert np.abs(np.corrcoef(several.train.labels.T) - np.eye(5)).max() < 6 / np.sqrt(1200)


@functools.cache
def change_by(finding: str, difficulty: float = 1.0) -> np.ndarray:
    """Grey levels that `finding` adds to the same patients without it, at 40 px."""
    options = {"size": 40, "train": 160, "val": 1, "test": 1, "multi_label": True}
    other = "mass" if finding != "mass" else "nodule"
    shown = make_phantom(findings=(finding,), difficulty=difficulty, **options).train
    # Of patients without that other finding, only `finding` is different.
    plain = make_phantom(findings=(other,), difficulty=difficulty, **options).train
    kept = (shown.labels[:, 0] == 1) & (plain.labels[:, 0] == 0)
    return (shown.images[kept].astype(float) - plain.images[kept])[..., 0]


@pytest.mark.parametrize(
    ("finding", "sign"),
    [("nodule", 1), ("mass", 1), ("effusion", 1), ("cardiomegaly", 1), ("pneumothorax", -1)],
)
def test_a_finding_changes_its_own_patient_only_where_it_is(finding, sign):
    change = change_by(finding)
    assert len(change) > 20
    # Opacities brighten and air darkens, but for those too subtle to tell.
    assert (sign * change.mean((1, 2)) > 0).mean() > 0.8
    # Most of the picture is as it was: all else about the patient is the same.
    assert (change == 0).mean() > 0.5
    extent = np.abs(change).sum((1, 2))
    assert extent.max() > 4 * extent.min()


def test_findings_lie_where_they_belong():
    where = {finding: np.abs(change_by(finding)).mean(0) for finding in FINDINGS}
    rows = np.arange(40)
    height = {finding: (map_.sum(1) * rows).sum() / map_.sum() for finding, map_ in where.items()}
    assert height["pneumothorax"] < 20 < height["cardiomegaly"] < height["effusion"]
    # The heart grows to the patient's left, the right of the picture.
    assert where["cardiomegaly"][:, 20:].sum() > 1.5 * where["cardiomegaly"][:, :20].sum()
    # The rest have no favourite side.
    for finding in ("nodule", "mass", "effusion", "pneumothorax"):
        left = where[finding][:, :20].sum() / where[finding].sum()
        assert 0.25 < left < 0.75


@pytest.mark.parametrize("finding", FINDINGS)
def test_difficulty_makes_findings_subtler(finding):
    easy = np.abs(change_by(finding)).sum((1, 2)).mean()
    hard = np.abs(change_by(finding, 2.5)).sum((1, 2)).mean()
    assert hard < 0.6 * easy


def test_neither_trivial_nor_hopeless():
    """What ridge regression on pixels knows about an enlarged heart: much, and not all."""
    data = make_phantom(train=700, val=1, test=400, findings=("cardiomegaly",))
    x, x_test = (s.images.reshape(len(s), -1) / 255.0 - 0.5 for s in (data.train, data.test))
    target = 2.0 * data.train.labels - 1
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ target)
    scores, ill = x_test @ weights, data.test.labels == 1
    auc = (scores[ill][:, None] > scores[~ill]).mean()
    assert 0.70 < auc < 0.985


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "`size` 15: .*at least 16"),
        ({"train": 0}, "`train` 0"),
        ({"test": -3}, "`test` -3"),
        ({"findings": ()}, "`findings` is empty.*at least one of nodule"),
        ({"findings": ("nodul",)}, "unknown finding 'nodul'.*nodule, mass"),
        ({"findings": ("mass", "mass")}, "mass, mass.*each once"),
        ({"difficulty": 0.0}, "`difficulty` 0.0.*0.25 to 4"),
        ({"difficulty": float("nan")}, "`difficulty` nan"),
        ({"seed": -1}, "`seed` -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        make_phantom(**{"train": 1, "val": 1, "test": 1, **options})
