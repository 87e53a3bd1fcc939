"""Labelled arrays in, lazy embeddings out, on threads, processes and a cluster."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import distributed
import h5py
import numpy as np
import pytest
import rioxarray  # noqa: F401  (brings .rio)
import torch
import xarray as xr
from conftest import data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import NODATA, Identity, small_mpmae

import geofm
from geofm.arrays import embed_xarray
from geofm.raster import RasterImage, embed_raster

BANDS = ["B2", "B3"]


class Local(Identity):
    """Cells of 4 px that see 4 px around them and nothing beyond, whatever the window."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(4)
        self.pause = pause
        self.feature_info = [{"num_chs": 3, "reduction": 4, "module": "a"}]
        self.conv = torch.nn.Conv2d(2, 3, 12, stride=4, padding=4)
        with torch.no_grad():
            self.conv.weight.copy_(
                torch.linspace(-1, 1, self.conv.weight.numel()).view(3, 2, 12, 12)
            )
            self.conv.bias.zero_()

    def forward_intermediates(self, x: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        if self.pause and x.device.type != "meta":
            time.sleep(self.pause)
        return [self.conv(x)]


class Fixed(Local):
    """The same, for windows of one size only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward_intermediates(self, x: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        assert x.shape[-2:] == (self.size, self.size), f"only {self.size}"
        return super().forward_intermediates(x)


def pixels(time: int = 2, height: int = 40, width: int = 56, seed: int = 0) -> xr.DataArray:
    values = np.random.default_rng(seed).integers(100, 5000, (time, 2, height, width))
    return xr.DataArray(
        values.astype(np.uint16),
        dims=("time", "band", "y", "x"),
        coords={
            "time": np.arange(time) * np.timedelta64(30, "D") + np.datetime64("2021-01-15", "ns"),
            "band": BANDS,
            "y": 5e6 - 5 - 10.0 * np.arange(height),
            "x": 4e5 + 5 + 10.0 * np.arange(width),
        },
    )


def whole(model: torch.nn.Module, array: xr.DataArray) -> np.ndarray:
    """The same of the whole image in one pass, by `embed_raster`."""
    maps = []
    for image in array.transpose("time", "band", "y", "x").values:
        source = RasterImage(np.ma.asarray(image), tuple(BANDS), (10.0, 0, 0, 0, -10.0, 0), None)
        maps.append(embed_raster(model, source, window="image").values)
    return np.stack(maps)


def run(array: xr.DataArray, scheduler: str = "synchronous") -> np.ndarray:
    return array.compute(scheduler=scheduler).values


# --- values ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    unit=st.sampled_from([1, 2, 4]),
    chunk=st.integers(3, 8),
    halo=st.integers(0, 5),
    stored=st.integers(4, 17),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_an_identity_network_returns_the_input_exactly(
    height: int,
    width: int,
    unit: int,
    chunk: int,
    halo: int,
    stored: int,
    missing: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    array = pixels(1, height, width, seed).astype(np.float32)
    holes = rng.random((height, width)) < missing
    array = array.where(xr.DataArray(~holes, dims=("y", "x")), NODATA)
    out = embed_xarray(
        Identity(unit),
        array.chunk({"y": stored, "x": stored}),
        units="dn",
        stride=1,
        chunks=chunk * unit,
        halo=halo * unit,
    )
    got = run(out)
    np.testing.assert_array_equal(
        got[:, :, :height, :width], array.where(xr.DataArray(~holes, dims=("y", "x")))
    )
    assert np.isnan(got[:, :, height:]).all()
    assert np.isnan(got[:, :, :, width:]).all()


@pytest.mark.parametrize(("height", "width"), [(40, 56), (37, 54), (9, 56), (3, 2)])
def test_chunks_with_halo_equal_the_whole_image(height: int, width: int) -> None:
    array, model = pixels(2, height, width), Local()
    out = embed_xarray(model, array, units="dn", chunks=12, halo=4)
    np.testing.assert_allclose(run(out), whole(model, array), rtol=1e-5, atol=1e-2)


def test_without_halo_chunks_differ_so_the_test_above_can_fail() -> None:
    array, model = pixels(), Local()
    out = embed_xarray(model, array, units="dn", chunks=12, halo=0)
    assert np.abs(run(out) - whole(model, array)).max() > 1


@pytest.mark.parametrize(
    "options", [{}, {"stem_padding": "aligned"}, {"patch_size": 16}], ids=["54", "56", "patch 16"]
)
def test_mpmae_without_grn_equals_the_whole_image_away_from_window_edges(
    options: dict[str, Any],
) -> None:
    model = small_mpmae(0.0, **options)
    array = pixels(1, 250, 330)
    # Its receptive field of 110 px, or twice that, fits into the halo.
    halo = 8 * options.get("patch_size", 8)
    out = embed_xarray(model, array, units="dn", chunks=64, halo=halo)
    expected = whole(model, array)
    assert out.shape == expected.shape
    got = run(out)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_grn_makes_values_depend_on_the_chunks_as_documented() -> None:
    model = small_mpmae(0.5, stem_padding="aligned")
    array = pixels(1, 64, 64)
    small, large = (
        run(embed_xarray(model, array, units="dn", chunks=chunks, halo=8)) for chunks in (16, 32)
    )
    assert not np.allclose(small, large)


def test_values_do_not_depend_on_how_the_array_is_stored() -> None:
    array, model = pixels(), Local()
    plain = embed_xarray(model, array, units="dn", chunks=12, halo=4)
    for chunks in ({"y": 7, "x": 9}, {"time": 2, "band": 1, "y": -1, "x": 5}):
        other = embed_xarray(model, array.chunk(chunks), units="dn", chunks=12, halo=4)
        np.testing.assert_array_equal(run(other), run(plain))


def test_all_windows_are_as_large_as_the_model_asks() -> None:
    # As many as fit, moved inward at the edges.
    out = embed_xarray(Fixed(20), pixels(1, 37, 54), units="dn", chunks=12, halo=4)
    assert np.isfinite(run(out)).all()
    vit = geofm.create_model("ssl4eco_vit_tiny_patch16", bands=BANDS)
    out = embed_xarray(vit, pixels(1, 400, 230), units="dn")
    assert out.shape == (1, vit.num_features, 25, 15)
    assert "224 x 224 px for chunks of 192 px" in out.attrs["GEOFM_WINDOWS"]


@pytest.mark.parametrize(("height", "width", "chunks"), [(40, 56, (1, 2)), (40, 40, (1, 1))])
def test_a_window_of_a_whole_side_is_computed_once(
    height: int, width: int, chunks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    array, model = pixels(2, height, width), Local()
    sizes: list[torch.Size] = []
    plain = Local.forward_intermediates

    def counted(self: Any, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        if x.device.type != "meta":
            sizes.append(x.shape[-2:])
        return plain(self, x, **options)

    monkeypatch.setattr(Local, "forward_intermediates", counted)
    # Windows of 44 px: more than a side of 40, which has more than one core of 36.
    out = embed_xarray(model, array, units="dn", chunks=36, halo=4)
    found = run(out)
    assert out.data.numblocks[2:] == chunks
    assert sizes == 2 * chunks[1] * [(40, min(44, width))]
    np.testing.assert_allclose(found, whole(model, array), rtol=1e-5, atol=1e-2)


def test_a_model_that_takes_one_size_refuses_others_before_anything_is_read() -> None:
    model = Fixed(20)
    assert embed_xarray(model, pixels(), units="dn", chunks=12, halo=4).shape == (2, 3, 10, 14)
    with pytest.raises(geofm.ModelError, match=r"does not take windows of 28 x 28 px.*only 20"):
        embed_xarray(model, pixels(), units="dn", chunks=12, halo=8)


# --- labels ---------------------------------------------------------------------------------------


def test_coordinates_are_centres_of_cells() -> None:
    array = pixels()
    out = embed_xarray(Local(), array, units="dn", chunks=12)
    assert out.dims == ("time", "component", "y", "x")
    np.testing.assert_array_equal(out.time, array.time)
    np.testing.assert_allclose(out.x, array.x.values.reshape(-1, 4).mean(axis=1))
    np.testing.assert_allclose(out.y, array.y.values.reshape(-1, 4).mean(axis=1))


@pytest.mark.parametrize("stem_padding", ["classification", "aligned"])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_coordinates_of_other_paddings_are_those_of_embed_raster(
    stem_padding: str, patch_size: int
) -> None:
    model = small_mpmae(0.0, stem_padding=stem_padding, patch_size=patch_size)
    array = pixels(1, 150, 170)
    image = array.values[0]
    place = (10.0, 0.0, 4e5, 0.0, -10.0, 5e6)
    grid = embed_raster(model, RasterImage(np.ma.asarray(image), tuple(BANDS), place, None))
    out = embed_xarray(model, array, units="dn", chunks=32, halo=32)
    assert out.shape[1:] == grid.shape
    a, _, c, _, e, f = grid.transform
    np.testing.assert_allclose(out.x, c + a * (np.arange(grid.shape[2]) + 0.5))
    np.testing.assert_allclose(out.y, f + e * (np.arange(grid.shape[1]) + 0.5))


def test_dimensions_come_in_any_order_and_time_may_be_absent() -> None:
    array, model = pixels(), Local()
    out = embed_xarray(model, array, units="dn", chunks=12)
    mixed = embed_xarray(model, array.transpose("x", "band", "time", "y"), units="dn", chunks=12)
    xr.testing.assert_identical(mixed.compute(), out.compute())
    single = embed_xarray(model, array.isel(time=1), units="dn", chunks=12)
    assert single.dims == ("component", "y", "x")
    assert single.time == array.time[1]
    np.testing.assert_array_equal(run(single), run(out)[1])


def test_bands_are_found_by_name_and_others_are_not_read() -> None:
    array, model = pixels(), Local()
    expected = run(embed_xarray(model, array, units="dn", chunks=12))
    mixed = xr.concat(
        [array.isel(band=[1]), array.isel(band=[0]) * 0 + 7, array.isel(band=[0])], "band"
    ).assign_coords(band=["B03", "B12", "B02"])
    np.testing.assert_array_equal(run(embed_xarray(model, mixed, units="dn", chunks=12)), expected)
    unnamed = mixed.drop_vars("band")
    named = embed_xarray(model, unnamed, units="dn", chunks=12, bands=["B3", "B12", "B2"])
    np.testing.assert_array_equal(run(named), expected)


def test_rioxarray_finds_crs_and_transform_of_the_cells() -> None:
    array = pixels().rio.write_crs("EPSG:32631").rio.write_transform()
    assert "GeoTransform" in array.spatial_ref.attrs
    out = embed_xarray(Local(), array, units="dn", chunks=12)
    assert out.rio.crs == array.rio.crs
    assert tuple(out.rio.transform(recalc=False))[:6] == (40.0, 0.0, 4e5, 0.0, -40.0, 5e6)
    assert out.rio.bounds() == array.rio.bounds()
    bare = embed_xarray(Local(), array.drop_vars(["x", "y"]), units="dn", chunks=12)
    assert bare.spatial_ref.attrs["GeoTransform"] == out.spatial_ref.attrs["GeoTransform"]


def test_attributes_say_what_made_it_and_drop_what_described_pixels() -> None:
    array = pixels().assign_attrs(crs="EPSG:32631", long_name="reflectance", scale_factor=1.0)
    out = embed_xarray(Local(), array, units="dn", offset=-1000, chunks=12, halo=4)
    assert out.attrs["crs"] == "EPSG:32631"
    assert not {"long_name", "scale_factor"} & set(out.attrs)
    assert out.attrs["GEOFM_WEIGHTS"].startswith("untrained")
    assert len(out.attrs["GEOFM_WEIGHTS_HASH"]) == 64
    assert "offset=-1000" in out.attrs["GEOFM_PREPARE"]
    assert "20 x 20 px" in out.attrs["GEOFM_WINDOWS"]


def test_cells_need_their_share_of_pixels_with_data() -> None:
    array = pixels(1, 8, 8)
    array[0, :, :4, :2] = NODATA
    array[0, :, :4, 4:7] = NODATA
    out = run(embed_xarray(Local(), array, units="dn", chunks=4))
    assert np.isnan(out[0, 0]).tolist() == [[False, True], [False, False]]
    out = run(embed_xarray(Local(), array, units="dn", chunks=4, min_valid=0.0))
    assert not np.isnan(out).any()
    other = array.where(array != NODATA, 77).assign_attrs(_FillValue=77)
    out = run(embed_xarray(Local(), other, units="dn", chunks=4))
    assert np.isnan(out[0, 0]).tolist() == [[False, True], [False, False]]


# --- the graph ------------------------------------------------------------------------------------


def test_nothing_is_read_or_computed_before_it_is_asked_for() -> None:
    def refuse(block: np.ndarray) -> np.ndarray:
        raise AssertionError("read")

    lazy = (
        pixels()
        .chunk({"y": 8, "x": 8})
        .copy(
            data=da.map_blocks(
                refuse,
                pixels().chunk({"y": 8, "x": 8}).data,
                dtype=np.uint16,
                meta=np.empty((0,) * 4, np.uint16),
            )
        )
    )
    out = embed_xarray(Local(), lazy, units="dn", chunks=8)
    assert out.dtype == np.float32
    with pytest.raises(AssertionError, match="read"):
        run(out)


def test_names_depend_on_inputs_alone() -> None:
    def name(**options: Any) -> str:
        model = options.pop("model", None) or Local()
        array = options.pop("array", None)
        array = pixels() if array is None else array
        return embed_xarray(model, array, units="dn", **({"chunks": 12} | options)).data.name

    assert name() == name()
    changed = Local()
    with torch.no_grad():
        changed.conv.bias += 1
    others = [
        name(model=changed),
        name(array=pixels(seed=1)),
        name(chunks=8),
        name(halo=8),
        name(offset=-1000),
        name(min_valid=0.1),
        name(dtype="float16"),
        name(device="cpu"),
    ]
    assert len({name(), *others}) == 9


def test_no_task_depends_on_more_than_its_neighbours_and_the_model_is_there_once() -> None:
    array = pixels(3, 96, 160).chunk({"time": 1, "y": 8, "x": 8})
    out = embed_xarray(Local(), array, units="dn", chunks=8, halo=4)
    graph = out.data.__dask_graph__()
    dependencies = graph.get_all_dependencies()
    blocks = {key for key in graph if key[0] == array.data.name}
    assert len(blocks) == 3 * 12 * 20
    model = [key for key in graph if isinstance(key, str) and "model" in key]
    assert len(model) == 1
    for key, needs in dependencies.items():
        if key[0] == out.data.name:
            assert model[0] in needs
            # Nine parts at most: a corner chunk's window, moved inward, reaches two blocks.
            assert len(needs) <= 1 + 9
            reached = set().union(*(dependencies[k] for k in needs if k not in blocks), needs)
            assert len(reached & blocks) <= 9
        else:
            assert len(needs) <= 1


class Block(np.ndarray):
    """An array that can be weakly referenced."""


def test_few_blocks_are_in_memory_at_a_time() -> None:
    live: set[int] = set()
    peak = 0

    def load(block_info: Any = None) -> np.ndarray:
        nonlocal peak
        block = np.full((1, 2, 8, 8), 1000, np.uint16).view(Block)
        live.add(id(block))
        peak = max(peak, len(live))
        weakref.finalize(block, live.discard, id(block))
        return block

    chunks = ((1,) * 2, (2,), (8,) * 20, (8,) * 12)
    source = da.map_blocks(load, chunks=chunks, dtype=np.uint16, meta=np.empty((0,) * 4, np.uint16))
    array = xr.DataArray(source, dims=("time", "band", "y", "x"), coords={"band": BANDS})
    out = embed_xarray(Local(), array, units="dn", chunks=8, halo=4)
    gc.collect()
    run(out)
    # A row of chunks and its neighbours, of 480.
    assert 1 < peak < 60, peak


def test_what_happens_to_the_model_later_changes_nothing() -> None:
    model = Local()
    expected = run(embed_xarray(model, pixels(), units="dn", chunks=12))
    out = embed_xarray(model, pixels(), units="dn", chunks=12)
    with torch.no_grad():
        model.conv.weight.zero_()
    np.testing.assert_array_equal(run(out), expected)


def test_a_model_in_training_mode_is_used_in_evaluation_mode_and_left_as_it_was() -> None:
    model = geofm.create_model(
        "mpmae_atto", bands=BANDS, drop_path_rate=0.9, stem_padding="aligned"
    )
    model.train()
    array = pixels(1, 32, 32)
    first, second = (run(embed_xarray(model, array, units="dn", level="L2A")) for _ in "ab")
    assert model.training
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(
        first, run(embed_xarray(model.eval(), array, units="dn", level="L2A"))
    )


def test_zarr_written_chunk_by_chunk_reads_back(tmp_path: Path) -> None:
    array = pixels(2, 42, 58).rio.write_crs("EPSG:32631")
    array.to_dataset(name="s2").chunk({"time": 1, "y": 10, "x": 10}).to_zarr(tmp_path / "in.zarr")
    stored = xr.open_zarr(tmp_path / "in.zarr", decode_coords="all")["s2"]
    out = embed_xarray(Local(), stored, units="dn", chunks=12)
    with dask.config.set(scheduler="synchronous"):
        out.to_zarr(tmp_path / "out.zarr")
    back = xr.open_zarr(tmp_path / "out.zarr", decode_coords="all")["embedding"]
    assert back.data.chunksize == (1, 3, 3, 3)
    np.testing.assert_array_equal(back.values, run(out))
    xr.testing.assert_equal(back.time, array.time)
    assert back.attrs["GEOFM_WEIGHTS_HASH"] == out.attrs["GEOFM_WEIGHTS_HASH"]
    assert back.rio.crs == array.rio.crs


# --- where it runs --------------------------------------------------------------------------------


def test_threads_give_the_same_values_and_leave_torchs_threads_alone() -> None:
    before = torch.get_num_threads()
    out = embed_xarray(Local(), pixels(), units="dn", chunks=12)
    np.testing.assert_array_equal(run(out, "threads"), run(out))
    assert torch.get_num_threads() == before


def test_a_pickled_graph_holds_the_model_once() -> None:
    model = Local()
    model.ballast = torch.nn.Parameter(torch.randn(300_000))
    array = pixels(1, 64, 64).chunk({"y": 8, "x": 8})
    out = embed_xarray(model, array, units="dn", chunks=8)
    size = len(cloudpickle.dumps(out.data.__dask_graph__()))
    assert 1_200_000 < size < 1_700_000
    np.testing.assert_array_equal(run(pickle.loads(cloudpickle.dumps(out))), run(out))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[distributed.Client]:
    """A cluster of two workers, restarted by their nannies should they die."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def networks() -> int:
    """How many models a worker keeps ready."""
    from geofm.arrays import encoder

    return len(encoder._ready)


@pytest.mark.slow
def test_one_and_two_workers_give_identical_values_with_one_model_each(
    client: distributed.Client, tmp_path: Path
) -> None:
    model = small_mpmae(0.5, stem_padding="aligned")
    array = pixels(2, 100, 130).chunk({"y": 64, "x": 64})
    out = embed_xarray(model, array, units="dn", chunks=32)
    expected = run(out)
    first = next(iter(client.scheduler_info()["workers"]))
    alone = client.compute(out, workers=[first]).result()
    assert sorted(client.run(networks).values()) == [0, 1]
    np.testing.assert_array_equal(alone, expected)
    out.to_zarr(tmp_path / "out.zarr")
    assert sorted(client.run(networks).values()) == [1, 1]
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "out.zarr")["embedding"], expected)


@pytest.mark.slow
def test_a_worker_killed_during_the_run_costs_nothing_but_time(
    client: distributed.Client,
) -> None:
    expected = run(embed_xarray(Local(), pixels(), units="dn", chunks=8))
    out = embed_xarray(Local(pause=0.1), pixels(), units="dn", chunks=8)
    result = out.data.persist()
    pids = client.run(os.getpid)
    victim = next(iter(pids))
    while not any(out.data.name in str(key) for key in client.has_what()[victim]):
        time.sleep(0.02)
    assert not all(future.done() for future in distributed.futures_of(result))
    os.kill(pids[victim], signal.SIGKILL)
    np.testing.assert_array_equal(result.compute(), expected)
    assert pids[victim] not in client.run(os.getpid).values()


@pytest.mark.slow
def test_processes_give_the_same_values() -> None:
    out = embed_xarray(Local(), pixels(1, 24, 24), units="dn", chunks=12)
    found = out.compute(scheduler="processes", num_workers=1)
    np.testing.assert_array_equal(found, run(out))


# --- real data ------------------------------------------------------------------------------------


def worldcereal() -> xr.DataArray:
    """Sentinel-2 of WorldCereal's example, 12 months, as xarray would open it."""
    path = data("worldcereal", "worldcereal_preprocessed_inputs.nc")
    with h5py.File(path) as file:
        names = [name for name in file if name.startswith("S2-L2A-B")]
        # Unsigned numbers in a signed type, as its attributes say.
        values = np.stack([file[name][:].view(np.uint16) for name in names], axis=1)
        days = file["t"][:].astype("timedelta64[D]") + np.datetime64("1990-01-01", "ns")
        return xr.DataArray(
            values,
            dims=("t", "band", "y", "x"),
            coords={
                "t": days,
                "band": [name.removeprefix("S2-L2A-") for name in names],
                "y": file["y"][:],
                "x": file["x"][:],
            },
            attrs={"crs": file["crs"].attrs["crs_wkt"].decode()},
        )


def test_netcdf_opens_with_what_the_extra_brings() -> None:
    path = data("worldcereal", "worldcereal_preprocessed_inputs.nc")
    with xr.open_dataset(path, engine="h5netcdf", mask_and_scale=False) as opened:
        names = [name for name in opened if str(name).startswith("S2-L2A-B")]
        array = opened[names].to_dataarray("band").load()
    expected = worldcereal()
    assert array.sizes == {"band": len(names), "t": 12, "y": 100, "x": 100}
    np.testing.assert_array_equal(
        array.transpose("t", "band", "y", "x").values.astype(np.uint16), expected.values
    )
    np.testing.assert_array_equal(array.t.values, expected.t.values)


def test_missing_months_of_a_real_time_series_are_nan() -> None:
    array = worldcereal()
    missing = (array == 65535).all(("band", "y", "x")).values
    assert missing.sum() == 2
    bands = array.band.values.tolist()
    model = geofm.create_model("mpmae_atto", bands=bands, stem_padding="aligned")
    out = embed_xarray(
        model, array.rename(t="time"), units="dn", level="L2A", nodata=[0, 65535], chunks=104
    )
    got = run(out)
    assert got.shape == (12, 320, 13, 13)
    assert np.isnan(got[missing]).all()
    assert np.isfinite(got[~missing]).all()
    assert float(out.x[0]) == array.x.values[:8].mean()
    # The last cell reaches 4 px beyond the array.
    assert float(out.x[-1]) == array.x.values[-1] + 5.0
    assert out.attrs["crs"].startswith("PROJCS")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        (lambda a: a.drop_vars("band"), {}, geofm.BandError, "no coordinate 'band'"),
        (lambda a: a.assign_coords(band=[1, 2]), {}, geofm.BandError, r"holds \[1, 2\]"),
        (lambda a: a, {"bands": ["B2"]}, geofm.BandError, "2 bands, but 1 are named"),
        (lambda a: a.assign_coords(band=["B2", "nonsense"]), {}, geofm.BandError, "B3"),
        (lambda a: a.rename(time="t"), {}, geofm.PixelError, r"rename\(\{'t': 'time'\}\)"),
        (lambda a: a.isel(band=0), {}, geofm.PixelError, "dimensions must be"),
        (lambda a: a.isel(x=slice(0)), {}, geofm.PixelError, "empty along x"),
        (lambda a: a.astype(complex), {}, geofm.PixelError, "complex128"),
        (lambda a: a.values, {}, geofm.PixelError, "got ndarray"),
        (lambda a: a.to_dataset("band"), {}, geofm.PixelError, "to_dataarray"),
        (lambda a: a, {"chunks": 10}, geofm.RasterError, "multiple of the model's cells of 4"),
        (lambda a: a, {"chunks": 0}, geofm.RasterError, "take 4"),
        (lambda a: a, {"halo": 3}, geofm.RasterError, "halo"),
        (lambda a: a, {"halo": -4}, geofm.RasterError, "halo"),
        (lambda a: a, {"dtype": "int8"}, geofm.RasterError, "float16"),
        (lambda a: a, {"min_valid": 2}, geofm.RasterError, "min_valid"),
        (lambda a: a, {"size": 8}, geofm.RasterError, "fit= and size="),
        (lambda a: a, {"stride": 3}, geofm.ModelError, "3 px per cell"),
        (
            lambda a: a.assign_coords(x=(a.x - 4e5) ** 2),
            {},
            geofm.RasterError,
            "x is not evenly spaced",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    change: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        embed_xarray(Local(), change(pixels()), units="dn", **({"chunks": 12} | options))


class Factor(Identity):
    """The input times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__(1)
        self.factor = factor

    def forward_intermediates(self, x: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        return [x * self.factor]


@pytest.mark.parametrize(
    ("factor", "dtype", "says"),
    [
        (100.0, "float16", "not finite; float16 ends at 65504, use dtype='float32'"),
        (float("nan"), "float32", "output has values that are not finite$"),
        (float("inf"), "float32", "output has values that are not finite$"),
    ],
)
def test_values_that_cannot_be_kept_are_refused_when_computed(
    factor: float, dtype: str, says: str
) -> None:
    array = pixels(1, 8, 8)
    out = embed_xarray(Factor(factor), array, units="dn", chunks=4, halo=0, dtype=dtype)
    with pytest.raises(geofm.RasterError, match=says):
        run(out)
    # Where there is no data anything may stand.
    empty = embed_xarray(Factor(factor), array * 0 + NODATA, units="dn", chunks=4, dtype=dtype)
    assert np.isnan(run(empty)).all()


def test_float16_keeps_what_fits() -> None:
    array = pixels(1, 8, 8)
    out = run(embed_xarray(Factor(10.0), array, units="dn", chunks=4, dtype="float16"))
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, (array.values * 10.0).astype(np.float16))


def test_pixels_in_other_units_are_refused_when_computed() -> None:
    out = embed_xarray(Local(), pixels() / 10000, units="dn", chunks=12)
    with pytest.raises(geofm.PixelError, match="say units='reflectance'"):
        run(out)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(geofm.MissingExtraError, match=r"geofm\[dask\]"):
        embed_xarray(Local(), pixels(), units="dn")


def test_models_without_a_map_and_absent_devices_are_refused() -> None:
    unet = geofm.create_model("mpmae_unet_atto", bands=BANDS, num_classes=2)
    with pytest.raises(geofm.ModelError, match="no embedding map"):
        embed_xarray(unet, pixels(), units="dn", level="L2A")
    if not torch.cuda.is_available():
        with pytest.raises(geofm.RasterError, match="cannot run on cuda"):
            run(embed_xarray(Local(), pixels(), units="dn", chunks=12, device="cuda"))


def test_an_unpadded_stem_needs_a_halo() -> None:
    model = small_mpmae(0.0)
    with pytest.raises(geofm.RasterError, match="at least 8"):
        embed_xarray(model, pixels(1, 150, 150), units="dn", chunks=32, halo=0)


def test_bringing_an_array_to_other_chunks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="geofm"):
        embed_xarray(Local(), pixels().chunk({"y": 12, "x": 12}), units="dn", chunks=12)
        assert not caplog.records
        embed_xarray(Local(), pixels().chunk({"y": 8, "x": 12}), units="dn", chunks=12)
    assert "12 x 12 px" in caplog.text


def test_a_model_goes_through_pickle() -> None:
    model = geofm.create_model("mpmae_atto", bands=BANDS, stem_padding="aligned")
    again = copy.deepcopy(model)
    array = pixels(1, 32, 32)
    out = [embed_xarray(m, array, units="dn", level="L2A") for m in (model, again)]
    assert out[0].data.name == out[1].data.name
