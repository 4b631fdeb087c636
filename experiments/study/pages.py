"""docs/results.md, docs/cells.md and the figures, from what is stored."""

from experiments.study import main_effect, pooling, store, telling
from experiments.study.all_questions import QUESTIONS, cell_rows
from experiments.study.cells import with_backbones
from experiments.study.question import Question
from inmerge_jax.reporting.tables import markdown_table

FIGURES = "figures"
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" '


def section(question: Question) -> str:
    """One question's answer as Markdown."""
    stored = question.stored()
    if stored is None:
        return f"Not answered yet: `python -m experiments.study.{question.name}`.\n"
    return telling.to_markdown(question, stored, FIGURES)


def main_table() -> str:
    """Question 1's answer for the README: its arms and differences, and all trainings together."""
    question = QUESTIONS[0]
    stored = question.stored()
    if stored is None:
        return "Not answered yet.\n"
    said, found = dict(telling.lines(question, stored)), stored["analysis"]
    together = pooling.pooled_table(found["pooled"], "finetune")
    groups = found["groups"]
    notes = (telling.never_merged(groups, main_effect.MERGING), telling.one_answer(groups))
    parts = [said["What came out"]]
    parts += [markdown_table(each) for each in (main_effect.main_table(found), together)]
    said_last = (*notes, said["How sure"], f"Run: {said['What was run']}")
    parts += ["\n".join(f"- {note}" for note in said_last if note)]
    return "\n\n".join(parts) + "\n"


def total() -> str:
    """How long all trainings took, each counted once."""
    records = [
        record
        for cell in dict.fromkeys(c for one in QUESTIONS for c in with_backbones(one.cells))
        if (record := store.read(cell)) is not None
    ]
    hours = sum(record["result"]["seconds"] for record in records) / 3600
    more = sum((one.stored() or {}).get("seconds", 0) for one in QUESTIONS if not one.cells) / 3600
    return (
        f"In all, each counted once: {hours:.1f} h of training in {len(records)} cells, many of "
        f"which belong to several questions, and {more:.1f} h of measuring cost.\n"
    )


def cells() -> str:
    """Every kept cell with its figures and the command that trains it again."""
    parts = []
    for question in QUESTIONS:
        rows = cell_rows(question)
        if rows:
            lines = [
                f"| `{row.cell.hash}` | {row.cell.name} | {row.auc:.6f} | {row.acc:.6f} "
                f"| `{row.command}` |"
                for row in rows
            ]
            head = "| cell | what | test AUC | test ACC | train it again |\n" + "| --- " * 5 + "|"
            parts.append(f"## {question.number}. {question.title}\n\n{head}\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def figures() -> dict[str, str]:
    """File name to SVG of every figure."""
    found = {}
    for question in QUESTIONS:
        stored = question.stored()
        if stored is not None:
            for index, plot in enumerate(question.figures(stored["analysis"])):
                name = telling.figure_name(question, index)
                found[name] = plot.svg.replace("<svg ", _SVG, 1) + "\n"
    return found
