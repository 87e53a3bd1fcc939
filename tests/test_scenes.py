"""Scenes as they come: what is known of them, and windows of them."""

from __future__ import annotations

import datetime
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import FileHost, serving
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

import geofm
from geofm.datasets import samples
from geofm.errors import BandError, DataNotFoundError, GeofmError, PixelError, RasterError
from geofm.scenes import CLOUDY, Scene, open_scene
from geofm.scenes.samples import write_safe

L2A = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split()
L1C = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12".split()
METRES = {"B2": 10, "B3": 10, "B4": 10, "B8": 10, "B1": 60, "B9": 60, "B10": 60}
SIZE = 120


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safe(tmp_path_factory.mktemp("safe"), SIZE)


def write_band(
    path: Path,
    pixels: np.ndarray,
    metres: float = 10.0,
    origin: tuple[float, float] = (500_000.0, 5_000_000.0),
    **more: Any,
) -> Path:
    """A GeoTIFF of one or more bands; `more` replaces what is said of it."""
    pixels = np.atleast_3d(pixels.T).T
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": len(pixels),
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "dtype": pixels.dtype.name,
        "crs": "EPSG:32632",
        "transform": rasterio.Affine(metres, 0, origin[0], 0, -metres, origin[1]),
    }
    descriptions = more.pop("descriptions", None)
    with rasterio.open(path, "w", **{**profile, **more}) as file:
        file.write(pixels)
        if descriptions:
            file.descriptions = descriptions
    return path


def grey(size: int = 24, seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9000, (size, size)).astype(dtype)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with a 10 m and a 20 m band."""
    write_band(tmp_path / "B02.tif", grey(24))
    write_band(tmp_path / "B05.tif", grey(12, 1), 20.0)
    return tmp_path


# --- SAFE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "baseline", "offset", "bands"),
    [
        ("L2A", "05.09", -1000, L2A),
        ("L2A", "03.01", 0, L2A),
        ("L1C", "05.09", -1000, L1C),
        ("L1C", "02.14", 0, L1C),
    ],
)
def test_safe_says_everything_and_holds_the_landscape(
    tmp_path: Path, level: str, baseline: str, offset: float, bands: list[str]
) -> None:
    scene = open_scene(write_safe(tmp_path, 60, level, baseline, seed=3))
    assert list(scene.bands) == bands
    assert (scene.units, scene.level, scene.offset) == ("dn", level, offset)
    assert scene.date == datetime.date(2021, 6, 29)
    assert scene.nodata == (0.0,)
    assert scene.crs.to_epsg() == 32632
    assert (scene.width, scene.height) == (60, 60)
    assert {n: b.resolution for n, b in scene.bands.items()} == {
        n: METRES.get(n, 20) for n in bands
    }
    truth = samples.landscape((60, 60), seed=3, level=level)
    assert tuple(scene.transform)[:6] == truth.transform
    for name in ("B2", "B3", "B4", "B8"):
        np.testing.assert_array_equal(
            scene.read(bands=[name])[0] + offset, truth.pixels[truth.bands.index(name)]
        )
    blocks = truth.pixels[bands.index("B5")].reshape(30, 2, 30, 2).mean((1, 3))
    nearest = scene.read(bands=["B5"], resampling="nearest")[0][::2, ::2]
    np.testing.assert_allclose(nearest + offset, blocks, atol=0.5)


def test_level_2a_has_b8_at_10_m_only_as_esas_products_do(tmp_path: Path) -> None:
    product = write_safe(tmp_path, 36)
    found = sorted(path.name[-11:-4] for path in product.rglob("*_B08_*.jp2"))
    assert found == ["B08_10m"]
    narrow = sorted(path.name[-11:-4] for path in product.rglob("*_B8A_*.jp2"))
    assert narrow == ["B8A_20m", "B8A_60m"]


def test_same_place_of_two_baselines_is_prepared_alike(tmp_path: Path) -> None:
    prepared = []
    for baseline in ("02.14", "05.09"):
        scene = open_scene(write_safe(tmp_path, 36, "L1C", baseline))
        prepared.append(scene.transform_for("mpmae_atto.mmearth64")(scene.read()))
    np.testing.assert_allclose(prepared[0], prepared[1], atol=2e-3)


def test_metadata_file_opens_its_product_and_bands_select(safe: Path) -> None:
    scene = open_scene(safe / "MTD_MSIL2A.xml", bands=["B11", "B8A", "B05"])
    assert list(scene.bands) == ["B5", "B8A", "B11"]
    # The finest of these, not of the product.
    assert (scene.width, scene.transform.a) == (SIZE // 2, 20.0)


def test_clouds_are_masked_in_all_bands(safe: Path) -> None:
    scene = open_scene(safe)
    assert scene.classification is not None
    masked = scene.read(mask_classes=CLOUDY)
    cloud = SIZE // 8 * 2
    assert masked.mask[:, :cloud, :cloud].all()
    assert masked.mask.mean() == (cloud / SIZE) ** 2
    assert not scene.read(mask_classes=[11]).mask.any()


def edited(safe: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a product with other metadata."""
    copy = folder / safe.name
    shutil.copytree(safe, copy)
    path = copy / "MTD_MSIL2A.xml"
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert count
    path.write_text(text)
    return copy


def test_offset_of_the_metadata_counts_not_the_baselines(safe: Path, tmp_path: Path) -> None:
    assert open_scene(edited(safe, tmp_path, (">-1000<", ">-500<"))).offset == -500


def test_offset_is_unknown_where_a_late_baseline_lists_none(safe: Path, tmp_path: Path) -> None:
    path = edited(
        safe, tmp_path, ("<BOA_ADD_OFFSET_VALUES_LIST>.*</BOA_ADD_OFFSET_VALUES_LIST>", "")
    )
    scene = open_scene(path)
    assert scene.offset is None
    with pytest.raises(PixelError, match=r"offset .* open_scene\(..., offset=...\)"):
        scene.transform_for("mpmae_atto.mmearth64")
    assert open_scene(path, offset=-1000).transform_for("mpmae_atto.mmearth64").offset == -1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('band_id="3">-1000', 'band_id="3">-900'), "different offsets"),
        (("<BOA_QUANTIFICATION_VALUE[^<]*", '<BOA_QUANTIFICATION_VALUE unit="none">1000'), "10000"),
        (("<n1:General_Info>", "<n1:General_Inf>"), "not the metadata"),
        (("<n1:Level", '<!DOCTYPE a [<!ENTITY x "y">]><n1:Level'), "document type"),
    ],
)
def test_strange_metadata_are_refused(
    safe: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    copy = edited(safe, tmp_path) if says == "document type" else edited(safe, tmp_path, change)
    if says == "document type":
        path = copy / "MTD_MSIL2A.xml"
        path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(RasterError, match=says):
        open_scene(copy)


def test_image_that_leads_out_of_the_product_is_refused(safe: Path, tmp_path: Path) -> None:
    copy = edited(safe, tmp_path)
    image = next(copy.rglob("*_B02_10m.jp2"))
    shutil.move(image, tmp_path / "elsewhere.jp2")
    image.symlink_to(tmp_path / "elsewhere.jp2")
    with pytest.raises(RasterError, match="leads out of the product"):
        open_scene(copy)


def test_incomplete_products_say_what_is_missing(safe: Path, tmp_path: Path) -> None:
    copy = edited(safe, tmp_path)
    shutil.rmtree(copy / "GRANULE")
    with pytest.raises(DataNotFoundError, match="0 granules"):
        open_scene(copy)
    (copy / "MTD_MSIL2A.xml").unlink()
    with pytest.raises(DataNotFoundError, match=r"neither MTD_MSIL1C.xml"):
        open_scene(copy)
    packed = tmp_path / "S2A.SAFE.zip"
    packed.write_bytes(b"PK")
    with pytest.raises(RasterError, match="unpack it"):
        open_scene(packed)


# --- what is known ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "offset", "date"),
    [
        (
            "S2A_MSIL2A_20220613T101031_N0400_R022_T33UUP_20220613T180000",
            "L2A",
            -1000,
            "2022-06-13",
        ),
        ("S2B_MSIL1C_20200223T032739_N0209_R018_T48QUE_20200223T065432", "L1C", 0, "2020-02-23"),
        # Made outside ESA's processing: the baseline does not tell.
        ("S2B_MSIL2A_20200223T032739_N9999_R018_T48QUE_20230924T183543", "L2A", None, "2020-02-23"),
        ("S2A_MSIL2A_20170613T101031_0_49", "L2A", None, "2017-06-13"),
        ("20200604T054639_20200604T054831_T43RCP", None, None, "2020-06-04"),
        ("S2A_43RCP_20200604_0_L2A", "L2A", None, "2020-06-04"),
    ],
)
def test_product_names_say_level_date_and_offset(
    tmp_path: Path, name: str, level: str | None, offset: float | None, date: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_band(folder / "B02.tif", grey())
    scene = open_scene(folder)
    assert (scene.units, scene.level, scene.offset) == ("dn", level, offset)
    assert scene.date == datetime.date.fromisoformat(date)
    # The same in the file's name.
    file = write_band(tmp_path / f"{name}_B02.tif", grey())
    by_file = open_scene(file.parent)
    assert (by_file.level, by_file.offset, by_file.date) == (level, offset, scene.date)


def test_unknown_facts_are_none_and_asked_for_by_name(two: Path) -> None:
    scene = open_scene(two)
    assert (scene.units, scene.level, scene.offset, scene.date) == (None, None, None, None)
    with pytest.raises(PixelError, match=r"units .* open_scene\(..., units=...\).*--units"):
        scene.transform_for("mpmae_atto.mmearth64")
    with pytest.raises(PixelError, match=r"level .* open_scene\(..., level=...\)"):
        open_scene(two, units="dn").transform_for("mpmae_atto.mmearth64")
    known = open_scene(two, units="dn", level="L2A", offset=0, date="2020-06-04")
    assert known.date == datetime.date(2020, 6, 4)
    assert known.transform_for("mpmae_atto.mmearth64", fill="mean").level == "L2A"


def test_caller_may_contradict_the_metadata_only_if_he_says_so(safe: Path) -> None:
    for argument in ({"level": "L1C"}, {"offset": 0}, {"date": "2020-01-01"}):
        with pytest.raises(PixelError, match=r"metadata say .* strict=False .*--no-strict"):
            open_scene(safe, **argument)  # type: ignore[arg-type]
    assert open_scene(safe, offset=0, strict=False).offset == 0
    assert open_scene(safe, offset=-1000, level="L2A").offset == -1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"units": "DN"},
        {"level": "2A"},
        {"offset": "-1000"},
        {"date": "June"},
        {"align": "centre"},
        {"nodata": "zero"},
        {"bands": "B2,B3"},
    ],
)
def test_wrong_arguments_are_refused(two: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(PixelError, match=next(iter(wrong))):
        open_scene(two, **wrong)


# --- folders ------------------------------------------------------------------------------------


def test_finest_of_several_files_of_a_band_is_taken(tmp_path: Path) -> None:
    write_band(tmp_path / "T32_B02_20m.tif", grey(12), 20.0)
    write_band(tmp_path / "T32_B02_10m.tif", grey(24))
    assert open_scene(tmp_path).width == 24
    write_band(tmp_path / "T32_B02.tif", grey(4), 60.0)
    with pytest.raises(BandError, match="which is finer"):
        open_scene(tmp_path)
    (tmp_path / "T32_B02.tif").unlink()
    write_band(tmp_path / "T32_B2.tif", grey(24))
    write_band(tmp_path / "T32_B02.tiff", grey(24))
    with pytest.raises(BandError, match="which is finer"):
        open_scene(tmp_path)


def test_folder_of_several_scenes_names_them_and_a_pattern_opens_one(tmp_path: Path) -> None:
    for scene in ("a_1", "a_2"):
        write_band(tmp_path / f"{scene}_B02.tif", grey())
    with pytest.raises(RasterError, match=r"2 scenes: 'a_1', 'a_2'"):
        open_scene(tmp_path)
    assert open_scene(tmp_path / "a_2*").bands["B2"].path.endswith("a_2_B02.tif")
    with pytest.raises(DataNotFoundError, match="matches"):
        open_scene(tmp_path / "b*")


def test_folders_without_bands_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataNotFoundError, match="'inner'"):
        open_scene(tmp_path)
    write_band(tmp_path / "VV.tif", grey())
    with pytest.raises(BandError, match=r"'VV.tif'"):
        open_scene(tmp_path)
    with pytest.raises(DataNotFoundError, match="no file or folder"):
        open_scene(tmp_path / "nowhere")
    write_band(tmp_path / "B2.tif", grey())
    with pytest.raises(BandError, match="B12"):
        open_scene(tmp_path, bands=["B2", "B12"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"crs": "EPSG:32633"}, "EPSG:32633"),
        ({"crs": None}, "no coordinate reference system"),
        ({"transform": rasterio.Affine(20, 1, 500_000, 1, -20, 5_000_000)}, "rotated"),
        ({"transform": rasterio.Affine(20, 0, 500_000, 0, 20, 5_000_000)}, "flipped"),
        ({"metres": 25.0}, "grids do not nest"),
        ({"origin": (500_003.0, 5_000_000.0)}, "grids do not nest"),
        ({"origin": (500_100.0, 5_000_000.0)}, "extents differ"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "complex64"}, "complex64"),
        ({"dtype": "int64"}, "int64"),
    ],
)
def test_bands_that_do_not_go_together_are_refused(
    tmp_path: Path, more: dict[str, Any], says: str
) -> None:
    write_band(tmp_path / "B02.tif", grey(24))
    pixels = grey(12, 1).clip(0, 100).astype(more.get("dtype", "uint16"))
    write_band(tmp_path / "B05.tif", pixels, **{"metres": 20.0, **more})
    with pytest.raises(RasterError, match=says):
        open_scene(tmp_path)


def test_complex_pixels_are_not_to_be_cut_to_their_real_part(two: Path) -> None:
    write_band(two / "B05.tif", grey(12).astype("complex64"), 20.0)
    with pytest.raises(RasterError, match="amplitude or the intensity") as refused:
        open_scene(two)
    assert "gdal_translate" not in str(refused.value)


def test_damaged_files_are_named(two: Path) -> None:
    path = two / "B05.tif"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    scene = open_scene(two)
    with pytest.raises(RasterError, match=r"B05\.tif cannot be read \(band 1, rows"):
        scene.read()
    path.write_bytes(b"not a raster")
    with pytest.raises(RasterError, match=r"B05\.tif cannot be read"):
        open_scene(two)
    path.unlink()
    with pytest.raises(GeofmError, match=r"B05\.tif"):
        scene.read()


def test_other_formats_under_the_name_of_a_tiff_are_refused(two: Path) -> None:
    (two / "B05.tif").write_text(
        f"<VRTDataset rasterXSize='12' rasterYSize='12'><VRTRasterBand dataType='UInt16' band='1'>"
        f"<SimpleSource><SourceFilename>{two / 'B02.tif'}</SourceFilename></SimpleSource>"
        f"</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(RasterError, match="cannot be read"):
        open_scene(two)


def test_a_file_that_has_become_another_format_since_is_refused(two: Path) -> None:
    scene = open_scene(two)
    (two / "B05.tif").write_text(
        f"<VRTDataset rasterXSize='12' rasterYSize='12'><VRTRasterBand dataType='UInt16' band='1'>"
        f"<SimpleSource><SourceFilename>{two / 'B02.tif'}</SourceFilename></SimpleSource>"
        f"</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(RasterError, match="cannot be read"):
        scene.read(bands=["B5"])


# --- stacked files ------------------------------------------------------------------------------


def test_samples_scene_opens_by_its_descriptions_and_tags(tmp_path: Path) -> None:
    landscape = samples.landscape((48, 40))
    path = samples.write_scene(tmp_path / "scene.tif", landscape)
    scene = open_scene(path, units="dn", offset=0)
    assert tuple(scene.bands) == landscape.bands
    assert (scene.level, scene.date, scene.nodata) == ("L2A", landscape.date, (0.0,))
    np.testing.assert_array_equal(scene.read(), landscape.pixels)
    np.testing.assert_array_equal(scene.read(bands=["red", "B02"]), landscape.pixels[[3, 1]])


def test_bands_of_a_stack_are_named_not_selected(tmp_path: Path) -> None:
    stack = np.stack([grey(seed=i) for i in range(3)])
    path = write_band(tmp_path / "a.tif", stack)
    with pytest.raises(BandError, match="without names"):
        open_scene(path)
    with pytest.raises(BandError, match="2 are named"):
        open_scene(path, bands=["B2", "B3"])
    scene = open_scene(path, bands=["B4", "B3", "B2"])
    assert list(scene.bands) == ["B2", "B3", "B4"]
    np.testing.assert_array_equal(scene.read(), stack[::-1])
    with pytest.raises(BandError, match="NDVI"):
        open_scene(path, bands=["B4", "B3", "NDVI"])
    assert list(open_scene(path, bands=["B4", "B3", "NDVI"], strict=False).bands) == ["B3", "B4"]
    described = write_band(tmp_path / "b.tif", stack, descriptions=("B2", "B3", "B4"))
    with pytest.raises(BandError, match="does not select"):
        open_scene(described, bands=["B4", "B3", "B2"])


def test_scale_and_offset_of_a_file_say_units_and_offset(tmp_path: Path) -> None:
    path = write_band(tmp_path / "a.tif", grey(), descriptions=("B2",))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4,), (-0.1,)
    assert (open_scene(path).units, open_scene(path).offset) == ("dn", -1000.0)
    with rasterio.open(path, "r+") as file:
        file.offsets = (0.0,)
    # 0 is also what a file without an offset has.
    assert (open_scene(path).units, open_scene(path).offset) == ("dn", None)


# --- reading ------------------------------------------------------------------------------------


def pyramid(folder: Path, missing: float, aligned: bool, dtype: str = "uint16") -> Path:
    """Bands of 10, 20 and 60 m with missing pixels; the coarse grids may be shifted."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    for name, size, metres in (("B02", 60, 10.0), ("B05", 30, 20.0), ("B01", 10, 60.0)):
        pixels = grey(size, size, dtype)
        pixels[rng.random(pixels.shape) < missing] = 0
        shift = 0.0 if aligned else (metres - 10) / 2
        origin = (500_000.0 - shift, 5_000_000.0 + shift)
        write_band(folder / f"{name}.tif", pixels, metres, origin, nodata=0)
    return folder


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    folder = tmp_path_factory.mktemp("pyramids")
    return [
        open_scene(pyramid(folder / f"{i}", missing, aligned, dtype), align="georeference")
        for i, (missing, aligned, dtype) in enumerate(
            [(0.0, True, "uint16"), (0.2, True, "int16"), (0.2, False, "float32")]
        )
    ]


METHODS = ("nearest", "bilinear", "cubic")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, 2),
    method=st.sampled_from(METHODS),
    start=st.tuples(st.integers(-9, 59), st.integers(-9, 59)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_reading_by_windows_equals_reading_whole(
    pyramids: list[Scene], which: int, method: str, start: tuple[int, int], size: tuple[int, int]
) -> None:
    scene = pyramids[which]
    whole = scene.read(Window(-9, -9, 120, 120), resampling=method)
    part = scene.read(Window(start[1], start[0], size[1], size[0]), resampling=method)
    rows, columns = (slice(s + 9, s + 9 + n) for s, n in zip(start, size, strict=True))
    cut = whole[:, rows, columns]
    np.testing.assert_array_equal(part.mask, cut.mask)
    np.testing.assert_array_equal(part.data, cut.data)


def test_pixels_outside_the_scene_are_masked(pyramids: list[Scene]) -> None:
    whole = pyramids[0].read(Window(-9, -9, 120, 120))
    inside = np.zeros((120, 120), dtype=bool)
    inside[9:69, 9:69] = True
    np.testing.assert_array_equal(whole.mask, np.broadcast_to(~inside, whole.shape))
    assert pyramids[0].read(Window(500, 500, 3, 3)).mask.all()
    for wrong in (Window(0.5, 0, 3, 3), Window(0, 0, 0, 3), (0, 0, 3, 3)):
        with pytest.raises(RasterError, match="window"):
            pyramids[0].read(wrong)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["B1", "B5"])
def test_coarse_bands_agree_with_gdal(pyramids: list[Scene], method: str, name: str) -> None:
    scene = pyramids[0]
    ours = scene.read(bands=[name], resampling=method)[0].astype(int)
    how = Resampling[method]
    with rasterio.open(scene.bands[name].path) as file:
        read = file.read(1, out_shape=(60, 60), resampling=how).astype(int)
        with WarpedVRT(
            file, crs=scene.crs, transform=scene.transform, width=60, height=60, resampling=how
        ) as vrt:
            warped = vrt.read(1).astype(int)
    # GDAL leaves out what lies beyond the edge, we continue it; the same but for cubic.
    ratio = int(scene.bands[name].ratio[0])
    inner = slice(2 * ratio, -2 * ratio) if method == "cubic" else slice(None)
    assert np.abs(ours - read)[inner, inner].max() <= 1
    assert np.abs(ours - warped)[inner, inner].max() <= 1


def naive_bilinear(
    pixels: np.ndarray, ratio: float, shift: float, size: int
) -> np.ma.MaskedArray[Any, Any]:
    """The definition, one pixel at a time."""
    n = len(pixels)
    out = np.ma.masked_all((size, size))
    for i in range(size):
        for j in range(size):
            y, x = (i + 0.5 - shift) / ratio, (j + 0.5 - shift) / ratio
            own = tuple(int(np.clip(np.floor(v), 0, n - 1)) for v in (y, x))
            if pixels[own] == 0 or max(y, x) >= n + 0.5 or min(y, x) <= -0.5:
                continue
            total = weight = 0.0
            for k in range(int(y) - 2, int(y) + 2):
                for m in range(int(x) - 2, int(x) + 2):
                    w = max(0.0, 1 - abs(y - 0.5 - k)) * max(0.0, 1 - abs(x - 0.5 - m))
                    value = float(pixels[np.clip(k, 0, n - 1), np.clip(m, 0, n - 1)])
                    total, weight = total + w * value * (value != 0), weight + w * (value != 0)
            out[i, j] = total / weight
    return out


@pytest.mark.parametrize("which", [1, 2])
def test_missing_pixels_do_not_bleed(pyramids: list[Scene], which: int) -> None:
    scene = pyramids[which]
    band = scene.bands["B1"]
    with rasterio.open(band.path) as file:
        expected = naive_bilinear(file.read(1), band.ratio[0], band.shift[0], 60)
    ours = scene.read(bands=["B1"])[0]
    np.testing.assert_array_equal(ours.mask, expected.mask)
    np.testing.assert_allclose(
        ours.compressed(), expected.compressed(), atol=0.51 if which == 1 else 2e-2
    )
    for method in METHODS:
        np.testing.assert_array_equal(
            scene.read(bands=["B1"], resampling=method)[0].mask, expected.mask
        )


def test_rounding_never_makes_a_no_data_value(tmp_path: Path) -> None:
    # Cubic convolution undershoots beside a bright pixel, to below 0.
    dark = np.full((12, 12), 1, np.uint16)
    dark[6, 6] = 60_000
    write_band(tmp_path / "B05.tif", dark, 20.0)
    write_band(tmp_path / "B02.tif", grey(24))
    scene = open_scene(tmp_path, nodata=0)
    cubic = scene.read(bands=["B5"], resampling="cubic")
    assert not cubic.mask.any()
    assert cubic.min() == 1


def test_nan_and_given_values_are_missing(tmp_path: Path) -> None:
    pixels = grey(12, dtype="float32")
    pixels[2, 3], pixels[5, 5] = np.nan, -999
    scene = open_scene(write_band(tmp_path / "a.tif", pixels), bands=["B2"], nodata=-999)
    assert np.argwhere(scene.read().mask[0]).tolist() == [[2, 3], [5, 5]]


def test_dn_0_is_missing_in_products_that_declare_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "S2A_MSIL2A_20220613T101031_N0400_R022_T33UUP_20220613T180000"
    folder.mkdir()
    pixels = grey()
    pixels[4, 4] = 0
    write_band(folder / "B02.tif", pixels)
    assert np.argwhere(open_scene(folder).read().mask[0]).tolist() == [[4, 4]]


def test_shifted_grids_need_to_be_told_how_they_lie(tmp_path: Path) -> None:
    folder = pyramid(tmp_path / "a", 0.0, aligned=False)
    with pytest.raises(RasterError, match=r"align='corner'.*align='georeference'"):
        open_scene(folder)
    assert open_scene(folder, align="georeference").bands["B1"].shift == (-2.5, -2.5)
    assert open_scene(folder, strict=False).bands["B1"].shift == (-2.5, -2.5)
    corner = open_scene(folder, align="corner").read(resampling="nearest")
    aligned = open_scene(pyramid(tmp_path / "b", 0.0, aligned=True)).read(resampling="nearest")
    np.testing.assert_array_equal(corner, aligned)


def test_band_that_ends_early_is_missing_there(tmp_path: Path) -> None:
    write_band(tmp_path / "B02.tif", grey(24))
    write_band(tmp_path / "B05.tif", grey(8), 20.0)
    mask = open_scene(tmp_path, align="georeference").read(bands=["B5"]).mask[0]
    # 16 pixels, and half a coarse one beyond the edge.
    assert not mask[:17, :17].any()
    assert mask[17:].all() and mask[:, 17:].all()


def test_band_that_begins_late_is_missing_there(tmp_path: Path) -> None:
    write_band(tmp_path / "B02.tif", grey(24))
    write_band(tmp_path / "B05.tif", grey(11), 20.0, (500_020.0, 4_999_980.0))
    mask = open_scene(tmp_path).read(bands=["B5"]).mask[0]
    assert not mask[1:, 1:].any()
    assert mask[0].all() and mask[:, 0].all()


def test_scene_travels_to_other_processes_and_keeps_files_open_on_request(safe: Path) -> None:
    scene = pickle.loads(pickle.dumps(open_scene(safe)))
    with scene.reader() as reader:
        for column in (0, 50):
            window = Window(column, 3, 40, 30)
            np.testing.assert_array_equal(reader.read(window), scene.read(window))


def test_wrong_requests_are_refused(two: Path) -> None:
    scene = open_scene(two)
    with pytest.raises(BandError, match="B12"):
        scene.read(bands=["B12"])
    with pytest.raises(BandError, match="list"):
        scene.read(bands="B2")
    with pytest.raises(RasterError, match="lanczos"):
        scene.read(resampling="lanczos")
    with pytest.raises(RasterError, match="no classification"):
        scene.read(mask_classes=CLOUDY)
    with pytest.raises(PixelError, match="open_scene"):
        scene.transform_for("mpmae_atto.mmearth64", level="L2A")


# --- STAC ---------------------------------------------------------------------------------------


def item_of(assets: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "an-item",
        "properties": {
            "datetime": "2022-06-13T10:10:31Z",
            "constellation": "sentinel-2",
            "processing:level": "L2A",
            **properties,
        },
        "assets": assets,
    }


def test_item_of_a_file_finds_assets_beside_it(two: Path) -> None:
    assets = {
        # Earth Search's names, the Planetary Computer's, and a picture made of bands.
        "blue": {"href": "./B02.tif", "eo:bands": [{"name": "blue", "common_name": "blue"}]},
        "B05": {"href": "B05.tif", "eo:bands": [{"name": "B05"}], "roles": ["data"]},
        "visual": {"href": "no.tif", "eo:bands": [{"name": "B04"}], "roles": ["visual"]},
        "scl": {"href": "B05.tif"},
    }
    path = two / "item.json"
    path.write_text(json.dumps(item_of(assets, **{"s2:processing_baseline": "04.00"})))
    scene = open_scene(path)
    assert list(scene.bands) == ["B2", "B5"]
    assert (scene.units, scene.level, scene.offset) == ("dn", "L2A", -1000)
    assert scene.date == datetime.date(2022, 6, 13)
    assert scene.classification is not None
    np.testing.assert_array_equal(scene.read(), open_scene(two).read())
    with pytest.raises(RasterError, match="relative"):
        open_scene(json.loads(path.read_text()))
    assert open_scene(path, bands=["B5"]).width == 12


def with_scale(path: Path, **band: Any) -> dict[str, Any]:
    return {"B02": {"href": str(path), "raster:bands": [band]}}


@pytest.mark.parametrize(
    ("band", "properties", "offset"),
    [
        ({"scale": 1e-4, "offset": -0.1}, {}, -1000),
        ({"scale": 1e-4, "offset": 0}, {}, 0),
        ({"scale": 1e-4}, {}, None),
        ({"scale": 1e-4}, {"s2:processing_baseline": "05.09"}, -1000),
        ({}, {"s2:processing_baseline": "03.01"}, 0),
        ({}, {"s2:processing_baseline": "99.99"}, None),
        # Applied means taken away, though the asset still declares it.
        ({"scale": 1e-4, "offset": -0.1}, {"earthsearch:boa_offset_applied": True}, 0),
        ({"scale": 1e-4, "offset": -0.1}, {"earthsearch:boa_offset_applied": False}, -1000),
    ],
)
def test_offset_of_an_item(
    two: Path, band: dict[str, Any], properties: dict[str, Any], offset: float | None
) -> None:
    scene = open_scene(item_of(with_scale(two / "B02.tif", **band), **properties))
    assert (scene.units, scene.offset) == ("dn", offset)


def test_doubtful_offset_flag_is_warned_of(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_scene(
            item_of(
                with_scale(two / "B02.tif", scale=1e-4, offset=-0.1),
                **{"earthsearch:boa_offset_applied": False},
            )
        )
    assert "boa_offset_applied" in caplog.text


def test_an_alternate_address_is_read_where_the_first_is_out_of_reach(two: Path) -> None:
    def asset(name: str, scheme: str = "file") -> dict[str, Any]:
        others = {"other": {"href": f"gs://bucket/{name}"}, "near": {"href": (two / name).as_uri()}}
        return {"href": f"s3://bucket/{name}", "alternate": others if scheme == "file" else {}}

    item = item_of({"B02": asset("B02.tif"), "B05": asset("B05.tif"), "scl": asset("B05.tif")})
    scene = open_scene(item)
    assert [band.path for band in scene.bands.values()] == [
        str(two / "B02.tif"),
        str(two / "B05.tif"),
    ]
    assert scene.classification is not None
    with pytest.raises(RasterError, match=r"s3://.*no other address .*fetch the files"):
        open_scene(item_of({"B02": asset("B02.tif", "s3")}))


def test_stac_1_1_bands_and_several_resolutions(two: Path) -> None:
    def asset(name: str, metres: int, key: str = "") -> dict[str, Any]:
        return {
            "href": str(two / name),
            "bands": [{"name": "B05", "eo:common_name": "rededge071"}],
            "gsd": metres,
            "nodata": 7,
            "raster:scale": 1e-4,
            "raster:offset": -0.1,
            "roles": ["data", "reflectance"],
        }

    scene = open_scene(item_of({"B05_60m": asset("no.tif", 60), "B05_20m": asset("B05.tif", 20)}))
    assert scene.bands["B5"].path == str(two / "B05.tif")
    assert (scene.offset, scene.nodata) == (-1000, (7.0,))
    twice = item_of({"B05": asset("B05.tif", 20), "other": asset("B05.tif", 20)})
    with pytest.raises(BandError, match="several assets"):
        open_scene(twice)
    assert list(open_scene(twice, strict=False).bands) == ["B5"]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"features": []}, "open one of its features"),
        (item_of({"B02": {"href": "s3://bucket/B02.tif"}}), "s3://"),
        (item_of({"B02": {"href": "/vsicurl/http://127.0.0.1:1/B02.tif"}}), "no file /vsicurl"),
        (item_of({"thing": {"href": "/a.tif"}}), "its assets are thing"),
        (item_of({"B02": {"href": "/a.tif"}}, constellation="landsat", platform="l8"), "sensor="),
    ],
)
def test_items_out_of_reach_are_refused(item: dict[str, Any], says: str) -> None:
    with pytest.raises(GeofmError, match=says):
        open_scene(item)


def test_json_that_is_no_item_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "item.json"
    for text, says in (("[1]", "JSON list"), ("{", "not JSON"), ("{}", "no assets")):
        path.write_text(text)
        with pytest.raises(RasterError, match=says):
            open_scene(path)


class RangeHost(FileHost):
    """Answers the ranges GDAL asks for, which have an end."""

    def _send_file(self, handler: Any, content: bytes) -> None:
        asked = re.match(r"bytes=(\d+)-(\d+)$", handler.headers.get("Range", ""))
        if not asked:
            handler.reply(200, content, {"Accept-Ranges": "bytes"})
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        handler.reply(206, content[start:stop], {"Content-Range": span, "Accept-Ranges": "bytes"})


def test_remote_item_is_read_by_ranges(tmp_path: Path) -> None:
    pixels = grey(512)
    path = write_band(tmp_path / "B02.tif", pixels, tiled=True, blockxsize=64, blockysize=64)
    host = RangeHost(files={"/a/B02.tif": path.read_bytes()})
    item = item_of({"B02": {"href": "B02.tif?token=secret"}})
    alternate = {"here": {"href": path.as_uri()}}
    host.files["/a/item.json"] = json.dumps(item).encode()
    with serving(host):
        scene = open_scene(host.url("/a/item.json"))
        window = Window(300, 200, 20, 10)
        np.testing.assert_array_equal(scene.read(window)[0], pixels[200:210, 300:320])
        served = sum(r.sent for r in host.bodies if "B02" in r.path)
        assert 0 < served < len(host.files["/a/B02.tif"]) / 2
        item["assets"]["B02"]["href"] = "gone.tif?token=secret"
        host.files["/a/item.json"] = json.dumps(item).encode()
        with pytest.raises(RasterError, match=r"/a/gone\.tif cannot be read") as refused:
            open_scene(host.url("/a/item.json"))
        assert "404" in str(refused.value)
        for words in ("secret", "complete", "previous exception"):
            assert words not in str(refused.value)
        with pytest.raises(geofm.DownloadError, match="404"):
            open_scene(host.url("/a/other.json"))
        # What comes from elsewhere may not name files of this machine.
        item["assets"]["B02"]["href"] = path.as_uri()
        host.files["/a/item.json"] = json.dumps(item).encode()
        with pytest.raises(RasterError, match="file://"):
            open_scene(host.url("/a/item.json"))
        item["assets"]["B02"] = {"href": "s3://bucket/B02.tif", "alternate": alternate}
        host.files["/a/item.json"] = json.dumps(item).encode()
        with pytest.raises(RasterError, match="s3://"):
            open_scene(host.url("/a/item.json"))
        alternate["there"] = {"href": host.url("/a/B02.tif")}
        host.files["/a/item.json"] = json.dumps(item).encode()
        assert open_scene(host.url("/a/item.json")).bands["B2"].path == host.url("/a/B02.tif")


# --- real data ----------------------------------------------------------------------------------


def test_major_tom_cell() -> None:
    name = "S2B_MSIL2A_20200223T032739_N9999_R018_T48QUE_20230924T183543"
    scene = open_scene(data("major_tom", "199U", "199U_1099R", name))
    assert list(scene.bands) == L2A
    assert (scene.width, scene.height) == (1068, 1068)
    assert (scene.units, scene.level, scene.offset) == ("dn", "L2A", None)
    assert scene.date == datetime.date(2020, 2, 23)
    assert [scene.bands[n].resolution for n in ("B2", "B5", "B1")] == [10, 20, 60]
    assert scene.classification is not None
    # It is no SCL: its classes have numbers of their own.
    assert scene.classification.name == "cloud_mask"
    window = Window(511, 333, 201, 150)
    ours = scene.read(window)
    for band, plane in zip(scene.bands.values(), ours, strict=True):
        with rasterio.open(band.path) as file:
            whole = file.read(1, out_shape=(1068, 1068), resampling=Resampling.bilinear)
        assert np.abs(plane.astype(int) - whole[333:483, 511:712]).max() <= 1, band.name
    with pytest.raises(PixelError, match="offset"):
        scene.transform_for("mpmae_atto.mmearth64")


@pytest.mark.parametrize(("kind", "level", "bands"), [("s2c", "L1C", L1C), ("s2a", "L2A", L2A)])
def test_ssl4eo_s12_patch(kind: str, level: str, bands: list[str]) -> None:
    folder = data("ssl4eo_s12", kind, "0000200", "20200604T054639_20200604T054831_T43RCP")
    with pytest.raises(RasterError, match="centres of the first pixels"):
        open_scene(folder)
    scene = open_scene(folder, align="corner", level=level, offset=0)
    assert list(scene.bands) == bands
    assert (scene.units, scene.date) == ("dn", datetime.date(2020, 6, 4))
    pixels = scene.read()
    assert pixels.shape == (len(bands), 264, 264)
    # B8 and B8A see nearly the same light: they match best where the grids share their corner.
    b8, b8a = (scene.read(bands=[n])[0].astype(float) for n in ("B8", "B8A"))
    apart = open_scene(folder, align="georeference").read(bands=["B8A"])[0].astype(float)
    like, unlike = (np.corrcoef(b8.ravel(), other.ravel())[0, 1] for other in (b8a, apart))
    assert like > 0.96
    assert like > unlike + 0.005
    prepared = scene.transform_for("mpmae_atto.mmearth64")(pixels)
    assert abs(float(prepared.mean())) < 2


def test_bigearthnet_patches() -> None:
    folder = data("bigearthnet", "v1")
    with pytest.raises(RasterError, match="2 scenes"):
        open_scene(folder)
    scene = open_scene(folder / "S2A_MSIL2A_20170613T101031_0_49_*")
    assert list(scene.bands) == L2A
    assert (scene.level, scene.date) == ("L2A", datetime.date(2017, 6, 13))
    product = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    other = open_scene(data("bigearthnet", product, f"{product}_75_43"))
    assert (other.width, other.offset, other.nodata) == (120, None, (0.0,))


@pytest.mark.parametrize(
    ("name", "bands", "level"),
    [
        ("eotdl_Boadella_2020-01-13.tif", L2A, "L2A"),
        ("copernicusfm_T60HWB_20201002_L1C.tif", L1C, "L1C"),
    ],
)
def test_stacks_without_names(name: str, bands: list[str], level: str) -> None:
    path = data("s2_scenes", name)
    with pytest.raises(BandError, match="without names"):
        open_scene(path)
    scene = open_scene(path, bands=bands, units="dn", level=level, offset=0)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(scene.read().data, file.read())
    assert scene.transform_for("ssl4eco_resnet18").sources
