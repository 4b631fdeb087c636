import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from inmerge_jax import quantile
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.data import DataConfig, PhantomConfig
from inmerge_jax.errors import UsageError
from inmerge_jax.training import run_spec
from inmerge_jax.training.augment import AugmentConfig
from inmerge_jax.training.config import (
    LoggingConfig,
    ModelConfig,
    RecipeConfig,
    RuleConfig,
    TrainConfig,
)
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.resolve import check_run, config_dict, resolve_recipe, resolve_rule
from inmerge_jax.training.run_spec import make_run_spec

SMALL = ["--phantom.train", "40", "--phantom.val", "8", "--phantom.test", "8", "--size", "16"]
TINY = [*SMALL, "--model", "vgg16", "--width", "0.05", "--batch-size", "8"]


def test_defaults_are_the_papers_rule_and_the_benchmarks_recipe():
    config = parse_config([])
    assert resolve_recipe(config.recipe) == RECIPES["medmnist"]
    rule = resolve_rule(config.rule)
    assert (rule.probability, rule.threshold, rule.alpha, rule.partner) == (0.3, 0.3, 0.8, "random")
    assert config.rule.skip == 10
    assert config.data.name == "phantom"


def test_every_option_reaches_its_place():
    config = parse_config(
        "--data breastmnist --data-dir d --allow-unverified --no-download --model vgg16 --stem "
        "imagenet --recipe released --epochs 3 --merging-epochs 2 --batch-size 7 --learning-rate "
        "0.5 --merging-learning-rate 0.25 --flip False --alpha 0.9 --skip 4 --seeds 3 5 --arms "
        "inmerge --devices 2 --resume --output o --phantom.findings nodule mass".split()
    )
    recipe = resolve_recipe(config.recipe)
    changed = {
        "epochs": 3,
        "merging_epochs": 2,
        "batch_size": 7,
        "learning_rate": 0.5,
        "merging_learning_rate": 0.25,
        "flip": False,
    }
    assert recipe == dataclasses.replace(RECIPES["released"], **changed)
    assert (config.data.name, str(config.data.data_dir)) == ("breastmnist", "d")
    assert (config.data.allow_unverified, config.data.download) == (True, False)
    assert config.data.phantom.findings == ("nodule", "mass")
    assert (config.model.name, config.model.stem) == ("vgg16", "imagenet")
    assert (config.rule.alpha, config.rule.skip, config.devices) == (0.9, 4, 2)
    assert (config.seeds, config.arms, config.resume) == ((3, 5), ("inmerge",), True)


def test_a_quantile_replaces_the_threshold():
    config = parse_config(["--quantile", "0.9"])
    assert resolve_rule(config.rule).threshold == quantile(0.9)
    kept = config_dict(config, resolve_recipe(config.recipe), 1)["rule"]
    assert kept["quantile"] == 0.9 and "threshold" not in kept
    plain = parse_config([])
    kept = config_dict(plain, resolve_recipe(plain.recipe), 1)["rule"]
    assert kept["threshold"] == 0.3 and "quantile" not in kept
    both = parse_config("--threshold 0.5 --quantile 0.9".split())
    with pytest.raises(UsageError, match=r"`threshold` 0\.5 and `quantile` 0\.9 exclude"):
        resolve_rule(both.rule)


def test_a_configuration_made_in_python_needs_no_command_line():
    config = TrainConfig(
        data=DataConfig(size=16, phantom=PhantomConfig(train=40, val=8, test=8)),
        model=ModelConfig("vgg16", width=0.05),
        recipe=RecipeConfig(batch_size=8),
        devices=1,
    )
    plan = make_run_spec(config)
    assert len(plan.kernels) == 13 and len(plan.deep) == 3
    assert plan.deep == plan.kernels[10:]


def test_help_names_every_option_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.count("\n") <= 120 and "--help-verbose" in text
    groups = re.findall(r"^\W*([\w-]+) options\W*$", text, re.MULTILINE)
    assert groups == "data model recipe merging output devices-and-processes logging".split()
    sections = (TrainConfig, DataConfig, ModelConfig, RecipeConfig, RuleConfig, AugmentConfig)
    sections += (LoggingConfig,)
    for section in sections:
        for field in dataclasses.fields(section):
            name = field.name.replace("_", "-")
            name = f"augment.{name}" if section is AugmentConfig else name
            if name == "name":
                continue
            groups = ("data", "model", "recipe", "rule", "logging")
            nested = section is TrainConfig and name in groups
            if not nested and name not in ("phantom", "augment"):
                assert re.search(rf"--(no-)?{name}\b", text), name
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_config(["--help-verbose"])
    text = capsys.readouterr().out
    off = re.findall(r"--no-[a-z-]+ +(.*)", text)  # What an option --no-... does, not its contrary.
    assert len(off) == 3 and all(re.match("Do not|Write .* without|Merge without", x) for x in off)
    for name in ("--data", "--model", "--recipe", "--phantom.train"):
        assert re.search(rf"{name} ", text), name


def test_the_saved_configuration_is_resolved_and_leaves_out_how_the_run_was_started():
    config = parse_config(["--epochs", "4", "--arms", "inmerge"])
    values = config_dict(config, resolve_recipe(config.recipe), devices=8)
    assert values == json.loads(json.dumps(values))
    assert values["recipe"]["epochs"] == 4 and values["recipe"]["optimizer"] == "adam"
    assert values["devices"] == 8 and values["arms"] == ["backbone", "inmerge"]
    other = parse_config("--epochs 4 --arms backbone inmerge --resume --output x".split())
    assert config_dict(other, resolve_recipe(other.recipe), devices=8) == values


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["--arms", "backbone", "distill"],
        ["--epochs", "three"],
        ["--stem", "large"],
        ["--partner", "best"],
    ],
)
def test_unknown_options_and_values_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert arguments[-1].removeprefix("--") in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--data", "catmnist"], r"catmnist.*phantom"),
        (["--model", "resnet19"], r"resnet19.*resnet18"),
        (["--recipe", "best"], r"--recipe best.*medmnist, released"),
        (["--probability", "1.5"], r"--probability 1.5.*\[0, 1\]"),
        (["--probability", "nan"], r"--probability nan.*\[0, 1\]"),
        (["--alpha", "-0.1"], r"--alpha -0.1.*\[0, 1\]"),
        (["--threshold", "-2"], r"--threshold -2.*\[-1, 1\]"),
        (["--quantile", "1.5"], r"--quantile 1\.5.*number in \[0, 1\]"),
        (["--skip", "13"], r"--skip 13.*13 convolutions.*0 to 12"),
        (["--skip", "-1"], r"--skip -1"),
        (["--epochs", "0"], r"--epochs 0.*1 or more"),
        (["--merging-epochs", "0"], r"--merging-epochs 0.*1 or more"),
        (["--batch-size", "0"], r"--batch-size 0.*1 or more"),
        (["--batch-size", "41", "--devices", "1"], r"--batch-size 41.*40 examples"),
        (["--batch-size", "12"], r"--batch-size 12.*8 devices"),
        (["--devices", "9"], r"--devices 9.*1 to 8"),
        (["--devices", "0"], r"--devices 0"),
        (["--learning-rate", "0"], r"--learning-rate 0.*positive"),
        (["--merging-learning-rate", "inf"], r"--merging-learning-rate inf.*positive"),
        ("--optimizer sgd --momentum 1".split(), r"--momentum 1"),
        (["--momentum", "0.5"], r"--momentum 0\.5: adam has none.*give --optimizer sgd"),
        (["--weight-decay", "-1"], r"--weight-decay -1"),
        (["--augment.rotate", "200"], r"--augment\.rotate 200.*\[0, 180\]"),
        (["--augment.crop", "16"], r"--augment\.crop 16: the images have 16 px"),
        (["--init-min-match", "0.5"], r"--init-min-match 0\.5 .*give --init-from"),
        (["--pos-weight", "2"], r"--pos-weight 2.* is for multi-label data"),
        ("--phantom.multi-label --class-weights balanced".split(), r"--class-weights.*--pos-wei"),
        (["--data-dir", "d"], r"--data-dir d is not read for phantom.* --data"),
        (["--resize", "bicubic"], r"--resize bicubic is not read for phantom"),
        (["--data", "folder:"], r"--data folder:: give folder:PATH"),
        (["--data", "folders:x"], r"--data folders:x: only folder:PATH, tfds:NAME"),
        (["--size", "0"], r"--size 0"),
        (["--seeds", "1", "1"], r"--seeds 1 1.*once"),
        (["--seeds", "-1"], r"--seeds -1"),
        (["--seeds"], r"--seeds.*at least one"),
        (["--arms"], r"--arms.*at least one"),
        (["--resume", "--overwrite"], r"--resume and --overwrite"),
        (["--resume"], r"--resume.*no run"),
        (["--data", "breastmnist", "--size", "28", "--file", "missing.npz"], r"missing\.npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_nothing_is_written(arguments, pattern, tmp_path, capsys):
    output = tmp_path / "run"
    assert (
        main([*TINY, "--output", str(output), "--compilation-cache-dir", "None", *arguments]) == 2
    )
    message = capsys.readouterr().err
    assert re.search(pattern, message, re.DOTALL), message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert (
        main([*TINY, "--output", str(tmp_path), "--compilation-cache-dir", "None", "--overwrite"])
        == 2
    )
    assert "holds files but no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_neither_deletes_nor_changes_what_it_reads(tmp_path):
    run = tmp_path / "run"
    for config in (
        TrainConfig(output=run, overwrite=True, model=ModelConfig(init_from=run / "w.safetensors")),
        TrainConfig(output=run, overwrite=True, data=DataConfig(data_dir=run / "data")),
        TrainConfig(output=run, overwrite=True, data=DataConfig(name=f"table:{run}/a.csv")),
    ):
        with pytest.raises(UsageError, match=rf"in the folder `output` {run}, which `overwrite`"):
            check_run(config)
        check_run(dataclasses.replace(config, overwrite=False))
    scans = DataConfig(name=f"folder:{tmp_path}")
    with pytest.raises(UsageError, match=rf"`output` {run} is in the folder of images {tmp_path}"):
        check_run(TrainConfig(output=run, data=scans))
    check_run(TrainConfig(output=tmp_path.parent / "run", data=scans))


def test_channels_follow_the_recipes_normalisation():
    config = parse_config([*TINY, "--recipe", "released"])
    assert make_run_spec(config).shape == (16, 16, 3)
    assert make_run_spec(parse_config(TINY)).shape == (16, 16, 1)


def test_channels_are_those_of_the_option():
    released = make_run_spec(parse_config([*TINY, "--recipe", "released", "--channels", "1"]))
    assert released.shape == (16, 16, 1)
    assert released.recipe.mean == pytest.approx((0.449,))
    assert make_run_spec(parse_config([*TINY, "--channels", "3"])).shape == (16, 16, 3)


def test_options_that_earlier_versions_lacked_are_stored_only_where_they_are_used():
    def stored(*arguments):
        config = parse_config(list(arguments))
        return config_dict(config, resolve_recipe(config.recipe), devices=8)

    plain = stored()
    assert not {"resize", "channels"} & plain["data"].keys()
    assert not {"class_weights", "augment"} & plain["recipe"].keys()
    used = stored("--augment.crop", "4", "--class-weights", "balanced", "--channels", "3")
    assert used["recipe"]["augment"] == {"crop": 4, "rotate": 0, "brightness": 0, "contrast": 0}
    assert used["recipe"]["class_weights"] == "balanced" and used["data"]["channels"] == 3


def test_a_rule_out_of_range_is_an_input_error_for_python_too():
    with pytest.raises(UsageError, match="`alpha` 2"):
        resolve_rule(RuleConfig(alpha=2))
    assert jax.local_device_count() == 8


@pytest.mark.parametrize("name", ["output", "compilation_cache_dir", "data_dir", "init_from"])
def test_the_address_of_a_bucket_is_kept_and_a_changed_one_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "gs://bucket/a run"
    config = parse_config([*TINY, "--" + name.replace("_", "-"), address])
    group = {"data_dir": "data", "init_from": "model"}.get(name)
    options = getattr(config, group) if group else config
    assert str(getattr(options, name)) == address
    options = dataclasses.replace(options, **{name: Path(address)})
    config = dataclasses.replace(config, **{group: options}) if group else options
    with pytest.raises(UsageError, match=rf"`{name}` gs:/bucket/a run: .*buckets\.as_path"):
        make_run_spec(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model resnet19", "unknown model 'resnet19'"),
        ("--width 0", "width 0.0 for"),
        ("--model vgg11 --remat", "`remat` is for densenet121"),
        ("--probability-end 3", "`probability_end` 3"),
        ("--merge-from-epoch 900", "`merge_from_epoch` 900"),
        ("--init-from none.safetensors", "`init_from` none.safetensors"),
        ("--preset released --average-weights 0.9", "`average_weights` 0.9"),
        ("--preset released --merge-every epoch", "`preset` released"),
        ("--seeds 4294967296", r"`seeds` 4294967296: choose seeds below 2\*\*32"),
    ],
)
def test_what_needs_no_data_is_checked_before_the_data_set_is_loaded(options, words, monkeypatch):
    monkeypatch.setattr(run_spec, "load_dataset", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=words):
        make_run_spec(parse_config([*TINY, *options.split()]))


def test_the_largest_seed_has_draws_of_its_own():
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (2**32 - 1, 2**32, 0)]
    assert keys[0] != keys[1] == keys[2]
