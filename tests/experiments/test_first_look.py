"""The command of the first looks: what it trains, stores and shows."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import first_look
from inmerge_jax.errors import UsageError
from inmerge_jax.training.environment import environment

SEEDS = range(5)
GAIN = {"random": 0.0, "nearest": 0.0625, "quantile-0.5": -0.0625}
LAYERS = ("block_0/attention", "block_0/fc1", "conv/kernel", "mixer_0")


def layer(name, nearest):
    return {"name": name, "kernels": 4, "nearest": nearest, "above": {"0.1": 1.0, "0.3": 0.5}}


@pytest.fixture
def trained(monkeypatch):
    """Commands of the trainings, which are replaced by runs with made-up results."""
    commands = []

    def run(command):
        commands.append(" ".join(command))
        folder = Path(dict(itertools.pairwise(command))["--output"])
        gain = GAIN[folder.name.split("-", 1)[1]]
        arms = {
            arm: [
                {
                    "test": {"auc": 0.5 + seed / 16 + gain * (arm == "inmerge")},
                    "merged": [1, 2],
                    "selected": [3, 3],
                    "seconds": 48,
                }
                for seed in SEEDS
            ]
            for arm in ("backbone", "finetune", "inmerge")
            if arm != "finetune" or "--arms" not in command
        }
        for seed in SEEDS:
            place = folder / f"seed{seed}" / "backbone"
            place.mkdir(parents=True, exist_ok=True)
            found = {
                "before": [layer(name, 0.25) for name in LAYERS],
                "after": [layer(name, 0.25 + seed / 8) for name in LAYERS],
            }
            (place / "similarity.json").write_text(json.dumps(found))
        if "--resume" not in command:
            rule = {"partner": "random", "threshold": 0.3}
            config = {"seeds": [*SEEDS], "arms": list(arms), "rule": rule}
            (folder / "config.json").write_text(json.dumps(config))
            for name in ("environment.json", "labels.npz", "samples.npz"):
                (folder / name).touch()
        results = {"arms": arms, "dataset": {"counts": {}}, "seeds": [*SEEDS]}
        results["environment"] = environment()
        (folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(first_look, "run_trainer", run)
    return commands


def test_each_rule_is_trained_once_and_compared_with_fine_tuning(trained, tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["--data-dir", "data", "--work", str(tmp_path / "work"), "--output", str(output)]
    assert first_look.main([*arguments, "--only", "vit"]) == 0
    assert len(trained) == 3 and sum("--arms inmerge" in command for command in trained) == 2
    assert all("--data breastmnist --data-dir data/medmnist" in command for command in trained)
    assert first_look.main([*arguments, "--only", "vit"]) == 0 and len(trained) == 3
    # The second and third rule begin with the backbones of the first.
    assert ["--resume" in command for command in trained] == [False, True, True]
    config = json.loads((tmp_path / "work" / "vit-quantile-0.5" / "config.json").read_bytes())
    assert config["rule"] == {"partner": "nearest", "quantile": 0.5}
    assert config["arms"] == ["backbone", "inmerge"]
    case = json.loads(output.read_bytes())["cases"]["vit"]
    assert case["seconds"] == 5 * 5 * 48
    assert case["arms"]["finetune"]["test"] == [0.5 + seed / 16 for seed in SEEDS]
    assert first_look.differences(case, "nearest") == [0.0625] * 5
    assert case["similarity"][1] == {
        "layer": "block_0/fc1",
        "units": 4,
        "before": {"nearest": 0.25, "above": 0.5},
        "after": {"nearest": 0.5, "above": 0.5},
    }
    shown = capsys.readouterr().out
    assert (
        "| ViT: heads, neurons; BreastMNIST | AUC 0.625 | +0.000 [+0.000, +0.000], 50% |" in shown
    )
    assert "| ViT, BreastMNIST: heads | first | 4 | 0.25, 50.0% | 0.50, 50.0% |" in shown
    kinds = ("heads", "neurons", "kernels", "channels")
    assert all(f"ViT, BreastMNIST: {kind}" in shown for kind in kinds)
    svg = first_look.figure(json.loads(output.read_bytes())).svg
    assert svg.startswith("<svg") and "ViT, BreastMNIST: heads" in svg


def test_an_unknown_case_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="`only` vgg: unknown; choose from mlp, signals"):
        first_look.main(["--data-dir", "data", "--only", "vgg"])
    assert not trained


def test_a_part_of_the_blood_cells_is_a_medmnist_file_with_the_first_images(tmp_path, trained):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{kind}": rng.integers(0, 8, (1200, *shape), dtype=np.uint8)
        for split in ("train", "val", "test")
        for kind, shape in (("images", (2, 2, 3)), ("labels", (1,)))
    }
    (tmp_path / "medmnist").mkdir()
    np.savez(tmp_path / "medmnist" / "bloodmnist_like.npz", **arrays)
    given = ["--data-dir", str(tmp_path), "--work", str(tmp_path / "work")]
    output = ["--output", str(tmp_path / "found.json")]
    assert first_look.main([*given, *output, "--only", "vit_blood"]) == 0
    file = tmp_path / "work" / "blood.npz"
    assert all(f"--file {file}" in command for command in trained)
    with np.load(file) as found:
        assert {len(found[f"{split}_images"]) for split in ("val", "test")} == {150, 500}
        np.testing.assert_array_equal(found["train_labels"], arrays["train_labels"][:500])


@pytest.mark.long
def test_the_options_of_each_case_are_options_of_the_trainer():
    from inmerge_jax.cli.options import parse_config

    for case in first_look.CASES.values():
        for rule in first_look.RULES.values():
            command = (
                f"{case.options.format(data='data', blood='blood.npz')} {rule} {first_look.SEEDS}"
            )
            assert parse_config(command.split()).seeds == tuple(SEEDS)
