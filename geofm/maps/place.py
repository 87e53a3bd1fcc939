"""Where a picture lies and how large it is on the ground, in words."""

from __future__ import annotations

import math

import numpy as np

from geofm.embeddings.grids import Grid, unwrapped
from geofm.errors import RasterError

__all__ = ["extent_text", "origin_text", "scale_bar", "untrained"]

# Metres, of a sphere.
_RADIUS = 6_371_005.0
# Parts of a row: between the ends of a long one, the shortest way is another.
_PARTS = 32


def scale_bar(grid: Grid, share: float = 0.3) -> tuple[float, str] | None:
    """A round length and its share of the picture's width.

    Args:
        grid: The picture's.
        share: Longest bar.

    Returns:
        Share of the width, and the length as text; None where metres are not known: the grid has no
        reference system, or one that is nowhere on the globe.
    """
    width = _metres(grid)
    if width is None:
        return None
    longest = width * share
    power = 10.0 ** math.floor(math.log10(longest))
    length = next(step for step in (5 * power, 2 * power, power) if step <= longest * (1 + 1e-9))
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    return length / width, text


def extent_text(grid: Grid) -> str:
    """Corners in degrees, or why there are none.

    Args:
        grid: Where the cells lie.

    Returns:
        A line for a picture.
    """
    if grid.crs is None:
        return "No coordinate reference system."
    try:
        west, south, east, north = grid.extent()
    except RasterError:
        return "A coordinate reference system without longitude and latitude."
    # About a metre for small pictures, a kilometre for large ones.
    digits = 5 if max(east - west, north - south) < 0.1 else 3
    if east - west < 360:
        # Across the antimeridian, one is beyond 180 degrees.
        west, east = unwrapped(np.array([west, east]), 0).tolist()
    text = (
        f"{_degrees(south, 'SN', digits)} to {_degrees(north, 'SN', digits)}, "
        f"{_degrees(west, 'WE', digits)} to {_degrees(east, 'WE', digits)}"
    )
    a, b, _, d, e, _ = grid.transform
    if b or d or a < 0 or e > 0:
        text += "; north is not up"
    return text


def origin_text(grid: Grid) -> str:
    """What made the values, as far as the tags say.

    Args:
        grid: With its tags.

    Returns:
        A line for a picture.
    """
    tags = grid.tags
    parts = [
        tags.get("GEOFM_VALUES", ""),
        _weights(grid),
        f"image {tags['GEOFM_SOURCE']}" if "GEOFM_SOURCE" in tags else "",
        tags.get("GEOFM_DATE", ""),
    ]
    return "; ".join(part for part in parts if part)


def untrained(grid: Grid) -> bool:
    """Whether the tags say that untrained weights made it: nobody should take it for a result.

    Args:
        grid: With its tags.
    """
    return grid.tags.get("GEOFM_WEIGHTS", "").startswith("untrained")


def _weights(grid: Grid) -> str:
    if untrained(grid):
        return "UNTRAINED WEIGHTS"
    label = grid.tags.get("GEOFM_WEIGHTS")
    return "" if label is None else f"weights {label}"


def _metres(grid: Grid) -> float | None:
    """Length of the middle row on the ground, along great circles."""
    if grid.crs is None:
        return None
    right = np.linspace(0, grid.shape[2], _PARTS + 1)
    x, y = grid.xy(np.full(len(right), grid.shape[1] / 2), right, (0, 0))
    try:
        lon, lat = (np.radians(v) for v in grid.lonlat(x, y))
    except RasterError:
        return None
    # The haversine formula.
    across = np.cos(lat[:-1]) * np.cos(lat[1:]) * np.sin(np.diff(lon) / 2) ** 2
    parts = 2 * np.arcsin(np.sqrt(np.sin(np.diff(lat) / 2) ** 2 + across))
    length = _RADIUS * float(parts.sum())
    return length if math.isfinite(length) and length > 0 else None


def _degrees(value: float, signs: str, digits: int) -> str:
    return f"{abs(value):.{digits}f}° {signs[value >= 0]}"
