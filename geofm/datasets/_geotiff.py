"""What the data sets of GeoTIFFs share: opening files, and statistics of their pixels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import MissingExtraError, RasterError

__all__ = ["ImageError", "Moments", "check_errors", "opened"]


class ImageError(RasterError):
    """A GeoTIFF of a data set is damaged or not in the data set's format.

    Attributes:
        reason: In a word or two, for counting: ``"unreadable"``, ``"too small"`` ...
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # A DataLoader's worker sends it to the main process.
        return type(self), (str(self), self.reason)


class Moments:
    """Mean and standard deviation of each band, of pixels that come in pieces.

    Pieces are merged by their means and sums of squared deviations (Chan, Golub & LeVeque 1983) in
    float64, which loses nothing however many there are; a running sum of squares would.

    Args:
        bands: Their number.

    Attributes:
        counts: Valid pixels of each band.
        mean: Of each band.
    """

    def __init__(self, bands: int) -> None:
        self.counts = np.zeros(bands, np.int64)
        self.mean = np.zeros(bands)
        self._squares = np.zeros(bands)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each band, over the population; 0 where nothing was added."""
        return np.asarray(np.sqrt(self._squares / np.maximum(self.counts, 1)))

    def add(self, values: NDArray[np.float32]) -> None:
        """Add a piece.

        Args:
            values: (bands, H, W), NaN where a pixel is missing.
        """
        piece = Moments(len(values))
        for band, layer in enumerate(values):
            valid = layer[~np.isnan(layer)].astype(np.float64)
            if valid.size:
                piece.counts[band] = valid.size
                piece.mean[band] = valid.mean()
                piece._squares[band] = np.square(valid - piece.mean[band]).sum()
        self.merge(piece)

    def merge(self, other: Moments) -> None:
        """Add what another has seen.

        Args:
            other: Of the same bands.
        """
        share = other.counts / np.maximum(self.counts + other.counts, 1)
        apart = other.mean - self.mean
        self._squares += other._squares + apart**2 * self.counts * share
        self.mean += apart * share
        self.counts += other.counts


def check_errors(errors: str) -> str:
    """The option, if it is one.

    Args:
        errors: ``"raise"`` or ``"skip"``.

    Raises:
        ValueError: It is another.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is {errors!r}; expected 'raise' or 'skip'")
    return errors


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A raster open for reading.

    Args:
        path: Anything GDAL reads.

    Yields:
        The rasterio dataset. What GDAL cannot read of it in the block is an `ImageError` as well.

    Raises:
        ImageError: It cannot be opened or read.
        MissingExtraError: rasterio is not installed.
    """
    try:
        import rasterio
    except ImportError as error:
        raise MissingExtraError("rasters need rasterio: pip install 'geofm[raster]'") from error
    try:
        with rasterio.open(path) as file:
            yield file
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise ImageError(f"{path} cannot be read as a raster: {error}") from error
