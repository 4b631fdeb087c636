"""Writes the report of a finished run: `inmerge report RUN`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from inmerge_jax.errors import InputError
from inmerge_jax.files import write_text

TABLE = "table.md"


@dataclass(frozen=True)
class ReportConfig:
    """Writes report.html and table.md of a finished run again, and prints the table.

    Attributes:
      run: Folder of the run, as its --output was.
    """

    run: tyro.conf.Positional[Path]


def write_and_print(folder: Path) -> None:
    """Writes the report and the table of a finished run, and prints the table.

    Raises:
      InputError: the folder holds no finished run.
    """
    from rich import print as rich_print

    from inmerge_jax.reporting.html_report import write_report
    from inmerge_jax.reporting.runs import read_run
    from inmerge_jax.reporting.tables import make_report, to_markdown, to_rich

    page = write_report(folder)
    report = make_report(read_run(folder))
    write_text(folder / TABLE, to_markdown(report))
    rich_print(to_rich(report))
    print(f"report: {page}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the status: 0, or 2 (bad input)."""
    config = tyro.cli(ReportConfig, prog="inmerge report", args=arguments)
    try:
        write_and_print(config.run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
