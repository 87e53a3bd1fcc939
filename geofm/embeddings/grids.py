"""Cells of an embedding, block by block, and where they lie."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geofm.errors import RasterError
from geofm.raster.sources import Coefficients, rasterio_module

__all__ = ["Cells", "Embeddings", "Grid", "WindowedEmbeddings", "single_band", "unwrapped"]

Floats: TypeAlias = NDArray[np.float32]
Reader: TypeAlias = Callable[[int, int, int, int], Floats]

# What the vectors of one block may take.
_BLOCK_BYTES = 32 * 2**20
# What a map of one value a cell may take: a file may claim any size.
_MAX_MAP_BYTES = 8e9


@dataclass(frozen=True)
class Grid:
    """Where the cells of an embedding lie, and what made them.

    Attributes:
        shape: (channels, rows, columns).
        transform: Affine coefficients a, b, c, d, e, f: x = a·column + b·row + c,
            y = d·column + e·row + f.
        crs: Coordinate reference system as WKT; None for none.
        tags: What made them, as `geofm.embed_raster` writes it.
    """

    shape: tuple[int, int, int]
    transform: Coefficients
    crs: str | None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def date(self) -> datetime.date | None:
        """Day of the image; None if that is not known."""
        text = self.tags.get("GEOFM_DATE")
        try:
            return datetime.date.fromisoformat(text[:10]) if text else None
        except ValueError as error:
            raise RasterError(f"the tag GEOFM_DATE is no ISO date: {text!r}") from error

    @property
    def preprocessing(self) -> str | None:
        """Version of the preprocessing: a hash of all that the tags say about it."""
        text = self.tags.get("GEOFM_PREPARE")
        return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None

    def xy(
        self, rows: NDArray[Any], columns: NDArray[Any], corner: tuple[float, float] = (0.5, 0.5)
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coordinates of cells.

        Args:
            rows: (n,).
            columns: (n,).
            corner: Which point of them, right and down, in cells; their centres by default.

        Returns:
            x and y in the grid's reference system, (n,) each.
        """
        a, b, c, d, e, f = self.transform
        right, down = columns + corner[0], rows + corner[1]
        return a * right + b * down + c, d * right + e * down + f

    def fractional(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Columns and rows of coordinates, from the grid's first corner: `xy` reversed.

        Args:
            x: In the grid's reference system, (n,).
            y: (n,).
        """
        a, b, c, d, e, f = self.transform
        area = a * e - b * d
        return (e * (x - c) - b * (y - f)) / area, (a * (y - f) - d * (x - c)) / area

    def lonlat(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Longitudes and latitudes of coordinates.

        Raises:
            RasterError: The grid has no reference system, or one that is nowhere on the globe.
        """
        lon, lat = self._warp(self._known_crs(), "EPSG:4326", x, y)
        return lon, lat

    def extent(self) -> tuple[float, float, float, float]:
        """West, south, east and north of the grid's corners, in degrees.

        Of a grid across the antimeridian one of west and east is beyond 180.
        """
        rows, columns = self.shape[1:]
        # The corners, and the middle.
        down = np.array([0, 0, rows, rows, rows / 2])
        right = np.array([0, columns, 0, columns, columns / 2])
        lon, lat = self.lonlat(*self.xy(down, right, (0, 0)))
        lon = unwrapped(lon, lon[-1])
        return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())

    def cell_at(self, lon: float, lat: float) -> tuple[int, int]:
        """The cell that a place lies in.

        Args:
            lon: Degrees east.
            lat: Degrees north.

        Returns:
            Row and column.

        Raises:
            RasterError: It lies outside the grid, or the grid has no reference system.
        """
        if not (math.isfinite(lon) and -360 <= lon <= 360 and -90 <= lat <= 90):
            raise RasterError(f"a place is degrees east and north, got {lon:g}, {lat:g}")
        x, y = self._warp("EPSG:4326", self._known_crs(), np.array([lon]), np.array([lat]))
        column, row = (float(v[0]) for v in self.fractional(x, y))
        if not (0 <= column < self.shape[2] and 0 <= row < self.shape[1]):
            west, south, east, north = self.extent()
            raise RasterError(
                f"{lon:g}, {lat:g} (longitude, latitude) lies outside the embedding, which goes "
                f"from {west:.5f} to {east:.5f} east and from {south:.5f} to {north:.5f} north"
            )
        return int(row), int(column)

    def _known_crs(self) -> str:
        if self.crs is None:
            raise RasterError(
                "the embedding has no coordinate reference system, so longitude and latitude mean "
                "nothing in it; embed an image that has one"
            )
        return self.crs

    @staticmethod
    def _warp(
        source: str, target: str, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rasterio = rasterio_module()
        from rasterio.warp import transform

        failures = (
            rasterio.errors.CRSError,
            rasterio.errors.RasterioError,
            rasterio._err.CPLE_BaseError,
        )
        try:
            found = transform(source, target, x, y)
        except failures as error:
            raise RasterError(
                f"the embedding's coordinate reference system and longitude and latitude do not "
                f"lead to each other here: {textwrap.shorten(str(error), 160)}"
            ) from error
        return np.asarray(found[0]), np.asarray(found[1])


@dataclass(frozen=True, eq=False)
class Cells:
    """Some cells that have data.

    Attributes:
        ids: row · columns + column, (n,) int64.
        vectors: (n, channels) float32, all finite.
    """

    ids: NDArray[np.int64]
    vectors: Floats


class Embeddings(ABC):
    """The cells of one grid, read in parts.

    Attributes:
        grid: Where they lie.
        name: What messages call them.
        path: The file or folder that they are read from; None for none.
    """

    grid: Grid
    name: str
    path: Path | None = None

    @abstractmethod
    def blocks(self) -> Iterator[Cells]:
        """All cells with data, each once, in parts of bounded size."""

    @abstractmethod
    def vector(self, row: int, column: int) -> Floats:
        """The vector of one cell.

        Args:
            row: Row.
            column: Column.

        Returns:
            (channels,); NaN where it has no data.
        """

    def vector_at(self, lon: float, lat: float) -> Floats:
        """The vector of the cell that a place lies in.

        Args:
            lon: Degrees east.
            lat: Degrees north.

        Returns:
            (channels,).

        Raises:
            RasterError: It lies outside, or the cell has no data.
        """
        row, column = self.grid.cell_at(lon, lat)
        vector = self.vector(row, column)
        if not np.isfinite(vector).all():
            raise RasterError(
                f"the embedding has no data at {lon:g}, {lat:g} (row {row}, column {column}); "
                f"choose a place beside it"
            )
        return vector

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.grid.shape})"


class WindowedEmbeddings(Embeddings):
    """Embeddings in an array that is read window by window.

    Args:
        grid: Where the cells lie.
        name: What messages call them.
        opened: Opens the array: gives a function of top, left, height and width that returns
            (channels, height, width), NaN where there is no data.
        tile: Rows and columns that are stored together.
        path: As in `Embeddings`.
    """

    def __init__(
        self,
        grid: Grid,
        name: str,
        opened: Callable[[], AbstractContextManager[Reader]],
        tile: tuple[int, int],
        path: Path | None = None,
    ) -> None:
        self.grid, self.name, self.opened, self.path = grid, name, opened, path
        self.window = _window(grid.shape, tile)

    def windows(self) -> Iterator[tuple[int, int, Floats]]:
        """All windows: top, left, and (channels, height, width) with NaN for no data."""
        _, rows, columns = self.grid.shape
        high, wide = self.window
        with self.opened() as read:
            for top in range(0, rows, high):
                for left in range(0, columns, wide):
                    yield (
                        top,
                        left,
                        read(top, left, min(high, rows - top), min(wide, columns - left)),
                    )

    def blocks(self) -> Iterator[Cells]:
        """As `Embeddings.blocks`."""
        columns = self.grid.shape[2]
        for top, left, values in self.windows():
            channels, _, width = values.shape
            valid = np.isfinite(values).all(axis=0).reshape(-1)
            row, column = np.divmod(np.flatnonzero(valid), width)
            vectors = np.ascontiguousarray(values.reshape(channels, -1)[:, valid].T)
            yield Cells((top + row) * columns + left + column, vectors)

    def vector(self, row: int, column: int) -> Floats:
        """As `Embeddings.vector`."""
        with self.opened() as read:
            return read(row, column, 1, 1)[:, 0, 0]


def of_array(values: Floats, grid: Grid, name: str) -> WindowedEmbeddings:
    """Embeddings in memory.

    Args:
        values: (channels, rows, columns).
        grid: Where they lie.
        name: What messages call them.
    """

    @contextlib.contextmanager
    def opened() -> Iterator[Reader]:
        yield lambda top, left, high, wide: values[:, top : top + high, left : left + wide]

    return WindowedEmbeddings(grid, name, opened, (128, 128))


def single_band(grid: Grid, fill: float, dtype: str) -> NDArray[Any]:
    """An array of one value a cell, in memory: 4 bytes against the kilobytes of a vector.

    Args:
        grid: The grid.
        fill: Its values.
        dtype: Its type.

    Returns:
        (rows · columns,), to be indexed by `Cells.ids`.

    Raises:
        RasterError: It does not fit.
    """
    cells = grid.shape[1] * grid.shape[2]
    size = cells * np.dtype(dtype).itemsize
    if size > _MAX_MAP_BYTES:
        raise RasterError(
            f"a map of {grid.shape[1]} x {grid.shape[2]} cells takes {size / 1e9:.0f} GB; cut the "
            f"embedding into parts"
        )
    return np.full(cells, fill, dtype=dtype)


def unwrapped(lon: NDArray[np.float64], around: float) -> NDArray[np.float64]:
    """Longitudes by whole turns nearest to one of them, so that they do not jump at 180 degrees.

    Args:
        lon: Degrees east.
        around: That one.
    """
    # A turn is a hair more, so that both edges of a map of the whole globe stay where they are.
    nearest: NDArray[np.float64] = lon - 360 * np.round((lon - around) / 360.001)
    return nearest


def _window(shape: tuple[int, int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Whole tiles, or whole parts of one tile, that stay within a block's size."""
    channels, rows, columns = shape
    high, wide = min(tile[0], rows), min(tile[1], columns)
    limit = max(1, _BLOCK_BYTES // (4 * channels))
    if high * wide > limit:
        wide = min(wide, limit)
        return max(1, min(high, limit // wide)), wide
    return min(high * max(1, limit // (high * wide)), -(-rows // high) * high), wide
