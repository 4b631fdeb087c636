import numpy as np
import pytest

from experiments import cost


@pytest.mark.long
def test_the_memory_of_the_process_that_asks_does_not_count():
    config = cost.CostConfig(width=0.05, batch_size=8, epochs=1)
    ballast = np.ones(3 * 2**27)
    found = cost.run_arm(config, "vgg11", "backbone")
    assert found["peak_bytes"] < ballast.nbytes


@pytest.mark.long
def test_each_arm_is_timed_in_a_process_of_its_own():
    config = cost.CostConfig(models=("vgg11",), width=0.05, batch_size=8, epochs=2, rounds=1)
    found = cost.measure(config)
    row = found["models"]["vgg11"]
    assert row["inmerge"]["merged"] > 0 == row["finetune"]["merged"]
    for arm in cost.ARMS:
        one = row[arm]
        assert 0 < one["epoch_low"] <= one["epoch"] <= one["epoch_high"] < 60
        assert one["compile"] > 0.05
        assert 100 * 2**20 < one["peak_bytes"] < 3 * 2**30
    assert row["ratio"]["low"] == row["ratio"]["median"] == row["ratio"]["high"] > 0
    assert "vgg11" in cost.came_out(found) and "1 pair" in cost.sure(found)
    (table,) = cost.tables(found)
    assert len(table.rows) == 3 == len(table.kinds)
    (plot,) = cost.figures(found)
    assert plot.svg.startswith("<svg")
