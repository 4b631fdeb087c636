import json

import jax
import pytest

from experiments.study import presets

TRAIN = (
    "--devices 1 --compilation-cache-dir None --skip 11 "
    "--phantom.train 16 --phantom.val 5 --phantom.test 12"
)


@pytest.fixture(autouse=True)
def quick():
    """LLVM's optimisations take most of the time here and change nothing that is looked at."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def options(folder, *more):
    return [
        *"--data phantom --epochs 1 --merging-epochs 1 --batch-size 8 --width 0.05".split(),
        *"--size 16 --threshold -1 --learning-rate 0.001".split(),
        *("--output", str(folder / "runs"), "--result", str(folder / "presets.json")),
        *(f"--train-options={TRAIN}", *more),
    ]


@pytest.mark.long
def test_it_counts_merges_of_both_presets_and_resumes(tmp_path, capsys):
    assert presets.main(options(tmp_path)) == 0
    stored = json.loads((tmp_path / "presets.json").read_text())
    given, quantile = stored["runs"]
    paper, released = given["paper"], given["released"]
    assert paper["training_passes"] == released["training_passes"] == [2]
    assert paper["validation_passes"] == [0] and released["validation_passes"] == [5]
    assert paper["training_merges"][0] > 0 and paper["validation_merges"] == [0]
    assert released["validation_merges"][0] > released["training_merges"][0] > 0
    assert (paper["rule"]["partner"], released["rule"]["partner"]) == ("nearest", "random")
    printed = capsys.readouterr().out
    assert presets.table(stored) in printed
    merges = [released[f"{stage}_merges"][0] for stage in ("training", "validation")]
    assert f"| 2 | 5 | {merges[0]} | {merges[1]} | " in presets.table(stored)

    runs = tmp_path / "runs"
    threshold = presets.passed_by_one_in_a_hundred(runs / "given" / "paper")
    assert {row["rule"]["threshold"] for row in given.values()} == {-1}
    assert {row["rule"]["threshold"] for row in quantile.values()} == {threshold}

    finished = [runs / "given" / "paper", runs / "quantile" / "released"]
    before = [(folder / "results.json").stat().st_mtime_ns for folder in finished]
    assert presets.main(options(tmp_path)) == 0
    assert [(folder / "results.json").stat().st_mtime_ns for folder in finished] == before
    assert presets.main(options(tmp_path, "--epochs", "2")) == 2
    assert "other options" in capsys.readouterr().err


def test_the_second_threshold_is_of_the_backbones_and_of_the_layers_that_merge(tmp_path):
    def write(stage, name, content):
        (tmp_path / stage).mkdir(parents=True, exist_ok=True)
        (tmp_path / stage / name).write_text(json.dumps(content))

    def layer(name, quantile):
        return {"name": name, "quantiles": {"0.5": 0.0, "0.99": quantile}}

    for seed, high in (("seed0", 0.2), ("seed1", 0.4)):
        after = [layer("shallow", 0.9), layer("deep", high), layer("deeper", high / 2)]
        before = [layer(name, -1.0) for name in ("shallow", "deep", "deeper")]
        write(f"{seed}/backbone", "similarity.json", {"before": before, "after": after})
        write(f"{seed}/inmerge", "similarity.json", {"before": after, "after": before})
        write(f"{seed}/inmerge", "result.json", {"layers": ["deep", "deeper"]})
    assert presets.passed_by_one_in_a_hundred(tmp_path) == 0.2


def test_unknown_options_end_with_status_2():
    with pytest.raises(SystemExit) as stop:
        presets.main(["--no-such-option"])
    assert stop.value.code == 2
