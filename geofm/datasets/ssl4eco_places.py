"""SSL4Eco's places: which there are, what grows there, and how often pretraining draws them."""

from __future__ import annotations

import csv
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets._geotiff import ImageError, opened
from geofm.datasets._places import centre_of_grid
from geofm.datasets._report import SkipReport
from geofm.errors import DataNotFoundError, RasterError, UnsafeFileError

__all__ = [
    "BANDS",
    "PLACES_CSV",
    "PlaceRow",
    "Places",
    "check_image",
    "index_places",
    "list_places",
    "place_weights",
    "read_mountains",
    "read_places",
]

logger = logging.getLogger(__name__)

BANDS: Final = tuple("B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12 NDVI".split())
"""Bands of every image, in the order of the file; NDVI is × 10000 with negative values cut off."""

PLACES_CSV: Final = "places.csv"
"""Name of the table that `index_places` writes."""

_COLUMNS: Final = ("id", "dates", "ndvi", "longitude", "latitude")
_NAME = re.compile(r"[0-9]{6}")


@dataclass(frozen=True, eq=False)
class Places:
    """The places of a folder and their images.

    Arrays of fixed-length names rather than lists: a quarter of a million places then cost each
    DataLoader worker nothing, as nothing in them is ever written.

    Attributes:
        ids: Six digits each, ascending, (n,).
        files: Names of all places' images, as the file system encodes them, each place's sorted.
        starts: Where each place's images begin in `files`, and their number at the end, (n + 1,).
        single: Places with one image, which are left out.
        ignored: Entries of the folder that are not places.
    """

    ids: NDArray[np.str_]
    files: NDArray[np.bytes_]
    starts: NDArray[np.int64]
    single: int = 0
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def paths(self, root: Path, index: int) -> list[Path]:
        """Images of one place, sorted by name.

        Args:
            root: The data set's folder.
            index: Number of the place.

        Raises:
            UnsafeFileError: A name leads out of the place's folder: the list was not made here.
        """
        place = str(self.ids[index])
        names = [
            os.fsdecode(bytes(name))
            for name in self.files[self.starts[index] : self.starts[index + 1]]
        ]
        for name in names:
            if not _NAME.fullmatch(place) or Path(name).name != name:
                raise UnsafeFileError(f"{place}/{name} is not <6 digits>/<file>; list_places again")
        return [root / "imgs" / place / name for name in names]


def list_places(root: str | os.PathLike[str]) -> Places:
    """List a data set's places, opening no image.

    Args:
        root: The folder that holds ``imgs``.

    Returns:
        Places with at least two images. Files other than ``*.tif`` and hidden ones are not images.

    Raises:
        DataNotFoundError: There is no such folder, or no place with two images in it.
    """
    folder = Path(root) / "imgs"
    if not folder.is_dir():
        raise DataNotFoundError(
            f"there is no folder {folder}; SSL4Eco is laid out as imgs/<6 digits>/<patch id>.tif"
        )
    single = ignored = 0
    ids: list[str] = []
    files: list[bytes] = []
    starts = [0]
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in found:
        if not is_folder or not _NAME.fullmatch(name):
            ignored += 1
            continue
        with os.scandir(folder / name) as images:
            names = sorted(
                os.fsencode(image.name)
                for image in images
                if image.name.lower().endswith(".tif") and not image.name.startswith(".")
            )
        if len(names) < 2:
            single += 1
            continue
        ids.append(name)
        files += names
        starts.append(len(files))
    if not ids:
        raise DataNotFoundError(
            f"{folder} has no place with two images: {single} folders of six digits with fewer, "
            f"{ignored} other entries"
        )
    return Places(np.array(ids), np.array(files), np.array(starts), single, ignored)


def check_image(file: Any, path: Path) -> None:
    """Refuse a file that is not an image of SSL4Eco.

    Args:
        file: The open rasterio dataset.
        path: For the message.

    Raises:
        ImageError: It has not 13 bands, not uint16, or says that its bands are others.
    """
    if file.count != len(BANDS):
        raise ImageError(
            f"{path} has {file.count} bands; expected {len(BANDS)}: {', '.join(BANDS)}",
            "wrong number of bands",
        )
    if set(file.dtypes) != {"uint16"}:
        raise ImageError(f"{path} holds {file.dtypes[0]}; expected uint16 DN", "wrong type")
    described = tuple(file.descriptions)
    # Other descriptions than band names say nothing about the order.
    if sorted(map(str, described)) == sorted(BANDS) and described != BANDS:
        raise ImageError(
            f"{path} names its bands {', '.join(described)}; expected {', '.join(BANDS)}",
            "wrong order of bands",
        )


@dataclass(frozen=True)
class PlaceRow:
    """What `index_places` knows of a place.

    Attributes:
        ndvi: Mean NDVI of each image in the order of their names; NaN where one cannot be read or
            has no data.
        longitude: Degrees; None where no image tells.
        latitude: Degrees; None where no image tells.
    """

    ndvi: tuple[float, ...]
    longitude: float | None
    latitude: float | None


def index_places(
    root: str | os.PathLike[str], *, places: Places | None = None, workers: int = 4
) -> Path:
    """Read every image once and write ``places.csv`` beside ``imgs``.

    Its columns are ``id``, ``dates`` (number of images), ``ndvi`` (the mean of each, separated by
    spaces), ``longitude`` and ``latitude`` of the centre. Means leave out pixels without data
    (B4 and B8 both 0). Images that cannot be read are logged and have ``nan``.

    Args:
        root: The folder that holds ``imgs``.
        places: From `list_places`; None to list them.
        workers: Threads that read.

    Returns:
        The table's path; it appears once it is complete.

    Raises:
        DataNotFoundError: There are no places.
        MissingExtraError: rasterio is not installed.
    """
    base = Path(root)
    listed = list_places(base) if places is None else places
    report = SkipReport()
    target = base / PLACES_CSV
    temporary = base / f".{PLACES_CSV}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            for index, row in enumerate(_rows(base, listed, workers, report)):
                where = ("", "") if row.longitude is None else (row.longitude, row.latitude)
                ndvi = " ".join(f"{value:.5f}" for value in row.ndvi)
                table.writerow((listed.ids[index], len(row.ndvi), ndvi, *where))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if report.counts:
        logger.warning("indexing places: %s", report)
    return target


def read_places(path: str | os.PathLike[str]) -> dict[str, PlaceRow]:
    """Read the table that `index_places` wrote.

    Args:
        path: The CSV file.

    Returns:
        A row for each place, by id.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It is not such a table.
    """
    rows = {}
    for number, record in _records(path, _COLUMNS):
        try:
            where = [float(record[key]) if record[key] else None for key in _COLUMNS[3:]]
            ndvi = tuple(float(value) for value in record["ndvi"].split())
        except ValueError as error:
            raise RasterError(f"{path}, line {number}: {error}") from error
        rows[record["id"]] = PlaceRow(ndvi, where[0], where[1])
    return rows


def read_mountains(path: str | os.PathLike[str]) -> dict[str, bool]:
    """Read which places are in mountains.

    Args:
        path: A CSV file with the columns ``id`` (six digits) and ``mountain`` (1 or 0).

    Returns:
        Whether it is, by id.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It is not such a table.
    """
    mountains = {}
    for number, record in _records(path, ("id", "mountain")):
        if record["mountain"] not in ("0", "1"):
            raise RasterError(
                f"{path}, line {number}: mountain is {record['mountain']!r}; expected 0 or 1"
            )
        mountains[record["id"]] = record["mountain"] == "1"
    return mountains


def place_weights(
    ids: Sequence[str] | NDArray[np.str_],
    rows: Mapping[str, PlaceRow],
    mountains: Mapping[str, bool] | None = None,
    *,
    bare: float = 0.1,
) -> NDArray[np.float64]:
    """How often pretraining draws each place, as published.

    A quarter as often where the mean NDVI is below 0.1 in all seasons, twice as often in mountains;
    in bare mountains both, that is half as often. A place of which no image could be read keeps
    its weight. What counts as mountains has to be given: the images do not tell.

    Args:
        ids: The places, in the order of the result.
        rows: From `read_places`.
        mountains: Whether a place is in mountains, by id; None for none.
        bare: NDVI below which nothing grows.

    Returns:
        Weights, (n,).

    Raises:
        DataNotFoundError: A place is not in `rows` or not in `mountains`.
    """
    for name, table in (("places", rows), ("mountains", mountains)):
        absent = [str(i) for i in ids if table is not None and i not in table]
        if absent:
            raise DataNotFoundError(
                f"{len(absent)} of {len(ids)} places are not in the table of {name}, for example "
                f"{absent[0]}; was it made for this folder?"
            )
    weights = np.ones(len(ids))
    for number, place in enumerate(ids):
        known = [value for value in rows[place].ndvi if not math.isnan(value)]
        if known and max(known) < bare:
            weights[number] /= 4
        if mountains is not None and mountains[place]:
            weights[number] *= 2
    return weights


def _records(
    path: str | os.PathLike[str], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV file that has these columns, with their numbers."""
    if not Path(path).is_file():
        raise DataNotFoundError(f"there is no {path}")
    with Path(path).open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        absent = [column for column in columns if column not in (table.fieldnames or ())]
        if absent:
            raise RasterError(f"{path} has no column {', '.join(absent)}")
        for record in table:
            if any(record[column] is None for column in columns):
                raise RasterError(f"{path}, line {table.line_num}: too few columns")
            yield table.line_num, record


def _rows(root: Path, places: Places, workers: int, report: SkipReport) -> Iterator[PlaceRow]:
    def read(index: int) -> tuple[PlaceRow, list[RasterError]]:
        return _row(places.paths(root, index))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        # A thousand at a time, so that no quarter of a million results wait in memory.
        for first in range(0, len(places), 1000):
            for row, errors in pool.map(read, range(first, min(first + 1000, len(places)))):
                for error in errors:
                    report.add_error(error)
                yield row


def _row(paths: Sequence[Path]) -> tuple[PlaceRow, list[RasterError]]:
    means: list[float] = []
    errors: list[RasterError] = []
    where: tuple[float, float] | tuple[None, None] = (None, None)
    for path in paths:
        mean = math.nan
        try:
            with opened(path) as file:
                check_image(file, path)
                red, near, ndvi = file.read([BANDS.index(b) + 1 for b in ("B4", "B8", "NDVI")])
                transform, crs, shape = tuple(file.transform)[:6], file.crs, file.shape
            valid = (red > 0) | (near > 0)
            mean = float(ndvi[valid].mean()) / 10_000 if valid.any() else math.nan
            if where[0] is None and crs:
                where = centre_of_grid(transform, crs.to_wkt(), shape)
        except RasterError as error:
            errors.append(error)
        means.append(mean)
    return PlaceRow(tuple(means), *where), errors
