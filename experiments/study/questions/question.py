"""What every question of the study has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.study.archive import Archive
from experiments.study.trials import Trial, with_dependencies
from inmerge_jax.reporting.plots import Plot

Found = dict[str, Any]


class Overview(NamedTuple):
    """A question's row in the overview.

    Attributes:
      effect: with its interval.
      trials: how many paired trainings it is the mean of.
      verdict: the conclusion.
    """

    effect: str
    trials: str
    verdict: str


@dataclass(frozen=True)
class Question:
    """One question of the study.

    Attributes:
      name: on the command line; its page is docs/results/NAME.md, with hyphens.
      title: of the page.
      hypothesis: one sentence.
      trials: the grid; empty where nothing is trained.
      later: from the stored results to the trials that depend on them, such as those with the
        learning rate that `trials` choose; none before these are stored.
      analyse: from the stored results to every number that is published.
      table: the page's table, from what `analyse` returns.
      figure: likewise.
      overview: likewise.
      measure: from a finished trial and `stages.Paths` to further results of its weights, as
        `archive.add` takes them; None where test scores suffice.
      measured: whether the archive has these of a trial.
      choices: from the stored results to a table of what is chosen on validation data before the
        comparison; None where nothing is.
      has_chosen: from the stored results to whether all of this is chosen.
      check: from the stored results to a table that the protocol asks for before the comparison;
        None where it asks for none.
      keeps_scores: whether a trial's test scores are stored. Those of trials that only choose
        something on validation data need not be.
      keeps_weights: whether the weights of second stages stay in their run folders once these are
        stored and measured. Those of large networks take hundreds of megabytes each.
    """

    name: str
    title: str
    hypothesis: str
    trials: tuple[Trial, ...]
    analyse: Callable[[Archive], Found]
    table: Callable[[Found], str]
    figure: Callable[[Found], Plot]
    overview: Callable[[Found], Overview]
    measure: Callable[[Trial, Any], None] | None = None
    measured: Callable[[Trial, Archive], bool] = lambda trial, archive: True
    later: Callable[[Archive], tuple[Trial, ...]] = lambda archive: ()
    choices: Callable[[Archive], str] | None = None
    has_chosen: Callable[[Archive], bool] = lambda archive: True
    check: Callable[[Archive], str] | None = None
    keeps_scores: Callable[[Trial], bool] = lambda trial: True
    keeps_weights: bool = True

    @property
    def page(self) -> str:
        """File name of the page."""
        return f"{self.name.replace('_', '-')}.md"

    def planned(self, archive: Archive) -> Sequence[Trial]:
        """All trials that are known by now, with their backbones."""
        return with_dependencies((*self.trials, *self.later(archive)))

    def stored(self, archive: Archive) -> Sequence[Trial]:
        """Those that are in the archive."""
        return [t for t in self.planned(archive) if t.hash in archive.records]

    def left(self, archive: Archive) -> Sequence[Trial]:
        """Those that are not stored, or not measured, and that did not diverge."""
        return [
            trial
            for trial in self.planned(archive)
            if not is_lost(trial, archive)
            and not (trial.hash in archive.records and self.measured(trial, archive))
        ]

    def is_complete(self, archive: Archive) -> bool:
        """Whether all trials are stored, those that follow from its choices among them."""
        return self.has_chosen(archive) and not self.left(archive)


def is_lost(trial: Trial, archive: Archive) -> bool:
    """Whether a trial that is not stored, or the one that it starts from, diverged."""
    wanted = {trial.hash, trial.first().hash} - set(archive.records)
    return not wanted.isdisjoint(archive.diverged)
