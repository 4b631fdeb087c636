"""What merging may add to a training step on TPU, and where a network's step adds more."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""What `tpu_compile.compile_case` gave of one case."""

CHIP_GIB = {"v5e": 16, "v6e": 32}
FLOPS, BYTES, LAYERS = 0.01, 0.02, 1.0
MAIN_MEMORY = "bytes of main memory"
TEMPORARY, PEAK = "temporary memory", "memory at its fullest"


@dataclass(frozen=True)
class Known:
    """A limit that a network's step cannot keep, the one that is held instead, and why."""

    limit: float
    why: str


TWO_PASSES = (
    "the merged weights are read and written once more, and a step on 64 images of 28 px moves "
    "little else"
)
ALL_PAIRS = (
    "comparing all pairs of the deep kernels takes 9.7 GFLOP, beside 149 for 64 images of 28 px"
)
ALL_OF_50 = "comparing all pairs of the deep kernels takes 39 GFLOP, beside 1,521 for 64 images"
SCANNED = "in the loop a step without merging moves 5 % less than alone, one with merging 4 % less"
PACKING = (
    "gaps in the compiler's plan, which are others in every program; what is alive at the fullest "
    "moment is in the next column"
)
KNOWN: dict[tuple[str, str, str], Known] = {
    ("resnet18 28 px", "random", MAIN_MEMORY): Known(0.105, TWO_PASSES),
    ("resnet18 28 px", "nearest", MAIN_MEMORY): Known(0.105, TWO_PASSES),
    ("resnet18 28 px", "nearest", "FLOPs"): Known(0.07, ALL_PAIRS),
    ("resnet18 28 px, 4 steps a call", "random", "bytes moved"): Known(0.025, SCANNED),
    ("resnet18 28 px, 4 steps a call", "random", MAIN_MEMORY): Known(0.105, TWO_PASSES),
    ("resnet18 28 px, 4 steps a call", "nearest", MAIN_MEMORY): Known(0.105, TWO_PASSES),
    ("resnet18 28 px, 4 steps a call", "nearest", "bytes moved"): Known(0.025, SCANNED),
    ("resnet18 28 px, 4 steps a call", "nearest", "FLOPs"): Known(0.07, ALL_PAIRS),
    ("resnet50 224 px", "nearest", "FLOPs"): Known(0.03, ALL_OF_50),
    ("resnet50 224 px", "random", TEMPORARY): Known(4.0, PACKING),
    ("resnet50 224 px", "nearest", TEMPORARY): Known(4.0, PACKING),
    ("densenet121 224 px", "random", TEMPORARY): Known(7.0, PACKING),
    ("densenet121 224 px", "nearest", TEMPORARY): Known(7.0, PACKING),
}
"""Limits that do not hold, by network (and chip, where it has its own), partner and quantity."""


@dataclass(frozen=True)
class Comparison:
    """A step with merging against the same step without.

    Attributes:
      row: with merging.
      plain: without.
    """

    row: Row
    plain: Row

    @property
    def network(self) -> str:
        """For people; with the steps in one dispatch where they are several."""
        steps = self.row["steps_per_call"]
        calls = "" if steps == 1 else f", {steps} steps a call"
        return f"{self.row['model']} {self.row['size']} px{calls}"

    @property
    def flops(self) -> float:
        """Share of the plain step's floating-point operations that merging adds."""
        return self.row["flops"] / self.plain["flops"] - 1

    @property
    def bytes_moved(self) -> float:
        """Share of the plain step's bytes that merging adds."""
        return self.row["bytes_moved"] / self.plain["bytes_moved"] - 1

    @property
    def main_memory(self) -> float:
        """The same of main memory alone."""
        return self.row["main_memory_bytes"] / self.plain["main_memory_bytes"] - 1

    @property
    def temporary(self) -> int:
        """Bytes of temporary memory that merging adds to a chip; negative where it takes less."""
        return self.row["memory"]["temp"] - self.plain["memory"]["temp"]

    @property
    def peak(self) -> int:
        """The same of what is alive at the fullest moment."""
        return self.row["memory"]["peak"] - self.plain["memory"]["peak"]

    def added(self) -> tuple[tuple[str, float, float], ...]:
        """Each quantity, what merging adds of it, and the usual limit.

        FLOPs and bytes as shares of the plain step's, memory in weights of the largest layer.
        """
        layer = self.row["largest_merged_layer_bytes"]
        return (
            ("FLOPs", self.flops, FLOPS),
            ("bytes moved", self.bytes_moved, BYTES),
            (MAIN_MEMORY, self.main_memory, BYTES),
            (TEMPORARY, self.temporary / layer, LAYERS),
            (PEAK, self.peak / layer, LAYERS),
        )

    def failures(self) -> Iterator[str]:
        """What merging adds beyond its limits, in words."""
        name = f"{self.network}, {self.row['topology']}, {self.row['step']}"
        if self.row["collectives"] != self.plain["collectives"]:
            yield f"{name}: collectives differ from those of the plain step"
        for quantity, more, limit in self.added():
            known = self.known(quantity)
            limit = limit if known is None else known[1].limit
            if more > limit:
                yield f"{name}: {amount(quantity, more)} more {quantity}, above " + amount(
                    quantity, limit
                )

    def known(self, quantity: str) -> tuple[str, Known] | None:
        """The limit held in place of the usual one, after the name that it is listed by."""
        for name in (f"{self.network}, {chip_of(self.row)}", self.network):
            known = KNOWN.get((name, self.row["step"], quantity))
            if known is not None:
                return name, known
        return None


def amount(quantity: str, value: float) -> str:
    """An amount of `Comparison.added`, for people."""
    if quantity in (TEMPORARY, PEAK):
        return f"{value:.3g} layers' weights"
    return f"{100 * value:.3g} %"


def comparisons(rows: Mapping[str, Row]) -> list[Comparison]:
    """Each compiled step with merging beside its plain one."""
    return [
        Comparison(row, plain)
        for row in rows.values()
        if row["step"] != "plain"
        and (plain := plain_of(row, rows)) is not None
        and row["compiles"]
        and plain["compiles"]
    ]


def plain_of(row: Row, rows: Mapping[str, Row]) -> Row | None:
    """The step without merging that `row` is compared with; None where there is none."""
    same = ("model", "size", "topology", "images", "steps_per_call")
    for other in rows.values():
        if other["step"] == "plain" and all(other[key] == row[key] for key in same):
            return other
    return None


def chip_of(row: Row) -> str:
    """The chip's generation, such as v5e."""
    return row["topology"].partition(":")[0]


def failures(rows: Mapping[str, Row]) -> list[str]:
    """All that is not as it is to be, in words.

    Programs that do not compile or fit, that have none to be compared with, or that add too much.
    """
    found = []
    for name, row in rows.items():
        chip = CHIP_GIB[chip_of(row)] * 2**30
        if not row["compiles"]:
            found.append(f"{name}: does not compile: {row['reason']}")
        elif row["memory"]["total"] > chip:
            found.append(f"{name}: takes {row['memory']['total']:,} bytes of a chip's {chip:,}")
        if plain_of(row, rows) is None:
            found.append(f"{name}: no step without merging to compare it with; compile that too")
    return found + [text for pair in comparisons(rows) for text in pair.failures()]
