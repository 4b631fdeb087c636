"""Adds trials that were trained elsewhere: `python -m experiments.study import FOLDER`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.study import archive
from experiments.study.archive import RESULTS, Archive
from experiments.study.questions import QUESTIONS
from experiments.study.trials import Trial
from inmerge_jax.errors import UsageError


@dataclass(frozen=True)
class ImportConfig:
    """Adds the trials of another folder of results to the stored ones.

    Trials that are stored already stay as they are. All trials of a backbone are imported
    together, once they are finished, and only if they were trained on one machine.

    Attributes:
      source: Folder with trials.csv and trials.zip, the --results of a question.
      results: Folder of the stored trials.
    """

    source: tyro.conf.Positional[Path]
    results: Path = RESULTS


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status.

    Raises:
      UsageError: the folder has no trials, one of no question, or one that was trained with
        uncommitted changes; or the test labels of a data set differ.
    """
    config = tyro.cli(ImportConfig, prog="python -m experiments.study import", args=arguments)
    found, stored = archive.read(config.source), archive.read(config.results)
    if not found.records:
        raise UsageError(f"{config.source} holds no trials; give the --results of a question")
    try:
        more = importable(found, stored)
    except UsageError as error:
        raise UsageError(f"{config.source}: {error}") from error
    archive.add(config.results, more.records, more.arrays, more.labels, more.diverged)
    print(f"{len(more.records)} of {len(found.records)} trials are new")
    if out := len(found.records.keys() - stored.records.keys()) - len(more.records):
        print(
            f"{out} trials are left out: others of their backbones are missing, or were trained on "
            "another machine"
        )
    return 0


def importable(found: Archive, stored: Archive) -> Archive:
    """The part of `found` that is to be added to `stored`.

    Raises:
      UsageError: a new trial is of no question, or was trained with uncommitted changes.
    """
    new = found.records.keys() - stored.records.keys()
    more = _part(found, new, found.diverged)
    both = Archive(
        {**stored.records, **more.records},
        {**stored.arrays, **more.arrays},
        {**more.labels, **stored.labels},
        {**more.diverged, **stored.diverged},
    )
    planned = {trial.hash: trial for q in QUESTIONS.values() for trial in q.planned(both)}
    for one in new:
        if one not in planned:
            raise UsageError(f"the trial {one} is of no question of this version")
        if found.records[one]["trained"]["git"]["dirty"]:
            raise UsageError(
                f"the trial {one} was trained with uncommitted changes; train it again at a commit"
            )
    # All trials of a backbone together: if they are finished, and from one machine.
    unfinished = {Trial(t.backbone).hash for q in QUESTIONS.values() for t in q.left(both)}
    origins: dict[str, set[str]] = {}
    for record in both.records.values():
        origins.setdefault(_start(record), set()).add(archive.origin(record["trained"]))
    starts = {start for start, some in origins.items() if len(some) == 1} - unfinished
    lost = [
        one
        for one in found.diverged.keys() & planned.keys() - both.records.keys()
        if Trial(planned[one].backbone).hash in (starts if planned[one].epochs else {one})
        if Trial(planned[one].backbone).hash not in unfinished
    ]
    return _part(found, [one for one in new if _start(found.records[one]) in starts], lost)


def _part(found: Archive, trials: Collection[str], diverged: Collection[str]) -> Archive:
    """These trials of an archive, and these that diverged."""
    return Archive(
        {one: found.records[one] for one in trials},
        {name: a for name, a in found.arrays.items() if name.rpartition("/")[2] in trials},
        found.labels,
        {one: found.diverged[one] for one in diverged},
    )


def _start(record: Mapping[str, Any]) -> str:
    """The hash of the backbone of a stored trial."""
    return Trial(archive.trial_of(record).backbone).hash
