"""Counts the collectives in the text of a program compiled for TPU."""

import math
import re

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind -> number of collectives ("count") and size of their results ("bytes").

    An asynchronous collective is counted at its start, whose tuple holds operands, results and
    4-byte context values.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _COLLECTIVE.findall(text):
        arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind != "all-reduce":
            arrays = [size for size in arrays if size > 4] or arrays
            arrays = arrays[len(arrays) // 2 :]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(arrays)
    return found


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
