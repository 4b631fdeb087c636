"""PyTorch's vectorised merge against the NumPy oracle, and the timing of queued calls."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.accelerator import pytorch, timing  # noqa: E402
from experiments.benchmarks.accelerator.session import failures  # noqa: E402
from experiments.benchmarks.accelerator.timing import Contender, seconds_per_call  # noqa: E402
from experiments.benchmarks.step_cases import Case  # noqa: E402
from experiments.oracles import merging_numpy  # noqa: E402


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("threshold", [-1.0, 0.3])
def test_the_vectorised_merge_agrees_with_the_oracle(partner, threshold):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 3, 3, 2)) + 1.5 * rng.standard_normal((1, 3, 3, 2))
    weight = weight.astype(np.float32)
    selected, other = rng.random(12) < 0.6, (np.arange(12) + rng.integers(1, 12, 12)) % 12
    expected, mixed = merging_numpy.merge_layer(
        weight, 0, selected, other if partner == "random" else None, threshold, pytorch.ALPHA
    )
    found = torch.from_numpy(weight.copy())
    draws = torch.from_numpy(selected), torch.from_numpy(other)
    pytorch.merge_in_place(found, partner, threshold, draws)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert mixed.any()


def test_libraries_that_do_not_load_are_the_reason_for_missing_figures(monkeypatch):
    assert pytorch.why_missing() is None
    assert pytorch.why_missing("no_such_package") == "no_such_package is not installed"

    def load(name):
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(pytorch.importlib, "import_module", load)
    assert pytorch.why_missing() == "OSError: libcudnn.so.9: cannot open shared object file"


def test_calls_are_queued_and_waited_for_once(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        queued = [0]

        def run():
            queued[0] += 1
            log.append(name)

        def wait():
            clock[0] += queued[0] * seconds
            queued[0] = 0
            log.append("wait")

        return Contender(run, wait)

    found = seconds_per_call(
        {"a": contender("a", 0.5), "b": contender("b", 2.0)}, rounds=2, seconds=1.0
    )
    assert found == {"a": [0.5, 0.5], "b": [2.0, 2.0]}
    warm_up = ["a", "wait"] * 2 + ["b", "wait"] * 2
    first, second = ["a", "a", "wait", "b", "wait"], ["b", "wait", "a", "a", "wait"]
    assert log == warm_up + first + second


def test_a_failure_is_stored_and_the_measurement_continues(capsys):
    failed = {}
    with failures(failed, "eager"):
        raise ValueError("out of memory")
    assert failed["eager"].endswith("ValueError: out of memory\n")
    assert "out of memory" in capsys.readouterr().out


def test_what_is_missing_is_said():
    assert pytorch.why_missing() is None
    assert pytorch.why_missing("no_such_package") == "no_such_package is not installed"


def test_the_step_in_bfloat16_trains():
    case = Case("resnet18", "small", 8, 4, dtype="bfloat16", width=0.125)
    step, peak = pytorch.train_step(case, compiled=False)
    for _ in range(2):
        step.run()
    step.wait()
    assert peak() is None
