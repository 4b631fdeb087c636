"""What of an arm's scores is due to batch statistics that its weights have left behind.

In training a network normalises with each batch's own statistics and moves its running ones a tenth
of the way there. Weights that change more than the gradient changes them leave the running ones
behind, and these are what a trained network is evaluated with. Here they are averaged anew for the
final weights, as PyTorch's `torch.optim.swa_utils.update_bn` does for averaged weights. Only
training and validation images are looked at.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.study.cells import Cell
from experiments.study.runner import Places, best_state, plan_of
from inmerge_jax.data import Split, eval_batches
from inmerge_jax.files import write_json
from inmerge_jax.models.layers import MOMENTUM
from inmerge_jax.training.evaluation import evaluate
from inmerge_jax.training.metrics import compute_metrics
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.recipes import Recipe
from inmerge_jax.training.steps import normalise

FILE = "batch_statistics.json"
"""Beside the answers."""


def measure(cells: Sequence[Cell], places: Places) -> None:
    """Scores of the validation images with both, by the best weights of finished cells; keeps them.

    By the hash of a cell: "running" and "renewed", each with "auc", "acc" and "loss".
    """
    file = places.results / "study" / FILE
    kept = read(file)
    for cell in cells:
        if cell.hash not in kept:
            kept[cell.hash] = compare(cell, places)
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
      InputError: see `runner.best_state`.
    """
    setup, stage, state = best_state(cell, places)
    state = stage.evaluated(state)
    model = plan_of(cell, places).model.clone(axis_name=None)
    train, val, task = setup.dataset.train, setup.dataset.val, setup.dataset.task
    renewed = estimate(model, state.params, state.batch_stats, train, setup.recipe)
    found = {}
    for name, batch_stats in (("running", state.batch_stats), ("renewed", renewed)):
        copies = replicate(state._replace(batch_stats=batch_stats), setup.devices)
        scores, loss = evaluate(setup, copies, val)
        metrics = compute_metrics(val.labels, scores, task)
        found[name] = {"auc": metrics.auc, "acc": metrics.acc, "loss": loss}
    return found


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
