"""What feeds the loop: which sample comes when, as a pure function of seed and step.

A dataset is map-style (``len``, and ``draw``, ``__getitems__`` or ``__getitem__``), or an endless
stream of samples that can say where it stands after a batch (``state_after``) and go on from there
(``load_state``).

A step takes ``batch * world * accumulate`` samples. Each process reads its part of them, such that
all together see what one process with the larger batch would. The last samples of an epoch that
do not fill a step are left out. Each sample is given ``"draw"``: seed * 2**40 + its running number
in the run, from which a method takes what it leaves to chance.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from geofm.errors import DataNotFoundError
from geofm.pretrain._strict import check_names
from geofm.pretrain.method import Method
from geofm.pretrain.plan import Plan
from geofm.pretrain.readers import (
    BatchReader,
    StreamReader,
    batches_of,
    collate_of,
    worker_started,
)
from geofm.pretrain.recipe import Data, RecipeError

__all__ = ["Feed", "MapFeed", "StreamFeed", "check_fit", "open_data", "open_feed", "order_of"]

Batch = dict[str, Any]

_KINDS = {
    "mmearth": ("geofm.datasets.mmearth", "MMEarth"),
    "ssl4eco": ("geofm.datasets.ssl4eco", "SSL4Eco"),
    "tiles": ("geofm.datasets.tiles", "TileFolder"),
    "globalgeotree": ("geofm.datasets.globalgeotree_stream", "GlobalGeoTreeStream"),
}
_WRITERS = {
    "mmearth": ("geofm.datasets.mmearth_samples", "write_mmearth"),
    "ssl4eco": ("geofm.datasets.ssl4eco_samples", "write_ssl4eco"),
    "globalgeotree": ("geofm.datasets.globalgeotree_samples", "write_shards"),
}


class Feed(Protocol):
    """What the loop reads from."""

    dataset: Any
    steps_per_epoch: int

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """This process's batches of the steps from `start` to before `stop`; to be closed."""
        ...

    def first(self) -> Batch | None:
        """One sample as a batch; None where reading one would change what comes next."""
        ...

    def used(self, batch: Batch) -> None:
        """Take note that a batch has been trained on; called for each, in order."""
        ...

    def position(self) -> Any:
        """What `resume` needs to go on after the last used batch; None if the step says it all."""
        ...

    def resume(self, position: Any) -> None:
        """Go on where `position` was asked."""
        ...


def open_data(data: Data, folder: Path, seed: int = 0) -> Any:
    """The dataset of a recipe; generated samples are written first where it asks for them.

    Args:
        data: The recipe's section.
        folder: Where generated samples go.
        seed: Of a stream's order.

    Returns:
        The dataset.

    Raises:
        DataNotFoundError: No path is given, or nothing is there.
        RecipeError: There is no such kind of data, or it does not take the options.
    """
    kind = class_of(data.kind, _KINDS, "data.kind")
    path = data.path
    if path is None and data.generate is None and data.kind in _KINDS:
        raise DataNotFoundError(
            f"where is the data? Say data.path=<file or folder of {data.kind}>, or try the recipe "
            f"on generated samples with --quick"
        )
    if path is None and data.generate is not None:
        path = str(_generated(data, folder))
    arguments = () if path is None else (path,)
    options = {"seed": seed} | data.options if hasattr(kind, "state_after") else data.options
    check_names(kind, data.options, "data.options", len(arguments))
    try:
        return kind(*arguments, **options)
    except TypeError as error:
        raise RecipeError(
            f"data.options {data.options} do not suit {data.kind}: {error}"
        ) from error


def class_of(name: str, known: Mapping[str, tuple[str, str]], key: str) -> Any:
    """A class by its short name, or by ``package.module:Class`` from what is installed.

    Args:
        name: The name.
        known: Module and class by short name.
        key: The recipe's key, for messages.

    Returns:
        The class.

    Raises:
        RecipeError: There is none.
    """
    module, colon, attribute = name.partition(":")
    if name not in known and not colon:
        raise RecipeError(f"{key}={name!r} is none of {', '.join(known)}, nor package.module:Class")
    module, attribute = known.get(name, (module, attribute))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RecipeError(f"{key}={name!r} cannot be imported: {error}") from error


def _generated(data: Data, folder: Path) -> Path:
    if data.kind not in _WRITERS:
        raise RecipeError(
            f"data.generate: there is no writer of samples of {data.kind}, only of "
            f"{', '.join(_WRITERS)}; give data.path"
        )
    write = class_of(data.kind, _WRITERS, "data.kind")
    check_names(write, data.generate or {}, "data.generate", 1)
    target = folder / "generated"
    if not target.exists():
        # A killed writer must leave nothing that looks like a data set.
        unfinished = folder / ".generated"
        if unfinished.exists():
            for path in sorted(unfinished.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished, **(data.generate or {}))
        except TypeError as error:
            raise RecipeError(
                f"data.generate {data.generate} does not suit {data.kind}: {error}"
            ) from error
        unfinished.rename(target)
    return target


# --- order --------------------------------------------------------------------------------------


def order_of(
    seed: int, epoch: int, length: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """The samples of an epoch in their order.

    Args:
        seed: Of the run.
        epoch: From 0.
        length: Number of samples in the dataset.
        weights: How much more often than others a sample is drawn, (length,); drawing is with
            replacement then. None: each sample once.

    Returns:
        Indices, (length,).
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    if weights is None:
        return rng.permutation(length).astype(np.int64)
    share = np.asarray(weights, np.float64)
    return rng.choice(length, length, p=share / share.sum()).astype(np.int64)


class _Order(Sampler[list[tuple[int, int]]]):
    """Index and draw of each sample of this process's batches, step after step."""

    def __init__(
        self, length: int, weights: Any, plan: Plan, start: int, stop: int, per_epoch: int
    ) -> None:
        self.length, self.weights, self.plan = length, weights, plan
        self.start, self.stop, self.per_epoch = start, stop, per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self.plan
        together = plan.batch * plan.world
        order, known_epoch = order_of(plan.seed, 0, 0), -1
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.per_epoch)
            if epoch != known_epoch:
                order = order_of(plan.seed, epoch, self.length, self.weights)
                known_epoch = epoch
            for part in range(plan.accumulate):
                offset = part * together + plan.rank * plan.batch
                first = within * together * plan.accumulate + offset
                number = step * together * plan.accumulate + offset
                yield [
                    (int(order[first + i]), draw_of(plan.seed, number + i))
                    for i in range(plan.batch)
                ]


def draw_of(seed: int, number: int) -> int:
    """The integer that a sample's random numbers follow from.

    Args:
        seed: Of the run.
        number: Running number of the sample in the run.

    Returns:
        An integer that no other sample of the run has.
    """
    return seed * 2**40 + number


# --- map-style data -----------------------------------------------------------------------------


class MapFeed:
    """Feeds from a dataset with numbered samples.

    Args:
        dataset: The dataset.
        plan: How the samples of a step are divided.
        workers: Processes that read.
        pin: Whether batches are put where a GPU can fetch them.

    Raises:
        DataNotFoundError: It has fewer samples than one step takes.
    """

    def __init__(self, dataset: Any, plan: Plan, workers: int, pin: bool) -> None:
        self.dataset, self.plan = dataset, plan
        self.workers, self.pin = workers, pin
        together = plan.batch * plan.world * plan.accumulate
        self.steps_per_epoch = len(dataset) // together
        if not self.steps_per_epoch:
            raise DataNotFoundError(
                f"the data has {len(dataset)} samples, a step takes {together}: lower train.batch "
                f"(and train.effective_batch or train.accumulate)"
            )

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """This process's batches of the steps from `start` to before `stop`.

        Args:
            start: First step.
            stop: The step after the last.

        Returns:
            Batches; a step has ``accumulate`` of them. Closing it ends the reading processes.
        """
        order = _Order(
            len(self.dataset),
            getattr(self.dataset, "weights", None),
            self.plan,
            start,
            stop,
            self.steps_per_epoch,
        )
        return batches_of(
            DataLoader(
                BatchReader(self.dataset),
                batch_sampler=order,
                num_workers=self.workers,
                collate_fn=collate_of(self.dataset),
                pin_memory=self.pin,
                worker_init_fn=worker_started if self.workers else None,
                # Its own generator: the loader must not draw from the one that the model uses.
                generator=torch.Generator().manual_seed(self.plan.seed),
            )
        )

    def first(self) -> Batch:
        """The first sample of the dataset.

        Returns:
            A batch of it alone.
        """
        sample = BatchReader(self.dataset)[0, draw_of(self.plan.seed, 0)]
        batch: Batch = collate_of(self.dataset)([sample])
        return batch

    def used(self, batch: Batch) -> None:
        """Nothing to note: the step says it all.

        Args:
            batch: Any.
        """

    def position(self) -> None:
        """Nothing: the step says it all."""

    def resume(self, position: Any) -> None:
        """Nothing to do: the step says it all.

        Args:
            position: Ignored.
        """


# --- streams ------------------------------------------------------------------------------------


class StreamFeed:
    """Feeds from an endless stream of samples, which divides itself among the processes.

    Args:
        stream: Iterable of samples with ``state_after(batch)`` and ``load_state(state)``.
        plan: How the samples of a step are divided.
        samples: Samples that count as an epoch.
        workers: Processes that read.
        pin: Whether batches are put where a GPU can fetch them.

    Raises:
        RecipeError: The recipe does not say how many samples make an epoch.
    """

    def __init__(
        self, stream: Any, plan: Plan, samples: int | None, workers: int, pin: bool
    ) -> None:
        if samples is None:
            raise RecipeError("data.samples: how many samples of the stream count as an epoch?")
        self.dataset = self.stream = stream
        self.plan = plan
        self.workers, self.pin = workers, pin
        self._position: Any = None
        together = plan.batch * plan.world * plan.accumulate
        self.steps_per_epoch = max(1, samples // together)

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """This process's batches of the steps from `start` to before `stop`.

        Args:
            start: First step; the stream itself must have been told by `resume`.
            stop: The step after the last.

        Yields:
            Batches; a step has ``accumulate`` of them.
        """
        plan = self.plan
        loader: DataLoader[Any] = DataLoader(
            StreamReader(self.stream),
            batch_size=plan.batch,
            num_workers=self.workers,
            collate_fn=collate_of(self.stream),
            pin_memory=self.pin,
            worker_init_fn=worker_started if self.workers else None,
            generator=torch.Generator().manual_seed(plan.seed),
        )
        with closing(batches_of(loader)) as batches:
            for part in range(start * plan.accumulate, stop * plan.accumulate):
                first = (part * plan.world + plan.rank) * plan.batch
                draws = [draw_of(plan.seed, first + i) for i in range(plan.batch)]
                yield {**next(batches), "draw": torch.tensor(draws)}

    def first(self) -> None:
        """None: a sample that was read would be missing later."""

    def used(self, batch: Batch) -> None:
        """Take note that a batch has been trained on.

        Args:
            batch: The batch.
        """
        self._position = self.stream.state_after(batch)

    def position(self) -> Any:
        """Where the stream stands after the last used batch.

        Returns:
            Plain values.
        """
        return self._position

    def resume(self, position: Any) -> None:
        """Go on where `position` was asked.

        Args:
            position: What it returned.
        """
        if position is not None:
            self.stream.load_state(position)
            self._position = position


def check_fit(method: Method, feed: Feed) -> None:
    """Try whether a method can train on some data, before anything is written.

    Args:
        method: The method.
        feed: The data; of a stream nothing is tried.

    Raises:
        GeofmError: It cannot, or the first sample cannot be read.
    """
    batch = feed.first()
    if batch is not None:
        method.check_batch(batch)


def open_feed(dataset: Any, plan: Plan, data: Data, pin: bool) -> Feed:
    """The feed for a dataset.

    Args:
        dataset: Map-style, or a stream.
        plan: How the samples of a step are divided.
        data: The recipe's section.
        pin: Whether batches are put where a GPU can fetch them.

    Returns:
        The feed.

    Raises:
        DataNotFoundError: There are fewer samples than one step takes.
        RecipeError: The recipe does not say how many samples make an epoch of a stream.
    """
    if hasattr(dataset, "state_after"):
        return StreamFeed(dataset, plan, data.samples, data.workers, pin)
    return MapFeed(dataset, plan, data.workers, pin)
