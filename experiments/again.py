"""Trains some kept cells of the study again, and tells whether their test scores are the same.

The cells are drawn at random from each question's, among those that train in minutes with their
backbones; each of these is trained anew, too. Rows that are stored already, of the same
drawing, are not done again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.study import store
from experiments.study.all_questions import QUESTIONS
from experiments.study.cells import Cell, with_backbones
from experiments.study.question import RESULTS, Question
from experiments.study.runner import run_cells
from experiments.study.stages import Places
from experiments.timing import machine
from inmerge_jax.errors import InputError
from inmerge_jax.files import write_json
from inmerge_jax.training.loop import read_result
from inmerge_jax.training.scores import read_scores


@dataclass(frozen=True)
class AgainConfig:
    """Trains some cells of every question again and compares their test scores with those kept.

    Exit status 1 means that some are not the same.

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
    count: int = 2
    limit: float = 200
    output: Path = RESULTS / "again.json"
    work: Path = Path("runs/repeated")


def drawn(question: Question, config: AgainConfig) -> list[Cell]:
    """Cells of a question with a second stage, each of another data set, network or optimizer."""

    def seconds(cell: Cell) -> float:
        both = (store.read(cell), store.read(cell.first()))
        return sum(one["result"]["seconds"] if one else float("inf") for one in both)

    second = [cell for cell in question.cells if not cell.is_backbone]
    some = [cell for cell in second if seconds(cell) <= config.limit]
    some = some or sorted(second, key=seconds)[:1]
    order = np.random.default_rng([config.seed, question.number]).permutation(len(some))
    kinds: dict[tuple[str, str, str], Cell] = {}
    for cell in (some[index] for index in order):
        kinds.setdefault((cell.backbone.data, cell.backbone.model, cell.backbone.optimizer), cell)
    return list(kinds.values())[: config.count]


def train_again(cell: Cell, config: AgainConfig) -> list[dict[str, Any]]:
    """The rows of a cell's backbone and of itself."""
    places = Places(config.data_dir, config.work)
    run_cells([cell], places)
    return [compared(one, places) for one in with_backbones([cell])]


def compared(cell: Cell, places: Places) -> dict[str, Any]:
    """A finished cell's test scores beside those that are kept."""
    record, result = store.read(cell), read_result(places.cell(cell))
    assert record is not None
    if result is None:
        raise InputError(f"{cell.name} diverged, though its kept training did not")
    new = read_scores(places.cell(cell) / result["scores"]["test"]).astype(np.float32)
    old = store.read_test_scores(cell)
    trained = record["trained"]
    return {
        "cell": cell.hash,
        "name": cell.name,
        "auc": [record["result"]["test"]["auc"], result["test"]["auc"]],
        "acc": [record["result"]["test"]["acc"], result["test"]["acc"]],
        "largest_difference": float(np.abs(new - old).max()),
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
    config = tyro.cli(AgainConfig, prog="python -m experiments.again", args=arguments)
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
        for question in QUESTIONS:
            for cell in drawn(question, config):
                if cell.hash in {row["cell"] for row in stored["rows"]}:
                    continue
                known = {row["cell"]: row for row in stored["rows"]}
                known |= {row["cell"]: row for row in train_again(cell, config)}
                stored["rows"] = list(known.values())
                write_json(config.output, stored)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = [row for row in stored["rows"] if row["largest_difference"]]
    print(f"{len(stored['rows'])} cells trained again, {len(differing)} with other test scores")
    return int(bool(differing))


def markdown(stored: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| cell | what | test AUC, kept and again | largest difference of a score "
        "| kept: processor, code | again |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in stored["rows"]:
        kept, now = row["kept"], row["machine"]
        code = f"{(kept['commit'] or 'unknown')[:10]}{'+' if kept['dirty'] else ''}"
        processor = kept["processor"] or "not recorded"
        difference = row["largest_difference"]
        size = "none, bit for bit" if difference == 0 else f"{difference:.1e}"
        lines.append(
            f"| `{row['cell']}` | {row['name']} | {row['auc'][0]:.6f}, {row['auc'][1]:.6f} "
            f"| {size} | {processor}, {code} ({kept['started'][:10]}) "
            f"| {now['processor']}, {now['git']['commit'][:10]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
