"""Reading batches in other processes: errors come back as they were raised, and readers end."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
    get_worker_info,
)

from geofm.errors import GeofmError
from geofm.pretrain.method import random_of

__all__ = ["BatchReader", "StreamReader", "batches_of", "collate_of", "worker_started"]

Batch = dict[str, Any]

# Stream of `random_of` from which a dataset's own choices come (which dates of a place, say).
_DATASET_STREAM = 7


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error in place of a batch: raised in a worker, it would arrive as a traceback in words."""

    error: GeofmError


class BatchReader(Dataset[Any]):
    """Reads whole batches of (index, draw) from a dataset with numbered samples.

    Args:
        dataset: The dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Any]:
        try:
            samples = self._read(places)
        except GeofmError as error:
            return [_failure(error)]
        return [
            {"id": str(index), **sample, "draw": draw}
            for (index, draw), sample in zip(places, samples, strict=True)
        ]

    def _read(self, places: Sequence[tuple[int, int]]) -> Sequence[Batch]:
        indices = [index for index, _ in places]
        if hasattr(self.dataset, "draw"):
            return [self.dataset.draw(i, random_of(d, _DATASET_STREAM)) for i, d in places]
        if hasattr(self.dataset, "__getitems__"):
            samples: Sequence[Batch] = self.dataset.__getitems__(indices)
            return samples
        return [self.dataset[index] for index in indices]


class StreamReader(IterableDataset[Any]):
    """Passes the samples of a stream on.

    Args:
        stream: Iterable of samples.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except GeofmError as error:
            yield _failure(error)


def _failure(error: GeofmError) -> _Failure:
    """What goes to the main process; in that one itself the error is just raised."""
    if get_worker_info() is None:
        raise error
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (made in this line)
    except (pickle.PicklingError, TypeError, AttributeError):
        # It arrives as a traceback in words, then.
        raise error from None
    return _Failure(error)


def collate_of(dataset: Any) -> Callable[[list[Any]], Any]:
    """What makes a batch of samples.

    Args:
        dataset: Its ``collate`` is used if it has one.

    Returns:
        A function that lets errors of the readers pass.
    """
    return partial(_collate, getattr(dataset, "collate", default_collate))


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    # A stream's batch may have begun with whole samples.
    if isinstance(samples[-1], _Failure):
        return samples[-1]
    return collate(samples)


def worker_started(worker: int) -> None:
    """What a reading process does first.

    Args:
        worker: Its number.
    """
    # A cluster signals all processes of a job; the loop finishes its step and still needs readers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches_of(loader: DataLoader[Any]) -> Generator[Batch, None, None]:
    """The batches of a loader, whose processes end with the generator.

    Args:
        loader: Over a `BatchReader` or `StreamReader`.

    Yields:
        Batches.

    Raises:
        GeofmError: As it was raised where the data were read.
    """
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    finally:
        # Readers do not heed the SIGTERM that multiprocessing sends at the end of a process, which
        # would wait for them without end. A traceback may keep the iterator alive until then.
        end = getattr(iterator, "_shutdown_workers", None)
        if end is not None:
            end()
            for process in getattr(iterator, "_workers", ()):
                if process.is_alive():
                    process.kill()
