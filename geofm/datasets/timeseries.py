"""Series of dated images on their way to an `Observation`: monthly medians of clear pixels."""

from __future__ import annotations

import datetime
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets._places import centre_of_raster, checked_place, existing
from geofm.datasets.compositing import composite
from geofm.datasets.observations import (
    BANDS,
    LOOKS_LIKE_REFLECTANCE,
    MONTHS,
    Observation,
    band_indices,
    centre_crop,
)
from geofm.errors import MissingExtraError, PixelError
from geofm.preprocess import offset_of_baseline

__all__ = ["TREESATAI_BANDS", "monthly_median", "read_series_h5"]

Date = datetime.date | np.datetime64 | str

TREESATAI_BANDS: Final = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
"""Order of the bands in TreeSatAI time series."""

_PRODUCT: Final = re.compile(r"S2[A-Z]_MSI(L1C|L2A)_(\d{8})T\d{6}_(N\d{4})_")


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
    if mask is not None:
        mask = np.asarray(mask)
        expected = (pixels.shape[0], *pixels.shape[2:])
        if mask.dtype != np.bool_ or mask.shape != expected:
            raise PixelError(
                f"the mask has shape {mask.shape} and type {mask.dtype}; expected bool of shape "
                f"{expected}, True where a pixel is usable"
            )
    months = np.array([day.month if year in (None, day.year) else 0 for day in days])
    empty = () if nodata is None else (nodata,)
    images = []
    for month in range(1, MONTHS + 1):
        chosen = months == month
        clear = None if mask is None else mask[chosen]
        images.append(composite(pixels[chosen], clear, nodata=empty))
    return np.stack(images)


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


def read_series_h5(
    path: str | os.PathLike[str],
    *,
    bands: Sequence[str] | None = None,
    max_cloud: float = 20.0,
    max_snow: float = 1.0,
    year: int | None = None,
    longitude: float | None = None,
    latitude: float | None = None,
    georeference: str | os.PathLike[str] | None = None,
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
        longitude: Degrees east, WGS 84; None for that in `auxiliary`.
        latitude: Degrees north, WGS 84; None for that in `auxiliary`.
        georeference: A raster of the same place, whose centre gives the coordinates where they are
            not given.
        auxiliary: The site's variables by name.
        sample_id: Identifier; None for the file's name.
        offset: Added to the stored numbers. None: 0, and an error if a product (of `year`) is of
            baseline 04.00 or later, of which the file does not tell whether 1000 was subtracted.
            One that is not 0 fits either older or newer products: a series of both is an error.

    Returns:
        The observation; a month without any clear pixel is NaN. From 6 x 6 pixels the last row and
        column are left out.

    Raises:
        DataNotFoundError: There is no such file.
        PixelError: The file is no such series, or its products' numbers are ambiguous.
        BandError: A band is not among `TREESATAI_BANDS`.
        RasterError: The georeference cannot be read, or the coordinates are impossible.
        MissingExtraError: h5py is not installed, or rasterio for the georeference.
    """
    source = existing(path)
    pixels, masks, products = _read_h5(source)
    dates = _product_dates(products, source, offset, year)
    clear = _clear(masks, pixels, source, max_cloud, max_snow)
    selected, wanted = band_indices(BANDS if bands is None else bands, TREESATAI_BANDS, str(source))
    months = monthly_median(
        dates, centre_crop(pixels[:, selected]), centre_crop(clear), year=year, nodata=0
    )
    site = dict(auxiliary or {})
    if longitude is None and latitude is None:
        longitude, latitude = site.get("longitude"), site.get("latitude")
    if longitude is None and latitude is None and georeference is not None:
        longitude, latitude = centre_of_raster(georeference)
    longitude, latitude = checked_place(longitude, latitude, str(source))
    return Observation(
        sample_id=source.stem if sample_id is None else sample_id,
        images=months + np.float32(offset or 0.0),
        bands=wanted,
        longitude=longitude,
        latitude=latitude,
        auxiliary={**site, "longitude": longitude, "latitude": latitude},
        key=str(source),
    )


def _read_h5(source: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Pixels, masks and product names."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise MissingExtraError(
            "reading HDF5 needs h5py, which is not installed: pip install 'geofm[raster]'"
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
    return pixels, masks, products


def _product_dates(
    products: NDArray[Any], source: Path, offset: float | None, year: int | None
) -> list[datetime.date]:
    """Dates of the products, after a look at whether the offset fits those of the year."""
    dates = []
    shifts = set()
    for product in products.tolist():
        name = product.decode("utf-8", "replace") if isinstance(product, bytes) else str(product)
        found = _PRODUCT.match(name)
        if found is None or found[1] != "L2A":
            raise PixelError(
                f"{source}: {name!r} is no name of a Sentinel-2 L2A product, from which to take "
                f"the date"
            )
        dates.append(_day(found[2]))
        if year not in (None, dates[-1].year):
            continue
        if offset is None and offset_of_baseline(found[3]) != 0:
            raise PixelError(
                f"{source}: {name} is of processing baseline {found[3]}. If its numbers are as in "
                f"the product, give offset=-1000; if they are harmonized, give offset=0"
            )
        # N9999 does not tell: what was given is believed.
        if offset and found[3] != "N9999":
            shifts.add(offset_of_baseline(found[3]))
    if len(shifts) > 1:
        raise PixelError(
            f"{source} has products of processing baselines from before 04.00 and from after, so "
            f"one offset ({offset}) does not fit all. Choose a year that has one kind (year=); or "
            f"bring the numbers to one scale first and give offset=0"
        )
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
    if not np.nanmax(pixels, initial=0.0) > LOOKS_LIKE_REFLECTANCE:
        raise PixelError(
            f"{source}: the highest value is {np.nanmax(pixels, initial=0.0):g}; expected digital "
            f"numbers, reflectance times 10,000"
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
