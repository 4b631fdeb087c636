"""Score files in medmnist's own format, so that anyone can re-score a run.

A file is named `{flag}{_size}_{split}_[AUC]{auc:.3f}_[ACC]{acc:.3f}@{run}.csv` (no size at 28 px)
and holds one line per image: its index in the split, then its scores. No header.
"""

from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.errors import InputError
from inmerge_jax.files import write_text
from inmerge_jax.training.metrics import Metrics
from inmerge_jax.training.runfolder import cannot_write

_SPLITS = ("train", "val", "test")


def write_scores(
    folder: Path, flag: str, size: int, split: str, scores: Any, metrics: Metrics, run: str
) -> Path:
    """Writes the scores of one split and returns the file's path.

    `medmnist.Evaluator.parse_and_evaluate` computes `metrics` again from it: numbers are written
    with the digits that their dtype needs to come back the same.

    Args:
      folder: created where absent.
      flag: the data set's name, without "_".
      size: of the images, in pixels.
      split: "train", "val" or "test".
      scores: floats (n,) or (n, columns), in the order of the split.
      metrics: of these scores; they go into the name.
      run: names the run; without "@", "." and "/".

    Raises:
      InputError: the file can't be written.
      ValueError: a name that medmnist could not take apart again; scores of another shape.
    """
    scores = np.asarray(scores)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {scores.shape}; needed: (n,) or (n, columns)")
    if split not in _SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(_SPLITS)}")
    if not flag or set(flag) & set("_@/"):
        raise ValueError(f"a data set's name without '_', '@', '/' is needed, not {flag!r}")
    if not run or set(run) & set("@./"):
        raise ValueError(f"a run's name without '@', '.', '/' is needed, not {run!r}")
    pixels = "" if size == 28 else f"_{size}"
    figures = f"[AUC]{metrics.auc:.3f}_[ACC]{metrics.acc:.3f}"
    path = Path(folder) / f"{flag}{pixels}_{split}_{figures}@{run}.csv"
    lines = (",".join([str(index), *map(str, row)]) for index, row in enumerate(scores))
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def read_scores(path: Path) -> np.ndarray:
    """The scores of one file as float64 (n, columns), in the order of their indices.

    Raises:
      InputError: the file is absent, or not lines of an index and scores.
    """
    try:
        lines = Path(path).read_text().splitlines() or ["empty"]
        table = np.loadtxt(lines, delimiter=",", ndmin=2, dtype=np.float64)
    except FileNotFoundError as error:
        raise InputError(f"there is no score file {path}") from error
    except ValueError as error:
        raise InputError(f"{path} is not a score file: {error}") from error
    if table.shape[1] < 2:
        raise InputError(f"{path} is not a score file: an index and scores per line are needed")
    return table[np.argsort(table[:, 0], kind="stable"), 1:]
