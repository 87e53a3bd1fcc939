"""A folder of GeoTIFFs as tiles: bands by name, windows, missing pixels and statistics."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import data
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from geofm import PixelError, Preprocess
from geofm.datasets import TileFolder, write_ssl4eco
from geofm.datasets._geotiff import ImageError, Moments
from geofm.datasets.samples import landscape, write_scene
from geofm.errors import BandError, DataNotFoundError, MissingExtraError

L2A = tuple("B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split())


def write(
    path: Path, pixels: NDArray[Any], names: tuple[str, ...] = (), nodata: float | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width}
    profile |= {"transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), "crs": "EPSG:32632"}
    with rasterio.open(path, "w", dtype=pixels.dtype.name, nodata=nodata, **profile) as file:
        file.write(pixels)
        if names:
            file.descriptions = names
    return path


def numbers(seed: int, bands: int, height: int, width: int) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(1, 5000, (bands, height, width)).astype(np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two scenes whose bands are in different order, one in a folder below."""
    write(tmp_path / "b.tif", numbers(0, 3, 40, 50), ("B2", "B3", "B8"))
    write(tmp_path / "a" / "c.TIFF", numbers(1, 4, 32, 32), ("nir", "extra", "green", "blue"))
    return tmp_path


def test_windows_cover_every_pixel_and_the_last_ones_end_at_the_edge(folder: Path) -> None:
    tiles = TileFolder(folder, bands=["B2"], size=16)
    assert [sample["id"] for sample in tiles] == [
        *(f"b.tif:{row}:{column}" for row in (0, 16, 24) for column in (0, 16, 32, 34)),
        *(f"a/c.TIFF:{row}:{column}" for row in (0, 16) for column in (0, 16)),
    ]
    overlapping = TileFolder(folder, bands=["B2"], size=16, stride=8)
    assert len(overlapping) == 4 * 6 + 3 * 3


def test_bands_are_found_by_name_in_whatever_order(folder: Path) -> None:
    tiles = TileFolder(folder, bands=["B8", "blue"], size=32)
    assert tiles.bands == ("B8", "B2")
    stored = numbers(1, 4, 32, 32)[[0, 3]].astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in vars(tiles.statistics).values())
    last = tiles[len(tiles) - 1]
    assert last["id"] == "a/c.TIFF:0:0"
    np.testing.assert_allclose(last["image"], (stored - mean) / std, atol=1e-5)
    assert last["image"].dtype == torch.float32


def test_without_a_choice_the_bands_are_those_of_the_first_file(folder: Path) -> None:
    assert TileFolder(folder, size=32).bands == ("B2", "B3", "B8")


def test_a_file_without_a_band_is_named_with_the_band(folder: Path) -> None:
    write(folder / "z.tif", numbers(2, 2, 32, 32), ("B2", "B3"))
    with pytest.raises(BandError, match=r"z\.tif needs B8"):
        TileFolder(folder, size=32)
    tiles = TileFolder(folder, size=32, errors="skip")
    assert tiles.report.counts == {"BandError": 1}
    assert not [sample for sample in tiles if sample["id"].startswith("z.tif")]


def test_files_without_names_need_them_given(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", numbers(0, 2, 32, 32))
    with pytest.raises(BandError, match=r"a\.tif has 2 bands without names"):
        TileFolder(tmp_path, size=32)
    assert TileFolder(tmp_path, size=32, names=["B8", "B4"], bands=["B4"]).bands == ("B4",)
    with pytest.raises(BandError, match=r"a\.tif has 2 bands, 3 are named"):
        TileFolder(tmp_path, size=32, names=["B8", "B4", "B3"])
    with pytest.raises(BandError, match=r"a\.tif: band 'B8' is listed twice"):
        TileFolder(tmp_path, size=32, names=["B8", "nir"])


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_those_of_all_valid_pixels_once(tmp_path: Path) -> None:
    first, second = numbers(0, 2, 40, 50), numbers(1, 2, 32, 33)
    first[0, :10] = 0  # no data
    second[1, 5, 5] = 65_000  # no data by the file's own word
    write(tmp_path / "a.tif", first, ("B2", "B8"))
    write(tmp_path / "b.tif", second, ("B2", "B8"), nodata=65_000)
    tiles = TileFolder(tmp_path, size=16, stride=5, max_missing=1.0)
    for band in range(2):
        both = np.concatenate([first[band].ravel(), second[band].ravel()]).astype(float)
        valid = both[(both > 0) & (both < 65_000)]
        assert tiles.statistics.mean[band] == pytest.approx(valid.mean(), rel=1e-9)
        assert tiles.statistics.std[band] == pytest.approx(valid.std(), rel=1e-9)
    # Read in many pieces they are the same.
    whole = tiles.statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geofm.datasets.tiles._VALUES", 500)
        pieces = TileFolder(tmp_path, size=16, max_missing=1.0).statistics
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(pieces.std, whole.std, rtol=1e-12)


def test_streamed_moments_do_not_cancel_far_from_zero() -> None:
    moments = Moments(1)
    rng = np.random.default_rng(0)
    pieces = [(1e6 + rng.integers(0, 8, (1, 9, 9))).astype(np.float32) for _ in range(50)]
    for piece in pieces:
        moments.add(piece)
    moments.add(np.full((1, 3, 3), np.nan, np.float32))
    every = np.concatenate([piece.astype(np.float64).ravel() for piece in pieces])
    assert moments.counts[0] == every.size
    assert moments.std[0] == pytest.approx(every.std(), rel=1e-10)


def test_given_statistics_are_used_by_name_and_spare_the_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TileFolder, "_pass", lambda self: pytest.fail("pixels were read"))
    given = {"B8": (3.0, 4.0), "B2": (1.0, 2.0), "B3": (5.0, 6.0)}
    tiles = TileFolder(folder, size=32, statistics=given, max_missing=1.0)
    assert tiles.statistics.mean == (1.0, 5.0, 3.0)
    stored = numbers(1, 4, 32, 32)[3].astype(np.float32)
    np.testing.assert_allclose(tiles[len(tiles) - 1]["image"][0], (stored - 1) / 2, rtol=1e-5)
    again = TileFolder(folder, size=32, statistics=tiles.statistics, max_missing=1.0)
    assert again.input_spec() == tiles.input_spec()
    with pytest.raises(BandError, match="lack B8"):
        TileFolder(folder, size=32, statistics={"B2": (1, 2), "B3": (5, 6)}, max_missing=1.0)


def test_a_band_that_never_changes_is_an_error(tmp_path: Path) -> None:
    pixels = numbers(0, 2, 32, 32)
    pixels[1] = 7
    write(tmp_path / "a.tif", pixels, ("B2", "B8"))
    with pytest.raises(PixelError, match="band B8 is the same everywhere"):
        TileFolder(tmp_path, size=32)


# --- missing pixels and damaged files -------------------------------------------------------------


def test_missing_pixels_become_0_and_windows_with_too_many_are_dropped(tmp_path: Path) -> None:
    pixels = numbers(0, 2, 16, 48).astype(np.float32)
    pixels[:, :, :16] = np.nan  # the first window: nothing
    pixels[0, :, 16:32] = 0  # the second: half of it
    pixels[:, 3, 40] = 0  # the third: a pixel
    write(tmp_path / "a.tif", pixels, ("B2", "B8"))
    tiles = TileFolder(tmp_path, size=16)
    assert [sample["id"] for sample in tiles] == ["a.tif:0:16", "a.tif:0:32"]
    assert tiles.report.counts == {"window with more than 0.5 missing": 1}
    assert (tiles[0]["image"][0] == 0).all()
    assert (tiles[0]["image"][1] != 0).any()
    assert (tiles[1]["image"][:, 3, 8] == 0).all()
    assert len(TileFolder(tmp_path, size=16, max_missing=0.49)) == 1
    assert len(TileFolder(tmp_path, size=16, max_missing=1.0)) == 3
    with pytest.raises(DataNotFoundError, match="no usable window"):
        TileFolder(tmp_path, size=16, stride=64, max_missing=0.0)


def test_0_is_a_value_in_bands_that_are_not_the_sensors(tmp_path: Path) -> None:
    pixels = numbers(0, 2, 32, 32).astype(np.int16)
    pixels[:, 0] = 0
    write(tmp_path / "a.tif", pixels, ("B2", "elevation"))
    tiles = TileFolder(tmp_path, size=32, max_missing=1.0)
    assert tiles.statistics.mean[0] == pytest.approx(pixels[0, 1:].mean())
    assert tiles.statistics.mean[1] == pytest.approx(pixels[1].mean())
    assert (tiles[0]["image"][0, 0] == 0).all()
    assert (tiles[0]["image"][1, 0] != 0).all()


def test_damaged_and_small_files_are_named_or_left_out(folder: Path) -> None:
    whole = TileFolder(folder, size=32)
    broken = write(folder / "broken.tif", numbers(3, 3, 64, 64), ("B2", "B3", "B8"))
    broken.write_bytes(broken.read_bytes()[:9000])
    (folder / "text.tif").write_text("no image")
    write(folder / "small.tif", numbers(2, 3, 31, 40), ("B2", "B3", "B8"))
    with pytest.raises(ImageError, match=r"(broken|small|text)\.tif"):
        TileFolder(folder, size=32)
    tiles = TileFolder(folder, size=32, errors="skip")
    assert tiles.report.counts == {"unreadable": 2, "too small": 1}
    assert [sample["id"] for sample in tiles] == [sample["id"] for sample in whole]
    assert tiles.statistics == whole.statistics


def test_values_in_other_units_are_refused_with_the_file(folder: Path) -> None:
    pixels = np.random.default_rng(0).uniform(0.01, 0.6, (3, 32, 32)).astype(np.float32)
    write(folder / "z.tif", pixels, ("B2", "B3", "B8"))
    with pytest.raises(PixelError, match=r"z\.tif: .*units='reflectance'"):
        TileFolder(folder, size=32)
    assert TileFolder(folder, size=32, errors="skip").report.counts == {"PixelError": 1}


def test_reflectance_has_its_statistics_in_dn(tmp_path: Path) -> None:
    pixels = numbers(0, 2, 32, 32)
    write(tmp_path / "dn" / "a.tif", pixels, ("B2", "B8"))
    write(tmp_path / "reflectance" / "a.tif", pixels.astype(np.float32) / 10_000, ("B2", "B8"))
    write(tmp_path / "offset" / "a.tif", pixels + np.uint16(1000), ("B2", "B8"))
    first = TileFolder(tmp_path / "dn", size=32)
    others = [
        TileFolder(tmp_path / "reflectance", size=32, units="reflectance"),
        TileFolder(tmp_path / "offset", size=32, offset=-1000),
    ]
    for other in others:
        np.testing.assert_allclose(other.statistics.mean, first.statistics.mean, rtol=1e-5)
        torch.testing.assert_close(other[0]["image"], first[0]["image"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"stride": 0}, {"max_missing": 1.5}])
def test_arguments_out_of_range_are_refused(folder: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(PixelError, match=next(iter(wrong))):
        TileFolder(folder, **wrong)
    with pytest.raises(DataNotFoundError, match="nowhere"):
        TileFolder(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match="no usable"):
        TileFolder(folder / "empty")


def test_without_rasterio_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(MissingExtraError, match=r"geofm\[raster\]"):
        TileFolder(folder)


# --- use ------------------------------------------------------------------------------------------


def test_a_batch_opens_each_file_once_and_keeps_its_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = TileFolder(folder, size=16, bands=["B2", "B8"])
    wanted = [13, 0, 15, 7, 0, -1]
    singly = [tiles[index] for index in wanted]
    opened: list[str] = []
    real = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path: opened.append(path.name) or real(path))
    together = tiles.__getitems__(wanted)
    assert sorted(opened) == ["b.tif", "c.TIFF"]
    for one, other in zip(singly, together, strict=True):
        assert one["id"] == other["id"]
        assert torch.equal(one["image"], other["image"])
    with pytest.raises(IndexError):
        tiles[len(tiles)]


def test_workers_read_the_same_samples(folder: Path) -> None:
    tiles = TileFolder(folder, size=16, bands=["B2", "B8"])
    batches = list(DataLoader(tiles, batch_size=5, num_workers=2))
    images = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(images, torch.stack([sample["image"] for sample in tiles]))
    assert torch.equal(pickle.loads(pickle.dumps(tiles))[3]["image"], tiles[3]["image"])


def test_a_model_gets_the_same_input_later(tmp_path: Path) -> None:
    scene = landscape((64, 64))
    write_scene(tmp_path / "a.tif", scene)
    tiles = TileFolder(tmp_path, bands=["B4", "B3", "B2", "B8"], size=64, level="L2A")
    spec = tiles.input_spec()
    assert (spec.levels, spec.size, list(spec.statistics)) == (("L2A",), 64, ["L2A"])
    prepare = Preprocess(spec, scene.bands, "dn", "L2A")
    torch.testing.assert_close(prepare(scene.pixels), tiles[0]["image"])


def test_ssl4ecos_images_are_tiles_too(tmp_path: Path) -> None:
    tiles = TileFolder(write_ssl4eco(tmp_path, n=3, size=32), size=32, level="L2A")
    assert tiles.bands == (*L2A, "NDVI")
    every = torch.stack([sample["image"] for sample in tiles])
    assert every.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(every.std((0, 2, 3)), torch.ones(13), atol=1e-3, rtol=0)


def test_real_scenes_of_different_size_and_kind_of_band() -> None:
    root = data("s2_scenes")
    scenes = TileFolder(root, bands=["B2", "B8"], names=L2A, errors="skip", level="L2A")
    # The 13 bands of the Level-1C scene are not these twelve.
    assert scenes.report.counts["BandError"] == 1
    assert "copernicusfm" in str(scenes.report)
    assert len(scenes) == 6 * 6 + 6 * 6 + 3 * 3
    edge = scenes[35]
    assert edge["id"] == "eotdl_Boadella_2020-01-13.tif:313:316"
    with rasterio.open(root / "eotdl_Boadella_2020-01-13.tif") as file:
        stored = file.read(8, window=((313, 377), (316, 380))).astype(np.float32)
    mean, std = scenes.statistics.mean[1], scenes.statistics.std[1]
    np.testing.assert_allclose(edge["image"][1], (stored - mean) / std, atol=1e-4)
    every = torch.stack([sample["image"] for sample in scenes])
    assert torch.isfinite(every).all()
    # Overlapping windows count edges twice, the statistics do not.
    assert every.mean((0, 2, 3)).abs().max() < 0.1


def test_real_eurosat_tiles_are_one_window_each() -> None:
    names = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A".split()
    root = data("eurosat_ms_200", "Forest")
    tiles = TileFolder(root, bands=[b for b in names if b != "B10"], names=names, level="L1C")
    assert len(tiles) == len(list(root.glob("*.tif")))
    with rasterio.open(root / tiles[0]["id"].split(":")[0]) as file:
        last = file.read(13).astype(np.float32)
    mean, std = tiles.statistics.mean[-1], tiles.statistics.std[-1]
    np.testing.assert_allclose(tiles[0]["image"][-1], (last - mean) / std, atol=1e-4)


def test_real_stacks_give_bands_by_name_among_hundreds_with_an_elevation() -> None:
    root = data("s1s2era5_series")
    tiles = TileFolder(root, bands=["B8", "elevation", "red"], size=17)
    assert tiles.bands == ("B8", "elevation", "B4")
    assert [sample["id"] for sample in tiles] == [f"{f.name}:0:0" for f in sorted(root.iterdir())]
    with rasterio.open(root / "cropharvest_togo_2019.tif") as file:
        stored = file.read([file.descriptions.index(b) + 1 for b in ("B8", "elevation", "B4")])
    mean, std = (np.array(v)[:, None, None] for v in vars(tiles.statistics).values())
    np.testing.assert_allclose(tiles[0]["image"], (stored - mean) / std, atol=1e-4)
