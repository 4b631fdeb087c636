"""Writes the report of a finished run: `inmerge report RUN`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from inmerge_jax.buckets import path_registry
from inmerge_jax.cli.errors import run_command
from inmerge_jax.files import write_errors, write_text

TABLE = "table.md"


@dataclass(frozen=True)
class ReportConfig:
    """Rewrites report.html and table.md of a finished run, and prints the table.

    Attributes:
      run: Folder of the run (its --output).
    """

    run: tyro.conf.Positional[Path]


def write_and_print(folder: Path) -> None:
    """Writes the report and the table of a finished run, and prints the table.

    Raises:
      UsageError: the folder holds no finished run, or cannot be written.
    """
    from rich import print as rich_print

    from inmerge_jax.reporting.html_report import write_report
    from inmerge_jax.reporting.runs import read_run
    from inmerge_jax.reporting.tables import make_report, to_markdown, to_rich

    run = read_run(folder)
    made = make_report(run)
    page = write_report(run, made)
    with write_errors(folder / TABLE, begun=False):
        write_text(folder / TABLE, to_markdown(made))
    rich_print(to_rich(made))
    print(f"report: {page}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status, see `errors`."""
    config = tyro.cli(ReportConfig, prog="inmerge report", args=arguments, registry=path_registry())
    return run_command(
        lambda: write_and_print(config.run),
        config.run,
        stopped="stopped; the same command writes the report",
    )


if __name__ == "__main__":
    sys.exit(main())
