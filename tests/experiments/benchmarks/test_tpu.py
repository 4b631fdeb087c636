"""The stored counts of the TPU compiler keep their limits, and a violation is noticed."""

import copy
import importlib.util
import json
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.tpu import check, forms, limits, table
from experiments.benchmarks.tpu import compile as compile_case
from experiments.benchmarks.tpu.collectives import collectives
from experiments.tables import RESULTS, ROOT
from inmerge_jax.errors import UsageError

PATH = RESULTS / "tpu_check.json"
ROWS = check.read(PATH)


def changed(name, **changes):
    """The stored rows with one of them changed."""
    rows = copy.deepcopy(ROWS)
    rows[name] |= {key: change(rows[name][key]) for key, change in changes.items()}
    return rows


def test_the_stored_rows_keep_their_limits():
    assert limits.failures(ROWS) == []
    assert set(ROWS) == {case.name for case in check.CASES}


def test_the_page_states_the_limits():
    page = (ROOT / "docs" / "tpu.md").read_text()
    flops = limits.FLOPS
    assert f"| FLOPs | {100 * flops['random']:.0f} % with a random partner; " in page
    assert f"; {100 * flops['nearest']:.0f} % with the most similar one" in page
    assert f"| bytes accessed | {100 * limits.BYTES:.0f} % |" in page


def test_merging_adds_no_collective():
    pairs = limits.comparisons(ROWS).values()
    assert len(pairs) == sum(case.step != "plain" for case in check.CASES)
    for pair in pairs:
        assert pair.row["collectives"] == pair.plain["collectives"]
        assert pair.plain["collectives"]["all-reduce"]["count"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": lambda x: 1.011 * x}, "1.1% more FLOPs, above 1%"),
        ({"bytes_moved": lambda x: 1.031 * x}, "3.1% more bytes accessed, above 3%"),
        ({"memory": lambda x: x | {"peak": x["peak"] + 2**26}}, "bytes more peak memory, above"),
        ({"memory": lambda x: x | {"total": 17 * 2**30}}, "of a chip's 17,179,869,184"),
        ({"collectives": lambda x: x | {"all-gather": {"count": 1, "bytes": 4}}}, "collectives"),
    ],
)
def test_a_violation_is_an_error(change, message, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(changed("vgg19 224 px, v5e:2x2, random", **change)))
    assert check.main(["--dry-run", "--output", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_step_that_does_not_compile_is_a_failure():
    name = "resnet18 28 px, v6e:2x2, random"
    rows = copy.deepcopy(ROWS)
    rows[name] |= {"compiles": False, "reason": "the compiler crashed, signal 11"}
    assert limits.failures(rows) == [f"{name}: does not compile: the compiler crashed, signal 11"]


def test_a_step_without_one_to_compare_it_with_is_a_failure():
    plain, merging = "vgg19 224 px, v5e:2x2, plain", "vgg19 224 px, v5e:2x2, random"
    assert limits.failures({merging: ROWS[merging]}) == [
        f"{merging}: no step without merging to compare it with; compile that too"
    ]
    rows = copy.deepcopy({name: ROWS[name] for name in (plain, merging)})
    assert limits.failures(rows) == []
    rows[plain]["images"] += 1
    assert len(limits.failures(rows)) == 1


def test_the_flops_of_all_pairs_are_expected_of_nearest_alone():
    assert (
        limits.failures(changed("vgg19 224 px, v5e:2x2, nearest", flops=lambda x: 1.05 * x)) == []
    )
    (failure,) = limits.failures(changed("vgg19 224 px, v5e:2x2, random", flops=lambda x: 1.05 * x))
    assert failure == "vgg19 224 px, v5e:2x2, random: 5.0% more FLOPs, above 1%"


def test_the_table_shows_what_merging_adds():
    base = "resnet50 224 px, v5e:2x2"
    rows = copy.deepcopy(ROWS)
    rows[f"{base}, random"] |= {"flops": 1.5 * rows[f"{base}, plain"]["flops"]}
    rows[f"{base}, random"]["memory"]["peak"] = rows[f"{base}, plain"]["memory"]["peak"] + 2 * 10**6
    lines = {cells[0]: cells for cells in table.cells(rows)}
    assert lines[f"{base}, random"][-3] == "+50.00%"
    assert lines[f"{base}, random"][-1] == "+2.00 MB"
    assert lines[f"{base}, plain"][-3:] == ["", "", ""]


def test_without_a_violation_the_status_is_zero(capsys):
    assert check.main(["--dry-run"]) == 0


def test_a_terminal_of_80_columns_shows_the_chosen_networks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert check.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    for line in table.cells(ROWS):
        assert all(word in shown for value in line[1:] for word in value.split())
    assert check.main(["--dry-run", "--only", "densenet121 224 px, v5e:2x2, random"]) == 0
    shown = capsys.readouterr().out
    assert "densenet121" in shown and "nearest" in shown and "resnet18" not in shown


def test_the_page_says_which_cases_are_missing():
    first, *rest = (case.name for case in check.CASES)
    page = table.markdown({name: ROWS[name] for name in rest}, [first, *rest])
    assert f"Not compiled yet: {first}." in page
    assert "Not compiled yet" not in table.markdown(ROWS, [first, *rest])


def test_collectives_are_counted_with_the_bytes_of_their_results():
    text = """
  %a = f32[2,64]{1,0:T(2,128)S(1)} all-reduce(%x), channel_id=1
  %b = (f32[8]{0}, /*index=1*/bf16[4,2]{1,0}) all-reduce(%y, %z), channel_id=2
  %c = (f32[4]{0:T(256)}, f32[16]{0:T(256)}, u32[]{:S(2)}, u32[]{:S(2)}) all-gather-start(%x)
  %d = f32[16]{0} all-gather-done(%c)
  %e = f32[3]{0} add(%p, %all-reduce.3)
  %f = pred[5]{0} collective-permute(%q)
"""
    assert collectives(text) == {
        "all-reduce": {"count": 2, "bytes": 512 + 32 + 16},
        "all-gather": {"count": 1, "bytes": 64},
        "collective-permute": {"count": 1, "bytes": 5},
    }


def test_the_small_cases_and_an_unknown_name():
    small = check.chosen_cases(check.TpuCheckConfig(small=True))
    assert [case.step for case in small] == ["plain", "random", "nearest"]
    assert {(case.model, case.size, case.topology) for case in small} == {
        ("resnet18", 28, "v5e:2x2")
    }
    with pytest.raises(UsageError, match="--only lenet"):
        check.chosen_cases(check.TpuCheckConfig(only=("lenet",)))
    with pytest.raises(UsageError, match="--only densenet121: none of the --small cases"):
        check.chosen_cases(check.TpuCheckConfig(small=True, only=("densenet121",)))


def test_a_file_without_the_chosen_rows_is_no_pass(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert check.main(["--dry-run", "--output", str(path)]) == 2
    assert "has no row of resnet18 28 px, v5e:2x2, plain" in capsys.readouterr().err
    path.write_text("[]")
    assert check.main(["--dry-run", "--output", str(path)]) == 2
    assert "holds no JSON object): remove it" in capsys.readouterr().err


def test_without_libtpu_the_message_names_the_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["forms"])
    assert check.main(["--output", str(tmp_path / "rows.json")]) == 2
    assert "make tpu-check" in capsys.readouterr().err
    assert forms.main() == 2 and "make tpu-check" in capsys.readouterr().err


@pytest.fixture
def compiled(monkeypatch):
    """Stands for the compiler: gives the stored rows, of `nearest` an error."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(check, "_deep_stack", lambda: None)
    both, started = threading.Barrier(2, timeout=60), {}

    def compiled(case, config, known):
        started[case.name] = known
        if case.step == "nearest":
            raise RuntimeError("of nearest")
        if config.jobs > 1 and case.name in list(ROWS)[:2]:
            both.wait()
        row = ROWS[case.name]
        return None if known == row["fingerprint"] else row

    monkeypatch.setattr(check, "_compiled", compiled)
    return started


def test_cases_are_compiled_side_by_side(compiled, tmp_path, capsys):
    path, (plain, random) = tmp_path / "rows.json", list(ROWS)[:2]
    arguments = ["--output", str(path), "--only", plain, random]
    assert check.main([*arguments, "--jobs", "2"]) == 0
    assert compiled == {plain: "", random: ""}
    assert list(check.read(path)) == [plain, random]
    assert check.main(arguments) == 0
    assert compiled == {name: ROWS[name]["fingerprint"] for name in (plain, random)}
    assert capsys.readouterr().out.count(": unchanged") == 2
    assert check.main([*arguments, "--overwrite"]) == 0
    assert compiled == {plain: "", random: ""}
    assert check.main([*arguments, "--jobs", "0"]) == 2


def test_a_failed_case_ends_those_that_wait_and_keeps_those_under_way(compiled, tmp_path):
    path, names = tmp_path / "rows.json", list(ROWS)[:8]
    for jobs in ("1", "2"):
        path.unlink(missing_ok=True)
        compiled.clear()
        with pytest.raises(RuntimeError, match="of nearest"):
            check.main(["--output", str(path), "--jobs", jobs, "--only", *names])
        kept = list(check.read(path))
        assert kept[:2] == names[:2]
        assert set(kept) == {name for name in compiled if not name.endswith("nearest")}


def test_a_row_of_another_program_or_none_is_stale(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    stored = {case.name: {"fingerprint": case.step} for case in check.CASES}
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(check.os, "environ", dict(check.os.environ))
    monkeypatch.setattr(check, "fingerprints", lambda cases: [case.step for case in cases])
    arguments = ["--output", str(path), "--stale"]
    assert check.main(arguments) == 0
    first, second, third = [case.name for case in check.CASES[:3]]
    del stored[second]
    stored[third]["fingerprint"] = "of yesterday"
    path.write_text(json.dumps(stored))
    capsys.readouterr()
    assert check.main(arguments) == 1
    told = capsys.readouterr().err
    assert f"STALE: {second}:" in told and f"STALE: {third}:" in told and first not in told
    assert check.main([*arguments, "--only", "densenet121"]) == 0


def test_a_fingerprint_is_of_what_runs_on_the_chip():
    def program(on_cpu, elsewhere):
        def loss(x):
            y = jax.lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)
            return jnp.sum(y**2)

        traced = jax.jit(jax.grad(loss)).trace(jnp.ones(4))
        lowered = traced.lower(lowering_platforms=("tpu",))
        return lowered.as_text(), compile_case._simplified(lowered)

    def products(x):  # Its gradient keeps a matrix.
        return jnp.sin(jnp.outer(x, x)).sum(0)

    text, simplified = program(jnp.tanh, jnp.sin)
    other_text, other_simplified = program(products, jnp.sin)
    assert text != other_text and simplified == other_simplified
    assert simplified != program(jnp.tanh, jnp.cos)[1]
