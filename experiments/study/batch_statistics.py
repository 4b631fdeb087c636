"""How much of an arm's accuracy is lost to stale batch-norm statistics.

A network is evaluated with running averages of the batch statistics of training. Weights that
change by more than the gradient's step leave these averages behind. Here the statistics are
re-estimated for the final weights, as `torch.optim.swa_utils.update_bn` does for averaged weights.
Only training and validation images are used.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.study import archive as store
from experiments.study.analysis import Group, Pair
from experiments.study.archive import Archive
from experiments.study.stages import Paths, best_state, plan_of
from experiments.study.statistics import over_trials
from experiments.study.trials import Trial
from inmerge_jax import recompute_batch_stats
from inmerge_jax.data import Split, eval_batches
from inmerge_jax.training.metrics import compute_metrics
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.recipes import Recipe
from inmerge_jax.training.train_step import normalise

FIELD = "batch_statistics"
"""In the record of a trial: "running" and "renewed", each with validation "auc", "acc", "loss"."""
KINDS = ("running", "renewed")


def measure(trial: Trial, paths: Paths) -> None:
    """Evaluates a finished trial's best weights with both kinds of statistics; stores the metrics.

    Raises:
      UsageError: its checkpoint is gone.
    """
    record = store.read(paths.results).records[trial.hash]
    store.add(paths.results, {trial.hash: record | {FIELD: compare(trial, paths)}}, {})


def measured(trial: Trial, archive: Archive) -> bool:
    """Whether this is stored of a trial."""
    return FIELD in archive.records[trial.hash]


def compare(trial: Trial, paths: Paths) -> dict[str, dict[str, float]]:
    """Validation metrics of a trial's best weights with both kinds of statistics.

    Raises:
      UsageError: see `stages.best_state`.
    """
    setup, stage, state = best_state(trial, paths)
    state = setup.evaluation_state(stage, state)
    model = plan_of(trial, paths).model.clone(axis_name=None)
    train, val, task = setup.dataset.train, setup.dataset.val, setup.dataset.task
    renewed = estimate(model, state.params, state.batch_stats, train, setup.recipe)
    found = {}
    for name, batch_stats in (("running", state.batch_stats), ("renewed", renewed)):
        copies = replicate(state._replace(batch_stats=batch_stats), setup.devices)
        scores, loss = setup.evaluate(copies, val)
        metrics = compute_metrics(val.labels, scores, task)
        found[name] = {"auc": metrics.auc, "acc": metrics.acc, "loss": loss}
    return found


def differences(groups: Sequence[Group], pair: Pair) -> dict[str, dict[str, Any]]:
    """Validation AUC and ACC of the first arm minus the second, over the trainings of all groups.

    Returns:
      By kind of statistics and metric, what `statistics.over_trials` gives.
    """
    both = [
        tuple(group.archive.records[trial.hash][FIELD] for trial in trials)
        for group in groups
        for trials in group.pairs(pair, changed=False)
        if all(measured(trial, group.archive) for trial in trials)
    ]
    return {
        kind: {
            metric: over_trials([one[kind][metric] - two[kind][metric] for one, two in both])
            for metric in ("auc", "acc")
        }
        for kind in KINDS
    }


def ranges(groups: Sequence[Group]) -> dict[str, Any]:
    """Lowest and highest mean validation metric of an arm: by group, kind and metric."""
    found: dict[str, Any] = {}
    for group in groups:
        rows = [
            [record[FIELD] for record in group.records(arm) if FIELD in record]
            for arm in group.arms
        ]
        found[group.name] = {
            kind: {
                metric: [
                    float(
                        pick([np.mean([one[kind][metric] for one in row]) for row in rows if row])
                    )
                    for pick in (min, max)
                ]
                for metric in ("auc", "acc")
            }
            for kind in KINDS
        }
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

    @jax.jit
    def update(batch_stats: Any, images: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        _, changed = model.apply(
            variables, normalise(images, recipe), train=True, mutable=["batch_stats"]
        )
        return changed["batch_stats"]

    batches = eval_batches(images, recipe.batch_size)
    full = (batch["image"] for batch in batches if batch["mask"].all())
    return recompute_batch_stats(update, batch_stats, full)
