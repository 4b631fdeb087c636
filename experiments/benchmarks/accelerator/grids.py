"""Lists of trials for part 4, the most informative first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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
      seeds: of each data set, from 0.
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

    def units(self, together: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Data set and seeds that are trained at once; all data sets before further seeds."""
        for start in range(0, self.seeds, together):
            seeds = tuple(range(start, min(start + together, self.seeds)))
            for data in self.data:
                yield data, seeds

    def backbone(self, data: str, seed: int) -> Trial:
        """The first stage."""
        return Trial(Backbone(data, self.model, seed, self.epochs, self.width))

    def second(self, data: str, seed: int, arm: str) -> Trial:
        """A second stage."""
        start = self.backbone(data, seed).backbone
        return Trial(start, arm, self.more, treatment=self.arms[arm])

    def trials(self) -> Iterator[Trial]:
        """All trials."""
        for data, seeds in self.units(1):
            yield self.backbone(data, seeds[0])
            yield from (self.second(data, seeds[0], arm) for arm in self.arms)


_SMALL = ("breastmnist", "retinamnist")
GRIDS: Mapping[str, Grid] = {
    "medmnist": Grid((*_SMALL, "pneumoniamnist", "bloodmnist_like"), seeds=16),
    # A seed takes a few minutes less than on the larger sets, so more pairs fit into the time.
    "small": Grid(_SMALL, seeds=32),
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
        },
    ),
}
"""By name; "phantom" trains on images made on the spot, to check that everything runs."""
