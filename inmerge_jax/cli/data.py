"""Builds ChestX-ray14 from NIH's files, and measures its input: `--help` tells the rest."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inmerge_jax.errors import UsageError


@dataclass(frozen=True)
class Build:
    """Builds the data set for `inmerge train --data chestxray14 --data-dir OUTPUT`.

    Images are reduced once, in parallel, and kept as PNGs in ArrayRecord shards. The same command
    goes on after a kill; what it has made is then verified: counts of images and labels, and no
    patient in two splits. At the end it says how fast it was, and what all 112,120 images take.

    Attributes:
      images: NIH's folder: images_*/images/*.png, or all PNGs in one.
      labels: NIH's Data_Entry_2017*.csv, plain or gzipped, or the folder that holds it; the folder
        of the images by default.
      split: chexnet, by train_list.txt, val_list.txt and test_list.txt; nih_official, by
        train_val_list.txt and test_list.txt, an eighth of the former's patients validating;
        patient_hash, 70, 10 and 20 % of the patients, without a list.
      lists: Folder of these lists, plain or gzipped; that of the labels by default.
      size: Height and width of the reduced images in pixels.
      output: Folder for the data set.
      workers: Processes that reduce images; one per CPU core by default.
      allow_missing: Build what there is, where images of the split are missing.
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
    """Measures how many images a second the input alone gives, without any training.

    reading: batches of the training split as training gets them, decoded by threads of one process
    (0 workers), or by 1 and 2 worker processes. reducing: original images to the built size, in 1
    and 2 processes. writing and verifying: as the build of DATA-DIR did it, where it was not
    interrupted. Start-up is not counted.

    Attributes:
      data_dir: Output folder of a build.
      images: Folder of original images to reduce; without it reducing isn't measured.
      output: JSON file for all rates, and the environment that they were taken in.
      batch_size: Images of one batch.
      seconds: Time to measure each for.
    """

    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    output: Path = Path("experiments/results/chestxray14_input.json")
    batch_size: int = 64
    seconds: float = 15.0


def run_build(config: Build) -> None:
    """Builds, and prints counts and speed."""
    import os

    from rich.console import Console

    from inmerge_jax.data.chestxray14.build import Request, build, summary
    from inmerge_jax.data.chestxray14.labels import find_labels

    console = Console()
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
            workers=(os.cpu_count() or 1) if config.workers is None else config.workers,
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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the status: 0, or 2 on bad input."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"build": Build, "measure": Measure},
        prog="inmerge data",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        if isinstance(config, Build):
            run_build(config)
        else:
            from inmerge_jax.cli.input_speed import run_measure

            run_measure(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
