"""What the examples of a data set are, and a network reads."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Modality = Literal["image", "volume", "signal", "table"]

SIZE_UNITS: Mapping[Modality, str] = MappingProxyType(
    {"image": "px", "volume": "voxels a side", "signal": "samples", "table": "features"}
)
"""Unit of an example's size."""

EXAMPLES: Mapping[Modality, str] = MappingProxyType(
    {"image": "images", "volume": "volumes", "signal": "signals", "table": "rows"}
)
"""What several examples are called."""

SPATIAL_AXES: Mapping[Modality, int] = MappingProxyType(
    {"image": 2, "volume": 3, "signal": 1, "table": 0}
)
"""Number of axes of an example before its channels or features."""
