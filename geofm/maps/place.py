"""Where a picture lies and how large it is on the ground, in words."""

from __future__ import annotations

import math

import numpy as np

from geofm.embeddings.grids import Grid
from geofm.errors import RasterError
from geofm.raster.sources import rasterio_module

__all__ = ["extent_text", "origin_text", "scale_bar"]

# Metres of a degree of latitude, of a sphere.
_DEGREE = 111_195.0


def scale_bar(grid: Grid, share: float = 0.3) -> tuple[float, str] | None:
    """A round length and its share of the picture's width.

    Args:
        grid: The picture's.
        share: Longest bar.

    Returns:
        Share of the width, and the length as text; None where metres are not known.
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
    west, south, east, north = grid.extent()
    # About a metre for small pictures, a kilometre for large ones.
    digits = 5 if max(east - west, north - south) < 0.1 else 3
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
        _weights(tags.get("GEOFM_WEIGHTS")),
        f"image {tags['GEOFM_SOURCE']}" if "GEOFM_SOURCE" in tags else "",
        tags.get("GEOFM_DATE", ""),
    ]
    return "; ".join(part for part in parts if part)


def _weights(label: str | None) -> str:
    if label is None:
        return ""
    # Nobody should take such a map for a result.
    return "UNTRAINED WEIGHTS" if label.startswith("untrained") else f"weights {label}"


def _metres(grid: Grid) -> float | None:
    """Width of the picture on the ground."""
    if grid.crs is None:
        return None
    rasterio_module()
    from rasterio.crs import CRS

    crs = CRS.from_user_input(grid.crs)
    a, _, _, d, _, _ = grid.transform
    rows, columns = grid.shape[1:]
    if crs.is_geographic:
        _, y = grid.xy(np.array([rows / 2 - 0.5]), np.array([columns / 2 - 0.5]))
        east, north = a * math.cos(math.radians(float(y[0]))) * _DEGREE, d * _DEGREE
    else:
        try:
            _, factor = crs.linear_units_factor
        except ValueError as error:
            raise RasterError(f"the unit of the reference system is not known: {error}") from error
        east, north = a * factor, d * factor
    return math.hypot(east, north) * columns


def _degrees(value: float, signs: str, digits: int) -> str:
    return f"{abs(value):.{digits}f}° {signs[value >= 0]}"
