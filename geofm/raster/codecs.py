"""From blended values to what is stored: fewer components, fewer bits, or a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geofm.errors import RasterError

__all__ = ["DTYPES", "Codec", "Projection", "fit_projection", "fit_quantisation", "narrowed"]

DTYPES = ("float32", "float16", "int8")
Floats = NDArray[np.float32]

# Quantised values go from -127 to 127; -128 is no data.
_LIMIT = 127
# Room beyond the range of the sample from which the scale is taken.
_MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components.

    Attributes:
        mean: Of the sample, (channels,).
        loadings: (channels, components), each with its largest entry positive.
        explained: Share of the variance of each component.
    """

    mean: Floats
    loadings: Floats
    explained: Floats

    def __call__(self, block: Floats) -> Floats:
        """Project a block.

        Args:
            block: (channels, rows, columns).

        Returns:
            (components, rows, columns).
        """
        channels, rows, columns = block.shape
        centred = block.reshape(channels, -1) - self.mean[:, None]
        return (self.loadings.T @ centred).reshape(-1, rows, columns)


@dataclass(frozen=True, eq=False)
class Codec:
    """How blended values are stored.

    Attributes:
        dtype: ``"float32"``, ``"float16"``, ``"int8"``, or ``"uint8"`` for numbers of classes.
        projection: Principal components to store instead of the channels.
        scale: Of int8: value = stored · scale + zero, for each component.
        zero: Of int8.
    """

    dtype: str
    projection: Projection | None = None
    scale: Floats | None = None
    zero: Floats | None = None

    @property
    def stored(self) -> np.dtype[Any]:
        """The type in memory. float16 is kept as rounded float32, since GDAL has no such type."""
        return np.dtype({"float16": "float32"}.get(self.dtype, self.dtype))

    @property
    def nodata(self) -> float:
        """What marks cells without data."""
        return {"int8": -128.0, "uint8": 255.0}.get(self.dtype, float("nan"))

    def channels(self, given: int) -> int:
        """Bands of the output.

        Args:
            given: Channels of the network.
        """
        if self.dtype == "uint8":
            return 1
        return given if self.projection is None else self.projection.loadings.shape[1]

    def encode(self, block: Floats, enough: NDArray[np.bool_]) -> NDArray[Any]:
        """What to store of a block.

        Args:
            block: (channels, rows, columns).
            enough: (rows, columns), False where there is no data.

        Returns:
            (bands, rows, columns).

        Raises:
            RasterError: Values are not finite, or beyond the range of float16.
        """
        if self.projection is not None:
            block = self.projection(block)
        kind = "float16" if self.dtype == "float16" else "float32"
        block = narrowed(block, enough, kind).astype(np.float32, copy=False)
        if self.dtype == "uint8":
            return np.where(enough, block.argmax(axis=0), self.nodata).astype(np.uint8)[None]
        if self.dtype == "int8":
            assert self.scale is not None
            assert self.zero is not None
            scaled = (block - self.zero[:, None, None]) / self.scale[:, None, None]
            # NaN has no integer: cells without data are put aside before, not after.
            scaled = np.where(enough, scaled, 0).round().clip(-_LIMIT, _LIMIT)
            return np.where(enough, scaled, self.nodata).astype(np.int8)
        return np.where(enough, block, np.float32(np.nan))

    def decode(self, stored: NDArray[Any]) -> Floats:
        """Values of what was stored, NaN where there is no data.

        Args:
            stored: (bands, rows, columns).
        """
        if self.dtype in ("float32", "float16"):
            return stored.astype(np.float32, copy=False)
        values = stored.astype(np.float32)
        values[stored == self.nodata] = np.nan
        if self.scale is not None and self.zero is not None:
            values = values * self.scale[:, None, None] + self.zero[:, None, None]
        return values


def narrowed(block: Floats, enough: NDArray[np.bool_], dtype: str) -> NDArray[Any]:
    """Values in the type in which they are kept.

    Args:
        block: (channels, rows, columns).
        enough: (rows, columns), False where there is no data and anything may stand.
        dtype: ``"float32"`` or ``"float16"``.

    Returns:
        (channels, rows, columns).

    Raises:
        RasterError: Values are not finite, or beyond the range of float16.
    """
    with np.errstate(over="ignore"):
        narrow = block.astype(dtype, copy=False)
    if not np.isfinite(narrow).all(where=enough):
        raise RasterError(
            "the model's output has values that are not finite"
            + ("; float16 ends at 65504, use dtype='float32'" if dtype == "float16" else "")
        )
    return narrow


def fit_projection(cells: Floats, components: int) -> Projection:
    """Principal components of a sample.

    Args:
        cells: (cells, channels).
        components: How many.

    Returns:
        Mean and loadings.

    Raises:
        RasterError: There are fewer cells or channels than components.
    """
    if min(cells.shape) < components:
        raise RasterError(
            f"{components} principal components need as many cells and channels at least; there "
            f"are {cells.shape[0]} cells with data and {cells.shape[1]} channels"
        )
    wide = torch.from_numpy(cells).double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    loadings = vectors.flip(1)[:, :components]
    largest = loadings.abs().argmax(dim=0)
    loadings = loadings * torch.sign(loadings[largest, torch.arange(components)])
    share = values.flip(0)[:components] / values.sum().clamp_min(1e-30)
    return Projection(*(part.float().numpy() for part in (mean, loadings, share)))


def fit_quantisation(values: Floats) -> tuple[Floats, Floats]:
    """Scale and zero-point of each component, so that a sample lies within 8 bits.

    Args:
        values: (cells, components).

    Returns:
        Scale and zero-point: value = stored · scale + zero.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    zero = (low + high) / 2
    half = (high - low) / 2 * (1 + _MARGIN)
    scale = np.where(half > 0, half, 1.0) / _LIMIT
    return scale.astype(np.float32), zero.astype(np.float32)
