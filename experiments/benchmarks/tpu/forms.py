"""Compiles each implementation of the merge for TPU, without a step, and stores the counts.

Run `PYTHONPATH=build/tpu-check python -m experiments.benchmarks.tpu.forms` after `make tpu-check`.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import machine, measured_on
from experiments.benchmarks.tpu.compile import CLASSES, WITHOUT_TPU, need_libtpu
from inmerge_jax import MergeRule, deep_kernels, merge_kernels
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.reporting.tables import markdown_rows

RESULTS = Path(__file__).parents[2] / "results"
OUTPUT = RESULTS / "tpu_forms.json"
TOPOLOGY = "v5e:2x2"
NETWORKS = (("resnet18", "small", 28), ("vgg19", "imagenet", 224))
FORMS = {"reference": "reference", "rows": "auto", "Pallas": "tpu"}


def count(model: str, stem: Any, size: int, partner: Any, form: Any, device: Any) -> dict[str, Any]:
    """The compiler's counts for one merge of all but the first ten convolutions."""
    network = create_model(model, CLASSES, stem=stem)
    kernels = [
        dataclasses.replace(kernel, path=(jax.tree_util.DictKey(kernel.name),))
        for kernel in deep_kernels(find_units(network, (size, size, 3), ("kernels",)), skip=10)
    ]
    sharding = jax.sharding.SingleDeviceSharding(device)
    params = {
        kernel.name: jax.ShapeDtypeStruct(kernel.shape, jnp.float32, sharding=sharding)
        for kernel in kernels
    }
    rule = MergeRule(partner=partner)

    def merge(params: Any) -> Any:
        return merge_kernels(params, jax.random.key(0), kernels, rule, implementation=form)

    cost = jax.jit(merge, donate_argnums=0).lower(params).compile().cost_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values())
    return {"bytes": cost["bytes accessed"], "flops": cost["flops"], "weights": weights}


def markdown(path: Path = OUTPUT) -> str:
    """The stored counts, also as shares of the plain training step's."""
    stored = json.loads(path.read_bytes())
    steps = json.loads((RESULTS / "tpu_check.json").read_bytes())
    columns = (
        *("merge", "form", "passes over the weights"),
        *("GB moved", "of the step", "GFLOP", "of the step"),
    )
    lines = []
    for row in stored["rows"]:
        step = steps[f"{row['model']} {row['size']} px, {TOPOLOGY}, plain"]
        shares = (row["bytes"] / step["bytes_moved"], row["flops"] / step["flops"])
        lines.append(
            (
                f"{row['model']} {row['size']} px, {row['partner']}",
                row["form"],
                f"{row['bytes'] / row['weights']:.1f}",
                f"{row['bytes'] / 1e9:.2f}",
                f"{shares[0]:.2%}",
                f"{row['flops'] / 1e9:.2f}",
                f"{shares[1]:.2%}",
            )
        )
    table = markdown_rows(columns, lines, "llrrrrr")
    return f"{table}\n\nCompiled on {measured_on([stored['machine']])}.\n"


def main() -> int:
    """Compiles every form for every network and partner; returns 0, or 2 without libtpu."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        need_libtpu()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.update(WITHOUT_TPU)
    from jax.experimental import topologies

    device = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices[0]
    rows = []
    for model, stem, size in NETWORKS:
        for partner in ("random", "nearest"):
            for name, form in FORMS.items():
                found = count(model, stem, size, partner, form, device)
                rows.append(
                    {"model": model, "size": size, "partner": partner, "form": name} | found
                )
                print(rows[-1], flush=True)
    write_json(OUTPUT, {"topology": TOPOLOGY, "machine": machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
