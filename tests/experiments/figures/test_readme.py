"""The figure of README.md."""

import numpy as np
import pytest

from experiments.figures import readme


def shown(figure):
    """The matrices of both panels."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:2]]


def test_similar_kernels_are_neighbours_in_both_panels():
    group = np.array([0, 1, 0, 1, 1, 0])
    after = np.where(group[:, None] == group, 0.9, 0.0) + np.eye(6) * 0.1
    before = after / 2
    first, second = shown(readme.draw(before, after))
    np.testing.assert_allclose(second[:3, :3].min(), 0.9)
    np.testing.assert_allclose(second[:3, 3:], 0)
    np.testing.assert_allclose(first, second / 2)


@pytest.mark.long
def test_a_short_training_gives_the_figure_of_64_kernels():
    before, after = shown(readme.main(images=64, epochs=1, merging_epochs=1))
    assert before.shape == after.shape == (64, 64)
    assert np.abs(before - after).max() > 1e-3
