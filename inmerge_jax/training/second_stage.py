"""What a second stage starts from, so that all arms of a seed have one backbone."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from inmerge_jax.files import read_json_object, remove_entries, write_json

START = "start.json"
"""In the folder of a second stage: the hash of the weights that it starts from."""


def weights_sha256(params: Any, batch_stats: Any) -> str:
    """SHA-256 of the weights that a second stage starts from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path((params, batch_stats)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def begin_second_stage(folder: Path, start: str, trained: bool) -> str | None:
    """Stores the hash of the weights that a second stage starts from.

    A stage that started from other weights is deleted: a backbone that was trained again, on
    another machine, may have other weights than the one that earlier arms of its seed have.

    Args:
      folder: of the stage.
      start: the result of `weights_sha256`.
      trained: whether the backbone was trained just now. Stages of earlier versions, whose weights
        are not known, are then deleted too.

    Returns:
      What was deleted and why; None if nothing was.
    """
    file = folder / START
    if file.exists():
        remedy = f"delete the folder {folder} and give `resume`, which trains that stage again"
        if read_json_object(file, remedy).get("sha256") == start:
            return None
    elif not (trained and folder.exists() and any(folder.iterdir())):
        write_json(file, {"sha256": start})
        return None
    remove_entries(folder, START)  # Which names the old weights until the rest is gone.
    write_json(file, {"sha256": start})
    return "it had started from other weights than the backbone has now, and was trained again"
