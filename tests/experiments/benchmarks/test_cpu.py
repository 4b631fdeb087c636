import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks import cpu, timing  # noqa: E402
from experiments.benchmarks.step_cases import Case, network_and_units  # noqa: E402
from experiments.benchmarks.timing import Row, Target, ratio_row, take_turns  # noqa: E402
from experiments.benchmarks.trained_weights import train_vgg19  # noqa: E402
from experiments.oracles import merging_numpy, released_torch  # noqa: E402
from experiments.oracles.torch_networks import create_network  # noqa: E402
from inmerge_jax.models import create_model  # noqa: E402

TINY = Case("vgg16", "small", 8, 2)


# ---- the PyTorch readings


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3])
def test_released_reading_agrees_with_the_numpy_oracle(threshold):
    weight = np.random.default_rng(0).standard_normal((12, 2, 3, 3)).astype(np.float32)
    weight[3] += weight[7]
    weight[5] = 0
    generator = torch.Generator().manual_seed(1)
    mixed_in_all = 0
    for _ in range(5):
        chosen, partner = released_torch.draw(12, 0.6, generator)
        selected = np.isin(np.arange(12), chosen)
        expected, mixed = merging_numpy.merge_layer(weight, 0, selected, partner, threshold, 0.8)
        given = torch.from_numpy(weight.copy())
        actual, merged = released_torch.merge_layer(given, chosen, partner, threshold, 0.8)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(given.numpy(), weight)
        assert merged == mixed.sum()
        mixed_in_all += merged
    assert mixed_in_all > 0


def test_released_draws_are_uniform_over_the_others():
    generator = torch.Generator().manual_seed(0)
    chosen, pairs = 0, np.zeros((5, 5), int)
    for _ in range(2000):
        selected, partner = released_torch.draw(5, 0.3, generator)
        chosen += len(selected)
        pairs[np.arange(5), partner] += 1
    assert abs(chosen / 10_000 - 0.3) < 0.03
    assert (np.diag(pairs) == 0).all()
    assert np.abs(pairs[~np.eye(5, dtype=bool)] - 500).max() < 120


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("resnet18", "small", 28),
        ("vgg16", "small", 28),
        ("vgg19", "small", 32),
        ("vgg19", "imagenet", 224),
    ],
)
def test_networks_have_the_same_parameters(name, stem, size):
    def init(key, x):
        return create_model(name, 14, stem=stem).init(key, x, train=False)["params"]

    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    ours = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), image))
    with torch.device("meta"):
        network = create_network(name, 14, stem=stem, size=size)
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 14)
    theirs = list(network.parameters())
    assert len(ours) == len(theirs)
    assert sorted(x.size for x in ours) == sorted(x.numel() for x in theirs)


# ---- ratios


def test_contenders_take_turns(monkeypatch):
    clock, order = [0.0], []

    def contender(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    seconds = take_turns({"a": contender("a", 2.0), "b": contender("b", 0.5)}, rounds=3)
    assert "".join(order) == "aabb" + "abbaab"
    assert seconds == {"a": [2.0] * 3, "b": [0.5] * 3}
    order.clear()
    seconds = take_turns({"a": contender("a", 2.0)}, rounds=2, repeats=4)
    assert len(order) == 2 + 2 * 5
    assert seconds == {"a": [2.0, 2.0]}


def test_ratio_is_the_median_over_the_rounds():
    seconds = {"x": [1.0, 9.0, 4.0], "y": [1.0, 3.0, 2.0], "unused": [1.0] * 3}
    row = ratio_row("name", seconds, "x", "y", Target("at least", 2.5), "note").to_dict()
    assert (row["quantity"], row["value"], row["low"], row["high"]) == ("x / y", 2.0, 1.0, 3.0)
    assert (row["target"], row["met"]) == ("at least 2.5", False)
    assert row["seconds"] == {
        "x": {"median": 4.0, "min": 1.0, "max": 9.0, "all": [1.0, 9.0, 4.0]},
        "y": {"median": 2.0, "min": 1.0, "max": 3.0, "all": [1.0, 3.0, 2.0]},
    }


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("at least", 2), True),
        (Target("at most", 2), True),
        (Target("at least", 2.1), False),
        (Target("at most", 1.9), False),
        (None, None),
    ],
)
def test_target_decides_what_is_met(target, met):
    assert Row("name", "quantity", 2.0, 2.0, 2.0, target).to_dict()["met"] is met


# ---- the sections at tiny sizes


@pytest.mark.long
def test_each_processor_is_named_once():
    def around(processor, day, commit, dirty=False):
        return {
            "cpus": 2,
            "processor": processor,
            "started": f"2026-01-0{day}T10:00:00+00:00",
            "git": {"commit": commit, "dirty": dirty},
        }

    assert timing.measured_on([around("one", 1, "a" * 40)]) == (
        "2 cores of one (2026-01-01, commit aaaaaaaaaa)"
    )
    several = [
        around("one", 2, "a" * 40),
        around(None, 3, None),
        around("one", 1, "a" * 40, dirty=True),
        around("one", 2, "a" * 40),
    ]
    assert timing.measured_on(several) == (
        "2 cores of one (2026-01-01 to 2026-01-02, commit aaaaaaaaaa, aaaaaaaaaa with changes); "
        "2 cores of a processor that was not recorded (2026-01-03, commit unknown)"
    )


@pytest.mark.long
def test_merge_section_merges_what_it_says(monkeypatch):
    monkeypatch.setattr(cpu, "UPDATES", 2)
    rows = cpu.merge_rows(rounds=2, width=0.05, repeats=2)
    assert [row.target and str(row.target) for row in rows] == (
        ["at least 5", "at most 2.5", None, "at least 3", None, None]
    )
    for row in rows:
        assert row.low <= row.value <= row.high
        assert all(len(times) == 2 for times in row.seconds.values())


@pytest.mark.long
def test_the_weights_that_are_merged_were_trained():
    start, _ = train_vgg19(updates=1, width=0.05, batch=16)
    weights, losses = train_vgg19(updates=40, width=0.05, batch=16)
    assert [w.shape for w in weights] == [(3, 3, 26, 26)] * 6
    assert losses[1] < losses[0]
    assert all(
        np.abs(a - b).mean() > 0.01 * np.abs(a).mean() for a, b in zip(start, weights, strict=True)
    )


@pytest.mark.long
def test_steps_are_compared_in_one_process():
    row = cpu.overhead_row(TINY, rounds=2).to_dict()
    assert row["quantity"] == "merging / plain"
    assert row["target"] == "at most 1.02"
    rows = [row.to_dict() for row in cpu.pytorch_rows(TINY, rounds=2)]
    assert [row["quantity"] for row in rows] == ["PyTorch / plain", "PyTorch channels_last / plain"]
    assert [row["target"] for row in rows] == ["at least 1", None]
    assert all(len(times["all"]) == 2 for row in rows for times in row["seconds"].values())


@pytest.mark.long
def test_family_rows_have_cost_compilation_and_memory():
    case = Case("mlp", "small", 6, 4, width=0.125, modality="table")
    rows = [row.to_dict() for row in cpu.family_rows(case, rounds=2)]
    assert [row["quantity"].partition(",")[0] for row in rows] == [
        "merging / plain",
        "merge alone / plain",
        "examples per second",
        "seconds of compilation",
        "seconds of compilation",
        "planned memory in MB",
        "planned memory",
    ]
    assert all(row["low"] <= row["value"] <= row["high"] and row["value"] > 0 for row in rows)
    assert rows[1]["met"] is None  # These steps are far shorter than 100 ms.


@pytest.mark.parametrize(
    ("name", "kernels"), [("vgg11", 4), ("vgg16", 3), ("vgg19", 6), ("resnet18", 10)]
)
def test_the_layers_that_merge_are_those_of_the_released_code(name, kernels):
    assert len(network_and_units(dataclasses.replace(TINY, model=name, width=0.05))[1]) == kernels


@pytest.mark.long
def test_arm_rows_compare_every_merging_arm_with_fine_tuning():
    case = dataclasses.replace(TINY, width=0.0625)
    rows = [row.to_dict() for row in cpu.arm_rows(case, rounds=8)]
    ratios, programs = rows[:3], rows[3:]
    assert [row["quantity"] for row in ratios] == [f"{arm} / plain" for arm in cpu.ARMS]
    assert [row["quantity"] for row in programs] == [
        "seconds of compilation, plain",
        "seconds of compilation, paper",
        "planned memory in MB, plain",
        "planned memory, paper / plain",
    ]
    assert all(row["low"] <= row["value"] <= row["high"] and row["value"] > 0 for row in rows)
    assert {row["name"] for row in rows} == {"step, vgg16 width 0.0625 8 px, batch 2"}


def test_a_vision_transformer_has_a_counterpart_in_pytorch():
    network = create_network("vit_s_16", 3, stem="small", size=32, width=1 / 6)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.long
def test_what_the_cpu_form_saves_is_a_share_of_a_step():
    case = dataclasses.replace(TINY, width=0.0625)
    rows = [row.to_dict() for row in cpu.backend_rows(case, rounds=1)]
    ratios, shares = rows[::2], rows[1::2]
    assert [row["quantity"] for row in shares] == ["share of a step saved"] * 3
    for ratio, share in zip(ratios, shares, strict=True):
        slow, fast, step = (times["median"] for times in share["seconds"].values())
        assert ratio["value"] == pytest.approx(slow / fast)
        assert share["value"] == pytest.approx((slow - fast) / step)


# ---- the command


@pytest.mark.long
def test_file_keeps_the_sections_that_are_not_measured(tmp_path, capsys):
    file = tmp_path / "results" / "benchmark.json"
    sections = {
        name: lambda name=name: [
            ratio_row(name, {"a": [2.0], "b": [1.0]}, "a", "b", Target("at least", 1))
        ]
        for name in ("merge", "cache")
    }
    cpu.run(cpu.BenchmarkConfig(only=("merge",), output=file), sections)
    first = json.loads(file.read_bytes())
    assert set(first) == {"merge"}
    cpu.run(cpu.BenchmarkConfig(only=("cache",), output=file), sections)
    both = json.loads(file.read_bytes())
    assert both["merge"] == first["merge"]
    assert set(both["cache"]) == {"environment", "seconds", "rows"}
    assert both["cache"]["environment"]["torch_threads"] == torch.get_num_threads()
    assert both["cache"]["rows"][0]["value"] == 2.0
    assert "a / b" in capsys.readouterr().out


def test_bad_input_is_reported_without_a_traceback(tmp_path, capsys):
    assert cpu.main(["--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
    broken = tmp_path / "benchmark.json"
    broken.write_text("{")
    assert cpu.main(["--output", str(broken)]) == 2
    assert str(broken) in capsys.readouterr().err
    assert broken.read_text() == "{"
