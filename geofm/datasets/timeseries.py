"""Real series of images on their way to an `Observation`: dates to months, files to pixels."""

from __future__ import annotations

import csv
import datetime
import importlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets.observations import (
    BANDS,
    MONTHS,
    SIDE,
    DataNotFoundError,
    Observation,
    band_indices,
    centre_crop,
)
from geofm.errors import MissingExtraError, PixelError, RasterError
from geofm.preprocess import offset_of_baseline

__all__ = ["TREESATAI_BANDS", "monthly_median", "read_monthly_folder", "read_series_h5"]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]
Date = datetime.date | np.datetime64 | str

TREESATAI_BANDS: Final = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
"""Order of the bands in TreeSatAI time series."""

_PRODUCT: Final = re.compile(r"S2[A-Z]_MSI(L1C|L2A)_(\d{8})T\d{6}_(N\d{4})_")
# Month at the end of a file's name: a date or year and month, or a number from 1 to 12.
_DATED: Final = re.compile(r"(?:^|\D)(?:19|20)\d\d[-_]?(0[1-9]|1[0-2])(?:[-_]?\d\d)?$")
_NUMBERED: Final = re.compile(r"(?:^|[^\d.])(0?[1-9]|1[0-2])$")
# How GlobalGeoTree's authors name a sample's folder.
_SAMPLE_FOLDER: Final = re.compile(r"sample_(.+)_(-?\d+(?:\.\d+)?)_(-?\d+(?:\.\d+)?)$")
_COLUMNS: Final = ("sample_id", "month", "path")
_METRES: Final = 10.0
# As in geofm.preprocess: no real scene stays below this everywhere; reflectance does.
_LOOKS_LIKE_REFLECTANCE: Final = 3.0


def monthly_median(
    dates: Sequence[Date] | NDArray[np.datetime64],
    pixels: NDArray[Any],
    mask: NDArray[np.bool_] | None = None,
    *,
    year: int | None = None,
    nodata: float | None = None,
) -> NDArray[np.float32]:
    """Composite a series into twelve months: the median of each pixel's usable values.

    Args:
        dates: T dates: ``datetime.date``, ``datetime.datetime``, ``numpy.datetime64`` or ISO 8601
            strings, in any order.
        pixels: (T, bands, H, W). NaN and infinite values are left out.
        mask: (T, H, W) bool, True where a pixel is usable (clear); None: all are.
        year: Use dates of this year alone; None pools all years, January with January.
        nodata: Value that means "no data" in a band, 0 in Sentinel-2 products; None for none.

    Returns:
        (12, bands, H, W), January first, NaN where a month has no usable value of the pixel. The
        median of an even number of values is the mean of the middle two.

    Raises:
        PixelError: Shapes do not fit, a date cannot be read, the mask is not boolean, or no date is
            of `year`.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 4 or pixels.dtype.kind not in "iuf":
        raise PixelError(
            f"pixels have shape {pixels.shape} and type {pixels.dtype}; expected numbers of shape "
            f"(dates, bands, H, W)"
        )
    if len(dates) != len(pixels):
        raise PixelError(f"{len(dates)} dates for {len(pixels)} images")
    days = [_day(date) for date in dates]
    if year is not None and all(day.year != year for day in days):
        years = sorted({day.year for day in days})
        raise PixelError(f"no date is of {year}; there are {', '.join(map(str, years)) or 'none'}")
    values = pixels.astype(np.float64)
    usable = np.isfinite(values)
    if nodata is not None:
        usable &= values != nodata
    if mask is not None:
        mask = np.asarray(mask)
        expected = (pixels.shape[0], *pixels.shape[2:])
        if mask.dtype != np.bool_ or mask.shape != expected:
            raise PixelError(
                f"the mask has shape {mask.shape} and type {mask.dtype}; expected bool of shape "
                f"{expected}, True where a pixel is usable"
            )
        usable &= mask[:, None]
    values[~usable] = np.nan
    out = np.full((MONTHS, *pixels.shape[1:]), np.nan, np.float32)
    months = np.array([day.month if year in (None, day.year) else 0 for day in days])
    for month in range(1, MONTHS + 1):
        if np.any(months == month):
            out[month - 1] = _median(values[months == month])
    return out


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the first axis without NaN; NaN, and no warning, where there is nothing else."""
    ordered = np.sort(values, axis=0)  # NaN last
    count = np.isfinite(values).sum(axis=0)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, len(values) - 1)[None], axis=0)[0]
    return np.where(count > 0, 0.5 * low + 0.5 * high, np.nan)


def _day(date: Date) -> datetime.date:
    if isinstance(date, np.datetime64):
        date = date.astype("datetime64[D]").item()
    if isinstance(date, str):
        try:
            return datetime.datetime.fromisoformat(date).date()
        except ValueError as error:
            raise PixelError(f"{date!r} is no ISO 8601 date such as '2020-05-31'") from error
    if not isinstance(date, datetime.date):
        raise PixelError(f"a date is {date!r}; expected a date, a numpy.datetime64 or ISO 8601")
    return date


# TreeSatAI ------------------------------------------------------------------------------------


def read_series_h5(
    path: Path_,
    *,
    bands: Sequence[str] | None = None,
    max_cloud: float = 20.0,
    max_snow: float = 1.0,
    year: int | None = None,
    longitude: float | None = None,
    latitude: float | None = None,
    georeference: Path_ | None = None,
    auxiliary: Mapping[str, float | None] | None = None,
    sample_id: str | None = None,
    offset: float | None = None,
) -> Observation:
    """Read a TreeSatAI time series (HDF5): monthly medians of clear pixels, 5 x 5 from the centre.

    What is assumed of the file: ``sen-2-data`` (T, 10, H, W) holds L2A digital numbers of
    `TREESATAI_BANDS`; ``sen-2-masks`` (T, 2, H, W) holds the probability of snow, then of cloud, in
    per cent (some files continue it with eight channels of zeros); ``sen-2-products`` holds the
    names of the products, which tell the dates. The probabilities are Sen2Cor's. It takes bright
    cloud for snow, in May as well, and then gives it no cloud probability: without the limit on
    snow whole months become cloud. So the default also removes real snow. Shadows are in neither
    mask and stay, which is what the median is for.

    The file holds no coordinates; the aerial image of the same plot does.

    Args:
        path: The ``.h5`` file.
        bands: Bands to deliver, in order, by name; None for GlobalGeoTree's.
        max_cloud: Highest cloud probability of a clear pixel, in per cent.
        max_snow: Highest snow probability of a clear pixel, in per cent.
        year: Use this year alone; None pools all.
        longitude: Degrees east, WGS 84.
        latitude: Degrees north, WGS 84.
        georeference: A raster of the same place, whose centre gives the coordinates where they are
            not given.
        auxiliary: The site's other variables by name.
        sample_id: Identifier; None for the file's name.
        offset: Added to the stored numbers. None: 0, and an error if a product is of baseline
            04.00 or later, of which the file does not tell whether 1000 was subtracted.

    Returns:
        The observation; a month without any clear pixel is NaN. From 6 x 6 pixels the last row and
        column are left out.

    Raises:
        DataNotFoundError: There is no such file.
        PixelError: The file is no such series, or its products' numbers are ambiguous.
        BandError: A band is not among `TREESATAI_BANDS`.
        RasterError: The georeference cannot be read.
        MissingExtraError: h5py is not installed.
    """
    source = _existing(path)
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise MissingExtraError(
            "reading HDF5 needs h5py, which is not installed: pip install 'geofm[train]'"
        ) from error
    names = ("sen-2-data", "sen-2-masks", "sen-2-products")
    try:
        with h5py.File(source, "r") as file:
            absent = [name for name in names if name not in file]
            if absent:
                raise PixelError(
                    f"{source} has no {' and no '.join(absent)}; it has {', '.join(file) or 'none'}"
                )
            pixels, masks, products = (file[name][()] for name in names)
    except OSError as error:
        raise PixelError(f"{source} is no readable HDF5 file: {error}") from error
    dates = _product_dates(products, source, offset)
    clear = _clear(masks, pixels, source, max_cloud, max_snow)
    selected, wanted = band_indices(BANDS if bands is None else bands, TREESATAI_BANDS, str(source))
    months = monthly_median(
        dates, centre_crop(pixels[:, selected]), centre_crop(clear), year=year, nodata=0
    )
    if georeference is not None and (longitude is None or latitude is None):
        longitude, latitude = _centre_of(georeference)
    return Observation(
        sample_id=source.stem if sample_id is None else sample_id,
        images=months + np.float32(offset or 0.0),
        bands=wanted,
        longitude=longitude,
        latitude=latitude,
        auxiliary={"longitude": longitude, "latitude": latitude} | dict(auxiliary or {}),
        key=str(source),
    )


def _product_dates(
    products: NDArray[Any], source: Path, offset: float | None
) -> list[datetime.date]:
    dates = []
    for product in products.tolist():
        name = product.decode("utf-8", "replace") if isinstance(product, bytes) else str(product)
        found = _PRODUCT.match(name)
        if found is None or found[1] != "L2A":
            raise PixelError(
                f"{source}: {name!r} is no name of a Sentinel-2 L2A product, from which to take "
                f"the date"
            )
        if offset is None and offset_of_baseline(found[3]) != 0:
            raise PixelError(
                f"{source}: {name} is of processing baseline {found[3]}. If its numbers are as in "
                f"the product, give offset=-1000; if they are harmonized, give offset=0"
            )
        dates.append(_day(found[2]))
    return dates


def _clear(
    masks: NDArray[Any], pixels: NDArray[Any], source: Path, max_cloud: float, max_snow: float
) -> NDArray[np.bool_]:
    """Where pixels are clear, (T, H, W), after a look at whether the masks are what they seem."""
    if pixels.ndim != 4 or pixels.shape[1] != len(TREESATAI_BANDS):
        raise PixelError(
            f"{source}: sen-2-data has shape {pixels.shape}; expected (dates, "
            f"{len(TREESATAI_BANDS)} bands, H, W)"
        )
    fits = masks.ndim == 4 and (len(masks), *masks.shape[2:]) == (len(pixels), *pixels.shape[2:])
    if not fits or masks.shape[1] < 2 or np.any(masks[:, 2:] != 0):
        raise PixelError(
            f"{source}: sen-2-masks has shape {masks.shape} beside data of {pixels.shape}; "
            f"expected (dates, 2, H, W) with the probabilities of snow and cloud"
        )
    # Interpolation leaves 1e-10 beside 0, and might undershoot as well.
    probability = masks[:, :2]
    if np.any(probability < -0.5) or np.any(probability > 100.5):
        raise PixelError(
            f"{source}: sen-2-masks has values from {np.nanmin(probability):g} to "
            f"{np.nanmax(probability):g}; expected probabilities in per cent"
        )
    return np.asarray((probability[:, 0] <= max_snow) & (probability[:, 1] <= max_cloud))


# Monthly GeoTIFFs -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Site:
    """The files of one sample."""

    sample_id: str
    key: str
    files: dict[int, Path]
    longitude: float | None = None
    latitude: float | None = None
    auxiliary: Mapping[str, float | None] | None = None


def read_monthly_folder(
    source: Path_,
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
            all, or the coordinates lie outside an image.
        BandError: A file lacks a band or does not name its bands.
        PixelError: An image is smaller than 5 x 5, or its numbers are not in `units`.
        MissingExtraError: rasterio is not installed.
    """
    if units not in ("dn", "reflectance"):
        raise PixelError(f"units are {units!r}; expected 'dn' or 'reflectance'")
    root = _existing(source)
    sites = _sites_in_folder(root) if root.is_dir() else _sites_in_csv(root)
    wanted = tuple(BANDS if bands is None else bands)
    return (_read_site(site, wanted, units, nodata) for site in sites)


def _read_site(
    site: _Site, wanted: tuple[str, ...], units: str, nodata: float | None
) -> Observation:
    # Not at the top: geofm.raster brings the factory and all models with it.
    from geofm.raster import read_image

    place = (site.longitude, site.latitude)
    longitude, latitude = place
    images = np.full((MONTHS, len(wanted), SIDE, SIDE), np.nan, np.float32)
    names = wanted
    for month, file in sorted(site.files.items()):
        image = read_image(file)
        indices, names = band_indices(wanted, image.bands, str(file))
        centre = None
        if image.crs is None:
            if longitude is None or latitude is None:
                raise RasterError(f"{file} has no coordinate system and {site.key} no coordinates")
        elif longitude is None or latitude is None:
            longitude, latitude = _centre(image.transform, image.crs, image.pixels.shape[-2:])
        elif place != (None, None):
            centre = _row_column(image.transform, image.crs, longitude, latitude)
        _warn_of_size(file, image.transform, image.crs)
        try:
            pixels = centre_crop(image.pixels[indices], centre=centre).astype(np.float32)
        except PixelError as error:
            raise type(error)(f"{file}: {error}") from error
        stored = image.pixels[indices]
        empty = [value for value in (nodata, image.nodata) if value is not None]
        pixels[np.isin(centre_crop(stored, centre=centre), empty)] = np.nan
        images[month - 1] = pixels
    _check_units(images, units, site.key)
    return Observation(
        sample_id=site.sample_id,
        images=images * np.float32(10_000.0 if units == "reflectance" else 1.0),
        bands=names,
        longitude=longitude,
        latitude=latitude,
        auxiliary={**(site.auxiliary or {}), "longitude": longitude, "latitude": latitude},
        key=site.key,
    )


def _check_units(images: NDArray[np.float32], units: str, key: str) -> None:
    known = images[np.isfinite(images)]
    if known.size == 0:
        return
    highest = float(known.max())
    if units == "dn" and highest <= _LOOKS_LIKE_REFLECTANCE:
        raise PixelError(
            f"{key}: the highest value is {highest:g}, which looks like reflectance; say "
            f"units='reflectance'"
        )
    if units == "reflectance" and highest > _LOOKS_LIKE_REFLECTANCE:
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
        site.longitude, site.latitude = _checked(float(named[2]), float(named[3]), site.key)
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
        if site.longitude is None or site.latitude is None:
            pair = site.auxiliary.get("longitude"), site.auxiliary.get("latitude")
            site.longitude, site.latitude = _checked(*pair, site.key)
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
    place = _checked(pair[0], pair[1], where)
    if place != (None, None):
        if site.longitude is not None and place != (site.longitude, site.latitude):
            raise RasterError(
                f"{where}: sample {sample_id} is at {place}, above at "
                f"{(site.longitude, site.latitude)}"
            )
        site.longitude, site.latitude = place
    _add_file(site, int(month), _existing(table.parent / row["path"].strip()))


def _add_file(site: _Site, month: int, file: Path) -> None:
    if month in site.files:
        raise RasterError(
            f"{site.key}: month {month} is in {site.files[month]} and in {file}; composite them "
            f"first, for example with geofm.datasets.monthly_median"
        )
    site.files[month] = file


# Places ---------------------------------------------------------------------------------------


def _checked(
    longitude: float | None, latitude: float | None, where: str
) -> tuple[float, float] | tuple[None, None]:
    if longitude is None and latitude is None:
        return None, None
    if longitude is None or latitude is None:
        raise RasterError(f"{where}: longitude and latitude must be given together")
    if not (abs(longitude) <= 180.0 and abs(latitude) <= 90.0):
        raise RasterError(f"{where}: {longitude}, {latitude} are no longitude and latitude")
    return longitude, latitude


def _existing(path: Path_) -> Path:
    if not Path(path).exists():
        raise DataNotFoundError(f"there is no {path}")
    return Path(path)


def _warp() -> Any:
    try:
        return importlib.import_module("rasterio.warp")
    except ImportError as error:
        raise MissingExtraError(
            "reading coordinates needs rasterio, which is not installed: "
            "pip install 'geofm[raster]'"
        ) from error


def _centre_of(raster: Path_) -> tuple[float, float]:
    """Longitude and latitude of a raster's centre."""
    _existing(raster)
    warp = _warp()
    rasterio: Any = importlib.import_module("rasterio")
    try:
        with rasterio.open(raster) as file:
            transform, crs, shape = tuple(file.transform)[:6], file.crs, file.shape
    except rasterio.errors.RasterioError as error:
        raise RasterError(f"{raster} cannot be read as a raster: {error}") from error
    if not crs:
        raise RasterError(f"{raster} has no coordinate system")
    del warp
    return _centre(transform, crs.to_wkt(), shape)


def _centre(transform: Sequence[float], crs: str, shape: tuple[int, ...]) -> tuple[float, float]:
    a, b, c, d, e, f = transform
    row, column = shape[0] / 2, shape[1] / 2
    x, y = _warp().transform(
        crs, "EPSG:4326", [a * column + b * row + c], [d * column + e * row + f]
    )
    return float(x[0]), float(y[0])


def _row_column(
    transform: Sequence[float], crs: str, longitude: float, latitude: float
) -> tuple[float, float]:
    """Where a place lies in an image, in pixels from its upper left corner."""
    a, b, c, d, e, f = transform
    xs, ys = _warp().transform("EPSG:4326", crs, [longitude], [latitude])
    x, y, area = xs[0] - c, ys[0] - f, a * e - b * d
    if area == 0 or not (math.isfinite(x) and math.isfinite(y)):
        raise RasterError(f"{longitude}, {latitude} cannot be placed in the image")
    return (a * y - d * x) / area, (e * x - b * y) / area


def _warn_of_size(file: Path, transform: Sequence[float], crs: str | None) -> None:
    if crs is None:
        return
    factor: Any = importlib.import_module("rasterio.crs").CRS.from_wkt(crs)
    side = math.sqrt(abs(transform[0] * transform[4] - transform[1] * transform[3]))
    # A degree of latitude; longitude shrinks, so only gross differences can be told.
    metres = side * (111_320.0 if factor.is_geographic else factor.linear_units_factor[1])
    if not 0.5 * _METRES <= metres <= 1.5 * _METRES:
        logger.warning("%s has pixels of about %.3g m; the model saw 10 m", file, metres)
