"""What the command prints and publishes: tables of its results, for the terminal and Markdown."""

import collections
import io
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from experiments.benchmarks.accelerator import pytorch, train_step
from experiments.benchmarks.accelerator.session import PARTS, read_part, say
from experiments.benchmarks.accelerator.source import ROOT, commit_of
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, write_json, write_text
from inmerge_jax.reporting.tables import Table, markdown_table

LINES = 60
"""The most lines of a summary."""
RESULTS = ROOT / "experiments" / "results"
PAGE = "docs/performance.md"
PUBLISHED = ("correctness", "merge", "step")
_TIMES = "\u00d7"


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder holds, by part.

    Raises:
      UsageError: it holds nothing of this command, or a file is damaged.
    """
    found = {part: read_part(folder, part) for part in PARTS}
    found = {part: value for part, value in found.items() if value is not None}
    if not found:
        raise UsageError(f"{folder} holds no results of python -m experiments.accelerator")
    return found


def any_failed(folder: Path) -> bool:
    """Whether a case raised an exception, or a result is not as exact as it must be."""
    return bool(failures(read_folder(folder)))


def failures(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each case, or part of one, that failed: its name and the exception."""
    lines = []
    for part, value in found.items():
        for name, traceback in value["failed"].items():
            lines.append(f"{part}: {name}: {_last_line(traceback)}")
        for name, case in value["cases"].items():
            if case.get("passed") is False:
                lines.append(f"{part}: {name}: exceeds its limit")
            for what, traceback in case.get("failed", {}).items():
                lines.append(f"{part}: {name}: {what}: {_last_line(traceback)}")
    return lines


def skipped(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each part with cases that were not measured."""
    lines = []
    for part, value in found.items():
        names = list(value["skipped"])
        names += [
            f"{name}: {what}"
            for name, case in value["cases"].items()
            for what in case.get("skipped", {})
        ]
        if names:
            lines.append(f"skipped in {part} ({len(names)}): {'; '.join(names)}")
    return lines


def _last_line(traceback: str) -> str:
    return traceback.strip().splitlines()[-1]


def summary(folder: Path) -> list[str]:
    """At most `LINES` lines for the terminal."""
    found = read_folder(folder)
    lines = [machine(next(iter(found.values())))]
    builders = (("correctness", correctness), ("merge", merges_short), ("step", steps))
    for part, build in builders:
        if found.get(part, {"cases": {}})["cases"]:
            lines += to_lines(build(found[part]))
    if found.get("trials", {"cases": {}})["cases"]:
        lines += to_lines(trials(found["trials"]))
    wrong = [f"FAILED {line}"[:160] for line in failures(found)]
    last = [*wrong, *(line[:300] for line in skipped(found)), f"results in {folder}"]
    room = LINES - len(last[-10:])
    if len(lines) > room:
        lines = [*lines[: room - 1], "further rows are in the JSON files"]
    return [*lines, *last[-10:]]


def to_lines(table: Table) -> list[str]:
    """A table for the terminal, without boxes."""
    drawn = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=160).print(drawn)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def machine(part: Mapping[str, Any]) -> str:
    """Device, driver, versions, commit and date in one line."""
    around = part["environment"]
    words = [
        f"{part['devices']} x {part['device']}",
        f"driver {part['driver']}" if part["driver"] else None,
        around["processor"] and f"host {around['cpus']} cores of {around['processor']}",
        f"Python {around['python']}",
        *(
            f"{name} {around['packages'][name]}"
            for name in ("jax", "torch")
            if name in around["packages"]
        ),
        f"commit {(part['commit'] or 'unknown')[:10]}",
        around["started"][:10],
        "TINY SIZES, no measurement" if part["tiny"] else None,
    ]
    return ", ".join(filter(None, words))


def correctness(part: Mapping[str, Any]) -> Table:
    """One row per check."""
    rows = []
    for name, case in part["cases"].items():
        if name == "precision":
            errors = case["errors"]
            error = f"{errors['default']:.1e}; highest {errors['highest']:.1e}"
            kind = "reduced" if case["reduced_precision_by_default"] else "float32"
            rows.append((f"matrix product by default: {kind}", error, "", "", "", _passed(case)))
            continue
        error = f"{case['error']:.1e}"
        for key, words in (("error_bfloat16", "bfloat16"), ("error_after_ten", "after ten steps")):
            if key in case:
                error += f"; {words} {case[key]:.1e}"
        limits = (
            {case["limit"]} if "limit" in case else {r["limit"] for r in case["weights"].values()}
        )
        differ = case.get("decisions_differ", "")
        rows.append(
            (
                name,
                error,
                "; ".join(f"{limit:.0e}" for limit in sorted(limits)),
                str(case.get("merged", "")),
                str(differ),
                _passed(case),
            )
        )
    columns = ("check", "relative error", "limit", "merged", "decisions that differ", "")
    return _table("Correctness against the CPU backend and the oracle", columns, rows)


def _passed(case: Mapping[str, Any]) -> str:
    return "passed" if case["passed"] else "FAILED"


def _networks(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: case for name, case in part["cases"].items() if "merges" in case}


def merges_short(part: Mapping[str, Any]) -> Table:
    """One row per network: milliseconds of each merge, and PyTorch's fastest form over JAX."""
    rows, columns = [], ["one merge, ms", "lower bound"]
    for name, case in _networks(part).items():
        bound = case["bound_seconds"]
        row = [name, "" if bound is None else f"{1000 * bound:.3g}"]
        for which, merge in case["merges"].items():
            if which not in columns:
                columns.append(which)
            theirs = min(merge["speedup"].values(), default=None)
            beside = "" if theirs is None else f" (PyTorch {_TIMES}{theirs:.2g})"
            row.append(f"{1000 * merge['seconds']['JAX']['median']:.3g}{beside}")
        rows.append(tuple(row))
    return _table("Cost of a merge", columns, rows)


def merges(part: Mapping[str, Any]) -> Table:
    """One row per network and merge, with every contender."""
    names = (pytorch.LOOP, pytorch.VECTORISED, pytorch.GRAPH)
    rows = []
    for name, case in _networks(part).items():
        for which, merge in case["merges"].items():
            over = merge["over_bound"]
            rows.append(
                (
                    f"{name}: {which}",
                    str(case["layers"]),
                    f"{1000 * merge['seconds']['JAX']['median']:.3g}",
                    "" if over is None else f"{over:.3g}",
                    *(_milliseconds(merge["seconds"].get(one)) for one in names),
                )
            )
    columns = ("network, partner, threshold", "layers", "JAX, ms", "of lower bound", *names)
    title = "One merge of a network's deep layers, median; PyTorch in ms"
    return _table(title, columns, rows)


def _milliseconds(one: Mapping[str, float] | None) -> str:
    return "" if one is None else f"{1000 * one['median']:.3g}"


def steps(part: Mapping[str, Any]) -> Table:
    """One row per training step."""
    rows = []
    for name, case in train_step.combined(part["cases"]).items():
        plain = case["seconds_per_call"][train_step.PLAIN]["median"]
        beside = case["pytorch_over_jax"]
        met = train_step.targets(case)
        rows.append(
            (
                name,
                f"{case['images'] / plain:,.0f}",
                f"{case['merging_over_plain']['median'] - 1:+.1%}{_mark(met['merging'])}",
                *(
                    f"{beside[one]['median']:.2f}{_mark(met['pytorch'])}" if one in beside else ""
                    for one in (train_step.EAGER, train_step.COMPILED)
                ),
                _gib(case, train_step.PLAIN, train_step.MERGING),
                _gib(case, train_step.EAGER, train_step.COMPILED),
                " / ".join(f"{seconds:.0f}" for seconds in case["compile_seconds"].values()),
            )
        )
    columns = (
        "training step",
        "images/s",
        "merging",
        "eager / JAX",
        "torch.compile / JAX",
        "peak GiB",
        "PyTorch",
        "compile, s",
    )
    return _table("Training step; * misses its target", columns, rows)


def _mark(met: bool | None) -> str:
    return "*" if met is False else ""


def _gib(case: Mapping[str, Any], *names: str) -> str:
    peaks = [case["peak_bytes"].get(name) for name in names]
    return " / ".join(f"{peak / 2**30:.2f}" for peak in peaks if peak is not None)


def trials(part: Mapping[str, Any]) -> Table:
    """One row per data set: test AUC of backbone and finetune, and the arms minus finetune."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for case in part["cases"].values():
        for record in case.get("records", {}).values():
            start = record["config"]["backbone"]
            by_arm = found.setdefault(start["data"], collections.defaultdict(dict))
            by_arm[record["arm"]][start["seed"]] = record["result"]["test"]["auc"]
    arms = list(dict.fromkeys(arm for by_arm in found.values() for arm in by_arm))
    others = [arm for arm in arms if arm not in ("backbone", "finetune")]
    rows = []
    for data, by_arm in found.items():
        row = [data, str(len(by_arm["backbone"]))]
        row += [f"{np.mean(list(by_arm[arm].values())):.3f}" for arm in ("backbone", "finetune")]
        for arm in others:
            gaps = [value - by_arm["finetune"][seed] for seed, value in by_arm[arm].items()]
            spread = f" sd {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
            row.append(f"{np.mean(gaps):+.4f}{spread}")
        rows.append(tuple(row))
    columns = ("trials, test AUC", "seeds", "backbone", "finetune")
    return _table("Trials", (*columns, *(f"{arm} - finetune" for arm in others)), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(title, tuple(columns), tuple(rows), ("arm",) * len(rows))


def import_folder(folder: Path, results: Path = RESULTS, *, tiny: bool = False) -> int:
    """Adds a folder of results to those of the project, and writes the page.

    Everything is checked before anything is written. Trials that are stored already stay as they
    are.

    Args:
      folder: of the command's results.
      results: of the project.
      tiny: whether results at tiny sizes may be imported.

    Returns:
      0.

    Raises:
      UsageError: the folder holds nothing, a damaged file, tiny sizes, or results of source code
        that no commit of this checkout has.
    """
    from experiments.benchmarks.accelerator import trials as trials_part

    found = read_folder(folder)
    first = next(iter(found.values()))
    for part, value in found.items():
        if value["tiny"] and not tiny:
            raise UsageError(f"{folder}: {part}.json was measured at tiny sizes, for a check only")
        if (value["source"], value["device"]) != (first["source"], first["device"]):
            raise UsageError(f"{folder}: {part}.json is of other source code or another device")
    commit = commit_of(first["source"])
    if commit is None:
        raise UsageError(
            f"{folder}: measured with source code that none of this checkout's last commits has; "
            "commit before you measure, and import where that commit is"
        )
    arrays: dict[str, np.ndarray] = {}
    new = trials_part.stored_records(found.get("trials", {"cases": {}}))
    if new:
        arrays = read_arrays(folder / "trials.npz", "copy the folder again")
        missing = [one for one in new if f"scores-{one}" not in arrays]
        if missing:
            raise UsageError(f"{folder}: trials.npz has no scores of {', '.join(missing)}")
    place = results / "accelerator" / f"{_slug(first['device'])}-{commit[:10]}"
    for part in PUBLISHED:
        if part in found:
            write_json(place / f"{part}.json", {**_publishable(found[part]), "commit": commit})
    added = trials_part.import_records(new, arrays, commit, results)
    say(f"imported {folder} (commit {commit[:10]}) into {place}; {added} new trials")
    write_page(results)
    return 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _publishable(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without what names folders of the machine: commands, and tracebacks but their end."""
    around = {name: value for name, value in part["environment"].items() if name != "command"}
    cases = {
        name: {**case, "failed": {k: _last_line(v) for k, v in case["failed"].items()}}
        if case.get("failed")
        else case
        for name, case in part["cases"].items()
    }
    failed = {name: _last_line(traceback) for name, traceback in part["failed"].items()}
    return {**part, "environment": around, "cases": cases, "failed": failed}


def write_page(results: Path = RESULTS) -> None:
    """Writes the tables of `PAGE`, where it is the page of these results."""
    if results != RESULTS:
        return
    from experiments import tables

    path = ROOT / PAGE
    write_text(path, tables.render(path.read_text(), PAGE))
    print(f"written to {PAGE}", file=sys.stderr)


def markdown(results: Path = RESULTS) -> str:
    """All stored results of parts 1 to 3, the newest first."""
    stored = [read_folder(folder) for folder in sorted((results / "accelerator").glob("*/"))]
    stored.sort(key=lambda one: next(iter(one.values()))["environment"]["started"], reverse=True)
    parts = []
    if all(part["platform"] == "cpu" for one in stored for part in one.values()):
        parts.append("No result of an accelerator is stored yet.")
    for found in stored:
        first = next(iter(found.values()))
        parts.append(f"### {first['device']}\n\n{machine(first)}.")
        for name, build in (("correctness", correctness), ("merge", merges), ("step", steps)):
            if found.get(name, {"cases": {}})["cases"]:
                parts.append(markdown_table(build(found[name])))
        parts += _ceilings(found.get("merge", {"cases": {}}))
        parts += _profiles(found.get("step", {"cases": {}}))
        parts += [f"FAILED {line}" for line in failures(found)]
        parts += [f"{line[0].upper()}{line[1:]}." for line in skipped(found)]
    return "\n\n".join(parts) + "\n"


def _ceilings(part: Mapping[str, Any]) -> list[str]:
    found = part["cases"].get("ceilings")
    if found is None:
        return []
    rates = [found[f"{kind}_flops_per_second"] / 1e12 for kind in ("float32", "bfloat16")]
    return [
        f"Measured ceilings: a copy moves {found['copy_bytes_per_second'] / 1e9:,.0f} GB/s, bytes "
        f"read and written; a large matrix product runs at {rates[0]:.3g} TFLOP/s in float32 and "
        f"{rates[1]:.3g} TFLOP/s in bfloat16."
    ]


def _profiles(part: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, case in part["cases"].items():
        for who, found in case.get("profile", {}).items():
            rows = [
                (operation, f"{milliseconds:.3f}", f"{runs:g}")
                for operation, milliseconds, runs in found["operations"]
            ]
            if rows:
                title = f"{name}, {who}: operations of {found['milliseconds']:.2f} ms a call"
                table = _table(title, ("operation", "ms", "runs"), rows)
                parts.append(markdown_table(table))
    return parts
