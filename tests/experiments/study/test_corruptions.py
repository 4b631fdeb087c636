import numpy as np
import pytest

from experiments.study.corruptions import SEVERITIES, corrupt
from experiments.study.prediction_errors import balanced_error, calibration_error
from inmerge_jax.data import make_phantom


@pytest.fixture(scope="module")
def images():
    grey = make_phantom(size=28, train=1, val=1, test=24).test.images
    return {1: grey, 3: np.concatenate([grey, grey // 2, 255 - grey], axis=-1)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SEVERITIES)
def test_each_severity_changes_more_and_is_the_same_every_time(name, channels, images):
    clean = images[channels]
    assert len(SEVERITIES[name]) == 5
    distances = []
    for severity in range(1, 6):
        found = corrupt(clean, name, severity)
        assert found.shape == clean.shape and found.dtype == np.uint8
        np.testing.assert_array_equal(found, corrupt(clean, name, severity))
        distances.append(np.abs(found.astype(float) - clean).mean())
    assert distances[0] > 0.2 and distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0]


def test_lengths_grow_with_the_image(images):
    clean = images[1][:4]
    small = corrupt(clean, "blur", 5).astype(float)
    found = corrupt(clean.repeat(2, 1).repeat(2, 2), "blur", 5).astype(float)
    found = found.reshape(4, 28, 2, 28, 2, 1).mean((2, 4))
    assert np.abs(found - small).mean() < 0.2 * np.abs(small - clean).mean()

    noise = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 1), np.uint8)
    rows = np.unique(corrupt(noise, "pixelate", 5)[0, ..., 0], axis=0)
    assert len(rows) == 2 * SEVERITIES["pixelate"][4]


def test_balanced_error_counts_every_class_alike():
    labels = np.array([0, 0, 0, 0, 1])
    classes = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    counts = np.array([[1, 1, 1, 1, 1], [2, 0, 0, 2, 1]])
    found = balanced_error(labels, classes, counts)
    np.testing.assert_allclose(found, [[1 / 8, 1 / 2], [1 / 4, 1 / 2]])


def test_calibration_error():
    labels = np.array([0, 1, 0, 1])
    scores = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.35, 0.65]])
    counts = np.array([[1, 1, 1, 1], [3, 1, 0, 0], [0, 0, 2, 2]])
    found = calibration_error(labels, scores, counts, 10)
    np.testing.assert_allclose(found, [0.5 * 0.45 + 0.5 * 0.35, 0.95 - 0.75, 0.35])
    assert calibration_error(labels, np.eye(2)[labels], counts[:1], 15) == 0
