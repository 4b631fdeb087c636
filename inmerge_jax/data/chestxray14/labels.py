"""NIH's label file: findings and patient of each image."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_text

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings, in the order of the published tables and of the label columns."""
NO_FINDING = "No Finding"
ALL_IMAGES = 112_120
"""Number of images in the complete data set."""
_NAME, _FINDINGS, _PATIENT = "Image Index", "Finding Labels", "Patient ID"


@dataclass(frozen=True)
class Labels:
    """The rows of the label file, sorted by image name.

    Attributes:
      names: n distinct file names, such as "00000001_000.png".
      findings: uint8 (n, 14), 1 if the image shows the finding, in the order of `FINDINGS`.
      patients: int64 (n,), patient numbers.
      path: path of the file.
    """

    names: tuple[str, ...]
    findings: np.ndarray
    patients: np.ndarray
    path: Path

    def __len__(self) -> int:
        return len(self.names)


def find_labels(place: Path) -> Path:
    """Finds the label file: `place` itself, or Data_Entry_2017*.csv(.gz) in that folder.

    Raises:
      UsageError: there is none, or more than one.
    """
    place = Path(place).expanduser()
    if place.is_file():
        return place
    if not place.is_dir():
        raise UsageError(f"there are no labels at {place}; give NIH's Data_Entry_2017*.csv(.gz)")
    found = sorted([*place.glob("Data_Entry_2017*.csv"), *place.glob("Data_Entry_2017*.csv.gz")])
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise UsageError(
            f"{place} should hold one Data_Entry_2017*.csv or .csv.gz; there: {there}. Name the "
            "file itself with `labels`"
        )
    return found[0]


def read_labels(path: Path) -> Labels:
    """Reads NIH's Data_Entry_2017*.csv, plain or gzipped.

    Raises:
      UsageError: the file cannot be read, lacks a column, has no rows, names an image twice, or
        has an unknown finding; the message names the file, the row and the value.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        columns, rows = reader.fieldnames or (), list(_numbered(reader))
    except csv.Error as error:
        raise UsageError(
            f"{path}, from line {reader.line_num} on: {error}; look for a quotation mark that "
            "is not closed, or fetch it again"
        ) from error
    absent = [name for name in (_NAME, _FINDINGS, _PATIENT) if name not in columns]
    if absent:
        raise UsageError(
            f"{path} lacks the column {' and '.join(map(repr, absent))}; its header is "
            f"{', '.join(columns) or 'empty'}. Give NIH's Data_Entry_2017*.csv"
        )
    if not rows:
        raise UsageError(f"{path} holds a header and no image")
    parsed = sorted(_parse(path, line, row) for line, row in rows)
    names = tuple(name for name, _, _ in parsed)
    refuse_duplicates(path, names)
    columns_of = {finding: index for index, finding in enumerate(FINDINGS)}
    findings = np.zeros((len(parsed), len(FINDINGS)), np.uint8)
    for index, (_, found, _) in enumerate(parsed):
        findings[index, [columns_of[finding] for finding in found]] = 1
    return Labels(names, findings, np.array([row[2] for row in parsed], np.int64), Path(path))


def _numbered(reader: csv.DictReader) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yields each row with the number of its last line."""
    for row in reader:
        yield reader.line_num, row


def _parse(path: Path, line: int, row: dict[str, str | None]) -> tuple[str, tuple[str, ...], int]:
    name, found, patient = (row[column] for column in (_NAME, _FINDINGS, _PATIENT))
    where = f"{path}, line {line}"
    if not name or found is None or patient is None:
        raise UsageError(f"{where} is cut short or empty: it needs an image, findings, a patient")
    findings = tuple(found.split("|"))
    if findings == (NO_FINDING,):
        findings = ()
    for finding in findings:
        if finding not in FINDINGS:
            raise UsageError(
                f"{where}: {name} has the unknown finding {finding!r}; known: "
                f"{', '.join(FINDINGS)}, or {NO_FINDING} alone"
            )
    try:
        return name, findings, int(np.int64(int(patient)))
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{where}: the patient of {name} is {patient!r}, no number of 64 bits; correct it, or "
            "fetch the file again"
        ) from error


def refuse_duplicates(path: Path, names: Sequence[str]) -> None:
    """Raises UsageError if `names`, read from `path`, has duplicates."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path} names {some(twice, 'image')} more than once; remove the duplicates"
        )


def some(names: Sequence[str], what: str) -> str:
    """The number of names and the first few, such as "7 images (a, b, c, ...)"."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} {what}{'s' if len(names) != 1 else ''} ({shown})"
