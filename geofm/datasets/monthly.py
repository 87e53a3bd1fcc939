"""Monthly GeoTIFFs of a place, as a folder or a table, on their way to an `Observation`."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets._places import centre_of_grid, checked_place, existing, pixel_size, row_column
from geofm.datasets.observations import (
    BANDS,
    LOOKS_LIKE_REFLECTANCE,
    MONTHS,
    SIDE,
    DataNotFoundError,
    Observation,
    band_indices,
    centre_crop,
)
from geofm.errors import PixelError, RasterError

__all__ = ["read_monthly_folder"]

logger = logging.getLogger(__name__)

# Month at the end of a file's name: a date or year and month, or a number from 1 to 12.
_DATED: Final = re.compile(
    r"(?:^|\D)(?:19|20)\d\d[-_]?(0[1-9]|1[0-2])(?:[-_]?\d\d)?(?:T\d{4,6}Z?)?$"
)
_NUMBERED: Final = re.compile(r"(?:^|[^\d.])(0?[1-9]|1[0-2])$")
# How GlobalGeoTree's authors name a sample's folder.
_SAMPLE_FOLDER: Final = re.compile(r"sample_(.+)_(-?\d+(?:\.\d+)?)_(-?\d+(?:\.\d+)?)$")
_COLUMNS: Final = ("sample_id", "month", "path")
_METRES: Final = 10.0


@dataclass(slots=True)
class _Site:
    """The files of one sample."""

    sample_id: str
    key: str
    files: dict[int, Path]
    longitude: float | None = None
    latitude: float | None = None
    auxiliary: Mapping[str, float | None] = field(default_factory=dict)


def read_monthly_folder(
    source: str | os.PathLike[str],
    *,
    bands: Sequence[str] | None = None,
    units: str = "dn",
    nodata: float | None = 0,
) -> Iterator[Observation]:
    """Read monthly GeoTIFFs: one file a month, its bands named by their descriptions.

    `source` is one of

    * a CSV file with the columns sample_id, month (1 to 12), path (relative to the CSV file) and,
      if you like, longitude and latitude; a row for each file;
    * a folder with one sample's files, whose names end in the month (``s2_7.tif``, ``07.tif``) or
      in a date (``S2_2020-07.tif``, ``20200715.tif``);
    * a folder of such folders. One named ``sample_<id>_<longitude>_<latitude>``, as GlobalGeoTree's
      authors do, tells the coordinates.

    A folder may also hold ``auxiliary.json`` with the site's variables. Clouds must be removed
    already: there is no mask. Each image is cut to 5 x 5 pixels around the coordinates, or around
    its middle where none are given, which then is the site's place. Pixels are expected to measure
    about 10 m; a warning tells if they do not.

    Args:
        source: The CSV file or folder.
        bands: Bands to deliver, in order, by name; None for GlobalGeoTree's.
        units: ``"dn"``, reflectance times 10,000 without offset (harmonized), or
            ``"reflectance"``, which is multiplied by 10,000.
        nodata: Stored value that means "no data", besides the files' own; None for none.

    Yields:
        One observation for each sample, by name; months without a file are NaN.

    Raises:
        DataNotFoundError: `source` or a file in the CSV does not exist, or no GeoTIFF is found.
        RasterError: A file cannot be read, the table is malformed, a month is told twice or not at
            all, or no coordinates can be found.
        BandError: A file lacks a band or does not name its bands.
        PixelError: An image is smaller than 5 x 5, the coordinates lie outside it, or its numbers
            are not in `units`.
        MissingExtraError: rasterio is not installed.
    """
    if units not in ("dn", "reflectance"):
        raise PixelError(f"units are {units!r}; expected 'dn' or 'reflectance'")
    root = existing(source)
    sites = _sites_in_folder(root) if root.is_dir() else _sites_in_csv(root)
    wanted = tuple(BANDS if bands is None else bands)
    return (_read_site(site, wanted, units, nodata) for site in sites)


def _read_site(
    site: _Site, wanted: tuple[str, ...], units: str, nodata: float | None
) -> Observation:
    # Not at the top: geofm.raster brings the factory and all models with it.
    from geofm.raster import read_image

    longitude, latitude = site.longitude, site.latitude
    images = np.full((MONTHS, len(wanted), SIDE, SIDE), np.nan, np.float32)
    names = wanted
    for month, file in sorted(site.files.items()):
        image = read_image(file)
        indices, names = band_indices(wanted, image.bands, str(file))
        centre = None
        if image.crs is not None:
            _warn_of_size(file, pixel_size(image.transform, image.crs))
            if longitude is None or latitude is None:
                shape = image.pixels.shape[-2:]
                longitude, latitude = centre_of_grid(image.transform, image.crs, shape)
            # Also where the middle of the first image told the place: another may lie otherwise.
            centre = row_column(image.transform, image.crs, longitude, latitude)
        try:
            stored = centre_crop(image.pixels[indices], centre=centre)
        except PixelError as error:
            raise PixelError(f"{file}: {error}") from error
        # Masked where the file itself says that there is nothing.
        empty = np.ma.getmaskarray(stored)
        values = np.ma.getdata(stored).astype(np.float32)
        if nodata is not None:
            empty = empty | (values == nodata)
        images[month - 1] = np.where(empty, np.nan, values)
    if longitude is None or latitude is None:
        raise RasterError(
            f"{site.key} has no coordinates, and its files no coordinate system that would tell"
        )
    _check_units(images, units, site.key)
    return Observation(
        sample_id=site.sample_id,
        images=images * np.float32(10_000.0 if units == "reflectance" else 1.0),
        bands=names,
        longitude=longitude,
        latitude=latitude,
        auxiliary={**site.auxiliary, "longitude": longitude, "latitude": latitude},
        key=site.key,
    )


def _check_units(images: NDArray[np.float32], units: str, key: str) -> None:
    known = images[np.isfinite(images)]
    if known.size == 0:
        return
    highest = float(known.max())
    if units == "dn" and highest <= LOOKS_LIKE_REFLECTANCE:
        raise PixelError(
            f"{key}: the highest value is {highest:g}, which looks like reflectance; say "
            f"units='reflectance'"
        )
    if units == "reflectance" and highest > LOOKS_LIKE_REFLECTANCE:
        raise PixelError(f"{key}: the highest value is {highest:g}, which is no reflectance")


def _sites_in_folder(root: Path) -> list[_Site]:
    if _tiffs(root):
        return [_site_of_folder(root)]
    sites = [_site_of_folder(f) for f in sorted(root.iterdir()) if f.is_dir() and _tiffs(f)]
    if not sites:
        raise DataNotFoundError(f"{root} holds no GeoTIFF, nor do the folders in it")
    return sites


def _tiffs(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in (".tif", ".tiff"))


def _site_of_folder(folder: Path) -> _Site:
    site = _Site(folder.name, str(folder), {})
    named = _SAMPLE_FOLDER.match(folder.name)
    if named is not None:
        site.sample_id = named[1]
        site.longitude, site.latitude = checked_place(float(named[2]), float(named[3]), site.key)
    for file in _tiffs(folder):
        found = _DATED.search(file.stem) or _NUMBERED.search(file.stem)
        if found is None:
            raise RasterError(
                f"{file}: its name does not end in a month (s2_7.tif) or a date (2020-07.tif); "
                f"list the files in a CSV with the columns {', '.join(_COLUMNS)}"
            )
        _add_file(site, int(found[1]), file)
    extra = folder / "auxiliary.json"
    if extra.is_file():
        site.auxiliary = _auxiliary_json(extra)
        place = site.auxiliary.get("longitude"), site.auxiliary.get("latitude")
        # More exact than the folder's name.
        if place != (None, None):
            site.longitude, site.latitude = checked_place(*place, str(extra))
    return site


def _auxiliary_json(file: Path) -> dict[str, float | None]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise RasterError(f"{file} is no JSON: {error}") from error
    if isinstance(values, list) and len(values) == 1:
        values = values[0]
    if not isinstance(values, dict):
        raise RasterError(f"{file} holds no object of names and numbers")
    values.pop("sample_id", None)
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RasterError(f"{file}: {name} is {value!r}; expected a number or null")
    return {name: None if value is None else float(value) for name, value in values.items()}


def _sites_in_csv(table: Path) -> list[_Site]:
    sites: dict[str, _Site] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise RasterError(
                    f"{table} has no column {', '.join(absent)}; it has "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}"
                )
            for row in reader:
                _add_row(sites, row, table, f"{table}, line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise RasterError(f"{table} is no readable CSV file: {error}") from error
    if not sites:
        raise DataNotFoundError(f"{table} lists no files")
    return list(sites.values())


def _add_row(sites: dict[str, _Site], row: Mapping[str, str], table: Path, where: str) -> None:
    month = (row["month"] or "").strip()
    if not month.isdecimal() or not 1 <= int(month) <= MONTHS:
        raise RasterError(f"{where}: month is {month!r}; expected 1 to 12")
    sample_id = (row["sample_id"] or "").strip()
    if not sample_id or not (row["path"] or "").strip():
        raise RasterError(f"{where}: sample_id or path is empty")
    site = sites.setdefault(sample_id, _Site(sample_id, f"{table}, sample {sample_id}", {}))
    texts = [(row.get(name) or "").strip() for name in ("longitude", "latitude")]
    try:
        pair = [float(text) if text else None for text in texts]
    except ValueError as error:
        raise RasterError(f"{where}: {error}; expected degrees") from error
    place = checked_place(pair[0], pair[1], where)
    if place != (None, None):
        if site.longitude is not None and place != (site.longitude, site.latitude):
            raise RasterError(
                f"{where}: sample {sample_id} is at {place}, above at "
                f"{(site.longitude, site.latitude)}"
            )
        site.longitude, site.latitude = place
    _add_file(site, int(month), existing(table.parent / row["path"].strip()))


def _add_file(site: _Site, month: int, file: Path) -> None:
    if month in site.files:
        raise RasterError(
            f"{site.key}: month {month} is in {site.files[month]} and in {file}; composite them "
            f"first, for example with geofm.datasets.monthly_median"
        )
    site.files[month] = file


def _warn_of_size(file: Path, metres: float) -> None:
    # Loosely, as degrees of longitude shrink towards the poles.
    if not 0.5 * _METRES <= metres <= 1.5 * _METRES:
        logger.warning("%s has pixels of about %.3g m; expected about 10 m", file, metres)
