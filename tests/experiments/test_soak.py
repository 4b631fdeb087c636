import copy

import pytest

from experiments import soak

ROW = {
    "resident_mb": 1000.0,
    "programs": 16,
    "threads": 17,
    "files": 7,
    "tensorstore_threads": 5,
}


def rows(change=None, at=12):
    found = [{"steps": 100 * index, **ROW} for index in range(1, 21)]
    if change:
        found[at] |= change
    return found


@pytest.mark.long
def test_a_short_one_measures_every_evaluation(tmp_path):
    # One evaluation more than the warm-up; on 48 steps memory has not settled, so no verdict.
    config = soak.SoakConfig(48, every=8, batch_size=8, model="vgg11", skip=6, width=0.05)
    found = soak.soak(config, tmp_path)
    assert [row["steps"] for row in found] == [8, 16, 24, 32, 40, 48]
    assert len({row["programs"] for row in found[1:]}) == 1 and found[0]["programs"] > 1
    assert all(row["resident_mb"] > 50 and row["files"] > 2 for row in found)
    assert soak.judge(found)["grown"]["programs"] == 0


def test_what_is_flat_passes():
    assert soak.judge(rows())["passed"]
    assert soak.judge(rows({"programs": 9, "resident_mb": 100.0}, at=0))["passed"], "the warm-up"
    assert soak.judge(rows({"threads": 16}))["passed"]


@pytest.mark.parametrize(
    "change",
    [
        {"programs": 17},
        {"threads": 18},
        {"files": 8},
        {"resident_mb": 1051.0},
        {"resident_mb": 949.0},
        {"tensorstore_threads": soak.POOL_LIMIT + 1},
    ],
)
def test_every_growth_is_noticed(change):
    stored = {"rows": rows(change), "verdict": soak.judge(rows(change))}
    assert not stored["verdict"]["passed"] and "**Not passed**" in soak.markdown(stored)
    good = copy.deepcopy(stored) | {"verdict": soak.judge(rows())}
    assert "Passed" in soak.markdown(good)
