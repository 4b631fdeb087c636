"""The table of the stored example runs of `inmerge train`, for docs/trainer.md."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inmerge_jax.reporting.tables import markdown_rows

HEADER = ("run, test images", "network", "seeds", "finetune AUC", "inmerge AUC", "merged")


def markdown(folder: Path) -> str:
    """A row for each run: mean test AUC of both arms, and the fraction of selected kernels merged.

    Args:
      folder: Folder of the runs' folders.
    """
    rows = [
        _row(path.parent.name, json.loads(path.read_bytes()))
        for path in sorted(folder.glob("*/results.json"))
    ]
    return markdown_rows(HEADER, rows, "llrrrr") + "\n"


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
