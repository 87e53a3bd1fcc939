"""GeoTIFF in, georeferenced embeddings out."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.control
import torch
from conftest import data
from loopback import FileHost, serving
from rasterio.windows import Window
from test_windows import Identity, noise, small_mpmae

import geofm
from geofm import maps
from geofm.datasets import samples
from geofm.maps.sources import draw_embedding
from geofm.raster import RasterImage, embed_raster, read_image
from geofm.raster.sources import FileSource, SceneSource, _is_product, _size_and_time
from geofm.scenes import CLOUDY, Scene, SceneBand, open_scene
from geofm.scenes.samples import write_safe

L2A = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split()
L1C = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12".split()
PLACE = {"crs": "EPSG:32631", "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)}
EUROSAT = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A".split()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return geofm.create_model("mpmae_atto", stem_padding="aligned")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    samples.write_scene(path, samples.landscape((120, 90), seed=1))
    return path


def test_grid_has_the_images_crs_and_cells_of_the_models_stride(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.tif"
    embedding = embed_raster(model, scene, out, level="L2A")
    with rasterio.open(scene) as source, rasterio.open(out) as file:
        assert file.count == model.num_features
        assert file.shape == (15, 12)
        assert file.crs == source.crs
        assert file.transform == source.transform @ rasterio.Affine.scale(8)
        assert np.isnan(file.nodata)
        np.testing.assert_array_equal(file.read(), embedding.values)
        assert file.tags()["GEOFM_WEIGHTS"].startswith("untrained")
        assert file.descriptions[0] == "embedding_0"


def test_values_are_the_models_own_features(model: torch.nn.Module, scene: Path) -> None:
    embedding = embed_raster(model, scene, level="L2A")
    image = read_image(scene)
    prepare = geofm.create_transform(model, image.bands, "dn", "L2A")
    with torch.inference_mode():
        # 90 columns end inside a cell; cut to whole ones, only the last column sees the edge.
        whole = model.eval().forward_features(prepare(image.pixels)[None])[0].numpy()
    assert whole.shape == (320, 15, 11)
    assert np.corrcoef(whole.ravel(), embedding.values[:, :, :11].ravel())[0, 1] > 0.99
    assert model.training is False


def test_the_models_mode_is_left_as_it_was(model: torch.nn.Module, scene: Path) -> None:
    model.train()
    embed_raster(model, scene, level="L2A")
    assert model.training
    model.eval()


def test_resnet_cells_are_georeferenced_by_their_centres(scene: Path) -> None:
    resnet = geofm.create_model("ssl4eco_resnet18")
    embedding = embed_raster(resnet, scene)
    with rasterio.open(scene) as source:
        # Cell 0 of a ResNet looks at pixel 0: its centre is that pixel's centre.
        a, _, c, _, e, f = embedding.transform
        assert (a / 2 + c, e / 2 + f) == pytest.approx(source.transform @ (0.5, 0.5))
        assert a == 32 * source.transform.a


def test_cells_without_data_are_nan_and_no_others(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    holed = tmp_path / "holed.tif"
    with rasterio.open(scene) as source:
        pixels, profile, names = source.read(), source.profile, source.descriptions
    pixels[:, 16:48, 8:24] = 0
    with rasterio.open(holed, "w", **profile) as file:
        file.write(pixels)
        file.descriptions = names
    values = embed_raster(model, holed, level="L2A").values
    expected = np.zeros(values.shape[1:], dtype=bool)
    expected[2:6, 1:3] = True
    np.testing.assert_array_equal(np.isnan(values).all(axis=0), expected)
    np.testing.assert_array_equal(np.isnan(values).any(axis=0), expected)


def test_the_order_of_bands_in_the_file_does_not_matter_but_their_names_do(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    order = list(np.random.default_rng(0).permutation(12))
    shuffled = tmp_path / "shuffled.tif"
    with rasterio.open(scene) as source:
        pixels, profile, names = source.read(), source.profile, source.descriptions
    with rasterio.open(shuffled, "w", **profile) as file:
        file.write(pixels[order])
    expected = embed_raster(model, scene, level="L2A").values
    right = embed_raster(model, shuffled, bands=[names[i] for i in order], level="L2A").values
    np.testing.assert_array_equal(right, expected)
    swapped = list(names)
    swapped[7], swapped[8] = swapped[8], swapped[7]
    wrong = embed_raster(model, scene, bands=swapped, level="L2A").values
    assert np.abs(wrong - expected).max() > 1e-3


def test_unnamed_bands_are_asked_for(model: torch.nn.Module, scene: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.tif"
    with rasterio.open(scene) as source, rasterio.open(bare, "w", **source.profile) as file:
        file.write(source.read())
    with pytest.raises(geofm.BandError, match="12 bands without names"):
        embed_raster(model, bare, level="L2A")
    with pytest.raises(geofm.BandError, match="12 bands, 2 are named"):
        embed_raster(model, bare, bands=["B2", "B3"], level="L2A")


def test_a_file_that_is_no_raster_is_an_error(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "notes.tif"
    path.write_text("not a raster")
    with pytest.raises(geofm.GeofmError, match=r"notes\.tif cannot be read"):
        embed_raster(model, path, level="L2A")


@pytest.mark.parametrize("name", ["absent.tif", "absent.SAFE", "absent.json", "absent/B*.tif"])
def test_a_file_that_is_not_there_is_not_found(
    model: torch.nn.Module, name: str, tmp_path: Path
) -> None:
    with pytest.raises(geofm.DataNotFoundError, match=r"there is no|no .* file matches"):
        embed_raster(model, tmp_path / name, level="L2A")
    assert issubclass(geofm.DataNotFoundError, FileNotFoundError)


def test_nothing_half_written_is_left_behind(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    with pytest.raises(geofm.GeofmError, match="no folder"):
        embed_raster(model, scene, tmp_path / "absent" / "out.tif", level="L2A")
    out = tmp_path / "out.tif"
    out.write_text("precious")
    with rasterio.open(scene, "r+") as file:
        bare = tmp_path / "bare.tif"
        with rasterio.open(bare, "w", **file.profile) as copy:
            copy.write(file.read())
            copy.descriptions = file.descriptions
    with pytest.raises(geofm.PixelError, match="say level"):
        embed_raster(model, bare, out)
    bare.unlink()
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif"]


def test_a_segmentation_model_has_no_embedding_map(scene: Path) -> None:
    unet = geofm.create_model("mpmae_unet_atto", num_classes=2)
    with pytest.raises(geofm.ModelError, match="no embedding map"):
        embed_raster(unet, scene, level="L2A")


def test_picture_shows_the_image_beside_its_embedding_and_marks_untrained_weights(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    from PIL import Image

    path = tmp_path / "look.png"
    embed_raster(model, scene, picture=path, level="L2A")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    width = picture.shape[1]
    # Titles are in the first 0.45 inches, at 150 dots an inch.
    titles = picture[:67]
    red = (titles[..., 0] > 200) & (titles[..., 1] < 80) & (titles[..., 2] < 80)
    assert red[:, width // 2 :].any()
    assert not red[:, : width // 2].any()
    assert picture[80:700, : width // 2].std() > 10
    assert picture[80:700, width // 2 :].std() > 10


def test_the_picture_is_that_of_the_maps(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.tif"
    embed_raster(model, scene, out, picture=tmp_path / "a.png", level="L2A")
    layer, base = maps.open_layer(out), maps.true_colour_layer(scene)
    maps.write_png(tmp_path / "b.png", layer, base)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("output", [None, "out.tif"])
def test_one_component_and_no_data_have_pictures_too(
    model: torch.nn.Module, scene: Path, tmp_path: Path, output: str | None
) -> None:
    out = tmp_path / output if output else None
    embed_raster(model, scene, out, picture=tmp_path / "a.png", level="L2A", pca=1)
    image = read_image(scene)
    empty = dataclasses.replace(image, pixels=np.ma.zeros(image.pixels.shape, np.uint16))
    embed_raster(model, empty, out, picture=tmp_path / "b.png", level="L2A")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"} | ({output} - {None})


def test_a_picture_that_cannot_be_written_says_that_the_raster_is_complete(
    model: torch.nn.Module, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    out = tmp_path / "out.tif"
    words = r"a\.png: the disk is full; make room\. The raster is complete: .*out\.tif$"
    with pytest.raises(geofm.RasterError, match=words):
        embed_raster(model, scene, out, picture=tmp_path / "a.png", level="L2A")
    assert [p.name for p in tmp_path.iterdir()] == ["out.tif"]
    with rasterio.open(out) as file:
        assert file.count == 320


def test_values_of_a_damaged_file_are_an_error_that_names_it(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.tif"
    embedding = embed_raster(model, scene, out, level="L2A")
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(geofm.RasterError, match=r"out\.tif cannot be read"):
        _ = embedding.values
    out.unlink()
    with pytest.raises(geofm.RasterError, match=r"out\.tif cannot be read"):
        _ = embedding.values


@pytest.mark.parametrize(
    ("file", "bands", "level"),
    [
        ("s2_scenes/eotdl_Boadella_2020-01-13.tif", L2A, "L2A"),
        ("s2_scenes/copernicusfm_T60HWB_20201002_L1C.tif", L1C, "L1C"),
        ("eurosat_ms_200/Forest/Forest_1.tif", EUROSAT, "L1C"),
    ],
)
def test_real_scenes_embed_with_named_bands(
    model: torch.nn.Module, file: str, bands: list[str], level: str, tmp_path: Path
) -> None:
    source = data(*file.split("/"))
    out = tmp_path / "out.tif"
    embedding = embed_raster(model, source, out, bands, level=level)
    with rasterio.open(source) as image, rasterio.open(out) as grid:
        assert grid.crs == image.crs
        assert grid.shape == (-(-image.height // 8), -(-image.width // 8))
        assert grid.bounds.left == pytest.approx(image.bounds.left)
        assert grid.bounds.top == pytest.approx(image.bounds.top)
    assert np.isfinite(embedding.values).all()
    swapped = ["B8" if b == "B4" else "B4" if b == "B8" else b for b in bands]
    other = embed_raster(model, source, None, swapped, level=level)
    assert np.abs(other.values - embedding.values).max() > 1e-3


def test_channel_order_reaches_the_network_as_the_card_says() -> None:
    # A first layer that copies one channel shows which band arrived there.
    model = geofm.create_model("mpmae_atto")
    source = data("eurosat_ms_200", "Forest", "Forest_1.tif")
    image = read_image(source, EUROSAT)
    prepared = geofm.create_transform(model, EUROSAT, "dn", "L1C")(image.pixels)
    card = geofm.model_card("mpmae_atto.mmearth64")
    assert card.input.bands[7:9] == ("B8A", "B8")
    statistics = card.input.statistics["L1C"]
    for channel, name in enumerate(card.input.bands):
        raw = image.pixels[EUROSAT.index(name)].astype(np.float64)
        expected = (raw - statistics.mean[channel]) / statistics.std[channel]
        np.testing.assert_allclose(prepared[channel].numpy(), expected, atol=1e-4)
        with torch.inference_mode():
            conv = model.initial_conv[0]
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[0, channel, 1, 1] = 1.0
            seen = conv(prepared[None])[0, 0].numpy()
        np.testing.assert_allclose(seen, expected[1:-1, 1:-1], atol=1e-4)


def test_inputs_and_outputs_are_kept_apart(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    before = scene.read_bytes()
    for output, picture, words in (
        (scene, None, "the output would overwrite the input"),
        (tmp_path / "a.png", tmp_path / "a.png", "the picture would overwrite the output"),
        (tmp_path, None, "the output is a folder"),
    ):
        with pytest.raises(geofm.GeofmError, match=words):
            embed_raster(model, scene, output, level="L2A", picture=picture)
    assert scene.read_bytes() == before


def test_no_file_of_a_scene_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    model = small_mpmae(0.0, stem_padding="aligned")
    for name in ("B02", "B03"):
        with rasterio.open(
            folder / f"{name}.tif",
            "w",
            driver="GTiff",
            width=64,
            height=64,
            count=1,
            dtype="uint16",
            **PLACE,
        ) as file:
            file.write(np.full((1, 64, 64), 900, np.uint16))
    scene = geofm.open_scene(folder, units="dn", level="L2A", offset=0)
    for source in (scene, folder / "*.tif"):
        with pytest.raises(geofm.RasterError, match="is a file of the scene"):
            embed_raster(model, source, folder / "B02.tif")


def test_the_query_of_an_address_is_kept_to_itself() -> None:
    address = "https://example.org/a/scene.tif?token=" + "secret" * 100
    assert not _is_product(address)
    assert _is_product("https://example.org/item.json?token=secret")
    assert _size_and_time(address) is None
    found = []
    for path in (address, address.replace("secret", "other")):
        affine = rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)
        bands = {"B2": SceneBand("B2", path)}
        crs = rasterio.CRS.from_epsg(32631)
        scene = Scene(bands, "dn", "L2A", 0.0, None, crs, affine, 64, 64, source=path)
        source = SceneSource(scene, None, "bilinear", ())
        assert source.name == "scene.tif"
        assert source.files == ()
        found.append(source.identity())
    assert found[0] == found[1]


def test_a_picture_reads_three_bands_and_a_part_at_a_time(
    model: torch.nn.Module, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    embedding = embed_raster(model, scene, out, level="L2A")
    monkeypatch.setattr("geofm.raster.grids._STRIP_BYTES", 4 * 320 * 12 * 5)
    with rasterio.open(out) as file:
        np.testing.assert_array_equal(embedding.values, file.read())
    source = FileSource(scene, None)
    draw_embedding(tmp_path / "a.png", source, embedding, "sentinel2")
    monkeypatch.setattr("geofm.maps.sources._STRIP", 50)
    monkeypatch.setattr("geofm.maps.sources._WIDE", 64)
    asked, read = [], source.read

    def watched(bands: Any, *place: int) -> Any:
        asked.append((sorted(bands), place))
        return read(bands, *place)

    monkeypatch.setattr(source, "read", watched)
    draw_embedding(tmp_path / "b.png", source, embedding, "sentinel2")
    source.close()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert all(bands == ["B2", "B3", "B4"] for bands, _ in asked)
    assert [place for _, place in asked] == [
        (top, left, min(50, 120 - top), wide)
        for top in (0, 50, 100)
        for left, wide in ((0, 64), (64, 26))
    ]


def test_masks_of_the_file_count_as_no_data(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    masked = tmp_path / "masked.tif"
    with rasterio.open(scene) as source:
        profile = source.profile | {"nodata": None}
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(masked, "w", **profile) as file,
        ):
            file.write(source.read())
            file.descriptions = source.descriptions
            mask = np.full(source.shape, 255, dtype=np.uint8)
            mask[:16, :8] = 0
            file.write_mask(mask)
    values = embed_raster(model, masked, level="L2A").values
    empty = np.isnan(values).all(axis=0)
    assert empty[:2, 0].all()
    assert empty.sum() == 2


def test_declared_scales_are_pointed_out(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    scaled = tmp_path / "scaled.tif"
    with rasterio.open(scene) as source, rasterio.open(scaled, "w", **source.profile) as file:
        file.write(source.read())
        file.descriptions = source.descriptions
        file.scales, file.offsets = (2.75e-5,) * 12, (-0.2,) * 12
    with pytest.warns(UserWarning, match="declares scales and offsets"):
        embed_raster(model, scaled, level="L2A")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Who says it knows what the values mean.
        embed_raster(model, scaled, level="L2A", units="dn")
    with pytest.warns(UserWarning, match="are not applied"):
        read_image(scaled)


def test_true_colour_follows_the_images_own_sensor(scene: Path, tmp_path: Path) -> None:
    with rasterio.open(scene) as source:
        image = read_image(scene, [f"SR_B{i}" for i in range(1, 13)])
        red, green, blue = source.read([3, 2, 1])
    layer = maps.true_colour_layer(image, sensor="landsat_tm")
    assert layer.title == "true colour"
    for channel, band in enumerate((red, green, blue)):
        assert np.corrcoef(layer.pixels[..., channel].ravel(), band.ravel())[0, 1] > 0.8


def test_images_beyond_memory_are_refused_before_they_are_computed(
    model: torch.nn.Module, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geofm.raster.jobs._MAX_WINDOW_BYTES", 1e6)
    with pytest.raises(geofm.GeofmError, match="in one pass"):
        embed_raster(model, scene, level="L2A")


# --- inputs of other kinds ---------------------------------------------------------------------


def test_rotated_rasters_are_georeferenced(tmp_path: Path) -> None:
    model = small_mpmae(0.0, stem_padding="classification")
    affine = rasterio.Affine.translation(4e5, 5e6) @ rasterio.Affine.rotation(30)
    affine = affine @ rasterio.Affine.scale(10, -10)
    image = dataclasses.replace(noise(80, 80), transform=tuple(affine)[:6])
    embed_raster(model, image, tmp_path / "out.tif")
    with rasterio.open(tmp_path / "out.tif") as file:
        # The first cell of an unpadded stem covers pixels 1 to 8.
        assert file.transform @ (0, 0) == pytest.approx(affine @ (1, 1))
        assert file.transform @ (3, 5) == pytest.approx(affine @ (25, 41))
    flat = dataclasses.replace(image, transform=(10.0, 10.0, 0.0, 10.0, 10.0, 0.0))
    with pytest.raises(geofm.RasterError, match="pixels have no area"):
        embed_raster(model, flat)
    for wrong, words in (
        ((10.0, 0.0, float("nan"), 0.0, -10.0, 0.0), "six finite numbers"),
        ((10.0, 0.0, 0.0, 0.0, float("inf"), 0.0), "six finite numbers"),
        ((10.0, 0.0, 0.0), "expected the six numbers"),
    ):
        nowhere = dataclasses.replace(image, transform=wrong)  # type: ignore[arg-type]
        with pytest.raises(geofm.RasterError, match=words):
            embed_raster(model, nowhere)


def test_a_reference_system_that_nothing_knows_is_refused() -> None:
    for crs in ("EPSG:999999", "nonsense"):
        image = dataclasses.replace(noise(40, 40), crs=crs)
        with pytest.raises(geofm.RasterError, match=f"{crs}' is no coordinate reference system"):
            embed_raster(small_mpmae(0.0, stem_padding="aligned"), image)


def test_ground_control_points_alone_are_no_georeference(tmp_path: Path) -> None:
    path = tmp_path / "gcps.tif"
    points = [
        rasterio.control.GroundControlPoint(row, column, 9 + column / 1e4, 47 - row / 1e4)
        for row, column in ((0, 0), (0, 40), (40, 0), (40, 40))
    ]
    profile = {"driver": "GTiff", "width": 40, "height": 40, "count": 2, "dtype": "uint16"}
    with rasterio.open(path, "w", **profile, gcps=points, crs="EPSG:4326") as file:
        file.write(noise(40, 40).pixels.data)
        file.descriptions = ("B2", "B3")
    for read in (read_image, geofm.open_scene):
        with pytest.raises(geofm.RasterError, match=r"4 ground control points.*gdalwarp"):
            read(path)  # type: ignore[operator]


def test_a_missing_crs_is_reported_and_stays_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = dataclasses.replace(noise(40, 40), crs=None)
    embed_raster(small_mpmae(0.0, stem_padding="aligned"), image, tmp_path / "out.tif")
    assert "no coordinate reference system" in caplog.text
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.crs is None


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("complex64", "has complex64 pixels.*amplitude"), ("int8", "these are 8 bits")],
)
def test_pixels_that_are_no_reflectance_are_refused(dtype: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "in.tif"
    profile = {"driver": "GTiff", "width": 40, "height": 40, "count": 2, "dtype": dtype} | PLACE
    with rasterio.open(path, "w", **profile) as f:
        f.write(np.ones((2, 40, 40), dtype))
    with pytest.raises(geofm.GeofmError, match=words):
        embed_raster(
            small_mpmae(0.0, stem_padding="aligned"), path, tmp_path / "out.tif", ["B2", "B3"]
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tif"]


def test_a_missing_band_is_named(tmp_path: Path) -> None:
    image = dataclasses.replace(noise(40, 40), bands=("B2", "B4"))
    with pytest.raises(geofm.BandError, match="B3"):
        embed_raster(small_mpmae(0.0, stem_padding="aligned"), image, tmp_path / "out.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 60}, "multiple of the model's cells of 8 px, got 60; take 64"),
        ({"window": "large"}, "'tile' or 'image', got 'large'"),
        ({"window": 112.0}, "window must be a whole number, 1 or more, got 112.0"),
        ({"window": True}, "window must be a whole number"),
        ({"overlap": 8.0}, "overlap must be a whole number, 0 or more, got 8.0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"window": 64, "overlap": 64}, "less than the window"),
        ({"overlap": 4}, "multiple of the model's cells"),
        ({"blend": "median"}, "smooth or centre"),
        ({"stride": 3}, r"no map with 3 px per cell; it has \[1, 2, 4, 8\]"),
        ({"stride": 2, "pooled": True}, "chooses a map"),
        ({"dtype": "float64"}, "dtype is one of"),
        ({"compress": "jpeg"}, "compress is"),
        ({"min_valid": 50}, "share from 0 to 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"pca": 0}, "pca must be"),
        ({"pca": 9}, "9 principal components need"),
        ({"mask_classes": [3]}, "no classification"),
        ({"mask_classes": "cloud"}, "expected numbers of classes.*CLOUDY"),
        ({"mask_classes": 3}, "expected numbers of classes"),
        ({"resampling": "foo"}, "resampling is 'foo'; expected one of nearest"),
        ({"align": "centre"}, "align is 'centre'"),
        ({"date": "June"}, "a date looks like"),
        ({"fit": "any"}, "for tiles"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.tif"
    profile = {"driver": "GTiff", "width": 40, "height": 40, "count": 2, "dtype": "uint16"} | PLACE
    with rasterio.open(path, "w", **profile) as f:
        f.write(noise(40, 40).pixels.data)
    model = small_mpmae(0.0, stem_padding="aligned")
    with pytest.raises(geofm.GeofmError, match=words):
        embed_raster(model, path, tmp_path / "out.tif", ["B2", "B3"], **options)
    # An image in memory is refused the same.
    with pytest.raises(geofm.GeofmError, match=words):
        embed_raster(model, noise(40, 40), tmp_path / "out.tif", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tif"]


def test_scenes_are_read_band_by_band_on_their_finest_grid(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    folder = data("major_tom", "199U", "199U_1099R")
    (product,) = folder.iterdir()
    # A part, as it is about reading.
    scene = dataclasses.replace(geofm.open_scene(product, offset=-1000), width=224, height=336)
    got = embed_raster(model, scene, tmp_path / "out.tif", picture=tmp_path / "out.png")
    assert got.shape == (320, -(-scene.height // 8), -(-scene.width // 8))
    # A window must be the same once it is cut out of the scene.
    first = embed_raster(model, scene, window=112, overlap=0, blend="centre").values
    alone = scene.read(Window(112, 224, 112, 112))
    image = RasterImage(alone, tuple(scene.bands), tuple(scene.transform)[:6], None)
    expected = embed_raster(
        model, image, window=112, overlap=0, level="L2A", offset=-1000, blend="centre"
    ).values
    np.testing.assert_allclose(first[:, 28:42, 14:28], expected, atol=1e-4)
    for said in ({"level": "L1C"}, {"offset": 0}, {"baseline": "05.09"}, {"align": "corner"}):
        with pytest.raises(geofm.PixelError, match="a scene has its own; say others in open_scene"):
            embed_raster(model, scene, **said)  # type: ignore[arg-type]


# --- what a source says of its pixels ------------------------------------------------------------

PRODUCT = "S2A_MSIL2A_20220629T101031_N0509_R022_T32UNU_20220629T140000"


def stack(
    path: Path,
    scales: tuple[float, float] | None = None,
    names: tuple[str, ...] | None = ("B2", "B3"),
    dtype: str = "uint16",
    factor: float = 1.0,
    **tags: str,
) -> Path:
    """A file of two bands with values from 1 to 4000 and the given facts."""
    pixels = np.random.default_rng(0).integers(1200, 4000, (2, 32, 48))
    profile = {"driver": "GTiff", "width": 48, "height": 32, "count": 2, "dtype": dtype} | PLACE
    with rasterio.open(path, "w", **profile) as file:
        file.write((pixels * factor).astype(dtype))
        if names:
            file.descriptions = names
        if scales:
            file.scales, file.offsets = (scales[0],) * 2, (scales[1],) * 2
        file.update_tags(**tags)
    return path


def added(path: Path, **options: Any) -> tuple[float, dict[str, str]]:
    """What is added to stored values, by a network that gives back prepared ones; and the tags."""
    with rasterio.open(path) as file:
        stored = file.read().astype(np.float32)
    grid = embed_raster(Identity(), path, **options)
    differences = np.unique((grid.values - stored).round(2))
    assert differences.size == 1
    return float(differences[0]), grid.tags


def test_a_stack_is_prepared_as_its_name_says(tmp_path: Path) -> None:
    path = stack(tmp_path / f"{PRODUCT}.tif")
    scene = open_scene(path)
    assert (scene.level, scene.offset) == ("L2A", -1000)
    offset, tags = added(path)
    assert offset == -1000
    assert "level=L2A, offset=-1000" in tags["GEOFM_PREPARE"]
    assert tags["GEOFM_DATE"] == "2022-06-29"
    # The scene and the file give the same.
    np.testing.assert_array_equal(
        embed_raster(Identity(), path).values, embed_raster(Identity(), scene).values
    )
    assert added(path, level="L2A", offset=-1000, date="2022-06-29")[0] == -1000
    assert added(path, baseline="05.09")[0] == -1000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"offset": 0}, r"offset=0.0 was given, but .* say -1000.0; .*--no-strict"),
        ({"baseline": "03.01"}, r"offset=0.0 was given, but .* say -1000.0"),
        ({"level": "L1C"}, "level='L1C' was given, but .* say 'L2A'"),
        ({"units": "reflectance"}, "units='reflectance' was given, but .* say 'dn'"),
        ({"date": datetime.date(2020, 1, 1)}, "date=2020-01-01 was given, but .* say 2022-06-29"),
        ({"offset": 0, "baseline": "03.01"}, "not both"),
    ],
)
def test_who_contradicts_a_stack_must_say_so(
    said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = stack(tmp_path / f"{PRODUCT}.tif")
    with pytest.raises(geofm.PixelError, match=words):
        embed_raster(Identity(), path, **said)
    if said == {"offset": 0}:
        assert added(path, **said, strict=False)[0] == 0


def test_declared_scales_and_tags_say_offset_level_and_date(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert added(stack(tmp_path / "a.tif", (1e-4, -0.1)))[0] == -1000
        assert added(stack(tmp_path / "b.tif", (1e-4, 0.0)))[0] == 0
        # The offset is what its name says.
        assert added(stack(tmp_path / f"{PRODUCT}.tif", (1e-4, 0.0)))[0] == -1000
        plain = stack(tmp_path / "c.tif", names=None)
        assert added(plain, bands=["B2", "B3"])[0] == 0
        offset, tags = added(stack(tmp_path / "d.tif", LEVEL="L2A", DATE="2021-06-29"))
    assert (offset, tags["GEOFM_DATE"]) == (0, "2021-06-29")
    assert "level=L2A" in tags["GEOFM_PREPARE"]
    assert added(plain, bands=["B2", "B3"], date="2020-06-04")[1]["GEOFM_DATE"] == "2020-06-04"
    assert "GEOFM_DATE" not in added(plain, bands=["B2", "B3"])[1]
    with pytest.raises(geofm.PixelError, match=r"offset=-500\.0 was given"):
        embed_raster(Identity(), tmp_path / "a.tif", offset=-500)


def test_other_sensors_and_floats_are_taken_as_before(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = Identity()
        model.input_spec = dataclasses.replace(
            model.input_spec, sensor="landsat_oli", bands=("B2", "B3")
        )
        path = stack(tmp_path / "LC09_L2SP_193026_20220629.tif", names=("SR_B2", "SR_B3"))
        grid = embed_raster(model, path, sensor="landsat_oli", offset=-200)
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(grid.values, file.read().astype(np.float32) - 200)
        # Reflectance of a product has no offset left, whatever its name says.
        path = stack(tmp_path / f"{PRODUCT}.tif", dtype="float32", factor=1e-4)
        grid = embed_raster(Identity(), path, units="reflectance")
    with rasterio.open(path) as file:
        np.testing.assert_allclose(grid.values, file.read() * 1e4, rtol=1e-5)
    assert "units=reflectance, level=L2A, offset=0" in grid.tags["GEOFM_PREPARE"]
    with pytest.raises(geofm.PixelError, match="belongs to units='dn'"):
        embed_raster(Identity(), path, units="reflectance", baseline="05.09")


def test_a_band_with_a_scale_of_its_own_does_not_hide_the_others(tmp_path: Path) -> None:
    path = stack(tmp_path / "a.tif", (1e-4, -0.1), names=("B2", "elevation"))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4, 1.0), (-0.1, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        grid = embed_raster(Identity(), path, fill={"B3": "B2"})
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(grid.values[1], file.read(1).astype(np.float32) - 1000)
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B2", "B3")
    with pytest.warns(UserWarning, match="declares scales and offsets"):
        embed_raster(Identity(), path)


def two_grids(folder: Path) -> Path:
    """Bands whose names say nothing, the coarser one half a pixel off, as SSL4EO-S12's are."""
    folder.mkdir()
    for name, size, metres in (("B02", 32, 10), ("B03", 16, 20)):
        shift = (metres - 10) / 2
        place = rasterio.Affine(metres, 0, 4e5 - shift, 0, -metres, 5e6 + shift)
        profile = {"driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": "uint16"}
        with rasterio.open(
            folder / f"{name}.tif", "w", **profile, crs="EPSG:32631", transform=place
        ) as file:
            pixels = np.random.default_rng(size).integers(1200, 4000, (1, size, size))
            file.write(pixels.astype(np.uint16))
    return folder


def test_a_product_takes_what_open_scene_takes(tmp_path: Path) -> None:
    folder = two_grids(tmp_path / "plain")
    with pytest.raises(geofm.RasterError, match="--align"):
        embed_raster(Identity(), folder)
    with pytest.raises(geofm.PixelError, match=r"units of .*--units"):
        embed_raster(Identity(), folder, align="corner")
    with pytest.raises(geofm.PixelError, match=r"offset of .*--offset"):
        embed_raster(Identity(), folder, align="corner", units="dn")
    said: dict[str, Any] = {"units": "dn", "level": "L2A", "align": "corner", "date": "2020-06-04"}
    scene = open_scene(folder, offset=-1000, nodata=7, **said)
    expected = embed_raster(Identity(), scene)
    for way in ({"offset": -1000}, {"baseline": "N0400"}):
        got = embed_raster(Identity(), folder, **said, **way, nodata=7)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got.values, expected.values)
        assert got.tags == expected.tags
    assert expected.tags["GEOFM_DATE"] == "2020-06-04"
    # An item is a product, whatever its file is called.
    assets = {name: {"href": str(folder / f"{name}.tif")} for name in ("B02", "B03")}
    item = {"id": "an-item", "properties": {"constellation": "sentinel-2"}, "assets": assets}
    for source in (item, tmp_path / "item.geojson"):
        if isinstance(source, Path):
            source.write_text(json.dumps(item))
        got = embed_raster(
            Identity(), source, level="L2A", align="corner", offset=-1000, nodata=7, units="dn"
        )
        np.testing.assert_array_equal(got.values, expected.values)
    with pytest.raises(geofm.BandError, match="the model needs B3"):
        embed_raster(Identity(), folder, **said, offset=0, sensor="modis")


def test_classes_to_mask_are_those_of_the_scene(tmp_path: Path) -> None:
    scene = open_scene(write_safe(tmp_path, 36))
    model = Identity()
    masked = embed_raster(model, scene, mask_classes=CLOUDY)
    assert np.isnan(masked.values).any()
    for wrong, words in (
        ([99], r"mask_classes has 99, .* 9 cloud, high probability.*CLOUDY"),
        ([-1, 8], "mask_classes has -1"),
        ("cloud", "expected numbers of classes, such as geofm.scenes.CLOUDY"),
        ([8.0], "expected numbers of classes"),
    ):
        with pytest.raises(geofm.RasterError, match=words):
            embed_raster(model, scene, mask_classes=wrong)  # type: ignore[arg-type]
        with pytest.raises(geofm.RasterError, match=words):
            scene.read(mask_classes=wrong)  # type: ignore[arg-type]
    with pytest.raises(geofm.RasterError, match="resampling is 'foo'"):
        embed_raster(model, scene, resampling="foo")


def test_errors_of_reading_name_their_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 2, "dtype": "uint16"} | PLACE
    with rasterio.open(path, "w", **profile, compress="deflate") as file:
        file.write(noise(64, 64).pixels.data)
        file.descriptions = ("B2", "B3")
    with rasterio.open(path) as file:
        begin = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    content = bytearray(path.read_bytes())
    content[begin : begin + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(geofm.RasterError, match=r"a\.tif cannot be read at rows 0 to") as refused:
        embed_raster(Identity(), path)
    assert "previous exception" not in str(refused.value)
    assert "Fetch it again" in str(refused.value)
    host = FileHost()
    with (
        serving(host),
        pytest.raises(geofm.RasterError, match=r"gone\.tif cannot be read.*404") as gone,
    ):
        embed_raster(Identity(), host.url("/gone.tif?token=secret"))
    for words in ("complete", "secret", "previous exception"):
        assert words not in str(gone.value)
    assert "Is the address right?" in str(gone.value)
