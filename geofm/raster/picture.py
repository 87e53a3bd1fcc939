"""Pictures: an image beside its embedding, and principal components."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import MissingExtraError
from geofm.raster.codecs import fit_projection
from geofm.raster.cog import written
from geofm.raster.grids import Embedding
from geofm.raster.sources import Coefficients, RasterImage, Source
from geofm.spectral import match_bands

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["principal_components", "quicklook", "save_quicklook", "thumbnail"]

# Longer side of an image in a picture, in px.
_SIDE = 1024
# Longer side of the grid from which a picture's components are fitted, in cells.
_SAMPLE_SIDE = 256


def principal_components(values: NDArray[np.float32], components: int = 3) -> NDArray[np.float32]:
    """Project a grid of embeddings on its first principal components.

    Args:
        values: (channels, rows, columns); cells with NaN are left out.
        components: How many.

    Returns:
        (components, rows, columns), NaN where the input is and where there are fewer components;
        each component's sign is such that its largest loading is positive.
    """
    cells = values.reshape(len(values), -1).T
    cells = cells[np.isfinite(cells).all(axis=1)]
    return _projected(cells, [values], components)


def _projected(
    cells: NDArray[np.float32], strips: Iterable[NDArray[np.float32]], components: int
) -> NDArray[np.float32]:
    """Principal components of cells, (n, channels), as a map of strips."""
    count = min(components, *cells.shape)
    fitted = fit_projection(cells, count) if count else None
    rows = []
    for strip in strips:
        out = np.full((components, *strip.shape[1:]), np.nan, np.float32)
        if fitted is not None:
            # NaN in one channel is NaN in all components.
            out[:count] = fitted(strip)
        rows.append(out)
    return np.concatenate(rows, axis=1)


def _components(embedding: Embedding, side: int) -> NDArray[np.float32]:
    """Three components of an embedding with fewer cells, fitted to still fewer."""
    sample = embedding.reduced(min(side, _SAMPLE_SIDE)).values
    cells = sample.reshape(len(sample), -1).T
    cells = cells[np.isfinite(cells).all(axis=1)]
    return _projected(cells, embedding.strips(side), 3)


def quicklook(image: RasterImage, embedding: Embedding, sensor: str = "sentinel2") -> Image:
    """A picture of an image beside its embedding.

    Args:
        image: The image.
        embedding: Its embedding.
        sensor: Sensor whose names the image's bands are, for true colour.

    Returns:
        True colour on the left (the first band in grey where red, green or blue is missing), the
        first three principal components as red, green and blue on the right.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image as PILImage
        from PIL import ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow: pip install 'geofm[raster]'") from error

    height, width = image.pixels.shape[-2:]
    scale = max(1, round(480 / max(height, width)))
    size = (width * scale, height * scale)
    nearest = PILImage.Resampling.NEAREST
    left_title, colour = _true_colour(image, sensor)
    left = PILImage.fromarray(colour).resize(size, nearest)
    cells = PILImage.fromarray(_stretch(_components(embedding, _SIDE)))
    # Cells may reach beyond the image, and may begin before it: paste them where they are.
    begin, (right_cell, down_cell) = _place(image, embedding.thinned(_SIDE))
    right = PILImage.new("RGB", size)
    extent = (
        max(1, round(cells.width * right_cell * scale)),
        max(1, round(cells.height * down_cell * scale)),
    )
    right.paste(cells.resize(extent, nearest), (round(begin[0] * scale), round(begin[1] * scale)))
    margin, bar = 8, 28
    canvas = PILImage.new("RGB", (2 * size[0] + 3 * margin, size[1] + bar + 2 * margin), "white")
    canvas.paste(left, (margin, bar + margin))
    canvas.paste(right, (size[0] + 2 * margin, bar + margin))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    draw.text((margin, margin), left_title, fill="black", font=font)
    weights = embedding.tags["GEOFM_WEIGHTS"]
    untrained = weights.startswith("untrained")
    draw.text(
        (size[0] + 2 * margin, margin),
        "UNTRAINED WEIGHTS, principal components 1-3"
        if untrained
        else f"{weights}, principal components 1-3",
        fill="red" if untrained else "black",
        font=font,
    )
    return canvas


def save_quicklook(
    path: str | os.PathLike[str], source: Source, embedding: Embedding, sensor: str
) -> None:
    """Write a picture, complete or not at all; large images are shown reduced.

    Args:
        path: PNG to write.
        source: The image.
        embedding: Its embedding.
        sensor: As in `quicklook`.

    Raises:
        RasterError: It cannot be written.
        MissingExtraError: Pillow is not installed.
    """
    with written(path) as temporary:
        quicklook(thumbnail(source, sensor), embedding, sensor).save(temporary, format="PNG")


def thumbnail(source: Source, sensor: str, side: int = _SIDE) -> RasterImage:
    """What a picture shows of an image, with fewer pixels if it is large: each n-th.

    Args:
        source: The image.
        sensor: Sensor whose names its bands are.
        side: Pixels along its longer side, at most.

    Returns:
        Its red, green and blue, or else its first band, with a georeference to match.
    """
    shown = _shown(source.bands, sensor)
    bands = [source.bands[index] for index in shown] if shown else [source.bands[0]]
    step = math.ceil(max(source.height, source.width) / side)
    # Whole tiles of a file at a time, so that few are decoded twice; and not all of a wide image.
    height, width = (max(1, size // step) * step for size in (512, 8192))
    rows: list[Any] = []
    for top in range(0, source.height, height):
        count = min(height, source.height - top)
        parts = []
        for left in range(0, source.width, width):
            stored = source.read(bands, top, left, count, min(width, source.width - left))
            parts.append(stored[:, ::step, ::step].copy())
        rows.append(np.ma.concatenate(parts, axis=2))  # type: ignore[no-untyped-call]
    a, b, c, d, e, f = source.transform
    transform = (a * step, b * step, c, d * step, e * step, f)
    pixels: Any = np.ma.concatenate(rows, axis=1)  # type: ignore[no-untyped-call]
    return RasterImage(pixels, tuple(bands), transform, source.crs)


def _place(
    image: RasterImage, grid: Coefficients
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where cells begin, and how large they are, in pixels of the image: right, down."""
    a, b, c, d, e, f = image.transform
    area = a * e - b * d
    ga, gb, gc, gd, ge, gf = grid
    x, y = gc - c, gf - f
    begin = ((e * x - b * y) / area, (a * y - d * x) / area)
    return begin, ((e * ga - b * gd) / area, (a * ge - d * gb) / area)


def _shown(bands: Sequence[str], sensor: str) -> list[int]:
    """Places of red, green and blue among bands; none if one of them is missing."""
    found = match_bands(
        ["red", "green", "blue"], bands, wanted_sensor=sensor, available_sensor=sensor
    )
    indices = [match.index for match in found if match.index is not None]
    return indices if len(indices) == 3 else []


def _true_colour(image: RasterImage, sensor: str) -> tuple[str, NDArray[np.uint8]]:
    indices = _shown(image.bands, sensor)
    if indices:
        return "true colour", _stretch(_filled(image.pixels[indices]))
    grey = _filled(image.pixels[:1])
    return f"band {image.bands[0]}", _stretch(np.repeat(grey, 3, axis=0))


def _filled(pixels: np.ma.MaskedArray[Any, Any]) -> NDArray[np.float32]:
    filled: NDArray[np.float32] = np.ma.filled(pixels.astype(np.float32), np.nan)
    return filled


def _stretch(layers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, H, W) to (H, W, 3) bytes, each layer from its 2nd to its 98th percentile; NaN is 0."""
    out = np.zeros((*layers.shape[1:], 3), dtype=np.uint8)
    for i, layer in enumerate(layers):
        valid = np.isfinite(layer)
        if not valid.any():
            continue
        low, high = np.percentile(layer[valid], (2, 98))
        unit = (np.where(valid, layer, low) - low) / max(high - low, 1e-12)
        out[..., i] = np.where(valid, np.clip(unit, 0, 1) * 255, 0).astype(np.uint8)
    return out
