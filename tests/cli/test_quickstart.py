import json
import re

import pytest

from inmerge_jax.cli import quickstart
from inmerge_jax.cli.options import parse_config
from inmerge_jax.training import experiment

SMALL = (
    "--data phantom --phantom.train 16 --phantom.val 12 --phantom.test 24 --size 16 "
    "--model vgg16 --width 0.0625 --epochs 1 --merging-epochs 1 --batch-size 16 --threshold -1 "
    "--skip 11 --devices 1 --seeds 0 1"
).split()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "run"


@pytest.fixture(scope="module")
def first(output):
    return run(output)


def run(output):
    return quickstart.run(output, [*SMALL, "--compilation-cache-dir", "None"])


def test_its_own_options_promise_two_seeds_of_three_arms_on_the_phantom():
    config = parse_config(quickstart.OPTIONS)
    assert config.data.name == "phantom"
    assert len(config.seeds) >= 2
    assert set(config.arms) == {"backbone", "finetune", "inmerge"}


@pytest.mark.long
def test_it_writes_results_and_report(first, output):
    assert first == 0
    results = json.loads((output / "results.json").read_text())
    assert set(results["arms"]) == {"backbone", "finetune", "inmerge"}
    for result in results["arms"]["inmerge"]:
        assert sum(result["merged"]) == sum(result["selected"]) > 0
    page = (output / "report.html").read_text()
    assert page.count("<svg") >= 4 + 2 + 4 + 6
    assert page.count("<img") >= 6
    assert "pairs above -1.0 before" in page


@pytest.mark.long
def test_run_again_replaces_its_own_run_and_prints_the_table(first, output, capsys):
    assert quickstart.continuation(output, SMALL) == "--overwrite"
    before = json.loads((output / "results.json").read_text())
    assert run(output) == 0
    after = json.loads((output / "results.json").read_text())
    printed = capsys.readouterr().out
    aucs = [[r["test"]["auc"] for r in after["arms"][arm]] for arm in ("inmerge", "finetune")]
    assert aucs == [[r["test"]["auc"] for r in before["arms"][a]] for a in ("inmerge", "finetune")]
    assert f"{aucs[0][0]:.3f} / " in printed
    assert re.search(r"inmerge . finetune", printed)
    assert f"report: {output / 'report.html'}" in printed
    assert re.search(r"threshold +\S+ +-1\.0 +\S+ +0\.3 ", printed)


@pytest.mark.long
def test_an_interrupted_run_resumes(first, output, monkeypatch):
    (output / "results.json").unlink()
    (output / "seed1" / "inmerge" / "result.json").unlink()
    assert quickstart.continuation(output, SMALL) == "--resume"
    trained = []
    train_stage = experiment.train_stage

    def watch(setup, stage, *rest):
        trained.append(stage.name)
        return train_stage(setup, stage, *rest)

    monkeypatch.setattr(experiment, "train_stage", watch)
    assert run(output) == 0
    assert trained == ["seed 1 inmerge"]


@pytest.mark.long
def test_an_interrupted_run_of_other_options_is_replaced(first, output):
    (output / "results.json").unlink(missing_ok=True)
    assert quickstart.continuation(output, [*SMALL, "--width", "0.125"]) == "--overwrite"


def test_an_empty_folder_needs_no_option(tmp_path):
    assert quickstart.continuation(tmp_path, SMALL) is None


def test_a_damaged_run_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quickstart.OUTPUT.mkdir(parents=True)
    (quickstart.OUTPUT / "config.json").write_text("{")
    assert quickstart.main([]) == 2
    said = capsys.readouterr().err
    assert f"{quickstart.OUTPUT / 'config.json'} is damaged" in said
    assert f"delete {quickstart.OUTPUT}, and start again" in said
