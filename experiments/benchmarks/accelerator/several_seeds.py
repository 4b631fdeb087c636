"""Trains trials that differ in their seeds alone, several at once.

The step, batches, keys, recipe and choice of the best epoch are those of
`training.train.train_stage`. The best weights are kept in memory and no checkpoint is written,
since a checkpoint takes longer than an epoch of a small data set.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.accelerator.grids import Grid
from experiments.benchmarks.accelerator.merge_cost import compile_together
from experiments.study import archive, corrupted_predictions
from experiments.study.questions import full_length
from experiments.study.stages import Paths, plan_of, predictor
from experiments.study.treatments import Numbers, make_treatment, numbers, selection
from experiments.study.trials import Treatment, Trial
from inmerge_jax import Kernel, MergeRule, MergeStats, kernel_similarity
from inmerge_jax.data import steps_per_epoch, train_batches
from inmerge_jax.merging import Quantile
from inmerge_jax.training.evaluation import evaluate_merging, with_batch_stats_of
from inmerge_jax.training.experiment import initial_variables, make_context, step_options
from inmerge_jax.training.metrics import compute_metrics, json_metrics, json_number
from inmerge_jax.training.parallel import broadcast_to_devices, replicate, shard_batch, unreplicate
from inmerge_jax.training.recipes import best_epoch, next_learning_rate
from inmerge_jax.training.run_spec import RunSpec
from inmerge_jax.training.train import NonFiniteLossError, TrainContext, batch_seed, root_key
from inmerge_jax.training.train_step import (
    Totals,
    TrainState,
    make_merging_eval_step,
    make_train_step,
    new_state,
    set_learning_rate,
    zero_totals,
)


class SharedNumbers(NamedTuple):
    """What the rules of a grid differ in; the step takes it as an argument.

    Attributes:
      branch: int32, which of the branches of `shared_treatment`.
      probability, threshold, alpha, every: of `treatments.Numbers`; the threshold, or the quantile,
        is a plain number.
    """

    branch: Any
    probability: Any
    threshold: Any
    alpha: Any
    every: Any


def kind_of(treatment: Treatment) -> tuple[str, bool] | None:
    """Partner and whether the threshold is a quantile; None without merging.

    Raises:
      ValueError: the treatment is more than fine-tuning or merging.
    """
    evaluation = treatment.average is not None or treatment.statistics != "running"
    if treatment.kind not in ("none", "merge", "released") or evaluation:
        raise ValueError(
            f"{treatment}: the accelerator command only fine-tunes and merges; train this one with "
            "python -m experiments.study"
        )
    if treatment.kind == "none":
        return None
    return treatment.partner, treatment.quantile is not None


def shared_treatment(
    kernels: tuple[Kernel, ...], kinds: Sequence[tuple[str, bool]]
) -> Callable[..., Any]:
    """A `ParamTransform` that holds all rules of a grid, so that they share one compilation.

    Branch 0 leaves the weights alone; branch i + 1 merges as `kinds[i]` says.
    """
    merge = make_treatment("merge", kernels)

    def treat(params: Any, key: jax.Array, step: jax.Array, given: SharedNumbers) -> Any:
        def nothing(params: Any) -> Any:
            counts = jnp.array([kernel.count for kernel in kernels], jnp.int32)
            none = jnp.zeros_like(counts)
            return params, MergeStats(counts, none, none, jnp.zeros(len(kernels), jnp.float32))

        def branch(partner: str, adaptive: bool) -> Callable[[Any], Any]:
            threshold = Quantile(given.threshold) if adaptive else given.threshold
            rule = MergeRule(given.probability, threshold, given.alpha, partner)
            return lambda params: merge(params, key, step, Numbers(rule, given.every))

        return lax.switch(given.branch, [nothing, *(branch(*kind) for kind in kinds)], params)

    return treat


def shared_numbers(
    treatment: Treatment, kinds: Sequence[tuple[str, bool]], steps: int
) -> SharedNumbers:
    """The numbers of one rule; `steps` are the updates of an epoch."""
    rule, every = numbers(treatment, steps)
    kind = kind_of(treatment)
    threshold = rule.threshold.share if isinstance(rule.threshold, Quantile) else rule.threshold
    probability, threshold, alpha = map(jnp.float32, (rule.probability, threshold, rule.alpha))
    branch = 0 if kind is None else 1 + kinds.index(kind)
    return SharedNumbers(jnp.int32(branch), probability, threshold, alpha, every)


@dataclasses.dataclass(frozen=True)
class Program:
    """One data set's training, compiled once for all seeds and rules of a grid.

    Attributes:
      plan: data, network and recipe.
      setup: optimizer and evaluation.
      deep: the kernels that merge.
      kinds: the rules, see `shared_treatment`.
      step: of `make_train_step`.
      together: seeds that it trains at once.
      paths: of the data.
    """

    plan: RunSpec
    setup: TrainContext
    deep: tuple[Kernel, ...]
    kinds: tuple[tuple[str, bool], ...]
    step: Callable[..., Any]
    together: int
    paths: Paths

    @property
    def updates(self) -> int:
        """Of an epoch."""
        return steps_per_epoch(len(self.plan.dataset.train), self.plan.recipe.batch_size)


def make_program(grid: Grid, data: str, together: int, paths: Paths) -> Program:
    """Loads a data set and makes the step that trains `together` seeds at once."""
    plan = plan_of(grid.backbone(data, grid.first_seed), paths)
    setup = make_context(plan)
    treatments = list(grid.arms.values())
    kinds = tuple(dict.fromkeys(filter(None, map(kind_of, treatments))))
    merging = next(one for one in treatments if one.kind != "none")
    deep = selection(merging, plan.kernels)
    step = make_train_step(
        plan.model,
        setup.optimizer,
        plan.recipe,
        **step_options(plan),
        kernels=deep,
        param_transform=shared_treatment(deep, kinds),
        hyperparams=shared_numbers(Treatment(), kinds, 1),
        networks=together,
    )
    return Program(plan, setup, deep, kinds, step, together, paths)


def choose_together(
    grid: Grid, program: Callable[[str, int], Program], tries: Sequence[int]
) -> dict[str, Any]:
    """Times some updates of one seed and of several at once, and chooses the fastest per seed."""
    runs = {count: _timed_updates(program(grid.data[0], count)) for count in tries}
    before = time.perf_counter()
    # The first call compiles.
    compile_together([functools.partial(run, 1) for run in runs.values()])
    compiled = time.perf_counter() - before
    seconds = {str(count): run(10) / count for count, run in runs.items()}
    together = int(min(seconds, key=seconds.__getitem__))
    return {
        "together": together,
        "seconds_per_update": seconds,
        "compile_seconds": compiled,
        "data": grid.data[0],
    }


def _timed_updates(program: Program) -> Callable[[int], float]:
    """A function that makes some updates and returns the seconds that each took."""
    plan, count = program.plan, program.together
    start = initial_variables(plan, 0)
    fresh = new_state(*start, program.setup.optimizer, 1e-3)
    state = replicate(stack([fresh] * count), plan.devices)
    totals = replicate(stack([zero_totals(len(program.deep))] * count), plan.devices)
    roots = broadcast_to_devices(stack([root_key(0, 0)] * count), plan.devices)
    given = shared_numbers(Treatment(), program.kinds, 1)
    stream = train_batches(plan.dataset.train, seed=0, batch_size=plan.recipe.batch_size)
    batch = shard_batch(join([next(stream)] * count, len(plan.devices)), plan.devices)

    def run(updates: int) -> float:
        nonlocal state
        before = time.perf_counter()
        for _ in range(updates):
            state, _ = program.step(state, totals, batch, roots, given)
        jax.block_until_ready(state)
        return (time.perf_counter() - before) / updates

    return run


class Trained(NamedTuple):
    """One finished trial: `train.train_stage`'s result and similarities, test scores, weights.

    And further predictions that the study asks for, named as in `Archive.arrays`: "corrupted",
    "renewed".
    """

    result: dict[str, Any]
    similarity: dict[str, Any]
    scores: np.ndarray
    weights: tuple[Any, Any]
    further: dict[str, np.ndarray]


def train_together(
    program: Program, trials: Sequence[Trial], starts: Sequence[tuple[Any, Any]]
) -> list[Trained]:
    """Trains trials that differ in their seeds alone, from the given weights.

    Raises:
      NonFiniteLossError: one of them diverged.
    """
    before = time.monotonic()
    plan, setup, trial, count = program.plan, program.setup, trials[0], len(trials)
    recipe, data, devices = plan.recipe, plan.dataset, plan.devices
    seeds, number = [c.backbone.seed for c in trials], int(not trial.is_backbone)
    epochs = trial.epochs or trial.backbone.epochs
    first_rate = trial.backbone.rate if trial.is_backbone else trial.learning_rate
    given = broadcast_to_devices(
        shared_numbers(trial.treatment, program.kinds, program.updates), devices
    )
    states = [new_state(*start, setup.optimizer, first_rate) for start in starts]
    state = replicate(stack(states), devices)
    zeros = replicate(stack([zero_totals(len(program.deep))] * count), devices)
    roots = broadcast_to_devices(stack([root_key(seed, number) for seed in seeds]), devices)
    streams = [
        train_batches(data.train, seed=batch_seed(seed, number), batch_size=recipe.batch_size)
        for seed in seeds
    ]
    merging_eval = None
    if trial.treatment.kind == "released":
        rule = numbers(trial.treatment, program.updates).rule
        options = step_options(plan)
        merging_eval = make_merging_eval_step(
            plan.model, recipe, kernels=program.deep, rule=rule, **options
        )
    histories: list[list[dict[str, Any]]] = [[] for _ in trials]
    best: list[TrainState] = [None] * count

    for epoch in range(1, epochs + 1):
        # The schedule of this recipe depends on the epoch alone, so the seeds share the rate.
        rate, _ = next_learning_rate(recipe, first_rate, epochs, histories[0])
        state, totals = set_learning_rate(state, rate), zeros
        for _ in range(program.updates):
            batch = shard_batch(join([next(stream) for stream in streams], len(devices)), devices)
            state, totals = program.step(state, totals, batch, roots, given)
        sums = unreplicate(totals)
        for i in range(count):
            one = pick(state, i, count)
            total = sums if count == 1 else Totals(*(x[i] for x in sums))
            line: dict[str, Any] = {}
            if merging_eval is None:
                scores, loss = setup.evaluate(one, data.val)
            else:
                one, val, scores, loss = evaluate_merging(
                    merging_eval,
                    one,
                    replicate(zero_totals(len(program.deep)), devices),
                    data.val,
                    root_key(seeds[i], number),
                    devices,
                )
                state = put(state, one, i, count)
                line = {"val_selected": val.selected, "val_merged": val.merged}
            if not (math.isfinite(loss) and math.isfinite(float(total.loss))):
                raise NonFiniteLossError(f"{trials[i].name}: diverged in epoch {epoch}")
            auc = compute_metrics(data.val.labels, scores, data.task).auc
            line |= {"val_loss": loss, "val_auc": json_number(auc), "learning_rate": rate}
            line |= {"selected": total.selected, "merged": total.merged}
            histories[i].append(line)
            if best_epoch(histories[i], recipe.select) == epoch:
                best[i] = one
    seconds = (time.monotonic() - before) / count
    return [
        finish(program, trials[i], starts[i], histories[i], best[i], seconds) for i in range(count)
    ]


def finish(
    program: Program,
    trial: Trial,
    start: tuple[Any, Any],
    history: list[dict[str, Any]],
    state: TrainState,
    seconds: float,
) -> Trained:
    """Evaluates the best epoch's weights on validation images and, once, on the test images."""
    plan, setup, data = program.plan, program.setup, program.plan.dataset
    found, scores = {}, {}
    for name, images in (("val", data.val), ("test", data.test)):
        scores[name], _ = setup.evaluate(state, images)
        found[name] = json_metrics(compute_metrics(images.labels, scores[name], data.task))
    found["val"]["same"] = archive.same_answers(scores["val"])
    weights = unreplicate((state.params, state.batch_stats))
    merges = trial.treatment.kind != "none"
    deep = program.deep if merges else ()
    counts = {
        name: np.sum([line[name] for line in history], 0).tolist() if merges else []
        for name in ("selected", "merged", "val_selected", "val_merged")
        if name in history[0]
    }
    result = {
        "best_epoch": best_epoch(history, plan.recipe.select),
        "epochs": len(history),
        "steps": len(history) * program.updates,
        "seconds": seconds,
        **found,
        "layers": [kernel.name for kernel in deep],
        "kernels": [kernel.count for kernel in deep],
        "val_auc_by_epoch": [line["val_auc"] for line in history],
        "merged_by_epoch": [line["merged"].tolist() for line in history] if merges else [],
        **counts,
        "warnings": [],
    }
    before, after = (
        [layer.to_dict() for layer in kernel_similarity(params, plan.kernels)]
        for params in (start[0], weights[0])
    )
    further = {}
    if corrupted_predictions.is_wanted(trial):
        predict = predictor(setup, state)
        further["corrupted"] = corrupted_predictions.predicted(trial, program.paths, predict)
    if full_length.wants_renewed(trial):
        renewed = with_batch_stats_of(
            data.train,
            setup.batch_stats_step,
            state,
            seed=batch_seed(trial.backbone.seed, int(not trial.is_backbone)),
            batch_size=plan.recipe.batch_size,
            batches=plan.recipe.batch_stats_batches,
            devices=plan.devices,
        )
        further["renewed"] = setup.evaluate(renewed, data.test)[0].astype(np.float32)
    similarity = {"before": before, "after": after}
    return Trained(result, similarity, scores["test"], weights, further)


def stack(trees: Sequence[Any]) -> Any:
    """One tree with an axis of networks in front; the tree itself where it is the only one."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def join(batches: Sequence[Mapping[str, np.ndarray]], devices: int) -> dict[str, np.ndarray]:
    """Batches of several networks as one: `shard_batch` gives each device its rows of each."""
    if len(batches) == 1:
        return dict(batches[0])
    joined = {}
    for name in batches[0]:
        rows = np.stack(
            [batch[name].reshape(devices, -1, *batch[name].shape[1:]) for batch in batches], 1
        )
        joined[name] = rows.reshape(-1, *rows.shape[2:])
    return joined


@functools.partial(jax.jit, static_argnums=2)
def pick(state: TrainState, index: Any, count: int) -> TrainState:
    """A copy of one network's weights and step, of `count` that a replicated state holds."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.copy(x) if count == 1 else x[:, index]

    return state._replace(
        params=jax.tree.map(one, state.params),
        batch_stats=jax.tree.map(one, state.batch_stats),
        opt_state=(),
        step=one(state.step),
    )


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def put(state: TrainState, one: TrainState, index: Any, count: int) -> TrainState:
    """The state with the weights of one network, of `count`, replaced by those of `pick`."""

    def new(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.copy(y) if count == 1 else x.at[:, index].set(y)

    return state._replace(params=jax.tree.map(new, state.params, one.params))
