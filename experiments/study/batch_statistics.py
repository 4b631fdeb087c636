"""What of an arm's scores is due to batch statistics that its weights have left behind.

In training a network normalises with each batch's own statistics and moves its running ones a tenth
of the way there. Weights that change more than the gradient changes them leave the running ones
behind, and these are what a trained network is evaluated with. Here they are averaged anew for the
final weights, as PyTorch's `torch.optim.swa_utils.update_bn` does for averaged weights. Only
training and validation images are looked at.
"""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.study.cells import Cell
from experiments.study.question import Kept
from experiments.study.stages import Places, best_state, plan_of
from experiments.study.statistics import over_trainings
from experiments.study.telling import difference
from inmerge_jax.data import Split, eval_batches
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.models.layers import MOMENTUM
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training.metrics import compute_metrics
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.recipes import Recipe
from inmerge_jax.training.train_step import normalise

FILE = "batch_statistics.json"
"""Beside the answers."""


KINDS = ("running", "renewed")
METRICS = ("auc", "acc", "loss")


def measure(cells: Sequence[Cell], places: Places) -> None:
    """Scores of the validation images with both, by the best weights of finished cells; keeps them.

    By the hash of a cell: "running" and "renewed", each with "auc", "acc" and "loss". A cell whose
    checkpoint is gone is named and left out.
    """
    file = places.results / "study" / FILE
    kept = read(file)
    for cell in cells:
        if cell.hash in kept:
            continue
        try:
            kept[cell.hash] = compare(cell, places)
        except UsageError as error:
            print(f"not measured: {cell.hash} {cell.name}: {error}", file=sys.stderr)
            continue
        print(f"{cell.hash} {cell.name}: batch statistics estimated anew")
        write_json(file, kept)


def measured(cell: Cell, places: Places) -> bool:
    """Whether that is kept of a cell, so that its weights are not needed."""
    return cell.hash in read(places.results / "study" / FILE)


def read(file: Path) -> dict[str, Any]:
    """What `measure` has kept."""
    return json.loads(file.read_bytes()) if file.exists() else {}


def compare(cell: Cell, places: Places) -> dict[str, dict[str, float]]:
    """One cell's entry of `measure`.

    Raises:
      UsageError: see `stages.best_state`.
    """
    setup, stage, state = best_state(cell, places)
    state = stage.eval_state_fn(state)
    model = plan_of(cell, places).model.clone(axis_name=None)
    train, val, task = setup.dataset.train, setup.dataset.val, setup.dataset.task
    renewed = estimate(model, state.params, state.batch_stats, train, setup.recipe)
    found = {}
    for name, batch_stats in (("running", state.batch_stats), ("renewed", renewed)):
        copies = replicate(state._replace(batch_stats=batch_stats), setup.devices)
        scores, loss = setup.evaluate(copies, val)
        metrics = compute_metrics(val.labels, scores, task)
        found[name] = {"auc": metrics.auc, "acc": metrics.acc, "loss": loss}
    return found


def summary(kept: Kept) -> dict[str, dict[str, Any]]:
    """What is measured, by arm, as means over the seeds that are measured of every arm.

    Each arm has what an entry of `measure` has, "epoch", the mean epoch of the best checkpoint,
    "seeds", how many, and "each", an entry of `measure` for each of them. Empty where no seed is
    whole.

    Args:
      kept: cells of one data set and network.
    """
    known = read(kept.folder.parent / "study" / FILE)
    arms = {
        arm: {seed: cell for seed, cell in of.items() if cell.hash in known}
        for arm, of in kept.by_arm().items()
    }
    seeds = sorted(set.intersection(*(set(of) for of in arms.values())))
    if not seeds:
        return {}
    return {
        arm: {
            "seeds": len(seeds),
            "each": [known[of[s].hash] for s in seeds],
            "epoch": float(np.mean([kept.record(of[s])["result"]["best_epoch"] for s in seeds])),
            **{
                kind: {
                    m: float(np.mean([known[of[s].hash][kind][m] for s in seeds])) for m in METRICS
                }
                for kind in KINDS
            },
        }
        for arm, of in arms.items()
    }


def told(found: Mapping[str, Any]) -> str:
    """How far the arms of a `summary` lie apart with each kind; "" for an empty one."""
    if not found:
        return ""

    def ends(kind: str, metric: str) -> str:
        values = [row[kind][metric] for row in found.values()]
        return f"{min(values):.3f} to {max(values):.3f}"

    return (
        f"on validation images the arms have ACC {ends('running', 'acc')} and AUC "
        f"{ends('running', 'auc')} with the running batch statistics, and ACC "
        f"{ends('renewed', 'acc')} and AUC {ends('renewed', 'auc')} where these are averaged anew "
        "for the same weights"
    )


def notes(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`told` of each group of a question."""
    return [
        f"{name}: {text}."
        for name, group in groups.items()
        if (text := told(group["batch_statistics"]))
    ]


def table(groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every arm of each group's `summary`."""
    rows, kinds = [], []
    for name, found in groups.items():
        for number, arm in enumerate(sorted(found, key=lambda arm: arm != "finetune")):
            row = found[arm]
            numbers = [f"{row[kind][m]:.3f}" for m in METRICS for kind in KINDS]
            words = f"{name}: {arm}" if number == 0 else arm
            rows.append((words, str(row["seeds"]), f"{row['epoch']:.1f}", *numbers))
            kinds.append("difference" if number else "total")
    title = (
        "Validation images, by the best checkpoints: with the running batch statistics, whose AUC "
        "chose the epoch, and (anew) with the mean statistics of the training batches under the "
        "same weights; mean over seeds"
    )
    columns = ("arm", "seeds", "epoch", "AUC", "anew", "ACC", "anew", "loss", "anew")
    return Table(title, columns, tuple(rows), tuple(kinds))


def paired(groups: Mapping[str, Mapping[str, Any]], first: str) -> dict[str, dict[str, Any]]:
    """The arm `first` minus each other arm over the trainings of all groups' `summary`.

    Returns:
      By arm: "trainings", and by kind and metric what `statistics.over_trainings` gives.
    """
    arms = dict.fromkeys(arm for found in groups.values() for arm in found if arm != first)
    rows = {}
    for arm in arms:
        pairs = [
            pair
            for found in groups.values()
            if first in found and arm in found
            for pair in zip(found[first]["each"], found[arm]["each"], strict=True)
        ]
        if not pairs:
            continue
        rows[arm] = {"trainings": len(pairs)}
        for kind in KINDS:
            gaps = {m: [one[kind][m] - two[kind][m] for one, two in pairs] for m in METRICS}
            rows[arm][kind] = {m: over_trainings(some) for m, some in gaps.items()}
    return rows


def paired_table(groups: Mapping[str, Mapping[str, Any]], first: str) -> Table:
    """A row for each arm of `paired`."""
    rows = []
    for arm, row in paired(groups, first).items():
        cells = [difference(row[kind][metric]) for metric in ("auc", "acc") for kind in KINDS]
        rows.append((f"{first} - {arm}", str(row["trainings"]), *cells))
    title = (
        "The same networks on validation images, all trainings together, with the running "
        "statistics and anew: mean difference [Student's 95% interval, each alone]"
    )
    columns = ("difference", "trainings", "AUC", "AUC, anew", "ACC", "ACC, anew")
    return Table(title, columns, tuple(rows), ("difference",) * len(rows))


def estimate(model: nn.Module, params: Any, batch_stats: Any, images: Split, recipe: Recipe) -> Any:
    """The mean over batches of the images' own batch statistics.

    Args:
      model: without an axis to average over.
      params: of the network.
      batch_stats: of any values; for their shapes.
      images: the training images, of which a last batch that is not full is left out.
      recipe: its batch size, and how images are normalised.

    Returns:
      As `batch_stats`.
    """
    zero = jax.tree.map(jnp.zeros_like, batch_stats)
    total, count = zero, 0
    for batch in eval_batches(images, recipe.batch_size):
        if batch["mask"].all():
            moved = _moved(model, recipe, params, zero, batch["image"])
            total, count = jax.tree.map(jnp.add, total, moved), count + 1
    # One update of running statistics that were zero leaves this share of the batch's.
    return jax.tree.map(lambda x: x / (MOMENTUM * count), total)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moved(model: nn.Module, recipe: Recipe, params: Any, batch_stats: Any, images: Any) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    _, changed = model.apply(
        variables, normalise(images, recipe), train=True, mutable=["batch_stats"]
    )
    return changed["batch_stats"]
