"""Maps as pictures and pages."""

from __future__ import annotations

import re
import shutil
import subprocess
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
from geofm.datasets import samples
from geofm.embeddings import segment, similar
from geofm.embeddings.colours import CATEGORIES, OTHER
from geofm.embeddings.grids import Grid
from geofm.maps.commands import run_picture, run_segment, run_similar
from geofm.maps.place import extent_text, scale_bar
from geofm.raster import Embedding, write_embedding

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
    ("crs", "cell", "expected"),
    [("EPSG:32632", 10.0, "500 m"), ("EPSG:4326", 0.001, "10 km"), (None, 1.0, None)],
)
def test_the_scale_is_a_round_length_on_the_ground(
    crs: str | None, cell: float, expected: str | None
) -> None:
    grid = Grid((1, 100, 200), (cell, 0, 10, 0, -cell, 60.05), crs)
    found = scale_bar(grid)
    if expected is None:
        assert found is None
        assert extent_text(grid) == "No coordinate reference system."
        return
    assert found is not None
    share, text = found
    # At 60° north a degree of longitude is half as long: 200 cells are 11.1 km.
    wide = 2000 if crs == "EPSG:32632" else 0.2 * 111195 / 2
    metres = float(text.split()[0]) * (1000 if "km" in text else 1)
    assert share == pytest.approx(metres / wide, rel=1e-3)
    assert 0.12 <= share <= 0.3


# --- PNG ------------------------------------------------------------------------------------------


def test_pngs_are_the_same_each_time_and_hold_the_map(folder: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        run_similar(options(folder, tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    # Two panels of 5 inches and margins, at 150 dots an inch.
    assert image.shape[1] == pytest.approx(1590, abs=2)
    colours = {tuple(c) for c in image.reshape(-1, 3)[::7].tolist()}
    layer = maps.open_layer(folder / "e.tif")
    run_picture(options(folder, tmp_path / "c.png", image=None, attribution="$x_1$ & <b>"))
    assert Image.open(tmp_path / "c.png").width < 900
    assert len(colours) > 50
    assert layer.ramp is None


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
