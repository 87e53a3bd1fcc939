"""Where images lie on the Earth."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geofm.datasets.observations import DataNotFoundError
from geofm.errors import MissingExtraError, RasterError

__all__ = [
    "centre_of_grid",
    "centre_of_raster",
    "checked_place",
    "existing",
    "pixel_size",
    "row_column",
]


def existing(path: str | os.PathLike[str]) -> Path:
    """The path, if there is something.

    Args:
        path: A file or folder.

    Returns:
        The path.

    Raises:
        DataNotFoundError: There is not.
    """
    if not Path(path).exists():
        raise DataNotFoundError(f"there is no {path}")
    return Path(path)


def checked_place(
    longitude: float | None, latitude: float | None, where: str
) -> tuple[float, float] | tuple[None, None]:
    """The coordinates, if they can be some or both are None.

    Args:
        longitude: Degrees east.
        latitude: Degrees north.
        where: What they belong to, for messages.

    Returns:
        Both as given.

    Raises:
        RasterError: Only one is given, or they are out of range.
    """
    if longitude is None and latitude is None:
        return None, None
    if longitude is None or latitude is None:
        raise RasterError(f"{where}: longitude and latitude must be given together")
    if not (abs(longitude) <= 180.0 and abs(latitude) <= 90.0):
        raise RasterError(f"{where}: {longitude}, {latitude} are no longitude and latitude")
    return longitude, latitude


def centre_of_raster(raster: str | os.PathLike[str]) -> tuple[float, float]:
    """Longitude and latitude of a raster's centre, in degrees on WGS 84.

    Args:
        raster: Anything GDAL reads.

    Returns:
        Degrees east, degrees north.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read or has no coordinate system.
        MissingExtraError: rasterio is not installed.
    """
    existing(raster)
    rasterio = _rasterio("rasterio")
    try:
        with rasterio.open(raster) as file:
            transform, crs, shape = tuple(file.transform)[:6], file.crs, file.shape
    except rasterio.errors.RasterioError as error:
        raise RasterError(f"{raster} cannot be read as a raster: {error}") from error
    if not crs:
        raise RasterError(f"{raster} has no coordinate system")
    return centre_of_grid(transform, crs.to_wkt(), shape)


def centre_of_grid(
    transform: Sequence[float], crs: str, shape: tuple[int, ...]
) -> tuple[float, float]:
    """Longitude and latitude of a grid's centre, in degrees on WGS 84.

    Args:
        transform: Affine coefficients a to f, as rasterio orders them.
        crs: Coordinate system, as WKT.
        shape: Rows and columns.

    Raises:
        RasterError: The coordinate system does not tell places on the Earth.
        MissingExtraError: rasterio is not installed.
    """
    a, b, c, d, e, f = transform
    row, column = shape[0] / 2, shape[1] / 2
    x, y = a * column + b * row + c, d * column + e * row + f
    return _transform(crs, "EPSG:4326", x, y)


def row_column(
    transform: Sequence[float], crs: str, longitude: float, latitude: float
) -> tuple[float, float]:
    """Where a place lies in a grid, in pixels from its upper left corner.

    Args:
        transform: Affine coefficients a to f, as rasterio orders them.
        crs: Coordinate system, as WKT.
        longitude: Degrees east, WGS 84.
        latitude: Degrees north, WGS 84.

    Raises:
        RasterError: The coordinate system does not tell places on the Earth.
        MissingExtraError: rasterio is not installed.
    """
    a, b, c, d, e, f = transform
    x, y = _transform("EPSG:4326", crs, longitude, latitude)
    x, y, area = x - c, y - f, a * e - b * d
    if area == 0:
        raise RasterError("the grid's transform has no extent")
    return (a * y - d * x) / area, (e * x - b * y) / area


def pixel_size(transform: Sequence[float], crs: str) -> float:
    """Side of a pixel in metres; for degrees, that of latitude and longitude at the equator.

    Args:
        transform: Affine coefficients a to f, as rasterio orders them.
        crs: Coordinate system, as WKT.
    """
    system = _rasterio("rasterio.crs").CRS.from_wkt(crs)
    side = math.sqrt(abs(transform[0] * transform[4] - transform[1] * transform[3]))
    return side * float(111_320.0 if system.is_geographic else system.linear_units_factor[1])


def _transform(source: str, target: str, x: float, y: float) -> tuple[float, float]:
    errors = _rasterio("rasterio.errors")
    try:
        xs, ys = _rasterio("rasterio.warp").transform(source, target, [x], [y])
    except (errors.RasterioError, errors.CRSError) as error:
        raise RasterError(f"{x}, {y} cannot be transformed: {error}") from error
    if not (math.isfinite(xs[0]) and math.isfinite(ys[0])):
        raise RasterError(f"{x}, {y} lie outside the coordinate system")
    return float(xs[0]), float(ys[0])


def _rasterio(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            "reading coordinates needs rasterio, which is not installed: "
            "pip install 'geofm[raster]'"
        ) from error
