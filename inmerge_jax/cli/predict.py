"""Scores images and other examples with a trained network: `inmerge predict`."""

import csv
import dataclasses
import io
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from inmerge_jax.buckets import as_path, local_copy, path_registry
from inmerge_jax.cli.errors import run_command
from inmerge_jax.data import Dataset, Split, load_dataset, reads
from inmerge_jax.data.folder import open_files
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from inmerge_jax.files import check_target, write_errors, write_text
from inmerge_jax.modality import EXAMPLES, SIZE_UNITS
from inmerge_jax.training.config import Arm, DataOptions
from inmerge_jax.training.load import LoadedRun, Threshold, load_run

_OWN = "run"
"""Name of the run's own data set."""


@dataclass(frozen=True)
class PredictConfig:
    """Scores images, volumes, signals or rows of a table with one arm of a run, and writes a CSV.

    They are those of a data set, or image files without labels. Columns: the split, the image's
    name or its index in the split, a score per class, decisions at thresholds (two classes, or
    several labels per image), and the predicted class or labels. The thresholds have the highest
    Youden index (sensitivity + specificity - 1) on the run's validation images.

    Attributes:
      run: Folder of the run (its --output).
      to: CSV file to write.
      images: PNG or JPEG files without labels, in place of a data set: a file or a folder.
      split: Part of the data set to score.
      arm: Arm of the run.
      seed: Seed of the run; the first one by default.
      overwrite: Replace an existing file.
      data: The data set: the run's own, or another with the same classes, at the run's --size.
    """

    run: tyro.conf.Positional[Path]
    to: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    images: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    split: Literal["train", "val", "test", "all"] = "test"
    arm: Arm = "inmerge"
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    overwrite: bool = False
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: DataOptions(name=_OWN)
    )


def predict(config: PredictConfig) -> str:
    """Writes the CSV and returns a description of it.

    Raises:
      UsageError: the run, arm or seed is missing or not finished; the data set has other classes or
        another image size; an image cannot be read; or the file cannot be written.
    """
    check_target(config.to, overwrite=config.overwrite)
    run = load_run(config.run, config.arm, config.seed)
    if run.task == "segmentation":
        raise UsageError(
            f"{config.run} segments images, and this command writes tables of scores: call "
            "inmerge_jax.training.load.load_run(...).predict(images), which returns masks"
        )
    title, parts = _chosen_images(config, run)
    thresholds = run.thresholds()

    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    decisions = [f"{name} >= {_cut(found)}" for name, found in thresholds.items()]
    rows.writerow(["split", run.preprocessing.modality, *run.classes, *decisions, "predicted"])
    count, batch_size = 0, run.stage.config["recipe"]["batch_size"]
    examples = EXAMPLES[run.preprocessing.modality]
    for split, names, images in parts:
        scores = run.predict(images, min(batch_size, len(images)))
        for image, row in zip(names, scores, strict=True):
            rows.writerow([split, image, *map(str, row), *_decided(run, thresholds, row)])
        count += len(images)
    with write_errors(config.to, begun=False):
        write_text(config.to, buffer.getvalue())
    stage = run.stage
    return "\n".join(
        [
            f"{config.to}: {count} {examples} of {title}, seed {stage.seed} {stage.arm} epoch "
            f"{stage.result['best_epoch']}",
            *(f"  {_described(name, found, examples)}" for name, found in thresholds.items()),
        ]
    )


def _chosen_images(
    config: PredictConfig, run: LoadedRun
) -> tuple[str, list[tuple[str, Sequence[Any], Any]]]:
    """A title, and for each split its name, the images' names and the images."""
    if config.images is None:
        dataset = load_dataset(_chosen_data(config.data, run), run.preprocessing.bits)
        _check_dataset(run, dataset)
        trained_on = run.stage.config["data"].get("content_sha256")
        note = ""
        if trained_on and dataset.fingerprint != trained_on:
            if config.data.name == _OWN:
                raise UsageError(
                    f"{config.run}: its data set {dataset.name} has changed since it was trained, "
                    "so its splits may hold other images; restore the files, or name them as "
                    "another data set with `data`"
                )
            note = (
                ", which is not the data set of the run: its splits are its own, and images that "
                "the network was trained on may be in any of them"
            )
        parts = []
        for name in SPLITS if config.split == "all" else (config.split,):
            split: Split = getattr(dataset, name)
            names = range(len(split)) if split.names is None else split.names
            parts.append((name, names, split.images))
        return f"{dataset.title} ({config.split}){note}", parts
    if config.data != DataOptions(name=_OWN) or config.split != "test":
        raise UsageError(
            f"`images` {config.images} has no splits and no labels: leave out `data`, its options "
            "and `split`"
        )
    shape = run.preprocessing
    if shape.modality != "image":
        raise UsageError(
            f"`images` {config.images}: the network reads {EXAMPLES[shape.modality]}; name their "
            "data set with `data`"
        )
    place = local_copy(config.images)
    files = open_files(
        place, size=shape.size, channels=shape.channels, resize=shape.resize, bits=shape.bits
    )
    return str(config.images), [("", files.names, files)]


def _chosen_data(given: DataOptions, run: LoadedRun) -> DataOptions:
    """The options of the data set to score; those not given are the run's, where it is its own."""
    own = _options(DataOptions, run.stage.config["data"])
    if given.name != _OWN:
        kinds = {data.name.partition(":")[0] for data in (given, own)}
        resize = given.resize or (own.resize if len(kinds) == 1 else None)
        size = given.size or run.preprocessing.size
        if not reads(given.name, "size"):
            size = given.size
        if not reads(given.name, "resize"):
            resize = given.resize
        return dataclasses.replace(given, size=size, resize=resize)
    return _overridden(own, given, DataOptions(name=_OWN))


def _overridden(own: Any, given: Any, default: Any) -> Any:
    """`own` with those values of `given` that are not the default."""
    changed = {}
    for name, value in vars(given).items():
        if dataclasses.is_dataclass(value):
            changed[name] = _overridden(getattr(own, name), value, getattr(default, name))
        elif value != getattr(default, name):
            changed[name] = value
    return dataclasses.replace(own, **changed)


def _options(kind: type, values: dict[str, Any]) -> Any:
    """Options from config.json."""
    fields = {}
    for name, hint in typing.get_type_hints(kind).items():
        value = values.get(name)
        if value is not None:
            if dataclasses.is_dataclass(hint):
                value = _options(typing.cast(type, hint), value)
            elif Path in (hint, *typing.get_args(hint)):
                value = as_path(value)
            fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def _check_dataset(run: LoadedRun, dataset: Dataset) -> None:
    needed = run.preprocessing
    if dataset.modality != needed.modality:
        raise UsageError(
            f"`data` {dataset.name} has {EXAMPLES[dataset.modality]}, and the run was trained on "
            f"{EXAMPLES[needed.modality]}: choose such a data set"
        )
    if dataset.classes != run.classes or dataset.multi_label != run.multi_label:
        raise UsageError(
            f"`data` {dataset.name} has the classes {', '.join(dataset.classes)} ({dataset.task}), "
            f"and the run has {', '.join(run.classes)} ({run.task}): choose a data set with the "
            "same classes"
        )
    if dataset.features != run.features:
        raise UsageError(
            f"`data` {dataset.name} has the features {', '.join(dataset.features)}, and the run "
            f"has {', '.join(run.features)}: give these, in this order"
        )
    examples, pixels = EXAMPLES[needed.modality], needed.modality in ("image", "volume")
    if dataset.size != needed.size:
        unit = SIZE_UNITS[needed.modality]
        remedy = f"give `size={needed.size}`" if pixels else "cut or resample them"
        raise UsageError(
            f"`data` {dataset.name} has {examples} of {dataset.size_text}, and the run was trained "
            f"at {needed.size} {unit}: {remedy}"
        )
    if dataset.channels not in ((1, needed.channels) if pixels else (needed.channels,)):
        remedy = "give grey images, or `channels=1` for image files" if pixels else "give as many"
        raise UsageError(
            f"`data` {dataset.name} has {examples} with {dataset.channels} channels, and the "
            f"network reads {needed.channels}: {remedy}"
        )


def _cut(threshold: Threshold | None) -> float:
    return 0.5 if threshold is None else threshold.value


def _decided(
    run: LoadedRun, thresholds: dict[str, Threshold | None], scores: np.ndarray
) -> list[Any]:
    """One 0 or 1 per threshold, and the predicted class or labels."""
    above = [
        name
        for name, found in thresholds.items()
        if float(scores[run.classes.index(name)]) >= _cut(found)
    ]
    predicted = "|".join(above)
    if not run.multi_label:
        predicted = run.classes[int(np.argmax(scores))]
        if thresholds:
            predicted = run.classes[len(above)]
    return [*(int(name in above) for name in thresholds), predicted]


def _described(name: str, threshold: Threshold | None, examples: str) -> str:
    if threshold is None:
        return (
            f"{name}: threshold 0.5, as the run's validation {examples} do not have both outcomes"
        )
    return (
        f"{name}: threshold {threshold.value}, sensitivity {threshold.sensitivity:.1%} and "
        f"specificity {threshold.specificity:.1%} on the run's validation {examples}"
    )


def parse_config(arguments: list[str] | None = None) -> PredictConfig:
    """Parses the command line; None for that of this process."""
    return tyro.cli(
        PredictConfig,
        prog="inmerge predict",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=path_registry(),
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status, see `errors`."""
    from inmerge_jax.cli.train import OPTIONS

    config = parse_config(arguments)
    return run_command(
        lambda: print(predict(config)),
        config.to,
        {**OPTIONS, "seed": "--seed"},
        stopped="stopped; nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main())
