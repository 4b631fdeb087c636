"""The summary fits a terminal, names failures, and the tables say what was measured."""

import copy
from types import SimpleNamespace

import pytest

from experiments.benchmarks.accelerator import page, train_step
from experiments.benchmarks.accelerator.merge_cost import NETWORKS
from experiments.benchmarks.accelerator.session import PARTS
from inmerge_jax.files import write_json
from tests.experiments.benchmarks.accelerator.test_session import AROUND

TIMES = {"median": 0.002, "min": 0.001, "max": 0.003}
ENVIRONMENT = {
    "started": "2026-01-02T10:00:00+00:00",
    "command": "/secret/python -m experiments.accelerator",
    "python": "3.12.3",
    "cpus": 16,
    "processor": "some processor",
    "packages": {"jax": "0.11.2", "torch": "2.11.0"},
}


def part(cases, **rest):
    around = {**AROUND, "environment": ENVIRONMENT}
    return {**around, "cases": cases, "failed": {}, "skipped": {}, **rest}


def merge_case():
    contenders = {"JAX": TIMES, "PyTorch, vectorised": {**TIMES, "median": 0.006}}
    one = {"seconds": contenders, "over_bound": 4.0, "speedup": {"PyTorch, vectorised": 3.0}}
    names = [f"{p}, threshold {t}" for p in ("random", "nearest") for t in ("0.3", "-1")]
    return {"layers": 6, "bound_seconds": 0.0005, "merges": {name: one for name in names}}


def step_case(merging=1.002, eager=1.5):
    ratios = {"median": eager, "min": eager, "max": eager}
    return {
        "model": "resnet18",
        "images": 128,
        "peak_bytes": {train_step.PLAIN: 2**30, train_step.MERGING: 2**30},
        "compile_seconds": {train_step.PLAIN: 20.0, train_step.MERGING: 21.0},
        "merging_over_plain": {"median": merging, "min": 1.0, "max": 1.1},
        "seconds_per_call": {train_step.PLAIN: TIMES, train_step.MERGING: TIMES},
        "pytorch_over_jax": {train_step.EAGER: ratios},
    }


def compiled_case(ratio):
    return {
        "model": "resnet18",
        "peak_bytes": {train_step.COMPILED: 2**31},
        "compile_seconds": {train_step.PLAIN: 1.0, train_step.COMPILED: 40.0},
        "pytorch_over_jax": {train_step.COMPILED: {"median": ratio, "min": 0.8, "max": 1.0}},
    }


@pytest.fixture
def folder(tmp_path):
    checks = {
        f"check {i}": {"error": 1e-8, "limit": 1e-6, "passed": True, "merged": 3} for i in range(8)
    }
    precise = {"errors": {"default": 3e-4, "highest": 2e-7}, "reduced_precision_by_default": True}
    checks["precision"] = {**precise, "passed": True}
    steps = {
        train_step.name_of(case): step_case()
        for group in (*train_step.groups(False), [train_step._SMALL])
        for case in group
    }
    steps["resnet18 28 px, batch 128, bfloat16: PyTorch, torch.compile"] = compiled_case(0.9)
    write_json(tmp_path / "correctness.json", part(checks))
    write_json(tmp_path / "merge.json", part({name: merge_case() for name in NETWORKS}))
    write_json(tmp_path / "step.json", part(steps))
    return tmp_path


def test_the_summary_fits_a_terminal(folder):
    skipped = {f"case {i}": "needs 9 s" for i in range(30)}
    failed = {f"broken {i}": "Traceback\nValueError: no" for i in range(30)}
    write_json(folder / "trials.json", part({}, skipped=skipped, failed=failed))
    lines = page.summary(folder)
    assert len(lines) <= page.LINES
    assert max(map(len, lines)) <= 300
    assert lines[-1] == f"results in {folder}"
    assert "1 x chip, driver 1.2" in lines[0] and "jax 0.11.2" in lines[0]


def test_a_missed_target_is_marked_and_compared_with_the_faster_pytorch(folder):
    (row,) = (
        line for line in page.summary(folder) if line.startswith("resnet18 28 px, batch 128, bfl")
    )
    assert "1.50" in row and "0.90*" in row and "+0.2%" in row and "20 / 21" not in row
    slow = step_case(merging=1.05)
    assert train_step.targets(slow) == {"merging": False, "pytorch": True}
    assert train_step.targets(step_case(eager=0.9))["pytorch"] is False
    del slow["pytorch_over_jax"]
    assert train_step.targets(slow)["pytorch"] is None


def test_every_kind_of_failure_is_reported(folder):
    assert not page.any_failed(folder)
    found = page.read_folder(folder)
    wrong = copy.deepcopy(found)
    wrong["correctness"]["cases"]["check 0"]["passed"] = False
    wrong["merge"]["cases"]["ResNet-18"]["failed"] = {"loop": "Traceback\nValueError: half"}
    wrong["step"]["failed"]["resnet50"] = "Traceback\nRuntimeError: out of memory\n"
    assert page.failures(wrong) == [
        "correctness: check 0: exceeds its limit",
        "merge: ResNet-18: loop: ValueError: half",
        "step: resnet50: RuntimeError: out of memory",
    ]
    for name, value in wrong.items():
        write_json(folder / f"{name}.json", value)
        assert page.any_failed(folder)
        write_json(folder / f"{name}.json", found[name])


def test_the_page_has_every_contender(folder, tmp_path):
    place = tmp_path / "accelerator" / "chip-0123456789"
    for name, value in page.read_folder(folder).items():
        write_json(place / f"{name}.json", value)
    text = page.markdown(tmp_path)
    assert "No result of an accelerator" not in text
    assert (
        "### chip" in text and "| VGG19, six deep layers: nearest, threshold -1 | 6 | 2 |" in text
    )
    assert page.markdown(tmp_path / "empty").startswith("No result of an accelerator is stored")


def test_a_profile_is_summed_by_operation():
    def line(name, *events):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=n, duration_ns=ns) for n, ns in events]
        )

    gpu = SimpleNamespace(
        name="/device:GPU:0",
        lines=[
            line("Stream #13(Compute)", ("conv", 4e6), ("add", 1e6), ("conv", 2e6)),
            line("Stream #14(MemcpyH2D)", ("add", 1e6)),
            line("XLA Modules", ("whole", 9e9)),
        ],
    )
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("python", 9e9))])
    found = train_step.time_by_operation([gpu, host], calls=2, top=1)
    assert found == {"milliseconds": 4.0, "operations": [["conv", 3.0, 1.0]]}


def test_fractions_of_the_time_rise_to_one():
    shares = list(PARTS.values())
    assert shares == sorted(shares) and shares[-1] == 1
