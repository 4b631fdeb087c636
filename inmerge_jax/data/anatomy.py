"""Draws chest phantoms as sums of soft-edged shapes; `phantom` decides what they show.

Body coordinates: u from -1 to 1 across the image (the patient's right is negative, as radiographs
are read), v from -1 at the top to 1 at the bottom. Brightness: 0 for air, about 1 for bone on
soft tissue. All arrays of one image per row are (n, 1, 1), all maps (n, size, size), float32.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

FINDINGS = ("nodule", "mass", "effusion", "cardiomegaly", "pneumothorax")
ORGANS = ("background", "lung", "heart")
"""Classes of the masks."""
# Random numbers per image: as many as `render` hands out, and a few to spare.
NORMALS, UNIFORMS = 48, 80
TEXTURE_GRIDS = (5, 12, 26)
_TEXTURE_WEIGHTS = (0.018, 0.016, 0.014)


class Draws:
    """Hands out one column after another of the images' random numbers, each as (n, 1, 1)."""

    def __init__(self, normals: np.ndarray, uniforms: np.ndarray):
        self._normals = iter(normals.T[:, :, None, None])
        self._uniforms = iter(uniforms.T[:, :, None, None])

    def normal(self, mean: float, deviation: float) -> np.ndarray:
        """Normal numbers, cut at 2.5 deviations so that no image falls apart."""
        return mean + deviation * np.clip(next(self._normals), -2.5, 2.5)

    def uniform(self, low: float, high: float) -> np.ndarray:
        """Uniform numbers from `low` to `high`."""
        return low + (high - low) * next(self._uniforms)

    def side(self) -> np.ndarray:
        """-1 or 1, equally often."""
        return np.where(next(self._uniforms) < 0.5, np.float32(-1), np.float32(1))

    def chance(self, probability: float) -> np.ndarray:
        """1 with `probability`, else 0."""
        return (next(self._uniforms) < probability).astype(np.float32)

    def severity(self) -> np.ndarray:
        """From 0 to 1, mild more often than severe."""
        return next(self._uniforms) ** 1.2


@dataclass
class _Chest:
    """The maps and measures that later shapes are placed by."""

    u: np.ndarray
    v: np.ndarray
    across: np.ndarray
    pixel: float
    apex: np.ndarray
    middle: np.ndarray
    width: np.ndarray
    wall: np.ndarray
    base: np.ndarray
    dome: np.ndarray
    radius: np.ndarray
    inner: np.ndarray
    cavity: np.ndarray


def render(
    size: int,
    present: np.ndarray,
    difficulty: float,
    draws: Draws,
    textures: list[np.ndarray],
    grain: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Renders n images, and the masks of their lungs and heart.

    Args:
      size: height and width in pixels.
      present: bool (n, 5), which of `FINDINGS` each image shows.
      difficulty: divides contrast and extent of findings, multiplies noise.
      draws: the images' random numbers.
      textures: one (n, g, g) array of normal numbers for each g of `TEXTURE_GRIDS`.
      grain: (n, size, size) normal numbers.

    Returns:
      Images, uint8 (n, size, size).
      Masks, uint8 (n, size, size), indices of `ORGANS`. The lungs are where the chest holds more
      air than tissue, without findings: fluid and collapsed lung are part of them. The heart is its
      ventricles and atrium, without the great vessels; where both overlap, it is heart.
    """
    has = {
        finding: present[:, k, None, None].astype(np.float32) for k, finding in enumerate(FINDINGS)
    }
    chest = _place(size, draws)
    heart, chambers = _heart(chest, has["cardiomegaly"], difficulty, draws)
    air = chest.cavity * (1 - 0.92 * heart)
    masks = np.where(chambers > 0.5, 2, air > 0.5).astype(np.uint8)
    opacity = _lesions(chest, has, difficulty, draws) + _imitations(chest, draws)
    fluid = _effusion(chest, has["effusion"], difficulty, draws)
    collapsed, line = _pneumothorax(chest, has["pneumothorax"], difficulty, draws)
    markings = _vessels(chest, draws) * (1 - collapsed)
    air = air * (1 - fluid)
    tissue = _soft_tissue(chest, heart, draws) + _skeleton(chest, draws)
    depth = 0.34 + 0.10 * np.clip((1 - chest.radius) * 3, 0, 1)
    tissue += air * (markings + opacity - depth * (1 + 0.22 * collapsed)) + line * air
    tissue += 0.25 * opacity * (1 - air) * chest.cavity
    tissue += _folds(chest, draws)
    return _expose(tissue, chest, difficulty, draws, textures, grain), masks


def _step(distance: np.ndarray, softness: np.ndarray | float) -> np.ndarray:
    """0 to 1 as `distance` passes from -softness to softness."""
    t = np.clip(distance * (0.5 / softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _blob(
    u: np.ndarray, v: np.ndarray, width: np.ndarray | float, height: np.ndarray | float
) -> np.ndarray:
    return np.exp(-np.square(u / width) - np.square(v / height))


def _place(size: int, draws: Draws) -> _Chest:
    """Pose, then the thoracic cavity between chest wall, mediastinum and diaphragm."""
    pixel = 2 / size
    axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(pixel) - 1
    x, y = axis[None, None, :], axis[None, :, None]
    angle, zoom = draws.normal(0, 0.035), draws.normal(0.90, 0.045)
    x, y = x - draws.normal(0, 0.045), y - draws.normal(0.05, 0.045)
    u = (np.cos(angle) * x + np.sin(angle) * y) * zoom
    v = (np.cos(angle) * y - np.sin(angle) * x) * zoom
    turned = draws.normal(0, 0.03)
    u = u + turned * (1 - u * u)
    right = _step(-u, 0.02)
    across = np.abs(u)

    apex, width = draws.normal(-0.74, 0.025), draws.normal(0.74, 0.035)
    middle, base = draws.normal(0.18, 0.04), draws.normal(0.53, 0.07)
    above = np.maximum(middle - v, 0) / (middle - apex)
    wall = width * (1 + draws.normal(0, 0.03) * np.sign(u))
    radius = np.sqrt(np.square(across / wall) + above**2.6)
    inner = draws.normal(0.125, 0.015) + 0.13 * np.square(np.maximum(-0.35 - v, 0) / 0.39)
    rise = draws.normal(0.18, 0.035)
    centre = 0.36 + draws.normal(0, 0.03) * np.sign(u)
    level = base - right * draws.normal(0.05, 0.025) + draws.normal(0, 0.025) * np.sign(u)
    dome = level - rise * (1 - np.square((across - centre) / 0.40))
    cavity = (
        _step((1 - radius) * wall, max(0.02, pixel))
        * _step(across - inner, max(0.03, pixel))
        * _step(dome - v, max(0.02, pixel))
    )
    return _Chest(u, v, across, pixel, apex, middle, width, wall, base, dome, radius, inner, cavity)


def _heart(
    chest: _Chest, enlarged: np.ndarray, difficulty: float, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """The heart's shadow with the great vessels above it, and ventricles and atrium, 0 to 1."""
    growth = enlarged * (0.02 + 0.18 * draws.severity()) / difficulty
    wide = draws.normal(0.33, 0.028) + growth
    high = (wide - 0.4 * growth) * draws.normal(0.72, 0.05)
    lean = draws.normal(0.62, 0.09)
    floor = np.minimum(chest.base - 0.22, 0.34) + draws.normal(0, 0.02)
    u, v = chest.u - (draws.normal(0.13, 0.022) + 0.35 * growth), chest.v - floor
    along, aslant = np.cos(lean) * u + np.sin(lean) * v, np.cos(lean) * v - np.sin(lean) * u
    size = np.sqrt(np.square(along / wide) + np.square(aslant / high))
    ventricles = _step((1 - size) * wide, max(0.03, chest.pixel))
    # The right atrium, a bulge of its own on the patient's right.
    u, v = chest.u + draws.normal(0.02, 0.015), v + draws.normal(0.0, 0.02)
    size = np.sqrt(np.square(u / (0.19 + 0.45 * growth)) + np.square(v / 0.27))
    atrium = _step((1 - size) * 0.2, max(0.03, chest.pixel))
    waist = draws.normal(0.14, 0.012) + 0.06 * np.clip(chest.v + 0.1, 0, 0.4)
    vessels = _step(waist - np.abs(chest.u - 0.03), max(0.04, chest.pixel))
    vessels = vessels * _step(chest.v + 0.45, 0.2)
    knob = _blob(chest.u - 0.15, chest.v + draws.normal(0.30, 0.03), 0.08, 0.09)
    chambers = np.maximum(ventricles, atrium)
    shadow = np.maximum(chambers, np.maximum(vessels, np.minimum(knob, 1)))
    pad = draws.chance(0.35) * _blob(chest.u - 0.42, chest.v - chest.base, 0.16, 0.09)
    return shadow + 0.6 * pad * (1 - shadow), chambers


def _lesions(
    chest: _Chest, has: dict[str, np.ndarray], difficulty: float, draws: Draws
) -> np.ndarray:
    """How much brighter nodules and masses make the lungs."""
    u, v = chest.u, chest.v
    opacity = np.zeros_like(u)
    for finding, small, large, faint, bright in (
        ("nodule", 0.060, 0.105, 0.08, 0.44),
        ("mass", 0.14, 0.24, 0.06, 0.36),
    ):
        severity = draws.severity()
        extent = draws.uniform(small, large) * draws.uniform(0.9, 1.1)
        where_v = draws.uniform(-0.50, 0.25)
        above = np.maximum(chest.middle - where_v, 0) / (chest.middle - chest.apex)
        reach = chest.width * np.sqrt(np.maximum(1 - above**2.6, 0))
        where_u = 0.20 + draws.uniform(0.1, 0.8) * np.maximum(reach - 0.20, 0)
        where_u = where_u * draws.side()
        strength = has[finding] * (faint + (bright - faint) * severity) / difficulty
        lobed = 0.18 if finding == "mass" else 0.0
        turn, squeeze = draws.uniform(0, 6.28), 1 + lobed * draws.uniform(-1, 1)
        extent = np.maximum(extent, 0.6 * chest.pixel)
        rows = np.flatnonzero(strength)
        du, dv = u[rows] - where_u[rows], v[rows] - where_v[rows]
        lobes = 1 + lobed * np.sin(3 * np.arctan2(dv, du) + turn[rows])
        away = lobes * np.sqrt(np.square(du) + np.square(dv * squeeze[rows]))
        shape = _step(extent[rows] - away, np.maximum(0.5 * extent[rows], chest.pixel))
        opacity[rows] += strength[rows] * shape
    return opacity


def _imitations(chest: _Chest, draws: Draws) -> np.ndarray:
    """Ordinary shadows on the lungs that a nodule, a mass or fluid can be taken for."""
    opacity = np.zeros_like(chest.u)
    for share, width, height, u0, u1, v0, v1, brightest in (
        (0.35, 0.055, 0.050, 0.38, 0.52, 0.12, 0.30, 0.20),  # nipple
        (0.35, 0.075, 0.045, 0.30, 0.62, -0.55, 0.20, 0.18),  # healed rib
        (0.40, 0.130, 0.150, 0.14, 0.24, -0.15, 0.05, 0.16),  # full hilum
        (0.35, 0.260, 0.200, 0.35, 0.55, 0.20, 0.40, 0.16),  # breast
    ):
        strength = draws.chance(share) * draws.uniform(0.04, brightest)
        where_u, where_v = draws.side() * draws.uniform(u0, u1), draws.uniform(v0, v1)
        rows = np.flatnonzero(strength)
        blob = _blob(chest.u[rows] - where_u[rows], chest.v[rows] - where_v[rows], width, height)
        opacity[rows] += strength[rows] * blob
    return opacity


def _effusion(chest: _Chest, present: np.ndarray, difficulty: float, draws: Draws) -> np.ndarray:
    """The share of air that fluid displaces: above the diaphragm, higher along the wall."""
    severity = draws.severity()
    height = present * (0.05 + 0.42 * severity) / difficulty
    side = _step(chest.u * draws.side(), 0.01)
    outward = np.clip((chest.across - 0.1) / (chest.wall - 0.1), 0, 1)
    surface = chest.dome + 0.04 - height * (0.5 + 0.9 * outward * outward)
    fluid = side * _step(chest.v - surface, np.maximum(0.05, chest.pixel)) * (height > 0)
    return fluid * draws.uniform(0.6, 0.95)


def _pneumothorax(
    chest: _Chest, present: np.ndarray, difficulty: float, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """The share of the lung that has collapsed away from the wall, and the pleural line."""
    depth = present * (0.05 + 0.29 * draws.severity()) / difficulty
    side = _step(chest.u * draws.side(), 0.01)
    upper = 1 - 0.75 * _step(chest.v - draws.uniform(-0.3, 0.2), 0.4)
    edge = (chest.radius - (1 - depth * upper)) * chest.wall
    beyond = _step(edge, chest.pixel) * side * (depth > 0)
    line = np.exp(-np.square(edge / max(0.012, 0.5 * chest.pixel)))
    thin = min(1.0, 0.03 / chest.pixel)
    return beyond, draws.uniform(0.05, 0.14) * thin * line * side * (depth > 0)


def _vessels(chest: _Chest, draws: Draws) -> np.ndarray:
    """Vessels fanning out from the hila and thinning towards the wall."""
    hilum_v = draws.normal(-0.05, 0.03)
    du, dv = chest.across - 0.16, chest.v - hilum_v
    away = np.sqrt(du * du + dv * dv) + 1e-3
    angle = np.arctan2(dv, du) + 0.25 * np.sin(7 * away + draws.uniform(0, 6.28))
    phase = draws.uniform(0, 6.28) + np.sign(chest.u) * draws.uniform(0, 6.28)
    branches = draws.uniform(6, 9)
    fan = np.sin(branches * angle + phase) + 0.8 * np.sin(2.3 * branches * angle - phase)
    ridges = np.square(np.maximum(fan, 0)) * 0.5
    strength = draws.uniform(0.06, 0.13)
    hilum = draws.uniform(0.10, 0.2) * np.exp(-np.square(away / 0.13))
    return strength * ridges * np.exp(-2.6 * away) + hilum


def _soft_tissue(chest: _Chest, heart: np.ndarray, draws: Draws) -> np.ndarray:
    """Chest wall, shoulders, neck, abdomen with its gas bubble, and the heart's own density."""
    u, v, across = chest.u, chest.v, chest.across
    outline = 0.24 + 0.72 * _step(v + 0.80, 0.22) + draws.normal(0, 0.03)
    body = _step(outline - across, 0.08)
    density = draws.normal(0.56, 0.02) - 0.10 * np.square(u)
    below = _step(v - chest.dome, 0.05)
    scapula = 0.05 * _step(across - draws.normal(0.66, 0.03) - 0.25 * np.abs(v + 0.35), 0.04)
    scapula = scapula * _step(v + 0.72, 0.2) * _step(0.05 - v, 0.2)
    bubble = draws.chance(0.6) * _blob(
        u - draws.uniform(0.28, 0.42), v - chest.base - 0.08, draws.uniform(0.08, 0.16), 0.06
    )
    airway = _blob(u, np.minimum(v + 0.30, 0), 0.045, 0.6)
    return body * (
        density
        + scapula
        + below * (0.15 - 0.22 * bubble)
        + (1 - below) * 0.13 * heart
        - 0.08 * airway
    )


def _skeleton(chest: _Chest, draws: Draws) -> np.ndarray:
    """Spine, ribs behind and in front, and clavicles."""
    v, across = chest.v, chest.across
    spine = _step(0.085 - across, max(0.03, chest.pixel))
    discs = 1 + 0.25 * np.cos(v * (2 * np.pi / 0.155) + draws.uniform(0, 6.28))
    spacing = draws.normal(0.168, 0.008)
    start = draws.uniform(0, 1)
    # A sampled wave of this period keeps only this share of its height at this pixel width.
    kept = float(np.sinc(chest.pixel / 0.168))
    back = (v - 0.85 * np.square(across - 0.22)) / spacing + start
    front = (v - 0.62 * (0.85 - across)) / spacing + start + 0.35
    cage = _step(1.10 - chest.radius, 0.08) * (0.3 + 0.7 * _step(chest.dome + 0.02 - v, 0.1))
    ribs = draws.uniform(0.06, 0.11) * _rib_profile(back)
    ribs = ribs + draws.uniform(0.03, 0.06) * _rib_profile(front) * _step(across - 0.35, 0.15)
    lift = draws.normal(0.66, 0.02)
    slope = draws.normal(0.16, 0.05)
    bar = v + lift + slope * (across - 0.1) - 0.25 * np.square(across - 0.4)
    clavicle = (
        _step(0.032 - np.abs(bar), max(0.02, chest.pixel))
        * _step(across - 0.08, 0.05)
        * _step(0.78 - across, 0.10)
    )
    return 0.10 * spine * discs + kept * ribs * cage + draws.uniform(0.08, 0.13) * clavicle


def _rib_profile(phase: np.ndarray) -> np.ndarray:
    """A flat band over 45 % of the period, a little brighter along its edges."""
    wave = np.cos(2 * np.pi * phase)
    band = _step(wave - 0.15, 0.55)
    return band * (1 - 0.25 * np.square(np.maximum(wave, 0)))


def _folds(chest: _Chest, draws: Draws) -> np.ndarray:
    """A fold of skin: an edge down the outer lung that a pleural line can be taken for."""
    shown = draws.chance(0.3) * draws.uniform(0.03, 0.09) * draws.uniform(0.5, 1)
    place = draws.uniform(0.42, 0.66)
    edge = chest.u * draws.side() - place - 0.12 * (chest.v + 0.2) * draws.uniform(-1, 1)
    fade = _step(0.35 - chest.v, 0.5) * _step(chest.v + 0.65, 0.2)
    return -shown * _step(edge, chest.pixel) * np.exp(-np.maximum(edge, 0) / 0.12) * fade


def _expose(
    tissue: np.ndarray,
    chest: _Chest,
    difficulty: float,
    draws: Draws,
    textures: list[np.ndarray],
    grain: np.ndarray,
) -> np.ndarray:
    """Uneven beam, structured and quantum noise, then the exposure's gain, offset and curve."""
    size = tissue.shape[-1]
    beam = draws.normal(0, 0.035) * chest.u + draws.normal(0, 0.035) * chest.v
    inside = np.clip(tissue * 4, 0, 1)
    clutter = np.zeros_like(tissue)
    for texture, weight in zip(textures, _TEXTURE_WEIGHTS, strict=True):
        spread = _smooth_weights(size, texture.shape[-1])
        # einsum, not @: for such small products BLAS spends its time waking its threads, and the
        # order of its sums depends on their number.
        rows = np.einsum("pg,ngh->nph", spread, texture)
        clutter += weight * np.einsum("nph,qh->npq", rows, spread)
    # Smaller pixels catch fewer quanta; more absorption leaves fewer too.
    quantum = 0.013 * (size / 28) ** 0.3 * draws.uniform(0.6, 1.4) * (0.5 + tissue)
    noise = difficulty * (clutter * inside * draws.uniform(0.7, 1.3) + quantum * grain)
    level = draws.normal(0.97, 0.08) * (tissue + beam * inside + noise) + draws.normal(0.01, 0.03)
    curve = draws.normal(1.05, 0.10)
    return np.rint(255 * np.clip(level, 0, 1) ** curve).astype(np.uint8)


@cache
def _smooth_weights(size: int, grid: int) -> np.ndarray:
    """(size, grid) weights that spread grid values over pixels as Gaussian hills of unit power."""
    pixels = (np.arange(size) + 0.5) / size * (grid - 1)
    weights = np.exp(-np.square((pixels[:, None] - np.arange(grid)) / 0.75))
    weights /= np.sqrt(np.square(weights).sum(1, keepdims=True))
    # Denormal numbers would make the products several times slower.
    weights[weights < 1e-9] = 0
    return weights.astype(np.float32)
