"""MMEarth (Nedungadi et al., ECCV 2024, arXiv 2405.02771), read as its authors publish it.

A set is one HDF5 file with an array for each modality, whose first axis is the tile, and three JSON
files beside it: ``<name>_splits.json`` (numbers of the tiles of each split),
``<name>_band_stats.json`` (mean and deviation of each channel) and ``<name>_tile_info.json`` (by
tile id: product level, place, date).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from geofm.cards import LEVELS, InputSpec, Statistics
from geofm.datasets._hdf5 import RowFile
from geofm.datasets._index import checked_index
from geofm.datasets._mmearth_files import (
    KINDS,
    MODALITIES,
    STORED_BANDS,
    MMEarthFormatError,
    check_shapes,
    h5_file,
    present,
    rows_of_split,
    scales,
    tile_ids,
    tile_levels,
    unpack_mmearth,
)
from geofm.datasets.mmearth_samples import write_mmearth
from geofm.errors import BandError, GeofmError
from geofm.spectral import refuse_string

__all__ = [
    "BANDS",
    "MODALITIES",
    "STORED_BANDS",
    "MMEarth",
    "MMEarthFormatError",
    "TileReadError",
    "TileReport",
    "unpack_mmearth",
    "write_mmearth",
]

logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str]
Raw = NDArray[Any]
Bools = NDArray[np.bool_]
Sample = dict[str, Any]

BANDS: Final = tuple(band for band in STORED_BANDS if band != "B10")
"""Bands that are delivered where none are named: those of the published weights, in their order."""

_EMPTY_WORDS: Final = "without Sentinel-2 data"
_NOT_READ, _READ, _EMPTY, _UNREADABLE = range(4)


class TileReadError(GeofmError, OSError):
    """A tile cannot be read from its file."""


@dataclass(frozen=True, slots=True)
class TileReport:
    """What was read so far, each tile counted once, whichever process read it.

    Attributes:
        read: Number of tiles delivered with data.
        empty: Ids of tiles without a single Sentinel-2 pixel, where Sentinel-2 was asked for.
        unreadable: Ids of tiles that could not be read and were delivered as wholly missing.
    """

    read: int
    empty: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many tiles were missing in part or whole, by reason."""
        lost = {_EMPTY_WORDS: len(self.empty), "unreadable": len(self.unreadable)}
        return Counter({reason: count for reason, count in lost.items() if count})

    @property
    def examples(self) -> dict[str, list[str]]:
        """The first few ids, by reason."""
        lost = {_EMPTY_WORDS: self.empty, "unreadable": self.unreadable}
        return {reason: list(ids[:3]) for reason, ids in lost.items() if ids}

    def __str__(self) -> str:
        parts = [f"{self.read} tiles read"]
        for what, ids in ((_EMPTY_WORDS, self.empty), ("unreadable", self.unreadable)):
            if ids:
                more = ", ..." if len(ids) > 3 else ""
                parts.append(f"{len(ids)} {what}: {', '.join(ids[:3])}{more}")
        return "; ".join(parts)


class MMEarth(Dataset[Sample]):
    """Tiles of MMEarth, read and normalized a batch at a time.

    A sample is a dictionary of its ``"id"`` (a string) and a tensor for each modality:

    * ``sentinel2`` (bands, H, W), ``sentinel1`` (8, H, W; dB: VV VH HH HV of the ascending, then of
      the descending pass), ``aster`` (2, H, W; elevation, slope) and ``canopy_height_eth`` (2, H,
      W; height, deviation): float32, (value − mean) / std by channel, Sentinel-2 by the statistics
      of the tile's own product level. A missing pixel is 0.
    * ``era5`` (12,), ``lat``, ``lon`` and ``month`` (2,; sine, cosine): float32, normalized
      likewise. A missing value is NaN.
    * ``dynamic_world`` (1, H, W; classes 0 to 8), ``esa_worldcover`` (1, H, W; classes 0 to 10 for
      the codes 10, 20 ... 90, 95, 100), ``sentinel2_cloudmask``, ``sentinel2_cloudprod`` and
      ``sentinel2_scl`` (1, H, W; as stored): int64. Missing, and any code outside the legend: −1.
    * ``biome`` (14,) and ``eco_region`` (846,): float32, one-hot; all zeros where missing.

    The tensors of one call of `__getitems__`, which PyTorch's DataLoader uses, are views of the
    same arrays. Nothing is left to chance. The HDF5 file is opened in the process that reads.

    At the beginning all ids and the whole ``tile_info.json`` are read once; what is kept of them is
    two small arrays.

    Args:
        path: The HDF5 file, or a folder with exactly one.
        split: ``"train"``, ``"val"`` or ``"test"``; None for all tiles, in the order of the file.
        modalities: Names of `MODALITIES`; None for all that the file has.
        bands: Sentinel-2 bands to deliver, in this order; None for `BANDS`.
        normalize: False to deliver values in the units of the file; missing pixels are then NaN,
            except in ``sentinel2``, where they stay 0.
        statistics: To normalize with, in the structure of ``<name>_band_stats.json`` or a path of
            such a file; None for the one beside the HDF5 file. A channel whose statistics are NaN
            (the published ones of B10 in Level-2A) counts as missing.
        errors: ``"raise"``, or ``"skip"`` to deliver a tile of which any modality cannot be read as
            a sample with everything missing, so that a batch keeps its size; such tiles are logged
            and counted in `report`.

    Attributes:
        path: The HDF5 file.
        modalities: Names of the arrays that are delivered.
        bands: Names of the Sentinel-2 bands, in channel order.
        rows: Of each sample the number of its tile in the file.
        ids: Of each sample its id, as bytes.
        levels: Of each sample its product level, an index into ``("L1C", "L2A")``.
        size: Height and width of the tiles in px; None where no map is delivered.

    Raises:
        DataNotFoundError: A file, the split or a modality that was asked for does not exist.
        MMEarthFormatError: The files are not in MMEarth's format or contradict each other.
        BandError: A band is unknown or named twice.
        MissingExtraError: h5py is not installed.
        ValueError: `errors` is none of the two.
    """

    def __init__(
        self,
        path: Paths,
        split: str | None = "train",
        modalities: Sequence[str] | None = None,
        bands: Sequence[str] | None = None,
        normalize: bool = True,
        statistics: Mapping[str, Any] | Paths | None = None,
        errors: str = "raise",
    ) -> None:
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors is {errors!r}; expected 'raise' or 'skip'")
        self.path = h5_file(Path(path))
        self.errors = errors
        self.normalize = normalize
        self.bands = _bands(bands)
        self._file = RowFile(self.path)
        try:
            file = self._file.file()
        except OSError as error:
            raise MMEarthFormatError(
                f"{self.path} cannot be opened as HDF5: {error}. If it is an MMEarth file, it is "
                f"truncated or damaged: fetch it again"
            ) from error
        self.modalities = present(self.path, file, modalities)
        self.size = check_shapes(self.path, file, self.modalities)
        ids = tile_ids(self.path, file)
        # No open handle is inherited by workers that are forked later.
        self._file.close()
        self.rows = rows_of_split(self.path, split, len(ids))
        self.ids = ids[self.rows]
        self.levels = tile_levels(self.path, self.ids)
        self._scales: dict[str, tuple[Raw, Raw]] = {}
        if normalize:
            self._scales = scales(self.path, self.modalities, statistics)
        # In shared memory, so that what workers met is known here; each writes its own tiles.
        self._met: Tensor = torch.zeros(len(self.rows), dtype=torch.uint8)
        self._met.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Read samples.

        Args:
            indices: Of the samples, in any order.

        Returns:
            The samples in the order of `indices`.

        Raises:
            IndexError: An index is out of range.
            TypeError: An index is no whole number.
            TileReadError: A tile cannot be read and ``errors="raise"``.
        """
        count = len(self)
        chosen = np.array([checked_index(i, count, "index") for i in indices], np.int64) % count
        if not chosen.size:
            return []
        # In the order of the file, each tile once.
        rows, first, place = np.unique(self.rows[chosen], return_index=True, return_inverse=True)
        tensors = self._read(rows, chosen[first])
        views = {name: tensor.unbind(0) for name, tensor in tensors.items()}
        samples = []
        for index, position in zip(chosen.tolist(), place.tolist(), strict=True):
            sample: Sample = {"id": self.ids[index].decode()}
            for name, rows_of in views.items():
                sample[name] = rows_of[position]
            samples.append(sample)
        return samples

    @property
    def report(self) -> TileReport:
        """What was read so far, by this process and its workers."""
        met = self._met.numpy()
        return TileReport(
            read=int(np.count_nonzero((met == _READ) | (met == _EMPTY))),
            empty=tuple(name.decode() for name in self.ids[met == _EMPTY]),
            unreadable=tuple(name.decode() for name in self.ids[met == _UNREADABLE]),
        )

    def input_spec(self, size: int | None = None) -> InputSpec:
        """What an encoder trained on these samples expects, for its weight card.

        Args:
            size: Side of the tiles the encoder sees, in px; None for that of the file.

        Returns:
            Bands, levels and statistics. A level is left out if its statistics lack a band.

        Raises:
            MMEarthFormatError: Sentinel-2 is not read or not normalized.
        """
        if "sentinel2" not in self._scales or self.size is None:
            raise MMEarthFormatError(
                "a card needs statistics of Sentinel-2, but this dataset has none: read the "
                "modality 'sentinel2' with normalize=True"
            )
        mean, std = self._scales["sentinel2"]
        channels = [STORED_BANDS.index(band) for band in self.bands]
        statistics = {
            level: Statistics(tuple(mean[k, channels].tolist()), tuple(std[k, channels].tolist()))
            for k, level in enumerate(LEVELS)
            if np.isfinite(mean[k, channels]).all() and np.isfinite(std[k, channels]).all()
        }
        return InputSpec(
            sensor="sentinel2",
            bands=self.bands,
            levels=tuple(statistics),
            normalization="zscore",
            size=max(self.size) if size is None else size,
            fit="any",
            nodata=(0.0,),
            statistics=statistics,
        )

    def _read(self, rows: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Deliver tiles: their rows in the file, ascending, and the samples' numbers."""
        arrays, unreadable = {}, np.zeros(len(rows), np.bool_)
        met = np.full(len(rows), _READ, np.uint8)
        for name in self.modalities:
            raw, failed = self._file.read(name, rows)
            for position, why in failed.items():
                tile = self.ids[samples[position]].decode()
                message = f"{self.path}: {name} of tile {tile} (row {rows[position]}): {why}"
                if self.errors == "raise":
                    raise TileReadError(
                        f"{message}; fetch the file again, or deliver such tiles as missing with "
                        f"errors='skip'"
                    )
                logger.warning("%s; the tile is delivered as missing", message)
                unreadable[position] = True
                raw[position] = 0
            arrays[name], empty = self._convert(name, raw, self.levels[samples])
            if name == "sentinel2":
                met[empty] = _EMPTY
        for name, array in arrays.items():
            if unreadable.any():
                array[unreadable] = self._blank(name)
        met[unreadable] = _UNREADABLE
        self._met[torch.from_numpy(samples)] = torch.from_numpy(met)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _blank(self, name: str) -> float:
        """What a missing value of a modality is delivered as."""
        kind = KINDS[name].kind
        if kind == "codes":
            return -1
        normalized_or_dn = self.normalize or name == "sentinel2"
        return np.nan if kind == "vector" or (kind == "map" and not normalized_or_dn) else 0.0

    def _convert(self, name: str, raw: Raw, levels: Raw) -> tuple[Raw, Bools]:
        """A batch of an array as it is delivered, and which tiles have no data at all."""
        modality = KINDS[name]
        nowhere = np.zeros(len(raw), np.bool_)
        if modality.kind == "one_hot":
            # Where it is missing, the highest value of the type stands instead of 0 and 1.
            return (raw == 1).astype(np.float32), nowhere
        if modality.kind == "codes":
            if raw.dtype not in (np.uint8, np.uint16):
                # Only older or rewritten files; what is no code becomes the code of "no data".
                raw = np.where((raw >= 0) & (raw < 65535), raw, 65535).astype(np.uint16)
            return _legend(name, raw.dtype)[raw], nowhere
        # era5 is stored as (N, 12) or (N, 1, 12).
        planes = raw if modality.kind == "map" else raw.reshape(len(raw), -1, 1, 1)
        wanted = self.bands if name == "sentinel2" else range(modality.channels)
        channels = [STORED_BANDS.index(b) if isinstance(b, str) else b for b in wanted]
        mean: Raw | None = None
        std: Raw | None = None
        if self.normalize:
            mean, std = self._scales[name]
            by_level = levels if len(mean) > 1 else np.zeros(len(raw), np.int64)
            mean, std = mean[by_level][:, channels], std[by_level][:, channels]
        codes = modality.missing(raw.dtype)
        out, empty = _scaled(planes, channels, mean, std, codes, self._blank(name))
        return (out if modality.kind == "map" else out[:, :, 0, 0]), empty


def _scaled(
    planes: Raw,
    channels: Sequence[int],
    mean: Raw | None,
    std: Raw | None,
    missing: tuple[int, ...],
    blank: float,
) -> tuple[NDArray[np.float32], Bools]:
    """Normalize channel by channel, which keeps what is worked on in the processor's cache.

    Args:
        planes: Stored values (N, C, H, W).
        channels: To deliver.
        mean: Of each tile and delivered channel; None to leave the values as they are.
        std: Likewise.
        missing: Values that mean "no data".
        blank: What stands for missing values.

    Returns:
        Values (N, channels, H, W), and which tiles have none.
    """
    out = np.empty((len(planes), len(channels), *planes.shape[2:]), np.float32)
    empty = np.ones(len(planes), np.bool_)
    shift = None if mean is None else mean.astype(np.float32)[:, :, None, None]
    factor = None if std is None else (1.0 / std).astype(np.float32)[:, :, None, None]
    # Where a channel has no statistics, normalizing makes NaN of whatever is there.
    unknown = (
        np.zeros(len(channels), np.bool_)
        if shift is None or factor is None
        else (np.isnan(shift + factor).any((0, 2, 3)))
    )
    for target, source in enumerate(channels):
        values, plane = planes[:, source], out[:, target]
        plane[...] = values
        if shift is not None and factor is not None:
            plane -= shift[:, target]
            plane *= factor[:, target]
        if values.dtype.kind == "f" or unknown[target]:
            # NaN and infinities have remained what they are.
            lost = ~np.isfinite(plane)
        else:
            lost = np.zeros(values.shape, np.bool_)
        for code in missing:
            lost |= values == code
        if lost.any():
            np.copyto(plane, np.float32(blank), where=lost)
            empty &= lost.all((1, 2))
        else:
            empty[:] = False
    return out, empty


@cache
def _legend(name: str, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """What each code that an array of this type can hold is delivered as."""
    modality, count = KINDS[name], int(np.iinfo(dtype).max) + 1
    if modality.codes is None:
        table = np.arange(count)
        table[[code for code in (*modality.missing(dtype), 65535) if code < count]] = -1
        return table
    table = np.full(count, -1)
    table[list(modality.codes)] = np.arange(len(modality.codes))
    return table


def _bands(bands: Sequence[str] | None) -> tuple[str, ...]:
    refuse_string(bands or (), "bands")
    chosen = BANDS if bands is None else tuple(bands)
    unknown = [band for band in chosen if band not in STORED_BANDS]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise BandError(
            f"bands are {', '.join(map(str, chosen)) or 'none'}; expected different ones of "
            f"{', '.join(STORED_BANDS)}"
        )
    return chosen
