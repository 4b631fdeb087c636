"""Retrains some stored trials twice: are both equal to each other, and to the stored one?

The trials are drawn at random from each question's, among those that train in minutes with their
backbones, which are compared too. Both trainings are of one machine and one commit, so they must be
equal. The stored one may be of another processor or of earlier code.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.timing import machine
from experiments.study import archive
from experiments.study.archive import RESULTS
from experiments.study.questions import QUESTIONS
from experiments.study.questions.question import Question
from experiments.study.runner import run_trials
from experiments.study.stages import Paths
from experiments.study.trials import Trial, with_dependencies
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.stage_results import read_result


@dataclass(frozen=True)
class ReproduceConfig:
    """Retrains trials of every question twice and compares their test scores.

    Exit status 1 means that two trainings on this machine differ.

    Attributes:
      data_dir: Folder with medmnist/ and nih/.
      seed: Seed of the draw.
      count: Trials of each question.
      limit: Longest training of a trial with its backbone, in seconds; of a question without such
        trials, the shortest is drawn.
      output: JSON file of the comparisons. Trials that it holds are not trained again.
      work: Folder of the runs. Interrupted trainings are resumed.
    """

    data_dir: Path = Path("data")
    seed: int = 0
    count: int = 2
    limit: float = 200
    output: Path = RESULTS / "again.json"
    work: Path = Path("runs/repeated")


# Of the stored draws: the places of the earlier questions, counted from 1.
_EARLIER = ("main_effect", "ablation", "controls", "similarity", "adaptive", "robustness")
_NUMBERS = {name: number for number, name in enumerate(_EARLIER, 1)}


def seconds(trial: Trial) -> float:
    """Training time of a stored trial with its backbone; infinite where one is not stored."""
    records = archive.read().records
    stored = (records.get(one) for one in {trial.hash, trial.first().hash})
    return sum(one["result"]["seconds"] if one else float("inf") for one in stored)


def drawn(question: Question, config: ReproduceConfig) -> list[Trial]:
    """Stored second stages of a question, of several data sets, networks or optimizers first.

    Of a question with choices on validation data, those that follow from the choices; and of these,
    those whose scores are stored.
    """
    stored = archive.read()
    second = [trial for trial in question.stored(stored) if not trial.is_backbone]
    second = [trial for trial in second if question.keeps_scores(trial)]
    if question.choices is not None:
        later = set(question.later(stored))
        second = [trial for trial in second if trial in later] or second
    some = [trial for trial in second if seconds(trial) <= config.limit]
    some = some or sorted(second, key=seconds)[: config.count]
    number = _NUMBERS.get(question.name, zlib.crc32(question.name.encode()))
    order = np.random.default_rng([config.seed, number]).permutation(len(some))
    ordered = [some[index] for index in order]
    kinds: dict[tuple[str, str, str], Trial] = {}
    for trial in ordered:
        start = trial.backbone
        kinds.setdefault((start.data, start.model, start.optimizer), trial)
    others = [trial for trial in ordered if trial not in kinds.values()]
    return [*kinds.values(), *others][: config.count]


def all_drawn(config: ReproduceConfig) -> list[Trial]:
    """The trials drawn from all questions, the shortest first."""
    return sorted({c for one in QUESTIONS.values() for c in drawn(one, config)}, key=seconds)


def train_twice(trial: Trial, config: ReproduceConfig) -> list[dict[str, Any]]:
    """The rows of a trial's backbone and of itself."""
    paths = [Paths(config.data_dir, config.work / name) for name in ("first", "second")]
    for place in paths:
        run_trials([trial], place)
    return [compared(one, paths) for one in with_dependencies([trial])]


def compared(trial: Trial, paths: Sequence[Paths]) -> dict[str, Any]:
    """Test AUC of the stored training and of two others, and the largest differences of a score."""
    stored = archive.read(paths[0].results)
    record = stored.records[trial.hash]
    aucs, scores = [record["result"]["test"]["auc"]], [stored.scores(trial)]
    for path in paths:
        result = read_result(path.trial(trial))
        if result is None:
            raise UsageError(f"{trial.name} diverged; its stored training did not")
        aucs.append(result["test"]["auc"])
        file = path.trial(trial) / result["scores"]["test"]
        scores.append(read_scores(file).astype(np.float32))
    kept, first, second = scores
    trained = record["trained"]
    return {
        "trial": trial.hash,
        "name": trial.name,
        "auc": aucs,
        "between_them": float(np.abs(first - second).max()),
        "from_stored": float(np.abs(first - kept).max()),
        "stored": {
            "processor": trained.get("processor"),
            "commit": trained["git"]["commit"],
            "dirty": trained["git"]["dirty"],
            "started": trained["started"],
        },
        "machine": machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares what is missing; 0 where both trainings are equal, 1 where not.

    Raises:
      UsageError: the file has rows of another draw, or data are missing.
    """
    config = tyro.cli(ReproduceConfig, prog="python -m experiments.study reproduce", args=arguments)
    draw = {name: getattr(config, name) for name in ("seed", "count", "limit")}
    fresh: dict[str, Any] = {**draw, "rows": []}
    stored = json.loads(config.output.read_bytes()) if config.output.exists() else fresh
    for name, value in draw.items():
        if stored[name] != value and not (name == "count" and stored[name] < value):
            raise UsageError(
                f"{config.output} has trials of --{name} {stored[name]}, not {value}; delete it, "
                "or choose another --output"
            )
    stored |= draw
    for trial in all_drawn(config):
        known = {row["trial"]: row for row in stored["rows"]}
        if trial.hash not in known:
            known |= {row["trial"]: row for row in train_twice(trial, config)}
            stored["rows"] = list(known.values())
            write_json(config.output, stored)
    for row in stored["rows"]:
        aucs = ", ".join(f"{auc:.6f}" for auc in row["auc"])
        print(f"{row['trial']} {row['name']}: test AUC stored, first, second: {aucs}")
    different = [row for row in stored["rows"] if row["between_them"]]
    print(f"{len(stored['rows'])} trials trained twice; {len(different)} pairs differ")
    return int(bool(different))
