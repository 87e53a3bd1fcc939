"""Opening raster files, and what their headers say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geofm.errors import DataNotFoundError, MissingExtraError, RasterError

__all__ = [
    "Layer",
    "check_exists",
    "check_pixels",
    "check_place",
    "is_remote",
    "layers_of",
    "open_raster",
    "rasterio_module",
    "reading",
    "shown",
    "unreadable",
]

# What the files of products are. A ".tif" that is really a VRT or a web service could make GDAL
# read anything, so that is only for a file the caller names himself.
_DRIVERS = {".jp2": "JP2OpenJPEG", ".j2k": "JP2OpenJPEG"}
_OTHER_DRIVER = "GTiff"
_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float32", "float64")
# Ask for the file itself only, not for its neighbours, and do not wait forever.
_REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One band of one file, as the file's header describes it.

    Attributes:
        path: Path or address.
        index: Band in the file, from 1.
        crs: rasterio's CRS.
        transform: Affine coefficients a, b, c, d, e, f of the grid.
        width: Columns.
        height: Rows.
        dtype: numpy's name of the pixels' type.
        nodata: The file's no-data value for the band, if it has one.
        scale: The file's scale, 1 where it has none.
        offset: The file's offset, 0 where it has none.
        description: The band's name in the file.
        driver: GDAL's name of the file's format.
    """

    path: str
    index: int
    crs: Any
    transform: tuple[float, ...]
    width: int
    height: int
    dtype: str
    nodata: float | None
    scale: float
    offset: float
    description: str | None
    driver: str

    @property
    def area(self) -> float:
        """Of a pixel, in the square of the CRS's units."""
        return abs(self.transform[0] * self.transform[4])


def rasterio_module() -> Any:
    """The rasterio module, imported late because geofm works without it.

    Raises:
        MissingExtraError: It is not installed; the error names the extra that brings it.
    """
    try:
        import rasterio
        import rasterio.errors
        import rasterio.shutil
        import rasterio.windows
    except ImportError as error:
        raise MissingExtraError("rasters need rasterio: pip install 'geofm[raster]'") from error
    return rasterio


def is_remote(path: str) -> bool:
    """Whether it is an address rather than a path.

    Args:
        path: Path or address.
    """
    return path.lower().startswith(("http://", "https://"))


def shown(path: str) -> str:
    """A path as messages show it: an address without its query, which may hold a signature.

    Args:
        path: Path or address.
    """
    return path.partition("?")[0] if is_remote(path) else path


@contextlib.contextmanager
def reading(path: str, what: str = "") -> Iterator[Any]:
    """GDAL set up for a file; what it cannot read in the block is a `RasterError`.

    Args:
        path: The file that is read, for the message.
        what: What of it is read.

    Yields:
        The rasterio module.
    """
    rasterio = rasterio_module()
    try:
        # In an Env GDAL's warnings go to the log.
        with rasterio.Env(**(_REMOTE if is_remote(path) else {})):
            yield rasterio
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise unreadable(path, error, what) from error


def unreadable(path: str, error: Exception, what: str = "") -> RasterError:
    """The error for what GDAL cannot read.

    Args:
        path: The file or address.
        error: What rasterio raised; of "Read failed. See previous exception" the previous one says
            why.
        what: What of it was read.

    Returns:
        The error to raise.
    """
    reason = str(error.__cause__ or error).replace(path, shown(path)).rstrip(".")
    advice = "Is the file complete? Fetch it again"
    if is_remote(path):
        advice = (
            "Is the address right? One that was signed may have expired"
            if re.search(r"(?<!\d)4\d\d(?!\d)", reason)
            else "Does its server answer, and is the file there complete? Run it again"
        )
    return RasterError(f"{shown(path)} cannot be read{what}: {reason}. {advice}")


def open_raster(path: str) -> Any:
    """Open anything that GDAL reads.

    Args:
        path: Path, http(s) address, or a name of GDAL's own (``/vsizip/...``, ``NETCDF:...``).

    Returns:
        rasterio's dataset, which the caller closes.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read.
        MissingExtraError: rasterio is not installed.
    """
    check_exists(path)
    with reading(path) as rasterio:
        return rasterio.open(path)


def check_exists(path: str) -> None:
    """Refuse a path at which there is nothing; addresses, patterns and GDAL's names are let pass.

    Args:
        path: As in `open_raster`, or a pattern.

    Raises:
        DataNotFoundError: There is no such file or folder.
    """
    other = path.startswith("/vsi") or re.match(r"[A-Za-z0-9_]{2,}:", path)
    if not other and not any(mark in path for mark in "*?") and not Path(path).exists():
        raise DataNotFoundError(f"there is no file or folder {path}")


def check_pixels(name: str, dtype: str) -> None:
    """Refuse pixels that are no plain numbers.

    Args:
        name: The file, for the message.
        dtype: Their type, as rasterio names it.

    Raises:
        RasterError: They are complex.
    """
    if dtype.startswith("complex"):
        raise RasterError(
            f"{name} has {dtype} pixels; integers or floats are needed. For radar, take the "
            f"amplitude or the intensity first"
        )


def check_place(name: str, file: Any) -> None:
    """Refuse a file whose place only ground control points tell.

    Args:
        name: The file, for the message.
        file: rasterio's dataset.

    Raises:
        RasterError: Its rows and columns are no grid in any reference system.
    """
    if not file.crs and file.gcps[0]:
        raise RasterError(
            f"{name} has {len(file.gcps[0])} ground control points and no coordinate reference "
            f"system: its pixels are no grid on the ground. Warp it first: gdalwarp in.tif out.tif"
        )


def layers_of(path: str, any_driver: bool = False) -> tuple[Layer, ...]:
    """What a file's header says of its bands.

    Args:
        path: Path or http(s) address.
        any_driver: Whether to take anything GDAL reads, rather than GeoTIFF and JPEG 2000 only.

    Returns:
        One entry a band.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read, has no georeference, is rotated, or has pixels of a type
            that is no reflectance.
    """
    if not is_remote(path) and not Path(path).is_file():
        raise DataNotFoundError(f"there is no file {path}")
    with reading(path) as rasterio:
        suffix = Path(shown(path)).suffix.lower()
        driver = None if any_driver else _DRIVERS.get(suffix, _OTHER_DRIVER)
        with rasterio.open(path, driver=driver) as file:
            check_place(shown(path), file)
            layers = tuple(
                Layer(
                    path=path,
                    index=index,
                    crs=file.crs,
                    transform=tuple(file.transform)[:6],
                    width=file.width,
                    height=file.height,
                    dtype=file.dtypes[index - 1],
                    nodata=file.nodatavals[index - 1],
                    scale=file.scales[index - 1],
                    offset=file.offsets[index - 1],
                    description=file.descriptions[index - 1],
                    driver=file.driver,
                )
                for index in file.indexes
            )
    for layer in layers:
        _check(layer)
    return layers


def _check(layer: Layer) -> None:
    a, b, _, d, e, _ = layer.transform
    name = shown(layer.path)
    check_pixels(name, layer.dtype)
    if layer.dtype not in _DTYPES:
        raise RasterError(
            f"{name} has {layer.dtype} pixels; taken are {', '.join(_DTYPES)}. Convert it: "
            f"gdal_translate -ot Int16 (or UInt16, Float32)"
        )
    if not layer.crs:
        raise RasterError(
            f"{name} has no coordinate reference system; a scene is georeferenced. If you know it: "
            f"gdal_edit.py -a_srs EPSG:..."
        )
    if b or d or a <= 0 or e >= 0 or not np.isfinite(layer.transform).all():
        raise RasterError(
            f"{name} is rotated, flipped or not georeferenced (its geotransform is "
            f"{layer.transform}); rows must run south and columns east. Warp it: gdalwarp"
        )
