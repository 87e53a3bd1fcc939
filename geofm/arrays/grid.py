"""Where the windows of chunks lie, and where the cells lie on the ground: plain arithmetic."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import RasterError
from geofm.raster.grids import grid_transform
from geofm.raster.networks import Network
from geofm.raster.windows import Axis

__all__ = [
    "Cells",
    "Chunks",
    "cell_centres",
    "chunks_along",
    "geotransform",
    "moved_geotransform",
    "source_parts",
    "window_sides",
]


@dataclass(frozen=True)
class Cells:
    """The cells of one chunk along one side, and the window they are computed from.

    Attributes:
        skip: Cells of the window before the chunk's own.
        count: Cells of the chunk.
        size: Pixels of the window; what the array does not have of them is continued.
        first: First pixel of each cell, counted from the window's, cut to the array.
        last: The one after the last.
    """

    skip: int
    count: int
    size: int
    first: tuple[int, ...]
    last: tuple[int, ...]


@dataclass(frozen=True)
class Chunks:
    """The chunks along one side.

    Attributes:
        axis: The window of each.
        core: Pixels between the beginnings of two neighbours.
    """

    axis: Axis
    core: int

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells of each chunk; all but the last have the same number."""
        each = self.core // self.axis.spacing
        whole = len(self.axis.starts) - 1
        return (*[each] * whole, self.axis.total - each * whole)

    def pixels(self, index: int) -> tuple[int, int]:
        """Pixels of the array that a window covers.

        Args:
            index: Number of the chunk.

        Returns:
            First pixel and the one after the last.
        """
        start = self.axis.starts[index]
        return start, min(start + self.axis.size, self.axis.length)

    def part(self, index: int) -> Cells:
        """What is to be computed for a chunk.

        Args:
            index: Number of the chunk.

        Returns:
            Its cells.
        """
        begin = index * (self.core // self.axis.spacing)
        count = self.cells[index]
        start = self.axis.starts[index]
        first, last = self.axis.footprints(begin, begin + count)
        return Cells(
            skip=begin - self.axis.firsts[index],
            count=count,
            size=self.axis.size,
            first=tuple((first - start).tolist()),
            last=tuple((last - start).tolist()),
        )


def window_sides(
    network: Network, window: int, chunks: int | None, halo: int | None
) -> tuple[int, int]:
    """Pixels of a chunk and of the halo around it.

    Args:
        network: What is computed.
        window: The model's usual window, in px.
        chunks: Pixels of a chunk; None: what `window` leaves between the halos.
        halo: Pixels around a chunk; None: an eighth of the window.

    Returns:
        Both, multiples of the model's cells.

    Raises:
        RasterError: One of them is not, or is too small.
    """
    unit = network.unit
    if chunks is not None and (not isinstance(chunks, int) or chunks < unit or chunks % unit):
        nearest = (
            max(unit, round(chunks / unit) * unit) if isinstance(chunks, int | float) else unit
        )
        raise RasterError(
            f"chunks is a number of pixels, a multiple of the model's cells of {unit} px, got "
            f"{chunks!r}; take {nearest}"
        )
    # Cells that begin before their window, or that an unpadded stem leaves out at its end.
    least = math.ceil(abs(network.offset) / unit) * unit
    if halo is None:
        eighth = window // 8 if chunks is None else chunks // 6
        halo = max(eighth // unit * unit, least)
    elif not isinstance(halo, int) or halo < least or halo % unit:
        raise RasterError(
            f"halo is a number of pixels, a multiple of the model's cells of {unit} px and at "
            f"least {least} for this model, got {halo!r}"
        )
    if chunks is None:
        window += -window % unit
        chunks = window - 2 * halo
        if chunks < unit:
            raise RasterError(
                f"a halo of {halo} px leaves nothing of a window of {window} px; give chunks= too"
            )
    return chunks, halo


def chunks_along(length: int, core: int, halo: int, network: Network, lost: int) -> Chunks:
    """Chunks along one side of an array.

    All windows are alike: at the array's edges they are moved inward. Where one covers the whole
    side, that is a single chunk. An array that ends inside a cell is continued to whole cells.

    Args:
        length: Pixels of the array.
        core: Pixels of a chunk.
        halo: Pixels around it, on either side.
        network: What is computed.
        lost: Cells that a window lacks to ``size / stride``, because of unpadded convolutions.

    Returns:
        The chunks.

    Raises:
        RasterError: Windows overlap so little that cells are left out.
    """
    stride, end = network.stride, length + -length % network.unit
    size = min(core + 2 * halo, end)
    if size < end and halo < lost * stride:
        raise RasterError(
            f"windows lack {lost} cells of {stride} px, so that a halo of {halo} px leaves gaps; "
            f"take {lost * stride + -lost * stride % network.unit} px or more"
        )
    cells = size // stride - lost
    total = (end - size) // stride + cells
    # A window of the whole side is computed once, however many chunks it would make.
    count = -(-total // (core // stride)) if size < end else 1
    starts = tuple(min(max(i * core - halo, 0), end - size) for i in range(count))
    firsts = tuple(start // stride for start in starts)
    axis = Axis(length, size, starts, cells, firsts, network.offset, stride, stride)
    return Chunks(axis, core)


def source_parts(begin: int, end: int, edges: Sequence[int]) -> list[tuple[int, int, int]]:
    """The parts of blocks that make up a range of pixels.

    Args:
        begin: First pixel.
        end: The one after the last.
        edges: Where blocks begin, and where the last one ends.

    Returns:
        Number of the block, and first and last + 1 pixel within it, in order.
    """
    parts = []
    block = bisect.bisect_right(edges, begin) - 1
    while begin < end:
        stop = min(end, edges[block + 1])
        parts.append((block, begin - edges[block], stop - edges[block]))
        begin, block = stop, block + 1
    return parts


def cell_centres(
    name: str, values: NDArray[Any], axis: Axis
) -> tuple[NDArray[np.float64], float] | None:
    """Coordinates of the centres of cells.

    Args:
        name: Name of the coordinate, for messages.
        values: Coordinates of the centres of pixels.
        axis: The windows along it.

    Returns:
        One per cell, and the step from pixel to pixel; None for a single pixel, which has no step.

    Raises:
        RasterError: The coordinate is not numeric or not evenly spaced.
    """
    if values.dtype.kind not in "iuf":
        raise RasterError(f"coordinate {name} must be numbers, got {values.dtype}; drop_vars it")
    if len(values) < 2:
        return None
    values = values.astype(np.float64)
    step = (values[-1] - values[0]) / (len(values) - 1)
    even = values[0] + step * np.arange(len(values))
    # Degrees in float32 are off by a tenth of a pixel of 10 m.
    if not step or not (np.abs(values - even) < abs(step) / 4).all():
        raise RasterError(
            f"coordinate {name} is not evenly spaced, so cells have no place: from {values[0]:g} "
            f"to {values[-1]:g} in {len(values)} pixels; sort it, or interpolate to a regular grid"
        )
    place = axis.offset + axis.spacing * (np.arange(axis.total) + 0.5) - 0.5
    return values[0] + step * place, float(step)


def moved_geotransform(text: str, columns: Axis, rows: Axis) -> str:
    """GDAL's six numbers, as CF's grid mapping keeps them: of cells instead of pixels.

    Args:
        text: ``"left a b top d e"`` of the pixels.
        columns: The windows from left to right.
        rows: The windows from top to bottom.

    Returns:
        The same of the cells.

    Raises:
        RasterError: These are not six numbers.
    """
    try:
        left, a, b, top, d, e = (float(part) for part in str(text).split())
    except ValueError as error:
        raise RasterError(f"GeoTransform must be six numbers, got {text!r}") from error
    pixels = (a, b, left, d, e, top)
    a, b, left, d, e, top = grid_transform(pixels, rows.spacing, columns.offset, rows.offset)
    return _six(left, a, b, top, d, e)


def geotransform(x: NDArray[np.float64], dx: float, y: NDArray[np.float64], dy: float) -> str:
    """The same six numbers of an upright grid, from its coordinates.

    Args:
        x: Centres of the cells.
        dx: Width of a cell.
        y: Centres of the cells.
        dy: Height of a cell, negative where north is up.

    Returns:
        ``"left dx 0.0 top 0.0 dy"``.
    """
    return _six(x[0] - dx / 2, dx, 0.0, y[0] - dy / 2, 0.0, dy)


def _six(*numbers: float) -> str:
    return " ".join(repr(float(number)) for number in numbers)
