"""The trials of a grid: which network is trained on what, and how, each known by a hash."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["none", "merge", "any", "least", "noise", "perturb", "ema", "decay"]
RULE = ("probability", "threshold", "quantile", "alpha", "partner", "skip", "every")
_MATTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "merge": RULE,
    "any": RULE,
    "least": RULE,
    "noise": RULE,
    "perturb": RULE,
    "ema": ("decay",),
    "decay": ("decay",),
}
"""Which fields of a treatment decide what it does."""


@dataclass(frozen=True)
class Treatment:
    """What is done in a second stage, beside training on; see `treatments` for each kind.

    Attributes:
      kind: "none" (training alone); "merge"; "any", "least", "noise" and "perturb" (done to the
        kernels that the rule would merge); "ema" (the averaged weights are evaluated); "decay".
      probability, threshold, alpha, partner: of the rule, see `MergeRule`.
      quantile: in place of the threshold, see `inmerge_jax.quantile`.
      skip: conv_kernels that are left alone; the network's half where it has no more than these.
      every: updates from one merge to the next; 0 for once an epoch.
      decay: of "ema" the share of the average that stays at an update; of "decay" the weight decay.
    """

    kind: Kind = "none"
    probability: float = 0.3
    threshold: float = 0.3
    quantile: float | None = None
    alpha: float = 0.8
    partner: Literal["random", "nearest"] = "nearest"
    skip: int = 10
    every: int = 1
    decay: float | None = None

    def described(self) -> dict[str, Any]:
        """The fields that matter to its kind."""
        values = {name: getattr(self, name) for name in _MATTERS[self.kind]}
        if values.get("quantile") is not None:
            del values["threshold"]
        values = {name: value for name, value in values.items() if value is not None}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class Backbone:
    """A first stage: everything that decides its weights.

    Attributes:
      data: name in `datasets.SOURCES`.
      model: of `create_model`.
      seed: of the weights and of the batches.
      epochs: how many.
      width: factor on the channels.
      optimizer: "adam" at 1e-3, or "sgd" at 0.05 with momentum 0.9 and weight decay 1e-4; either
        with the MedMNIST benchmark's recipe in all else.
      learning_rate: of the first epoch, in place of the optimizer's own.
      stem: of the network.
    """

    data: str
    model: str
    seed: int
    epochs: int
    width: float = 1.0
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float | None = None
    stem: Literal["small", "imagenet"] = "small"

    @property
    def rate(self) -> float:
        """Of the first epoch."""
        return self.learning_rate or {"adam": 1e-3, "sgd": 0.05}[self.optimizer]


@dataclass(frozen=True)
class Trial:
    """One training: a backbone, or a second stage that goes on from its best checkpoint.

    Attributes:
      backbone: what it is, or starts from.
      arm: how tables call it; the hash does not depend on it.
      epochs: of the second stage; 0 for the backbone itself.
      learning_rate: of the second stage's first epoch.
      treatment: what the second stage does beside training.
    """

    backbone: Backbone
    arm: str = "backbone"
    epochs: int = 0
    learning_rate: float = 1e-4
    treatment: Treatment = field(default_factory=Treatment)

    @property
    def is_backbone(self) -> bool:
        """Whether it is the first stage."""
        return self.epochs == 0

    def described(self) -> dict[str, Any]:
        """Everything that decides the result, for JSON."""
        found: dict[str, Any] = {"backbone": dataclasses.asdict(self.backbone)}
        found["backbone"] |= {
            "width": float(self.backbone.width),
            "learning_rate": self.backbone.rate,
        }
        # Not named where it is small, as in the hashes of trials stored before this field existed.
        if self.backbone.stem == "small":
            del found["backbone"]["stem"]
        if not self.is_backbone:
            found |= {
                "epochs": self.epochs,
                "learning_rate": self.learning_rate,
                "treatment": self.treatment.described(),
            }
        return found

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits of `described`."""
        text = json.dumps(self.described(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """For people."""
        start = self.backbone
        width = "" if start.width == 1 else f" x{start.width:g}"
        sgd = " sgd" if start.optimizer == "sgd" else ""
        return f"{start.data} {start.model}{width}{sgd} seed {start.seed} {self.arm}"

    def first(self) -> "Trial":
        """The trial of its backbone; itself where it is one."""
        return self if self.is_backbone else Trial(self.backbone)


def with_dependencies(trials: Iterable[Trial]) -> list[Trial]:
    """The trials, each once, every backbone before the first trial that starts from it."""
    found: dict[str, Trial] = {}
    for trial in trials:
        for one in (trial.first(), trial):
            found.setdefault(one.hash, one)
    return list(found.values())
