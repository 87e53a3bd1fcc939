"""Any GeoTIFFs with named bands, cut into tiles, for pretraining on one's own region."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from geofm.cards import LEVELS, InputSpec, Statistics
from geofm.datasets._geotiff import ImageError, Moments, check_errors, opened
from geofm.datasets._index import checked_index
from geofm.datasets._report import SkipReport
from geofm.errors import BandError, DataNotFoundError, GeofmError, PixelError
from geofm.preprocess import Preprocess
from geofm.spectral import match_bands, missing_message

__all__ = ["TileFolder"]

logger = logging.getLogger(__name__)

_SUFFIXES: Final = (".tif", ".tiff")
# Values that the pass over a raster holds in memory at a time (as float32, a few times over).
_VALUES: Final = 8_000_000


@dataclass(frozen=True)
class _Raster:
    """A file that has all the bands.

    Attributes:
        path: Of the file.
        channels: Numbers of the wanted bands in the file, from 1.
        named: What the file calls them.
        shape: Rows and columns.
        masked: Whether the file itself tells pixels without data.
    """

    path: Path
    channels: tuple[int, ...]
    named: tuple[str, ...]
    shape: tuple[int, int]
    masked: bool


class TileFolder(Dataset[dict[str, Any]]):
    """Square windows of all GeoTIFFs in a folder and the folders in it.

    A sample is ``{"id": "<file>:<row>:<column>", "image": float32 tensor (C, size, size)}``,
    normalized by band as `input_spec` says: (DN - mean) / std, missing pixels 0. Bands are found by
    name or alias, so files may have them in different order.

    Windows lie on a regular grid from the upper left corner; where it does not reach the right or
    lower edge, one more row or column of windows ends there, overlapping its neighbours, so that
    every pixel is in some window. Files are sorted by name, windows by row and column.

    One pass over all pixels when the data set is made gives the statistics (each valid pixel once,
    whatever the stride), finds windows with too much missing, and finds damaged files. It is left
    out, and only headers are read, with ``statistics`` given, ``max_missing=1`` and
    ``errors="raise"``.

    Args:
        root: The folder; links to folders are not followed.
        bands: Bands of a sample, in order; None for all of the first file.
        size: Side of a window in pixels.
        stride: Pixels from one window to the next; None for `size`.
        units: ``"dn"``, ``"reflectance"`` or ``"uint8"``, as in `create_transform`.
        level: ``"L1C"``, ``"L2A"``, or None where it is not known or mixed.
        statistics: Mean and standard deviation in DN by band, or from another `TileFolder` of the
            same bands; None to compute them.
        nodata: Stored values that mean "no data", besides the file's own and NaN; None for 0 (none
            with ``units="uint8"``). 0 never does in bands that are not the sensor's.
        sensor: Sensor whose names the bands are.
        errors: ``"raise"``, or ``"skip"`` to leave out files that cannot be used: a band is
            missing, they are smaller than `size`, damaged, or not in the stated units. After the
            pass an unreadable file is an error in any case.
        names: Names of the files' bands, in order, instead of the descriptions in the files.
        max_missing: Largest share of a window's values (all bands) that may be missing; windows
            with more are left out.
        offset: Added to DN, for example -1000, as in `create_transform`.

    Attributes:
        bands: The sensor's names of the bands.
        statistics: In DN and in the order of `bands`, for a weight card.
        report: Files and windows that were left out when it was made, a `Report`.

    Raises:
        DataNotFoundError: There is no such folder, or nothing usable in it.
        BandError: A file has no band names, or lacks a band; names the file and the band.
        ImageError: A file cannot be read, or is too small.
        PixelError: Values are not in the stated units, a band is constant, or an argument is out of
            its range.
        MissingExtraError: rasterio is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        bands: Sequence[str] | None = None,
        size: int = 64,
        stride: int | None = None,
        units: str = "dn",
        level: str | None = None,
        statistics: Statistics | Mapping[str, Sequence[float]] | None = None,
        nodata: float | Sequence[float] | None = None,
        sensor: str = "sentinel2",
        errors: str = "raise",
        *,
        names: Sequence[str] | None = None,
        max_missing: float = 0.5,
        offset: float | None = None,
    ) -> None:
        step = size if stride is None else stride
        if size < 1 or step < 1 or not 0 <= max_missing <= 1:
            raise PixelError(
                f"size={size}, stride={stride}, max_missing={max_missing}: expected at least 1 px "
                f"and a share from 0 to 1"
            )
        self.root, self.size, self.stride = Path(root), size, step
        self.max_missing = max_missing
        self.errors = check_errors(errors)
        self.report = SkipReport()
        self._units, self._level, self._offset = units, level, offset
        self._sensor, self._names = sensor, names
        if nodata is None:
            nodata = () if units == "uint8" else (0.0,)
        self._nodata = tuple(float(value) for value in np.asarray(nodata, np.float64).ravel())

        self._rasters, self.bands = self._open_all(bands)
        self._windows = self._grid()
        given = None if statistics is None else _in_order(statistics, self.bands)
        moments = Moments(len(self.bands))
        if given is None or max_missing < 1 or errors == "skip":
            moments = self._pass()
        if not len(self._windows):
            raise DataNotFoundError(f"no usable window is left in {self.root}: {self.report}")
        if self.report.counts:
            logger.warning("tiles of %s: %s", self.root, self.report)
        self.statistics = _statistics(moments, self.bands) if given is None else given
        self._prepare = self._transforms(self.input_spec())

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One window.

        Args:
            index: Its number.

        Returns:
            The sample.

        Raises:
            ImageError: The file cannot be read any more.
            IndexError: There is no such window.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several windows, opening each file once; a DataLoader asks for batches like this.

        Args:
            indices: Their numbers.

        Returns:
            The samples in that order.

        Raises:
            ImageError: A file cannot be read any more.
            IndexError: There is no such window.
        """
        by_file: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            number = checked_index(index, len(self), "window")
            by_file.setdefault(int(self._windows[number, 0]), []).append(place)
        samples: dict[int, dict[str, Any]] = {}
        for number, places in by_file.items():
            raster = self._rasters[number]
            corners = [self._windows[indices[place], 1:].tolist() for place in places]
            with opened(raster.path) as file:
                pixels = [
                    _read(file, raster, (row, row + self.size), (column, column + self.size))
                    for row, column in corners
                ]
            images = self._apply(self._prepare[number], np.ma.stack(pixels), raster)
            name = raster.path.relative_to(self.root).as_posix()
            for place, (row, column), image in zip(places, corners, images, strict=True):
                samples[place] = {"id": f"{name}:{row}:{column}", "image": image}
        return [samples[place] for place in range(len(indices))]

    def input_spec(self) -> InputSpec:
        """What a model pretrained on these samples expects.

        Returns:
            For its weight card; without a `level` the statistics serve both.
        """
        statistics = {self._level or "any": self.statistics}
        return dataclasses.replace(self._spec(), statistics=statistics)

    def _spec(self) -> InputSpec:
        """All but the statistics."""
        return InputSpec(
            sensor=self._sensor,
            bands=self.bands,
            levels=LEVELS if self._level is None else (self._level,),
            normalization="zscore",
            size=self.size,
            fit="any",
            nodata=self._nodata,
        )

    def _open_all(self, bands: Sequence[str] | None) -> tuple[list[_Raster], tuple[str, ...]]:
        """All files that have the bands, and the bands' own names."""
        if not self.root.is_dir():
            raise DataNotFoundError(f"there is no folder {self.root}")
        rasters = []
        wanted = bands
        for path in _tiffs(self.root):
            try:
                raster, own = self._open(path, wanted)
            except (ImageError, BandError) as error:
                if self.errors == "raise":
                    raise
                self.report.add_error(error)
                continue
            wanted = own
            rasters.append(raster)
        if not rasters or wanted is None:
            raise DataNotFoundError(
                f"no usable *.tif or *.tiff in {self.root}. {self.report}".strip()
            )
        return rasters, tuple(wanted)

    def _open(self, path: Path, wanted: Sequence[str] | None) -> tuple[_Raster, tuple[str, ...]]:
        with opened(path) as file:
            from rasterio.enums import MaskFlags

            described = file.descriptions
            shape = (int(file.height), int(file.width))
            masked = any(MaskFlags.all_valid not in flags for flags in file.mask_flag_enums)
            kinds = {np.dtype(kind).kind for kind in file.dtypes}
        names = described if self._names is None else self._names
        if not all(names):
            raise BandError(
                f"{path} has {len(described)} bands without names; name them in order, for "
                f"example names=['B1', 'B2', ...]"
            )
        if len(names) != len(described):
            raise BandError(f"{path} has {len(described)} bands, {len(names)} are named")
        if not kinds <= set("iuf"):
            raise ImageError(f"{path} holds neither integers nor floats", "wrong type")
        if min(shape) < self.size:
            raise ImageError(
                f"{path} is {shape[0]} x {shape[1]} px, smaller than size={self.size}", "too small"
            )
        try:
            matches = match_bands(
                names if wanted is None else wanted,
                names,
                wanted_sensor=self._sensor,
                available_sensor=self._sensor,
            )
        except BandError as error:
            raise BandError(f"{path}: {error}") from error
        found = [match.index for match in matches if match.index is not None]
        if len(found) < len(matches):
            raise BandError(missing_message(matches, names, str(path), read_as=self._sensor))
        channels, named = tuple(i + 1 for i in found), tuple(str(names[i]) for i in found)
        own = tuple(match.wanted for match in matches)
        return _Raster(path, channels, named, shape, masked), own

    def _grid(self) -> NDArray[np.int32]:
        """File, row and column of every window, (n, 3)."""
        parts = []
        for number, raster in enumerate(self._rasters):
            rows, columns = (_starts(length, self.size, self.stride) for length in raster.shape)
            corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
            parts.append(np.insert(corners, 0, number, axis=1))
        return np.concatenate(parts).astype(np.int32)

    def _pass(self) -> Moments:
        """Read all pixels once: statistics, windows with too much missing, damaged files."""
        moments = Moments(len(self.bands))
        # DN with NaN where a pixel is missing, by the very rules that normalize samples.
        transforms = self._transforms(dataclasses.replace(self._spec(), normalization="range"))
        keep = np.ones(len(self._windows), bool)
        for number, raster in enumerate(self._rasters):
            mine = np.arange(*np.searchsorted(self._windows[:, 0], [number, number + 1]))
            file_moments = Moments(len(self.bands))
            missing = np.zeros(raster.shape, np.uint16)
            try:
                for row, pixels in self._strips(raster):
                    values = self._apply(transforms[number], pixels, raster).numpy()
                    missing[row : row + values.shape[1]] = np.isnan(values).sum(0)
                    file_moments.add(values)
            except GeofmError as error:
                if self.errors == "raise":
                    raise
                self.report.add_error(error)
                keep[mine] = False
                continue
            moments.merge(file_moments)
            for index in mine:
                _, row, column = self._windows[index].tolist()
                lost = missing[row : row + self.size, column : column + self.size].mean()
                if lost > self.max_missing * len(self.bands):
                    keep[index] = False
                    self.report.add(
                        f"window with more than {self.max_missing:g} missing",
                        f"{raster.path} at row {row}, column {column}",
                    )
        self._windows = self._windows[keep]
        return moments

    def _strips(self, raster: _Raster) -> Iterator[tuple[int, NDArray[Any]]]:
        """The raster from top to bottom in pieces that fit into memory."""
        height, width = raster.shape
        with opened(raster.path) as file:
            rows = max(1, _VALUES // (width * len(raster.channels)))
            block = int(file.block_shapes[0][0])
            # Whole blocks, so that none is decompressed twice.
            rows = rows // block * block or rows
            for row in range(0, height, rows):
                yield row, _read(file, raster, (row, min(row + rows, height)), (0, width))

    def _transforms(self, spec: InputSpec) -> list[Preprocess]:
        """For each raster what prepares its pixels; one for all that name their bands alike."""
        made: dict[tuple[str, ...], Preprocess] = {}
        for raster in self._rasters:
            if raster.named not in made:
                made[raster.named] = Preprocess(
                    spec,
                    raster.named,
                    self._units,
                    self._level,
                    nodata=self._nodata,
                    offset=self._offset,
                )
        return [made[raster.named] for raster in self._rasters]

    def _apply(self, prepare: Preprocess, pixels: NDArray[Any], raster: _Raster) -> Tensor:
        try:
            prepared: Tensor = prepare(pixels)
        except PixelError as error:
            raise PixelError(f"{raster.path}: {error}") from error
        return prepared


def _tiffs(root: Path) -> Iterator[Path]:
    """All GeoTIFFs below a folder, in one order on every machine."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def _starts(length: int, size: int, stride: int) -> NDArray[np.int64]:
    """Where windows begin along one side; the last one ends at the edge."""
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return np.array(starts)


def _read(
    file: Any, raster: _Raster, rows: tuple[int, int], columns: tuple[int, int]
) -> NDArray[Any]:
    """Stored values of the wanted bands, (C, rows, columns); masked where the file says so."""
    pixels: NDArray[Any] = file.read(raster.channels, window=(rows, columns), masked=raster.masked)
    return pixels


def _in_order(
    statistics: Statistics | Mapping[str, Sequence[float]], bands: tuple[str, ...]
) -> Statistics:
    """Given statistics in the order of the bands."""
    if isinstance(statistics, Statistics):
        if not len(statistics.mean) == len(statistics.std) == len(bands):
            raise PixelError(
                f"statistics are of {len(statistics.mean)} bands, the tiles have {len(bands)}: "
                f"{', '.join(bands)}"
            )
        return statistics
    absent = [band for band in bands if band not in statistics]
    if absent:
        raise BandError(f"statistics lack {', '.join(absent)}; they are of {', '.join(statistics)}")
    pairs = [statistics[band] for band in bands]
    if any(len(pair) != 2 for pair in pairs):
        raise PixelError("statistics are a mean and a standard deviation for each band")
    return Statistics(tuple(float(p[0]) for p in pairs), tuple(float(p[1]) for p in pairs))


def _statistics(moments: Moments, bands: tuple[str, ...]) -> Statistics:
    for band, count, std in zip(bands, moments.counts, moments.std, strict=True):
        if not count or not std > 0:
            what = "is the same everywhere" if count else "has no valid pixel"
            raise PixelError(f"band {band} {what}, so it cannot be normalized; leave it out")
    return Statistics(tuple(moments.mean.tolist()), tuple(moments.std.tolist()))
