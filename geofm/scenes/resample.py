"""A coarser band on the finest grid, window by window, without seams.

Every value depends on its own place and the source pixels around it only, so reading by windows
equals reading whole, bit by bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLINGS", "Axis", "axis_of", "interpolate"]

RESAMPLINGS = ("nearest", "bilinear", "cubic")

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the pixels of a window lie in a source, along one axis.

    Attributes:
        low: First source pixel needed.
        high: One past the last.
        own: Source pixel that holds each centre, from `low`; at the edge the nearest, (n,).
        inside: Whether each centre is in the source, or less than half a source pixel outside.
        linear: Source pixels of linear interpolation from `low`, (2, n), and their weights.
        cubic: The same of cubic convolution, (4, n).
    """

    low: int
    high: int
    own: NDArray[np.int64]
    inside: Bools
    linear: tuple[NDArray[np.int64], Floats]
    cubic: tuple[NDArray[np.int64], Floats]

    @functools.cached_property
    def plain(self) -> bool:
        """Whether the places are the source's pixels, one by one."""
        return bool(self.inside.all()) and np.array_equal(self.own, np.arange(self.high - self.low))


@functools.lru_cache(maxsize=16)
def axis_of(start: int, stop: int, ratio: float, shift: float, size: int, method: str) -> Axis:
    """Place the pixels `start` to `stop` of the finest grid in a source.

    Args:
        start: First pixel.
        stop: One past the last.
        ratio: Pixels of the finest grid in one of the source.
        shift: Where the source begins, in pixels of the finest grid.
        size: Pixels of the source.
        method: One of `RESAMPLINGS`.

    Returns:
        The places.
    """
    # The centre of source pixel k is at k + 0.5.
    position = (np.arange(start, stop, dtype=np.float64) + 0.5 - shift) / ratio
    own = np.clip(np.floor(position).astype(np.int64), 0, size - 1)
    first = np.floor(position - 0.5).astype(np.int64)
    t = position - 0.5 - first

    def taps(offsets: tuple[int, ...]) -> NDArray[np.int64]:
        # Beyond the edge the outermost pixel goes on.
        return np.stack([np.clip(first + k, 0, size - 1) for k in offsets])

    linear, cubic = taps((0, 1)), taps((-1, 0, 1, 2))
    used = {"nearest": own, "bilinear": linear, "cubic": cubic}[method]
    low, high = int(used.min()), int(used.max()) + 1
    return Axis(
        low=low,
        high=high,
        own=own - low,
        inside=(position > -0.5) & (position < size + 0.5),
        linear=(linear - low, np.stack([1 - t, t])),
        cubic=(cubic - low, np.stack([_keys(t + 1), _keys(t), _keys(1 - t), _keys(2 - t)])),
    )


def interpolate(
    values: NDArray[Any], missing: Bools, rows: Axis, columns: Axis, method: str
) -> tuple[NDArray[Any], Bools]:
    """The values of a source at the places of a window.

    A place is missing exactly where the source pixel that holds it is. Other missing pixels have no
    weight; cubic convolution becomes linear beside them, since its weights may not be cut.

    Args:
        values: (rows.high - rows.low, columns.high - columns.low), any type.
        missing: The same shape.
        rows: Places along the first axis.
        columns: Places along the second.
        method: One of `RESAMPLINGS`.

    Returns:
        Values and missing pixels. Integers are rounded, and kept in the range of their type.
    """
    if method == "nearest" and rows.plain and columns.plain:
        return values, missing
    at = np.ix_(rows.own, columns.own)
    gone = missing[at]
    gone[~rows.inside] = True
    gone[:, ~columns.inside] = True
    if method == "nearest":
        return values[at], gone
    wide = values.dtype.itemsize > 2 and values.dtype != np.float32
    source: Floats = np.where(missing, 0, values).astype(np.float64 if wide else np.float32)
    kernel = [(rows.cubic, columns.cubic), (rows.linear, columns.linear)][method == "bilinear"]
    out = _weighted(source, *kernel)
    if missing.any():
        beside = _touched(missing, *kernel)
        total = _weighted(
            (~missing).astype(np.float64 if wide else np.float32), rows.linear, columns.linear
        )
        linear = _weighted(source, rows.linear, columns.linear)
        # Where a place is not missing its own pixel weighs at least a quarter.
        with np.errstate(divide="ignore", invalid="ignore"):
            out = np.where(beside & ~gone, linear / total, out)
    out[gone] = 0
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        out = np.clip(np.floor(out + 0.5), limits.min, limits.max)
    return out.astype(values.dtype), gone


def _weighted(
    source: Floats,
    rows: tuple[NDArray[np.int64], Floats],
    columns: tuple[NDArray[np.int64], Floats],
) -> Floats:
    down = [w.astype(source.dtype)[:, None] * source[k] for k, w in zip(*rows, strict=True)]
    between: Floats = sum(down[1:], down[0])
    across = [w.astype(source.dtype) * between[:, k] for k, w in zip(*columns, strict=True)]
    out: Floats = sum(across[1:], across[0])
    return out


def _touched(
    missing: Bools,
    rows: tuple[NDArray[np.int64], Floats],
    columns: tuple[NDArray[np.int64], Floats],
) -> Bools:
    down: Bools = np.any([missing[k] for k in rows[0]], axis=0)
    return np.asarray(np.any([down[:, k] for k in columns[0]], axis=0))


def _keys(x: Floats) -> Floats:
    """Cubic convolution with a = -1/2 (Keys 1981), at distances of 0 to 2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, far)
