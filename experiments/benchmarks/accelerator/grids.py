"""Lists of trials for part 4, the most informative first."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from experiments.study import archive
from experiments.study.questions import full_length, pretrained
from experiments.study.trials import Backbone, Treatment, Trial

ARMS: Mapping[str, Treatment] = {
    "finetune": Treatment(),
    "inmerge": Treatment("merge"),
    "inmerge, random": Treatment("merge", partner="random"),
    "inmerge, adaptive": Treatment("merge", quantile=0.5),
}
"""The second stages: the paper's rule, the released code's partner, and one that always merges."""


@dataclass(frozen=True)
class Grid:
    """Trials of one network on several data sets.

    Attributes:
      data: data sets, of `study.datasets.SOURCES`.
      seeds: number of seeds of each data set.
      first_seed: the first of them.
      model: of `create_model`.
      width: factor on its channels.
      epochs: of the backbone; 100 in the MedMNIST benchmark.
      more: epochs of each second stage.
      arms: the second stages.
    """

    data: tuple[str, ...]
    seeds: int
    model: str = "resnet18"
    width: float = 1.0
    epochs: int = 100
    more: int = 30
    arms: Mapping[str, Treatment] = field(default_factory=lambda: ARMS)
    first_seed: int = 0

    def units(self, together: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Data set and seeds that are trained at once; all data sets before further seeds."""
        every = range(self.first_seed, self.first_seed + self.seeds)
        for start in range(0, self.seeds, together):
            seeds = tuple(every[start : start + together])
            for data in self.data:
                yield data, seeds

    def backbone(self, data: str, seed: int) -> Trial:
        """The first stage."""
        return Trial(Backbone(data, self.model, seed, self.epochs, self.width))

    def second(self, data: str, seed: int, arm: str) -> Trial:
        """A second stage."""
        start = self.backbone(data, seed).backbone
        return Trial(start, arm, self.more, treatment=self.arms[arm])

    def stages(self, data: str, seeds: Sequence[int]) -> list[list[Trial]]:
        """The trials of some seeds by stage, the backbones first."""
        backbones = [self.backbone(data, seed) for seed in seeds]
        return [backbones, *([self.second(data, s, arm) for s in seeds] for arm in self.arms)]

    def trials(self) -> Iterator[Trial]:
        """All trials."""
        for data, seeds in self.units(1):
            yield from (trial for stage in self.stages(data, seeds) for trial in stage)


@dataclass(frozen=True)
class PretrainedGrid(Grid):
    """The comparison of docs/protocol.md, section 1, with the stored choice of learning rates."""

    def units(self, together: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """As of any grid; none before the learning rates are chosen."""
        return super().units(together) if self.is_chosen() else iter(())

    def is_chosen(self) -> bool:
        """Whether the learning rates are stored."""
        return set(chosen_rates()) == set(self.data)

    def backbone(self, data: str, seed: int) -> Trial:
        """The first stage, with the learning rate of the data set."""
        return Trial(pretrained.backbone(data, chosen_rates()[data], seed))

    def second(self, data: str, seed: int, arm: str) -> Trial:
        """A second stage."""
        return pretrained.second_stage(self.backbone(data, seed).backbone, arm)


@functools.cache
def chosen_rates() -> Mapping[str, float]:
    """Data set to the learning rate that the stored trials choose; none where they do not yet."""
    return pretrained.chosen(pretrained.selection(archive.read()))


@dataclass(frozen=True)
class LearningRateGrid(Grid):
    """The backbones by which the learning rates of `PretrainedGrid` are chosen."""

    def backbone(self, data: str, seed: int) -> Trial:
        """The first stage, with the first of the learning rates."""
        return self.stages(data, [seed])[0][0]

    def stages(self, data: str, seeds: Sequence[int]) -> list[list[Trial]]:
        """The backbones of some seeds, by learning rate."""
        return [
            [Trial(pretrained.backbone(data, rate, seed)) for seed in seeds]
            for rate in pretrained.CANDIDATES
        ]


_SMALL = ("breastmnist", "retinamnist")
GRIDS: Mapping[str, Grid] = {
    "medmnist": Grid((*_SMALL, "pneumoniamnist", "bloodmnist_like"), seeds=16),
    # A seed takes a few minutes less than on the larger sets, so more pairs fit into the time.
    "small": Grid(_SMALL, seeds=32),
    "learning_rates": LearningRateGrid(
        tuple(pretrained.RECIPES),
        seeds=len(pretrained.SELECTION_SEEDS),
        first_seed=pretrained.SELECTION_SEEDS[0],
        arms=pretrained.ARMS,
    ),
    "pretrained": PretrainedGrid(
        tuple(pretrained.RECIPES), seeds=pretrained.LOOKS[0], arms=pretrained.ARMS
    ),
    # The pairs of the verdict of docs/protocol.md, section 2.
    "full_length": Grid(
        full_length.full_sets(),
        seeds=full_length.PLAN[full_length.full_sets()[0]][0],
        arms=full_length.ARMS,
    ),
    "phantom": Grid(
        ("phantom",),
        seeds=2,
        model="vgg11",
        width=0.1,
        epochs=2,
        more=2,
        arms={
            "finetune": Treatment(),
            "inmerge": Treatment("merge", threshold=-1.0, skip=4),
            "inmerge, adaptive": Treatment("merge", quantile=0.5, skip=4),
            "released": Treatment("released", threshold=-1.0, partner="random", skip=4),
        },
    ),
}
"""By name; "phantom" trains on images made on the spot, to check that everything runs."""
