"""GlobalGeoTree without end, for pretraining: shuffled, divided among processes, resumable.

Epoch follows epoch. In each, the shards are put in another order and divided among all loading
processes, so that together they read every sample once. A process opens a few of its shards at a
time and shuffles blocks: as many samples of each of them as are held in memory. All orders follow
from the seed, so the position of a sample tells all that is needed to go on after it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from geofm.auxiliary import Variable, auxiliary_table
from geofm.cards import published_cards
from geofm.datasets._report import SkipReport
from geofm.datasets._shards import ShardError, Share
from geofm.datasets.globalgeotree import (
    UNSAFE,
    Paths,
    ReadReport,
    divide,
    expand_paths,
    local,
    read_shards,
)
from geofm.datasets.globalgeotree_hub import HUB, shards_at
from geofm.datasets.observations import Observation, collate
from geofm.errors import AuxiliaryError, DataNotFoundError, GeofmError, UnsafeFileError

__all__ = ["GlobalGeoTreeStream", "ResumeError"]

# Its auxiliary variables are those of the data set, with the units these come in.
_CARD: Final = "geotreeclip.ggt6m"
# Distinguishes the two kinds of shuffling that follow from one seed.
_OF_SHARDS, _OF_SAMPLES = 0, 1
# A process may go away empty-handed where it shares a short shard; not so often one after another.
_EMPTY_EPOCHS: Final = 8

Sample = dict[str, Any]


class ResumeError(GeofmError, ValueError):
    """A saved position does not belong to this data or to this number of processes."""


class _Part(NamedTuple):
    """A process's part of a shard: every step-th sample from the offset on."""

    shard: int
    offset: int
    step: int


class _Point(NamedTuple):
    """The next sample of a process: the slot-th of a block of a group of shards in an epoch."""

    epoch: int
    group: int
    block: int
    slot: int


class _Counted(ReadReport):
    """What reading a share came to, which counts for the stream as well."""

    def __init__(self, everywhere: SkipReport) -> None:
        super().__init__()
        self.everywhere = everywhere

    def add(self, error: ShardError | UnsafeFileError) -> None:
        super().add(error)
        # The share's own warning names them.
        reason = error.reason if isinstance(error, ShardError) else UNSAFE
        self.everywhere.add(reason, str(error), log=False)


class GlobalGeoTreeStream(IterableDataset[Sample]):
    """Endless samples of GlobalGeoTree for a DataLoader, divided among ranks and workers.

    To resume exactly, call `state_after` with every batch that was used, keep what it returns
    (one state for each rank) and give it to `load_state` before the loader is made anew, with as
    many workers and ranks as before. What the workers had read ahead is read again.

    Ranks and workers may be in different epochs at one time, as shards differ in length; within an
    epoch, no sample is read by two of them.

    A sample is a dict that `torch.utils.data.default_collate` can stack:

    * ``id``: the sample's identifier, a string
    * ``image``: (12, 10, 5, 5) float32, digital numbers; NaN in missing months
    * ``auxiliary``: (27,) float32, in the order of `variables`; NaN where missing
    * ``prompt``: ``"leaf type / family / genus / species"``
    * ``position``: (6,) int64: epoch, group of shards, block, slot, worker, number of workers

    Args:
        paths: As in `geofm.datasets.read_shards`: local shards or shards on the hub; or an address
            of shards on the hub, see `geofm.datasets.globalgeotree_hub.shards_at`.
        seed: Of all shuffling; not negative.
        epoch: Number of the first epoch.
        mix: Shards of a process that are open at a time and shuffled together, at least 1.
        block: Consecutive samples of each of them that are shuffled together, at least 1. A process
            holds ``mix * block`` samples, 13 KB each; ``mix=1, block=1`` keeps the shards' order.
        variables: The environmental variables, in order; None for GeoTreeCLIP's. Values that cannot
            be in a variable's unit are errors.
        errors: ``"raise"``, or ``"skip"`` to leave out samples that cannot be read or used; the log
            tells how many and why, shard by shard, and `report` all of them.
        rank: This process among those that train together; None to ask ``torch.distributed``.
        world_size: Their number; None to ask ``torch.distributed``.

    Attributes:
        report: What was left out, each time it was met, over all DataLoader workers: a `Report`.

    Raises:
        DataNotFoundError: A path does not exist. While reading: a process gets no sample at all
            out of nine epochs.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        seed: int = 0,
        epoch: int = 0,
        mix: int = 4,
        block: int = 256,
        variables: Sequence[Variable] | None = None,
        errors: str = "raise",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if min(seed, epoch) < 0 or min(mix, block) < 1:
            raise ValueError(
                f"seed={seed}, epoch={epoch}, mix={mix}, block={block}: expected seed and epoch "
                f"of at least 0, mix and block of at least 1"
            )
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors is {errors!r}; expected 'raise' or 'skip'")
        hub = isinstance(paths, str) and paths.startswith(HUB)
        self.files = shards_at(str(paths)) if hub else expand_paths(paths)
        self.seed, self.epoch, self.mix, self.block = seed, epoch, mix, block
        chosen = published_cards()[_CARD].auxiliary if variables is None else variables
        self.variables = tuple(chosen)
        self.errors = errors
        # Here and not in a worker: workers are no members of the process group.
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if grouped else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if grouped else 1
        self.world_size = world_size
        self.report = SkipReport()
        self._points: dict[int, _Point] = {}
        self._n_workers: int | None = None
        self._next_worker = 0

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        number, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self._n_workers not in (None, n_workers):
            raise ResumeError(
                f"the saved position is of {self._n_workers} workers, but there are {n_workers}; "
                f"use as many as before (num_workers=0 counts as 1)"
            )
        # A new loader asks its workers in turn from 0 on: let the one that is due be the first.
        worker = (number + self._next_worker) % n_workers
        return self._read(worker, n_workers)

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Where to go on after a batch; call it for every batch, in order.

        Args:
            batch: A batch of this stream, or anything with its ``"position"``, (N, 6).

        Returns:
            This rank's state so far, of numbers and strings in plain dicts and lists: JSON.

        Raises:
            ResumeError: The batch is of another number of workers than those before.
        """
        positions: Tensor = torch.as_tensor(batch["position"]).reshape(-1, 6)
        for *place, worker, n_workers in positions.tolist():
            if self._n_workers not in (None, n_workers):
                raise ResumeError(
                    f"a batch of {n_workers} workers after batches of {self._n_workers}"
                )
            point = _Point(*place)
            self._points[worker] = point._replace(slot=point.slot + 1)
            self._n_workers, self._next_worker = n_workers, (worker + 1) % n_workers
        return self.state()

    def state(self) -> dict[str, Any]:
        """Where to go on: at the beginning, or after the last batch told to `state_after`.

        Returns:
            As `state_after`.
        """
        return {
            **self._identity(),
            "n_workers": self._n_workers,
            "next_worker": self._next_worker,
            "points": {str(worker): list(point) for worker, point in self._points.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of the same data stopped.

        Args:
            state: From `state_after`, on the same rank.

        Raises:
            ResumeError: It is of other shards, another seed, rank or way of shuffling.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ResumeError(
                    f"the saved position is of {name} {state.get(name)!r}, but this stream has "
                    f"{own!r}: only the same shards, seed, ranks and shuffling can be resumed"
                )
        self._points = {int(k): _Point(*map(int, v)) for k, v in state["points"].items()}
        self._n_workers = None if state["n_workers"] is None else int(state["n_workers"])
        self._next_worker = int(state["next_worker"])

    def _identity(self) -> dict[str, Any]:
        """All that the order of the samples follows from, besides the number of workers."""
        names = "\n".join(file.name for file in self.files)
        return {
            "shards": f"{len(self.files)}:{hashlib.sha256(names.encode()).hexdigest()[:16]}",
            "seed": self.seed,
            "epoch": self.epoch,
            "mix": self.mix,
            "block": self.block,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _read(self, worker: int, n_workers: int) -> Iterator[Sample]:
        start = self._points.get(worker, _Point(self.epoch, 0, 0, 0))
        empty = 0
        for epoch in itertools.count(start.epoch):
            groups = self._groups(epoch, worker, n_workers)
            empty += 1
            for number in range(start.group, len(groups)):
                first = start if number == start.group else _Point(epoch, number, 0, 0)
                for block, slot, sample in self._mixed(groups[number], first):
                    empty = 0
                    place = (epoch, number, block, slot, worker, n_workers)
                    yield {**sample, "position": torch.tensor(place)}
            if empty > _EMPTY_EPOCHS:
                raise DataNotFoundError(
                    f"worker {worker} of {n_workers} on rank {self.rank} of {self.world_size} got "
                    f"no sample out of {empty} epochs: there are too few samples in "
                    f"{len(self.files)} shards for as many processes, or none could be used"
                )
            start = _Point(epoch + 1, 0, 0, 0)

    def _groups(self, epoch: int, worker: int, n_workers: int) -> list[list[_Part]]:
        """This process's shares in an epoch, those that are read together in one list."""
        order = np.random.default_rng([self.seed, _OF_SHARDS, epoch]).permutation(len(self.files))
        parts = [
            _Part(int(order[place]), offset, step)
            for place, offset, step in divide(
                len(self.files), self.rank, self.world_size, worker, n_workers
            )
        ]
        return [parts[i : i + self.mix] for i in range(0, len(parts), self.mix)]

    def _mixed(self, parts: Sequence[_Part], first: _Point) -> Iterator[tuple[int, int, Sample]]:
        """Samples of a group of shares from a point on, with their blocks and slots."""
        streams = [self._numbered(k, part, first.block) for k, part in enumerate(parts)]
        merged = heapq.merge(*streams, key=operator.itemgetter(0))
        for block, items in itertools.groupby(merged, key=operator.itemgetter(0)):
            samples = {place: sample for _, place, sample in items}
            dice = np.random.default_rng(
                [self.seed, _OF_SAMPLES, first.epoch, parts[0].shard, parts[0].offset, block]
            )
            # Places of samples that were skipped stay empty, so that the others keep their slots.
            for slot, place in enumerate(dice.permutation(len(parts) * self.block).tolist()):
                if place in samples and (block, slot) >= (first.block, first.slot):
                    yield block, slot, samples[place]

    def _numbered(self, k: int, part: _Part, first: int) -> Iterator[tuple[int, int, Sample]]:
        """Samples of the k-th share of a group, with their blocks and their places in them."""
        share = Share(part.shard, local(self.files[part.shard]), part.offset, part.step)
        report = _Counted(self.report)
        for observation in read_shards(
            share.path,
            auxiliary_names=[variable.name for variable in self.variables],
            errors=self.errors,
            start=(part.shard, part.offset + part.step * first * self.block),
            shares=(share,),
            report=report,
        ):
            assert observation.position is not None
            try:
                sample = self._sample(observation, share)
            except ShardError as error:
                if self.errors == "raise":
                    raise
                report.add(error)
                report.read -= 1
                continue
            block, place = divmod(
                (observation.position.sample - part.offset) // part.step, self.block
            )
            yield block, k * self.block + place, sample

    def _sample(self, observation: Observation, share: Share) -> Sample:
        where = f"shard {share.path}, key {observation.key!r}"
        levels = [level for level in observation.taxon if level is not None]
        if len(levels) < len(observation.taxon):
            raise ShardError(
                f"{where} lacks a level of its taxon: {observation.taxon}", "incomplete taxon"
            )
        batch = collate([observation], [variable.name for variable in self.variables])
        try:
            auxiliary = auxiliary_table(batch["auxiliary"], self.variables)
        except AuxiliaryError as error:
            raise ShardError(f"{where}: {error}", "bad variable") from error
        return {
            "id": observation.sample_id,
            "image": batch["images"][0],
            "auxiliary": auxiliary[0],
            "prompt": " / ".join(levels),
        }
