"""Maps as pictures and pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tracemalloc
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from sklearn.decomposition import PCA

import geofm
from geofm import maps
from geofm.colours import CATEGORIES, OTHER
from geofm.datasets import samples
from geofm.embeddings import segment, similar
from geofm.embeddings.grids import Grid
from geofm.maps.commands import run_picture, run_segment, run_similar
from geofm.maps.layers import stretched
from geofm.maps.place import extent_text, scale_bar
from geofm.raster import Embedding, RasterImage, write_embedding
from geofm.raster.sources import ImageSource

HOSTILE = "<script>alert(1)</script>\"'&<img src=https://example.org/x onerror=alert(2)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene, and means of its bands in cells of 8 px as if they were its embedding."""
    folder = tmp_path_factory.mktemp("pictures")
    scene = samples.landscape((96, 128), seed=3)
    samples.write_scene(folder / "scene.tif", scene)
    with rasterio.open(folder / "scene.tif") as file:
        pixels, place, crs = file.read().astype(np.float32), file.transform, file.crs.to_wkt()
    cells = pixels.reshape(12, 12, 8, 16, 8).mean(axis=(2, 4))
    cells[:, 0, 0] = np.nan
    tags = {"GEOFM_WEIGHTS": "untrained (random initialisation)", "GEOFM_SOURCE": HOSTILE}
    transform = tuple(place @ rasterio.Affine.scale(8))[:6]
    write_embedding(folder / "e.tif", Embedding(cells, transform, crs, 8, 0.0, tags))
    return folder


def options(folder: Path, output: Path, **changes: Any) -> Namespace:
    given = {
        "embeddings": folder / "e.tif",
        "input": folder / "e.tif",
        "output": output,
        "image": folder / "scene.tif",
        "bands": None,
        "sensor": None,
        "title": None,
        "attribution": None,
        "classes": 4,
        "seed": 0,
        "top": 5,
        "at": place(folder),
    }
    return Namespace(**{**given, **changes})


def place(folder: Path) -> str:
    west, south, east, north = geofm.embeddings.read_embeddings(folder / "e.tif").grid.extent()
    return f"{(west + east) / 2:.6f},{(south + north) / 2:.6f}"


# --- layers ---------------------------------------------------------------------------------------


def test_components_are_those_of_the_reference_with_fixed_signs(folder: Path) -> None:
    layer = maps.components_layer(folder / "e.tif")
    with rasterio.open(folder / "e.tif") as file:
        cells = file.read().reshape(12, -1).T
    valid = np.isfinite(cells).all(axis=1)
    reference = PCA(3).fit(cells[valid])
    signs = np.sign(reference.components_[np.arange(3), np.abs(reference.components_).argmax(1)])
    expected = reference.transform(cells[valid]) * signs
    shown = layer.pixels.reshape(-1, 4)[valid].astype(float)
    for i in range(3):
        low, high = np.percentile(expected[:, i], (2, 98))
        colours = np.clip((expected[:, i] - low) / (high - low), 0, 1) * 255
        assert np.abs(shown[:, i] - colours).max() <= 2
    assert layer.pixels[0, 0].tolist() == [0, 0, 0, 0]
    assert f"{100 * reference.explained_variance_ratio_[0]:.0f} %" in layer.note


def test_a_large_grid_is_shown_by_every_nth_cell_at_its_place() -> None:
    values = np.arange(90 * 70, dtype=np.float32).reshape(90, 70)
    grid = Grid((1, 90, 70), (10, 0, 100, 0, -10, 900), "EPSG:32632")
    layer = maps.ramp_layer(values, grid, title="v", side=40)
    assert layer.pixels.shape == (30, 24, 4)
    assert layer.grid.transform == (30, 0, 100, 0, -30, 900)


def test_classes_keep_their_colours_and_names_and_the_rare_are_others() -> None:
    values = np.repeat(np.arange(30), np.arange(30)).reshape(1, -1)
    grid = Grid((1, 1, values.size), (10, 0, 0, 0, -10, 0), None)
    layer = maps.class_layer(values, grid, title="c", names={29: "Fagus sylvatica"}, most=9)
    assert [e.label for e in layer.entries[:2]] == ["Fagus sylvatica", "class 28"]
    assert layer.entries[-1].label == "20 others"
    assert sum(e.share or 0 for e in layer.entries) == pytest.approx(1)
    assert layer.pixels[0, -1].tolist() == [*CATEGORIES[0], 255]
    assert layer.pixels[0, 0].tolist() == [*OTHER, 255]
    assert len({e.colour for e in layer.entries}) == 10


def test_colours_of_classes_differ_for_all_kinds_of_colour_vision() -> None:
    # Linear simulations of Vienot et al. 1999: long and middle cones missing.
    rgb = (np.array(CATEGORIES[:9]) / 255) ** 2.2
    to_lms = np.array([[17.88, 43.52, 4.12], [3.46, 27.16, 3.87], [0.03, 0.18, 1.47]])
    for blind in (
        np.eye(3),
        np.array([[0, 2.02, -2.52], [0, 1, 0], [0, 0, 1]]),
        np.array([[1, 0, 0], [0.49, 0, 1.25], [0, 0, 1]]),
    ):
        seen = np.clip(rgb @ (np.linalg.inv(to_lms) @ blind @ to_lms).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(9)
        assert apart.min() > 0.09


def test_what_embed_raster_returned_is_drawn_too(folder: Path, tmp_path: Path) -> None:
    file = maps.open_layer(folder / "e.tif")
    with rasterio.open(folder / "e.tif") as opened:
        values, place = opened.read(), tuple(opened.transform)[:6]
        crs = opened.crs.to_wkt()
    memory = Embedding(values, place, crs, 8, 0.0, {})
    kept = Embedding(None, place, crs, 8, 0.0, {}, folder / "e.tif", values.shape)
    for given in (memory, kept, geofm.embeddings.read_embeddings(folder / "e.tif")):
        np.testing.assert_array_equal(maps.open_layer(given).pixels, file.pixels)
    segment(memory, tmp_path / "c.tif", classes=3)
    classes = Embedding(None, place, crs, 8, 0.0, {}, tmp_path / "c.tif", (1, 12, 16))
    assert [e.label for e in maps.open_layer(classes).entries] == [f"class {i}" for i in (1, 2, 3)]
    with pytest.raises(geofm.RasterError, match="class_layer or ramp_layer"):
        maps.open_layer(Embedding(values[:1], place, crs, 8, 0.0, {}))


def written_band(path: Path, values: np.ndarray, **changes: Any) -> Path:
    """A raster of one band."""
    profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype, "tiled": True}
    profile |= {"height": values.shape[0], "width": values.shape[1], "compress": "deflate"}
    with rasterio.open(
        path, "w", **profile, crs="EPSG:32632", transform=rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)
    ) as file:
        file.write(values, 1)
        for name, value in changes.items():
            setattr(file, name, value)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int16"])
def test_masks_and_scales_of_a_band_are_applied(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    scaled = {} if dtype == "uint8" else {"scales": [0.5], "offsets": [3.0]}
    written_band(tmp_path / "m.tif", values, **scaled)
    mask = np.full((3, 4), 255, np.uint8)
    mask[1, 2] = 0
    with rasterio.open(tmp_path / "m.tif", "r+") as file:
        file.write_mask(mask)
    layer = maps.open_layer(tmp_path / "m.tif")
    np.testing.assert_array_equal(layer.pixels[..., 3], mask)
    if scaled:
        assert layer.ramp is not None
        assert layer.ramp.low == pytest.approx(np.percentile(values[mask > 0], 2) * 0.5 + 3)
        assert layer.ramp.high == pytest.approx(np.percentile(values[mask > 0], 98) * 0.5 + 3)
    else:
        assert "class 6" not in [e.label for e in layer.entries]
        assert [e.share for e in layer.entries] == [1 / 11] * 11


def test_bands_larger_than_memory_are_read_in_strips(tmp_path: Path) -> None:
    values = np.full((6000, 6001), 1, np.uint8)
    # Of every sixth row and column, this class is in none.
    values[1000:1003, 1:4] = 2
    values[2004, 2004] = 3
    written_band(tmp_path / "c.tif", values)
    tracemalloc.start()
    try:
        layer = maps.open_layer(tmp_path / "c.tif")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Strips of 3 MB and a picture of 4 MB, some times over; not three times 36 MB of classes.
    assert peak < 50e6
    assert layer.pixels.shape == (1000, 1001, 4)
    assert layer.grid.shape == (1, 1000, 1001)
    assert layer.ground.shape == (1, 6000, 6001)
    expected = maps.class_layer(values, layer.ground, title="c", nodata=None)
    np.testing.assert_array_equal(layer.pixels, expected.pixels)
    assert [e.share for e in layer.entries] == [
        pytest.approx(count / values.size) for count in (values.size - 10, 9, 1)
    ]


def test_of_every_nth_row_beyond_a_strip_only_that_row_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(1300 * 3).reshape(1, 1300, 3) % 255
    image = RasterImage(np.ma.masked_array(values), ("B4",), (10, 0, 0, 0, -10, 0), None)
    heights = []

    def read(self: Any, bands: Any, top: int, left: int, high: int, wide: int) -> Any:
        heights.append(high)
        return image.pixels[:, top : top + high, left : left + wide]

    monkeypatch.setattr(ImageSource, "read", read)
    layer = maps.true_colour_layer(image, side=2)
    assert heights == [1, 1]
    assert layer.pixels.shape == (2, 1, 4)
    expected = stretched(np.repeat(values[:, ::650, ::650].astype(np.float32), 3, axis=0))
    np.testing.assert_array_equal(layer.pixels, expected)
    heights.clear()
    assert maps.true_colour_layer(image, side=100).pixels.shape == (100, 1, 4)
    assert max(heights) > 400


@pytest.mark.parametrize("text", ["5", '{"forest": 1}', "forest", "null"])
def test_names_of_classes_that_are_no_list_are_told_so(tmp_path: Path, text: str) -> None:
    path = written_band(tmp_path / "c.tif", np.ones((3, 4), np.uint8))
    with rasterio.open(path, "r+") as file:
        file.update_tags(GEOFM_CLASSES=text)
    with pytest.raises(geofm.RasterError, match="JSON list of names"):
        maps.open_layer(path)


def test_a_map_of_coarse_cells_lies_where_the_image_has_them(folder: Path) -> None:
    base = maps.true_colour_layer(folder / "scene.tif")
    layer = maps.components_layer(folder / "e.tif")
    np.testing.assert_array_equal(
        layer.onto(base.grid).pixels, layer.pixels.repeat(8, axis=0).repeat(8, axis=1)
    )
    far = Grid(base.grid.shape, (10, 0, 0, 0, -10, 0), base.grid.crs)
    with pytest.raises(geofm.RasterError, match="do not overlap"):
        layer.onto(far)
    other = Grid(base.grid.shape, base.grid.transform, "EPSG:3857")
    with pytest.raises(geofm.RasterError, match="different coordinate reference"):
        layer.onto(other)


def test_class_maps_are_drawn_in_their_files_colours_and_names(
    folder: Path, tmp_path: Path
) -> None:
    found = segment(folder / "e.tif", tmp_path / "c.tif", classes=4)
    layer = maps.open_layer(tmp_path / "c.tif")
    assert [e.label for e in layer.entries] == [f"class {i}" for i in range(1, 5)]
    assert [e.colour for e in layer.entries] == list(CATEGORIES[:4])
    assert [e.share for e in layer.entries] == pytest.approx(np.array(found.sizes) / 191)
    assert layer.pixels[0, 0, 3] == 0
    similar(folder / "e.tif", vector=np.ones(12), output=tmp_path / "s.tif")
    assert maps.open_layer(tmp_path / "s.tif").ramp is not None


@pytest.mark.parametrize(
    ("crs", "place", "wide"),
    [
        # At 60° north, in metres of the zone.
        ("EPSG:32632", (10.0, 5e5, 6651832.0), 2000),
        # There a degree of longitude is half as long, and so are the metres of Web Mercator.
        ("EPSG:4326", (0.001, 10.0, 60.05), 0.2 * 111195 / 2),
        ("EPSG:3857", (10.0, 1e6, 8400238.0), 1000),
        # US feet.
        ("EPSG:2263", (10.0, 9.8e5, 2e5), 2000 * 0.3048),
        # Twice around the middle of the globe is no way between two ends.
        ("EPSG:4326", (1.8, -180.0, 90.0), 40_030_000),
    ],
)
def test_the_scale_is_a_round_length_on_the_ground(
    crs: str, place: tuple[float, float, float], wide: float
) -> None:
    cell, left, top = place
    found = scale_bar(Grid((1, 100, 200), (cell, 0, left, 0, -cell, top), crs))
    assert found is not None
    share, text = found
    metres = float(text.split()[0]) * (1000 if "km" in text else 1)
    # Of a sphere.
    assert share == pytest.approx(metres / wide, rel=5e-3)
    assert 0.12 <= share <= 0.3


def test_there_is_no_scale_where_metres_are_not_known(tmp_path: Path) -> None:
    for crs, says in [
        (None, "No coordinate reference system."),
        ('LOCAL_CS["site",UNIT["span",0.2]]', "without longitude and latitude"),
    ]:
        grid = Grid((1, 10, 20), (1, 0, 10, 0, -1, 60.0), crs)
        assert scale_bar(grid) is None
        assert says in extent_text(grid)
        layer = maps.class_layer(np.ones((10, 20), int), grid, title="c")
        maps.write_png(tmp_path / "p.png", layer, layer)
        maps.write_page(tmp_path / "p.html", layer, layer)
        assert says in (tmp_path / "p.html").read_text()


def test_the_extent_is_that_of_all_cells_of_a_thinned_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every third of 90 x 70: the last pixels reach two columns further.
    grid = Grid((1, 90, 70), (1000, 0, 4e5, 0, -1000, 5.4e6), "EPSG:32632")
    values = np.arange(6300).reshape(90, 70)
    image = RasterImage(
        np.ma.masked_array(np.stack([values] * 3)), ("B4", "B3", "B2"), grid.transform, grid.crs
    )
    base = maps.true_colour_layer(image, side=40)
    asked = []
    monkeypatch.setitem(maps.write_png.__globals__, "extent_text", lambda g: asked.append(g) or "")
    for layer in (
        maps.ramp_layer(values, grid, title="v", side=40),
        maps.class_layer(values > 9, grid, title="v", nodata=None, side=40),
        maps.components_layer(
            Embedding(np.stack([values, values**2]), grid.transform, grid.crs, 1, 0.0, {}), side=40
        ),
    ):
        assert layer.grid.shape[1:] == (30, 24)
        maps.write_png(tmp_path / "p.png", layer)
        maps.write_png(tmp_path / "p.png", layer, base)
        maps.write_page(tmp_path / "p.html", layer, base)
        assert extent_text(grid) in (tmp_path / "p.html").read_text()
    assert {(g.transform, g.shape[1:]) for g in asked} == {(grid.transform, (90, 70))}


def test_longitudes_of_an_extent_are_of_one_turn() -> None:
    text = extent_text(Grid((1, 10, 20), (1000, 0, 660e3, 0, -1000, 6.6e6), "EPSG:32660"))
    assert re.search(r"179\.\d+° E to 179\.\d+° W", text)
    globe = Grid((1, 180, 360), (1, 0, -180, 0, -1, 90), "EPSG:4326")
    assert "180.000° W to 180.000° E" in extent_text(globe)


# --- PNG ------------------------------------------------------------------------------------------


def test_pngs_are_the_same_each_time_and_hold_the_map(folder: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        run_similar(options(folder, tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    # Two panels of 5 inches and margins, at 150 dots an inch.
    assert image.shape[1] == pytest.approx(1590, abs=2)
    at = [float(v) for v in place(folder).split(",")]
    found = similar(folder / "e.tif", at, with_map=True)
    np.testing.assert_array_equal(
        cells_of(image, 5.4), shown(maps.ramp_layer(found.map, found.grid, title="s"))
    )
    run_picture(options(folder, tmp_path / "c.png", image=None, attribution="$x_1$ & <b>"))
    image = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert image.shape[1] < 900
    np.testing.assert_array_equal(cells_of(image, 0.2), shown(maps.open_layer(folder / "e.tif")))


def cells_of(image: np.ndarray, left: float) -> np.ndarray:
    """Colours at the centres of the 12 x 16 cells of a panel that begins some inches right."""
    # Below a margin of 0.2 inches and a title of 0.25; 5 inches wide.
    row = 150 * (0.45 + 5 / 16 * (np.arange(12) + 0.5))
    column = 150 * (left + 5 / 16 * (np.arange(16) + 0.5))
    return image[row.astype(int)][:, column.astype(int)]


def shown(layer: maps.Layer) -> np.ndarray:
    """Colours of a layer, grey where there is no data."""
    return np.where(layer.pixels[..., 3:] == 0, 0xDD, layer.pixels[..., :3])


def test_a_picture_that_cannot_be_written_is_told_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").mkdir()
    with pytest.raises(geofm.RasterError, match=r"cannot write .*p\.png"):
        maps.write_png(tmp_path / "p.png", maps.open_layer(folder / "e.tif"))
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_no_picture_overwrites_what_it_shows(folder: Path, tmp_path: Path) -> None:
    grey, colour = tmp_path / "grey.png", tmp_path / "colour.png"
    draws = np.random.default_rng(0)
    Image.fromarray(draws.integers(1, 9, (12, 16), np.uint8)).save(grey)
    Image.fromarray(draws.integers(1, 9, (12, 16, 3), np.uint8)).save(colour)
    before = {path: path.read_bytes() for path in (grey, colour, folder / "e.tif")}
    given = {"image": colour, "bands": "B4,B3,B2"}
    for run, output, changes in [
        (run_picture, grey, {"input": grey, "image": None}),
        (run_picture, colour, {"input": grey, **given}),
        (run_similar, colour, given),
        (run_segment, colour, given),
        (run_similar, folder / "e.tif", {"image": None}),
        (run_segment, folder / "e.tif", {"image": None}),
    ]:
        with pytest.raises(geofm.RasterError, match="would overwrite the input"):
            run(options(folder, output, **changes))
    layer, base = maps.open_layer(grey), maps.true_colour_layer(colour, ["B4", "B3", "B2"])
    for path in (grey, colour):
        with pytest.raises(geofm.RasterError, match="would overwrite the input"):
            maps.write_picture(path, layer, base)
    components = maps.open_layer(colour)
    with pytest.raises(geofm.RasterError, match="would overwrite the input"):
        maps.write_picture(colour, components)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (1, 1)])
def test_strips_and_single_cells_have_pictures_too(shape: tuple[int, int], tmp_path: Path) -> None:
    grid = Grid((1, *shape), (10, 0, 4e5, 0, -10, 5.4e6), "EPSG:32632")
    layer = maps.class_layer(np.ones(shape, int), grid, title="t" * 200)
    maps.write_png(tmp_path / "p.png", layer, layer)
    width, height = Image.open(tmp_path / "p.png").size
    assert max(width, height) < 2200


def test_untrained_weights_are_told_in_every_picture(folder: Path) -> None:
    from geofm.maps.place import origin_text

    assert "UNTRAINED WEIGHTS" in origin_text(maps.open_layer(folder / "e.tif").grid)


# --- pages ----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_nothing_and_takes_no_text_for_html(folder: Path, tmp_path: Path) -> None:
    values = np.ones((12, 16), int)
    grid = maps.open_layer(folder / "e.tif").grid
    layer = maps.class_layer(values, grid, title=HOSTILE, names={1: HOSTILE})
    base = maps.true_colour_layer(folder / "scene.tif")
    maps.write_page(tmp_path / "p.html", layer, base, title=HOSTILE, attribution=HOSTILE)
    page = Tags((tmp_path / "p.html").read_text())
    assert [tag for tag, _ in page.found].count("script") == 1
    assert page.text.count(HOSTILE) >= 5
    for tag, attributes in page.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or not (
            attributes.get("src")
        )
        assert "href" not in attributes, tag
    policy = next(a["content"] for t, a in page.found if a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_page_without_an_image_to_compare_with_is_refused_before_any_work(
    folder: Path, tmp_path: Path
) -> None:
    for run in (run_similar, run_segment, run_picture):
        with pytest.raises(geofm.RasterError, match="--image"):
            run(options(folder, tmp_path / "p.html", image=None))
        with pytest.raises(geofm.RasterError, match="one of"):
            run(options(folder, tmp_path / "p.jpg"))
    with pytest.raises(geofm.RasterError, match="longitude,latitude"):
        run_similar(options(folder, tmp_path / "p.html", at="9.8"))
    assert not any(tmp_path.iterdir())


def test_options_of_pictures_without_a_picture_are_errors(folder: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "x.tif", None):
        for name in ("image", "bands", "sensor", "attribution"):
            given = {"image": None, name: "scene.tif"}
            for run in (run_similar, run_segment):
                with pytest.raises(geofm.RasterError, match=f"--{name}: only for pictures"):
                    run(options(folder, output, **given))
    for run in (run_similar, run_segment, run_picture):
        with pytest.raises(geofm.RasterError, match="--bands, --sensor: of the image"):
            run(options(folder, tmp_path / "x.png", image=None, bands="B4", sensor="sentinel2"))
    assert not any(tmp_path.iterdir())


def test_names_of_bands_may_have_spaces_between_them(folder: Path, tmp_path: Path) -> None:
    with rasterio.open(folder / "scene.tif") as file:
        names = ", ".join(file.descriptions)
    run_picture(options(folder, tmp_path / "p.html", bands=names))
    assert "true colour" in (tmp_path / "p.html").read_text()


def browse(page: Path, place: str, *words: str, size: str = "1000,1000") -> bytes:
    """What headless Chromium prints of a page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here: pages are not looked at in a browser")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size}"]
    done = subprocess.run(
        [*command, *words, page.as_uri() + place], capture_output=True, timeout=120, check=True
    )
    return done.stdout


def shot(page: Path, place: str, size: str = "1000,1000") -> np.ndarray:
    target = page.with_suffix(".png")
    target.unlink(missing_ok=True)
    browse(page, place, f"--screenshot={target}", size=size)
    return np.asarray(Image.open(target).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def pages(folder: Path) -> Path:
    """A page with a red result over the scene."""
    grid = maps.open_layer(folder / "e.tif").grid
    names, colours = {1: HOSTILE}, {1: (255, 0, 0)}
    values = np.ones((12, 16), int)
    layer = maps.class_layer(values, grid, title="all red", names=names, colours=colours)
    base = maps.true_colour_layer(folder / "scene.tif")
    maps.write_page(folder / "page.html", layer, base, attribution=HOSTILE)
    return folder / "page.html"


@pytest.mark.parametrize("width", [1000, 390])
def test_the_slider_moves_between_the_image_and_the_map_in_a_browser(
    pages: Path, width: int
) -> None:
    def red(place: str) -> float:
        pixels = shot(pages, place, f"{width},900")
        is_red = (pixels[..., 0] > 250) & (pixels[..., 1] < 5) & (pixels[..., 2] < 5)
        # The picture begins below the heading.
        return float(is_red[120].sum() / (pixels.shape[1] - 32))

    picture = 1.0 if width == 390 else 928 / 968
    assert red("#position=0.25") == pytest.approx(0.75 * picture, abs=0.03)
    assert red("#position=0.8") == pytest.approx(0.2 * picture, abs=0.03)
    assert red("#position=nonsense") == pytest.approx(0.5 * picture, abs=0.03)


def test_the_script_runs_and_hostile_text_does_not(pages: Path) -> None:
    text = browse(pages, "#position=0.3", "--dump-dom").decode()
    page = Tags(text)
    assert page.found[0] == ("html", {"lang": "en", "class": "js"})
    slider = next(a for t, a in page.found if t == "input")
    assert slider["aria-valuetext"] == "30 %"
    assert slider["type"] == "range"
    assert [t for t, _ in page.found].count("script") == 1
    assert re.search(r"&lt;script&gt;alert", text)


def test_without_javascript_both_images_are_seen(pages: Path) -> None:
    plain = pages.with_name("plain.html")
    plain.write_text(re.sub(r"<script>.*?</script>", "", pages.read_text(), flags=re.S))
    pixels = shot(plain, "")
    red = (pixels[..., 0] > 250) & (pixels[..., 1] < 5) & (pixels[..., 2] < 5)
    left, right = red[120:200, :480], red[120:200, 520:]
    assert left.mean() < 0.05
    assert right.mean() > 0.8
    assert len(np.unique(pixels[120:200, 60:440].reshape(-1, 3), axis=0)) > 100


# --- images from elsewhere ------------------------------------------------------------------------


def test_an_image_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent\.tif"):
        maps.true_colour_layer(tmp_path / "absent.tif")


def test_a_picture_needs_no_grids_that_nest(tmp_path: Path) -> None:
    for name, size, metres in (("B02", 16, 10), ("B03", 16, 10), ("B04", 16, 10), ("B05", 8, 20)):
        shift = (metres - 10) / 2
        with rasterio.open(
            tmp_path / f"{name}.tif",
            "w",
            driver="GTiff",
            width=size,
            height=size,
            count=1,
            dtype="uint16",
            crs="EPSG:32631",
            transform=rasterio.Affine(metres, 0, 4e5 - shift, 0, -metres, 5e6 + shift),
        ) as file:
            file.write(np.arange(size * size, dtype=np.uint16).reshape(1, size, size) + 500)
    with pytest.raises(geofm.RasterError, match="do not nest"):
        geofm.open_scene(tmp_path)
    assert maps.true_colour_layer(tmp_path).title == "true colour"


def test_damaged_files_are_named_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "classes.tif"
    profile = {
        "driver": "GTiff",
        "width": 64,
        "height": 64,
        "dtype": "uint8",
        "compress": "deflate",
    }
    # A map of classes, and components.
    for count in (1, 3):
        with rasterio.open(path, "w", **profile, count=count) as file:
            file.write(np.random.default_rng(0).integers(0, 9, (count, 64, 64)).astype(np.uint8))
        with rasterio.open(path) as file:
            begin = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
        content = bytearray(path.read_bytes())
        content[begin : begin + 16] = b"\xff" * 16
        path.write_bytes(content)
        with pytest.raises(geofm.RasterError, match=r"classes\.tif cannot be read") as refused:
            maps.open_layer(path)
        assert "previous exception" not in str(refused.value)
