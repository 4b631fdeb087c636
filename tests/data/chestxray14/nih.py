"""A small folder as NIH's is laid out: radiographs of noise, labels and lists."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from inmerge_jax.data.chestxray14.build import Request, build
from inmerge_jax.data.chestxray14.labels import FINDINGS, read_labels
from inmerge_jax.data.chestxray14.manifest import read_manifest
from inmerge_jax.data.chestxray14.splits import assign

IMAGES, PATIENTS, PIXELS = 60, 20, 40
HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age".split(",")


def rows(count=IMAGES, patients=PATIENTS):
    """Name, findings and patient of each image; the findings take turns, some have two, or none."""
    found = []
    for index in range(count):
        patient = 51 + index * patients // count
        names = [FINDINGS[index % 14]] + [FINDINGS[(index + 5) % 14]] * (index % 3 == 0)
        text = "No Finding" if index % 5 == 4 else "|".join(names)
        found.append((f"{patient:08}_{index:03}.png", text, index, patient, 50))
    return found


def write_labels(path, table=None, header=HEADER):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *(rows() if table is None else table)])
    return path


def pixels(index, size=PIXELS):
    return np.random.default_rng(index).integers(0, 256, (size, size), dtype=np.uint8)


def write_lists(folder, labels, gz=False):
    """NIH's and the reproductions' lists, by the hash of the patients."""
    parts = assign("patient_hash", read_labels(labels), None)
    known = read_labels(labels).names
    names = {part: [known[row] for row in chosen] for part, chosen in parts.items()}
    lists = {f"{part}_list.txt": found for part, found in names.items()}
    lists["train_val_list.txt"] = names["train"] + names["val"]
    for name, found in lists.items():
        data = ("\n".join(found) + "\n").encode()
        path = folder / (f"{name}.gz" if gz else name)
        path.write_bytes(gzip.compress(data) if gz else data)


def make_nih(folder: Path, *, flat=False, gz=False, size=PIXELS) -> Path:
    labels = folder / f"Data_Entry_2017_v2020.csv{'.gz' if gz else ''}"
    write_labels(labels)
    for index, (name, *_) in enumerate(rows()):
        place = folder if flat else folder / f"images_{1 + index // 25:03}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(index, size)).save(place / name)
    write_lists(folder, labels, gz)
    return folder


def request(folder, output, **changes):
    """Builds at 32 px in this process, without lists."""
    found = {
        "images": folder,
        "labels": folder,
        "split": "patient_hash",
        "lists": None,
        "size": 32,
        "output": output,
        "workers": 1,
    }
    return Request(**found | changes)


def make(folder, output, **changes):
    """Builds quietly; what was made and what was said."""
    text = io.StringIO()
    return build(request(folder, output, **changes), Console(file=text, width=200)), text.getvalue()


def content(output):
    """The manifest without its checksum, and the records' bytes."""
    manifest = read_manifest(output)
    folder = output / manifest["records"]
    return manifest, {name: (folder / name).read_bytes() for name in manifest["shards"]}
