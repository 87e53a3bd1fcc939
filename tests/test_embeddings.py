"""Embeddings as data: tables, arrays, places alike, classes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import resource
import signal
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.warp import transform as warp
from sklearn.cluster import KMeans as Reference
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity

import geofm
from geofm.datasets import samples
from geofm.embeddings import export_embeddings, fit_kmeans, read_embeddings, segment, similar
from geofm.embeddings.grids import Embeddings, Grid, WindowedEmbeddings
from geofm.raster import Embedding, embed_raster, write_embedding

pa = pytest.importorskip("pyarrow")
gpd = pytest.importorskip("geopandas")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

CHANNELS, ROWS, COLUMNS = 6, 23, 31
HOLE = (4, 7)
TAGS = {
    "GEOFM_WEIGHTS": "mpmae_atto.mmearth64",
    "GEOFM_WEIGHTS_HASH": "ab" * 32,
    "GEOFM_CARD_SHA256": "cd" * 32,
    "GEOFM_PREPARE": "Preprocess(units=dn)",
    "GEOFM_SOURCE": "scene.tif",
    "GEOFM_DATE": "2020-06-04",
}


def values_of(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(CHANNELS, ROWS, COLUMNS)).astype(np.float32)
    values[:, HOLE[0], HOLE[1]] = np.nan
    return values


def grid_of(values: np.ndarray | None, **changes: Any) -> Embedding:
    place = (80.0, 0.0, 4e5, 0.0, -80.0, 5.4e6)
    options = {"transform": place, "crs": "EPSG:32632", "tags": TAGS} | changes
    return Embedding(values, stride=8, offset=0.0, **options)


@pytest.fixture
def raster(tmp_path: Path) -> Path:
    write_embedding(tmp_path / "embedding.tif", grid_of(values_of()))
    return tmp_path / "embedding.tif"


def centre(row: float, column: float) -> tuple[float, float]:
    lon, lat = warp(
        "EPSG:32632", "EPSG:4326", [4e5 + 80 * (column + 0.5)], [5.4e6 - 80 * (row + 0.5)]
    )
    return lon[0], lat[0]


def gathered(embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(embeddings.blocks())
    ids = np.concatenate([b.ids for b in blocks])
    order = np.argsort(ids)
    return ids[order], np.concatenate([b.vectors for b in blocks])[order]


# --- tables and arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["point", "polygon"])
def test_a_table_has_each_cell_with_data_where_it_lies(
    raster: Path, tmp_path: Path, geometry: str
) -> None:
    table = gpd.read_parquet(export_embeddings(raster, tmp_path / "t.parquet", geometry=geometry))
    values = values_of()
    assert len(table) == ROWS * COLUMNS - 1
    assert not ((table.row == HOLE[0]) & (table.column == HOLE[1])).any()
    assert table.crs == "EPSG:32632"
    expected = values[:, table.row, table.column].T
    np.testing.assert_array_equal(np.stack(table.embedding), expected)
    np.testing.assert_allclose(table.geometry.centroid.x, 4e5 + 80 * (table.column + 0.5))
    np.testing.assert_allclose(table.geometry.centroid.y, 5.4e6 - 80 * (table.row + 0.5))
    if geometry == "polygon":
        assert np.allclose(table.geometry.area, 6400)
        assert table.geometry.exterior.is_ccw.all()
    first = table.iloc[0]
    assert first.date == datetime.date(2020, 6, 4)
    assert (first.weights, first.weights_hash) == ("mpmae_atto.mmearth64", "ab" * 32)
    assert first.card_hash == "cd" * 32
    assert (first.scene, len(first.preprocessing)) == ("scene.tif", 16)


def test_the_tables_metadata_is_what_geoparquet_asks_for(raster: Path, tmp_path: Path) -> None:
    file = pq.ParquetFile(export_embeddings(raster, tmp_path / "t.parquet"))
    geo = json.loads(file.metadata.metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    assert geo["version"] == "1.1.0"
    assert (column["encoding"], column["geometry_types"]) == ("WKB", ["Point"])
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 32632}
    assert column["bbox"] == [4e5, 5.4e6 - 80 * ROWS, 4e5 + 80 * COLUMNS, 5.4e6]
    assert (
        str(file.schema_arrow.field("embedding").type)
        == f"fixed_size_list<element: float>[{CHANNELS}]"
    )


def test_what_a_raster_does_not_say_is_null_in_the_table(tmp_path: Path) -> None:
    bare = grid_of(values_of(), crs=None, tags={})
    table = export_embeddings(bare, tmp_path / "t.parquet")
    assert json.loads(pq.read_schema(table).metadata[b"geo"])["columns"]["geometry"]["crs"] is None
    found = gpd.read_parquet(table)
    told = ["date", "scene", "weights", "weights_hash", "card_hash", "preprocessing"]
    assert found[told].isna().all(axis=None)
    dated = export_embeddings(bare, tmp_path / "d.parquet", date="2021-01-02")
    assert gpd.read_parquet(dated).date[0] == datetime.date(2021, 1, 2)


@pytest.mark.parametrize("name", ["t.parquet", "t.zarr"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_exported_is_read_back(raster: Path, tmp_path: Path, name: str, dtype: str) -> None:
    back = read_embeddings(export_embeddings(raster, tmp_path / name, dtype=dtype))
    source = read_embeddings(raster)
    assert back.grid == source.grid
    ids, vectors = gathered(back)
    expected_ids, expected = gathered(source)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(vectors, expected.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(back.vector(3, 5), expected[3 * COLUMNS + 5].astype(dtype))
    assert np.isnan(back.vector(*HOLE)).all()


def test_xarray_opens_the_arrays_with_coordinates_and_reference_system(
    raster: Path, tmp_path: Path
) -> None:
    pytest.importorskip("rioxarray")
    path = export_embeddings(raster, tmp_path / "t.zarr")
    found = xr.open_dataset(path, engine="zarr", consolidated=False, decode_coords="all")
    np.testing.assert_array_equal(found.embedding, values_of())
    assert found.embedding.dims == ("band", "y", "x")
    assert (float(found.x[0]), float(found.y[0])) == (400040.0, 5399960.0)
    assert found.rio.crs.to_epsg() == 32632
    assert tuple(found.rio.transform())[:6] == (80.0, 0.0, 4e5, 0.0, -80.0, 5.4e6)
    assert found.attrs["GEOFM_WEIGHTS"] == "mpmae_atto.mmearth64"
    assert found.attrs["GEOFM_CARD_SHA256"] == "cd" * 32


def test_the_output_of_embed_raster_is_scaled_back_from_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = geofm.create_model("mpmae_atto", stem_padding="aligned")
    samples.write_scene(tmp_path / "scene.tif", samples.landscape((112, 112), seed=1))
    whole = embed_raster(model, tmp_path / "scene.tif", tmp_path / "e.tif", level="L2A")
    embed_raster(model, tmp_path / "scene.tif", tmp_path / "q.tif", level="L2A", dtype="int8")
    with rasterio.open(tmp_path / "q.tif") as file:
        step = np.array([float(v) for v in file.tags()["GEOFM_SCALE"].split(",")])
    path = export_embeddings(tmp_path / "q.tif", tmp_path / "q.parquet")
    # What is scaled back no longer says how to scale it.
    segment(path, tmp_path / "c.tif", classes=2)
    with rasterio.open(tmp_path / "c.tif") as file:
        tags = [read_embeddings(tmp_path / "q.tif").grid.tags, file.tags()]
    memory = embed_raster(model, tmp_path / "scene.tif", level="L2A", dtype="int8")
    for told in (*tags, read_embeddings(path).grid.tags, read_embeddings(memory).grid.tags):
        assert "GEOFM_WEIGHTS" in told
        assert not {"GEOFM_SCALE", "GEOFM_ZERO"} & set(told)
    _, vectors = gathered(read_embeddings(path))
    expected = whole.values.reshape(whole.shape[0], -1).T
    assert len(vectors) == len(expected)
    assert (np.abs(vectors - expected) <= 0.51 * step).mean() > 0.999
    assert set(gpd.read_parquet(path).weights) == {"untrained (random initialisation)"}


def test_blocks_cover_every_cell_once_whatever_the_tiles() -> None:
    values = np.random.default_rng(0).normal(size=(5, 300, 401)).astype(np.float32)
    for tile in [(1, 401), (64, 64), (512, 512), (300, 1)]:
        embeddings = WindowedEmbeddings(
            Grid(values.shape, (1, 0, 0, 0, -1, 0), None), "x", reader(values), tile
        )
        ids, vectors = gathered(embeddings)
        np.testing.assert_array_equal(ids, np.arange(300 * 401))
        np.testing.assert_array_equal(vectors, values.reshape(5, -1).T)


def reader(values: np.ndarray) -> Callable[[], Any]:
    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        yield lambda top, left, h, w: np.array(values[:, top : top + h, left : left + w])

    return opened


@pytest.mark.parametrize("job", ["table", "similar", "segment"])
def test_memory_stays_bounded_whatever_the_number_of_cells(tmp_path: Path, job: str) -> None:
    # 307 MB of vectors (154 for the table), none of which exists before it is asked for.
    shape = (64, 600 if job == "table" else 1200, 1000)

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        ramp = np.linspace(1, 2, shape[0], dtype=np.float32)[:, None, None]

        def read(top: int, left: int, high: int, wide: int) -> np.ndarray:
            bend = np.arange(left, left + wide, dtype=np.float32) / 1000
            return np.broadcast_to(ramp**bend, (shape[0], high, wide)).copy()

        yield read

    grid = Grid(shape, (10, 0, 4e5, 0, -10, 5.4e6), "EPSG:32632", TAGS)
    embeddings = WindowedEmbeddings(grid, "ramp", opened, (100, 1000))
    tracemalloc.start()
    try:
        if job == "table":
            export_embeddings(embeddings, tmp_path / "t.parquet", dtype="float16")
        elif job == "similar":
            similar(embeddings, vector=np.ones(64))
        else:
            segment(embeddings, classes=3, starts=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A sample of 17 MB and two copies of a block, or three of them.
    assert peak < 140e6
    if job == "table":
        # Arrow has memory of its own, which tracemalloc does not see.
        assert pa.default_memory_pool().max_memory() < 140e6


def test_a_map_of_classes_takes_one_byte_a_cell() -> None:
    shape = (2, 3000, 4000)

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        def read(top: int, left: int, high: int, wide: int) -> np.ndarray:
            angle = np.arange(top, top + high, dtype=np.float32)[:, None] / 3000
            angle = np.broadcast_to(angle, (high, wide))
            return np.stack([np.cos(angle), np.sin(angle)])

        yield read

    grid = Grid(shape, (10, 0, 4e5, 0, -10, 5.4e6), "EPSG:32632")
    embeddings = WindowedEmbeddings(grid, "arc", opened, (50, 4000))
    embeddings.window = (50, 4000)
    tracemalloc.start()
    try:
        found = segment(embeddings, classes=2, starts=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.sizes == tuple(int((found.classes == i).sum()) for i in (1, 2))
    assert sum(found.sizes) == 12e6
    # 12 MB of classes and some blocks, not eight times that.
    assert peak < 60e6


def written_with_mask(path: Path, values: np.ndarray, **options: Any) -> Path:
    """A raster whose cell 0, 1 is no data by its mask alone, and whose values are scaled."""
    bands, rows, columns = values.shape
    profile = {"driver": "GTiff", "count": bands, "height": rows, "width": columns}
    place = rasterio.Affine(10, 0, 4e5, 0, -10, 5.4e6)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", **profile, dtype=values.dtype, transform=place, crs="EPSG:32632"
        ) as file,
    ):
        file.write(values)
        mask = np.full((rows, columns), 255, np.uint8)
        mask[0, 1] = 0
        file.write_mask(mask)
        file.scales, file.offsets = [0.5] * bands, [3.0] * bands
    return path


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_masks_and_scales_of_a_raster_are_applied(tmp_path: Path, dtype: str) -> None:
    values = np.arange(1, 25).reshape(2, 3, 4).astype(dtype)
    read = read_embeddings(written_with_mask(tmp_path / "m.tif", values))
    ids, vectors = gathered(read)
    assert ids.tolist() == [0, *range(2, 12)]
    np.testing.assert_array_equal(vectors, (values.reshape(2, -1).T * 0.5 + 3)[ids])
    assert np.isnan(read.vector(0, 1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cells_that_are_not_finite_are_no_data_in_tables_and_arrays(
    tmp_path: Path, dtype: str
) -> None:
    values = values_of()
    values[1, 3, 5], values[2, 3, 6] = np.inf, -np.inf
    for name in ("t.parquet", "t.zarr"):
        path = export_embeddings(grid_of(values), tmp_path / name, dtype=dtype)
        ids, _ = gathered(read_embeddings(path))
        hole = HOLE[0] * COLUMNS + HOLE[1]
        gone = {3 * COLUMNS + 5, 3 * COLUMNS + 6, hole}
        assert set(range(ROWS * COLUMNS)) - set(ids.tolist()) == gone
    found = xr.open_dataset(tmp_path / "t.zarr", engine="zarr", consolidated=False)
    assert np.isnan(found.embedding[:, 3, 5:7]).all()


@pytest.mark.parametrize(
    ("crs", "left", "sign"), [("EPSG:32660", 660e3, 1), ("EPSG:32601", 320e3, -1)]
)
def test_a_grid_across_the_antimeridian_is_as_wide_as_it_is(
    crs: str, left: float, sign: int
) -> None:
    grid = Grid((1, 10, 20), (1000, 0, left, 0, -1000, 6.6e6), crs)
    west, _, east, _ = grid.extent()
    assert west < 180 * sign < east
    # 20 km at 59.5 degrees north.
    assert east - west == pytest.approx(20 / 56.5, rel=0.05)


def test_a_grid_of_the_whole_globe_keeps_both_its_edges() -> None:
    for west in (-180, 0):
        globe = Grid((1, 180, 360), (1, 0, west, 0, -1, 90), "EPSG:4326")
        assert globe.extent() == (west, -90, west + 360, 90)
    half = 20037508.342789244
    web = Grid((1, 200, 200), (half / 100, 0, -half, 0, -half / 100, half), "EPSG:3857")
    assert web.extent()[::2] == pytest.approx((-180, 180))


def test_a_reference_system_that_is_nowhere_on_the_globe_is_told_so() -> None:
    grid = Grid((1, 10, 20), (1, 0, 0, 0, -1, 0), 'LOCAL_CS["site",UNIT["metre",1]]')
    with pytest.raises(geofm.RasterError, match="do not lead to each other"):
        grid.extent()


def test_what_is_no_embedding_is_refused(tmp_path: Path, raster: Path) -> None:
    with pytest.raises(geofm.DataNotFoundError, match="there is no"):
        read_embeddings(tmp_path / "none.tif")
    frame = gpd.GeoDataFrame({"a": [1]}, geometry=gpd.points_from_xy([0], [0]))
    frame.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(geofm.RasterError, match="not written by export_embeddings"):
        read_embeddings(tmp_path / "other.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(geofm.RasterError, match="cannot be read"):
        read_embeddings(tmp_path / "bad.parquet")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(geofm.RasterError, match="holds no embeddings"):
        read_embeddings(tmp_path / "empty.zarr")
    segment(raster, tmp_path / "classes.tif", classes=2)
    with pytest.raises(geofm.RasterError, match="one band"):
        read_embeddings(tmp_path / "classes.tif")


def test_damaged_tables_and_arrays_are_told_so(raster: Path, tmp_path: Path) -> None:
    table = export_embeddings(raster, tmp_path / "t.parquet")
    whole = bytearray(table.read_bytes())
    # The first pages, of the ids; what the file says of itself is at its end.
    whole[4:4000] = bytes(3996)
    table.write_bytes(whole)
    array = export_embeddings(raster, tmp_path / "t.zarr")
    (chunk,) = (p for p in (array / "embedding" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"no zstd" + chunk.read_bytes()[7:])
    for path, words in [
        (table, r"t\.parquet is damaged: .*Export it again"),
        (array, r"t\.zarr: the array embedding is damaged at row \d, column \d: .*Export it again"),
    ]:
        embeddings = read_embeddings(path)
        for work in (lambda e: e.vector(3, 5), lambda e: segment(e, classes=2)):
            with pytest.raises(geofm.RasterError, match=words):
                work(embeddings)


def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(
    raster: Path, tmp_path: Path
) -> None:
    for options, match in [
        ({"geometry": "line"}, "'point' or 'polygon'"),
        ({"dtype": "int8"}, "float32"),
        ({"date": "June"}, "2020-06-04"),
    ]:
        with pytest.raises(geofm.RasterError, match=match):
            export_embeddings(raster, tmp_path / "t.parquet", **options)
    with pytest.raises(geofm.RasterError, match=r"\.parquet or a \.zarr"):
        export_embeddings(raster, tmp_path / "t.csv")
    with pytest.raises(geofm.RasterError, match="no folder"):
        export_embeddings(raster, tmp_path / "nowhere" / "t.zarr")
    large = grid_of(values_of() * 1e6)
    for name in ("t.parquet", "t.zarr"):
        with pytest.raises(geofm.RasterError, match="beyond float16"):
            export_embeddings(large, tmp_path / name, dtype="float16")
    export_embeddings(raster, tmp_path / "there.zarr")
    with pytest.raises(geofm.RasterError, match="there already"):
        export_embeddings(raster, tmp_path / "there.zarr")
    assert {p.name for p in tmp_path.iterdir()} == {"embedding.tif", "there.zarr"}


def test_no_output_overwrites_what_it_is_made_from(raster: Path, tmp_path: Path) -> None:
    before = raster.read_bytes()
    (tmp_path / "link.tif").symlink_to(raster)
    for source, output in [
        (raster, raster),
        (str(raster), tmp_path / "link.tif"),
        (tmp_path / "link.tif", raster),
        (read_embeddings(raster), raster),
        (grid_of(None, path=raster, shape=(CHANNELS, ROWS, COLUMNS)), raster),
    ]:
        with pytest.raises(geofm.RasterError, match="would overwrite the input"):
            segment(source, output, classes=2)
        with pytest.raises(geofm.RasterError, match="would overwrite the input"):
            similar(source, vector=np.ones(CHANNELS), output=output)
    table = export_embeddings(raster, tmp_path / "t.parquet")
    with pytest.raises(geofm.RasterError, match="would overwrite the input"):
        export_embeddings(read_embeddings(table), table)
    assert raster.read_bytes() == before
    # Beside it there is room.
    segment(raster, tmp_path / "classes.tif", classes=2)


# --- places alike ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding.tif", "t.parquet", "t.zarr"])
def test_ranks_are_those_of_plain_cosine_similarity(
    raster: Path, tmp_path: Path, name: str
) -> None:
    if name != "embedding.tif":
        export_embeddings(raster, tmp_path / name)
    found = similar(tmp_path / name, centre(10.2, 12.4), 15, output=tmp_path / "map.tif")
    vectors = values_of().reshape(CHANNELS, -1).T
    query = 10 * COLUMNS + 12
    valid = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    cosines = np.full(len(vectors), -2.0)
    cosines[valid] = cosine_similarity(vectors[query : query + 1], vectors[valid])[0]
    expected = np.argsort(-cosines)[:15]
    assert [p.id for p in found.places] == expected.tolist()
    assert [p.rank for p in found.places] == list(range(1, 16))
    np.testing.assert_allclose([p.similarity for p in found.places], cosines[expected], atol=1e-6)
    best = found.places[0]
    assert (best.row, best.column) == found.cell == (10, 12)
    np.testing.assert_allclose((best.lon, best.lat), centre(10, 12), atol=1e-9)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.isnan(file.read(1)[HOLE])
        np.testing.assert_allclose(file.read(1).reshape(-1)[valid], cosines[valid], atol=1e-6)
        assert file.tags()["GEOFM_WEIGHTS"] == "mpmae_atto.mmearth64"


def test_the_best_do_not_depend_on_blocks_even_where_they_are_equal() -> None:
    values = np.ones((3, 40, 50), np.float32)
    for tile in [(7, 50), (40, 9), (40, 50)]:
        embeddings = WindowedEmbeddings(
            Grid(values.shape, (1, 0, 0, 0, -1, 0), None), "x", reader(values), tile
        )
        # Blocks that hold less than is asked for.
        embeddings.window = tile
        found = similar(embeddings, vector=[1, 1, 1], top_k=60)
        assert [p.id for p in found.places] == list(range(60))
        assert found.places[0].lon is None


@pytest.mark.parametrize("count", [1, 5, 900])
def test_the_place_itself_is_first_even_where_others_equal_it(count: int) -> None:
    # As of int8 over water; twice as long is the same direction.
    values = np.ones((3, ROWS, COLUMNS), np.float32)
    values[:, :4] = 2
    found = similar(grid_of(values), centre(10, 12), count)
    own = 10 * COLUMNS + 12
    others = [i for i in range(ROWS * COLUMNS) if i != own]
    assert [p.id for p in found.places] == [own, *others][:count]
    assert [p.rank for p in found.places] == list(range(1, len(found.places) + 1))


def test_places_outside_or_without_data_are_told_so(raster: Path, tmp_path: Path) -> None:
    with pytest.raises(geofm.RasterError, match=r"outside .* from 7\.\d+ to 7\.\d+ east"):
        similar(raster, (0.0, 0.0))
    with pytest.raises(geofm.RasterError, match=r"no data .*row 4, column 7"):
        similar(raster, centre(*HOLE))
    with pytest.raises(geofm.RasterError, match="degrees"):
        similar(raster, (5e5, 5.4e6))
    with pytest.raises(geofm.RasterError, match="one of them"):
        similar(raster)
    with pytest.raises(geofm.RasterError, match="6 values"):
        similar(raster, vector=[1.0])
    with pytest.raises(geofm.RasterError, match="no direction"):
        similar(raster, vector=np.zeros(CHANNELS))
    with pytest.raises(geofm.RasterError, match="no coordinate reference system"):
        similar(grid_of(values_of(), crs=None), (7.6, 48.7))


def test_a_cell_is_found_in_a_rotated_grid() -> None:
    turned = (60.0, 50.0, 4e5, 50.0, -60.0, 5.4e6)
    values = values_of()
    x, y = 4e5 + 60 * 12.5 + 50 * 9.5, 5.4e6 + 50 * 12.5 - 60 * 9.5
    lon, lat = warp("EPSG:32632", "EPSG:4326", [x], [y])
    found = similar(grid_of(values, transform=turned), (lon[0], lat[0]), 1)
    assert found.cell == (9, 12)
    np.testing.assert_array_equal(found.query, values[:, 9, 12])
    np.testing.assert_allclose((found.places[0].lon, found.places[0].lat), (lon[0], lat[0]))


# --- maps of one band -----------------------------------------------------------------------------

LARGE_MAP = """
import re
from pathlib import Path
import numpy as np
from geofm.embeddings import Grid, rasters, write_band

def peak():
    # Of this process alone; getrusage also counts that from which it was started.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

rasters.CACHE_BYTES = 16_000_000
grid = Grid((1, 8192, 16384), (10, 0, 0, 0, -10, 0), None)
write_band({small!r}, np.ones((600, 600), np.uint16), grid, nodata=0, name="a")
values = np.ones(grid.shape[1:], np.uint16)
before = peak()
write_band({large!r}, values, grid, nodata=0, name="a")
print(peak() - before)
"""


@pytest.mark.slow
def test_a_map_is_written_without_a_second_copy_in_memory(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.tif") for name in ("small", "large")}
    done = subprocess.run(
        [sys.executable, "-c", LARGE_MAP.format(**paths)],
        check=True,
        capture_output=True,
        text=True,
    )
    # In kilobytes; the values are 268 MB.
    assert int(done.stdout) < 100_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.tif", "small.tif"]
    with rasterio.open(paths["large"]) as file:
        assert (file.read(1, window=((8000, 8192), (16000, 16384))) == 1).all()
        assert len(file.overviews(1)) == 5


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("copy", True),
        ("copy", False),
        ("check_complete", True),
        ("check_complete", False),
        ("export", True),
    ],
)
def test_a_full_disk_is_told_so_whatever_gdal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, told: bool
) -> None:
    def full(*_: Any, **__: Any) -> None:
        # GDAL says neither why nor that a file is not complete.
        if told:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise rasterio.errors.RasterioIOError("Write failed. See previous exception for details.")

    # What fails has been written to a disk that has room again once its remains are gone.
    free = 2**30
    if not told:
        monkeypatch.setattr(
            "shutil.disk_usage",
            lambda folder: Namespace(free=1000 if list(Path(folder).glob(".geofm-*")) else free),
        )
    if step == "check_complete":
        for module in ("raster.cog", "embeddings.rasters"):
            monkeypatch.setattr(f"geofm.{module}.check_complete", full)
    elif step == "copy":
        monkeypatch.setattr("rasterio.shutil.copy", full)
    else:
        monkeypatch.setattr("zarr.Array.__setitem__", full)
        monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    jobs: dict[str, Callable[[Path], Any]] = {
        "e.tif": lambda path: write_embedding(path, grid_of(values_of())),
        "s.tif": lambda path: similar(grid_of(values_of()), vector=np.ones(6), output=path),
        "c.tif": lambda path: segment(grid_of(values_of()), path, classes=2),
    }
    if step == "export":
        jobs = {
            "t.parquet": lambda path: export_embeddings(grid_of(values_of()), path),
            "t.zarr": lambda path: export_embeddings(grid_of(values_of()), path),
        }
    for name, job in jobs.items():
        words = rf"cannot write .*{name}: the disk is full; make room.*\. Nothing of it is kept$"
        with pytest.raises(geofm.RasterError, match=words):
            job(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_on_the_disk_are_told_with_the_systems_reason(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # 4278 values of 4 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(geofm.RasterError, match=r"e\.tif: File too large\. Nothing"):
            write_embedding(tmp_path / "e.tif", grid_of(values_of()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_a_map_that_is_not_complete_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "classes.tif"
    path.write_text("before")

    def cut_off(*_: Any) -> None:
        raise OSError("it ends before its last tile")

    monkeypatch.setattr("geofm.embeddings.rasters.check_complete", cut_off)
    with pytest.raises(geofm.RasterError, match=r"cannot write .*last tile"):
        segment(grid_of(values_of()), path, classes=2)
    assert [p.name for p in tmp_path.iterdir()] == ["classes.tif"]
    assert path.read_text() == "before"


# --- classes --------------------------------------------------------------------------------------


def blobs(classes: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(classes, CHANNELS)) * 5
    labels = draws.integers(classes, size=1500)
    noise = draws.normal(size=(1500, CHANNELS)) * spread
    return (centres[labels] + noise).astype(np.float32), labels


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_kmeans_is_as_good_as_the_reference(spread: float) -> None:
    vectors, labels = blobs(6, spread)
    ours = fit_kmeans(vectors, 6, seed=1)
    reference = Reference(6, n_init=10, random_state=0).fit(vectors)
    assert ours.inertia <= reference.inertia_ * 1.01
    # The centres are fixed points: the reference, begun from them, moves nothing.
    again = Reference(6, init=ours.centres, n_init=1).fit(vectors)
    np.testing.assert_allclose(again.cluster_centers_, ours.centres, atol=0.02)
    np.testing.assert_allclose(ours.inertia, again.inertia_, rtol=1e-3)
    if spread < 1:
        assert adjusted_rand_score(labels, ours.assign(vectors)) == 1


def test_classes_are_found_numbered_by_size_and_the_same_from_any_file(
    tmp_path: Path,
) -> None:
    vectors, _ = blobs(5, 0.2)
    values = vectors.T.reshape(CHANNELS, 30, 50).copy()
    values[:, 2, 3] = np.nan
    write_embedding(tmp_path / "e.tif", grid_of(values))
    export_embeddings(tmp_path / "e.tif", tmp_path / "e.parquet")
    first = segment(tmp_path / "e.tif", tmp_path / "classes.tif", classes=5)
    table = segment(tmp_path / "e.parquet", classes=5)
    np.testing.assert_array_equal(first.classes, table.classes)
    assert first.classes[2, 3] == 0
    assert first.sizes == tuple((first.classes == i).sum() for i in range(1, 6))
    assert sorted(first.sizes, reverse=True) == list(first.sizes)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    reference = Reference(5, n_init=10, random_state=0).fit_predict(unit)
    flat = first.classes.reshape(-1)
    assert adjusted_rand_score(reference[flat > 0], flat[flat > 0]) == 1
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert (file.dtypes[0], file.nodata) == ("uint8", 0)
        np.testing.assert_array_equal(file.read(1), first.classes)
        colours = file.colormap(1)
        assert len({colours[i] for i in range(6)}) == 6
        assert json.loads(file.tags()["GEOFM_CLASSES"])[:2] == ["no data", "class 1"]
    assert len(first.table().splitlines()) == 6


def test_a_sample_of_many_cells_gives_the_classes_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = blobs(4, 0.2)
    embedding = grid_of(vectors.T.reshape(CHANNELS, 30, 50))
    monkeypatch.setitem(segment.__globals__, "_SAMPLE_CELLS", 300)
    found = segment(embedding, classes=4)
    assert adjusted_rand_score(labels, found.classes.reshape(-1)) == 1


def test_more_classes_than_different_cells_are_refused() -> None:
    values = np.ones((CHANNELS, 4, 5), np.float32)
    values[:, :2] = 2
    values[0, :2] = -3
    with pytest.raises(geofm.RasterError, match="only 2 different"):
        segment(grid_of(values), classes=3)
    with pytest.raises(geofm.RasterError, match="as many cells"):
        segment(grid_of(values[:, :1, :2]), classes=3)
    with pytest.raises(geofm.RasterError, match="2 to 254"):
        segment(grid_of(values), classes=1)
    with pytest.raises(geofm.RasterError, match="seed must be 0 or more"):
        segment(grid_of(values), classes=2, seed=-1)
