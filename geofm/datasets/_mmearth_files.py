"""MMEarth's files: which arrays and JSON entries there are, and whether they fit together."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.cards import LEVELS
from geofm.datasets._hdf5 import import_h5py
from geofm.errors import DataNotFoundError, GeofmError
from geofm.spectral import refuse_string

__all__ = [
    "KINDS",
    "MODALITIES",
    "STORED_BANDS",
    "MMEarthFormatError",
    "Modality",
    "check_shapes",
    "h5_file",
    "present",
    "rows_of_split",
    "scales",
    "tile_ids",
    "tile_levels",
    "unpack_mmearth",
]

logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str]
Raw = NDArray[Any]

STORED_BANDS: Final = tuple("B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12".split())
"""Bands of the array ``sentinel2``, in its order. Level-2A tiles have zeros for B10."""


class MMEarthFormatError(GeofmError, ValueError):
    """A set's files are not in MMEarth's format or contradict each other."""


@dataclass(frozen=True, slots=True)
class Modality:
    """What an array holds.

    Attributes:
        kind: ``"map"`` (values a pixel), ``"vector"`` (values a tile), ``"codes"`` (an integer a
            pixel) or ``"one_hot"``.
        channels: Length of the second axis.
        missing: Values that mean "no data" in an array of a given type, besides NaN and infinities.
        codes: For ``"codes"``, the codes of class 0, 1, ...; None to deliver them as stored.
    """

    kind: str
    channels: int
    missing: Callable[[np.dtype[Any]], tuple[int, ...]] = lambda dtype: ()
    codes: tuple[int, ...] | None = None


def _canopy_missing(dtype: np.dtype[Any]) -> tuple[int, ...]:
    # 255 written to int8 is clipped to 127 by HDF5 or wrapped to -1 by NumPy.
    return (127, -1) if dtype == np.int8 else (255,)


def _lowest(dtype: np.dtype[Any]) -> tuple[int, ...]:
    # What minus infinity becomes in an integer.
    return (int(np.iinfo(dtype).min),) if dtype.kind == "i" else ()


KINDS: Final[Mapping[str, Modality]] = MappingProxyType(
    {
        "sentinel2": Modality("map", len(STORED_BANDS), lambda dtype: (0,)),
        "sentinel2_cloudmask": Modality("codes", 1, lambda dtype: (65535,)),
        "sentinel2_cloudprod": Modality("codes", 1, lambda dtype: (65535,)),
        "sentinel2_scl": Modality("codes", 1, lambda dtype: (255,)),
        "sentinel1": Modality("map", 8),
        "aster": Modality("map", 2, _lowest),
        "era5": Modality("vector", 12),
        "dynamic_world": Modality("codes", 1, codes=tuple(range(1, 10))),
        "canopy_height_eth": Modality("map", 2, _canopy_missing),
        "lat": Modality("vector", 2),
        "lon": Modality("vector", 2),
        "biome": Modality("one_hot", 14),
        "eco_region": Modality("one_hot", 846),
        "month": Modality("vector", 2),
        "esa_worldcover": Modality("codes", 1, codes=(*range(10, 100, 10), 95, 100)),
    }
)
MODALITIES: Final = tuple(KINDS)
"""Names of all arrays that can be read."""


def h5_file(path: Path) -> Path:
    """The HDF5 file that is meant.

    Args:
        path: The file, or a folder with exactly one.

    Returns:
        The file.

    Raises:
        DataNotFoundError: There is none, or more than one.
    """
    if path.is_dir():
        files = sorted(path.glob("*.h5"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise DataNotFoundError(
                f"the folder {path} must hold exactly one *.h5 file, found {found}; name the file"
            )
        return files[0]
    if not path.is_file():
        raise DataNotFoundError(f"there is no file or folder {path}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataNotFoundError(f"there is no {path}; it belongs to the HDF5 file of its name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MMEarthFormatError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise MMEarthFormatError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}_{suffix}.json")


def present(path: Path, file: Any, modalities: Sequence[str] | None) -> tuple[str, ...]:
    """The modalities to read, each with an array in the file.

    Args:
        path: Of the file, for messages.
        file: The open file.
        modalities: Names; None for all there are.

    Returns:
        Names.

    Raises:
        DataNotFoundError: One that was asked for is not there.
        MMEarthFormatError: There is none at all, or a string was given.
    """
    refuse_string(modalities or (), "modalities", MMEarthFormatError)
    found = [name for name in MODALITIES if name in file]
    if modalities is None:
        absent = [name for name in MODALITIES if name not in file]
        if absent:
            logger.warning("%s has no %s; left out", path, ", ".join(absent))
        if not found:
            raise MMEarthFormatError(f"{path} holds none of MMEarth's arrays")
        return tuple(found)
    wrong = [name for name in modalities if name not in found]
    if wrong or not modalities or len(set(modalities)) != len(modalities):
        raise DataNotFoundError(
            f"modalities are {', '.join(modalities) or 'none'}; {path} has {', '.join(found)}, of "
            f"which each can be named once"
        )
    return tuple(modalities)


def check_shapes(path: Path, file: Any, names: Sequence[str]) -> tuple[int, int] | None:
    """Compare shapes and types with the format.

    Args:
        path: Of the file, for messages.
        file: The open file.
        names: Modalities to compare.

    Returns:
        Height and width of the tiles; None where no modality is a map.

    Raises:
        MMEarthFormatError: An array has another shape or type.
    """
    if "metadata" not in file:
        raise MMEarthFormatError(f"{path} has no array metadata, which holds the tiles' ids")
    count, size = file["metadata"].shape[0], None
    for name in names:
        shape, dtype, modality = file[name].shape, file[name].dtype, KINDS[name]
        maps = modality.kind in ("map", "codes")
        if maps and len(shape) == 4:
            size = size or shape[2:]
        expected: list[tuple[Any, ...]] = [(count, modality.channels)]
        if maps:
            expected = [(count, modality.channels, *(size or ("H", "W")))]
        elif name == "era5":
            expected.append((count, 1, modality.channels))
        if shape not in expected:
            raise MMEarthFormatError(f"{path}: {name} has shape {shape}; expected {expected[-1]}")
        if dtype.kind not in "iuf":
            raise MMEarthFormatError(f"{path}: {name} is of type {dtype}; expected numbers")
    return size


def tile_ids(path: Path, file: Any) -> NDArray[np.bytes_]:
    """Ids of all tiles: the first entry of each row of the metadata.

    Args:
        path: Of the file, for messages.
        file: The open file.

    Returns:
        Bytes, as wide as the longest id.

    Raises:
        MMEarthFormatError: The metadata holds something else.
    """
    metadata = file["metadata"]
    if metadata.dtype.names:
        ids = metadata.fields(metadata.dtype.names[0])[()]
    else:
        ids = metadata[()] if metadata.ndim == 1 else metadata[(slice(None), 0)]
    if ids.ndim != 1 or ids.dtype.kind not in "SO":
        raise MMEarthFormatError(f"{path}: metadata of type {metadata.dtype} holds no ids as bytes")
    # The type is as wide as the longest id, not as the 100 bytes that are set aside in the file.
    return np.array(ids.tolist(), np.bytes_)


def rows_of_split(path: Path, split: str | None, count: int) -> NDArray[np.int64]:
    """Numbers of a split's tiles.

    Args:
        path: Of the HDF5 file.
        split: Name; None for all tiles.
        count: Number of tiles in the file.

    Returns:
        Numbers of rows, in the order of the list.

    Raises:
        DataNotFoundError: There is no such split, or it is empty.
        MMEarthFormatError: It lists something else than tiles of the file.
    """
    if split is None:
        return np.arange(count)
    source = _beside(path, "splits")
    splits = _read_json(source)
    if not splits.get(split):
        found = ", ".join(name for name, rows in splits.items() if rows) or "none"
        raise DataNotFoundError(f"{source} has no tiles of split {split!r}; it has {found}")
    rows = splits[split]
    if not isinstance(rows, list) or not all(type(r) is int and 0 <= r < count for r in rows):
        raise MMEarthFormatError(
            f"{source}: split {split!r} must list numbers from 0 to {count - 1}, the tiles of "
            f"{path.name}"
        )
    return np.array(rows, np.int64)


def tile_levels(path: Path, ids: NDArray[np.bytes_]) -> NDArray[np.int8]:
    """Product level of each tile.

    Args:
        path: Of the HDF5 file.
        ids: Of the tiles.

    Returns:
        Numbers among `LEVELS`.

    Raises:
        DataNotFoundError: There is no tile_info.json.
        MMEarthFormatError: It lacks a tile or its level.
    """
    source = _beside(path, "tile_info")
    info = _read_json(source)
    numbers = {level.lower(): number for number, level in enumerate(LEVELS)}
    levels = np.empty(len(ids), np.int8)
    for position, key in enumerate(ids.tolist()):
        entry = info.get(key.decode())
        if not isinstance(entry, dict):
            raise MMEarthFormatError(f"{source} has no tile {key.decode()}, but {path.name} does")
        if entry.get("S2_type") not in numbers:
            raise MMEarthFormatError(
                f"{source}: S2_type of tile {key.decode()} is {entry.get('S2_type')!r}; expected "
                f"'l1c' or 'l2a'"
            )
        levels[position] = numbers[entry["S2_type"]]
    return levels


def scales(
    path: Path, modalities: Sequence[str], statistics: Mapping[str, Any] | Paths | None
) -> dict[str, tuple[Raw, Raw]]:
    """Mean and deviation of each modality that is normalized.

    Args:
        path: Of the HDF5 file.
        modalities: Names.
        statistics: A mapping or a file; None for the file beside the HDF5 file.

    Returns:
        Two arrays of shape (1, channels), for Sentinel-2 (2, 13) by product level.

    Raises:
        DataNotFoundError: There is no such file.
        MMEarthFormatError: It lacks a modality or holds numbers that cannot be.
    """
    if isinstance(statistics, Mapping):
        source, content = "the given statistics", dict(statistics)
    else:
        file = _beside(path, "band_stats") if statistics is None else Path(statistics)
        source, content = str(file), _read_json(file)
    scales = {}
    for name in modalities:
        if KINDS[name].kind not in ("map", "vector"):
            continue
        keys = [f"{name}_{level.lower()}" for level in LEVELS] if name == "sentinel2" else [name]
        read = [_moments(source, content, key, KINDS[name].channels) for key in keys]
        scales[name] = (np.stack([mean for mean, _ in read]), np.stack([std for _, std in read]))
    return scales


def _moments(source: str, content: Mapping[str, Any], key: str, channels: int) -> tuple[Raw, Raw]:
    entry = content.get(key)
    if not isinstance(entry, Mapping) or not {"mean", "std"} <= set(entry):
        raise MMEarthFormatError(
            f"{source}: no mean and std of {key!r}; there are {', '.join(sorted(content))}"
        )
    moments = []
    for what in ("mean", "std"):
        values = entry[what]
        numbers = isinstance(values, Sequence) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != channels:
            raise MMEarthFormatError(f"{source}: {key}.{what} must list {channels} numbers")
        moments.append(np.array(values, np.float64))
    mean, std = moments
    if np.isinf(mean).any() or np.isinf(std).any() or (std <= 0).any():
        raise MMEarthFormatError(f"{source}: {key} has a std of 0 or less, or an infinite value")
    without = np.flatnonzero(np.isnan(mean) | np.isnan(std)).tolist()
    if without and (key, without) != ("sentinel2_l2a", [STORED_BANDS.index("B10")]):
        logger.warning(
            "%s: %s has no statistics of channels %s (from 0); their values count as missing",
            source,
            key,
            without,
        )
    return mean, std


def unpack_mmearth(path: Paths, target: Paths, rows: int = 256) -> Path:
    """Write a set once more without compression, which is faster to read over many epochs.

    The published files are deflated, and inflating them takes most of the reading time. Unpacked
    they are about 2.3 times as large.

    Args:
        path: The HDF5 file, or a folder with exactly one.
        target: HDF5 file to write, in an existing folder; it appears there once it is complete.
        rows: Number of tiles that are held in memory at a time.

    Returns:
        The new file, with copies of the JSON files beside it.

    Raises:
        DataNotFoundError: There is no such file.
        MMEarthFormatError: `target` is the file itself.
        OSError: The file or a tile cannot be read, or the disk is full.
        MissingExtraError: h5py is not installed.
    """
    source, target = h5_file(Path(path)), Path(target)
    if target.resolve() == source.resolve():
        raise MMEarthFormatError(f"{target} is the file to unpack; name another one")
    h5py = import_h5py()
    part = target.with_name(f"{target.name}.part")
    try:
        with h5py.File(source, "r") as packed, h5py.File(part, "w") as file:
            for name, array in packed.items():
                out = file.create_dataset(name, array.shape, array.dtype)
                for start in range(0, len(array), rows):
                    out[start : start + rows] = array[start : start + rows]
        for suffix in ("splits", "band_stats", "tile_info"):
            if _beside(source, suffix).is_file():
                shutil.copyfile(_beside(source, suffix), _beside(target, suffix))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target
