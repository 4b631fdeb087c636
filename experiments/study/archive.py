"""The stored results of the study: every finished training, in three files.

    trials.csv      one row per training: configuration, metrics, origin
    trials.zip      test scores, test labels, per-layer counts and similarities
    trials.sha256   the SHA-256 of both, in the format of `sha256sum`

`experiments/results/README.md` describes every column and member. `read` returns everything, `add`
adds finished trainings.
"""

import csv
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.study.trials import ADDED_LATER, EVALUATION, Backbone, Treatment, Trial
from inmerge_jax.data import Dataset
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_bytes, write_text
from inmerge_jax.locking import lock
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.metrics_file import read_metrics

RESULTS = Path(__file__).parents[1] / "results"
TABLE, ARRAYS, CHECKSUMS = "trials.csv", "trials.zip", "trials.sha256"
_DETAILS = "details.json"
_OPTIONAL = ("merged_by_epoch", "val_auc_by_epoch", "val_selected", "val_merged")
"""Merged kernels (epochs, layers); validation AUC (epochs,); and counts per layer of a treatment
that merges in validation.

Results of earlier versions, and of treatments without them, have none."""
_DIGITS = 4

_BACKBONE = {
    "data": str, "images": int, "wrong_labels": float, "model": str, "width": float, "stem": str,
    "weights": str, "class_weights": str, "optimizer": str, "seed": int,
    "backbone_epochs": int, "backbone_learning_rate": float,
}  # fmt: skip
_STAGE = {"epochs": int, "learning_rate": float, "treatment": str}
_TREATMENT = {
    "probability": float, "threshold": float, "quantile": float, "alpha": float, "partner": str,
    "skip": int, "every": int, "decay": float, "until": float, "along": str, "layers": str,
    "average": float, "statistics": str,
}  # fmt: skip
_OUTCOME = {
    "val_auc": float, "val_acc": float, "test_auc": float, "test_acc": float, "best_epoch": int,
    "steps": int, "kernels": int, "selected": int, "merged": int, "seconds": float,
}  # fmt: skip
_ORIGIN = {
    "started": str, "commit": str, "dirty": str, "processor": str, "cpus": int, "device": str,
    "driver": str, "versions": str,
}  # fmt: skip
COLUMNS = {"hash": str, "arm": str, **_BACKBONE, **_STAGE, **_TREATMENT, **_OUTCOME, **_ORIGIN}
"""Column name to type, in the order of the file."""


class Labels(NamedTuple):
    """Test labels of a data set.

    Attributes:
      labels: int (images,), or 0 and 1 (images, classes) for a multi-label task.
      task: medmnist's name of the task.
      patients: patient of each image, (images,); None where unknown.
    """

    labels: np.ndarray
    task: str
    patients: np.ndarray | None


@dataclass(frozen=True)
class Archive:
    """Everything that is stored of finished trainings.

    Attributes:
      records: by hash, as made by `make_record`.
      arrays: "scores/HASH", float32 (images, classes): test scores; "renewed/HASH", likewise with
        re-estimated batch statistics; "corrupted/HASH", uint8 (corruptions, severities, images):
        classes predicted for corrupted test images.
      labels: by data set.
      diverged: trainings whose loss became infinite or NaN, by hash: when it did.
    """

    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: Mapping[str, Labels] = field(default_factory=dict)
    diverged: Mapping[str, str] = field(default_factory=dict)

    def scores(self, trial: Trial) -> np.ndarray:
        """Test scores of a trial, float32 (images, classes)."""
        return self.arrays[f"scores/{trial.hash}"]


def make_record(
    trial: Trial,
    result: Mapping[str, Any],
    similarity: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The stored form of one training, JSON-ready.

    Args:
      trial: the configuration.
      result: of `train.train_stage`.
      similarity: kernel similarities per layer, "before" and "after" the stage.
      environment: of `environment.environment`; optionally with "device" and "driver".
    """
    names = "best_epoch epochs steps seconds val test layers kernels selected merged warnings"
    trained = {name: environment[name] for name in ("started", "git", "cpus", "packages")}
    # Runs of earlier versions recorded no processor.
    trained["processor"] = environment.get("processor")
    trained |= {name: environment[name] for name in ("device", "driver") if name in environment}
    # The similarities before a second stage are those after its backbone.
    stages = ("before", "after") if trial.first() == trial else ("after",)
    return {
        "name": trial.name,
        "arm": trial.arm,
        "config": trial.described(),
        "result": {name: result[name] for name in names.split()}
        | {name: _rounded(result[name]) for name in _OPTIONAL if result.get(name)},
        "similarity": {when: _rounded(similarity[when]) for when in stages},
        "trained": trained,
    }


def same_answers(scores: np.ndarray) -> float:
    """The largest share of images with the same answer: the class, or label, of the highest score.

    Args:
      scores: (images, classes).
    """
    return float(np.bincount(scores.argmax(1)).max() / len(scores))


def labels_of(dataset: Dataset) -> Labels:
    """Test labels of a loaded data set."""
    return Labels(dataset.test.labels, dataset.task, dataset.test.patients)


def read(folder: Path = RESULTS) -> Archive:
    """Everything stored in `folder`, after a check of both checksums; empty if nothing is stored.

    Raises:
      UsageError: a file is missing, or is not the one that the checksum belongs to.
    """
    path = folder / CHECKSUMS
    return _read(folder, path.read_text()) if path.exists() else Archive()


@functools.lru_cache(maxsize=2)
def _read(folder: Path, checksums: str) -> Archive:
    files = {}
    for line in checksums.splitlines():
        expected, name = line.split()
        path = folder / name
        if not path.exists():
            raise UsageError(f"{path} is missing; restore it, for example with git checkout")
        files[name] = path.read_bytes()
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise UsageError(
                f"{path} has SHA-256 {found}, but {folder / CHECKSUMS} has {expected}: restore "
                f"{TABLE}, {ARRAYS} and {CHECKSUMS} of one version, for example with git checkout"
            )
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(files[ARRAYS])) as archive:
        details = json.loads(archive.read(_DETAILS))
        for name in archive.namelist():
            if name.endswith(".npy"):
                arrays[name.removesuffix(".npy")] = np.load(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
    labels = {
        data: Labels(arrays.pop(f"labels/{data}"), task, arrays.pop(f"patients/{data}", None))
        for data, task in details["tasks"].items()
    }
    rows = csv.DictReader(io.StringIO(files[TABLE].decode()))
    records = {row["hash"]: _to_record(row, details["trials"][row["hash"]]) for row in rows}
    return Archive(records, arrays, labels, details.get("diverged", {}))


def add(
    folder: Path,
    records: Mapping[str, dict[str, Any]],
    arrays: Mapping[str, np.ndarray],
    labels: Mapping[str, Labels] | None = None,
    diverged: Mapping[str, str] | None = None,
) -> None:
    """Adds finished trainings, or further measurements of stored ones, to the archive.

    Args:
      folder: of the archive; created if missing.
      records: by hash; replaces a stored record of the same hash.
      arrays: named as in `Archive.arrays`.
      labels: of data sets, for those that are not stored yet.
      diverged: as in `Archive.diverged`.

    Raises:
      UsageError: other test labels are stored for one of the data sets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):
        stored = read(folder)
        for data, new in (labels or {}).items():
            known = stored.labels.get(data, new)
            if not np.array_equal(known.labels, new.labels):
                raise UsageError(f"{folder / ARRAYS} holds other test labels of {data}")
        _write(
            folder,
            Archive(
                {**stored.records, **records},
                {**stored.arrays, **arrays},
                {**(labels or {}), **stored.labels},
                {**stored.diverged, **(diverged or {})},
            ),
        )


def keep(
    trial: Trial, run: Path, folder: Path, dataset: Dataset, *, with_scores: bool = True
) -> None:
    """Adds a finished training from its run folder.

    Args:
      trial: the configuration.
      run: the run folder.
      folder: of the archive.
      dataset: that it was trained on.
      with_scores: store the test scores.
    """
    result, similarity, environment = (
        json.loads((run / f"{name}.json").read_bytes())
        for name in ("result", "similarity", "environment")
    )
    lines = read_metrics(run / "metrics.jsonl")
    result["merged_by_epoch"] = [line["merged"] for line in lines if line.get("merged")]
    result["val_auc_by_epoch"] = [line["val_auc"] for line in lines]
    result["val"]["same"] = same_answers(read_scores(run / result["scores"]["val"]))
    record = make_record(trial, result, similarity, environment)
    arrays = {}
    if with_scores:
        scores = read_scores(run / result["scores"]["test"]).astype(np.float32)
        arrays = {f"scores/{trial.hash}": scores}
    labels = {trial.backbone.data: labels_of(dataset)}
    add(folder, {trial.hash: record}, arrays, labels)


def _write(folder: Path, archive: Archive) -> None:
    """Writes the three files, the checksums last; equal content gives equal bytes."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_to_row(one, record) for one, record in sorted(archive.records.items()))
    details = {
        "tasks": {data: labels.task for data, labels in archive.labels.items()},
        "trials": {one: _details(record) for one, record in archive.records.items()},
        **({"diverged": dict(archive.diverged)} if archive.diverged else {}),
    }
    members = {_DETAILS: json.dumps(details, sort_keys=True, separators=(",", ":")).encode()}
    arrays = dict(archive.arrays)
    for data, labels in archive.labels.items():
        arrays[f"labels/{data}"] = labels.labels
        if labels.patients is not None:
            arrays[f"patients/{data}"] = labels.patients
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(members):
            # A fixed time and system, so that the bytes depend on the content alone.
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system, info.external_attr = 8, 3, 0o644 << 16
            file.writestr(info, members[name])
    files = {TABLE: table.getvalue().encode(), ARRAYS: buffer.getvalue()}
    for name, data in files.items():
        write_bytes(folder / name, data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    write_text(folder / CHECKSUMS, "".join(lines))


def trial_of(record: Mapping[str, Any]) -> Trial:
    """The trial whose configuration a record holds."""
    config = record["config"]
    backbone = Backbone(**config["backbone"])
    if "treatment" not in config:
        return Trial(backbone)
    treatment = Treatment(**config["treatment"])
    return Trial(backbone, record["arm"], config["epochs"], config["learning_rate"], treatment)


def origin(trained: Mapping[str, Any]) -> str:
    """Where a trial was trained, as far as its bits depend on it.

    Args:
      trained: "trained" of its record, or an environment.
    """
    device = trained.get("device") or trained["processor"]
    return f"{device} with {trained['cpus']} cores"


def _to_row(one: str, record: Mapping[str, Any]) -> dict[str, Any]:
    config, result, trained = record["config"], record["result"], record["trained"]
    backbone, treatment = config["backbone"], dict(config.get("treatment", {}))
    defaults = {name: getattr(Backbone, name) for name in ADDED_LATER}
    row = {"hash": one, "arm": record["arm"], **defaults, **backbone}
    row["backbone_epochs"] = row.pop("epochs")
    row["backbone_learning_rate"] = row.pop("learning_rate")
    if treatment:
        row |= {"epochs": config["epochs"], "learning_rate": config["learning_rate"]}
        row |= {"treatment": treatment.pop("kind"), **treatment}
    for split in ("val", "test"):
        row |= {f"{split}_{metric}": result[split][metric] for metric in ("auc", "acc")}
    row |= {name: result[name] for name in ("best_epoch", "steps", "seconds")}
    row |= {name: sum(result[name]) for name in ("kernels", "selected", "merged")}
    row |= {name: trained[name] for name in ("started", "cpus", "processor")}
    row |= {name: trained[name] for name in ("device", "driver") if name in trained}
    row |= {"commit": trained["git"]["commit"], "dirty": str(trained["git"]["dirty"]).lower()}
    row["versions"] = " ".join(f"{name}={text}" for name, text in trained["packages"].items())
    return row


def _details(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that is in the archive of arrays, not in the table."""
    result = record["result"]
    found = {name: result[name] for name in ("layers", "kernels", "selected", "merged", "warnings")}
    for split in ("val", "test"):
        found[split] = {k: v for k, v in result[split].items() if k not in ("auc", "acc")}
    found |= {name: result[name] for name in _OPTIONAL if name in result}
    found["similarity"] = record["similarity"]
    more = {"batch_statistics"} & set(record)
    return found | {name: record[name] for name in more}


def _to_record(row: Mapping[str, str], details: Mapping[str, Any]) -> dict[str, Any]:
    # Files of earlier versions have fewer columns.
    values = {name: kind(row[name]) for name, kind in COLUMNS.items() if row.get(name, "") != ""}
    own = [name for name in _BACKBONE if not name.startswith("backbone_")]
    backbone = {name: values[name] for name in own if name in values}
    backbone |= {name: values[f"backbone_{name}"] for name in ("epochs", "learning_rate")}
    for name in ADDED_LATER:
        if backbone.get(name) == getattr(Backbone, name):
            backbone.pop(name, None)
    config: dict[str, Any] = {"backbone": backbone}
    if "treatment" in values:
        treatment = {name: values[name] for name in _TREATMENT if name in values}
        for name in EVALUATION:
            if treatment.get(name) == getattr(Treatment, name):
                treatment.pop(name, None)  # Some files name defaults.
        config |= {"epochs": values["epochs"], "learning_rate": values["learning_rate"]}
        config["treatment"] = {"kind": values["treatment"], **treatment}
    result = {name: values[name] for name in ("best_epoch", "steps", "seconds")}
    result["epochs"] = values.get("epochs", values["backbone_epochs"])
    for split in ("val", "test"):
        metrics = {metric: values.get(f"{split}_{metric}") for metric in ("auc", "acc")}
        result[split] = {**metrics, **details[split]}
    for name in ("layers", "kernels", "selected", "merged", "warnings"):
        result[name] = details[name]
    result |= {name: details[name] for name in _OPTIONAL if name in details}
    trained = {name: values.get(name) for name in ("started", "cpus", "processor")}
    trained |= {name: values[name] for name in ("device", "driver") if name in values}
    trained["git"] = {"commit": values.get("commit"), "dirty": values["dirty"] == "true"}
    trained["packages"] = dict(one.split("=", 1) for one in values["versions"].split())
    record = {"arm": values["arm"], "config": config, "result": result, "trained": trained}
    record["similarity"] = details["similarity"]
    record["name"] = trial_of(record).name
    more = {"batch_statistics"} & set(details)
    return record | {name: details[name] for name in more}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, _DIGITS) if isinstance(value, float) else value
