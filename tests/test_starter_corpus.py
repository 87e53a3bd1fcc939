"""The corpus of the starter weights: what goes in, what stays out, and in which order."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
from conftest import data
from rasterio import Affine
from rasterio.warp import transform_bounds

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "starter_corpus.py"
_spec = importlib.util.spec_from_file_location("starter_corpus", SCRIPT)
corpus: Any = importlib.util.module_from_spec(_spec)
sys.modules["starter_corpus"] = corpus  # dataclasses look their module up
_spec.loader.exec_module(corpus)


def archive(folder: Path, licence: str, sha256: str | None = None) -> Any:
    (folder / "a").mkdir()
    (folder / "a" / "tile.bin").write_bytes(b"pixels")
    sha256 = sha256 or hashlib.sha256(b"pixels").hexdigest()
    row = {"file": "a/tile.bin", "licence": licence, "sha256": sha256}
    (folder / "MANIFEST.json").write_text(json.dumps([row]))
    return corpus.Archive(folder)


@pytest.mark.parametrize("licence", ["CC-BY-SA-4.0", "MIT; also CC-BY-SA-4.0", "Share-Alike"])
def test_share_alike_files_are_refused(tmp_path: Path, licence: str) -> None:
    files = archive(tmp_path, licence)
    with pytest.raises(SystemExit, match="share-alike"):
        files.use(tmp_path / "a" / "tile.bin")
    assert not files.used


def test_a_changed_file_is_refused_and_a_good_one_recorded(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    files = archive(tmp_path / "bad", "MIT", "0" * 64)
    with pytest.raises(SystemExit, match="sha256"):
        files.use(tmp_path / "bad" / "a" / "tile.bin")
    files = archive(tmp_path, "MIT (Usage: SAR)")
    files.use(tmp_path / "a" / "tile.bin")
    assert list(files.used) == ["a/tile.bin"]


def test_bands_are_stored_by_name_and_missing_ones_as_0() -> None:
    named = {band: np.full((2, 2), i + 1) for i, band in enumerate(corpus.L2A)}
    pixels, present = corpus.in_stored_order(named, "here")
    assert pixels[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8, 10, 0, 11, 12]
    assert present == [band for band in corpus.STORED if band != "B10"]


def test_a_source_with_few_bands_is_refused() -> None:
    named = {b: np.ones((2, 2)) for b in "B2 B3 B4 B5 B6 B7 B8 B11 B12 B10".split()}
    with pytest.raises(SystemExit, match="10 bands"):
        corpus.in_stored_order(named, "here")


@pytest.mark.parametrize("value", [-1.0, 70_000.0, np.nan])
def test_what_is_no_digital_number_is_refused(value: float) -> None:
    named = {band: np.full((2, 2), value) for band in corpus.L2A}
    with pytest.raises(SystemExit, match="no DN"):
        corpus.in_stored_order(named, "here")


def test_coarse_bands_are_put_on_the_fine_grid_where_they_lie() -> None:
    fine = Affine(10, 0, 1000, 0, -10, 500)
    coarse = Affine(20, 0, 980, 0, -20, 500)  # one coarse pixel further west
    layer = np.arange(9).reshape(3, 3)
    out, rows, columns = corpus.resample(layer, coarse, fine, (6, 6))
    assert out[0].tolist() == [1, 1, 2, 2, 2, 2]
    assert out[:, 0].tolist() == [1, 1, 4, 4, 7, 7]
    assert rows.all()
    assert columns.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("length", [64, 100, 101, 120, 146, 261, 377, 380])
def test_tiles_cover_a_side_and_stay_in_it(length: int) -> None:
    starts = corpus.starts(length)
    assert starts[0] == 0
    assert starts[-1] == length - 64 or length < 80
    assert all(0 < step <= 48 for step in np.diff(starts))


def test_a_scene_that_may_carry_the_offset_is_refused() -> None:
    pixels = np.full((13, 64, 64), 1100, np.uint16)
    scene = corpus.Scene("new", "l2a", pixels, corpus.L2A)
    with pytest.raises(SystemExit, match="1100 DN"):
        corpus.check_offset(scene)
    pixels[0, 0, 0] = 900
    corpus.check_offset(scene)


def test_odd_numbers_are_held_out() -> None:
    assert corpus.is_held_out(Path("River_1.tif"))
    assert corpus.is_held_out(Path("River_2201.tif"))
    assert not corpus.is_held_out(Path("River_10.tif"))


# ---------------------------------------------------------------------------------------------
# The whole set
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, out = data("MANIFEST.json").parent, tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["starter_corpus.py", str(folder), str(out)])
        corpus.main()
    yield out
    shutil.rmtree(out)  # 340 MB


@pytest.fixture(scope="module")
def info(built: Path) -> dict[str, Any]:
    return json.loads((built / "starter_tile_info.json").read_text())


def row_of(file: h5py.File, name: str) -> int:
    return [row[0].decode() for row in file["metadata"]].index(name)


def test_no_tile_of_the_test_set_is_used(built: Path) -> None:
    table = json.loads((built / "starter_sources.json").read_text())["sources"]
    files = [name for row in table for name in row["files"]]
    numbers = [int(Path(f).stem.rsplit("_", 1)[1]) for f in files if "eurosat" in f]
    assert len(numbers) == 100
    assert all(number % 2 == 0 for number in numbers)
    for folder in corpus.LEFT_OUT:
        assert not any(name.startswith(f"{folder}/") for name in files)


def test_no_tile_shows_ground_of_the_test_set(info: dict[str, Any]) -> None:
    held_out = [p for p in data("eurosat_ms_200").glob("*/*.tif") if corpus.is_held_out(p)]
    assert len(held_out) == 100
    places = [(t["lat"], t["lon"]) for t in info.values() if t["lat"] is not None]
    assert len(places) == 650
    latitude, longitude = np.array(places).T
    for path in held_out:
        with rasterio.open(path) as file:
            west, south, east, north = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
        # Half of a tile of the corpus, 320 m and its diagonal, around its centre.
        high = 460 / 111_000
        wide = high / np.cos(np.radians(latitude))
        meets = (
            (latitude > south - high)
            & (latitude < north + high)
            & (longitude > west - wide)
            & (longitude < east + wide)
        )
        assert not meets.any(), path


def test_the_set_reads_as_mmearth(built: Path, info: dict[str, Any]) -> None:
    with h5py.File(built / "starter.h5") as file:
        count = len(info)
        shapes = {name: (array.shape, array.dtype.name) for name, array in file.items()}
        assert shapes.pop("metadata")[0] == (count,)
        assert shapes == {
            "sentinel2": ((count, 13, 64, 64), "uint16"),
            "sentinel1": ((count, 8, 64, 64), "float32"),
            "aster": ((count, 2, 64, 64), "int16"),
            "lat": ((count, 2), "float32"),
            "lon": ((count, 2), "float32"),
            "month": ((count, 2), "float32"),
        }
        assert [row[0].decode() for row in file["metadata"]] == list(info)
    splits = json.loads((built / "starter_splits.json").read_text())
    assert sorted({*splits["train"], *splits["val"]}) == list(range(count))
    assert not set(splits["train"]) & set(splits["val"])
    levels = Counter(tile["S2_type"] for tile in info.values())
    assert levels == {"l1c": 267, "l2a": 1083}


def test_every_input_band_has_values_and_level_2a_no_b10(built: Path, info: dict[str, Any]) -> None:
    with h5py.File(built / "starter.h5") as file:
        filled = (file["sentinel2"][:] > 0).mean((2, 3))
    level_2a = np.array([tile["S2_type"] == "l2a" for tile in info.values()])
    assert (filled[:, [i for i in range(13) if i != 10]] > 0.99).all()
    assert (filled[level_2a, 10] == 0).all()
    assert (filled[~level_2a, 10] > 0.5).all()


def test_eurosat_is_reordered_and_placed(built: Path, info: dict[str, Any]) -> None:
    with rasterio.open(data("eurosat_ms_200", "River", "River_2.tif")) as file:
        source = file.read()
    with h5py.File(built / "starter.h5") as file:
        row = row_of(file, "eurosat_River_2")
        stored = file["sentinel2"][row]
        sine, cosine = file["lat"][row]
        assert np.isnan(file["month"][row]).all()
        assert np.isneginf(file["sentinel1"][row]).all()
        assert (file["aster"][row] == np.iinfo(np.int16).min).all()
    # B8A is last in the source, and before B8 here.
    assert np.array_equal(stored, source[[0, 1, 2, 3, 4, 5, 6, 12, 7, 8, 9, 10, 11]])
    latitude = info["eurosat_River_2"]["lat"]
    assert 48 < latitude < 49
    assert np.degrees(np.arctan2(sine, cosine)) == pytest.approx(latitude, abs=1e-4)


def test_radar_lies_on_the_optical_image_and_in_the_channels_of_its_pass(built: Path) -> None:
    with h5py.File(built / "starter.h5") as file:
        names = [row[0].decode() for row in file["metadata"]]
        june = names.index("ssl4eo_0000200_l2a_20200604_66_66")
        august = names.index("ssl4eo_0000200_l2a_20200813_66_66")
        radar = file["sentinel1"][[june, august]]
        optical = file["sentinel2"][june].astype(float)
        assert file["month"][june] == pytest.approx([0, -1], abs=1e-6)
    known = np.isfinite(radar).all((2, 3))
    assert known[0].tolist() == [False] * 4 + [True, True, False, False]  # descending, 01:08 UTC
    assert known[1].tolist() == [True, True] + [False] * 6  # ascending, 13:12 UTC
    # Vegetation scatters more in VH: together in place, not when shifted.
    ndvi = (optical[8] - optical[3]) / (optical[8] + optical[3])

    def agreement(shift: int) -> float:
        return float(np.corrcoef(np.roll(radar[0, 5], shift, 1).ravel(), ndvi.ravel())[0, 1])

    assert agreement(0) > 0.2
    assert agreement(0) > max(agreement(-20), agreement(20)) + 0.1


def test_elevation_and_dates_of_eo_learn(built: Path, info: dict[str, Any]) -> None:
    days = {t["S2_DATE"] for t in info.values() if t["source"] == "eolearn_testpatch"}
    assert days == {f"2015-{day}" for day in ("07-11", "07-31", "08-20", "08-30", "09-09")}
    with h5py.File(built / "starter.h5") as file:
        elevation, slope = file["aster"][row_of(file, "eolearn_2015-07-11_0_0")]
    assert 664 <= elevation.min() < elevation.max() <= 801
    assert 0 <= slope.min() < slope.max() < 60


def test_the_same_data_give_the_same_files(
    built: Path, info: dict[str, Any], tmp_path: Path
) -> None:
    statistics = built / "starter_band_stats.json"
    contents = []
    for name in ("once", "again"):
        tiles = corpus.read_tiles(corpus.Archive(data("MANIFEST.json").parent))
        assert [tile.id for tile in tiles] == list(info)
        (tmp_path / name).mkdir()
        corpus.write(tiles[690:1350:20], tmp_path / name, statistics)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert len(contents[0]) == 4
    assert contents[0] == contents[1]


def test_worldcereal_has_too_few_bands_as_stated() -> None:
    with h5py.File(data("worldcereal", "worldcereal_preprocessed_inputs.nc")) as file:
        assert sum(name.startswith("S2-L2A-B") for name in file) == 9
