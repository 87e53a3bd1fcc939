"""MMEarth's format: what the files hold is what is delivered, whole or not."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import data
from torch.utils.data import DataLoader

import geofm
from geofm.datasets import _hdf5
from geofm.datasets.mmearth import (
    BANDS,
    MODALITIES,
    STORED_BANDS,
    MMEarth,
    MMEarthFormatError,
    TileReadError,
    unpack_mmearth,
    write_mmearth,
)

h5py = pytest.importorskip("h5py")

N = 40


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmearth(tmp_path_factory.mktemp("mmearth"), n=N, size=32, seed=3)


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(pristine.parent, tmp_path / "set")
    return tmp_path / "set" / pristine.name


def load(path: Path, what: str) -> Any:
    return json.loads(path.with_name(f"{path.stem}_{what}.json").read_text())


def change(path: Path, what: str, content: Any) -> None:
    path.with_name(f"{path.stem}_{what}.json").write_text(json.dumps(content))


def stored(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][()]


def rewrite(path: Path, name: str, values: np.ndarray, **layout: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, data=values, **layout)


def by_id(dataset: MMEarth) -> dict[str, dict[str, Any]]:
    return {sample["id"]: sample for sample in dataset.__getitems__(range(len(dataset)))}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name], equal_nan=name != "id")
        if name != "id"
        else a[name] == b[name]
        for name in a
    )


# ---- the generated samples


def test_generated_files_have_the_published_arrays(pristine: Path) -> None:
    s = (32, 32)
    expected = {
        "sentinel2": ((N, 13, *s), "uint16"),
        "sentinel2_cloudmask": ((N, 1, *s), "uint16"),
        "sentinel2_cloudprod": ((N, 1, *s), "uint16"),
        "sentinel2_scl": ((N, 1, *s), "uint8"),
        "sentinel1": ((N, 8, *s), "float32"),
        "aster": ((N, 2, *s), "int16"),
        "era5": ((N, 12), "float32"),
        "dynamic_world": ((N, 1, *s), "uint8"),
        "canopy_height_eth": ((N, 2, *s), "uint8"),
        "lat": ((N, 2), "float32"),
        "lon": ((N, 2), "float32"),
        "biome": ((N, 14), "uint8"),
        "eco_region": ((N, 846), "uint16"),
        "month": ((N, 2), "float32"),
        "esa_worldcover": ((N, 1, *s), "uint8"),
    }
    with h5py.File(pristine) as file:
        found = {k: (v.shape, str(v.dtype)) for k, v in file.items() if k != "metadata"}
        assert found == expected
        ids = [row[0].decode() for row in file["metadata"]]
    info = load(pristine, "tile_info")
    assert list(info) == ids
    assert {entry["S2_type"] for entry in info.values()} == {"l1c", "l2a"}
    splits = load(pristine, "splits")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 32, "val": 4, "test": 4}
    assert sorted(row for rows in splits.values() for row in rows) == list(range(N))


def test_generated_files_hold_every_kind_of_missing_value(pristine: Path) -> None:
    assert (stored(pristine, "sentinel2")[:, :10] == 0).any()
    assert np.isneginf(stored(pristine, "sentinel1")).any()
    assert (stored(pristine, "canopy_height_eth") == 255).any()
    assert (stored(pristine, "dynamic_world") == 0).any()
    assert (stored(pristine, "esa_worldcover") == 0).any()
    assert np.isnan(stored(pristine, "era5")).any()
    codes = set(np.unique(stored(pristine, "esa_worldcover")).tolist())
    assert codes <= {0, *range(10, 100, 10), 95, 100}


def test_generated_tiles_follow_from_the_seed(pristine: Path, tmp_path: Path) -> None:
    again = write_mmearth(tmp_path / "again", n=N, size=32, seed=3)
    other = write_mmearth(tmp_path / "other", n=N, size=32, seed=4)
    for name in ("sentinel2", "sentinel1", "era5"):
        assert np.array_equal(stored(again, name), stored(pristine, name), equal_nan=True)
        assert not np.array_equal(stored(other, name), stored(pristine, name), equal_nan=True)
    assert load(again, "band_stats").keys() == load(pristine, "band_stats").keys()


def test_generated_statistics_are_those_of_the_arrays(pristine: Path) -> None:
    levels = np.array([entry["S2_type"] for entry in load(pristine, "tile_info").values()])
    blue = stored(pristine, "sentinel2")[levels == "l1c", 1].astype(np.float64)
    stats = load(pristine, "band_stats")
    assert stats["sentinel2_l1c"]["mean"][1] == pytest.approx(blue[blue > 0].mean())
    assert stats["sentinel2_l1c"]["std"][1] == pytest.approx(blue[blue > 0].std())
    assert math.isnan(stats["sentinel2_l2a"]["mean"][STORED_BANDS.index("B10")])


def test_generated_statistics_have_the_structure_of_the_published_ones(pristine: Path) -> None:
    made = load(pristine, "band_stats")
    published = json.loads(
        data("mmearth_band_stats", "data_1M_v001_64_band_stats.json").read_text()
    )
    shape = {k: {w: len(v) for w, v in entry.items()} for k, entry in published.items()}
    assert {k: {w: len(v) for w, v in entry.items()} for k, entry in made.items()} == shape


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"size": 31}, {"seed": -1}, {"name": "../out"}, {"name": ""}]
)
def test_impossible_samples_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(geofm.GeofmError):
        write_mmearth(tmp_path / "here", **arguments)
    assert not (tmp_path / "here").exists()


def test_a_single_tile_can_be_written_and_read(tmp_path: Path) -> None:
    dataset = MMEarth(write_mmearth(tmp_path, n=1, size=32))
    assert len(dataset) == 1
    assert dataset.input_spec().levels == ("L2A",)


# ---- values


def test_every_modality_is_normalized_as_computed_by_hand(pristine: Path) -> None:
    samples = by_id(MMEarth(pristine, split=None))
    stats, info = load(pristine, "band_stats"), load(pristine, "tile_info")
    seen = set()
    with h5py.File(pristine) as file:
        for row in range(N):
            name = file["metadata"][row][0].decode()
            sample, level = samples[name], info[name]["S2_type"]
            seen.add(level)
            for key in ("sentinel2", "sentinel1", "aster", "canopy_height_eth"):
                raw = file[key][row].astype(np.float64)
                entry = stats[f"{key}_{level}" if key == "sentinel2" else key]
                mean = np.array(entry["mean"])[:, None, None]
                expected = (raw - mean) / np.array(entry["std"])[:, None, None]
                lost = {"sentinel2": raw == 0, "canopy_height_eth": raw == 255}
                expected[lost.get(key, np.isinf(raw))] = 0
                if key == "sentinel2":
                    expected = np.delete(expected, 10, axis=0)
                assert sample[key].dtype == torch.float32
                np.testing.assert_allclose(sample[key], expected, atol=2e-5, rtol=1e-5)
            for key in ("era5", "lat", "lon", "month"):
                mean, std = np.array(stats[key]["mean"]), np.array(stats[key]["std"])
                np.testing.assert_allclose(
                    sample[key], (file[key][row] - mean) / std, atol=2e-4, rtol=1e-5
                )
            world = file["dynamic_world"][row].astype(int)
            assert np.array_equal(sample["dynamic_world"], world - 1)
            legend = {10 * k: k - 1 for k in range(1, 10)} | {95: 9, 100: 10, 0: -1}
            cover = np.vectorize(legend.get)(file["esa_worldcover"][row])
            assert np.array_equal(sample["esa_worldcover"], cover)
            assert sample["dynamic_world"].dtype == sample["esa_worldcover"].dtype == torch.int64
            for key in ("biome", "eco_region"):
                assert sample[key].dtype == torch.float32
                assert np.array_equal(sample[key], file[key][row])
            for key, none in (
                ("sentinel2_cloudmask", 65535),
                ("sentinel2_cloudprod", 65535),
                ("sentinel2_scl", 255),
            ):
                raw = file[key][row].astype(int)
                assert np.array_equal(sample[key], np.where(raw == none, -1, raw))
    assert seen == {"l1c", "l2a"}


def test_l1c_and_l2a_tiles_use_their_own_statistics(path: Path) -> None:
    before = by_id(MMEarth(path, split=None, modalities=["sentinel2"]))
    stats = load(path, "band_stats")
    stats["sentinel2_l2a"]["mean"] = [m + 100 for m in stats["sentinel2_l2a"]["mean"]]
    change(path, "band_stats", stats)
    after = by_id(MMEarth(path, split=None, modalities=["sentinel2"]))
    info = load(path, "tile_info")
    for name, sample in before.items():
        same = torch.equal(sample["sentinel2"], after[name]["sentinel2"])
        assert same == (info[name]["S2_type"] == "l1c")


def test_bands_come_in_the_order_asked_for(pristine: Path) -> None:
    all_bands = MMEarth(pristine, modalities=["sentinel2"])
    some = MMEarth(pristine, modalities=["sentinel2"], bands=["B4", "B8A", "B2"])
    which = [BANDS.index(band) for band in ("B4", "B8A", "B2")]
    assert all_bands[0]["sentinel2"].shape == (12, 32, 32)
    assert torch.equal(some[0]["sentinel2"], all_bands[0]["sentinel2"][which])


def test_b10_is_missing_in_l2a_tiles_only(pristine: Path) -> None:
    dataset = MMEarth(pristine, split=None, bands=["B10"])
    levels = {name: entry["S2_type"] for name, entry in load(pristine, "tile_info").items()}
    for name, sample in by_id(dataset).items():
        assert bool((sample["sentinel2"] == 0).all()) == (levels[name] == "l2a")
    assert dataset.input_spec().levels == ("L1C",)


def test_without_normalization_the_units_of_the_file_remain(pristine: Path) -> None:
    sample = MMEarth(pristine, split=None, normalize=False)[2]
    raw = stored(pristine, "sentinel1")[2]
    assert np.array_equal(sample["sentinel2"], np.delete(stored(pristine, "sentinel2")[2], 10, 0))
    assert np.array_equal(sample["sentinel1"], np.where(np.isinf(raw), np.nan, raw), equal_nan=True)


def test_published_statistics_can_be_used(pristine: Path) -> None:
    file = data("mmearth_band_stats", "data_1M_v001_64_band_stats.json")
    dataset = MMEarth(pristine, split=None, statistics=file)
    raw = stored(pristine, "sentinel2")[0, 0].astype(np.float64)
    expected = (raw - 1349.3977794889083) / 2340.2916479338087
    assert load(pristine, "tile_info")[dataset[0]["id"]]["S2_type"] == "l2a"
    np.testing.assert_allclose(dataset[0]["sentinel2"][0], expected, atol=1e-5)
    same = MMEarth(pristine, split=None, statistics=json.loads(file.read_text()))
    assert equal(same[0], dataset[0])
    spec, card = dataset.input_spec(size=56), geofm.model_card("mpmae_atto.mmearth64").input
    assert spec == card


def test_splits_choose_the_tiles_and_their_order(pristine: Path) -> None:
    splits, ids = load(pristine, "splits"), list(load(pristine, "tile_info"))
    for split, rows in splits.items():
        dataset = MMEarth(pristine.parent, split=split, modalities=["lat"])
        assert [dataset[i]["id"] for i in range(len(dataset))] == [ids[row] for row in rows]
    assert len(MMEarth(pristine, split=None, modalities=["lat"])) == N


@pytest.mark.parametrize(
    ("name", "dtype", "code"),
    [("canopy_height_eth", "i1", -1), ("canopy_height_eth", "i1", 127), ("aster", "i2", -32768)],
)
def test_no_data_that_integers_cannot_hold_is_recognised(
    path: Path, name: str, dtype: str, code: int
) -> None:
    values = np.full((N, 2, 32, 32), 7, dtype)
    values[:, 0, 5] = code
    rewrite(path, name, values)
    sample = MMEarth(path, modalities=[name])[0][name]
    assert (sample[0, 5] == 0).all()
    assert (sample[1] != 0).all()


def test_older_no_data_and_unknown_codes_are_missing_classes(path: Path) -> None:
    cover = np.full((N, 1, 32, 32), 40, np.uint8)
    cover[:, :, 0], cover[:, :, 1], cover[:, :, 2] = 255, 0, 41
    rewrite(path, "esa_worldcover", cover)
    rewrite(path, "dynamic_world", np.full((N, 1, 32, 32), -3, np.int64))
    biome = np.full((N, 14), 255, np.uint8)
    rewrite(path, "biome", biome)
    sample = MMEarth(path, modalities=["esa_worldcover", "dynamic_world", "biome"])[0]
    assert (sample["esa_worldcover"][:, :3] == -1).all()
    assert (sample["esa_worldcover"][:, 3:] == 3).all()
    assert (sample["dynamic_world"] == -1).all()
    assert (sample["biome"] == 0).all()


def test_nan_and_infinity_are_missing(path: Path) -> None:
    radar = stored(path, "sentinel1")
    radar[:, 0, :4], radar[:, 0, 4:8] = np.nan, np.inf
    rewrite(path, "sentinel1", radar)
    weather = stored(path, "era5")
    weather[:, 5] = np.inf
    rewrite(path, "era5", weather[:, None])
    sample = MMEarth(path, modalities=["sentinel1", "era5"])[0]
    assert (sample["sentinel1"][0, :8] == 0).all()
    assert sample["era5"].shape == (12,)
    assert math.isnan(sample["era5"][5])


def test_channels_without_statistics_are_missing_and_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = load(path, "band_stats")
    stats["aster"]["mean"][1] = math.nan
    change(path, "band_stats", stats)
    sample = MMEarth(path, modalities=["aster"])[0]["aster"]
    assert (sample[1] == 0).all()
    assert (sample[0] != 0).any()
    assert "aster has no statistics of channels [1]" in caplog.text


# ---- batches, workers, layouts


def test_a_batch_holds_the_same_as_its_samples_one_by_one(pristine: Path) -> None:
    dataset = MMEarth(pristine, split=None)
    order = [7, 3, 3, 39, 0, -1, 8]
    for index, sample in zip(order, dataset.__getitems__(order), strict=True):
        assert equal(sample, dataset[index])
    assert dataset.__getitems__([]) == []


def test_samples_of_a_batch_share_memory(pristine: Path) -> None:
    a, b = MMEarth(pristine, split=None).__getitems__([1, 0])
    storages = [sample["sentinel2"].untyped_storage().data_ptr() for sample in (a, b)]
    assert storages[0] == storages[1]


@pytest.mark.parametrize("packed", [True, False])
def test_threads_read_what_one_reads_after_the_other(
    pristine: Path, tmp_path: Path, packed: bool
) -> None:
    path = pristine if packed else unpack_mmearth(pristine, tmp_path / "raw.h5")
    dataset = MMEarth(path, split=None)
    with ThreadPoolExecutor(8) as pool:
        # The file is opened by whichever thread comes first.
        together = [list(pool.map(dataset.__getitem__, range(N))) for _ in range(8)]
    alone = MMEarth(path, split=None).__getitems__(range(N))
    for samples in together:
        assert all(equal(a, b) for a, b in zip(samples, alone, strict=True))


@pytest.mark.parametrize("index", [slice(0, 2), "a", 1.0, None])
def test_what_is_no_number_of_a_sample_is_explained(pristine: Path, index: Any) -> None:
    with pytest.raises(TypeError, match="index must be a whole number, got"):
        MMEarth(pristine, split=None)[index]


def test_a_string_is_no_list_of_names(pristine: Path) -> None:
    with pytest.raises(MMEarthFormatError, match=r"modalities=\['sentinel2', 'era5'\]"):
        MMEarth(pristine, modalities="sentinel2, era5")
    with pytest.raises(geofm.BandError, match=r"got the string 'B2'; write bands=\['B2'\]"):
        MMEarth(pristine, bands="B2")


def test_a_truncated_file_says_what_to_do(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(MMEarthFormatError, match="fetch it again"):
        MMEarth(path)


@pytest.mark.parametrize("index", [N, -N - 1])
def test_an_index_out_of_range_is_an_index_error(pristine: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} of {N}"):
        MMEarth(pristine, split=None)[index]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"chunks": (1, 13, 32, 32)},
        {"chunks": (1, 13, 32, 32), "compression": "gzip", "shuffle": True},
        {"chunks": (3, 5, 16, 32), "compression": "lzf"},
    ],
    ids=["contiguous", "by tile", "shuffled bytes", "any chunks"],
)
def test_the_layout_of_the_file_does_not_matter(
    pristine: Path, path: Path, layout: dict[str, Any]
) -> None:
    rewrite(path, "sentinel2", stored(path, "sentinel2"), **layout)
    order = [5, 6, 7, 30, 2]
    ours = MMEarth(path, None, ["sentinel2"]).__getitems__(order)
    published = MMEarth(pristine, None, ["sentinel2"]).__getitems__(order)
    assert all(equal(a, b) for a, b in zip(ours, published, strict=True))


def test_an_unpacked_set_holds_the_same(pristine: Path, tmp_path: Path) -> None:
    unpacked = unpack_mmearth(pristine, tmp_path / "raw.h5", rows=7)
    with h5py.File(unpacked) as file:
        assert all(array.chunks is None for array in file.values())
    ours, published = MMEarth(unpacked, split="val"), MMEarth(pristine, split="val")
    assert all(equal(ours[i], published[i]) for i in range(4))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".h5", ".json", ".json", ".json"]


def test_unpacking_leaves_nothing_behind_where_it_fails(path: Path, tmp_path: Path) -> None:
    damage(path, "sentinel2", 4)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError):
        unpack_mmearth(path, tmp_path / "out" / "raw.h5")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(MMEarthFormatError, match="name another one"):
        unpack_mmearth(path, path)


def test_a_chunk_that_was_never_written_is_the_fill_value(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["aster"]
        file.create_dataset("aster", (N, 2, 32, 32), "i2", chunks=(1, 2, 32, 32), fillvalue=5)
    sample = MMEarth(path, modalities=["aster"], normalize=False)[0]
    assert (sample["aster"] == 5).all()


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_deliver_what_one_process_delivers(
    pristine: Path, start: str, workers: int
) -> None:
    names = ["sentinel2", "era5", "biome"]
    dataset = MMEarth(pristine, modalities=names)
    dataset[0]  # the file is open here when workers are forked
    alone = list(DataLoader(dataset, batch_size=5))
    shared = list(
        DataLoader(dataset, batch_size=5, num_workers=workers, multiprocessing_context=start)
    )
    assert len(alone) == len(shared) == 7
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert dataset.report.read == 32


def test_a_dataset_survives_pickling(pristine: Path) -> None:
    dataset = MMEarth(pristine, modalities=["sentinel1"])
    first = dataset[0]
    assert equal(pickle.loads(pickle.dumps(dataset))[0], first)


# ---- what is missing or damaged


def test_absent_modalities_are_left_out_only_if_not_asked_for(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(path, "a") as file:
        del file["aster"]
    with caplog.at_level(logging.WARNING):
        dataset = MMEarth(path)
    assert "has no aster; left out" in caplog.text
    assert dataset.modalities == tuple(name for name in MODALITIES if name != "aster")
    assert "aster" not in dataset[0]
    with pytest.raises(geofm.GeofmError, match=r"aster.*has sentinel2, ") as error:
        MMEarth(path, modalities=["sentinel2", "aster"])
    assert isinstance(error.value, FileNotFoundError)


@pytest.mark.parametrize("names", [["sentinel3"], [], ["lat", "lat"]])
def test_modalities_must_be_known_and_different(pristine: Path, names: list[str]) -> None:
    with pytest.raises(geofm.GeofmError, match=r"modalities are .* has sentinel2"):
        MMEarth(pristine, modalities=names)


@pytest.mark.parametrize("bands", [["B2", "B99"], [], ["B2", "B2"]])
def test_bands_must_be_known_and_different(pristine: Path, bands: list[str]) -> None:
    with pytest.raises(geofm.GeofmError, match="expected different ones of B1, B2"):
        MMEarth(pristine, bands=bands)


def damage(path: Path, name: str, row: int) -> None:
    """Overwrite the stored bytes of one tile."""
    with h5py.File(path) as file:
        where = file[name].id.get_chunk_info_by_coord((row, *(0 for _ in file[name].shape[1:])))
    with path.open("r+b") as file:
        file.seek(where.byte_offset)
        file.write(b"\xff" * min(where.size, 64))


def test_a_damaged_tile_is_an_error_that_names_it(path: Path) -> None:
    damage(path, "sentinel1", 4)
    dataset = MMEarth(path, split=None)
    assert dataset[3]["id"] == "3_000003"
    with pytest.raises(TileReadError, match=r"sentinel1 of tile 3_000004 \(row 4\).*errors='skip'"):
        dataset.__getitems__([3, 4, 5])
    with pytest.raises(OSError, match="3_000004"):
        list(DataLoader(dataset, batch_size=8, num_workers=1))


def test_a_file_that_could_not_be_opened_once_can_be_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = MMEarth(path, split=None)

    def too_many(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("os.open", too_many)
        with pytest.raises(OSError, match="Too many"):
            dataset[0]
    assert dataset[0]["id"] == dataset.ids[0].decode()


def test_zlib_inflates_to_the_same_where_isal_is_not_installed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = MMEarth(path, split=None)
    fast = dataset.__getitems__(list(range(N)))
    monkeypatch.setattr(_hdf5, "zlib", zlib)
    assert all(equal(a, b) for a, b in zip(fast, dataset.__getitems__(list(range(N))), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_tile_can_be_delivered_as_missing(
    path: Path, pristine: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage(path, "sentinel1", 4)
    dataset = MMEarth(path, split=None, errors="skip")
    whole = MMEarth(pristine, split=None)
    samples = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert len(samples) == N
    for index, sample in enumerate(samples):
        if index != 4:
            assert equal(sample, whole[index])
    lost = samples[4]
    assert lost["id"] == "3_000004"
    for name in ("sentinel2", "sentinel1", "aster", "canopy_height_eth", "biome", "eco_region"):
        assert (lost[name] == 0).all()
    for name in ("dynamic_world", "esa_worldcover", "sentinel2_scl"):
        assert (lost[name] == -1).all()
    for name in ("era5", "lat", "lon", "month"):
        assert torch.isnan(lost[name]).all()
    assert dataset.report.unreadable == ("3_000004",)
    assert dataset.report.read == N - 1
    assert str(dataset.report) == f"{N - 1} tiles read; 1 unreadable: 3_000004"
    assert dataset.report.counts == {"unreadable": 1}
    assert dataset.report.examples == {"unreadable": ["3_000004"]}
    if not workers:
        assert "sentinel1 of tile 3_000004" in caplog.text


def test_tiles_without_any_pixel_are_delivered_and_reported(path: Path) -> None:
    pixels = stored(path, "sentinel2")
    pixels[9] = 0
    rewrite(path, "sentinel2", pixels)
    dataset = MMEarth(path, split=None)
    assert dataset.report.empty == ()
    samples = dataset.__getitems__([8, 9])
    assert (samples[1]["sentinel2"] == 0).all()
    assert (samples[1]["aster"] != 0).any()
    assert dataset.report.empty == ("3_000009",)
    assert dataset.report.read == 2


# ---- files that do not fit


def test_paths_must_lead_to_one_file(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(geofm.GeofmError, match=r"exactly one .* found none"):
        MMEarth(tmp_path)
    (tmp_path / "a.h5").touch()
    (tmp_path / "b.h5").touch()
    with pytest.raises(FileNotFoundError, match=r"a.h5, b.h5; name the file"):
        MMEarth(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        MMEarth(tmp_path / "c.h5")
    with pytest.raises(MMEarthFormatError, match="cannot be opened as HDF5"):
        MMEarth(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        MMEarth(pristine, errors="ignore")


@pytest.mark.parametrize("what", ["splits", "band_stats", "tile_info"])
def test_the_files_beside_must_be_there_and_whole(path: Path, what: str) -> None:
    file = path.with_name(f"{path.stem}_{what}.json")
    file.write_text("{")
    with pytest.raises(MMEarthFormatError, match=f"{what}.json is no JSON"):
        MMEarth(path)
    file.write_text("[]")
    with pytest.raises(MMEarthFormatError, match="must hold an object, not list"):
        MMEarth(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no .*{what}.json"):
        MMEarth(path)


@pytest.mark.parametrize("rows", [[0, N], [-1], [0.5], ["1"], [True], "012"])
def test_splits_must_list_tiles_of_the_file(path: Path, rows: Any) -> None:
    change(path, "splits", {"train": rows, "val": []})
    with pytest.raises(MMEarthFormatError, match=f"numbers from 0 to {N - 1}"):
        MMEarth(path)


def test_an_absent_or_empty_split_is_an_error_that_names_the_others(path: Path) -> None:
    change(path, "splits", {"train": [1, 2], "val": []})
    for split in ("val", "test"):
        with pytest.raises(FileNotFoundError, match=f"no tiles of split '{split}'; it has train"):
            MMEarth(path, split=split)


def test_tile_info_must_know_every_tile_and_its_level(path: Path) -> None:
    info = load(path, "tile_info")
    name = list(info)[load(path, "splits")["train"][0]]
    info[name]["S2_type"] = "l3"
    change(path, "tile_info", info)
    with pytest.raises(MMEarthFormatError, match=f"S2_type of tile {name} is 'l3'; expected 'l1c'"):
        MMEarth(path)
    del info[name]
    change(path, "tile_info", info)
    with pytest.raises(MMEarthFormatError, match=f"has no tile {name}"):
        MMEarth(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "no mean and std of 'sentinel1'; there are aster"),
        ({"mean": [0.0] * 8}, "no mean and std of 'sentinel1'"),
        ({"mean": [0.0] * 8, "std": [1.0] * 7}, "sentinel1.std must list 8 numbers"),
        ({"mean": ["0"] * 8, "std": [1.0] * 8}, "sentinel1.mean must list 8 numbers"),
        ({"mean": [0.0] * 8, "std": [0.0] * 8}, "a std of 0 or less"),
        ({"mean": [math.inf] * 8, "std": [1.0] * 8}, "an infinite value"),
    ],
)
def test_statistics_must_serve_every_modality(path: Path, entry: Any, message: str) -> None:
    stats = load(path, "band_stats")
    del stats["sentinel1"]
    if entry is not None:
        stats["sentinel1"] = entry
    change(path, "band_stats", stats)
    with pytest.raises(MMEarthFormatError, match=message):
        MMEarth(path)
    assert len(MMEarth(path, modalities=["sentinel2"])) == 32
    assert len(MMEarth(path, normalize=False)) == 32


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sentinel2", np.zeros((N, 12, 32, 32), "u2"), r"\(40, 13, 32, 32\)"),
        ("aster", np.zeros((N, 2, 16, 16), "i2"), r"expected \(40, 2, 32, 32\)"),
        ("lat", np.zeros((N - 1, 2), "f4"), r"expected \(40, 2\)"),
        ("lon", np.zeros((N, 2), "S4"), "expected numbers"),
        ("metadata", np.zeros((N, 2), "f4"), "holds no ids"),
    ],
)
def test_arrays_must_have_their_shape_and_type(
    path: Path, name: str, values: np.ndarray, message: str
) -> None:
    rewrite(path, name, values)
    with pytest.raises(MMEarthFormatError, match=message):
        MMEarth(path)


def test_ids_are_read_from_any_kind_of_metadata(pristine: Path, path: Path) -> None:
    ids = [row[0] for row in stored(path, "metadata")]
    expected = MMEarth(pristine, modalities=["lat"])[0]["id"]
    rewrite(path, "metadata", np.array([[name, b"l1c"] for name in ids]))
    assert MMEarth(path, modalities=["lat"])[0]["id"] == expected
    rewrite(path, "metadata", np.array(ids, object), dtype=h5py.string_dtype())
    assert MMEarth(path, modalities=["lat"])[0]["id"] == expected
    with h5py.File(path, "a") as file:
        del file["metadata"]
    with pytest.raises(MMEarthFormatError, match="has no array metadata"):
        MMEarth(path)


def test_a_card_needs_normalized_sentinel2(pristine: Path) -> None:
    for dataset in (MMEarth(pristine, normalize=False), MMEarth(pristine, modalities=["aster"])):
        with pytest.raises(MMEarthFormatError, match="normalize=True"):
            dataset.input_spec()
