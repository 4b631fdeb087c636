"""Trains some kept cells of the study again, twice: do both have the bits of the kept one?

The cells are drawn at random from each question's, among those that train in minutes with their
backbones; each of these is trained anew, too. The two trainings are of one machine and one commit,
so they are to be equal. The kept one may be of another processor or of earlier code. Rows that are
stored already, of the same drawing, are not done again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.timing import machine
from experiments.study import store
from experiments.study.all_questions import QUESTIONS
from experiments.study.cells import Cell, with_backbones
from experiments.study.question import Question
from experiments.study.runner import run_cells
from experiments.study.stages import Places
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.train import read_result


@dataclass(frozen=True)
class AgainConfig:
    """Trains some cells of every question twice and compares their test scores.

    Exit status 1 means that two trainings on this machine are not the same.

    Attributes:
      data_dir: Folder that holds medmnist/ and nih/.
      seed: Selects the cells.
      count: Of each question that trains any.
      limit: Seconds that a cell took with its backbone, at most; of a question without such cells
        the shortest is trained.
      output: The JSON file.
      work: Folder of the runs. An interrupted training goes on; one that is finished there counts.
    """

    data_dir: Path = Path("../shared/data")
    seed: int = 0
    count: int = 1
    limit: float = 200
    output: Path = Path("experiments/results/again.json")
    work: Path = Path("runs/repeated")


def seconds(cell: Cell) -> float:
    """What a kept cell took with its backbone."""
    both = (store.read(cell), store.read(cell.first()))
    return sum(one["result"]["seconds"] if one else float("inf") for one in both)


def drawn(question: Question, config: AgainConfig) -> list[Cell]:
    """Cells of a question with a second stage, each of another data set, network or optimizer."""
    second = [cell for cell in question.cells if not cell.is_backbone]
    some = [cell for cell in second if seconds(cell) <= config.limit]
    some = some or sorted(second, key=seconds)[:1]
    order = np.random.default_rng([config.seed, question.number]).permutation(len(some))
    kinds: dict[tuple[str, str, str], Cell] = {}
    for cell in (some[index] for index in order):
        kinds.setdefault((cell.backbone.data, cell.backbone.model, cell.backbone.optimizer), cell)
    return list(kinds.values())[: config.count]


def all_drawn(config: AgainConfig) -> list[Cell]:
    """Those of all questions, the shortest first."""
    return sorted({c for one in QUESTIONS for c in drawn(one, config)}, key=seconds)


def train_twice(cell: Cell, config: AgainConfig) -> list[dict[str, Any]]:
    """The rows of a cell's backbone and of itself."""
    places = [Places(config.data_dir, config.work / name) for name in ("first", "second")]
    for place in places:
        run_cells([cell], place)
    return [compared(one, places) for one in with_backbones([cell])]


def compared(cell: Cell, places: Sequence[Places]) -> dict[str, Any]:
    """A cell's test scores of two trainings beside each other, and beside those that are kept."""
    record = store.read(cell)
    assert record is not None
    aucs, scores = [record["result"]["test"]["auc"]], [store.read_test_scores(cell)]
    for place in places:
        result = read_result(place.cell(cell))
        if result is None:
            raise UsageError(f"{cell.name} diverged, though its kept training did not")
        aucs.append(result["test"]["auc"])
        path = place.cell(cell) / result["scores"]["test"]
        scores.append(read_scores(path).astype(np.float32))
    kept, first, second = scores
    trained = record["trained"]
    return {
        "cell": cell.hash,
        "name": cell.name,
        "auc": aucs,
        "between_them": float(np.abs(first - second).max()),
        "from_kept": float(np.abs(first - kept).max()),
        "kept": {
            "processor": trained.get("processor"),
            "commit": trained["git"]["commit"],
            "dirty": trained["git"]["dirty"],
            "started": trained["started"],
        },
        "machine": machine(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Does what is missing; 0 where all is the same, 1 where not, 2 on bad input."""
    config = tyro.cli(AgainConfig, prog="python -m experiments.study.reproduce", args=arguments)
    drawing = {name: getattr(config, name) for name in ("seed", "count", "limit")}
    fresh: dict[str, Any] = {**drawing, "rows": []}
    stored = json.loads(config.output.read_bytes()) if config.output.exists() else fresh
    for name, value in drawing.items():
        if stored[name] != value:
            print(
                f"error: {config.output} has cells of --{name} {stored[name]}, not {value}; delete "
                "it, or choose another --output",
                file=sys.stderr,
            )
            return 2
    try:
        for cell in all_drawn(config):
            known = {row["cell"]: row for row in stored["rows"]}
            if cell.hash not in known:
                known |= {row["cell"]: row for row in train_twice(cell, config)}
                stored["rows"] = list(known.values())
                write_json(config.output, stored)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = [row for row in stored["rows"] if row["between_them"]]
    print(f"{len(stored['rows'])} cells trained twice, {len(differing)} with other test scores")
    return int(bool(differing))


def markdown(stored: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| cell | what | test AUC: kept, again, again | the two differ by | from the kept one by "
        "| kept: processor, code | again: processor, code |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in stored["rows"]:
        kept, now = row["kept"], row["machine"]
        code = f"{(kept['commit'] or 'unknown')[:10]}{'+' if kept['dirty'] else ''}"
        aucs = ", ".join(f"{auc:.6f}" for auc in row["auc"])
        lines.append(
            f"| `{row['cell']}` | {row['name']} | {aucs} | {_size(row['between_them'])} "
            f"| {_size(row['from_kept'])} | {kept['processor'] or 'not recorded'}, {code} "
            f"({kept['started'][:10]}) | {now['processor']}, {now['git']['commit'][:10]} |"
        )
    lines += ["", "Differences are the largest of a test score, a probability."]
    done = {row["cell"] for row in stored["rows"]}
    config = AgainConfig(**{name: stored[name] for name in ("seed", "count", "limit")})
    left = [cell.name for cell in all_drawn(config) if cell.hash not in done]
    if left:
        lines += ["", f"Drawn, and not trained again yet: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


def _size(difference: float) -> str:
    return "nothing, bit for bit" if difference == 0 else f"{difference:.1e}"


if __name__ == "__main__":
    sys.exit(main())
