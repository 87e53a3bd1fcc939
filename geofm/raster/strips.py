"""Reading: strips of prepared pixels, each pixel read and prepared once for all its windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geofm.preprocess import Preprocess
from geofm.raster.sources import Source
from geofm.raster.windows import Axis, Panel

__all__ = ["Strip", "StripReader", "has_data"]

# Pixels that are prepared at a time: preparing needs several copies of them, of which memory keeps
# more than there are at once.
_AT_ONCE = 64 * 1024


@dataclass(frozen=True, eq=False)
class Strip:
    """One row of windows of one panel.

    Attributes:
        pixels: Prepared, (bands, rows, columns), as far as the raster reaches.
        left: Column of the raster where it begins.
        height: Of a window.
        blank: What windows are continued by beyond the raster; None: by its last row and column.
        filled: For each window of the panel, whether it has data at all.
        enough: (rows, columns) of the cells that are final after this row; False: no data.
    """

    pixels: Tensor
    left: int
    height: int
    blank: float | None
    filled: tuple[bool, ...]
    enough: NDArray[np.bool_]

    def window(self, start: int, size: int) -> Tensor:
        """Pixels of a window.

        Args:
            start: Its first column in the raster.
            size: Its width.

        Returns:
            (bands, height, size).
        """
        found = self.pixels[:, :, start - self.left : start - self.left + size]
        below, right = self.height - found.shape[1], size - found.shape[2]
        if not below and not right:
            return found
        if self.blank is None:
            return F.pad(found[None], (0, right, 0, below), mode="replicate")[0]
        return F.pad(found, (0, right, 0, below), value=self.blank)


class StripReader:
    """Reads the rows of windows of a panel, one after the other.

    Args:
        source: What is read.
        bands: Names of the bands to read.
        prepare: Their preprocessing.
        rows: Windows from top to bottom.
        columns: Windows from left to right.
        panel: Which of these.
        min_valid: Share of a cell's pixels that must have data.
        replicate: Continue beyond the raster by the last row and column; else by missing pixels.
    """

    def __init__(
        self,
        source: Source,
        bands: Sequence[str],
        prepare: Preprocess,
        rows: Axis,
        columns: Axis,
        panel: Panel,
        *,
        min_valid: float,
        replicate: bool,
    ) -> None:
        self.source, self.bands, self.prepare = source, tuple(bands), prepare
        self.rows, self.columns, self.panel = rows, columns, panel
        self.min_valid, self.replicate = min_valid, replicate
        # Cells may begin before their window does; their pixels count for having data or not.
        self.before = max(0, int(np.ceil(-rows.lower)))
        self.left = max(0, columns.starts[panel.begin] - self.before)
        self.end = columns.starts[panel.end - 1] + columns.size
        # What is in memory of the raster: rows from `top` on.
        self.top = self.bottom = 0
        self.valid = np.zeros((0, 0), dtype=bool)
        # Two rows of windows in turns: the last one is in use while the next one is read.
        width = min(self.end, columns.length) - self.left
        shape = (len(prepare.spec.bands), rows.size + self.before, width)
        self._rooms = [torch.empty(shape), torch.empty(shape)]
        self.pixels = self._rooms[0][:, :0]

    # As where the network runs: the tensors are those of one mode, whichever thread reads.
    @torch.inference_mode()
    def read(self, row: int) -> Strip:
        """Read a row of windows. Rows must be asked for in order.

        Args:
            row: Its number.

        Returns:
            Its pixels, in memory that the next but one row takes again.

        Raises:
            RasterError: The source cannot be read.
            PixelError: The pixels are not in the stated units.
        """
        start = self.rows.starts[row]
        end = start + self.rows.size
        top = max(0, start - self.before)
        self._advance(top, min(end, self.rows.length))
        pixels = self.pixels[:, start - top :]
        blank = None if self.replicate else self.prepare.blank
        first = self.columns.owned(self.panel.own)[0]
        last = self.columns.owned(self.panel.end - 1)[1]
        enough = self.enough(self.rows.owned(row), (first, last))
        filled = self._filled(start - top)
        return Strip(pixels, self.left, self.rows.size, blank, filled, enough)

    def _advance(self, top: int, bottom: int) -> None:
        self._rooms.reverse()
        pixels = self._rooms[0][:, : bottom - top]
        # Rows that are there already, of the last window's.
        kept = max(0, self.bottom - top)
        skip = top - self.top
        pixels[:, :kept] = self.pixels[:, skip : skip + kept]
        valid = [self.valid[skip : skip + kept]] if kept else []
        if top + kept < bottom:
            valid.append(self._load(top + kept, bottom, pixels[:, kept:]))
        self.pixels, self.valid = pixels, np.concatenate(valid)
        self.top, self.bottom = top, bottom

    def _load(self, top: int, bottom: int, prepared: Tensor) -> NDArray[np.bool_]:
        """Read rows into `prepared`; which of their pixels have data."""
        height, right = bottom - top, min(self.end, self.columns.length)
        valid = np.empty((height, right - self.left), dtype=bool)
        # Multiples of 512, as files are in tiles of 256 or 512 and would be decoded twice.
        step = max(512, _AT_ONCE // max(height, 1) // 512 * 512)
        edges = [self.left, *range((self.left // step + 1) * step, right, step), right]
        for begin, end in itertools.pairwise(edges):
            stored = self.source.read(self.bands, top, begin, height, end - begin)
            place = slice(begin - self.left, end - self.left)
            prepared[:, :, place] = self.prepare(stored)
            valid[:, place] = has_data(stored, self.prepare.nodata)
        return valid

    def _filled(self, skip: int) -> tuple[bool, ...]:
        some = np.asarray(self.valid[skip:].any(axis=0))
        columns = self.columns
        starts = columns.starts[self.panel.begin : self.panel.end]
        return tuple(bool(some[s - self.left : s - self.left + columns.size].any()) for s in starts)

    def enough(self, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.bool_]:
        """Which cells of the row of windows that was read last have enough data.

        Args:
            rows: First row of cells and the one after the last.
            columns: First column of cells and the one after the last.

        Returns:
            (rows, columns).
        """
        top, bottom = self.rows.footprints(*rows)
        left, right = self.columns.footprints(*columns)
        if self.replicate:
            # Cells at the edge are judged by what lies within the raster.
            area = np.multiply.outer(bottom - top, right - left)
        else:
            area = np.full((len(top), len(left)), self.rows.reach * self.columns.reach)
        height, width = self.valid.shape
        sums = np.zeros((height + 1, width + 1), dtype=np.int32)
        np.cumsum(self.valid, axis=0, out=sums[1:, 1:])
        np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
        top, bottom = (np.clip(v - self.top, 0, height) for v in (top, bottom))
        left, right = (np.clip(v - self.left, 0, width) for v in (left, right))
        above = sums[bottom] - sums[top]
        count = above[:, right] - above[:, left]
        return np.asarray((count > 0) & (count >= self.min_valid * area))


def has_data(pixels: np.ma.MaskedArray[Any, Any], nodata: Sequence[float]) -> NDArray[np.bool_]:
    """Pixels with data in one band at least.

    Args:
        pixels: Stored values, (bands, rows, columns).
        nodata: Values that mean "no data".

    Returns:
        (rows, columns).
    """
    present = ~np.ma.getmaskarray(pixels)
    data = pixels.data
    if data.dtype.kind == "f":
        # As `Preprocess` sees them, in float32; what is too large for it is infinite.
        with np.errstate(over="ignore"):
            data = data.astype(np.float32, copy=False)
        present &= np.isfinite(data)
    for value in nodata:
        present &= data != (np.float32(value) if data.dtype.kind == "f" else value)
    return np.asarray(present.any(axis=0))
