"""The table of the stored example runs of `inmerge train`, for docs/trainer.md."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inmerge_jax.reporting.tables import markdown_rows

HEADER = ("run, test images", "network", "seeds", "finetune AUC", "inmerge AUC", "merged")


def markdown(folder: Path, runs: tuple[str, ...] = ("breastmnist", "chestxray14/*")) -> str:
    """A row for each stored run: mean test AUC of both arms, and the fraction of kernels merged.

    Args:
      folder: holds the runs' folders.
      runs: patterns of their names, in the order of the table.
    """
    lines = []
    for pattern in runs:
        for path in sorted(folder.glob(f"{pattern}/results.json")):
            name = str(path.parent.relative_to(folder))
            lines.append(_row(name, json.loads(path.read_bytes())))
    return markdown_rows(HEADER, lines, "llrrrr") + "\n"


def _row(name: str, results: Mapping[str, Any]) -> tuple[str, ...]:
    arms, data = results["arms"], results["dataset"]
    auc = {arm: statistics.mean(run["test"]["auc"] for run in arms[arm]) for arm in arms}
    merged, selected = (
        sum(sum(run[what]) for run in arms["inmerge"]) for what in ("merged", "selected")
    )
    return (
        f"{name}, {data['counts']['test']:,}",
        f"{results['model']['name']}, {data['size']} px",
        str(len(results["seeds"])),
        f"{auc['finetune']:.3f}",
        f"{auc['inmerge']:.3f}",
        f"{merged / selected:.0%}",
    )
