"""Limits on what merging adds to a training step on TPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""The result of `compile.compile_case` for one case."""

CHIP_GIB = {"v5e": 16, "v6e": 32}
FLOPS = {"random": 0.01, "nearest": 0.07}
"""Largest share of FLOPs added, by partner; `nearest` compares all pairs of a layer's kernels."""
BYTES = 0.03
"""Largest share of bytes accessed added."""


@dataclass(frozen=True)
class Comparison:
    """A step with merging and the same step without.

    Attributes:
      row: step with merging.
      plain: step without merging.
    """

    row: Row
    plain: Row

    @property
    def flops(self) -> float:
        """FLOPs added, as a share of the plain step's."""
        return self.row["flops"] / self.plain["flops"] - 1

    @property
    def bytes_accessed(self) -> float:
        """Bytes accessed added, as a share of the plain step's."""
        return self.row["bytes_moved"] / self.plain["bytes_moved"] - 1

    @property
    def peak(self) -> int:
        """Bytes of peak memory added to a chip; negative where merging needs less."""
        return self.row["memory"]["peak"] - self.plain["memory"]["peak"]

    def failures(self) -> Iterator[str]:
        """Describes every limit violation."""
        if self.row["collectives"] != self.plain["collectives"]:
            yield "collectives differ from those of the plain step"
        limit = FLOPS[self.row["step"]]
        if self.flops > limit:
            yield f"{self.flops:.1%} more FLOPs, above {limit:.0%}"
        if self.bytes_accessed > BYTES:
            yield f"{self.bytes_accessed:.1%} more bytes accessed, above {BYTES:.0%}"
        layer = self.row["largest_merged_layer_bytes"]
        if self.peak > layer:
            yield f"{self.peak:,} bytes more peak memory, above the largest layer's {layer:,}"


def comparisons(rows: Mapping[str, Row]) -> dict[str, Comparison]:
    """Name -> comparison of each compiled step with merging that has a compiled plain step."""
    pairs = {
        name: Comparison(row, plain)
        for name, row in rows.items()
        if row["step"] != "plain" and (plain := plain_of(row, rows)) is not None
    }
    return {k: x for k, x in pairs.items() if x.row["compiles"] and x.plain["compiles"]}


def plain_of(row: Row, rows: Mapping[str, Row]) -> Row | None:
    """The step without merging to compare `row` with; None if there is none."""
    same = ("model", "size", "topology", "images", "steps_per_call")
    for other in rows.values():
        if other["step"] == "plain" and all(other[key] == row[key] for key in same):
            return other
    return None


def chip_gib(row: Row) -> int:
    """Memory of one chip of the row's topology, in GiB."""
    return CHIP_GIB[row["topology"].partition(":")[0]]


def failures(rows: Mapping[str, Row]) -> list[str]:
    """Describes programs that do not compile, do not fit, or violate a limit."""
    found, pairs = [], comparisons(rows)
    for name, row in rows.items():
        size = chip_gib(row) * 2**30
        if not row["compiles"]:
            found.append(f"{name}: does not compile: {row['reason']}")
        elif row["memory"]["total"] > size:
            found.append(f"{name}: takes {row['memory']['total']:,} bytes of a chip's {size:,}")
        if plain_of(row, rows) is None:
            found.append(f"{name}: no step without merging to compare it with; compile that too")
        if name in pairs:
            found += [f"{name}: {text}" for text in pairs[name].failures()]
    return found
