"""Layers of files: an image in true colour; an embedding, classes or values of a map."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geofm.embeddings.files import TABLES
from geofm.embeddings.grids import Floats, Grid
from geofm.errors import DataNotFoundError, RasterError
from geofm.maps.layers import (
    SIDE,
    Layer,
    class_layer,
    components_layer,
    ramp_layer,
    stretched,
)
from geofm.maps.page import write_page
from geofm.maps.png import write_png
from geofm.raster.grids import decoded
from geofm.raster.sources import SceneSource, Source, SourceLike, open_source, rasterio_module
from geofm.spectral import match_bands

__all__ = ["open_layer", "true_colour_layer", "write_picture"]


def open_layer(path: str | os.PathLike[str], *, title: str | None = None) -> Layer:
    """What a file shows.

    Args:
        path: Embeddings (components); a raster with one band of integers (classes, with the names
            of its tag ``GEOFM_CLASSES`` and its colour table), or of floats (values).
        title: None for what the file says.

    Returns:
        The layer.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It cannot be read, or no cell has data.
        MissingExtraError: rasterio, pyarrow or zarr is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise DataNotFoundError(f"there is no {path}")
    if path.suffix in (*TABLES, ".zarr"):
        return _titled(components_layer(path), title)
    rasterio = rasterio_module()
    try:
        with rasterio.open(path) as file:
            if file.count > 1:
                return _titled(components_layer(path), title)
            shape = (1, file.height, file.width)
            crs = file.crs.to_wkt() if file.crs else None
            grid = Grid(shape, tuple(file.transform)[:6], crs, file.tags())
            shown = title or file.descriptions[0] or path.stem
            values = file.read(1)
            if values.dtype.kind in "iu" and file.scales == (1.0,) and file.offsets == (0.0,):
                colours = _colour_table(file)
                return class_layer(
                    values,
                    grid,
                    title=shown,
                    nodata=file.nodata,
                    names=_class_names(grid.tags),
                    colours=colours,
                )
            floats = decoded(values[None], file.nodata, file.scales, file.offsets)[0]
            if values.dtype.kind == "f" and file.nodata is not None:
                floats[values == file.nodata] = np.nan
            return ramp_layer(floats, grid, title=shown)
    except rasterio.errors.RasterioError as error:
        raise RasterError(f"{path} cannot be read: {error}") from error


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
        RasterError: It cannot be read.
        MissingExtraError: rasterio is not installed.
    """
    source = open_source(image, bands)
    try:
        if isinstance(source, SceneSource):
            sensor = source.scene.sensor
        found = match_bands(
            ["red", "green", "blue"], source.bands, wanted_sensor=sensor, available_sensor=sensor
        )
        names = [source.bands[match.index] for match in found if match.index is not None]
        title = "true colour"
        if len(names) < 3:
            names, title = [source.bands[0]], f"band {source.bands[0]}"
        layers, grid = _every_nth(source, names, side)
    finally:
        source.close()
    if len(layers) == 1:
        layers = np.repeat(layers, 3, axis=0)
    return Layer(title, stretched(layers), grid)


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
        RasterError: The name is of another kind, or it cannot be written.
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


def _class_names(tags: Mapping[str, str]) -> dict[int, str]:
    """Names from 0 on: a JSON list, or divided by commas as `geofm.predict_raster` writes them."""
    text = tags.get("GEOFM_CLASSES", "")
    if not text:
        return {}
    if text.startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise RasterError(f"the tag GEOFM_CLASSES is no list of names: {error}") from error
    else:
        names = text.split(",")
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
    """Some bands with fewer pixels, strip by strip, NaN for no data."""
    step = math.ceil(max(source.height, source.width) / side)
    # Whole tiles of a file at a time, so that none is decoded twice.
    height = max(1, 512 // step) * step
    strips = []
    for top in range(0, source.height, height):
        stored = source.read(names, top, 0, min(height, source.height - top), source.width)
        strips.append(np.ma.filled(stored[:, ::step, ::step].astype(np.float32), np.nan))
    pixels = np.concatenate(strips, axis=1)
    a, b, c, d, e, f = source.transform
    tags = {"GEOFM_SOURCE": source.name} | ({"GEOFM_DATE": source.date} if source.date else {})
    transform = (a * step, b * step, c, d * step, e * step, f)
    return pixels, Grid((3, *pixels.shape[1:]), transform, source.crs, tags)
