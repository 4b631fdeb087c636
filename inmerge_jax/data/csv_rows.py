"""CSV files with a header, of image files or of a table: rows, groups and the order of classes."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_text

_GROUPS = ("group", "patient", "patientid", "subject", "subjectid")
"""Names of the column of groups, see `_plain`."""
LINE = "\n"
"""Key of a row's line number, which is no column's name."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of a CSV's columns, and its rows, each with the number of its line as `LINE`.

    A column `Split`, however it is written, is named `split`.

    Raises:
      UsageError: the file cannot be read, has no rows, or a row or the header is malformed.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    rows: list[dict[str, Any]] = []
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        columns = ["split" if _plain(name) == "split" else name for name in columns]
        reader.fieldnames = columns
        for row in reader:
            if None in row or None in row.values():
                raise UsageError(
                    f"{path}, line {reader.line_num}: it has not the {len(columns)} cells of the "
                    "header; cells are separated by commas"
                )
            cells = {name: cell.strip() for name, cell in row.items()}
            rows.append({**cells, LINE: reader.line_num})
    except csv.Error as error:
        raise UsageError(f"{path}, from line {reader.line_num} on: {error}; correct it") from error
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"{path} has the column {twice[0]!r} twice; keep one")
    if not rows:
        raise UsageError(f"{path} holds no rows")
    return columns, rows


def group_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """The column of groups; [] if there is none.

    Raises:
      UsageError: there are several.
    """
    found = [name for name in columns if _plain(name) in _GROUPS]
    if len(found) > 1:
        raise UsageError(f"{path} has the columns {' and '.join(found)}; keep one for the groups")
    return found


def natural(name: str) -> tuple[float, str]:
    """Sorts numbers by value, before other names."""
    try:
        value = float(name)
    except ValueError:
        value = math.inf
    return (value if math.isfinite(value) else math.inf, name)


def _plain(name: str) -> str:
    """A column's name in lower case, without spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name.lower())
