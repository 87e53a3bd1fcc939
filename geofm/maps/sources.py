"""Layers of files: an image in true colour; an embedding, classes or values of a map."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geofm.embeddings.files import TABLES, EmbeddingsLike, lasting_tags
from geofm.embeddings.grids import Embeddings, Floats, Grid
from geofm.errors import DataNotFoundError, RasterError
from geofm.maps.layers import (
    SIDE,
    Layer,
    NoDataError,
    class_counts,
    class_layer,
    components_layer,
    ramp_layer,
    stretched,
    thinned,
)
from geofm.maps.page import write_page
from geofm.maps.png import write_png
from geofm.raster.cog import CACHE_BYTES
from geofm.raster.grids import Embedding, decoded
from geofm.raster.sources import (
    FileSource,
    RasterImage,
    Said,
    SceneSource,
    Source,
    SourceLike,
    open_source,
    rasterio_module,
)
from geofm.scenes.files import unreadable
from geofm.spectral import match_bands

__all__ = ["draw_embedding", "open_layer", "true_colour_layer", "write_picture"]

# Rows that are read together: whole tiles of most files, so that none is decoded twice.
_STRIP = 512
# Columns that are read together: not all of a very wide image.
_WIDE = 8192


def open_layer(source: EmbeddingsLike, *, title: str | None = None) -> Layer:
    """What a file shows, or what a run gave back.

    Args:
        source: Embeddings (components), as in `geofm.embeddings.read_embeddings`; a raster with one
            band of integers (classes, with the names of its tag ``GEOFM_CLASSES`` and its colour
            table), or of floats (values).
        title: None for what the file says.

    Returns:
        The layer.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read, no cell has data, or it is in memory and has one band, of
            which nothing says whether it is classes or values.
        MissingExtraError: rasterio, pyarrow or zarr is not installed.
    """
    if isinstance(source, Embedding) and source.path is not None:
        source = source.path
    if isinstance(source, Embedding) and source.shape[0] == 1:
        raise RasterError(
            "a grid of one band in memory may be classes or values; draw its values[0] with "
            "class_layer or ramp_layer, or give an output file and open that"
        )
    if isinstance(source, Embedding | Embeddings):
        return _titled(components_layer(source), title)
    path = Path(source)
    if not path.exists():
        raise DataNotFoundError(f"there is no {path}")
    if path.suffix in (*TABLES, ".zarr"):
        return _titled(components_layer(path), title)
    rasterio = rasterio_module()
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), rasterio.open(path) as file:
            if file.count == 1:
                layer = _band_layer(file, title or file.descriptions[0] or path.stem)
                return replace(layer, files=(path,))
    except rasterio.errors.RasterioError as error:
        raise unreadable(str(path), error) from error
    return _titled(components_layer(path), title)


def true_colour_layer(
    image: SourceLike,
    bands: Sequence[str] | None = None,
    *,
    sensor: str = "sentinel2",
    side: int = SIDE,
) -> Layer:
    """An image in true colour; its first band in grey, and called so, where a colour is missing.

    Args:
        image: As in `geofm.embed_raster`.
        bands: As in `geofm.embed_raster`.
        sensor: Whose names the bands are; a scene knows its own.
        side: Pixels along the longer side, at most.

    Returns:
        The layer.

    Raises:
        BandError: The bands are not named.
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read.
        MissingExtraError: rasterio is not installed.
    """
    named = isinstance(image, RasterImage | str | os.PathLike | Mapping)
    # A picture needs neither the pixels' level nor grids that nest.
    said = Said(sensor=sensor if named else None, strict=False)
    source = open_source(image, bands, said=said)
    try:
        return _image_layer(source, sensor, side)
    finally:
        source.close()


def draw_embedding(
    path: str | os.PathLike[str], source: Source, embedding: Embedding, sensor: str
) -> None:
    """Write what `geofm.embed_raster` shows of its result: the image beside its components.

    Args:
        path: PNG to write.
        source: The image, which stays open.
        embedding: Its embedding.
        sensor: As in `true_colour_layer`.

    Raises:
        RasterError: It cannot be written, or the embedding cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        if embedding.path is None and embedding.shape[0] == 1:
            whole = Grid(embedding.shape, embedding.transform, embedding.crs, embedding.tags)
            layer = ramp_layer(embedding.values[0], whole, title="component 1")
        else:
            layer = open_layer(embedding)
    except NoDataError:
        grid, _ = thinned(
            Grid(embedding.shape, embedding.transform, embedding.crs, embedding.tags), SIDE
        )
        layer = Layer("no cell has data", np.zeros((*grid.shape[1:], 4), np.uint8), grid)
    # It is the image's own; as a file tells it, its words may be others.
    layer = replace(layer, grid=replace(layer.grid, crs=source.crs))
    write_png(path, layer, _image_layer(source, sensor, SIDE))


def _image_layer(source: Source, sensor: str, side: int) -> Layer:
    """As `true_colour_layer`, of an image that is open."""
    if isinstance(source, SceneSource):
        sensor = source.scene.sensor
    found = match_bands(
        ["red", "green", "blue"], source.bands, wanted_sensor=sensor, available_sensor=sensor
    )
    names = [source.bands[match.index] for match in found if match.index is not None]
    title = "true colour"
    if len(names) < 3:
        names, title = [source.bands[0]], f"band {source.bands[0]}"
    layers, whole = _every_nth(source, names, side)
    if len(layers) == 1:
        layers = np.repeat(layers, 3, axis=0)
    grid, _ = thinned(whole, side)
    return Layer(title, stretched(layers), grid, whole=whole, files=_files(source))


def write_picture(
    output: str | os.PathLike[str],
    layer: Layer,
    base: Layer | None = None,
    *,
    title: str | None = None,
    attribution: str = "",
) -> Path:
    """Write a layer as PNG or as a page, by the output's name.

    Args:
        output: ``.png`` or ``.html``.
        layer: What to show.
        base: What to show beside it; a page needs one.
        title: As in `write_png`.
        attribution: As in `write_png`.

    Returns:
        The output.

    Raises:
        RasterError: The name is of another kind, it is what is shown, or it cannot be written.
        MissingExtraError: matplotlib or Pillow is not installed.
    """
    path = Path(output)
    if path.suffix == ".png":
        write_png(path, layer, base, title=title, attribution=attribution)
    elif path.suffix == ".html":
        if base is None:
            raise RasterError("a page compares two images; name the image that was embedded")
        write_page(path, layer, base, title=title, attribution=attribution)
    else:
        raise RasterError(f"a picture is a .png or a .html, got {path.name}")
    return path


def _titled(layer: Layer, title: str | None) -> Layer:
    return layer if title is None else replace(layer, title=title)


def _band_layer(file: Any, title: str) -> Layer:
    """The only band of a raster, strip by strip: all of it may be too large for memory."""
    shape = (1, file.height, file.width)
    crs = file.crs.to_wkt() if file.crs else None
    whole = Grid(shape, tuple(file.transform)[:6], crs, lasting_tags(file.tags()))
    grid, step = thinned(whole, SIDE)
    plain = file.scales == (1.0,) and file.offsets == (0.0,)
    classes = plain and np.dtype(file.dtypes[0]).kind in "iu"
    counts: Counter[int] = Counter()
    strips = []
    for top in range(0, file.height, _STRIP):
        height = min(_STRIP, file.height - top)
        window = rasterio_module().windows.Window(0, top, file.width, height)
        strip = file.read(1, window=window, masked=True)
        if classes:
            # Shares are those of all cells, also of those that are not shown.
            counts.update(class_counts(strip, None))
        # A copy, so that the strip is freed.
        strips.append(strip[-top % step :: step, ::step].copy())
    stored = np.ma.concatenate(strips)  # type: ignore[no-untyped-call]
    if classes:
        layer = class_layer(
            stored,
            grid,
            title=title,
            nodata=None,
            names=_class_names(grid.tags),
            colours=_colour_table(file),
            counts=counts,
        )
    else:
        values = decoded(stored[np.newaxis], None, file.scales, file.offsets)[0]
        layer = ramp_layer(values, grid, title=title)
    return replace(layer, whole=whole)


def _files(source: Source) -> tuple[Path, ...]:
    """What an image is read from."""
    if isinstance(source, SceneSource):
        return tuple(Path(path) for path in source.files)
    return (Path(source.path),) if isinstance(source, FileSource) else ()


def _class_names(tags: Mapping[str, str]) -> dict[int, str]:
    """Names from 0 on."""
    text = tags.get("GEOFM_CLASSES")
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list):
        raise RasterError(
            f'the tag GEOFM_CLASSES must be a JSON list of names, like ["no data", "forest"]; got '
            f"{text!r}"
        )
    return {number: str(name) for number, name in enumerate(names)}


def _colour_table(file: Any) -> dict[int, tuple[int, int, int]]:
    """Colours of a file's values. TIFF has all 256 of a byte; black are those nobody chose."""
    try:
        table = file.colormap(1)
    except ValueError:
        # It has none.
        return {}
    return {value: colour[:3] for value, colour in table.items() if any(colour[:3])}


def _every_nth(source: Source, names: Sequence[str], side: int) -> tuple[Floats, Grid]:
    """Every n-th pixel of some bands, part by part, NaN for no data; and the grid of all."""
    step = math.ceil(max(source.height, source.width) / side)
    # Of larger steps, single rows are enough.
    height, every = (1, step) if step > _STRIP else (_STRIP // step * step,) * 2
    width = max(1, _WIDE // step) * step
    strips = []
    for top in range(0, source.height, every):
        high = min(height, source.height - top)
        parts = []
        for left in range(0, source.width, width):
            stored = source.read(names, top, left, high, min(width, source.width - left))
            parts.append(np.ma.filled(stored[:, ::step, ::step].astype(np.float32), np.nan))
        strips.append(np.concatenate(parts, axis=2))
    pixels = np.concatenate(strips, axis=1)
    tags = {"GEOFM_SOURCE": source.name} | ({"GEOFM_DATE": source.date} if source.date else {})
    whole = Grid((3, source.height, source.width), source.transform, source.crs, tags)
    return pixels, whole
