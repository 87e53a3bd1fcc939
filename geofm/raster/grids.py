"""What a run gives back: a grid of values, in memory or in the file it was written to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import RasterError
from geofm.raster.cog import Layout, array_to_cog
from geofm.raster.sources import Coefficients, rasterio_module
from geofm.scenes.files import unreadable

__all__ = ["Embedding", "decoded", "grid_transform", "write_embedding"]

# What `Embedding.values` reads of a file, and how much of that at a time.
_MAX_BYTES = 4e9
_STRIP_BYTES = 64_000_000


class Embedding:
    """A grid of values over an image: embeddings, or classes.

    Args:
        values: (channels, rows, columns); None where they are in a file.
        transform: Affine coefficients of the grid, as in `RasterImage`.
        crs: As in `RasterImage`.
        stride: Pixels of the image per cell, along a row.
        offset: Where the first cell begins, in pixels from the image's left and top edges.
        tags: What made it: model, weights, preprocessing, windows, version.
        path: The file it was written to.
        shape: (channels, rows, columns); None where values are given.

    Attributes:
        transform: As given.
        crs: As given.
        stride: As given.
        offset: As given.
        tags: As given.
        path: As given.
        shape: (channels, rows, columns).
    """

    def __init__(
        self,
        values: NDArray[np.float32] | None,
        transform: Coefficients,
        crs: str | None,
        stride: int,
        offset: float,
        tags: Mapping[str, str],
        path: Path | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if (values is None) == (path is None) or (path is not None and shape is None):
            raise TypeError("an Embedding has values, or the path and the shape of a file")
        self._values = values
        self.transform, self.crs = transform, crs
        self.stride, self.offset, self.tags, self.path = stride, offset, dict(tags), path
        given = shape if values is None else values.shape
        assert given is not None
        channels, rows, columns = given
        self.shape = (int(channels), int(rows), int(columns))

    def __repr__(self) -> str:
        where = f", in {self.path}" if self.path else ""
        return f"Embedding(shape={self.shape}, stride={self.stride}{where})"

    @property
    def values(self) -> NDArray[np.float32]:
        """All values, float32, NaN where a cell has no data; quantised ones are scaled back.

        Read from the file, and kept, when first asked for.

        Raises:
            RasterError: They do not fit into memory; read windows of the file instead. Or the
                file is damaged or gone.
        """
        if self._values is None:
            size = 4 * self.shape[0] * self.shape[1] * self.shape[2]
            if size > _MAX_BYTES:
                raise RasterError(
                    f"{self.path} has {size / 1e9:.0f} GB of values; read parts of it with rasterio"
                )
            self._values = self._read()
        return self._values

    def _read(self) -> NDArray[np.float32]:
        rasterio = rasterio_module()
        assert self.path is not None
        values = np.empty(self.shape, dtype=np.float32)
        _, rows, columns = self.shape
        some = max(1, _STRIP_BYTES // values[:, :1].nbytes)
        try:
            with rasterio.open(self.path) as file:
                for top in range(0, rows, some):
                    part = values[:, top : top + some]
                    window = rasterio.windows.Window(0, top, columns, part.shape[1])
                    stored = file.read(window=window)
                    part[:] = decoded(stored, file.nodata, file.scales, file.offsets)
        except rasterio.errors.RasterioError as error:
            raise unreadable(str(self.path), error) from error
        return values


def decoded(
    stored: NDArray[Any],
    nodata: float | None,
    scales: Sequence[float],
    zeros: Sequence[float],
) -> NDArray[np.float32]:
    """Values of stored numbers.

    Args:
        stored: (bands, rows, columns), which may be masked where there is no data.
        nodata: Stored value of cells without data; None if there is none.
        scales: Of each band.
        zeros: Of each band: value = stored · scale + zero.

    Returns:
        float32, NaN where there is no data.
    """
    plain, mask = np.ma.getdata(stored), np.ma.getmask(stored)
    values: NDArray[np.float32] = plain.astype(np.float32)
    if mask is not np.ma.nomask:
        values[mask] = np.nan
    if nodata is not None:
        values[plain == nodata] = np.nan
    scale, zero = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (scales, zeros))
    if (scale != 1).any() or zero.any():
        values = values * scale + zero
    return values


def grid_transform(
    image: Coefficients,
    stride: float,
    column_offset: float,
    row_offset: float,
    row_stride: float | None = None,
) -> Coefficients:
    """Affine coefficients of a grid of cells over an image, which may be rotated.

    Args:
        image: Those of the image.
        stride: Pixels per cell, along a row.
        column_offset: Where the first cell begins, in pixels from the left edge.
        row_offset: Where it begins, in pixels from the top edge.
        row_stride: Pixels from row to row of cells; None: as along a row.

    Returns:
        Those of the grid.
    """
    a, b, c, d, e, f = image
    down = stride if row_stride is None else row_stride
    return (
        a * stride,
        b * down,
        c + a * column_offset + b * row_offset,
        d * stride,
        e * down,
        f + d * column_offset + e * row_offset,
    )


def write_embedding(
    path: str | os.PathLike[str], embedding: Embedding, compress: str = "deflate"
) -> None:
    """Write a grid as a cloud-optimised GeoTIFF of float32, complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        embedding: The grid.
        compress: ``"deflate"``, ``"zstd"``, ``"lzw"`` or ``"none"``.

    Raises:
        RasterError: It cannot be written.
        MissingExtraError: rasterio is not installed.
    """
    rasterio_module()
    layout = Layout(
        shape=embedding.shape,
        dtype="float32",
        transform=embedding.transform,
        crs=embedding.crs,
        nodata=float("nan"),
        names=[f"embedding_{channel}" for channel in range(embedding.shape[0])],
        tags=embedding.tags,
        compress=compress,
    )
    array_to_cog(embedding.values, path, layout)
