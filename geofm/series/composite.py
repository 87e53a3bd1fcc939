"""Dated images to twelve monthly ones, chunk by chunk."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets.compositing import STATISTICS, composite
from geofm.datasets.observations import MONTHS
from geofm.errors import MissingExtraError, PixelError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["CLOUDS", "monthly_composite"]

CLOUDS: Final = (0, 1, 3, 8, 9, 10)
"""Classes of Sentinel-2's SCL that are not used: no data, saturated, cloud shadow, cloud of medium
and of high probability, cirrus. Snow (11) is used, as it is what the ground looks like."""

_LAST_CLASS: Final = 11


def monthly_composite(
    array: xr.DataArray,
    mask: xr.DataArray | None = None,
    *,
    classes: Sequence[int] | None = None,
    year: int | None = None,
    statistic: str = "median",
    min_clear: int = 1,
    nodata: float | None = None,
) -> xr.DataArray:
    """Composite dated images into twelve months, lazily where the images are lazy.

    Nothing is computed here if `array` or `mask` is in dask chunks; a task takes the images of one
    month in one chunk. Values stay what they are: an offset of newer Sentinel-2 products is neither
    added nor removed, so bring images of different baselines to one scale before.

    Args:
        array: (time, band, y, x), in any order, integers or floats; ``time`` holds datetime64.
        mask: (time, y, x) at the same dates and pixels. Of booleans, True is cloud and not used (in
            `geofm.datasets.monthly_median` it is the other way round); of integers, SCL's classes,
            `CLOUDS` are. None: all pixels are clear.
        classes: Values of an integer mask that are not used, of whatever classes it has. None:
            `CLOUDS`, if the mask can be SCL: values above 11 are refused, and a mask of 0 and 1
            alone. Of a lazy mask that is found when computing, for each chunk of a month: if it has
            1 and nothing above it is refused; if it has 0 alone it counts as no data, as in SCL.
        year: Use images of this year alone; None pools all years, January with January.
        statistic: ``"median"`` (of an even number the mean of the middle two) or ``"mean"``.
        min_clear: Clear values that a month needs; with fewer it is NaN.
        nodata: Stored value that means "no data". NaN, infinity, and the array's ``_FillValue``
            attribute always do.

    Returns:
        (month, band, y, x) float32, ``month`` from 1 to 12; NaN where a month has too few clear
        values, and throughout where it has no image. Coordinates without time are kept.

    Raises:
        PixelError: Dimensions, dates, types or the mask do not fit, or no image is of `year`. What
            cannot be told of a lazy mask is found when computing.
        MissingExtraError: xarray is not installed.
    """
    xarray = _xarray()
    if statistic not in STATISTICS:
        raise PixelError(f"statistic is 'median' or 'mean', got {statistic!r}")
    if min_clear < 1:
        raise PixelError(f"min_clear is a number of images from 1 on, got {min_clear}")
    array = _checked_array(xarray, array)
    months = _months(array, year)
    cloudy = None if mask is None else _cloudy(xarray, mask, array, classes)
    fill = array.attrs.get("_FillValue")
    empty = tuple(float(value) for value in (nodata, fill) if value is not None)
    pixels = array.data
    if cloudy is not None and not _lazy(pixels) and _lazy(cloudy):
        pixels = _dask().from_array(pixels, chunks=("auto", -1, *cloudy.chunks[1:]))

    one = functools.partial(
        _one_month, classes=classes, nodata=empty, statistic=statistic, min_clear=min_clear
    )
    parts = [_of_month(pixels, cloudy, months == month, one) for month in range(1, MONTHS + 1)]
    values = _dask().stack(parts) if _lazy(pixels) else np.stack(parts)
    coords = {name: c for name, c in array.coords.items() if "time" not in (name, *c.dims)}
    kept = {key: value for key, value in array.attrs.items() if key != "_FillValue"}
    made = f"{statistic} of {'all years' if year is None else year}, at least {min_clear} clear"
    result = xarray.DataArray(
        values,
        dims=("month", "band", "y", "x"),
        coords={**coords, "month": np.arange(1, MONTHS + 1)},
        attrs={**kept, "GEOFM_COMPOSITE": made},
        name=array.name,
    )
    mapping = array.encoding.get("grid_mapping")
    if mapping is not None and "grid_mapping" not in kept:
        result.encoding["grid_mapping"] = mapping
    return result  # type: ignore[no-any-return]


def _of_month(
    pixels: Any, cloudy: Any, chosen: NDArray[np.bool_], one: Callable[..., NDArray[np.float32]]
) -> Any:
    """The composite of some of the images: (band, y, x)."""
    index = np.flatnonzero(chosen)
    if not _lazy(pixels):
        return one(pixels[index], None if cloudy is None else np.asarray(cloudy)[index])
    dask = _dask()
    if not len(index):
        return dask.full(pixels.shape[1:], np.nan, dtype=np.float32, chunks=pixels.chunks[1:])
    some = pixels[index].rechunk({0: -1})
    masks = []
    if cloudy is not None:
        cloudy = dask.asarray(cloudy)[index]
        masks = [cloudy.rechunk((-1, *some.chunks[2:]))[:, None]]
    return dask.map_blocks(
        one, some, *masks, dtype=np.float32, drop_axis=0, meta=np.empty((0, 0, 0), np.float32)
    )


def _one_month(
    pixels: NDArray[Any],
    mask: NDArray[Any] | None = None,
    *,
    classes: Sequence[int] | None,
    **options: Any,
) -> NDArray[np.float32]:
    """(n, band, y, x) to (band, y, x); a lazy mask comes as (n, 1, y, x), perhaps of classes."""
    if mask is not None and mask.ndim == 4:
        mask = mask[:, 0]
    if mask is not None and mask.dtype.kind != "b":
        mask = _of_classes(mask, classes, whole=False)
    return composite(pixels, None if mask is None else ~mask, **options)


def _checked_array(xarray: Any, array: Any) -> Any:
    if not isinstance(array, xarray.DataArray):
        raise PixelError(
            f"monthly_composite takes an xarray.DataArray, got {type(array).__name__}"
            + (
                "; bring its variables together: dataset.to_dataarray('band')"
                if isinstance(array, xarray.Dataset)
                else ""
            )
        )
    if sorted(map(str, array.dims)) != ["band", "time", "x", "y"]:
        raise PixelError(
            f"dimensions must be (time, band, y, x), in any order, got "
            f"({', '.join(map(str, array.dims))}); rename others: array.rename({{'t': 'time'}})"
        )
    if array.dtype.kind not in "iuf":
        raise PixelError(f"pixels must be integers or floats, got {array.dtype}")
    return array.transpose("time", "band", "y", "x")


def _months(array: Any, year: int | None) -> NDArray[np.int64]:
    """The month of each image; 0 of those of other years."""
    dates = array.coords["time"].values if "time" in array.coords else np.zeros(0)
    if dates.dtype.kind != "M":
        found = dates.dtype if "time" in array.coords else "no coordinate 'time' at all"
        raise PixelError(
            f"the dates must be datetime64 in the coordinate 'time', got {found}; "
            f"array.assign_coords(time=pandas.to_datetime([...]))"
        )
    if np.isnat(dates).any():
        raise PixelError(f"{int(np.isnat(dates).sum())} of {len(dates)} dates are missing (NaT)")
    years = dates.astype("datetime64[Y]").astype(np.int64) + 1970
    months: NDArray[np.int64] = dates.astype("datetime64[M]").astype(np.int64) % MONTHS + 1
    if year is None:
        return months
    if not (years == year).any():
        there = ", ".join(map(str, np.unique(years))) or "none"
        raise PixelError(f"no image is of {year}; there are {there}")
    return np.where(years == year, months, 0)


def _cloudy(xarray: Any, mask: Any, array: Any, classes: Sequence[int] | None) -> Any:
    """(time, y, x) bool, True where a pixel is not used; of a lazy mask perhaps still classes."""
    wanted = {dim: array.sizes[dim] for dim in ("time", "y", "x")}
    fits = isinstance(mask, xarray.DataArray) and {str(d): n for d, n in mask.sizes.items()}
    if fits != wanted:
        found = f"a DataArray of {fits}" if fits else f"a {type(mask).__name__}"
        raise PixelError(
            f"the mask must be a DataArray of {wanted}, got {found}; resample it to the pixels, "
            f"mask.sel(band='SCL') takes one band"
        )
    for dim in wanted:
        if dim not in mask.coords or dim not in array.coords:
            continue
        # Values are paired by their place in the arrays, so that must be the same place.
        if not np.array_equal(mask.coords[dim].values, array.coords[dim].values):
            raise PixelError(
                f"the mask's {dim} differs from the pixels'; bring it to them: "
                f"mask.sel({dim}=array.{dim}), or mask.interp_like(array, method='nearest')"
            )
    mask = mask.transpose("time", "y", "x")
    if mask.dtype.kind == "b":
        return mask.data
    if mask.dtype.kind not in "iu":
        raise PixelError(
            f"a mask is boolean, True for cloud, or holds integer classes, got {mask.dtype}; of "
            f"probabilities say where they are cloud: probability > 20; of SCL with NaN make "
            f"integers: scl.fillna(0).astype('uint8')"
        )
    return mask.data if _lazy(mask.data) else _of_classes(mask.values, classes, whole=True)


def _of_classes(
    values: NDArray[Any], classes: Sequence[int] | None, *, whole: bool
) -> NDArray[np.bool_]:
    """Where classes are not used, after a look at whether they can be SCL if none are named."""
    if classes is None and values.size:
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest > _LAST_CLASS:
            raise PixelError(
                f"the mask has values from {lowest} to {highest}, but the classes of SCL are 0 to "
                f"{_LAST_CLASS}; of probabilities say where they are cloud: mask > 20; of other "
                f"classes name those that are cloud: classes=[...]"
            )
        # Where a part of SCL has no data it is 0 alone; saturated pixels (1) are few among others.
        if highest == 1 or (whole and highest == 0):
            raise PixelError(
                "the mask is of integers, but has no value above 1. If 1 is cloud, make it "
                "boolean: mask == 1, or mask.astype(bool); if it is SCL, say so: "
                f"classes={list(CLOUDS)}"
            )
    return np.isin(values, CLOUDS if classes is None else list(classes))


def _lazy(data: Any) -> bool:
    return hasattr(data, "dask")


def _xarray() -> Any:
    try:
        return importlib.import_module("xarray")
    except ImportError as error:
        raise MissingExtraError(
            "monthly_composite needs xarray: pip install 'geofm[dask]'"
        ) from error


def _dask() -> Any:
    # What is lazy was made by dask, so it is there.
    return importlib.import_module("dask.array")
