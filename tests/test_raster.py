"""GeoTIFF in, georeferenced embeddings out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import data
from rasterio.windows import Window
from sklearn.decomposition import PCA
from test_windows import noise, small_mpmae

import geofm
from geofm.datasets import samples
from geofm.raster import Embedding, RasterImage, embed_raster, principal_components, read_image
from geofm.raster.picture import save_quicklook
from geofm.raster.sources import FileSource, SceneSource, _is_product, _size_and_time
from geofm.scenes import Scene, SceneBand

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
    with pytest.raises(geofm.GeofmError, match="cannot be read"):
        embed_raster(model, tmp_path / "absent.tif", level="L2A")


def test_nothing_half_written_is_left_behind(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    with pytest.raises(geofm.GeofmError, match="no folder"):
        embed_raster(model, scene, tmp_path / "absent" / "out.tif", level="L2A")
    out = tmp_path / "out.tif"
    out.write_text("precious")
    with pytest.raises(geofm.PixelError, match="say level"):
        embed_raster(model, scene, out)
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif"]


def test_a_segmentation_model_has_no_embedding_map(scene: Path) -> None:
    unet = geofm.create_model("mpmae_unet_atto", num_classes=2)
    with pytest.raises(geofm.ModelError, match="no embedding map"):
        embed_raster(unet, scene, level="L2A")


def test_principal_components_are_scikit_learns_up_to_sign() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(7, 7)) @ rng.normal(size=(7, 60))).reshape(7, 6, 10)
    values = values.astype(np.float32)
    ours = principal_components(values)
    theirs = PCA(3).fit_transform(values.reshape(7, -1).T).T.reshape(3, 6, 10)
    for a, b in zip(ours, theirs, strict=True):
        sign = np.sign((a * b).sum())
        np.testing.assert_allclose(a, sign * b, atol=1e-4)
    values[:, 0, 0] = np.nan
    assert np.isnan(principal_components(values)[:, 0, 0]).all()
    assert np.isfinite(principal_components(values)[:, 1:]).all()


def test_picture_shows_the_image_beside_its_embedding_and_marks_untrained_weights(
    model: torch.nn.Module, scene: Path, tmp_path: Path
) -> None:
    from PIL import Image

    path = tmp_path / "look.png"
    embed_raster(model, scene, picture=path, level="L2A")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    assert width > 2 * 90
    assert height > 120
    red = (picture[:30, :, 0] > 200) & (picture[:30, :, 1] < 80) & (picture[:30, :, 2] < 80)
    assert red[:, width // 2 :].any()
    assert not red[:, : width // 2].any()
    assert picture[40:, : width // 2].std() > 10
    assert picture[40:, width // 2 :].std() > 10


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


def test_a_picture_reads_three_bands_and_a_strip_at_a_time(
    model: torch.nn.Module, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    embedding = embed_raster(model, scene, out, level="L2A")
    whole = embedding.reduced(12).values
    assert whole.shape == (320, 12, 10)
    monkeypatch.setattr("geofm.raster.grids._STRIP_BYTES", 4 * 320 * 10 * 5)
    strips = [*embedding.strips(12)]
    assert [strip.shape[1] for strip in strips] == [5, 5, 2]
    in_memory = Embedding(embedding.values, embedding.transform, embedding.crs, 8, 0.0, {})
    np.testing.assert_array_equal(
        np.concatenate([*in_memory.strips(12)], axis=1), in_memory.reduced(12).values
    )
    source = FileSource(scene, None)
    asked = []
    read = source.read
    monkeypatch.setattr(
        source, "read", lambda bands, *place: (asked.append(list(bands)), read(bands, *place))[1]
    )
    save_quicklook(tmp_path / "a.png", source, embedding, "sentinel2")
    source.close()
    assert asked
    assert all(sorted(bands) == ["B2", "B3", "B4"] for bands in asked)


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
        file.scales, file.offsets = (0.0001,) * 12, (-0.1,) * 12
    with pytest.warns(UserWarning, match="declares scales and offsets"):
        embed_raster(model, scaled, level="L2A")


def test_true_colour_follows_the_images_own_sensor(scene: Path, tmp_path: Path) -> None:
    from geofm.raster.picture import _true_colour

    with rasterio.open(scene) as source:
        image = read_image(scene, [f"SR_B{i}" for i in range(1, 13)])
        red, green, blue = source.read([3, 2, 1])
    title, colour = _true_colour(image, "landsat_tm")
    assert title == "true colour"
    for channel, band in enumerate((red, green, blue)):
        assert np.corrcoef(colour[..., channel].ravel(), band.ravel())[0, 1] > 0.8


def test_images_beyond_memory_are_refused_before_they_are_computed(
    model: torch.nn.Module, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geofm.raster.embed._MAX_WINDOW_BYTES", 1e6)
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
    with pytest.raises(geofm.PixelError, match="say others in open_scene"):
        embed_raster(model, scene, level="L1C")
