"""Builds ChestX-ray14, prepares TFDS data sets, or measures the input: `inmerge data`."""

import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

import tyro

from inmerge_jax.buckets import in_bucket, path_registry
from inmerge_jax.cli.errors import run_command
from inmerge_jax.data import TFDS_DIR
from inmerge_jax.errors import UsageError


@dataclass(frozen=True)
class Build:
    """Builds the data set for `inmerge train --data chestxray14 --data-dir OUTPUT`.

    Images are reduced once, in parallel, and stored as PNGs in ArrayRecord shards. After an
    interruption the same command continues. The finished data set is verified: counts of images
    and labels, and no patient in two splits.

    Attributes:
      images: NIH's folder: images_*/images/*.png, or all PNGs in one folder.
      labels: NIH's Data_Entry_2017*.csv, plain or gzipped, or its folder.
      split: chexnet: train_list.txt, val_list.txt and test_list.txt. nih_official:
        train_val_list.txt and test_list.txt; an eighth of the former's patients validate.
        patient_hash: 70, 10 and 20 % of the patients, without lists.
      lists: Folder of these lists, plain or gzipped.
      size: Height and width of the reduced images in pixels.
      output: Folder for the data set.
      workers: Processes that reduce images.
      allow_missing: Build without the images of the split that are missing.
    """

    images: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    labels: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: the folder of the images)"),
    ] = None
    split: Literal["chexnet", "nih_official", "patient_hash"] = "chexnet"
    lists: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: the labels' folder)"),
    ] = None
    size: Literal[224, 256, 512] = 224
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: one per core)")
    ] = None
    allow_missing: bool = False


@dataclass(frozen=True)
class Measure:
    """Measures the throughput of the input in images per second, without training.

    reading: training batches, decoded by threads of one process (0 workers), or by 1 and 2 worker
    processes. reducing: original images to the built size, in 1 and 2 processes. writing: as
    recorded by an uninterrupted build of DATA-DIR. Start-up time is not counted.

    Attributes:
      data_dir: Output folder of a build.
      images: Folder of original images to reduce; without it, reducing is not measured.
      output: JSON file for the rates and the environment.
      batch_size: Images per batch.
      seconds: Duration of each measurement.
    """

    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    output: Path = Path("runs/chestxray14_input.json")
    batch_size: int = 64
    seconds: float = 15.0


@dataclass(frozen=True)
class Prepare:
    """Downloads a data set of TensorFlow Datasets and prepares it for `inmerge train --data NAME`.

    It is stored as ArrayRecord, which is read without TensorFlow. Many builders need TensorFlow to
    prepare a data set.

    Attributes:
      name: tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION, such as tfds:eurosat/rgb.
      data_dir: Folder of TFDS's data sets.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="tfds:NAME")]
    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = TFDS_DIR


def run_prepare(config: Prepare) -> None:
    """Prepares the data set, and prints how to train on it."""
    from inmerge_jax.data.tfds import prepare_tfds

    kind, _, name = config.name.partition(":")
    if kind != "tfds" or not name:
        raise UsageError(f"{config.name!r} is no data set to prepare: give tfds:NAME")
    print(f"prepared {prepare_tfds(name, config.data_dir)}")
    own = "" if config.data_dir == TFDS_DIR else f" --data-dir {config.data_dir}"
    print(f"train on it: inmerge train --data {config.name}{own}")


def run_build(config: Build) -> None:
    """Builds the data set, and prints counts and speed."""
    from rich.console import Console

    from inmerge_jax.data.chestxray14.build import Request, build, summary
    from inmerge_jax.data.chestxray14.labels import find_labels
    from inmerge_jax.training.environment import available_cores

    # Bound to the stream: TFDS's own output is redirected while the progress line is shown.
    console = Console(file=sys.stdout)
    labels = find_labels(config.images if config.labels is None else config.labels)
    lists = config.lists
    if lists is None and config.split != "patient_hash":
        lists = labels.parent
    built = build(
        Request(
            images=config.images,
            labels=labels,
            split=config.split,
            lists=lists,
            size=config.size,
            output=config.output,
            workers=available_cores() if config.workers is None else config.workers,
            allow_missing=config.allow_missing,
        ),
        console,
    )
    console.print(summary(built.manifest))
    for line in (
        built.verified(),
        built.speed(),
        f"train on it: inmerge train --data chestxray14 --data-dir {config.output}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _require_local(config: Build | Measure | Prepare) -> None:
    """Refuses addresses in buckets."""
    for name, path in vars(config).items():
        if isinstance(path, PurePath) and in_bucket(path):
            raise UsageError(
                f"`{name}` {path}: inmerge data reads and writes local folders; copy a finished "
                "data set to the bucket, from where inmerge train reads it"
            )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status, see `errors`."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"build": Build, "prepare": Prepare, "measure": Measure},
        prog="inmerge data",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=path_registry(),
    )
    output = config.data_dir if isinstance(config, Prepare) else config.output
    stopped = "stopped" + ("" if isinstance(config, Measure) else "; the same command continues")
    return run_command(lambda: _run(config), output, stopped=stopped)


def _run(config: Build | Measure | Prepare) -> None:
    _require_local(config)
    if isinstance(config, Build):
        run_build(config)
    elif isinstance(config, Prepare):
        run_prepare(config)
    else:
        from inmerge_jax.cli.input_speed import measure

        measure(**vars(config))


if __name__ == "__main__":
    sys.exit(main())
