"""One image of several: each pixel's usable values, as their median or mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["STATISTICS", "composite"]

STATISTICS = ("median", "mean")


def composite(
    pixels: NDArray[Any],
    clear: NDArray[np.bool_] | None = None,
    *,
    nodata: Sequence[float] = (),
    statistic: str = "median",
    min_clear: int = 1,
) -> NDArray[np.float32]:
    """Composite images of one place, pixel by pixel and band by band.

    Args:
        pixels: (n, bands, H, W), integers or floats; n may be 0. NaN and infinity are left out.
        clear: (n, H, W), True where a pixel is usable; None: all are.
        nodata: Values that mean "no data" in a band.
        statistic: ``"median"`` (of an even number the mean of the middle two) or ``"mean"``.
        min_clear: Values that a pixel needs.

    Returns:
        (bands, H, W), NaN where there are too few values.
    """
    if not len(pixels):
        return np.full(pixels.shape[1:], np.nan, np.float32)
    usable = np.isfinite(pixels)
    # In the pixels' own type, in which no data was written: 1e20 is another number in float32. What
    # is beyond that type becomes infinity, which is no data anyway.
    with np.errstate(over="ignore"):
        for value in nodata:
            usable &= pixels != float(value)
    if clear is not None:
        usable &= clear[:, None]
    values = pixels.astype(np.float64)
    values[~usable] = np.nan
    count = usable.sum(axis=0)
    if statistic == "median":
        found = _median(values, count)
    else:
        found = np.where(usable, values, 0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count >= max(min_clear, 1), found, np.nan).astype(np.float32)


def _median(values: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median over the first axis of the values that are not NaN, of which there are `count`."""
    ordered = np.sort(values, axis=0)  # NaN last
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, len(values) - 1)[None], axis=0)[0]
    middle: NDArray[np.float64] = 0.5 * low + 0.5 * high
    return middle
