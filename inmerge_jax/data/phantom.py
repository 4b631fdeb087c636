"""A procedural chest phantom: synthetic radiographs with known findings."""

from typing import NamedTuple

import numpy as np

from inmerge_jax.data.anatomy import (
    FINDINGS,
    NORMALS,
    ORGANS,
    TEXTURE_GRIDS,
    UNIFORMS,
    Draws,
    render,
)
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError

NO_FINDING = "no finding"
SMALLEST = 16
EASIEST, HARDEST = 0.25, 4.0
# Pixels rendered at once: few enough for the intermediate arrays to stay in the cache.
_CHUNK_PIXELS = 200_000
PREVALENCE = 0.3


class _Randomness(NamedTuple):
    """Random numbers of some images; row i depends on (seed, split, i), the grain also on size."""

    labels: np.ndarray
    draws: Draws
    textures: list[np.ndarray]
    grain: np.ndarray


def make_phantom(
    *,
    size: int = 28,
    train: int = 2000,
    val: int = 500,
    test: int = 1000,
    findings: tuple[str, ...] = FINDINGS,
    multi_label: bool = False,
    masks: bool = False,
    difficulty: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Generates grey chest phantoms, deterministically from the arguments.

    Anatomy (lungs, heart, mediastinum, spine, ribs, clavicles, diaphragm, vessels), pose, exposure
    and noise vary between images. Findings range from obvious to invisible, and normal anatomy
    imitates them (nipple shadows, healed ribs, skin folds, breast shadows, fat pads), so that no
    classifier can be perfect.

    Image i of a split depends on the seed, the split and i, not on the number of images. Its
    anatomy does not depend on the size.

    Args:
      size: height and width in pixels, at least 16.
      train: number of training images, at least 1.
      val: number of validation images, at least 1.
      test: number of test images, at least 1.
      findings: a subset of `FINDINGS`.
      multi_label: each finding is present with probability 0.3 (labels uint8 (n, k)), instead of
        one finding or "no finding" with equal probability (labels int32 (n,), 0 is none).
      masks: the labels are masks of the lungs and the heart (uint8 (n, size, size), indices of
        `anatomy.ORGANS`), see `anatomy.render`; the images stay the same.
      difficulty: 0.25 to 4; divides the contrast or extent of findings and multiplies the noise.
      seed: random seed, at least 0.

    Returns:
      The data set "phantom", or "phantom-masks", images uint8 (n, size, size, 1). With one finding
      and without `multi_label` the task is binary-class.

    Raises:
      UsageError: a number is out of range, a finding is unknown or repeated, or both `multi_label`
        and `masks` are given.
    """
    counts = {"train": train, "val": val, "test": test}
    check_phantom(size, counts, findings, difficulty, seed)
    if masks and multi_label:
        raise UsageError(
            "`multi_label` is for labels of images; phantom_masks has masks: leave it out"
        )
    classes, task = classes_and_task(findings, multi_label)
    splits = {
        split: _make_split(
            size,
            count,
            tuple(findings),
            multi_label,
            masks,
            difficulty,
            (seed, SPLITS.index(split)),
        )
        for split, count in counts.items()
    }
    if masks:
        task, classes = "segmentation", ORGANS
    return Dataset(
        name="phantom-masks" if masks else "phantom",
        size=size,
        task=task,
        classes=classes,
        source=f"procedural chest phantom, seed {seed}, difficulty {difficulty:g}",
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
    )


def _make_split(
    size: int,
    count: int,
    findings: tuple[str, ...],
    multi_label: bool,
    masks: bool,
    difficulty: float,
    key: tuple[int, int],
) -> Split:
    images = np.empty((count, size, size, 1), np.uint8)
    organs = np.empty((count, size, size), np.uint8)
    shape, dtype = ((count, len(findings)), np.uint8) if multi_label else ((count,), np.int32)
    labels = np.empty(shape, dtype)
    columns = [FINDINGS.index(finding) for finding in findings]
    chunk = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        random = _draw(key, rows, size)
        present = np.zeros((len(random.labels), len(FINDINGS)), bool)
        if multi_label:
            labels[rows] = random.labels[:, columns] < PREVALENCE
            present[:, columns] = labels[rows]
        else:
            labels[rows] = (random.labels[:, -1] * (len(findings) + 1)).astype(np.int32)
            present[:, columns] = labels[rows, None] == np.arange(1, len(findings) + 1)
        images[rows, ..., 0], organs[rows] = render(
            size, present, difficulty, random.draws, random.textures, random.grain
        )
    return Split(images, organs if masks else labels)


def _draw(key: tuple[int, int], rows: slice, size: int) -> _Randomness:
    """Draws size-independent numbers first, so that all sizes share their anatomy."""
    labels, normals, uniforms, grain = [], [], [], []
    textures: list[list[np.ndarray]] = [[] for _ in TEXTURE_GRIDS]
    for index in range(rows.start, rows.stop):
        rng = np.random.default_rng([*key, index])
        labels.append(rng.random(len(FINDINGS) + 1))
        uniforms.append(rng.random(UNIFORMS, dtype=np.float32))
        normals.append(rng.standard_normal(NORMALS, dtype=np.float32))
        for texture, grid in zip(textures, TEXTURE_GRIDS, strict=True):
            texture.append(rng.standard_normal((grid, grid), dtype=np.float32))
        grain.append(rng.standard_normal((size, size), dtype=np.float32))
    return _Randomness(
        np.stack(labels),
        Draws(np.stack(normals), np.stack(uniforms)),
        [np.stack(texture) for texture in textures],
        np.stack(grain),
    )


def classes_and_task(findings: tuple[str, ...], multi_label: bool) -> tuple[tuple[str, ...], str]:
    """Names of the classes of a phantom with these findings, and its task."""
    if multi_label:
        return tuple(findings), "multi-label, binary-class"
    classes = (NO_FINDING, *findings)
    return classes, "binary-class" if len(classes) == 2 else "multi-class"


def check_phantom(
    size: int, counts: dict[str, int], findings: tuple[str, ...], difficulty: float, seed: int
) -> None:
    """Checks the arguments of a phantom, of images or volumes.

    Raises:
      UsageError: a number is out of range, or a finding is unknown or repeated.
    """
    if size < SMALLEST:
        raise UsageError(f"`size` {size}: the phantom needs at least {SMALLEST}")
    for split, count in counts.items():
        if count < 1:
            raise UsageError(f"`{split}` {count}: a split needs 1 example or more")
    known = ", ".join(FINDINGS)
    if not findings:
        raise UsageError(f"`findings` is empty: name at least one of {known}")
    for finding in findings:
        if finding not in FINDINGS:
            raise UsageError(f"`findings`: unknown finding {finding!r}; there are {known}")
    if len(set(findings)) < len(findings):
        raise UsageError(f"`findings` {', '.join(findings)}: name each once")
    if not EASIEST <= difficulty <= HARDEST:
        raise UsageError(
            f"`difficulty` {difficulty}: give a number from {EASIEST:g} to {HARDEST:g}; 1 is usual"
        )
    if seed < 0:
        raise UsageError(f"`seed` {seed}: give an integer of at least 0")
