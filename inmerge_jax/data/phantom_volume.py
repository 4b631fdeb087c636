"""A procedural chest phantom in three dimensions: synthetic CT volumes with known findings.

Body coordinates, all from -1 to 1: w from head to feet, v from front to back, u across (the
patient's right is negative). Brightness: 0 for air, about 0.5 for soft tissue, 0.9 for bone.
"""

import math

import numpy as np

from inmerge_jax.data.anatomy import FINDINGS
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.phantom import PREVALENCE, check_phantom, classes_and_task
from inmerge_jax.data.splitting import SPLITS

_TEXTURE_GRID = 6
_VESSELS = 5
_TISSUE, _LUNG, _FLUID = 0.45, 0.14, 0.42


def make_phantom_volume(
    *,
    size: int = 28,
    train: int = 2000,
    val: int = 500,
    test: int = 1000,
    findings: tuple[str, ...] = FINDINGS,
    multi_label: bool = False,
    difficulty: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Generates grey chest volumes, deterministically from the arguments.

    Pose, lungs, heart, spine, ribs, aorta, vessels, exposure and noise vary between volumes.
    Findings range from obvious to invisible, and vessels and small scars imitate nodules, so that
    no classifier can be perfect. Volume i of a split depends on the seed, the split and i, not on
    the number of volumes; its anatomy does not depend on the size.

    Args:
      size: depth, height and width in voxels, at least 16.
      train: number of training volumes, at least 1.
      val: number of validation volumes, at least 1.
      test: number of test volumes, at least 1.
      findings: a subset of `FINDINGS`.
      multi_label: each finding is present with probability 0.3 (labels uint8 (n, k)), instead of
        one finding or "no finding" with equal probability (labels int32 (n,), 0 is none).
      difficulty: 0.25 to 4; divides the contrast or extent of findings and multiplies the noise.
      seed: random seed, at least 0.

    Returns:
      The data set "phantom3d", volumes uint8 (n, size, size, size, 1). With one finding and without
      `multi_label` the task is binary-class.

    Raises:
      UsageError: a number is out of range, or a finding is unknown or repeated.
    """
    counts = {"train": train, "val": val, "test": test}
    check_phantom(size, counts, findings, difficulty, seed)
    classes, task = classes_and_task(findings, multi_label)
    parts = {}
    for number, split in enumerate(SPLITS):
        volumes = np.empty((counts[split], size, size, size, 1), np.uint8)
        labels = np.empty((counts[split], len(findings)), np.uint8)
        for index in range(counts[split]):
            rng = np.random.default_rng([seed, number, index, 3])
            draws = rng.random(len(FINDINGS) + 1)
            if multi_label:
                labels[index] = draws[[FINDINGS.index(name) for name in findings]] < PREVALENCE
            else:
                chosen = int(draws[-1] * (len(findings) + 1))
                labels[index] = np.arange(1, len(findings) + 1) == chosen
            shown = {name for name, one in zip(findings, labels[index], strict=True) if one}
            volumes[index, ..., 0] = _render(size, shown, difficulty, rng)
        if not multi_label:
            labels = np.where(labels.any(1), 1 + labels.argmax(1), 0).astype(np.int32)
        parts[split] = Split(volumes, labels)
    return Dataset(
        name="phantom3d",
        size=size,
        task=task,
        classes=classes,
        source=f"procedural chest phantom of volumes, seed {seed}, difficulty {difficulty:g}",
        **parts,
    )


class _Body:
    """Coordinates of the voxels in a patient's posture: w (s, 1, 1), v and u (1, s, s)."""

    def __init__(self, size: int, rng: np.random.Generator):
        axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1)[:, None]
        depth, back, across = (
            (axis - rng.normal(0, 0.05)) / _about(rng, 1, 0.05) for _ in range(3)
        )
        angle = rng.normal(0, 0.12)
        cos, sin = math.cos(angle), math.sin(angle)
        self.voxel = 2 / size
        self.w = depth[:, :, None]
        self.v = (cos * back - sin * across.T)[None]
        self.u = (cos * across.T + sin * back)[None]

    def inside(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float]
    ) -> np.ndarray:
        """An ellipsoid with an edge of about two voxels, 0 to 1."""
        return self.edge((1 - self._squares(centre, radii)) * (min(radii) / 2))

    def blob(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float]
    ) -> np.ndarray:
        """A Gaussian, 1 in the centre."""
        return np.exp(-self._squares(centre, radii))

    def tube(
        self, centre: tuple[float, float, float], along: tuple[float, float, float], radius: float
    ) -> np.ndarray:
        """A Gaussian around a line, which fades at a third of the body."""
        w, v, u = (x - c for x, c in zip((self.w, self.v, self.u), centre, strict=True))
        place = along[0] * w + (along[1] * v + along[2] * u)
        across = (w * w + (v * v + u * u)) - place * place
        return np.exp(-across / radius**2 - np.square(place / 0.33))

    def edge(self, distance: np.ndarray) -> np.ndarray:
        """0 to 1 as a distance passes from one voxel below 0 to one above."""
        return np.clip(distance / (2 * self.voxel) + 0.5, 0, 1)

    def _squares(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float]
    ) -> np.ndarray:
        (w, v, u), (a, b, c) = centre, radii
        plane = np.square((self.v - v) / b) + np.square((self.u - u) / c)
        return np.square((self.w - w) / a) + plane


def _about(rng: np.random.Generator, mean: float, deviation: float) -> float:
    """A normal number, cut at 2.5 deviations so that no volume falls apart."""
    return mean + deviation * min(max(rng.normal(), -2.5), 2.5)


def _render(size: int, shown: set[str], difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """One volume, uint8 (size, size, size); draws the same numbers whatever it shows."""
    body = _Body(size, rng)
    severity = {name: rng.random() ** 1.2 for name in FINDINGS}
    strength = {
        name: (0.2 + 0.8 * severity[name]) / difficulty if name in shown else 0.0
        for name in FINDINGS
    }
    rim = np.square(body.v / _about(rng, 0.66, 0.03)) + np.square(body.u / _about(rng, 0.9, 0.03))

    heart_size = _about(rng, 0.28, 0.025) + 0.14 * strength["cardiomegaly"]
    heart = body.inside(
        (_about(rng, 0.2, 0.04), _about(rng, -0.12, 0.03), _about(rng, 0.1, 0.03)),
        (heart_size * 1.15, heart_size * 0.9, heart_size),
    )
    aorta = body.inside((0, _about(rng, 0.24, 0.02), _about(rng, 0.09, 0.02)), (9, 0.08, 0.08))
    centres, lungs = [], []
    base = _about(rng, 0.55, 0.06)
    for side in (-1, 1):
        centre = (_about(rng, -0.05, 0.03), _about(rng, 0.02, 0.02), side * _about(rng, 0.43, 0.02))
        radii = (_about(rng, 0.8, 0.04), _about(rng, 0.47, 0.03), _about(rng, 0.33, 0.02))
        dome = 0.9 * np.square(body.u - centre[2]) + 0.5 * np.square(body.v - centre[1])
        lungs.append(body.inside(centre, radii) * body.edge(base - 0.12 + dome - body.w))
        centres.append(centre)

    def place(spread: float = 0.55) -> tuple[tuple[float, float, float], int]:
        """A place in one of the lungs, and which."""
        side = int(rng.random() < 0.5)
        w, v, u = (2 * rng.random() - 1 for _ in range(3))
        c = centres[side]
        return (c[0] + 0.7 * spread * w, c[1] + 0.5 * spread * v, c[2] + 0.35 * spread * u), side

    markings = np.zeros((size,) * 3, np.float32)
    for _ in range(_VESSELS):
        along = rng.normal(size=3)
        along = (along / np.linalg.norm(along)).tolist()
        width, bright = 0.03 + 0.03 * rng.random(), 0.2 + 0.2 * rng.random()
        markings += bright * body.tube(place(0.8)[0], tuple(along), width)
    scar, width = (0.15 + 0.25 * rng.random()) * (rng.random() < 0.4), 0.05 + 0.03 * rng.random()
    opacity = scar * body.blob(place()[0], (width,) * 3)
    for name, width, bright in (("nodule", 0.09, 0.55), ("mass", 0.2, 0.4)):
        radii = tuple(width * (0.8 + 0.5 * rng.random()) for _ in range(3))
        opacity += bright * strength[name] * body.blob(place()[0], radii)

    side, level = int(rng.random() < 0.5), base - 0.05 - 0.45 * strength["effusion"]
    tilt = _about(rng, 0.35, 0.08)
    depth = body.w + tilt * (body.v - centres[side][1]) - level
    fluid = lungs[side] * body.edge(depth) * ("effusion" in shown)
    side = int(rng.random() < 0.5)
    front = 0.5 * body.w + 0.8 * body.v + 0.75 - 0.5 * strength["pneumothorax"]
    collapsed = lungs[side] * body.edge(-front) * ("pneumothorax" in shown)

    air = np.maximum(*lungs) * (1 - heart) * (1 - aorta) * (1 - fluid)
    ribs = np.exp(-np.square((rim - 0.74) / 0.07)) * np.square(
        np.cos(9 * body.w + _about(rng, 2, 0.4) * body.v + 6 * rng.random())
    )
    spine = np.exp(-np.square((body.v - 0.43) / 0.13) - np.square(body.u / 0.13))
    spine = spine * (1 + 0.15 * np.cos(16 * body.w + 6 * rng.random()))
    tissue = _TISSUE + 0.05 * heart + 0.05 * aorta + 0.3 * ribs + 0.4 * spine
    tissue = tissue - 0.1 * np.clip((rim - 0.82) * 10, 0, 1) + (_FLUID - _TISSUE) * fluid
    lung = _about(rng, _LUNG, 0.015) + (markings + opacity) * (1 - collapsed) - 0.1 * collapsed
    volume = body.edge(0.4 * (1 - rim)) * (tissue + air * (lung - tissue) + 0.25 * opacity)

    volume += 0.03 * _smooth(rng.standard_normal((_TEXTURE_GRID,) * 3, np.float32), size)
    gain, offset = _about(rng, 1, 0.06), _about(rng, 0.06, 0.015)
    volume = gain * volume + offset
    volume += 0.045 * difficulty * rng.standard_normal((size,) * 3, np.float32)
    return np.clip(np.round(255 * volume), 0, 255).astype(np.uint8)


def _smooth(grid: np.ndarray, size: int) -> np.ndarray:
    """Enlarges (g, g, g) linearly to (size, size, size)."""
    where = np.linspace(0, len(grid) - 1, size)[:, None]
    weights = np.maximum(0, 1 - np.abs(where - np.arange(len(grid)))).astype(np.float32)
    return np.einsum("ai,bj,ck,ijk->abc", weights, weights, weights, grid, optimize=True)
