"""Builds `site/index.html`: the seven questions, their answers, tables and figures in one file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.study import telling
from experiments.study.all_questions import QUESTIONS, cell_rows
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_text
from inmerge_jax.reporting import html_report

TEMPLATES = Path(__file__).parent / "study"


@dataclass(frozen=True)
class ReportConfig:
    """Builds one static page from the stored answers; it needs no other file and no network.

    Attributes:
      output: The page to write.
    """

    output: Path = Path("site/index.html")


def build(output: Path) -> Path:
    """Writes the page and returns its path.

    Raises:
      UsageError: no question has been answered yet.
    """
    answered = [(question, question.stored()) for question in QUESTIONS]
    sections: list[dict[str, Any]] = [
        {
            "question": question,
            "lines": telling.lines(question, stored),
            "tables": question.tables(stored["analysis"]),
            "notes": telling.notes(question, stored),
            "figures": question.figures(stored["analysis"]),
            "cells": cell_rows(question),
        }
        for question, stored in answered
        if stored is not None
    ]
    if not sections:
        raise UsageError("no question is answered yet: run python -m experiments.study.main_effect")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("site.html.j2").render(
        css=Markup((html_report.FOLDER / "report.css").read_text(encoding="utf-8")),
        sections=sections,
        missing=[question for question, stored in answered if stored is None],
        svg=lambda plot: Markup(plot.svg),
        zip=zip,
    )
    write_text(output, page)
    return output


def main(arguments: list[str] | None = None) -> int:
    """Builds the page; returns 0, or 2 where nothing is stored."""
    config = tyro.cli(ReportConfig, prog="python -m experiments.report", args=arguments)
    try:
        print(build(config.output))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
