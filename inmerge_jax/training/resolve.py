"""What the options of a run mean: defaults of presets, checks, and the content of config.json."""

import dataclasses
import json
import math
from typing import Any

from inmerge_jax.buckets import absolute, as_path
from inmerge_jax.data import default_size, has_own_size
from inmerge_jax.errors import UsageError
from inmerge_jax.merging import MergeRule, quantile
from inmerge_jax.models.units import default_units
from inmerge_jax.training.augment import AugmentConfig
from inmerge_jax.training.config import (
    ARMS,
    DEFAULT_SKIP,
    DEFAULT_THRESHOLD,
    RecipeConfig,
    RuleConfig,
    TrainConfig,
)
from inmerge_jax.training.presets import find_preset
from inmerge_jax.training.recipes import RECIPES, Recipe
from inmerge_jax.training.rule_schedule import RuleSchedule

_NOT_COMPARED = (
    *("output", "resume", "overwrite", "checksums", "compilation_cache_dir", "logging"),
    *("workers", "steps_per_execution", "coordinator", "num_processes", "process_id"),
)
"""Fields that may differ between a run and its continuation; config.json does not hold them."""

_ADDED_LATER = {
    "": ("grad_accum_steps", "pallas"),
    "data": ("resize", "channels"),
    "model": ("remat",),
    "rule": (
        *("layers", "probability_end", "threshold_end", "quantile_end", "rule_schedule"),
        *("merge_every", "merge_from_epoch"),
    ),
    "recipe": (
        *("class_weights", "augment", "recompute_batch_stats", "batch_stats_batches"),
        "average_weights",
    ),
}
"""Fields by section that config.json does not hold at their default, because the runs of earlier
versions do not have them and are to be resumed."""

_LOWEST = {
    **{"probability": 0, "threshold": -1, "quantile": 0, "alpha": 0},
    **{"probability_end": 0, "threshold_end": -1, "quantile_end": 0},
}
"""Options of the rule that are numbers between this and 1."""


def apply_preset(config: TrainConfig) -> TrainConfig:
    """Fills in the defaults of the preset and the data set; idempotent.

    These are the preset's recipe and partner, the threshold, the units, the image size, and the
    arms of a single stage. The size stays None where the files determine it, see
    `data.has_own_size`; `skip` does where it depends on the number of layers, see
    `presets.select_units`.

    Raises:
      UsageError: the preset is unknown.
    """
    preset = find_preset(config.preset)
    recipe = dataclasses.replace(config.recipe, name=config.recipe.name or preset.recipe)
    rule = dataclasses.replace(config.rule, partner=config.rule.partner or preset.partner)
    if rule.threshold is None and rule.quantile is None:
        rule = dataclasses.replace(rule, threshold=DEFAULT_THRESHOLD)
    rule = dataclasses.replace(rule, units=rule.units or default_units(config.model.name))
    if rule.skip is None and rule.units == ("kernels",):
        rule = dataclasses.replace(rule, skip=DEFAULT_SKIP)
    single_stage = config.rule.merge_from_epoch is not None
    arms = config.arms
    if arms is None:
        arms = ("backbone", "inmerge") if single_stage else ARMS
    data = config.data
    if data.size is None and not has_own_size(data.name):
        data = dataclasses.replace(data, size=default_size(data.name))
    return dataclasses.replace(config, recipe=recipe, rule=rule, data=data, arms=arms)


def resolve_recipe(config: RecipeConfig) -> Recipe:
    """The named recipe, with the given values in place of its own; call `apply_preset` first.

    Raises:
      UsageError: the name is unknown, a number is out of range, or Adam has a momentum.
    """
    if config.name is None or config.name not in RECIPES:
        raise UsageError(f"`recipe` {config.name}: unknown; choose one of {', '.join(RECIPES)}")
    given = {name: value for name, value in vars(config).items() if name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
    given["augment"] = AugmentConfig(**vars(config.augment))
    recipe = dataclasses.replace(RECIPES[config.name], **given)
    for name in ("epochs", "merging_epochs", "batch_size"):
        _require(getattr(recipe, name) >= 1, name, getattr(recipe, name), "choose 1 or more")
    for name in ("learning_rate", "merging_learning_rate"):
        rate = getattr(recipe, name)
        valid = rate is None or (rate > 0 and math.isfinite(rate))
        _require(valid, name, rate, "choose a positive number, such as 0.001")
    _require(0 <= recipe.momentum < 1, "momentum", recipe.momentum, "choose a number in [0, 1)")
    if config.momentum is not None and recipe.optimizer != "sgd":
        raise UsageError(
            f"`momentum` {config.momentum}: {recipe.optimizer} has none; leave it out, or give "
            "`optimizer=sgd`"
        )
    if recipe.batch_stats_batches is not None:
        name, number = "batch_stats_batches", recipe.batch_stats_batches
        _require(number >= 1, name, number, "choose 1 or more")
        remedy = "give `recompute_batch_stats=all` too, or leave it out"
        _require(recipe.recompute_batch_stats != "off", name, number, remedy)
    decay = recipe.average_weights
    _require(decay is None or 0 < decay < 1, "average_weights", decay, "choose a number in (0, 1)")
    cap = recipe.pos_weight
    valid = cap is None or (cap > 0 and math.isfinite(cap))
    _require(valid, "pos_weight", cap, "choose a positive number, such as 10")
    valid = 0 <= recipe.weight_decay < math.inf
    _require(valid, "weight_decay", recipe.weight_decay, "choose 0 or more")
    for name, top in (("crop", math.inf), ("rotate", 180), ("brightness", 1), ("contrast", 1)):
        value = getattr(recipe.augment, name)
        _require(0 <= value <= top, name, value, f"choose a number in [0, {top}]")
    return recipe


def resolve_rule(config: RuleConfig) -> MergeRule:
    """The merging rule; call `apply_preset` first.

    Raises:
      UsageError: a number is out of range, or both a threshold and a quantile are given.
    """
    for name, low in _LOWEST.items():
        value = getattr(config, name)
        _require(value is None or low <= value <= 1, name, value, f"choose a number in [{low}, 1]")
    _require(config.skip is None or config.skip >= 0, "skip", config.skip, "choose 0 or more")
    partner = config.partner or find_preset(None).partner
    threshold = DEFAULT_THRESHOLD if config.threshold is None else config.threshold
    if config.quantile is None:
        return MergeRule(config.probability, threshold, config.alpha, partner)
    if config.threshold is not None:
        raise UsageError(
            f"`threshold` {config.threshold} and `quantile` {config.quantile} exclude each other: "
            "give one of them"
        )
    return MergeRule(config.probability, quantile(config.quantile), config.alpha, partner)


def schedule_rule(
    config: RuleConfig, rule: MergeRule, epochs: int, steps: int
) -> MergeRule | RuleSchedule:
    """The rule at each update of the merging stage; `rule` itself if it is always the same.

    Args:
      config: the options.
      rule: the result of `resolve_rule`.
      epochs: number of epochs of the stage.
      steps: updates per epoch.

    Raises:
      UsageError: an epoch is out of range, or an option has no effect.
    """
    ends = {"probability": config.probability_end, "threshold": config.threshold_end}
    ends = {name: value for name, value in ends.items() if value is not None}
    if config.threshold_end is not None and config.quantile is not None:
        raise UsageError(
            f"`threshold_end` {config.threshold_end}: the rule has a quantile; give `quantile_end`"
        )
    if config.quantile_end is not None:
        _require(
            config.quantile is not None,
            "quantile_end",
            config.quantile_end,
            "give `quantile` too, the value at the start",
        )
        ends["threshold"] = quantile(config.quantile_end)
    if config.rule_schedule is not None and not ends:
        raise UsageError(
            f"`rule_schedule` {config.rule_schedule}: nothing moves; give `probability_end`, "
            "`threshold_end` or `quantile_end` too, or leave it out"
        )
    every = steps if config.merge_every == "epoch" else config.merge_every
    _require(every >= 1, "merge_every", every, "choose 1 or more, or epoch")
    start = 1 if config.merge_from_epoch is None else config.merge_from_epoch
    remedy = f"choose 1 to {epochs}, the number of `epochs`"
    _require(1 <= start <= epochs, "merge_from_epoch", start, remedy)
    if not ends and every == 1 and start == 1:
        return rule
    return RuleSchedule(
        start=rule,
        end=dataclasses.replace(rule, **ends),
        first=(start - 1) * steps,
        last=epochs * steps - 1,
        every=every,
        shape=config.rule_schedule or "linear",
    )


def _check_single_stage(config: TrainConfig) -> None:
    name = f"`merge_from_epoch` {config.rule.merge_from_epoch}"
    for option in ("merging_epochs", "merging_learning_rate"):
        value = getattr(config.recipe, option)
        if value is not None:
            raise UsageError(f"{name}: there is no second stage; leave out `{option}` {value}")
    if config.arms and ("finetune" in config.arms or "inmerge" not in config.arms):
        raise UsageError(
            f"{name}: the arms are the backbone, which is the control, and inmerge; leave out "
            f"`arms` {' '.join(config.arms)}"
        )


def _check_places(config: TrainConfig) -> None:
    """Checks that a run neither deletes what it reads, nor writes among the images it reads."""
    output = absolute(config.output)
    kind, _, place = config.data.name.partition(":")
    source = absolute(as_path(place)) if place and kind != "tfds" else None
    inputs = {
        "init_from": config.model.init_from,
        "data": source,
        "data_dir": config.data.data_dir,
        "file": config.data.file,
    }
    for name, path in inputs.items():
        if (
            config.overwrite
            and path is not None
            and output in (full := absolute(path), *full.parents)
        ):
            raise UsageError(
                f"`{name}` {path} is in the folder `output` {config.output}, which `overwrite` "
                "empties first; move it, or choose another folder"
            )
    if kind == "folder" and source in output.parents:
        raise UsageError(
            f"`output` {config.output} is in the folder of images {source}, where it would be read "
            "as a class; choose another folder"
        )


def check_run(config: TrainConfig) -> None:
    """Checks the options that no other function checks.

    Raises:
      UsageError: no seed, one that is negative, repeated or too large, a changed address of a
        bucket, options that exclude each other, or an input in a folder that is replaced.
    """
    seeds = " ".join(map(str, config.seeds))
    _require(bool(config.seeds), "seeds", seeds, "give at least one, such as 0 1 2")
    _require(min(config.seeds) >= 0, "seeds", seeds, "choose seeds of 0 or more")
    # JAX's keys are of 32 bits: larger seeds would share their draws with smaller ones.
    _require(max(config.seeds) < 2**32, "seeds", seeds, "choose seeds below 2**32")
    _require(len(set(config.seeds)) == len(config.seeds), "seeds", seeds, "name each seed once")
    _require(config.arms != (), "arms", "", f"name at least one of {' '.join(ARMS)}")
    if config.rule.merge_from_epoch is not None:
        _check_single_stage(config)
    if config.model.replace_head and config.model.init_from is None:
        raise UsageError("`replace_head` is for the head of a weight file: give `init_from` too")
    share = config.model.init_min_match
    _require(0 < share <= 1, "init_min_match", share, "choose a number in (0, 1]")
    if config.model.init_from is None and share != type(config.model).init_min_match:
        raise UsageError(f"`init_min_match` {share} is for a weight file: give `init_from` too")
    _check_places(config)
    places = {
        "output": config.output,
        "compilation_cache_dir": config.compilation_cache_dir,
        "data_dir": config.data.data_dir,
    }
    for name, path in (places | {"init_from": config.model.init_from}).items():
        # pathlib collapses the two slashes, and a local folder of that name would be made.
        _require(
            path is None or not path.parts[:1] or not path.parts[0].endswith(":"),
            name,
            path,
            "pathlib.Path changed this address; make the path with inmerge_jax.buckets.as_path",
        )
    valid = config.workers is None or config.workers >= 0
    _require(valid, "workers", config.workers, "choose 0 or more")
    _require(
        config.grad_accum_steps >= 1,
        "grad_accum_steps",
        config.grad_accum_steps,
        "choose 1 or more",
    )


def check_steps_per_execution(steps: int, platform: str) -> None:
    """Checks `steps_per_execution` for the platform of the run.

    Raises:
      UsageError: `steps` is below 1, or above 1 on CPU.
    """
    _require(steps >= 1, "steps_per_execution", steps, "choose 1 or more")
    if steps > 1 and platform == "cpu":
        raise UsageError(
            f"`steps_per_execution` {steps}: leave it out on CPU, where XLA's convolutions are "
            "about 45 times slower inside a loop; it is for GPU and TPU"
        )


def config_dict(
    config: TrainConfig,
    recipe: Recipe,
    devices: int,
    init_sha256: str | None = None,
    data_sha256: str | None = None,
) -> dict[str, Any]:
    """The content of config.json: the resolved options that determine the results.

    `init_sha256` is the hash of the file `init_from`; `data_sha256` is that of a data set that was
    built from files. The content of both determines the results.
    """
    values = dataclasses.asdict(config)
    for name in _NOT_COMPARED:
        del values[name]
    del values["model"]["init_min_match"]  # It refuses a run, and changes none.
    if config.model.init_from is None:
        del values["model"]["init_from"], values["model"]["replace_head"]
    else:
        values["model"]["init_sha256"] = init_sha256
    if values["rule"]["units"] == ("kernels",):
        del values["rule"]["units"]  # As in the runs of earlier versions.
    del values["rule"]["threshold" if config.rule.threshold is None else "quantile"]
    if data_sha256:
        values["data"]["content_sha256"] = data_sha256
    values["recipe"] = {"name": config.recipe.name, **dataclasses.asdict(recipe)}
    given = {"": config, "recipe": recipe}
    for section, names in _ADDED_LATER.items():
        options = given.get(section) or getattr(config, section)
        for name in names:
            if getattr(options, name) == getattr(type(options), name):
                del (values[section] if section else values)[name]
    values["arms"] = [arm for arm in ARMS if arm == "backbone" or arm in (config.arms or ARMS)]
    values["devices"] = devices
    return json.loads(json.dumps(values, default=str))


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise UsageError(f"`{name}` {value}: {remedy}")
