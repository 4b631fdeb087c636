"""Trials: what is trained on which data, and how; each is identified by a hash."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "none", "merge", "released", "variant", "any", "least", "noise", "perturb", "ema", "decay"
]
RULE = ("probability", "threshold", "quantile", "alpha", "partner", "skip", "every")
_MATTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "merge": RULE,
    "released": RULE,
    "variant": (*RULE, "until", "along", "layers"),
    "any": RULE,
    "least": RULE,
    "noise": RULE,
    "perturb": RULE,
    "ema": ("decay",),
    "decay": ("decay",),
}
"""The fields of a treatment that have an effect, by kind; `EVALUATION` has one on all."""
EVALUATION = ("average", "statistics")


@dataclass(frozen=True)
class Treatment:
    """The intervention of a second stage; see `treatments` and `variants` for each kind.

    Attributes:
      kind: "none" (fine-tuning); "merge"; "released" (merges before each validation image too, as
        the released code does); "variant" (merges as the last fields say); the controls "any",
        "least", "noise" and "perturb", which act on the kernels that the rule would merge; "ema"
        (evaluates averaged weights); "decay".
      probability, threshold, alpha, partner: see `MergeRule`; of a variant also "mutual": a kernel
        merges with its nearest if each is the other's nearest.
      quantile: replaces the threshold, see `inmerge_jax.quantile`.
      skip: number of first convolutions that are not merged; half of the network's convolutions
        if it has no more than these.
      every: merge at every so many updates; 0 for once per epoch.
      decay: decay of the average ("ema"), or weight decay ("decay").
      until: fraction of the updates after which nothing merges any more.
      along: what is mixed with a kernel: nothing ("kernel"), scale and bias of its batch
        normalization ("norm"), or these and the input channels of the convolution that reads it
        ("consumer"; only the first convolutions of residual blocks merge).
      layers: "deep" (see `skip`), or "redundant": at each update, the half of all layers whose
        kernels are most similar to their nearest, relative to random kernels of the same size.
      average: decay of averaged weights, which are evaluated; None for none.
      statistics: "running", or "renewed": batch statistics are re-estimated on the training images
        before each evaluation.
    """

    kind: Kind = "none"
    probability: float = 0.3
    threshold: float = 0.3
    quantile: float | None = None
    alpha: float = 0.8
    partner: Literal["random", "nearest", "mutual"] = "nearest"
    skip: int = 10
    every: int = 1
    decay: float | None = None
    until: float = 1.0
    along: Literal["kernel", "norm", "consumer"] = "kernel"
    layers: Literal["deep", "redundant"] = "deep"
    average: float | None = None
    statistics: Literal["running", "renewed"] = "running"

    def described(self) -> dict[str, Any]:
        """The fields that have an effect."""
        values = {name: getattr(self, name) for name in _MATTERS[self.kind]}
        if values.get("quantile") is not None:
            del values["threshold"]
        if values.get("layers") == "redundant":
            del values["skip"]
        # Not named by default, as in the hashes of trials stored before these fields existed.
        for name in EVALUATION:
            if getattr(self, name) != getattr(Treatment, name):
                values[name] = getattr(self, name)
        values = {name: value for name, value in values.items() if value is not None}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class Backbone:
    """A first stage: everything that its weights depend on.

    Attributes:
      data: key of `datasets.SOURCES`.
      model: name of `create_model`.
      seed: of the weights and the batches.
      epochs: number of epochs; 0 if second stages start from new weights, so that they are the only
        stage.
      width: factor on the channels.
      optimizer: "adam" at 1e-3, or "sgd" at 0.05 with momentum 0.9 and weight decay 1e-4; all else
        as in the MedMNIST benchmark.
      learning_rate: of the first epoch; default: see `optimizer`.
      stem: form of the first layers.
      weights: "random", or "edges": the file `stages.EDGES`, a VGG16 with ImageNet weights that was
        fine-tuned for edge detection.
      images: number of training images, drawn with the seed, and the most validation images; None
        for all.
      wrong_labels: fraction of the training labels that are replaced by another class.
      class_weights: "balanced": the loss weights each class by the inverse of its images, in the
        second stages too. None: it does not.
    """

    data: str
    model: str
    seed: int
    epochs: int
    width: float = 1.0
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float | None = None
    stem: Literal["small", "imagenet"] = "small"
    weights: Literal["random", "edges"] = "random"
    images: int | None = None
    wrong_labels: float = 0.0
    class_weights: Literal["balanced"] | None = None

    @property
    def rate(self) -> float:
        """Learning rate of the first epoch."""
        return self.learning_rate or _RATES[self.optimizer]


_RATES = {"adam": 1e-3, "sgd": 0.05}
ADDED_LATER = ("stem", "weights", "images", "wrong_labels", "class_weights")
"""Fields of a backbone that stored trials need not have."""


@dataclass(frozen=True)
class Trial:
    """One training: a backbone, or a stage from its best checkpoint or from new weights.

    Attributes:
      backbone: the first stage.
      arm: name in tables; not part of the hash.
      epochs: of the second stage; 0 for a backbone.
      learning_rate: of the second stage's first epoch.
      treatment: of the second stage.
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
        """Everything that the result depends on, JSON-ready."""
        found: dict[str, Any] = {"backbone": dataclasses.asdict(self.backbone)}
        found["backbone"] |= {
            "width": float(self.backbone.width),
            "learning_rate": self.backbone.rate,
        }
        # Not named by default, as in the hashes of trials stored before these fields existed.
        for name in ADDED_LATER:
            if getattr(self.backbone, name) == getattr(Backbone, name):
                del found["backbone"][name]
        if not self.is_backbone:
            found |= {
                "epochs": self.epochs,
                "learning_rate": self.learning_rate,
                "treatment": self.treatment.described(),
            }
        return found

    @property
    def hash(self) -> str:
        """The first ten hexadecimal digits of the SHA-256 of `described`."""
        text = json.dumps(self.described(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """For people."""
        start = self.backbone
        edges = " pretrained" if start.weights == "edges" else ""
        width = "" if start.width == 1 else f" x{start.width:g}"
        sgd = " sgd" if start.optimizer == "sgd" else ""
        rate = "" if start.rate == _RATES[start.optimizer] else f" lr {start.rate:g}"
        few = "" if start.images is None else f" {start.images} images"
        wrong = f" {start.wrong_labels:.0%} wrong" if start.wrong_labels else ""
        balanced = " balanced" if start.class_weights else ""
        where = f"{start.data}{few}{wrong}{balanced} {start.model}{width}{edges}{sgd}{rate}"
        return f"{where} seed {start.seed} {self.arm}"

    def first(self) -> "Trial":
        """The trial that it starts from; itself if it starts from new weights."""
        return Trial(self.backbone) if self.epochs and self.backbone.epochs else self


def with_dependencies(trials: Iterable[Trial]) -> list[Trial]:
    """The trials without repetition, each backbone before the first trial that starts from it."""
    found: dict[str, Trial] = {}
    for trial in trials:
        for one in (trial.first(), trial):
            found.setdefault(one.hash, one)
    return list(found.values())
