"""Tables of numeric features: a CSV of the user's own, and scikit-learn's breast cancer table."""

from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.arrays import as_float32, dataset_from_arrays
from inmerge_jax.data.csv_rows import LINE, group_columns, natural, read_rows
from inmerge_jax.data.dataset import Dataset, plain
from inmerge_jax.data.splitting import split_named
from inmerge_jax.errors import UsageError

_LARGEST = float(np.finfo(np.float32).max)


def load_table(path: Path) -> Dataset:
    """Loads a CSV with a header, whose column "label" has the class of each row.

    A column "group" (or "patient", "patient_id", "subject", "subject_id") keeps rows together; a
    column "split" assigns rows to train, val or test. All others are features, finite numbers.
    Splits that are missing are taken from the training rows, see `arrays.dataset_from_arrays`. The
    file may be gzipped.

    Raises:
      UsageError: the file cannot be read, has no column label or no feature, or a value is missing
        or no number; the message names the line and the column.
    """
    columns, rows = read_rows(path)
    if "label" not in columns:
        raise UsageError(
            f"{path} has no column label; its header is {', '.join(columns) or 'empty'}. Name the "
            "column of the classes label"
        )
    groups = group_columns(path, columns)
    features = [name for name in columns if name not in ("label", "split", *groups)]
    if not features:
        raise UsageError(f"{path} has no column of numbers next to label; add the features")
    found = [_cell(path, row, "label") for row in rows]
    classes, labels = np.unique(np.array(found), return_inverse=True)
    values = np.array([_numbers(path, row, features) for row in rows], np.float64)
    order = sorted(range(len(classes)), key=lambda one: natural(str(classes[one])))
    return dataset_from_arrays(
        f"table-{plain(path.name.split('.')[0])}",
        str(path),
        as_float32(values, features, str(path)),
        np.argsort(order)[labels].astype(np.int32),
        [str(classes[one]) for one in order],
        names=[f"line {row[LINE]}" for row in rows],
        splits=_splits(path, rows) if "split" in columns else None,
        groups=[_cell(path, row, groups[0]) for row in rows] if groups else None,
        features=features,
    )


def load_breast_cancer() -> Dataset:
    """Loads the breast cancer table that scikit-learn ships: 569 patients, 30 features.

    The features describe cell nuclei of a fine needle aspirate (Wolberg et al. 1995, UCI Machine
    Learning Repository); the classes are malignant and benign. The split is stratified and fixed.
    """
    from sklearn import datasets

    table = datasets.load_breast_cancer()
    return dataset_from_arrays(
        "breast-cancer",
        "scikit-learn's breast cancer table (UCI, Wolberg et al. 1995)",
        table.data.astype(np.float32),
        table.target.astype(np.int32),
        [str(name) for name in table.target_names],
        names=[f"row {row}" for row in range(len(table.target))],
        features=[str(name) for name in table.feature_names],
    )


def _splits(path: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array(
        [split_named(_cell(path, row, "split"), f"{path}, line {row[LINE]}") for row in rows]
    )


def _numbers(path: Path, row: dict[str, Any], features: list[str]) -> list[float]:
    numbers = []
    for name in features:
        text = _cell(path, row, name)
        try:
            number = float(text)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {row[LINE]}: {name} is {text!r}, and every column but label, split "
                "and group holds numbers; encode it as numbers, or remove the column"
            ) from error
        if not abs(number) <= _LARGEST:
            raise UsageError(
                f"{path}, line {row[LINE]}: {name} is {text}; fill it in, or remove the row or the "
                "column"
            )
        numbers.append(number)
    return numbers


def _cell(path: Path, row: dict[str, Any], column: str) -> str:
    if not row[column]:
        raise UsageError(
            f"{path}, line {row[LINE]}: {column} is missing; fill it in, or remove the row or the "
            "column"
        )
    return row[column]
