"""The synthetic scenes: what they promise of shape, and what they must share with real ones."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from geofm.datasets.samples import (
    LAND_COVER,
    SPECTRA,
    Scene,
    landscape,
    tiles,
    write_eurosat,
    write_scene,
)
from geofm.errors import MissingExtraError, PixelError

L2A = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
L1C = (*L2A[:10], "B10", *L2A[10:])
DAYS = (20, 110, 200, 290)
GOLDEN_COUNTS = [368, 416, 1443, 179, 1205, 209, 276]
GOLDEN_MEANS = [
    277.29,
    361.23,
    626.95,
    449.71,
    939.92,
    2317.55,
    2863.51,
    3056.02,
    3224.69,
    3205.72,
    1767.17,
    969.69,
]


@pytest.fixture(scope="module")
def year() -> dict[int, Scene]:
    return {day: landscape((192, 224), seed=0, day_of_year=day) for day in DAYS}


def band(scene: Scene, name: str) -> NDArray[np.float64]:
    return np.asarray(scene.pixels[scene.bands.index(name)], np.float64)


def of_class(scene: Scene, name: str) -> NDArray[np.bool_]:
    return np.asarray(scene.land_cover == LAND_COVER.index(name))


def ndvi(scene: Scene, name: str) -> float:
    nir, red = band(scene, "B8"), band(scene, "B4")
    return float(((nir - red) / (nir + red))[of_class(scene, name)].mean())


def neighbours(image: NDArray[np.float64]) -> float:
    return float(np.corrcoef(image[:, :-1].ravel(), image[:, 1:].ravel())[0, 1])


def roughness(image: NDArray[np.float64]) -> float:
    """Second difference relative to the first: high for white noise, low for smooth images."""
    return float(np.abs(np.diff(image, 2, axis=1)).mean() / np.abs(np.diff(image, axis=1)).mean())


# --- form ------------------------------------------------------------------------------------


def test_spectra_cover_every_class_with_twelve_plausible_values() -> None:
    assert set(SPECTRA) == set(LAND_COVER)
    for ends in SPECTRA.values():
        assert set(ends) == {"dormant", "peak"}
        assert all(len(s) == 12 and all(0.0 < v < 0.6 for v in s) for s in ends.values())
    soil, leaf = SPECTRA["bare_soil"]["peak"], SPECTRA["forest_deciduous"]["peak"]
    assert soil[10] > soil[7] > soil[3] > soil[1]
    assert leaf[7] > 8 * leaf[3]
    with pytest.raises(TypeError):
        SPECTRA["water"] = {}  # type: ignore[index]


@pytest.mark.parametrize(("level", "bands"), [("L2A", L2A), ("L1C", L1C)])
@pytest.mark.parametrize("size", [(32, 32), (50, 97), (129, 64)])
def test_form(level: str, bands: tuple[str, ...], size: tuple[int, int]) -> None:
    scene = landscape(size, seed=4, day_of_year=60, level=level)
    assert scene.pixels.shape == (len(bands), *size)
    assert scene.pixels.dtype == np.uint16
    assert scene.land_cover.shape == size
    assert scene.land_cover.dtype == np.uint8
    assert scene.land_cover.max() < len(LAND_COVER)
    assert (scene.bands, scene.level, scene.crs) == (bands, level, "EPSG:32632")
    assert scene.date == datetime.date(2021, 3, 1)
    assert scene.pixels.min() >= 1
    assert scene.pixels.max() < 10_000


def test_resolution_sets_the_grid() -> None:
    scene = landscape((64, 64), seed=1, resolution=20.0)
    a, b, c, d, e, f = scene.transform
    assert (a, b, d, e) == (20.0, 0.0, 0.0, -20.0)
    assert c % 60 == 0
    assert f % 60 == 0
    # 20 m bands are native at 20 m: no interpolation is left to smooth them.
    assert roughness(band(scene, "B5")) > 0.9 * roughness(band(scene, "B4"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (31, 64)},
        {"size": (64,)},
        {"level": "L2B"},
        {"day_of_year": 0},
        {"day_of_year": 366},
        {"resolution": 0.0},
        {"resolution": float("nan")},
        {"seed": -1},
    ],
)
def test_refuses_impossible_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(PixelError, match=f"^{next(iter(arguments))} is .*expected"):
        landscape(**arguments)  # type: ignore[arg-type]


# --- determinism -----------------------------------------------------------------------------


def test_same_seed_same_pixels_other_seed_other_place() -> None:
    first = landscape((64, 80), seed=7, level="L1C")
    again = landscape((64, 80), seed=7, level="L1C")
    other = landscape((64, 80), seed=8, level="L1C")
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.transform == again.transform != other.transform
    assert (first.land_cover != other.land_cover).mean() > 0.2


def test_golden() -> None:
    """Pinned on one machine; a difference on another means a step that is not portable."""
    scene = landscape((64, 64), seed=3, day_of_year=150)
    counts = np.bincount(scene.land_cover.ravel(), minlength=len(LAND_COVER))
    np.testing.assert_array_equal(counts, GOLDEN_COUNTS)
    means = scene.pixels.mean(axis=(1, 2))
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.02)


def test_another_day_is_the_same_place(year: dict[int, Scene]) -> None:
    for scene in year.values():
        np.testing.assert_array_equal(scene.land_cover, year[20].land_cover)
        assert scene.transform == year[20].transform
    assert (year[20].pixels != year[200].pixels).mean() > 0.9


def test_numpy_global_state_is_neither_read_nor_changed() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = landscape((32, 32), seed=2)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    np.random.seed(1)
    np.testing.assert_array_equal(first.pixels, landscape((32, 32), seed=2).pixels)


# --- plausibility ----------------------------------------------------------------------------


def test_every_class_is_present(year: dict[int, Scene]) -> None:
    share = {name: float(of_class(year[20], name).mean()) for name in LAND_COVER}
    assert min(share.values()) > 0.003, share
    assert max(share.values()) < 0.6, share


@pytest.mark.parametrize("seed", [1, 2])
def test_phenology(seed: int) -> None:
    days = {day: landscape((128, 128), seed=seed, day_of_year=day) for day in (20, 200)}
    winter, summer = days[20], days[200]
    for forest in ("forest_evergreen", "forest_deciduous"):
        assert ndvi(summer, forest) > 0.6
    assert ndvi(winter, "forest_deciduous") < ndvi(summer, "forest_deciduous") - 0.25
    assert abs(ndvi(winter, "forest_evergreen") - ndvi(summer, "forest_evergreen")) < 0.12
    assert ndvi(winter, "grassland") < ndvi(summer, "grassland") - 0.08
    assert abs(ndvi(winter, "water") - ndvi(summer, "water")) < 0.2
    assert ndvi(summer, "built_up") < 0.55


def test_fields_are_not_all_in_one_phase(year: dict[int, Scene]) -> None:
    scene = year[110]
    nir, red = band(scene, "B8"), band(scene, "B4")
    values = ((nir - red) / (nir + red))[of_class(scene, "crop")]
    low, high = np.quantile(values, [0.15, 0.85])
    assert low < 0.35
    assert high > 0.65


def test_water_is_dark_beyond_the_red(year: dict[int, Scene]) -> None:
    for scene in year.values():
        assert ndvi(scene, "water") < 0
        water = of_class(scene, "water")
        # Off the shore, where the 20 m bands hold no land.
        for axis, step in ((0, 4), (0, -4), (1, 4), (1, -4)):
            water &= np.roll(water, step, axis)
        assert water.sum() > 100
        medians = [float(np.median(band(scene, b)[water])) for b in ("B3", "B8", "B11", "B12")]
        assert medians[0] > medians[1] > medians[2] > medians[3]
        assert medians[2] < 150


def test_neighbouring_pixels_correlate_as_in_real_scenes(year: dict[int, Scene]) -> None:
    for scene in year.values():
        for name in ("B2", "B3", "B4", "B8"):
            assert 0.6 < neighbours(band(scene, name)) < 0.985, name


def test_coarse_bands_are_smoother(year: dict[int, Scene]) -> None:
    scene = year[200]
    fine = roughness(band(scene, "B8"))
    twenty = roughness(band(scene, "B8A"))
    sixty = roughness(band(scene, "B9"))
    assert twenty < 0.75 * fine
    assert sixty < 0.75 * twenty
    assert neighbours(band(scene, "B8A")) > neighbours(band(scene, "B8"))


def test_top_of_atmosphere() -> None:
    surface = landscape((96, 96), seed=5, level="L2A")
    top = landscape((96, 96), seed=5, level="L1C")
    np.testing.assert_array_equal(surface.land_cover, top.land_cover)
    added = {b: float((band(top, b) - band(surface, b)).mean()) for b in L2A}
    assert added["B1"] > added["B2"] > added["B3"] > 0
    assert added["B1"] > 400
    assert added["B8"] < 0
    assert band(top, "B9").mean() < 0.6 * band(surface, "B9").mean()
    assert 8 <= band(top, "B10").min() <= band(top, "B10").max() <= 32


# --- tiles and files -------------------------------------------------------------------------


def test_tiles_are_balanced_and_look_like_their_class() -> None:
    n = 2 * len(LAND_COVER) + 1
    pixels, labels = tiles(n, size=48, seed=1)
    assert pixels.shape == (n, 13, 48, 48)
    assert pixels.dtype == np.uint16
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=len(LAND_COVER))
    assert counts.max() - counts.min() == 1
    assert np.any(np.diff(labels) < 0)
    spectra = np.median(pixels, axis=(2, 3))
    names = np.array(LAND_COVER)[labels]
    nir, red, swir = spectra[:, 7], spectra[:, 3], spectra[:, 11]
    assert (nir[names == "water"] < red[names == "water"]).all()
    assert (nir[names != "water"] > 1.3 * red[names != "water"]).all()
    for forest in ("forest_evergreen", "forest_deciduous"):
        assert (nir[names == forest] > 2.5 * red[names == forest]).all()
    assert swir[names == "bare_soil"].min() > swir[names == "forest_evergreen"].max()
    again, same = tiles(n, size=48, seed=1)
    np.testing.assert_array_equal(pixels, again)
    np.testing.assert_array_equal(labels, same)


def test_tiles_of_surface_reflectance_and_refusals() -> None:
    assert tiles(1, size=32, level="L2A")[0].shape == (1, 12, 32, 32)
    with pytest.raises(PixelError, match="0 tiles"):
        tiles(0)
    with pytest.raises(PixelError, match="at least 32"):
        tiles(1, size=16)
    with pytest.raises(PixelError, match="level"):
        tiles(1, level="TOA")


@pytest.mark.parametrize(("size", "tiled"), [((40, 61), False), ((200, 150), True)])
def test_write_scene(tmp_path: Path, size: tuple[int, int], tiled: bool) -> None:
    rasterio = pytest.importorskip("rasterio")
    scene = landscape(size, seed=6, day_of_year=33)
    path = write_scene(tmp_path / "scene.tif", scene)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), scene.pixels)
        assert file.descriptions == scene.bands
        assert tuple(file.transform)[:6] == scene.transform
        assert file.crs.to_epsg() == 32632
        assert file.nodata == 0
        assert file.dtypes[0] == "uint16"
        assert file.profile["compress"] == "deflate"
        assert file.profile["tiled"] is tiled
        tags = file.tags()
    assert (tags["LEVEL"], tags["DATE"]) == ("L2A", "2021-02-02")
    assert tags["SYNTHETIC"] == "generated by geofm.datasets.samples, not an observation"


def test_write_eurosat(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    paths = write_eurosat(tmp_path / "set", n_per_class=2, seed=3, size=48)
    assert len(paths) == 2 * len(LAND_COVER) == len(list((tmp_path / "set").glob("*/*.tif")))
    assert tmp_path / "set" / "ForestEvergreen" / "ForestEvergreen_2.tif" in paths
    for path in paths:
        assert path.stem.rsplit("_", 1)[0] == path.parent.name
        with rasterio.open(path) as file:
            assert (file.count, file.shape, file.dtypes[0]) == (13, (48, 48), "uint16")
            assert set(file.descriptions) == {None}
            assert file.nodata is None
            assert file.crs.to_epsg() == 32632
            assert file.transform.a == 10.0
            pixels = file.read().astype(np.float64)
        # B8A comes last: as bright as B8 over leaves, smooth; where L1C has it, stands B9.
        assert pixels[9].max() < 40  # B10
        if path.parent.name.startswith("Forest"):
            assert np.corrcoef(pixels[12].ravel(), pixels[7].ravel())[0, 1] > 0.85
            assert 1.0 < pixels[12].mean() / pixels[7].mean() < 1.25
            assert roughness(pixels[12]) < 0.75 * roughness(pixels[7])
            assert pixels[8].mean() < 0.5 * pixels[7].mean()


def test_without_rasterio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    scene = landscape((32, 32))
    with pytest.raises(MissingExtraError, match=r"pip install 'geofm\[raster\]'"):
        write_scene(tmp_path / "scene.tif", scene)
    with pytest.raises(MissingExtraError, match=r"pip install 'geofm\[raster\]'"):
        write_eurosat(tmp_path / "set", n_per_class=1)
    assert not list(tmp_path.iterdir())
