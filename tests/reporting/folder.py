"""A synthetic run folder: deterministic numbers in the files that a real run leaves."""

import json
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from inmerge_jax.reporting.html_report import write_report
from inmerge_jax.reporting.runs import read_run
from inmerge_jax.reporting.tables import make_report, to_markdown

ARMS = ("backbone", "finetune", "inmerge")
CLASSES = ("normal", "nodule", "effusion", "cardiomegaly")
LAYERS = tuple(f"Block_{block}/Conv_{conv}/kernel" for block in range(4) for conv in range(2))
MERGING = LAYERS[4:]
EPOCHS = {"backbone": 8, "finetune": 4, "inmerge": 4}
SKILL = {"backbone": 1.0, "finetune": 1.1, "inmerge": 1.35}


def markdown(folder: Path) -> str:
    """The tables and notes of a run."""
    return to_markdown(make_report(read_run(folder)))


def write_page(folder: Path) -> Path:
    """Writes the HTML report of a run, and returns its path."""
    run = read_run(folder)
    return write_report(run, make_report(run))


def write_run(
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: tuple[str, ...] = ARMS,
    classes: tuple[str, ...] = CLASSES,
    task: str = "multi-class",
    images: int = 160,
    merging: bool = True,
    **dataset: object,
) -> Path:
    """Writes a finished run; `dataset` overrides fields of the results' data set."""
    rng = np.random.default_rng(7)
    labels = rng.permutation(np.arange(images) % len(classes)).astype(np.int32)
    if task == "multi-label, binary-class":
        labels = (rng.random((images, len(classes))) < 0.3).astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "labels.npz", val=labels[:40], test=labels)
    write_samples(folder, rng, classes)
    results = {
        arm: [_write_arm(folder, rng, seed, arm, labels, task, classes, merging) for seed in seeds]
        for arm in arms
    }
    data = {
        "name": "phantom",
        "size": 28,
        "task": task,
        "classes": list(classes),
        "title": "phantom",
        "source": "procedural, seed 0",
        "counts": {"train": 640, "val": 40, "test": images},
    }
    rule = {"probability": 0.3, "threshold": 0.1, "alpha": 0.8, "partner": "random", "skip": 4}
    model = {"name": "resnet18", "width": 0.25, "stem": "small"}
    write(folder / "config.json", {"model": model, "rule": rule, "seeds": list(seeds)})
    environment = {"python": "3.11.2", "versions": {"jax": "0.10.2"}, "devices": ["cpu:0"]}
    write(folder / "environment.json", environment)
    whole = {
        "dataset": data | dataset,
        "model": model,
        "recipe": {"name": "medmnist", "epochs": 8},
        "rule": rule,
        "seeds": list(seeds),
        "arms": results,
        "environment": environment,
        "seconds": 71.4,
    }
    write(folder / "results.json", whole)
    return folder


def write_samples(folder: Path, rng: np.random.Generator, classes: tuple[str, ...]) -> None:
    """Eight grey gradients with a bright spot, named by class."""
    y, x = np.mgrid[:28, :28]
    spots = rng.integers(6, 22, (8, 2))
    images = [90 + 3 * x + 70 * ((y - a) ** 2 + (x - b) ** 2 < 12) for a, b in spots]
    names = [classes[i % len(classes)] for i in range(8)]
    np.savez(
        folder / "samples.npz",
        images=np.stack(images)[..., None].astype(np.uint8),
        labels=np.arange(8) % len(classes),
        names=np.array(names),
    )


def edit(folder: Path, change: object) -> None:
    """Rewrites results.json through `change(results)`."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    write(path, results)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def auc_per_class(labels: np.ndarray, scores: np.ndarray, task: str) -> list[float]:
    """The one-vs-rest AUCs as scikit-learn gives them."""
    if task == "binary-class":
        return [roc_auc_score(labels, scores[:, 1])]
    columns = range(scores.shape[1])
    if labels.ndim == 2:
        return [roc_auc_score(labels[:, k], scores[:, k]) for k in columns]
    return [roc_auc_score(labels == k, scores[:, k]) for k in columns]


def _write_arm(folder, rng, seed, arm, labels, task, classes, merging) -> dict:
    place = folder / f"seed{seed}" / arm
    (place / "scores").mkdir(parents=True, exist_ok=True)
    hot = labels if labels.ndim == 2 else np.eye(len(classes))[labels]
    logits = SKILL[arm] * hot + rng.normal(size=hot.shape)
    odds = np.exp(logits)
    scores = 1 / (1 + 1 / odds) if labels.ndim == 2 else odds / odds.sum(1, keepdims=True)
    name = f"scores/phantom_test_[AUC]0.900_[ACC]0.700@{arm}-seed{seed}.csv"
    rows = [f"{i}," + ",".join(map(repr, map(float, row))) for i, row in enumerate(scores)]
    (place / name).write_text("\n".join(rows) + "\n")
    areas = auc_per_class(labels, scores, task)
    right = scores.argmax(1) == labels if labels.ndim == 1 else (scores > 0.5) == labels
    metrics = {
        "auc": float(np.mean(areas)),
        "acc": float(right.mean()),
        "auc_per_class": areas,
        "undefined": 0,
    }
    merges = _write_history(place, rng, arm, merging)
    _write_similarity(place, arm)
    active = arm == "inmerge"
    result = {
        "seed": seed,
        "arm": arm,
        "val": metrics,
        "test": metrics,
        "best_epoch": EPOCHS[arm] - 1,
        "epochs": EPOCHS[arm],
        "steps": EPOCHS[arm] * 10,
        "seconds": 20.0,
        "layers": list(MERGING) if active else [],
        "kernels": [32, 32, 64, 64] if active else [],
        "selected": [384, 384, 768, 768] if active else [],
        "merged": merges.sum(0).tolist() if active else [],
        "warnings": [],
        "scores": {"val": name.replace("_test_", "_val_"), "test": name},
    }
    write(place / "result.json", result)
    return result


def _write_history(place: Path, rng: np.random.Generator, arm: str, merging: bool) -> np.ndarray:
    count = EPOCHS[arm]
    merges = np.zeros((count, len(MERGING)), int)
    if arm == "inmerge" and merging:
        merges = rng.poisson(np.outer(0.75 ** np.arange(count), [60, 40, 70, 20]))
    lines = []
    for epoch in range(count):
        progress = (epoch + (8 if arm != "backbone" else 0)) / 12
        line = {
            "epoch": epoch + 1,
            "step": 10 * (epoch + 1),
            "learning_rate": 1e-3,
            "train_loss": 1.3 * np.exp(-1.5 * progress) + 0.02 * rng.normal(),
            "val_loss": 1.35 * np.exp(-progress) + 0.3 * progress + 0.03 * rng.normal(),
            "val_auc": 0.6 + 0.3 * progress**0.5 + 0.01 * rng.normal(),
            "val_acc": 0.35 + 0.35 * progress**0.5 + 0.02 * rng.normal(),
            "seconds": 2.0,
            "images_per_second": 320.0,
            "kernels": [32, 32, 64, 64] if arm == "inmerge" else [],
            "selected": [96, 96, 192, 192] if arm == "inmerge" else [],
            "merged": merges[epoch].tolist() if arm == "inmerge" else [],
            "similarity": [0.2] * 4 if arm == "inmerge" else [],
        }
        lines.append(json.dumps(line))
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return merges


def _write_similarity(place: Path, arm: str) -> None:
    def layers(lift: float) -> list[dict]:
        found = []
        for depth, name in enumerate(LAYERS):
            middle, wide = 0.01 + lift * (depth >= 4), 0.25 - 0.02 * depth
            shape = {0.05: -1.6, 0.25: -0.7, 0.5: 0.0, 0.75: 0.7, 0.95: 1.6, 0.99: 2.3}
            found.append(
                {
                    "name": name,
                    "kernels": 32,
                    "mean": middle,
                    "minimum": middle - 3 * wide,
                    "maximum": middle + 3 * wide,
                    "quantiles": {str(q): middle + z * wide for q, z in shape.items()},
                    "above": {"0.1": 0.21, "0.3": 0.004, "0.5": 0.0, "0.7": 0.0, "0.9": 0.0},
                    "nearest": middle + 2.2 * wide,
                }
            )
        return found

    if arm != "backbone":
        after = layers(0.12 if arm == "inmerge" else 0.01)
        write(place / "similarity.json", {"before": layers(0.0), "after": after})
