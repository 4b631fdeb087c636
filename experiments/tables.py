"""Writes the tables of README.md and docs from experiments/results, and the figures of the results.

python -m experiments.tables                     rewrite the tables between their markers
python -m experiments.tables --figures FOLDER    write an SVG per page of results; check the tables
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments import first_look
from experiments.benchmarks import batch_statistics
from experiments.benchmarks.accelerator import page as accelerator
from experiments.benchmarks.timing import measured_on
from experiments.benchmarks.tpu import check as tpu_check
from experiments.benchmarks.tpu import forms as tpu_forms
from experiments.benchmarks.tpu import table as tpu_table
from experiments.reliability import fault_injection
from experiments.study import archive, power, presets
from experiments.study.questions import (
    QUESTIONS,
    better_rule,
    full_length,
    pretrained,
    scarce,
)
from inmerge_jax.cli import input_speed
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_text
from inmerge_jax.reporting.tables import markdown_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES_OF_RESULTS = ROOT / "docs" / "results"
PUBLISHED = {
    name: question
    for name, question in QUESTIONS.items()
    if (PAGES_OF_RESULTS / question.page).exists()
}
"""Questions that have a page; the trials of the others are still under way."""


@functools.cache
def analysis(name: str) -> dict[str, Any]:
    """Every published number of one question of the study, computed from the stored trials.

    Raises:
      UsageError: trials of the question are missing, so that its page cannot be written.
    """
    question, stored = QUESTIONS[name], archive.read()
    if not question.is_complete(stored):
        raise UsageError(
            f"docs/results/{question.page}: {len(question.left(stored))} trials of {name} are not "
            "stored; remove the page, or train and import them"
        )
    return question.analyse(stored)


def question_table(name: str) -> str:
    """The table of a question, and what its training took."""
    question = QUESTIONS[name]
    table = question.table(analysis(name))
    records = [archive.read().records[trial.hash] for trial in question.stored(archive.read())]
    if not records:
        return table
    hours = sum(record["result"]["seconds"] for record in records) / 3600
    dates = sorted(record["trained"]["started"][:10] for record in records)
    cores = sorted({str(record["trained"]["cpus"]) for record in records})
    plural = "" if cores == ["1"] else "s"
    return (
        f"{table}\n*{len(records)} trials, {hours:.1f} h of training on {' or '.join(cores)} CPU "
        f"core{plural}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.*\n"
    )


def overview() -> str:
    """One row per question."""
    rows = []
    for question in PUBLISHED.values():
        shown = question.overview(analysis(question.name))
        rows.append((f"[{question.title}]({question.page})", question.hypothesis, *shown))
    columns = ("Question", "Hypothesis", "Effect [95 %]", "Pairs", "Verdict")
    return markdown_rows(columns, rows, "l" * len(columns)) + "\n"


def published_records() -> dict[str, dict[str, Any]]:
    """The stored trials of the published questions, by hash."""
    stored = archive.read()
    trials = {trial.hash for question in PUBLISHED.values() for trial in question.stored(stored)}
    return {one: record for one, record in stored.records.items() if one in trials}


def totals() -> str:
    """Number of trainings of the published questions, and their time."""
    records = published_records().values()
    hours = sum(record["result"]["seconds"] for record in records) / 3600
    return (
        f"{len(records)} trials, each counted once, took {hours:.1f} h on one or two CPU cores.\n"
    )


def benchmark_table(path: Path, earlier: Path) -> str:
    """The benchmark's rows as Markdown; those without a target are there for information.

    Args:
      path: what the benchmark stored.
      earlier: what it stored on another machine, for the last column.
    """
    stored, before = (json.loads(one.read_bytes()) for one in (path, earlier))
    stored = {name: part for name, part in stored.items() if name not in ("arms", "families")}
    old = {(row["name"], row["quantity"]): row for part in before.values() for row in part["rows"]}
    met = {True: "yes", False: "**no**", None: ""}
    columns = ("measured", "quantity", "value", "target", "met", "earlier")
    lines = []
    for section in stored.values():
        for row in section["rows"]:
            same = old.get((row["name"], row["quantity"]))
            before_it = ""
            if same is not None:
                before_it = f"{same['value']:.3g}{' (**not met**)' if same['met'] is False else ''}"
            value = (row["quantity"], f"{row['value']:.3g}", row["target"] or "", met[row["met"]])
            lines.append((row["name"], *value, before_it))
    where = [
        f"{what}: {measured_on(part['environment'] for part in sections.values())}."
        for what, sections in (("Measured on", stored), ("Earlier", before))
    ]
    table = markdown_rows(columns, lines, "l" * len(columns))
    return f"{table}\n\n{' '.join(where)}\n"


def arms_table(path: Path) -> str:
    """A row per network of the study: cost of each merging arm, compilation and memory."""
    section = json.loads(path.read_bytes())["arms"]
    lines = []
    for name, rows in _by_case(section).items():
        *ratios, plain, merging, memory, more = rows
        compilation = f"{plain['value']:.0f}, {merging['value']:.0f}"
        size = f"{memory['value']:.0f}, {more['value']:.3f}"
        step = _time(ratios[0]["seconds"]["plain"]["median"])
        lines.append((name, step, *map(_ratio, ratios), compilation, size))
    arms = [row["quantity"].partition(" / ")[0] for row in ratios]
    columns = ("network", "fine-tuning, per update", *(f"{arm} / fine-tuning" for arm in arms))
    more_columns = (
        f"compilation in s: fine-tuning, {arms[0]}",
        f"memory: MB, {arms[0]} / fine-tuning",
    )
    where = measured_on([section["environment"]])
    table = markdown_rows((*columns, *more_columns), lines, "l" + "r" * (len(lines[0]) - 1))
    return f"{table}\n\nMeasured on {where}.\n"


def _by_case(section: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in section["rows"]:
        found.setdefault(row["name"].removeprefix("step, "), []).append(row)
    return found


def _ratio(row: dict[str, Any]) -> str:
    """The median ratio over rounds, with its 95 % interval of the binomial distribution."""
    above, below = (times["all"] for times in row["seconds"].values())
    found = stats.quantile_test(np.divide(above, below), p=0.5).confidence_interval(0.95)
    return f"{row['value']:.3f} [{found.low:.3f}, {found.high:.3f}]"


def families_table(path: Path) -> str:
    """A row per network other than image CNNs: rate, cost of merging, compilation and memory."""
    section = json.loads(path.read_bytes())["families"]
    lines = []
    for name, rows in _by_case(section).items():
        cost, alone, rate, plain, merging, memory, more = rows
        step = _time(cost["seconds"]["plain"]["median"])
        ratio = f"{cost['value']:.3f} ({cost['low']:.3f} to {cost['high']:.3f})"
        compilation = f"{plain['value']:.0f}, {merging['value']:.0f}"
        size = f"{memory['value']:.0f}, {more['value']:.3f}"
        missed = " (**above 1 %**)" if alone["met"] is False else ""
        share = f"{alone['value']:.1%}{missed}"
        lines.append((name, step, _rate(rate["value"]), share, ratio, compilation, size))
    columns = (
        *("network", "step", "examples/s", "merge alone, of a step", "merging / plain (range)"),
        *("compilation in s: plain, merging", "memory: MB, merging / plain"),
    )
    where = measured_on([section["environment"]])
    return f"{markdown_rows(columns, lines, 'lrrrrrr')}\n\nMeasured on {where}.\n"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def chestxray14_input(path: Path) -> str:
    """Images per second of ChestX-ray14's input, as Markdown."""
    rows = input_speed.rows(json.loads(path.read_bytes()))
    return markdown_rows(input_speed.COLUMNS, rows) + "\n"


@functools.cache
def first_looks() -> dict[str, Any]:
    """The stored first looks at networks beyond image CNNs."""
    return json.loads(first_look.RESULTS.read_bytes())


FURTHER: dict[str, dict[str, Callable[[], str]]] = {
    "pretrained-layers.md": {
        "pretrained_merges": lambda: pretrained.merges_table(analysis("pretrained")),
        "pretrained_similarity": lambda: pretrained.similarity_table(analysis("pretrained")),
    },
    "full-length.md": {
        "full_length_short": lambda: full_length.short_table(analysis("full_length")),
        "full_length_merged": lambda: full_length.merged_table(analysis("full_length")),
    },
    "scarce.md": {
        "scarce_strengths": lambda: scarce.strengths_table(archive.read()),
        "scarce_merged": lambda: scarce.merged_table(analysis("scarce")),
    },
    "better-rule.md": {
        "better_rule_search": lambda: better_rule.search_table(archive.read()),
        "better_rule_merged": lambda: better_rule.merged_table(analysis("better_rule")),
    },
}
"""Tables of pages of results besides those of `question_table`; their pages may not exist yet."""
FURTHER = {page: made for page, made in FURTHER.items() if (PAGES_OF_RESULTS / page).exists()}


def _kills(path: Path) -> str:
    return fault_injection.markdown(json.loads(path.read_bytes()))


SOURCES: dict[str, Callable[[], str]] = {
    "benchmark": lambda: benchmark_table(
        RESULTS / "benchmark.json", RESULTS / "benchmark_earlier.json"
    ),
    "arms": lambda: arms_table(RESULTS / "benchmark.json"),
    "families": lambda: families_table(RESULTS / "benchmark.json"),
    "recompute_batch_stats": lambda: batch_statistics.markdown(
        json.loads(batch_statistics.RESULTS.read_bytes())
    ),
    "first_look_answers": lambda: first_look.answers(first_looks()),
    "first_look_similarity": lambda: first_look.similarities(first_looks()),
    "first_look_machine": lambda: first_look.provenance(first_looks()),
    "presets": lambda: presets.table(json.loads((RESULTS / "fidelity.json").read_bytes())),
    **{
        name: functools.partial(_kills, RESULTS / f"{name}.json")
        for name in ("kills", "kills_bucket")
    },
    "chestxray14_input": lambda: chestxray14_input(RESULTS / "chestxray14_input.json"),
    "tpu_check": lambda: tpu_table.markdown(
        tpu_check.read(RESULTS / "tpu_check.json"), [case.name for case in tpu_check.CASES]
    ),
    "tpu_forms": tpu_forms.markdown,
    "accelerator": accelerator.markdown,
    "main": lambda: pretrained.short_table(analysis("pretrained")),
    "overview": overview,
    "totals": totals,
    "power": lambda: power.table({"": power.PLANNED}),
    "power_spread": lambda: power.spread_table(archive.read()),
    "power_current": lambda: power.table(
        power.designs(archive.read()), [(0.0, 0.0), (0.0, 0.003), (0.005, 0.0)]
    ),
    "power_further": lambda: power.further_table(archive.read()),
    "power_better_rule": power.table_of_the_test,
    "pretrained_rates": lambda: pretrained.rates_table(archive.read()),
    **{name: functools.partial(question_table, name) for name in PUBLISHED},
    **{table: make for made in FURTHER.values() for table, make in made.items()},
}
PAGES = {
    "README.md": ("main",),
    "docs/trainer.md": ("recompute_batch_stats",),
    "docs/interruptions.md": ("kills", "kills_bucket"),
    "docs/chestxray14.md": ("chestxray14_input",),
    "docs/tpu.md": ("tpu_check", "tpu_forms"),
    accelerator.PAGE: ("accelerator", "benchmark", "arms", "families"),
    "docs/protocol.md": (
        *("pretrained_rates", "power", "power_better_rule"),
        *("power_spread", "power_current", "power_further"),
    ),
    "docs/results/index.md": ("overview", "totals", "presets"),
    "docs/results/beyond-convolutions.md": (
        *("first_look_answers", "first_look_machine", "first_look_similarity"),
    ),
    **{f"docs/results/{page}": tuple(made) for page, made in FURTHER.items()},
    **{
        f"docs/results/{question.page}": (name, *FURTHER.get(question.page, {}))
        for name, question in PUBLISHED.items()
    },
}


def render(text: str, page: str = "README.md") -> str:
    """`text` with new tables between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
      UsageError: a table of the page has no such markers in `text`.
    """
    for name in PAGES[page]:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise UsageError(f"{page} needs the lines {begin.strip()} and {end}, each once")
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        before, after = place.split(text)
        text = f"{before}{begin}\n{SOURCES[name]()}\n{end}{after}"
    return text


def figures() -> dict[str, str]:
    """File name to SVG: one figure for each page of results."""
    plots = {
        question.page.removesuffix(".md"): question.figure(analysis(name))
        for name, question in PUBLISHED.items()
    }
    plots["beyond-convolutions"] = first_look.figure(first_looks())
    return {
        f"{name}.svg": plot.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        + "\n"
        for name, plot in plots.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Rewrites the pages, or writes the figures; returns 0, or 2 on bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if words[:1] == ["--figures"] and len(words) == 2:
            for name, svg in figures().items():
                write_text(Path(words[1]) / name, svg)
            for page in PAGES:
                text = (ROOT / page).read_text()
                if render(text, page) != text:
                    raise UsageError(
                        f"{page}: its tables are not those of experiments/results; run python -m "
                        "experiments.tables"
                    )
        elif words:
            raise UsageError(f"{' '.join(words)}: the only option is --figures FOLDER")
        else:
            for page in PAGES:
                write_text(ROOT / page, render((ROOT / page).read_text(), page))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
