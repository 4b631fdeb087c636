"""docs/results.md, docs/cells.md and the figures, from what is stored."""

from experiments.study import telling
from experiments.study.all_questions import QUESTIONS, cell_rows
from experiments.study.question import Question
from inmerge_jax.reporting.tables import markdown_table

FIGURES = "figures"
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" '


def section(question: Question) -> str:
    """One question's answer as Markdown."""
    stored = question.stored()
    if stored is None:
        return f"Not answered yet: `python -m experiments.{question.name}`.\n"
    return telling.to_markdown(question, stored, FIGURES)


def main_table() -> str:
    """Question 1's differences from finetune, together and apart, and its arms, for the README."""
    question = QUESTIONS[0]
    stored = question.stored()
    if stored is None:
        return "Not answered yet.\n"
    said = dict(telling.lines(question, stored))
    arms, from_finetune, together, *_ = question.tables(stored["analysis"])
    notes = "".join(f"- {note}\n" for note in telling.notes(question, stored))
    parts = [said["What came out"], said["How sure"]]
    parts += [markdown_table(each) for each in (together, from_finetune, arms)]
    parts += [f"{notes}- Run: {said['What was run']}"]
    return "\n\n".join(parts) + "\n"


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
