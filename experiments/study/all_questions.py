"""The study's questions, in their order, and everything that pages show of them."""

from typing import Any, NamedTuple

from experiments.study import (
    ablation,
    adaptive,
    controls,
    cost,
    main_effect,
    robustness,
    similarity,
    store,
)
from experiments.study.cells import Cell, with_backbones
from experiments.study.question import Question

QUESTIONS: tuple[Question, ...] = tuple(
    module.QUESTION
    for module in (main_effect, ablation, controls, similarity, adaptive, robustness, cost)
)


class Row(NamedTuple):
    """One kept cell, and how to train it again."""

    cell: Cell
    auc: float
    acc: float
    command: str


def cell_rows(question: Question) -> list[Row]:
    """The kept cells of a question."""
    rows = []
    for cell in with_backbones(question.cells):
        record: Any = store.read(cell)
        if record is not None:
            test = record["result"]["test"]
            command = f"python -m experiments.study.{question.name} --only {cell.hash}"
            rows.append(Row(cell, test["auc"], test["acc"], command))
    return rows
