"""Where windows lie, which cells they bring, and how much each counts: plain arithmetic."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.errors import RasterError

__all__ = ["BLENDS", "Axis", "Panel", "maps", "panels", "vectors"]

BLENDS = ("smooth", "centre")


@dataclass(frozen=True)
class Axis:
    """The windows along one side of a raster, in order.

    Attributes:
        length: Pixels of the raster.
        size: Pixels of a window; all windows are alike.
        starts: First pixel of each window.
        cells: Cells a window brings.
        firsts: First cell of each window, in the grid of the output.
        lower: Where the first cell of the grid begins, in pixels.
        spacing: Pixels from one cell to the next.
        reach: Pixels that a cell looks at first of all, as which it counts as having data or not:
            `spacing` of a map, the whole window where a window brings one vector.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    cells: int
    firsts: tuple[int, ...]
    lower: float
    spacing: int
    reach: int

    @property
    def total(self) -> int:
        """Cells along the side of the output: those of the windows that begin within the raster."""
        # The first pixel of cell i is that whose centre is the first in it.
        within = math.ceil((self.length - 0.5 - self.lower) / self.spacing)
        within += math.ceil(self.lower + self.spacing * within - 0.5) < self.length
        return min(self.firsts[-1] + self.cells, within)

    @property
    def offset(self) -> float:
        """Where the output's first pixel begins, in pixels: cells are centred on their reach."""
        return self.lower + (self.reach - self.spacing) / 2

    def owned(self, index: int) -> tuple[int, int]:
        """Cells that are final once window `index` is in: up to the first of the next window.

        Args:
            index: Number of the window.

        Returns:
            First cell and the one after the last.
        """
        last = index + 1 == len(self.firsts)
        return self.firsts[index], self.total if last else self.firsts[index + 1]

    def first_over(self, index: int) -> int:
        """The first window with a cell at or after the first cell of window `index`.

        Args:
            index: Number of the window.

        Returns:
            Number of that window, at most `index`.
        """
        return bisect.bisect_right(self.firsts, self.firsts[index] - self.cells)

    def weights(self, index: int, blend: str) -> NDArray[np.float32]:
        """How much each cell of a window counts beside those of other windows.

        Args:
            index: Number of the window.
            blend: ``"smooth"``: 0 in the outermost quarter of the overlap, where a window sees
                least around a cell, then growing to 1 over the half that follows; ``"centre"``: a
                cell is taken from the window whose centre is nearest, and from no other.

        Returns:
            `cells` numbers from 0 to 1.
        """
        first, cells = self.firsts[index], self.cells
        before = self.firsts[index - 1] + cells - first if index else 0
        more = index + 1 < len(self.firsts)
        after = first + cells - self.firsts[index + 1] if more else 0
        place = np.arange(cells, dtype=np.float64)
        if blend == "centre":
            # One number for both neighbours, so that no cell is taken twice or left out.
            end = cells if not more else self.firsts[index + 1] - first + (after + 1) // 2
            return ((place >= (before + 1) // 2) & (place < end)).astype(np.float32)
        rising = _ramp(place + 0.5, before)
        falling = _ramp(cells - place - 0.5, after)
        return (rising * falling).astype(np.float32)

    def footprints(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pixels that cells cover, cut to the raster. A pixel belongs to where its centre lies.

        Args:
            begin: First cell.
            end: The one after the last.

        Returns:
            First pixel, and the one after the last, of each cell.
        """
        edges = self.lower + self.spacing * np.arange(begin, end, dtype=np.float64)
        first = np.ceil(edges - 0.5).astype(np.int64)
        last = np.ceil(edges + self.reach - 0.5).astype(np.int64)
        return first.clip(0, self.length), last.clip(0, self.length)


def maps(
    length: int, size: int, overlap: int, unit: int, stride: int, cells: int, offset: float
) -> Axis:
    """Windows of a network that gives a map.

    The last window is moved back to end where the raster ends (continued to whole units), so that
    all windows are alike and none looks at more than the last unit's worth of continuation.

    Args:
        length: Pixels of the raster.
        size: Pixels of a window, a multiple of `unit`, at most the raster's continued length.
        overlap: Pixels that neighbours share, a multiple of `unit`.
        unit: Windows begin at multiples of it.
        stride: Pixels per cell.
        cells: Cells of the map of one window.
        offset: Where the first cell of a window begins, in pixels.

    Returns:
        The windows.

    Raises:
        RasterError: Windows overlap so little that cells are left out.
    """
    end = length + -length % unit
    step = size - overlap
    starts = [*range(0, end - size, step), end - size]
    if len(starts) > 1 and step > cells * stride:
        need = size - cells * stride
        raise RasterError(
            f"windows of {size} px bring {cells} cells of {stride} px, so that an overlap of "
            f"{overlap} px leaves gaps; overlap by {need + -need % unit} px or more"
        )
    firsts = tuple(start // stride for start in starts)
    return Axis(length, size, tuple(starts), cells, firsts, offset, stride, stride)


def vectors(length: int, size: int, overlap: int) -> Axis:
    """Windows of a network that gives one vector for each: a cell is a window.

    They lie on a regular grid; the last may reach beyond the raster.

    Args:
        length: Pixels of the raster.
        size: Pixels of a window.
        overlap: Pixels that neighbours share.

    Returns:
        The windows. Cells are as wide as the step from window to window and lie in their middle.
    """
    step = size - overlap
    count = 1 + max(0, math.ceil((length - size) / step))
    starts = tuple(step * i for i in range(count))
    return Axis(length, size, starts, 1, tuple(range(count)), 0.0, step, size)


def _ramp(distance: NDArray[np.float64], overlap: int) -> NDArray[np.float64]:
    if not overlap:
        return np.ones_like(distance)
    return (2 * distance / overlap - 0.5).clip(0.0, 1.0)


@dataclass(frozen=True)
class Panel:
    """Windows of some neighbouring columns, from the top of the raster to its bottom.

    Attributes:
        begin: First column of windows that is computed: the cells of the panel need it.
        own: First column of windows whose cells the panel brings.
        end: The column after the last.
    """

    begin: int
    own: int
    end: int


def panels(columns: Axis, pixels: int) -> tuple[Panel, ...]:
    """Cut a raster into panels of bounded width, so that memory is bounded whatever its width.

    Args:
        columns: The windows from left to right.
        pixels: Width of a panel; one window at least.

    Returns:
        Panels from left to right, as few and as equal as may be.
    """
    count = len(columns.starts)
    found: list[Panel] = []
    for number in range(1, count + 1):
        edges = [count * i // number for i in range(number + 1)]
        found = [Panel(columns.first_over(own), own, end) for own, end in itertools.pairwise(edges)]
        ends = [columns.starts[panel.end - 1] + columns.size for panel in found]
        widths = [end - columns.starts[panel.begin] for panel, end in zip(found, ends, strict=True)]
        if max(widths) <= pixels:
            break
    return tuple(found)
