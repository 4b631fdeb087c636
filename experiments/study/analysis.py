"""Comparison of the arms of a question: per data set, and over all trainings."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.study import datasets, statistics
from experiments.study.archive import Archive
from experiments.study.statistics import METRICS
from experiments.study.trials import Trial
from inmerge_jax.reporting.resampling import draw_counts

RESAMPLES = 1000
CONSTANT = 0.99
"""Share of test images with the same answer, from which a network counts as constant."""
Pair = tuple[str, str]
"""Two arms: the first minus the second."""


@dataclass(frozen=True)
class Group:
    """The finished trials of one network on one data set.

    Attributes:
      name: data set and network, for people.
      arms: arm to seed to trial.
      archive: the stored results.
    """

    name: str
    arms: Mapping[str, Mapping[int, Trial]]
    archive: Archive

    @property
    def backbone(self) -> Any:
        """The backbone of one of the trials."""
        return next(iter(next(iter(self.arms.values())).values())).backbone

    def records(self, arm: str) -> list[dict[str, Any]]:
        """Records of an arm, by seed."""
        return [self.archive.records[t.hash] for _, t in sorted(self.arms.get(arm, {}).items())]

    def mean(self, arm: str, metric: str) -> float:
        """Mean test metric of an arm."""
        return float(np.mean([record["result"]["test"][metric] for record in self.records(arm)]))

    def pairs(self, pair: Pair, *, changed: bool = True) -> list[tuple[Trial, Trial]]:
        """The trials of both arms with the same seed.

        Args:
          pair: the arms.
          changed: leave out pairs with equal test scores, in which nothing was merged by the epoch
            that is tested.
        """
        first, second = (self.arms.get(arm, {}) for arm in pair)
        found = [(first[seed], second[seed]) for seed in sorted(set(first) & set(second))]
        scores = self.archive.scores
        return [(a, b) for a, b in found if not (changed and np.array_equal(scores(a), scores(b)))]

    def by_seed(self, pair: Pair, metric: str) -> dict[int, float]:
        """Seed to difference of a test metric; where nothing changed, zero."""
        both = self.pairs(pair, changed=False)
        return {a.backbone.seed: _gap(self.archive, a, b, metric) for a, b in both}

    def differences(self, pair: Pair, metric: str) -> list[float]:
        """The differences of `by_seed`."""
        return list(self.by_seed(pair, metric).values())

    def interval(self, pair: Pair) -> dict[str, Any] | None:
        """`statistics.bootstrap` of a difference in AUC, with "seeds" and "changed", or None."""
        both = self.pairs(pair, changed=False)
        if not both:
            return None
        gaps = [resampled(self.archive, a) - resampled(self.archive, b) for a, b in both]
        values = np.stack(gaps, axis=1)
        found = statistics.bootstrap(values[0], values[1:], np.random.default_rng(0))
        return {**found._asdict(), "seeds": len(both), "changed": len(self.pairs(pair))}

    def merged(self, arm: str) -> float | None:
        """Share of the deep kernels that merge per update, mean over seeds; None if none can."""
        results = [record["result"] for record in self.records(arm)]
        shares = [merged_share(result) for result in results if result["layers"]]
        return float(np.mean(shares)) if shares else None


def merged_share(result: Mapping[str, Any]) -> float:
    """Share of the deep kernels of a trial that merge per update."""
    return float(sum(result["merged"]) / (sum(result["kernels"]) * result["steps"]))


def groups(trials: Iterable[Trial], archive: Archive) -> list[Group]:
    """The stored trials of a grid by data set, network, width and optimizer, in its order."""
    found: dict[str, dict[str, dict[int, Trial]]] = {}
    for trial in trials:
        if trial.hash in archive.records:
            arms = found.setdefault(group_name(trial), {})
            arms.setdefault(trial.arm, {})[trial.backbone.seed] = trial
    return [Group(name, arms, archive) for name, arms in found.items()]


def group_name(trial: Trial) -> str:
    """Data set and network, for people."""
    start = trial.backbone
    width = "" if start.width == 1 else f" \u00d7{start.width:g}"
    sgd = ", SGD" if start.optimizer == "sgd" else ""
    edges = ", pretrained" if start.weights == "edges" else ""
    few = "" if start.images is None else f", {start.images:,} images"
    wrong = (
        f", {start.wrong_labels:.0%} wrong labels".replace("%", " %") if start.wrong_labels else ""
    )
    balanced = ", balanced classes" if start.class_weights else ""
    title = datasets.SOURCES[start.data].title
    return f"{title}{few}{wrong}{balanced}, {start.model}{width}{edges}{sgd}"


@functools.cache
def _counts(images: int, patients: bytes | None) -> np.ndarray:
    """How often each image is drawn, (1 + resamples, images); the first row draws each once."""
    whose = None if patients is None else np.frombuffer(patients, np.int64)
    drawn = draw_counts(images, RESAMPLES, np.random.default_rng(0), whose)
    return np.concatenate([np.ones((1, images), np.int32), drawn.astype(np.int32)])


def drawn_counts(archive: Archive, data: str) -> np.ndarray:
    """The bootstrap draws of a data set's test images, the same for every network."""
    labels = archive.labels[data]
    patients = labels.patients
    key = None if patients is None else np.unique(patients, return_inverse=True)[1]
    return _counts(len(labels.labels), None if key is None else key.astype(np.int64).tobytes())


_RESAMPLED: dict[tuple[int, str], np.ndarray] = {}
_KEPT: dict[int, Archive] = {}
"""Archives whose identity is a key above; kept, so that no other one gets it."""


def resampled(archive: Archive, trial: Trial) -> np.ndarray:
    """Test AUC of a trial on every draw of the images, (1 + resamples,)."""
    key = (id(archive), trial.hash)
    if key not in _RESAMPLED:
        _KEPT[id(archive)] = archive
        data = trial.backbone.data
        labels, counts = archive.labels[data], drawn_counts(archive, data)
        _RESAMPLED[key] = statistics.metric_of_counts(
            "auc", labels.labels, archive.scores(trial), labels.task, counts
        )
    return _RESAMPLED[key]


def is_constant(archive: Archive, trial: Trial) -> bool:
    """Whether a network gives nearly all test images the same answer: a class, or set of labels."""
    scores = archive.scores(trial)
    if archive.labels[trial.backbone.data].task.startswith("multi-label"):
        counts = np.unique(scores > 0.5, axis=0, return_counts=True)[1]
    else:
        counts = np.bincount(scores.argmax(axis=1))
    return bool(counts.max() >= CONSTANT * len(scores))


def pool(
    found: Sequence[Group], pairs: Sequence[Pair], *, learned: bool = False
) -> dict[str, dict[str, Any]]:
    """Differences over the trainings of all groups.

    Pairs of trainings with equal test scores do not count.

    Args:
      found: the groups.
      pairs: of arms; Holm's correction is over these and both metrics.
      learned: leave out trainings whose backbone is constant, see `is_constant`.

    Returns:
      "FIRST - SECOND" to "auc" and "acc" (of `statistics.over_trials`, each with "data_sets", the
      same over the means of the data sets), and "unchanged", the pairs that do not count.
    """
    rows: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        by_data: dict[str, list[tuple[Trial, Trial]]] = {}
        unchanged = 0
        for group in found:
            unchanged += len(group.pairs(pair, changed=False)) - len(group.pairs(pair))
            for both in group.pairs(pair):
                if not (learned and is_constant(group.archive, both[0].first())):
                    by_data.setdefault(both[0].backbone.data, []).append(both)
        if not by_data:
            continue
        row: dict[str, Any] = {"unchanged": unchanged}
        for metric in METRICS:
            gaps = {
                data: [_gap(found[0].archive, *both, metric) for both in some]
                for data, some in by_data.items()
            }
            row[metric] = statistics.over_trials([gap for some in gaps.values() for gap in some])
            means = [float(np.mean(some)) for some in gaps.values()]
            row[metric]["data_sets"] = statistics.over_trials(means)
        rows[" - ".join(pair)] = row
    statistics.add_holm([row[metric] for row in rows.values() for metric in METRICS])
    return rows


def _gap(archive: Archive, first: Trial, second: Trial, metric: str) -> float:
    one, two = (archive.records[t.hash]["result"]["test"][metric] for t in (first, second))
    return one - two


def intervals(
    found: Sequence[Group], pairs: Sequence[Pair]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Differences in AUC per group: "FIRST - SECOND" to group name to `Group.interval`."""
    return {
        " - ".join(pair): {g.name: row for g in found if (row := g.interval(pair)) is not None}
        for pair in pairs
    }
