"""Dated images to twelve months, lazily, as a plain loop would do it."""

from __future__ import annotations

import datetime
from typing import Any

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr
from conftest import data

from geofm import PixelError
from geofm.datasets import monthly_median
from geofm.series import CLOUDS, monthly_composite

DATES = np.array(
    ["2020-01-03", "2020-01-31", "2021-01-15", "2020-03-01", "2020-12-31", "2021-12-01"],
    dtype="datetime64[ns]",
)


def series(dates: np.ndarray = DATES, size: tuple[int, int] = (7, 6), **attrs: Any) -> xr.DataArray:
    values = np.random.default_rng(0).integers(1, 9000, (len(dates), 2, *size)).astype(np.uint16)
    return xr.DataArray(
        values,
        dims=("time", "band", "y", "x"),
        coords={
            "time": dates,
            "band": ["B2", "B3"],
            "y": 5e6 - 10.0 * np.arange(size[0]),
            "x": 5e5 + 10.0 * np.arange(size[1]),
            "orbit": ("time", np.arange(len(dates))),
            "spatial_ref": 0,
        },
        attrs=attrs,
    )


def cloud(array: xr.DataArray) -> xr.DataArray:
    values = np.random.default_rng(1).random(array.isel(band=0).shape) < 0.4
    return array.isel(band=0, drop=True).copy(data=values)


def plain(
    array: xr.DataArray, cloudy: np.ndarray, statistic: Any, least: int = 1, year: int | None = None
) -> np.ndarray:
    """Pixel by pixel."""
    days = [datetime.date.fromisoformat(str(d)[:10]) for d in array.time.values]
    out = np.full((12, *array.shape[1:]), np.nan)
    for month, band, y, x in np.ndindex(out.shape):
        values = [
            float(array.values[t, band, y, x])
            for t, day in enumerate(days)
            if day.month == month + 1 and year in (None, day.year) and not cloudy[t, y, x]
        ]
        if len(values) >= least:
            out[month, band, y, x] = statistic(values)
    return out.astype(np.float32)


@pytest.mark.parametrize(("name", "function"), [("median", np.median), ("mean", np.mean)])
@pytest.mark.parametrize(("least", "year"), [(1, None), (2, None), (1, 2020)])
@pytest.mark.parametrize("lazy", [False, True])
def test_composite_is_that_of_a_plain_loop(
    name: str, function: Any, least: int, year: int | None, lazy: bool
) -> None:
    array = series()
    mask = cloud(array)
    wanted = plain(array, mask.values, function, least, year)
    if lazy:
        # Chunks of the mask need not be those of the pixels.
        array = array.chunk(time=2, band=1, y=4, x=5)
        mask = mask.chunk(time=3, y=3)
    out = monthly_composite(array, mask, statistic=name, min_clear=least, year=year)
    assert (out.chunks is not None) == lazy
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.values, wanted, rtol=1e-6)
    assert out.dims == ("month", "band", "y", "x")
    assert out.month.values.tolist() == list(range(1, 13))
    assert sorted(out.coords) == ["band", "month", "spatial_ref", "x", "y"]


def test_nothing_is_computed_before_it_is_asked_for_and_no_task_holds_the_whole() -> None:
    largest = []

    def block(block_info: Any = None) -> np.ndarray:
        shape = [hi - lo for lo, hi in block_info[None]["array-location"]]
        largest.append(shape)
        return np.ones(shape, np.uint16)

    dates = np.arange("2020-01-01", "2021-01-01", 10, dtype="datetime64[D]").astype("<M8[ns]")
    lazy = da.map_blocks(block, chunks=((1,) * len(dates), (2,), (8,) * 4, (8,) * 4), dtype="u2")
    array = series(dates, (32, 32)).copy(data=lazy)
    largest.clear()
    out = monthly_composite(array)
    assert not largest
    assert out.data.chunksize == (1, 2, 8, 8)
    with dask.config.set(scheduler="synchronous"):
        part = out[0, :, :8, :8].values
    # The four images of January, in one chunk of 16.
    assert len(largest) == 4
    assert (part == 1).all()


def test_array_in_memory_may_have_a_lazy_mask() -> None:
    array = series()
    mask = cloud(array)
    out = monthly_composite(array, mask.chunk(time=1, y=3))
    assert out.chunks is not None
    np.testing.assert_array_equal(out.values, monthly_composite(array, mask).values)


def test_months_without_an_image_and_months_under_cloud_are_nan() -> None:
    array = series()
    mask = cloud(array) | True
    mask[3] = False
    out = monthly_composite(array, mask)
    assert np.isfinite(out.values).all(axis=(1, 2, 3)).tolist() == [m == 3 for m in range(1, 13)]
    np.testing.assert_array_equal(out.sel(month=3).values, array.values[3].astype(np.float32))


def test_years_are_pooled_unless_one_is_chosen() -> None:
    array = series()
    both, one = monthly_composite(array), monthly_composite(array, year=2021)
    np.testing.assert_array_equal(both[0].values, np.median(array.values[:3], axis=0))
    np.testing.assert_array_equal(one[0].values, array.values[2])
    assert np.isnan(one[2].values).all()
    with pytest.raises(PixelError, match="no image is of 2019; there are 2020, 2021"):
        monthly_composite(array, year=2019)


def test_classes_of_a_scene_classification_are_taken_for_cloud() -> None:
    array = series()
    scl = cloud(array).copy(data=np.random.default_rng(3).integers(0, 12, cloud(array).shape))
    wanted = monthly_composite(array, scl.isin(list(CLOUDS))).values
    np.testing.assert_array_equal(monthly_composite(array, scl.astype(np.uint8)).values, wanted)
    np.testing.assert_array_equal(
        monthly_composite(array, scl, classes=[4]).values, monthly_composite(array, scl == 4).values
    )


def numbers(highest: int, lowest: int = 0) -> xr.DataArray:
    """A mask of integers of all values from the lowest to the highest."""
    mask = cloud(series())
    values = np.random.default_rng(5).integers(lowest, highest + 1, mask.shape)
    values[:, 0, 0], values[:, -1, -1] = lowest, highest
    return mask.copy(data=values)


@pytest.mark.parametrize(
    ("highest", "says"),
    [
        (100, "from 0 to 100, but the classes of SCL are 0 to 11.*mask > 20"),
        (12, "from 0 to 12"),
        (1, r"mask == 1, or mask.astype\(bool\)"),
    ],
)
@pytest.mark.parametrize("pixels_are_lazy", [False, True])
def test_masks_that_cannot_be_classes_of_scl_are_refused(
    highest: int, says: str, pixels_are_lazy: bool
) -> None:
    array, mask = series(), numbers(highest)
    source = array.chunk(time=1) if pixels_are_lazy else array
    with pytest.raises(PixelError, match=says):
        monthly_composite(source, mask)
    out = monthly_composite(source, mask.chunk(time=1))
    with pytest.raises(PixelError, match=says):
        out.compute(scheduler="synchronous")
    # Named classes are taken as they are said to be.
    named = monthly_composite(source, mask.chunk(time=1), classes=[1])
    np.testing.assert_array_equal(named.values, monthly_composite(array, mask == 1).values)


def test_masks_below_the_classes_of_scl_are_refused() -> None:
    with pytest.raises(PixelError, match="from -1 to 9"):
        monthly_composite(series(), numbers(9, lowest=-1))


def test_a_mask_of_zeros_alone_is_refused_unless_it_is_lazy() -> None:
    array = series()
    mask = cloud(array).astype(np.uint8) * 0
    with pytest.raises(PixelError, match="no value above 1"):
        monthly_composite(array, mask)
    # Beyond the edge of a Sentinel-2 swath there is no data, and a task sees no more than its part.
    scl = numbers(11)
    scl[:, :3] = 0
    for part in (scl, scl.chunk(y=3)):
        out = monthly_composite(array, part)
        assert np.isnan(out.values[:, :, :3]).all()
        assert np.isfinite(out.values[0, :, 3:]).any()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("fill", [1e20, np.float64(1e20)])
def test_no_data_is_recognised_in_the_pixels_own_precision(lazy: bool, fill: float) -> None:
    array = series().astype(np.float32)
    array.values[0, 0, 0, 0] = fill
    wanted = float(array.values[1:3, 0, 0, 0].mean())
    for given, options in ((array, {"nodata": fill}), (array.assign_attrs(_FillValue=fill), {})):
        out = monthly_composite(given.chunk(time=1) if lazy else given, **options)
        assert out.values[0, 0, 0, 0] == np.float32(wanted)


@pytest.mark.parametrize("lazy", [False, True])
def test_no_data_is_not_used_and_values_are_not_shifted(lazy: bool) -> None:
    array = series(_FillValue=65535)
    array.values[0, 0, 0, 0], array.values[1, 0, 0, 0] = 65535, 0
    source = array.chunk(time=1) if lazy else array
    out = monthly_composite(source, nodata=0)
    assert out.values[0, 0, 0, 0] == array.values[2, 0, 0, 0]
    assert "_FillValue" not in out.attrs


def test_real_series_is_composited_as_monthly_median_does() -> None:
    names = [
        data("treesatai_ts", "Abies_alba_1_1005_WEFL_NLF_2020.h5"),
        data("treesatai_ts", "Betula_spec._1_15679_WEFL_NLF_2019.h5"),
    ]
    for name in names:
        with h5py.File(name) as file:
            pixels = file["sen-2-data"][:].astype(np.float32)
            # Snow, cloud in per cent.
            clear = (file["sen-2-masks"][:, :2] <= np.array([1, 20])[:, None, None]).all(axis=1)
            products = [p.decode() for p in file["sen-2-products"][:]]
        dates = np.array([p.split("_")[2][:8] for p in products])
        dates = np.array([f"{d[:4]}-{d[4:6]}-{d[6:]}" for d in dates], dtype="datetime64[ns]")
        array = xr.DataArray(pixels, dims=("time", "band", "y", "x"), coords={"time": dates})
        mask = xr.DataArray(~clear, dims=("time", "y", "x"), coords={"time": dates})
        wanted = monthly_median(dates, pixels, clear, nodata=0)
        assert np.isfinite(wanted).mean() > 0.5
        for source in (array, array.chunk(time=10, y=4)):
            found = monthly_composite(source, mask, nodata=0)
            np.testing.assert_array_equal(found.values, wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, m: (a.values, m), "takes an xarray.DataArray, got ndarray"),
        (lambda a, m: (a.to_dataset(name="s"), m), "to_dataarray"),
        (lambda a, m: (a.rename(time="t"), m), r"array.rename\(\{'t': 'time'\}\)"),
        (lambda a, m: (a.drop_vars("time"), m), "no coordinate 'time' at all"),
        (lambda a, m: (a.assign_coords(time=np.arange(6)), m), "datetime64 .* got int64"),
        (lambda a, m: (a.astype(complex), m), "integers or floats, got complex128"),
        (lambda a, m: (a, m.values), "the mask must be a DataArray of .* got a ndarray"),
        (lambda a, m: (a, m[:, :3]), "the mask must be a DataArray .*'y': 3"),
        (lambda a, m: (a, m.assign_coords(x=m.x + 5)), "the mask's x differs"),
        (lambda a, m: (a, m.astype(float)), "True for cloud, .* got float64"),
        (lambda a, m: (a, m.astype(float)), r"scl.fillna\(0\).astype\('uint8'\)"),
    ],
)
def test_what_does_not_fit_is_told(change: Any, says: str) -> None:
    array = series()
    with pytest.raises(PixelError, match=says):
        monthly_composite(*change(array, cloud(array)))


@pytest.mark.parametrize("options", [{"statistic": "mode"}, {"min_clear": 0}])
def test_impossible_options_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(PixelError, match=next(iter(options))):
        monthly_composite(series(), **options)
