"""Reads the listing of a program compiled for TPU: collectives, and what main memory moves."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

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
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_ARRAY_TYPE = re.compile(r"[a-z]\w*\[[^\]]*\](?:\{[^{}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_CALLS = ("while", "conditional", "call")
# These name, group or wait for what others move.
_MOVES_NOTHING = (
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier"
).split()


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Number and bytes of the collectives in a compiled module's text, by kind.

    The bytes are those of the results; an asynchronous operation counts where it starts, and its
    result alone, which comes after the operand in the tuple that starts it.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _COLLECTIVE.findall(text):
        arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind != "all-reduce":
            arrays = _started(arrays)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(arrays)
    return found


def _started(arrays: list[int]) -> list[int]:
    """The results among a starting operation's operands, results and 4-byte context values."""
    arrays = [size for size in arrays if size > 4] or arrays
    return arrays[len(arrays) // 2 :]


class Operation(NamedTuple):
    """One line of a listing: its name, the text of its result's type, its kind, and so on.

    Attributes:
      name: without the percent sign.
      type: arrays with their layouts, of which S(1) is the chip's fast memory.
      kind: such as fusion.
      operands: names.
      called: names of the computations that it runs.
    """

    name: str
    type: str
    kind: str
    operands: Sequence[str]
    called: Sequence[str]


def main_memory_bytes(text: str) -> int:
    """What a compiled module's operations read from and write to the chip's main memory.

    An operation counts every operand and result that is not in the chip's fast memory, once and
    whole, so also where a fusion reads a part of it; of a copy or slice that is started, each end.
    The body of a loop counts once.
    """
    computations, entry = _computations(text)
    total, left, seen = 0, [entry], set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        types = {operation.name: operation.type for operation in computations[name]}
        for operation in computations[name]:
            left += operation.called
            total += _moved(operation, types)
    return total


def _computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """Operations by computation, and the name of the computation that is run."""
    found: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (start := _LINE.match(line)):
            current.append(_operation(start[1], line[start.end() :]))
    return found, entry


def _operation(name: str, text: str) -> Operation:
    kind_at = _closed(text, 0) if text[0] == "(" else _ARRAY_TYPE.match(text).end()
    opcode = _OPCODE.match(text, kind_at)
    end = _closed(text, opcode.end() - 1)
    called: list[str] = []
    if opcode[1] in _CALLS:
        for names in _CALLED.findall(text[end:]):
            called += re.findall(r"[\w.-]+", names)
    operands = re.findall(r"%([\w.-]+)", text[opcode.end() : end])
    return Operation(name, text[:kind_at], opcode[1], operands, called)


def _closed(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def _moved(operation: Operation, types: Mapping[str, str]) -> int:
    kind = operation.kind
    if kind in _MOVES_NOTHING or kind in _CALLS or kind.endswith("-done"):
        return 0
    results = list(_arrays(operation.type))
    operands = [array for name in operation.operands for array in _arrays(types[name])]
    if kind == "copy-start":
        results = results[:1]
    elif kind == "slice-start":
        results = results[-2:-1]
        operands = [(results[0][0], main) for _, main in operands]
    elif kind.endswith("-start") and kind != "all-reduce-start":
        results = results[len(operands) :]
    return sum(size for size, main in (*results, *operands) if main)


def _arrays(type_text: str) -> Iterator[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it is in main memory."""
    for dtype, shape, layout in _ARRAY.findall(type_text):
        yield _bytes(dtype, shape), not re.search(r"S\([1-9]", layout)


def _bytes(dtype: str, shape: str, _layout: str = "") -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
