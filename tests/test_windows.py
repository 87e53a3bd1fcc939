"""Rasters cut into windows: the plan, the blending, and what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import geofm
from geofm.cards import InputSpec, Statistics
from geofm.models.mpmae import MPMAE
from geofm.raster import RasterImage, embed_raster, embedding_map
from geofm.raster.cog import Layout, array_to_cog
from geofm.raster.windows import maps, panels, vectors

NODATA = 9


class Identity(torch.nn.Module):
    """Gives back what it is given; with `unit`, as if it had cells of that many pixels."""

    cell_offset = 0.0

    def __init__(self, unit: int = 1) -> None:
        super().__init__()
        self.unit = unit
        self.feature_info = [{"num_chs": 2, "reduction": 1, "module": "a"}]
        if unit > 1:
            self.feature_info.append({"num_chs": 2, "reduction": unit, "module": "b"})
        self.input_spec = InputSpec(
            sensor="sentinel2",
            bands=("B2", "B3"),
            levels=("L2A",),
            normalization="divide",
            size=8,
            fit="any",
            nodata=(NODATA,),
            divisor=1.0,
        )

    def forward_intermediates(self, x: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        return [x]


def image(pixels: np.ndarray) -> RasterImage:
    return RasterImage(np.ma.asarray(pixels), ("B2", "B3"), (10.0, 0, 0, 0, -10.0, 0), "EPSG:32631")


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    unit=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 6),
    overlap=st.integers(0, 5),
    blend=st.sampled_from(["smooth", "centre"]),
    missing=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    narrow=st.booleans(),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_an_identity_network_returns_the_input_exactly(
    height: int,
    width: int,
    unit: int,
    window: int,
    overlap: int,
    blend: str,
    missing: float,
    narrow: bool,
    batch: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    # Any float32, not only values whose sums are exact.
    pixels = (rng.random((2, height, width)) * 5000 + 10).astype(np.float32)
    holes = rng.random((height, width)) < missing
    holes[: height // 2, : width // 3] |= missing > 0.5
    pixels[:, holes] = NODATA
    # A pixel with one band is still a pixel; its other band is the blank of the preprocessing.
    pixels[0, rng.random((height, width)) < missing / 4] = NODATA
    expected = np.where(pixels == NODATA, 0, pixels)
    expected[:, (pixels == NODATA).all(axis=0)] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        if narrow:
            # Panels of one window each.
            patch.setattr("geofm.raster.jobs._PANEL_BYTES", 1)
        got = embed_raster(
            Identity(unit),
            image(pixels),
            stride=1,
            window=window * unit,
            overlap=min(overlap, window - 1) * unit,
            blend=blend,
            batch_size=batch,
        )
    np.testing.assert_array_equal(got.values, expected)


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 500),
    unit=st.sampled_from([1, 8, 16, 32]),
    windows=st.integers(1, 9),
    overlap=st.integers(0, 8),
    blend=st.sampled_from(["smooth", "centre"]),
)
def test_every_cell_is_covered_and_windows_are_alike(
    length: int, unit: int, windows: int, overlap: int, blend: str
) -> None:
    end = length + -length % unit
    size = min(windows * unit, end)
    axis = maps(length, size, min(overlap, size // unit - 1) * unit, unit, unit, size // unit, 0.0)
    total = np.zeros(axis.total)
    for i, first in enumerate(axis.firsts):
        assert axis.starts[i] % unit == 0
        assert axis.starts[i] + size <= end
        weights = axis.weights(i, blend)
        assert (weights >= 0).all()
        total[first : first + axis.cells] += weights
        above = axis.first_over(i)
        assert axis.firsts[above] + axis.cells > first
        assert above == 0 or axis.firsts[above - 1] + axis.cells <= first
    assert axis.total == end // unit
    assert (total > 0).all()
    if blend == "centre":
        assert (total == 1).all()
    owned = [axis.owned(i) for i in range(len(axis.starts))]
    assert [cell for begin, stop in owned for cell in range(begin, stop)] == list(range(axis.total))
    for width in (1, 3 * size, 10**6):
        found = panels(axis, width)
        assert [p.own for p in found] == [0, *(p.end for p in found[:-1])]
        assert found[-1].end == len(axis.starts)


def test_a_pixel_belongs_to_the_cell_that_its_centre_lies_in() -> None:
    # Cells of a ResNet are centred on pixels 0, 32, 64.
    axis = maps(80, 64, 32, 32, 32, 2, -15.5)
    first, last = axis.footprints(0, 3)
    assert first.tolist() == [0, 16, 48]
    assert last.tolist() == [16, 48, 80]


def test_windows_with_one_vector_lie_on_a_regular_grid() -> None:
    axis = vectors(100, 32, 16)
    assert axis.starts == (0, 16, 32, 48, 64, 80)
    # Cells are as wide as the step, in the middle of their window.
    assert axis.offset == 8
    assert vectors(20, 32, 0).starts == (0,)


def test_gaps_between_windows_are_refused() -> None:
    # An unpadded stem brings 6 cells from 56 px.
    with pytest.raises(geofm.RasterError, match="leaves gaps; overlap by 8 px"):
        maps(200, 56, 0, 8, 8, 6, 1.0)
    assert maps(200, 56, 8, 8, 8, 6, 1.0).total == 24


# --- maps from windows ----------------------------------------------------------------------------


def small_mpmae(grn: float, **options: Any) -> torch.nn.Module:
    """An MP-MAE with a receptive field of about 110 px; `grn` is the strength of its GRN."""
    torch.manual_seed(0)
    model = MPMAE(in_chans=2, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), **options)
    for name, parameter in model.named_parameters():
        if "weight" in name and parameter.ndim > 1:
            # Far from the small initial values, so that distant pixels matter.
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, grn)
    spec = geofm.model_card("mpmae_atto.mmearth64").input
    statistics = {k: Statistics((1000.0,) * 2, (500.0,) * 2) for k in ("any",)}
    model.input_spec = dataclasses.replace(
        spec, bands=("B2", "B3"), statistics=statistics, derived={}
    )
    return model


def noise(height: int, width: int, seed: int = 0) -> RasterImage:
    pixels = np.random.default_rng(seed).normal(1000, 500, (2, height, width)).clip(1, 9000)
    place = (10.0, 0.0, 4e5, 0.0, -10.0, 5e6)
    return RasterImage(np.ma.asarray(pixels.astype(np.uint16)), ("B2", "B3"), place, "EPSG:32631")


def whole_map(model: torch.nn.Module, image: RasterImage) -> np.ndarray:
    prepared = geofm.create_transform(model, image.bands, "dn")(image.pixels)
    return embedding_map(model, prepared[None])[0][0].numpy()


@pytest.mark.parametrize("shape", [(304, 264), (301, 250)])
def test_windows_that_overlap_by_the_receptive_field_equal_the_whole_image(
    shape: tuple[int, int],
) -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    image = noise(*shape)
    expected = whole_map(model, image)
    # Half the overlap is cut off each side: 56 px.
    got = embed_raster(model, image, window=160, overlap=112, blend="centre").values
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    # Which is no accident:
    less = embed_raster(model, image, window=160, overlap=0, blend="centre").values
    assert np.abs(less - expected).max() > 0.1


def test_tiles_side_by_side_are_what_the_model_gives_on_each_alone() -> None:
    model = small_mpmae(0.5, stem_padding="aligned")
    image = noise(168, 112)
    got = embed_raster(model, image, window="tile").values
    assert got.shape == (8, 21, 14)
    for row in range(3):
        for column in range(2):
            alone = RasterImage(
                image.pixels[:, 56 * row : 56 * row + 56, 56 * column : 56 * column + 56],
                image.bands,
                image.transform,
                image.crs,
            )
            part = got[:, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
            np.testing.assert_allclose(part, whole_map(model, alone), atol=1e-5)
    # GRN makes a tile a matter of all that is in its window.
    assert np.abs(got - whole_map(model, image)).max() > 0.1


def test_the_last_tile_shares_its_cells_with_no_other() -> None:
    # 104 px: tiles at 0 and 48; the cell at 48 is in both.
    model = small_mpmae(0.5, stem_padding="aligned")
    image = noise(56, 104)
    got = embed_raster(model, image, window="tile").values
    first, last = (
        whole_map(model, dataclasses.replace(image, pixels=image.pixels[:, :, left : left + 56]))
        for left in (0, 48)
    )
    np.testing.assert_allclose(got[:, :, :6], first[:, :, :6], atol=1e-5)
    np.testing.assert_allclose(got[:, :, 7:], last[:, :, 1:], atol=1e-5)
    either = [np.abs(got[:, :, 6] - own).max() for own in (first[:, :, 6], last[:, :, 0])]
    assert min(either) < 1e-5 < max(either)


def test_one_window_is_one_pass_and_size_of_batch_and_panels_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_mpmae(0.5, stem_padding="aligned")
    image = noise(152, 200)
    np.testing.assert_allclose(
        embed_raster(model, image, window="image").values, whole_map(model, image), atol=1e-5
    )
    options = {"window": 56, "overlap": 24}
    expected = embed_raster(model, image, **options, batch_size=1).values
    np.testing.assert_allclose(
        embed_raster(model, image, **options, batch_size=7).values, expected, atol=1e-4
    )
    monkeypatch.setattr("geofm.raster.jobs._PANEL_BYTES", 1)
    np.testing.assert_allclose(
        embed_raster(model, image, **options, batch_size=7).values, expected, atol=1e-4
    )


def test_smooth_blending_hides_the_seams_of_windows() -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    # One value everywhere: whatever varies away from the border is of the windows' making.
    image = dataclasses.replace(
        noise(320, 320), pixels=np.ma.asarray(np.full((2, 320, 320), 1500, "uint16"))
    )

    def step(**options: Any) -> float:
        values = embed_raster(model, image, window=96, **options).values
        return float(np.abs(np.diff(values[:, 7:-7, 7:-7], axis=2)).max())

    side_by_side = step(overlap=0)
    assert step(overlap=24) < side_by_side / 2
    assert step(overlap=48) < side_by_side / 4


@pytest.mark.parametrize(
    ("name", "options", "stride", "cells"),
    [
        ("mpmae", {"stem_padding": "classification"}, None, (18, 24)),
        ("mpmae", {"stem_padding": "classification"}, 1, (150, 198)),
        ("mpmae", {"stem_padding": "aligned"}, 2, (76, 100)),
        ("ssl4eco_resnet18", {}, None, (5, 7)),
        ("ssl4eco_resnet18", {}, 4, (39, 51)),
        ("ssl4eco_vit_tiny_patch16", {"img_size": 64}, None, (10, 13)),
    ],
)
def test_maps_of_any_stage_cover_the_image_and_lie_where_their_cells_look(
    name: str, options: dict[str, Any], stride: int | None, cells: tuple[int, int]
) -> None:
    model = small_mpmae(0.0, **options) if name == "mpmae" else geofm.create_model(name, **options)
    bands = model.input_spec.bands
    pixels = np.random.default_rng(0).integers(1, 4000, (len(bands), 152, 200), dtype=np.uint16)
    image = RasterImage(np.ma.asarray(pixels), bands, (10.0, 0, 0, 0, -10.0, 0), None)
    window = 96 if "resnet" in name else 64
    got = embed_raster(model, image, stride=stride, window=window, overlap=32)
    assert got.shape[1:] == cells
    assert np.isfinite(got.values).all()
    # Where the pixels change that cells are said to cover, it is these cells that change most.
    step, begin = got.stride, got.offset
    away = []
    for number in range(6):
        row, column = cells[0] * (number % 2 + 1) // 3, cells[1] * (number // 2 + 1) // 4
        top, left = round(begin + step * row), round(begin + step * column)
        changed = pixels.copy()
        changed[:, top : top + step, left : left + step] += 3000
        other = dataclasses.replace(image, pixels=np.ma.asarray(changed))
        new = embed_raster(model, other, stride=stride, window=window, overlap=32)
        moved = np.square(new.values - got.values).sum(axis=0)
        around = moved[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        rows, columns = np.indices(around.shape)
        away.append(
            (
                (around * rows).sum() / around.sum() - min(row, 2),
                (around * columns).sum() / around.sum() - min(column, 2),
            )
        )
    assert np.abs(np.median(away, axis=0)).max() < 0.5
    assert got.transform[2] == pytest.approx(begin * 10)


def test_pooled_vectors_are_the_models_own_and_lie_in_the_middle_of_their_windows() -> None:
    model = small_mpmae(0.5, stem_padding="aligned").eval()
    image = noise(112, 140)
    got = embed_raster(model, image, pooled=True, window=56, overlap=28 // 8 * 8)
    step = 32
    assert got.shape == (8, 3, 4)
    assert got.stride == step
    assert got.transform[2] == 4e5 + 10 * (56 - step) / 2
    prepared = geofm.create_transform(model, image.bands, "dn")(image.pixels)
    with torch.inference_mode():
        expected = model(prepared[None, :, 32:88, 64:120])[0].numpy()
    np.testing.assert_allclose(got.values[:, 1, 2], expected, atol=1e-5)
    # The last windows reach beyond the image, of 112 x 140 px, by 8 and 12 px.
    assert np.isfinite(got.values).all()
    # Of a window that begins 16 px before the end, most is missing.
    sparse = embed_raster(model, noise(112, 72), pooled=True, window=56, overlap=0)
    assert np.isnan(sparse.values[:, :, 1]).all()
    assert np.isfinite(sparse.values[:, :, 0]).all()


def test_pooled_vectors_of_a_narrow_image_lie_where_their_windows_do() -> None:
    # Windows are 224 px high, but only as wide as the image.
    model = small_mpmae(0.0, stem_padding="aligned")
    got = embed_raster(model, noise(448, 96), pooled=True, window=224)
    assert got.shape == (8, 2, 1)
    _, _, left, _, down, top = got.transform
    assert (left, top) == (4e5, 5e6)
    assert down == -2240
    assert got.transform[0] == 960


def test_cells_that_no_window_brought_have_no_data() -> None:
    # A ResNet's cell begins 16 px before its window: there it has data, in its window it has none.
    model = geofm.create_model("ssl4eco_resnet18", bands=["B2", "B3"]).eval()
    image = noise(224, 448)
    image.pixels[:, :, 224:] = 0
    got = embed_raster(model, image, level="L2A", window=224, overlap=0).values
    assert got.shape[2] == 14
    assert np.isfinite(got[:, :, :7]).all()
    assert np.isnan(got[:, :, 7:]).all()


def test_cells_with_less_data_than_asked_for_have_none() -> None:
    image = noise(32, 32)
    image.pixels[:, 0:8, 0:8] = 0
    image.pixels[:, 8:16, 0:5] = 0  # 3 of 8 columns are left
    image.pixels[:, 16:24, 0:4] = 0  # half
    image.pixels[0, 24:32, 0:8] = 0  # one band is enough
    model = small_mpmae(0.0, stem_padding="aligned")
    for share, expected in ((0.5, [1, 1, 0, 0]), (0.0, [1, 0, 0, 0]), (0.6, [1, 1, 1, 0])):
        values = embed_raster(model, image, min_valid=share).values
        assert np.isnan(values[:, :, 0]).all(axis=0).tolist() == expected
        assert np.isfinite(values[:, :, 1:]).all()


# --- what is written ------------------------------------------------------------------------------


def test_the_output_is_a_valid_cloud_optimised_geotiff(tmp_path: Path) -> None:
    out = tmp_path / "out.tif"
    model = small_mpmae(0.0, stem_padding="aligned")
    embed_raster(model, noise(1100, 1100), out, stride=1, window=224, overlap=32, pca=2)
    with rasterio.open(out) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.profile["tiled"]
        assert file.block_shapes[0] == (512, 512)
        assert file.overviews(1) == [2, 4]
        offsets = [int(file.get_tag_item("IFD_OFFSET", "TIFF", bidx=1))]
        data = [int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))]
        for level in range(2):
            offsets.append(int(file.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=level)))
            data.append(int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=level)))
        # Directories first, in order of size; then the values, small overviews first.
        assert offsets == sorted(offsets)
        assert data == sorted(data, reverse=True)
        assert max(offsets) < min(data)
        assert file.descriptions == ("pc_0", "pc_1")
        explained = [float(v) for v in file.tags()["GEOFM_PCA_EXPLAINED"].split(",")]
        assert 1 > explained[0] > explained[1] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_overviews_are_means_of_the_cells_with_data(dtype: str, tmp_path: Path) -> None:
    stored = {"float16": "float32"}.get(dtype, dtype)
    nodata = {"int8": -128.0, "uint8": 255.0}.get(dtype, float("nan"))
    random = np.random.default_rng(0)
    values = random.normal(0, 40, (3, 521, 701)).clip(-127, 127)
    values = np.abs(values) if dtype == "uint8" else values
    values = values.astype(np.float16).astype(stored)
    holes = random.random((521, 701)) < 0.3
    holes[:20, :20] = True
    values[:, holes] = nodata
    place = (10.0, 0.0, 4e5, 0.0, -10.0, 5e6)
    layout = Layout(
        (3, 521, 701), stored, place, None, nodata, ["a", "b", "c"], half=dtype == "float16"
    )
    array_to_cog(values, tmp_path / "out.tif", layout)
    with rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(), values)
        assert file.overviews(1) == [2]
    with rasterio.open(tmp_path / "out.tif", OVERVIEW_LEVEL=0) as file:
        got = file.read().astype(float)
    padded = np.full((3, 522, 702), np.nan)
    padded[:, :521, :701] = np.where(holes, np.nan, values)
    four = np.stack([padded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    if dtype == "uint8":
        expected = np.where(np.isnan(four[0]), 255, four[0])
    else:
        mean = np.ma.masked_invalid(four).mean(axis=0)
        expected = mean.round() if dtype == "int8" else mean
        expected = expected.filled(nodata)
    np.testing.assert_allclose(got, expected, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif"]


def test_fewer_bits_and_components_come_back_within_their_steps(tmp_path: Path) -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    image = noise(120, 120)
    image.pixels[:, :16, :16] = 0
    options: dict[str, Any] = {"window": 64, "overlap": 32}
    exact = embed_raster(model, image, **options).values
    half = embed_raster(model, image, tmp_path / "half.tif", **options, dtype="float16")
    with rasterio.open(tmp_path / "half.tif") as file:
        assert file.tags(1, ns="IMAGE_STRUCTURE")["NBITS"] == "16"
    np.testing.assert_array_equal(half.values, exact.astype(np.float16).astype(np.float32))
    eight = embed_raster(model, image, tmp_path / "eight.tif", **options, dtype="int8")
    with rasterio.open(tmp_path / "eight.tif") as file:
        assert set(file.dtypes) == {"int8"}
        assert file.nodata == -128
        steps = np.array(file.scales)
        tags = file.tags()
        assert [float(v) for v in tags["GEOFM_SCALE"].split(",")] == pytest.approx(steps)
        assert [float(v) for v in tags["GEOFM_ZERO"].split(",")] == pytest.approx(file.offsets)
    error = np.abs(eight.values - exact)
    np.testing.assert_array_equal(np.isnan(error), np.isnan(exact))
    assert (np.nanmax(error, axis=(1, 2)) <= steps * 0.501).mean() > 0.7  # a few are clipped
    assert np.nanpercentile(error / steps[:, None, None], 99) <= 0.501
    # In memory it is the same.
    again = embed_raster(model, image, **options, dtype="int8").values
    np.testing.assert_allclose(again, eight.values, rtol=1e-6)
    both = embed_raster(model, image, **options, dtype="int8", pca=3).values
    full = embed_raster(model, image, **options, pca=3).values
    assert np.nanstd(both - full) < 0.02 * np.nanstd(full)
    valid = np.isfinite(full).all(axis=0)
    assert np.abs(np.corrcoef(full[:, valid])[np.triu_indices(3, 1)]).max() < 0.1


def test_quantised_values_are_scaled_back_by_other_programs(tmp_path: Path) -> None:
    import rasterio.vrt

    out = tmp_path / "out.tif"
    grid = embed_raster(small_mpmae(0.0, stem_padding="aligned"), noise(64, 64), out, dtype="int8")
    with rasterio.open(out) as file:
        stored = file.read(1).astype(float)
        np.testing.assert_allclose(
            stored * file.scales[0] + file.offsets[0], grid.values[0], rtol=1e-5
        )


def test_outputs_tell_windows_weights_and_date(tmp_path: Path) -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    tags = embed_raster(model, noise(200, 120), tmp_path / "a.tif", window=64, overlap=16).tags
    assert tags["GEOFM_WINDOWS"] == "64 x 64 px, every 48 x 48 px, smooth"
    assert tags["GEOFM_VALUES"] == "embedding of 8 px cells"
    first = tags["GEOFM_WEIGHTS_HASH"]
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    other = embed_raster(model, noise(200, 120), tmp_path / "b.tif", window=64, overlap=16).tags
    assert other["GEOFM_WEIGHTS_HASH"] != first
    assert len(first) == 64
