"""Twelve months of a region: bands in a model's order, georeference, and pixels in parts."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geofm.arrays.grid import cell_centres
from geofm.datasets._places import pixel_size
from geofm.datasets.observations import (
    HIGHEST_DN,
    LOOKS_LIKE_REFLECTANCE,
    LOWEST_DN,
    MONTHS,
    band_indices,
)
from geofm.embeddings.grids import Grid
from geofm.errors import BandError, MissingExtraError, PixelError, RasterError
from geofm.raster.sources import crs_as_wkt
from geofm.raster.windows import Axis

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Cube", "xarray_module"]

logger = logging.getLogger(__name__)

_CRS_ATTRS = ("crs_wkt", "spatial_ref", "crs")


class Cube:
    """Monthly images of a region, of which parts are read.

    Args:
        monthly: (month, band, y, x), in any order.
        bands: The bands to deliver, in order.
        crs: Coordinate reference system; None: what the array says.

    Attributes:
        array: The array it was made from.
        grid: Where its pixels lie; its crs is None if that is not known.

    Raises:
        PixelError: Dimensions or months do not fit.
        BandError: A band is missing or the bands have no names.
        RasterError: The coordinates tell no place, or the reference system cannot be understood.
        MissingExtraError: xarray or rasterio is not installed.
    """

    def __init__(self, monthly: xr.DataArray, bands: Sequence[str], crs: Any = None) -> None:
        xarray = xarray_module()
        if not isinstance(monthly, xarray.DataArray):
            raise PixelError(
                f"monthly images are an xarray.DataArray, got {type(monthly).__name__}"
            )
        _check_dims(monthly)
        names = _band_names(monthly)
        try:
            indices, _ = band_indices(bands, names, "the model")
        except BandError as error:
            raise BandError(
                f"{error}. To let another band stand in is your choice, made in the array; B8 for "
                f"B8A: xr.concat([monthly, monthly.sel(band=['B8']).assign_coords(band=['B8A'])], "
                f"'band')"
            ) from error
        order = np.asarray(_month_order(monthly))
        self.array = monthly.transpose("month", "band", "y", "x")[order, indices]
        fill = monthly.attrs.get("_FillValue")
        # A plain number, which is compared in the type of the pixels.
        self._fill = None if fill is None else float(fill)
        self.grid = Grid(
            (1, monthly.sizes["y"], monthly.sizes["x"]), _transform(monthly), _crs(monthly, crs)
        )
        self._warn_of_size()

    def read(self, top: int, left: int, rows: int, columns: int) -> NDArray[np.float32]:
        """Pixels of a part, which may reach beyond the region.

        Args:
            top: Its first row, also negative.
            left: Its first column.
            rows: How many.
            columns: How many.

        Returns:
            (12, bands, rows, columns), NaN where there is no data and outside the region.

        Raises:
            PixelError: These are no digital numbers, which are from -2000 to 65,534.
        """
        _, height, width = self.grid.shape
        y0, y1, x0, x1 = (
            max(top, 0),
            min(top + rows, height),
            max(left, 0),
            min(left + columns, width),
        )
        part = self.array[:, :, y0:y1, x0:x1].values
        values = part.astype(np.float32)
        values[~np.isfinite(values)] = np.nan
        if self._fill is not None:
            values[part == self._fill] = np.nan
        _check_numbers(values, f"rows {y0} to {y1 - 1}, columns {x0} to {x1 - 1}")
        out = np.full((*values.shape[:2], rows, columns), np.nan, np.float32)
        out[:, :, y0 - top : y1 - top, x0 - left : x1 - left] = values
        return out

    def lonlat(
        self, rows: NDArray[Any], columns: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Longitudes and latitudes of the centres of pixels.

        Args:
            rows: (n,).
            columns: (n,).

        Raises:
            RasterError: The reference system is not known.
        """
        if self.grid.crs is None:
            raise RasterError(
                "the monthly images have no coordinate reference system, which longitude and "
                "latitude need; give it: crs='EPSG:32632', or array.rio.write_crs(...)"
            )
        return self.grid.lonlat(*self.grid.xy(rows, columns))

    def _warn_of_size(self) -> None:
        if self.grid.crs is None:
            return
        metres = pixel_size(self.grid.transform, self.grid.crs)
        # Loosely, as degrees of longitude shrink towards the poles.
        if not 5 <= metres <= 15:
            logger.warning("pixels are of about %.3g m; expected about 10 m", metres)


def xarray_module() -> Any:
    """The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("xarray")
    except ImportError as error:
        raise MissingExtraError("labelled arrays need xarray: pip install 'geofm[dask]'") from error


def _check_dims(monthly: Any) -> None:
    found = sorted(map(str, monthly.dims))
    if found != ["band", "month", "x", "y"]:
        hint = (
            "composite the dates first: monthly_composite(array)"
            if "time" in found
            else "rename others: array.rename({'t': 'month'})"
        )
        raise PixelError(
            f"dimensions must be (month, band, y, x), in any order, got "
            f"({', '.join(map(str, monthly.dims))}); {hint}"
        )
    if monthly.sizes["month"] != MONTHS:
        raise PixelError(
            f"there must be {MONTHS} months, got {monthly.sizes['month']}; missing ones are NaN: "
            f"array.reindex(month=range(1, 13))"
        )
    if monthly.dtype.kind not in "iuf":
        raise PixelError(f"pixels must be integers or floats, got {monthly.dtype}")
    if not monthly.size:
        raise PixelError(f"the array is empty: {dict(monthly.sizes)}")


def _check_numbers(values: NDArray[np.float32], where: str) -> None:
    """Refuse what cannot be digital numbers; NaN is no data."""
    lowest, highest = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=-np.inf)
    if lowest > highest:
        return
    if lowest == highest == 0:
        raise PixelError(
            f"there are only zeros in {where}; is 0 no data? monthly_composite(..., nodata=0) "
            f"takes it for that, and so does monthly.where(monthly != 0)"
        )
    if lowest < LOWEST_DN or highest > HIGHEST_DN:
        raise PixelError(
            f"the values in {where} go from {lowest:g} to {highest:g}; reflectance times 10,000 is "
            f"from {LOWEST_DN:g} to {HIGHEST_DN:g}. Is there a no-data value to name: "
            f"monthly_composite(..., nodata=...), or the attribute _FillValue?"
        )
    if highest <= LOOKS_LIKE_REFLECTANCE:
        raise PixelError(
            f"the highest value in {where} is {highest:g}, which looks like reflectance; the model "
            f"takes reflectance times 10,000: monthly * 10000"
        )


def _month_order(monthly: Any) -> list[int]:
    if "month" not in monthly.coords:
        return list(range(MONTHS))
    numbers = monthly.coords["month"].values.tolist()
    if sorted(numbers, key=str) != sorted(range(1, MONTHS + 1), key=str):
        raise PixelError(
            f"the coordinate 'month' must hold the numbers 1 to {MONTHS}, but holds {numbers}"
        )
    return [numbers.index(month) for month in range(1, MONTHS + 1)]


def _band_names(monthly: Any) -> list[str]:
    values = monthly.coords["band"].values.tolist() if "band" in monthly.coords else None
    if values is None or not all(isinstance(value, str) for value in values):
        raise BandError(
            f"the {monthly.sizes['band']} bands have no names"
            f"{'' if values is None else f' but {values[:4]}'}; name them in order: "
            f"array.assign_coords(band=['B2', 'B3', ...])"
        )
    return [str(value) for value in values]


def _transform(monthly: Any) -> tuple[float, float, float, float, float, float]:
    """Upright, from the centres of the pixels."""
    ends = []
    for name in ("x", "y"):
        if name not in monthly.coords or monthly.coords[name].dims != (name,):
            raise RasterError(
                f"the monthly images have no coordinate {name!r} that tells where the pixels lie; "
                f"array.assign_coords({name}=centres of the pixels)"
            )
        length = monthly.sizes[name]
        # One cell a pixel.
        axis = Axis(length, length, (0,), length, (0,), 0.0, 1, 1)
        found = cell_centres(name, monthly.coords[name].values, axis)
        if found is None:
            raise RasterError(
                f"a single pixel along {name} does not tell its size; take two or more"
            )
        centres, step = found
        ends.append((step, float(centres[0]) - step / 2))
    (dx, left), (dy, top) = ends
    return dx, 0.0, left, 0.0, dy, top


def _crs(monthly: Any, given: Any) -> str | None:
    """As WKT: what is given, else what the grid mapping or the attributes say."""
    if given is None:
        given = _declared_crs(monthly)
        if given is None:
            return None
    return crs_as_wkt(given)


def _declared_crs(monthly: Any) -> Any:
    """What the grid mapping says that the array names; without one the usual coordinates."""
    mapping = monthly.encoding.get("grid_mapping") or monthly.attrs.get("grid_mapping")
    if mapping in monthly.coords:
        # Alone: others may be left from before a reprojection.
        places = [monthly.coords[mapping].attrs]
    else:
        usual = [n for n in ("spatial_ref", "crs") if n in monthly.coords]
        places = [*(monthly.coords[n].attrs for n in usual), monthly.attrs]
    found = (attrs[key] for attrs in places for key in _CRS_ATTRS if key in attrs)
    return next(found, None)
