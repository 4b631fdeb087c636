"""The HTML report of a run, one self-contained file."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from inmerge_jax.files import write_errors, write_text
from inmerge_jax.modality import SIZE_UNITS
from inmerge_jax.reporting import plots, tables
from inmerge_jax.reporting.runs import Run, number
from inmerge_jax.training.metrics import METRICS


def write_report(run: Run, report: tables.Report) -> Path:
    """Writes `report.html` into a finished run's folder.

    Returns:
      Path of the report, a file without external resources.

    Raises:
      UsageError: the file cannot be written.
    """
    path = run.folder / "report.html"
    page = render(run, report)
    with write_errors(path, begun=False):
        write_text(path, page)
    return path


def render(run: Run, report: tables.Report) -> str:
    """The report's HTML."""
    environment = Environment(
        loader=PackageLoader("inmerge_jax.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=run.dataset.get("title") or run.dataset["name"],
        css=Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        svg=lambda plot: Markup(plot.svg),
        breakable=breakable,
        zip=zip,
        report=report,
        facts=facts(run),
        warnings=warnings(run),
        modality=run.modality,
        examples=run.examples,
        samples=samples(run),
        signals=plots.signal_plots(run),
        curves=plots.training_plots(run),
        merges=plots.merge_plots(run),
        no_merges="The arm inmerge had no layer to merge in."
        if any(not result["layers"] for result in run.arm("inmerge").values())
        else "No merges to draw: the arm inmerge was not run or left no metrics.jsonl.",
        similarity=plots.similarity_plots(run),
        segmentation=run.segmentation,
        last=plots.outline_plots(run) if run.segmentation else plots.roc_plots(run),
        settings=[
            ("Configuration", list(flatten(run.config))),
            ("Environment", list(flatten(run.environment))),
        ],
    )


def breakable(text: str) -> Markup:
    """The text with line breaks allowed after "/", or else after "_"."""
    mark = "/" if "/" in text else "_"
    return escape(text).replace(mark, Markup(f"{mark}<wbr>"))


def facts(run: Run) -> list[str]:
    """Data, network, seeds and time, for the line below the headline."""
    counts = run.dataset.get("counts") or {}
    model, seconds = run.results.get("model") or {}, run.results.get("seconds")
    found = [
        " / ".join(f"{counts[split]:,} {split}" for split in counts) + f" {run.examples}"
        if counts
        else "",
        f"{run.dataset['size']} {SIZE_UNITS[run.modality]}" if "size" in run.dataset else "",
        run.dataset.get("task", ""),
        model.get("name", "") + (f" width {model['width']}" if model.get("width", 1) != 1 else ""),
        f"seeds {', '.join(map(str, run.seeds))}",
        f"{seconds:,.0f} s in all" if isinstance(seconds, int | float) else "",
        f"source: {run.dataset['source']}" if run.dataset.get("source") else "",
    ]
    return [fact for fact in found if fact]


def warnings(run: Run) -> list[str]:
    """Missing arms and files, undefined metrics, and the warnings of the run."""
    found = [part[0].upper() + part[1:] + "." for part in run.missing]
    for arm in run.arms:
        for seed, result in run.arm(arm).items():
            found += [f"{arm}, seed {seed}: {text}" for text in result.get("warnings") or ()]
        results, main = run.arm(arm).items(), run.metrics[0]
        empty = [str(s) for s, r in results if not math.isfinite(number(r["test"][main]))]
        if empty:
            name = METRICS[main]
            found.append(f"{arm}: the test {name} is undefined for seed {', '.join(empty)}.")
    return found


def samples(run: Run) -> list[tuple[str, str]]:
    """(label, PNG data URI) of each sample image, or middle slice of a sample volume."""
    if run.samples is None or run.modality == "signal":
        return []
    images, names = run.samples["images"], run.samples["names"]
    return [(str(name), _png(image)) for image, name in zip(images, names, strict=True)]


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested configuration as (dotted name, text) pairs."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and any(isinstance(part, Mapping) for part in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{name}.{index}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield name, ", ".join(map(str, value)) or "none"
    elif name:
        yield name, "none" if value is None or value == {} else str(value)


def _png(image: np.ndarray) -> str:
    pixels = np.asarray(image, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
