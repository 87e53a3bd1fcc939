"""What a picture shows: colours of every pixel, and what they mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.colours import OTHER, colour_of
from geofm.embeddings.files import EmbeddingsLike, read_embeddings
from geofm.embeddings.grids import Embeddings, Grid
from geofm.errors import MissingExtraError, RasterError

__all__ = [
    "SIDE",
    "Entry",
    "Layer",
    "NoDataError",
    "Ramp",
    "class_counts",
    "class_layer",
    "coloured",
    "components_layer",
    "ramp_layer",
    "stretched",
    "thinned",
]

Colour = tuple[int, int, int]
Bytes = NDArray[np.uint8]

SIDE = 1024
"""Longer side of a picture, in pixels, at most: larger grids are shown by every n-th cell."""

# Rows whose classes are counted together: that sorts a copy of them.
_ROWS = 512


class NoDataError(RasterError):
    """There is nothing to show: no cell has data."""


@dataclass(frozen=True)
class Entry:
    """A line of a legend.

    Attributes:
        colour: Red, green, blue.
        label: What it means.
        share: Of the cells that have data; None if it does not apply.
    """

    colour: Colour
    label: str
    share: float | None = None


@dataclass(frozen=True)
class Ramp:
    """A scale of colours.

    Attributes:
        colours: From the lowest to the highest value, (n, 3).
        low: Value of the first colour; what is below has it too.
        high: Value of the last colour.
        label: What the values are.
        beyond: Whether there are values below and above.
    """

    colours: Bytes
    low: float
    high: float
    label: str
    beyond: tuple[bool, bool] = (False, False)

    @property
    def ends(self) -> tuple[str, str]:
        """What to write at both ends."""
        below, above = self.beyond
        return f"{'≤ ' * below}{self.low:.3g}", f"{'≥ ' * above}{self.high:.3g}"


@dataclass(frozen=True, eq=False)
class Layer:
    """A picture on the ground.

    Attributes:
        title: What it shows.
        pixels: (rows, columns, 4): red, green, blue, and 0 or 255 for no data or data.
        grid: Where the pixels lie; its tags say what made them.
        entries: Legend of classes.
        ramp: Legend of values.
        note: What else must be known to read it.
        mark: x and y of a place to mark, in the grid's reference system.
        whole: The grid of all cells where `grid` has every n-th, whose last pixels reach beyond it.
        files: What it was read from, so that no picture of it replaces that.
    """

    title: str
    pixels: Bytes
    grid: Grid
    entries: tuple[Entry, ...] = ()
    ramp: Ramp | None = None
    note: str = ""
    mark: tuple[float, float] | None = None
    whole: Grid | None = None
    files: tuple[Path, ...] = ()

    @property
    def ground(self) -> Grid:
        """The grid whose edges are those of the ground that is shown."""
        return self.whole or self.grid

    def mark_place(self) -> tuple[float, float] | None:
        """Where the mark lies, as shares of width and height; None if it is not in the picture."""
        if self.mark is None:
            return None
        column, row = self.grid.fractional(*(np.array([v]) for v in self.mark))
        right, down = float(column[0]) / self.grid.shape[2], float(row[0]) / self.grid.shape[1]
        return (right, down) if 0 <= right <= 1 and 0 <= down <= 1 else None

    def onto(self, other: Grid) -> Layer:
        """This layer on the pixels of another grid; the nearest pixel's colour, or none outside.

        Args:
            other: The grid, in the same reference system.

        Raises:
            RasterError: It is in another.
        """
        if not _same_crs(self.grid.crs, other.crs):
            raise RasterError(
                "the image and the map are in different coordinate reference systems; choose the "
                "image that was embedded, or warp one to the other's (gdalwarp)"
            )
        _, rows, columns = other.shape
        out = np.zeros((rows, columns, 4), dtype=np.uint8)
        overlaps = False
        height, width = self.pixels.shape[:2]
        for row in range(rows):
            x, y = other.xy(np.full(columns, row), np.arange(columns))
            right, down = (np.floor(v).astype(int) for v in self.grid.fractional(x, y))
            inside = (right >= 0) & (right < width) & (down >= 0) & (down < height)
            overlaps |= bool(inside.any())
            out[row, inside] = self.pixels[down[inside], right[inside]]
        if not overlaps:
            raise RasterError("the image and the map do not overlap")
        return replace(self, pixels=out, grid=replace(other, tags=self.grid.tags), whole=None)


def components_layer(source: EmbeddingsLike, side: int = SIDE) -> Layer:
    """The first three principal components as red, green and blue.

    They are those of all cells, found block by block, each with its largest loading positive; the
    same embedding always has the same colours.

    Args:
        source: As in `geofm.embeddings.read_embeddings`.
        side: As `SIDE`.

    Returns:
        The layer.

    Raises:
        RasterError: It cannot be read, or no cell has data.
    """
    embeddings = read_embeddings(source)
    mean, loadings, explained = _principal(embeddings)
    grid, step = thinned(embeddings.grid, side)
    columns = embeddings.grid.shape[2]
    values = np.full((3, *grid.shape[1:]), np.nan, dtype=np.float32)
    for cells in embeddings.blocks():
        row, column = np.divmod(cells.ids, columns)
        shown = (row % step == 0) & (column % step == 0)
        found = (cells.vectors[shown] - mean) @ loadings
        values[: found.shape[1], row[shown] // step, column[shown] // step] = found.T
    shares = ", ".join(f"{100 * share:.0f} %" for share in explained)
    return Layer(
        "principal components 1-3",
        stretched(values),
        grid,
        note=f"Red, green, blue: components 1-3, with {shares} of the variance.",
        whole=embeddings.grid,
        files=() if embeddings.path is None else (embeddings.path,),
    )


def ramp_layer(
    values: NDArray[Any],
    grid: Grid,
    *,
    title: str,
    limits: tuple[float, float] | None = None,
    mark: tuple[float, float] | None = None,
    note: str = "",
    side: int = SIDE,
) -> Layer:
    """Values in colours of a perceptual scale (viridis).

    Args:
        values: (rows, columns), NaN for no data.
        grid: Where they lie.
        title: What they are.
        limits: Values of the first and last colour; None for the 2nd and 98th percentile.
        mark: As in `Layer`.
        note: As in `Layer`.
        side: As `SIDE`.

    Returns:
        The layer.

    Raises:
        RasterError: No cell has data.
        MissingExtraError: matplotlib is not installed.
    """
    small, step = thinned(grid, side)
    values = values[::step, ::step]
    valid = np.isfinite(values)
    if not valid.any():
        raise NoDataError(f"{title}: no cell has data")
    low, high = limits or (float(v) for v in np.percentile(values[valid], (2, 98)))
    table = _viridis()
    unit = (np.where(valid, values, low) - low) / max(high - low, 1e-12)
    pixels = coloured(table[(np.clip(unit, 0, 1) * 255).astype(int)], valid)
    beyond = (bool(values[valid].min() < low), bool(values[valid].max() > high))
    ramp = Ramp(table, float(low), float(high), title, beyond)
    return Layer(title, pixels, small, ramp=ramp, note=note, mark=mark, whole=grid)


def class_layer(
    values: NDArray[Any],
    grid: Grid,
    *,
    title: str,
    nodata: float | None = 0,
    names: Mapping[int, str] | None = None,
    colours: Mapping[int, Colour] | None = None,
    most: int = 18,
    side: int = SIDE,
    counts: Mapping[int, int] | None = None,
) -> Layer:
    """Classes, or species, in colours that differ, the most frequent first in the legend.

    Args:
        values: (rows, columns) of integers, which may be masked where there is no data.
        grid: Where they lie.
        title: What they are.
        nodata: Value of cells without data; None if there is none.
        names: Of values; None or missing ones: "class 3".
        colours: Of values; None to give each class of the legend one that people with any colour
            vision tell apart.
        most: Classes in the legend; all others are grey.
        side: As `SIDE`.
        counts: Cells of each value, where `values` are some of many; None to count them.

    Returns:
        The layer.

    Raises:
        RasterError: No cell has data.
    """
    small, step = thinned(grid, side)
    sizes = class_counts(values, nodata) if counts is None else counts
    if not sizes:
        raise NoDataError(f"{title}: no cell has data")
    # Frequent first; of equals, the smaller number.
    order = sorted(sizes, key=lambda number: (-sizes[number], number))
    total = sum(sizes.values())
    valid = _known(values[::step, ::step], nodata)
    values = np.ma.getdata(values[::step, ::step])
    rgb = np.empty((*values.shape, 3), dtype=np.uint8)
    rgb[:] = OTHER
    entries = []
    for place, number in enumerate(order[:most]):
        colour = (colours or {}).get(number) or colour_of(place)
        rgb[values == number] = colour
        label = (names or {}).get(number, f"class {number}")
        entries.append(Entry(colour, label, sizes[number] / total))
    if len(order) > most:
        rest = sum(sizes[number] for number in order[most:]) / total
        entries.append(Entry(OTHER, f"{len(order) - most} others", rest))
    return Layer(title, coloured(rgb, valid), small, entries=tuple(entries), whole=grid)


def class_counts(values: NDArray[Any], nodata: float | None) -> Counter[int]:
    """Cells of each class.

    Args:
        values: As in `class_layer`.
        nodata: As in `class_layer`.
    """
    counts: Counter[int] = Counter()
    for top in range(0, len(values), _ROWS):
        part = values[top : top + _ROWS]
        known = np.ma.getdata(part)[_known(part, nodata)]
        found, sizes = np.unique(known, return_counts=True)
        counts.update(dict(zip(map(int, found), map(int, sizes), strict=True)))
    return counts


def _known(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Where there is data."""
    known: NDArray[np.bool_] = ~np.ma.getmaskarray(values)
    return known if nodata is None else known & (np.ma.getdata(values) != nodata)


def stretched(layers: NDArray[Any]) -> Bytes:
    """Three layers as red, green and blue, each from its 2nd to its 98th percentile.

    Args:
        layers: (3, rows, columns), NaN for no data.

    Returns:
        (rows, columns, 4).
    """
    valid = np.isfinite(layers).any(axis=0)
    rgb = np.zeros((*layers.shape[1:], 3), dtype=np.uint8)
    for number, layer in enumerate(layers):
        known = np.isfinite(layer)
        if known.any():
            low, high = np.percentile(layer[known], (2, 98))
            unit = (np.where(known, layer, low) - low) / max(high - low, 1e-12)
            rgb[..., number] = (np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return coloured(rgb, valid)


def coloured(rgb: NDArray[Any], valid: NDArray[np.bool_]) -> Bytes:
    """Colours where there is data, nothing elsewhere.

    Args:
        rgb: (rows, columns, 3).
        valid: (rows, columns).

    Returns:
        (rows, columns, 4).
    """
    out = np.zeros((*valid.shape, 4), dtype=np.uint8)
    out[valid, :3] = rgb[valid]
    out[valid, 3] = 255
    return out


def _principal(
    embeddings: Embeddings,
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[float]]:
    """Mean, loadings and shares of variance, from sums over all blocks."""
    channels = embeddings.grid.shape[0]
    count = 0
    first: NDArray[np.float64] | None = None
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for cells in embeddings.blocks():
        if not len(cells.ids):
            continue
        wide = cells.vectors.astype(np.float64)
        # Sums of squares far from the origin would lose their digits.
        first = wide.mean(axis=0) if first is None else first
        wide -= first
        count += len(wide)
        total += wide.sum(axis=0)
        products += wide.T @ wide
    if first is None:
        raise NoDataError(f"{embeddings.name}: no cell has data")
    shift = total / count
    covariance = products / count - np.outer(shift, shift)
    values, vectors = np.linalg.eigh(covariance)
    loadings = vectors[:, ::-1][:, :3]
    largest = np.abs(loadings).argmax(axis=0)
    loadings = loadings * np.sign(loadings[largest, np.arange(loadings.shape[1])])
    shares = values[::-1][:3].clip(min=0) / max(float(values.clip(min=0).sum()), 1e-30)
    mean = (first + shift).astype(np.float32)
    return mean, loadings.astype(np.float32), [float(v) for v in shares]


def thinned(grid: Grid, side: int) -> tuple[Grid, int]:
    """The grid of every n-th cell, and n.

    Args:
        grid: The grid of all.
        side: As `SIDE`.
    """
    channels, rows, columns = grid.shape
    step = max(1, math.ceil(max(rows, columns) / side))
    a, b, c, d, e, f = grid.transform
    transform = (a * step, b * step, c, d * step, e * step, f)
    shape = (channels, math.ceil(rows / step), math.ceil(columns / step))
    return replace(grid, shape=shape, transform=transform), step


def _same_crs(one: str | None, other: str | None) -> bool:
    if one is None or other is None or one == other:
        return one == other
    from rasterio.crs import CRS

    return bool(CRS.from_user_input(one) == CRS.from_user_input(other))


def _viridis() -> Bytes:
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'geofm[raster]'") from error
    table: Bytes = (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table
