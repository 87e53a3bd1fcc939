"""GlobalGeoTree's shards (Mu et al. 2025, arXiv 2505.12513), read as their authors publish them.

A shard is a tar file in the WebDataset convention. Each sample is three neighbouring members:
``<key>.images.pth``, a float64 tensor of 12 months, 10 bands and 5 x 5 pixels written by
``torch.save``, NaN where a month is missing; ``<key>.text.json``, the leaf type and taxon; and
``<key>.auxiliary.json``, 27 variables of the site, null where missing. Nothing in a shard is
executed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from geofm.datasets._shards import MEMBERS, Group, ShardError, Share, groups, read_tensor
from geofm.datasets.globalgeotree_hub import HubShard
from geofm.datasets.globalgeotree_samples import write_shards
from geofm.datasets.observations import (
    BANDS,
    MONTHS,
    SIDE,
    DataNotFoundError,
    Observation,
    Position,
    band_indices,
    collate,
    present_months,
    resume_points,
)
from geofm.errors import UnsafeFileError

__all__ = [
    "BANDS",
    "GlobalGeoTree",
    "Observation",
    "ReadReport",
    "ShardError",
    "Share",
    "collate",
    "present_months",
    "read_shards",
    "resume_points",
    "shards_for",
    "write_shards",
]

logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str] | HubShard | Sequence[str | os.PathLike[str] | HubShard]

# What samples are counted as that only running foreign code could rebuild.
UNSAFE: Final = "unsafe pickle"
_LEVELS: Final = ("level0", "level1_family", "level2_genus", "level3_species")


@dataclass
class ReadReport:
    """What reading shards came to.

    Attributes:
        read: Number of samples delivered.
        skipped: Number of samples (or, for a truncated tar, shards) left out, by reason.
        examples: For each reason the first few messages, each naming the shard and the key.
        absent: Number of samples whose JSON lacks a variable altogether, by variable. Such a
            variable is taken as missing.
    """

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    absent: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        """`skipped`, under the name that the reports of all data sets have."""
        return self.skipped

    def __str__(self) -> str:
        parts = [f"{self.read} samples read, {self.skipped.total()} skipped"]
        parts += [
            f"{count} x {reason}, for example: {self.examples[reason][0]}"
            for reason, count in self.skipped.most_common()
        ]
        if self.absent:
            names = (f"{name} ({count})" for name, count in sorted(self.absent.items()))
            parts.append(f"variables not in the JSON, taken as missing: {', '.join(names)}")
        return "; ".join(parts)

    def add(self, error: ShardError | UnsafeFileError) -> None:
        """Count one sample that is skipped.

        Args:
            error: Why.
        """
        reason = error.reason if isinstance(error, ShardError) else UNSAFE
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(str(error))


def shards_for(
    paths: Paths, rank: int = 0, world_size: int = 1, worker: int = 0, n_workers: int = 1
) -> tuple[Share, ...]:
    """Divide shards among the loading processes of all ranks, without overlap or remainder.

    As many shards as can be dealt out evenly are read whole. The rest (all of them where there are
    fewer shards than processes, as with the evaluation sets of one shard) are divided by samples,
    each among some of the processes.

    Args:
        paths: The shards in a fixed order, the same for every process. This process's shards of
            the hub are fetched now.
        rank: Of this process, below `world_size`.
        world_size: Number of ranks.
        worker: Number of the DataLoader worker in its rank, below `n_workers`.
        n_workers: Number of workers in each rank; 1 where the rank itself loads.

    Returns:
        This process's shares in the order of the shards.

    Raises:
        DataNotFoundError: A path does not exist.
        ValueError: A number is out of its range.
    """
    files = expand_paths(paths)
    parts = divide(len(files), rank, world_size, worker, n_workers)
    return tuple(Share(i, local(files[i]), offset, step) for i, offset, step in parts)


def divide(
    count: int, rank: int, world_size: int, worker: int, n_workers: int
) -> list[tuple[int, int, int]]:
    """What `shards_for` does, with the shards' numbers alone.

    Args:
        count: Number of shards.
        rank: As in `shards_for`.
        world_size: As in `shards_for`.
        worker: As in `shards_for`.
        n_workers: As in `shards_for`.

    Returns:
        Number of the shard, offset and step of each share, in the order of the shards.

    Raises:
        ValueError: A number is out of its range.
    """
    if not (0 <= rank < world_size and 0 <= worker < n_workers):
        raise ValueError(
            f"rank {rank} of {world_size} and worker {worker} of {n_workers}: expected numbers "
            f"from 0 to one below the count"
        )
    # Neighbouring numbers are different ranks, so that few shards still reach every rank.
    number, consumers = worker * world_size + rank, world_size * n_workers
    rest = count % consumers
    whole = count - rest
    parts = [(i, 0, 1) for i in range(number, whole, consumers)]
    if rest:
        turn, place = divmod(number, rest)
        # The processes whose number leaves the same remainder share one of the shards.
        parts.append((whole + place, turn, len(range(place, consumers, rest))))
    return parts


def read_shards(
    paths: Paths,
    *,
    auxiliary_names: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    errors: str = "raise",
    start: tuple[int, int] = (0, 0),
    shares: Iterable[Share] | None = None,
    worker: int = 0,
    report: ReadReport | None = None,
) -> Iterator[Observation]:
    """Read samples from shards, one at a time.

    The order of a sample's members does not matter, as long as they are neighbours; members of
    other names are ignored. A variable that the JSON lacks counts as missing and is reported.

    Args:
        paths: A tar file, a folder of them (``*.tar``, sorted by name), or a sequence of tar files
            and of shards on the hub, as `geofm.datasets.globalgeotree_hub.shards_from_hub` names
            them.
        auxiliary_names: Variables to keep, in order; None for all in the JSON, in its order.
        bands: Bands to keep, in order, by name; None for `BANDS`.
        errors: ``"raise"``, or ``"skip"`` to leave out samples that cannot be read. They are
            counted in `report` and a warning at the end tells how many and why. The rest of a
            truncated tar is lost either way.
        start: Index of the shard and of the sample in it to begin with: after an observation at
            ``position``, go on with ``(position.shard, position.sample + 1)``.
        shares: From `shards_for`: the parts to read; None for all of `paths`.
        worker: Number to write into the observations' positions.
        report: Where to count; None for one's own.

    Yields:
        Observations, images in digital numbers.

    Raises:
        DataNotFoundError: A path does not exist.
        BandError: A band is not among `BANDS`.
        ShardError: A tar is truncated; a member is missing, double, too large or no JSON; the
            tensor has another shape or type; a coordinate is missing or impossible. Names the
            shard and the key.
        UnsafeFileError: A tensor file holds what only executing code could rebuild. Nothing was
            executed.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is {errors!r}; expected 'raise' or 'skip'")
    selected, names = band_indices(BANDS if bands is None else bands, BANDS, "the reader")
    if shares is None:
        shares = _shares_when_due(expand_paths(paths), start[0])
    decode = _Decoder(
        tuple(selected),
        names,
        None if auxiliary_names is None else tuple(auxiliary_names),
        worker,
        report if report is not None else ReadReport(),
    )
    return _read(shares, start, decode, errors == "skip")


class GlobalGeoTree(IterableDataset[Observation]):
    """GlobalGeoTree's samples for a DataLoader, divided among its workers and the ranks.

    Samples come in the order of the shards; to vary it, give the paths in another order for each
    epoch. To resume, keep `resume_points` of each batch and give them as `start`, with as many
    workers and ranks as before. Where no worker processes are used, the worker is number 0.

    Args:
        paths: As in `read_shards`.
        auxiliary_names: As in `read_shards`.
        bands: As in `read_shards`.
        errors: As in `read_shards`; each worker warns for its own share.
        start: For each worker's number the shard and sample to begin with; others begin at the
            beginning.
        rank: This process among those that train together; None to ask ``torch.distributed``.
        world_size: Their number; None to ask ``torch.distributed``.

    Attributes:
        report: What the last pass came to, in the process that read: with workers, the main
            process's stays empty.

    Raises:
        DataNotFoundError: A path does not exist.
        BandError: A band is not among `BANDS`.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        auxiliary_names: Sequence[str] | None = None,
        bands: Sequence[str] | None = None,
        errors: str = "raise",
        start: Mapping[int, tuple[int, int]] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.paths = expand_paths(paths)
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors is {errors!r}; expected 'raise' or 'skip'")
        _, self.bands = band_indices(BANDS if bands is None else bands, BANDS, "the reader")
        self.auxiliary_names = None if auxiliary_names is None else tuple(auxiliary_names)
        self.errors = errors
        self.start = dict(start or {})
        # Here and not in a worker: workers are no members of the process group.
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if grouped else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if grouped else 1
        self.world_size = world_size
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Observation]:
        info = get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.report = ReadReport()
        start = self.start.get(worker, (0, 0))
        parts = divide(len(self.paths), self.rank, self.world_size, worker, n_workers)
        return read_shards(
            self.paths,
            auxiliary_names=self.auxiliary_names,
            bands=self.bands,
            errors=self.errors,
            start=start,
            shares=_shares_when_due(self.paths, start[0], parts),
            worker=worker,
            report=self.report,
        )


def expand_paths(paths: Paths) -> tuple[Path | HubShard, ...]:
    """The shards that are meant.

    Args:
        paths: As in `read_shards`.

    Returns:
        Tar files, all of them present, and shards on the hub, which may not be fetched yet.

    Raises:
        DataNotFoundError: A path does not exist, or there is none.
    """
    files: tuple[Path | HubShard, ...]
    if isinstance(paths, HubShard):
        files = (paths,)
    elif not isinstance(paths, str | os.PathLike):
        files = tuple(path if isinstance(path, HubShard) else Path(path) for path in paths)
        if not files:
            raise DataNotFoundError("no shards were given")
    elif Path(paths).is_dir():
        files = tuple(sorted(Path(paths).glob("*.tar")))
        if not files:
            raise DataNotFoundError(f"the folder {paths} holds no *.tar file")
    else:
        files = (Path(paths),)
    for file in files:
        if isinstance(file, Path) and not file.is_file():
            raise DataNotFoundError(f"there is no shard {file}")
    return files


def local(file: Path | HubShard) -> Path:
    """Where a shard lies on this machine.

    Args:
        file: From `expand_paths`.

    Returns:
        Its path, once it is there.

    Raises:
        DownloadError: It is on the hub and cannot be fetched.
    """
    return file.fetch() if isinstance(file, HubShard) else file


def _shares_when_due(
    files: Sequence[Path | HubShard],
    first: int = 0,
    parts: Sequence[tuple[int, int, int]] | None = None,
) -> Iterator[Share]:
    """Shares from the `first` shard on, each fetched only when its turn comes."""
    for index, offset, step in divide(len(files), 0, 1, 0, 1) if parts is None else parts:
        if index >= first:
            yield Share(index, local(files[index]), offset, step)


def _read(
    shares: Iterable[Share], start: tuple[int, int], decode: _Decoder, skip: bool
) -> Iterator[Observation]:
    report = decode.report
    try:
        for share in shares:
            if share.shard < start[0]:
                continue
            first = start[1] if share.shard == start[0] else 0
            try:
                for group in groups(share, first):
                    try:
                        observation = decode(share, group)
                    except (ShardError, UnsafeFileError) as error:
                        if not skip:
                            raise
                        report.add(error)
                    else:
                        report.read += 1
                        yield observation
            except ShardError as error:
                if not skip:
                    raise
                report.add(error)
    finally:
        if report.skipped or report.absent:
            logger.warning("reading shards: %s", report)


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Turns a sample's members into an observation."""

    selected: tuple[int, ...]
    bands: tuple[str, ...]
    auxiliary_names: tuple[str, ...] | None
    worker: int
    report: ReadReport

    def __call__(self, share: Share, group: Group) -> Observation:
        where = f"shard {share.path}, key {group.key!r}"
        if group.problem is not None:
            raise ShardError(f"{where} {group.problem[1]}", group.problem[0])
        absent = [member for member in MEMBERS if member not in group.members]
        if absent:
            raise ShardError(
                f"{where} has no {' and no '.join(absent)}; the members of a sample must be "
                f"neighbours in the tar",
                "missing member",
            )
        images = _images(group.members["images.pth"], where)
        text = _json(group.members["text.json"], where, "text.json")
        values = _json(group.members["auxiliary.json"], where, "auxiliary.json")
        longitude = _coordinate(values, "longitude", 180.0, where)
        latitude = _coordinate(values, "latitude", 90.0, where)
        sample_id = values.get("sample_id")
        taxon = [_name(text, level, where) for level in _LEVELS]
        return Observation(
            sample_id=group.key if sample_id is None else str(sample_id),
            images=np.ascontiguousarray(images[:, self.selected]),
            bands=self.bands,
            longitude=longitude,
            latitude=latitude,
            auxiliary=self._auxiliary(values, where),
            leaf_type=taxon[0],
            family=taxon[1],
            genus=taxon[2],
            species=taxon[3],
            key=group.key,
            position=Position(share.shard, group.index, self.worker),
        )

    def _auxiliary(self, values: dict[str, Any], where: str) -> dict[str, float | None]:
        names = self.auxiliary_names
        if names is None:
            names = tuple(name for name in values if name != "sample_id")
        for name in names:
            if name not in values:
                self.report.absent[name] += 1
        return {name: _value(values, name, where) for name in names}


def _json(content: bytes, where: str, member: str) -> dict[str, Any]:
    """A JSON object, or the only one of a list, as both are in use."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: {member} is no JSON: {error}", "bad JSON") from error
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise ShardError(
            f"{where}: {member} holds {_describe(value)}; expected an object or a list with one",
            "bad JSON",
        )
    return value


def _name(text: dict[str, Any], level: str, where: str) -> str | None:
    value = text.get(level)
    if value is not None and not isinstance(value, str):
        raise ShardError(f"{where}: {level} is {_describe(value)}; expected a name", "bad taxon")
    return value or None


def _value(values: dict[str, Any], name: str, where: str) -> float | None:
    value = values.get(name)
    # Python's JSON writer spells a missing float NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    # A bool is an int to Python. No variable comes near 1e30, beyond which float32 ends.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ShardError(
            f"{where}: {name} is {_describe(value)}; expected a number or null", "bad variable"
        )
    return float(value)


def _coordinate(values: dict[str, Any], name: str, limit: float, where: str) -> float:
    value = _value(values, name, where)
    if value is None:
        raise ShardError(f"{where} has no {name}", "missing coordinate")
    if abs(value) > limit:
        raise ShardError(
            f"{where}: {name} is {value:g}; expected -{limit:g} to {limit:g} degrees",
            "bad coordinate",
        )
    return value


def _images(content: bytes, where: str) -> NDArray[np.float32]:
    value = read_tensor(content, where)
    shape = (MONTHS, len(BANDS), SIDE, SIDE)
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or tuple(value.shape) != shape
    ):
        raise ShardError(
            f"{where}: images.pth holds {_describe(value)}; expected a tensor of shape {shape}",
            "wrong shape",
        )
    if value.dtype not in (torch.float64, torch.float32):
        raise ShardError(
            f"{where}: images.pth holds {value.dtype}; expected torch.float64, in which NaN marks "
            f"missing months",
            "wrong type",
        )
    images = value.detach().to(torch.float32).numpy()
    if np.isinf(images).any():
        raise ShardError(f"{where}: images.pth holds infinite values", "infinite values")
    return images


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
