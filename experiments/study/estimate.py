"""What a grid would take, and what it could tell: `--dry-run`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import print as rich_print
from rich.table import Table

from experiments.study import datasets, store
from experiments.study.cells import Backbone, Cell, with_backbones
from experiments.study.question import Question
from experiments.study.runner import finished
from experiments.study.stages import Places, images_of
from experiments.study.statistics import smallest_detectable
from experiments.study.telling import NEEDED
from inmerge_jax.errors import UsageError

SEED_SD = 0.02
CORRELATION = 0.9
AUC, ACC = 0.9, 0.85
_GFLOPS = 60
"""Of two CPU cores in training, for networks of which no cell of any data set is kept yet."""


Network = tuple[str, str, float, str]
"""Data set, model, width and stem: what decides a step's operations."""


def network(start: Backbone) -> Network:
    """That of a backbone."""
    return start.data, start.model, start.width, start.stem


def seconds_per_image(cells: Iterable[Cell], kept: Path) -> dict[Network, float]:
    """Of kept cells, by network."""
    found: dict[Network, list[float]] = {}
    for cell in cells:
        record = store.read(cell, kept)
        if record is not None:
            found.setdefault(network(cell.backbone), []).append(
                record["result"]["seconds"] / images_of(cell)
            )
    return {key: float(np.median(rates)) for key, rates in found.items()}


def operations_per_image(start: Backbone) -> float:
    """Of a training step, as counted by XLA without compiling."""
    import jax
    import jax.numpy as jnp

    from inmerge_jax.models import create_model

    size = datasets.SOURCES[start.data].config.size
    model = create_model(start.model, 10, stem=start.stem, width=start.width)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.random.key(0)
    weights = jax.eval_shape(lambda key, x: model.init(key, x, train=False), key, image)
    forward = jax.jit(lambda weights, x: model.apply(weights, x, train=False))
    operations: Any = forward.lower(weights, image).cost_analysis()
    return 3 * operations["flops"]


def guess_seconds_per_image(start: Backbone, known: Mapping[Network, float]) -> float:
    """From the same network's speed on data sets with kept cells, else that of two CPU cores."""
    speeds = [
        operations_per_image(replace(start, data=data, stem=stem)) / seconds
        for (data, model, width, stem), seconds in known.items()
        if (model, width) == (start.model, start.width)
    ]
    speed = float(np.median(speeds)) if speeds else _GFLOPS * 1e9
    return operations_per_image(start) / speed


def resolution(name: str, seeds: int, kept: Path) -> dict[str, float]:
    """What is detectable on a data set before anything is run, by the assumptions above.

    Of the only comparison, as the only metric. A single training is judged over images alone.

    With labels at hand (of a kept cell), for the mean over its classes as if these were
    independent; else for a class of half of the images.
    """
    test = datasets.SOURCES[name].images[2]
    try:
        known = store.read_labels(name, kept)
    except UsageError:
        ones = [test // 2]
    else:
        labels = known.labels
        ones = labels.sum(0).tolist() if labels.ndim == 2 else np.bincount(labels).tolist()
        ones = ones[1:] if known.task == "binary-class" else ones
        test = len(labels)
    ones = [one for one in ones if 0 < one < test]
    errors = [error_over_images(int(one), int(test - one)) for one in ones]
    over_images = {
        "auc": float(np.sqrt(sum(error["auc"] ** 2 for error in errors)) / len(errors)),
        "acc": errors[0]["acc"],
    }
    over_seeds = SEED_SD / np.sqrt(seeds) if seeds > 1 else 0.0
    return {
        name: smallest_detectable(seeds, over_seeds, error) for name, error in over_images.items()
    }


def show(
    question: Question, cells: Sequence[Cell], places: Places, kept: Callable[[Cell], bool]
) -> None:
    """Prints the cells that are left, the time, and what the data sets can resolve."""
    grid = with_backbones(cells)
    left = [cell for cell in grid if not kept(cell) and not finished(cell, places)]
    known = seconds_per_image(grid, places.kept)
    table = Table(title=f"{question.name}: {len(left)} of {len(grid)} cells are left")
    for heading in ("cell", "what", "updates of", "estimate"):
        table.add_column(heading)
    total, guesses = 0.0, 0
    guessed: dict[Any, float] = {}
    for cell in left:
        key = network(cell.backbone)
        mark = ""
        if key not in known:
            if key not in guessed:
                guessed[key] = guess_seconds_per_image(cell.backbone, known)
            mark, guesses = "~", guesses + 1
        seconds = images_of(cell) * known.get(key, guessed.get(key, 0.0))
        total += seconds
        epochs = f"{cell.epochs or cell.backbone.epochs} epochs"
        table.add_row(cell.hash, cell.name, epochs, f"{mark}{seconds / 60:.1f} min")
    rich_print(table)
    how = f"; ~ {guesses} cells by operations, at the network's speed elsewhere" if guesses else ""
    print(f"in all {total / 3600:.1f} h by what kept cells took{how}\n")

    table = Table(title="detectable difference between two arms (four times out of five)")
    for heading in ("data set", "test images", "seeds", "AUC", "ACC", f"resolves {NEEDED}"):
        table.add_column(heading)
    for name in dict.fromkeys(cell.backbone.data for cell in grid):
        seeds = len({cell.backbone.seed for cell in grid if cell.backbone.data == name})
        found = resolution(name, seeds, places.kept)
        source = datasets.SOURCES[name]
        enough = "yes" if found["auc"] <= NEEDED else "no"
        figures = f"{found['auc']:.3f}", f"{found['acc']:.3f}", enough
        table.add_row(source.title, f"{source.images[2]:,}", str(seeds), *figures)
    rich_print(table)
    print(
        f"as the only comparison, supposing AUC {AUC}, ACC {ACC}, a correlation of {CORRELATION} "
        f"between two arms' errors over images, and {SEED_SD} standard deviation of the difference "
        "over trainings. The answer has what was measured."
    )


def error_over_images(
    positives: int,
    negatives: int,
    *,
    auc: float = AUC,
    acc: float = ACC,
    correlation: float = CORRELATION,
) -> dict[str, float]:
    """Expected standard error of a paired difference in AUC and in ACC over the test images.

    The AUC's variance is that of Hanley and McNeil (1982), the ACC's binomial; two arms on the same
    images share `correlation` of it.

    Args:
      positives: test images of a class.
      negatives: all others.
      auc: expected.
      acc: expected.
      correlation: of the two arms' errors over images.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    over_images = {
        "auc": variance / (positives * negatives),
        "acc": acc * (1 - acc) / (positives + negatives),
    }
    return {name: float(np.sqrt(2 * (1 - correlation) * one)) for name, one in over_images.items()}
