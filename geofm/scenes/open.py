"""`open_scene`: what kind of scene a path is."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geofm.errors import DataNotFoundError, PixelError, RasterError
from geofm.scenes.files import is_remote, shown
from geofm.scenes.folder import open_folder, open_pattern
from geofm.scenes.grids import Request
from geofm.scenes.names import Facts, check_offset, date_of
from geofm.scenes.safe import METADATA, find_metadata, open_safe
from geofm.scenes.scene import Scene
from geofm.scenes.stac import open_item, read_item
from geofm.scenes.stacked import open_stacked
from geofm.spectral import Sensor
from geofm.spectral import sensor as sensor_of

__all__ = ["ITEMS", "open_scene", "request_of"]

# Ends of the names of STAC items.
ITEMS = (".json", ".geojson")
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z")


def open_scene(
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    bands: Sequence[str] | None = None,
    units: str | None = None,
    level: str | None = None,
    offset: float | None = None,
    date: str | datetime.date | None = None,
    nodata: float | Sequence[float] | None = None,
    sensor: str | Sensor | None = None,
    align: str | None = None,
    strict: bool = True,
) -> Scene:
    """Open a scene as it comes: only headers and metadata are read.

    Args:
        path: One of: an unpacked SAFE folder (or its MTD_MSI*.xml); a folder with one GeoTIFF or
            JPEG 2000 file a band; a pattern of such files (``"folder/S2A_*_0_49_*.tif"``); a STAC
            item (JSON file, address, or a dict); a stacked raster file or its address.
        bands: For a stacked file, the names of its bands in order, None to take its descriptions.
            Otherwise the bands to open, None for all.
        units: ``"dn"``, ``"reflectance"`` or ``"uint8"``, where the scene does not say it.
        level: ``"L1C"`` or ``"L2A"``, where the scene does not say it.
        offset: Added to DN, -1000 or 0, where the scene does not say it.
        date: Day of sensing, where the scene does not say it.
        nodata: Stored values that mean "no data", besides the files' masks; None for what the
            metadata or files say, or 0 for Sentinel-2's DN.
        sensor: Whose names the bands have; None for Sentinel-2.
        align: How bands lie whose grids do not nest: ``"georeference"``, as their files say, or
            ``"corner"``, on one upper left corner. None: an error if `strict`, else as
            georeferenced.
        strict: Whether it is an error when an argument contradicts the metadata, a stacked file has
            bands that are not the sensor's, or grids do not nest.

    Returns:
        The scene. What neither path, metadata nor arguments say is None; `Scene.transform_for` asks
        for what a model needs.

    Raises:
        DataNotFoundError: There is no such file or folder.
        DownloadError: An item cannot be fetched.
        BandError: Bands are missing, unnamed or ambiguous.
        PixelError: An argument is out of its range or contradicts the metadata.
        RasterError: It is no scene, or several; files are damaged, rotated, in different systems or
            of an unknown type; grids do not nest.
        MissingExtraError: rasterio is not installed.
    """
    request = request_of(bands, units, level, offset, date, nodata, sensor, align, strict)
    if isinstance(path, Mapping):
        return open_item(path, None, request)
    text = os.fspath(path)
    if is_remote(text):
        if Path(shown(text)).suffix.lower() in ITEMS:
            return open_item(read_item(text), text, request)
        return open_stacked(text, request)
    return _open_local(Path(text), request)


def _open_local(path: Path, request: Request) -> Scene:
    if path.is_dir():
        if find_metadata(path) or path.suffix.upper() == ".SAFE":
            return open_safe(path, request)
        return open_folder(path, request)
    if path.name in METADATA and path.is_file():
        return open_safe(path.parent, request)
    if path.is_file():
        if path.suffix.lower() in ITEMS:
            return open_item(read_item(str(path)), str(path), request)
        if path.suffix.lower() in _PACKED:
            raise RasterError(f"{path} is packed; unpack it and open the folder")
        return open_stacked(str(path), request)
    if any(sign in path.name for sign in "*?"):
        return open_pattern(path, request)
    raise DataNotFoundError(f"there is no file or folder {path}")


def request_of(
    bands: Sequence[str] | None = None,
    units: str | None = None,
    level: str | None = None,
    offset: float | None = None,
    date: str | datetime.date | None = None,
    nodata: float | Sequence[float] | None = None,
    sensor: str | Sensor | None = None,
    align: str | None = None,
    strict: bool = True,
) -> Request:
    """What a caller says, checked.

    Args:
        bands: As in `open_scene`.
        units: As there.
        level: As there.
        offset: As there.
        date: As there.
        nodata: As there.
        sensor: As there.
        align: As there.
        strict: As there.

    Returns:
        The same as one object.

    Raises:
        PixelError: An argument is out of its range.
    """
    for name, value, choices in (
        ("units", units, ("dn", "reflectance", "uint8")),
        ("level", level, ("L1C", "L2A")),
        ("align", align, ("georeference", "corner")),
    ):
        if value is not None and value not in choices:
            raise PixelError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    if isinstance(bands, str):
        raise PixelError(f"bands is a list of names, got the string {bands!r}")
    try:
        refused = () if nodata is None else tuple(float(v) for v in np.ravel(np.asarray(nodata)))
    except (TypeError, ValueError) as error:
        raise PixelError(f"nodata must be a number or several, got {nodata!r}") from error
    return Request(
        sensor=sensor_of(sensor or "sentinel2"),
        bands=None if bands is None else tuple(bands),
        facts=Facts(units, level, check_offset(offset), date_of(date), refused),
        align=align,
        strict=strict,
    )
