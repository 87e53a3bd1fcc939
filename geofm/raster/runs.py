"""The loop: a thread reads, some compute, another one blends, and one writes."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geofm.errors import ModelError, RasterError
from geofm.preprocess import Preprocess
from geofm.raster.networks import Network
from geofm.raster.sources import Source
from geofm.raster.stores import Store
from geofm.raster.strips import Strip, StripReader
from geofm.raster.windows import Axis, Panel
from geofm.raster.workers import Workers, apply

__all__ = ["Job", "run", "sample"]

# Blocks that may wait for the writer, and batches that may wait to be blended.
_WAITING = 2
# Windows and cells from which components and scales are fitted.
_SAMPLE_WINDOWS, _SAMPLE_TRIES, _SAMPLE_CELLS = 64, 512, 1024


@dataclass(frozen=True, eq=False)
class Job:
    """All that the values depend on.

    Attributes:
        source: What is read.
        bands: Names of the bands to read.
        prepare: Their preprocessing.
        network: What is computed from a window.
        channels: Channels that the network gives.
        rows: Windows from top to bottom.
        columns: Windows from left to right.
        panels: Windows of neighbouring columns that are done together.
        blend: As in `Axis.weights`.
        batch: Windows at a time.
        min_valid: Share of a cell's pixels that must have data.
    """

    source: Source
    bands: tuple[str, ...]
    prepare: Preprocess
    network: Network
    channels: int
    rows: Axis
    columns: Axis
    panels: tuple[Panel, ...]
    blend: str
    batch: int
    min_valid: float

    def reader(self, panel: Panel) -> StripReader:
        """A reader of a panel.

        Args:
            panel: The panel.
        """
        return StripReader(
            self.source,
            self.bands,
            self.prepare,
            self.rows,
            self.columns,
            panel,
            min_valid=self.min_valid,
            replicate=not self.network.whole,
        )


@torch.inference_mode()
def run(job: Job, store: Store, device: torch.device, workers: int, progress: bool | None) -> None:
    """Compute all blocks that a store does not have yet.

    Which windows are computed together does not depend on what is there already, nor does the order
    in which they are blended: a continued run gives the same bits.

    Args:
        job: What to compute.
        store: Takes the blocks.
        device: Where the network is.
        workers: Batches to compute at once on a CPU.
        progress: Show a bar; None: if this is a terminal.
    """
    todo = [(number, panel, store.finished(number)) for number, panel in enumerate(job.panels)]
    count = len(job.rows.starts)
    total = sum((count - done) * (panel.end - panel.begin) for _, panel, done in todo)
    tqdm = importlib.import_module("tqdm").tqdm
    hidden = None if progress is None else not progress
    with (
        Workers(job.network, device, workers) as computing,
        tqdm(total=total, unit="window", smoothing=0.05, disable=hidden) as bar,
        ThreadPoolExecutor(1, "geofm-read") as reading,
        ThreadPoolExecutor(1, "geofm-blend") as blending,
        ThreadPoolExecutor(1, "geofm-write") as writing,
    ):
        writer = _InOrder(writing)
        for number, panel, done in todo:
            if done < count:
                write = functools.partial(writer.put, store.write, number)
                _panel(job, panel, done, computing, reading, _InOrder(blending), write, bar)
        writer.finish()


class _InOrder:
    """Hands work to a thread that does it in order, and nothing after something that failed."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread
        self.failed = False
        self.pending: deque[Future[None]] = deque()

    def put(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have something done; waits while other work waits, and raises what that raised.

        Args:
            work: What to call.
            *arguments: With what.
        """
        while len(self.pending) >= _WAITING:
            self.pending.popleft().result()
        self.pending.append(self.thread.submit(self._do, work, arguments))

    def finish(self) -> None:
        """Wait until all is done."""
        while self.pending:
            self.pending.popleft().result()

    def _do(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.failed:
            return
        # Until it is done: an error of any kind leaves it so.
        self.failed = True
        work(*arguments)
        self.failed = False


@dataclass(frozen=True, eq=False)
class _Batch:
    """Windows of one row that are computed together.

    Attributes:
        row: Their row.
        columns: Their columns.
        ended: Rows of which all windows came before, and which of their cells have enough data.
    """

    row: int
    columns: Sequence[int]
    ended: tuple[tuple[int, NDArray[np.bool_]], ...]


def _panel(
    job: Job,
    panel: Panel,
    done: int,
    computing: Workers,
    reading: ThreadPoolExecutor,
    blender: _InOrder,
    write: Callable[..., None],
    bar: Any,
) -> None:
    """Compute a panel from row of windows `done` on, and have its blocks written."""
    blend = _Blend(job, panel)
    left = job.columns.owned(panel.own)[0]

    def finish(row: int, enough: NDArray[np.bool_]) -> None:
        first, last = job.rows.owned(row)
        block, covered = blend.take(last - first)
        if row >= done:
            # A cell may reach out of its window and have its only data there.
            write(row, (first, left), block, enough & covered)

    def end(rows: Iterable[tuple[int, NDArray[np.bool_]]]) -> None:
        for row, enough in rows:
            blender.put(finish, row, enough)
            if row >= done:
                bar.update(panel.end - panel.begin)

    # Windows above reach into the first block.
    batches = _Batches(job, panel, job.rows.first_over(done), reading)
    for batch, values in computing.map(batches):
        end(batch.ended)
        blender.put(blend.add, batch.row, batch.columns, values)
    end(batches.ended)
    blender.finish()


class _Batches:
    """The windows of a panel in batches, row by row; the next row is read meanwhile.

    Args:
        job: What to compute.
        panel: Which windows.
        begin: First row of windows.
        reading: The thread that reads.

    Attributes:
        ended: Rows whose windows have all been given, and that no batch has told of yet.
    """

    def __init__(self, job: Job, panel: Panel, begin: int, reading: ThreadPoolExecutor) -> None:
        self.job, self.panel, self.begin, self.reading = job, panel, begin, reading
        self.ended: list[tuple[int, NDArray[np.bool_]]] = []

    def __iter__(self) -> Iterator[tuple[_Batch, Tensor]]:
        job, reader = self.job, self.job.reader(self.panel)
        strip = self.reading.submit(reader.read, self.begin)
        for row in range(self.begin, len(job.rows.starts)):
            current = strip.result()
            if row + 1 < len(job.rows.starts):
                strip = self.reading.submit(reader.read, row + 1)
            for columns in self._batches(current):
                starts = (job.columns.starts[column] for column in columns)
                # Copies: the strip's memory is that of the next row but one.
                pixels = torch.stack([current.window(s, job.columns.size) for s in starts])
                ended, self.ended = tuple(self.ended), []
                yield _Batch(row, columns, ended), pixels
            self.ended.append((row, current.enough))

    def _batches(self, strip: Strip) -> Iterator[Sequence[int]]:
        filled = zip(range(self.panel.begin, self.panel.end), strip.filled, strict=True)
        wanted = [column for column, some in filled if some]
        for begin in range(0, len(wanted), self.job.batch):
            yield wanted[begin : begin + self.job.batch]


class _Blend:
    """A running weighted mean over the windows of a panel, for one row of windows at a time.

    A mean of equal values is exactly that value: each new value moves the mean by a share of its
    difference from it.
    """

    def __init__(self, job: Job, panel: Panel) -> None:
        self.rows, self.columns, self.blend = job.rows, job.columns, job.blend
        self.begin = job.columns.firsts[panel.begin]
        self.skip = job.columns.firsts[panel.own] - self.begin
        self.width = job.columns.owned(panel.end - 1)[1] - self.begin
        # Windows of the panel may reach into the cells of the next one.
        reach = job.columns.firsts[panel.end - 1] + job.columns.cells - self.begin
        self.mean = np.zeros((job.channels, job.rows.cells, reach), dtype=np.float32)
        self.weight = np.zeros((job.rows.cells, reach), dtype=np.float32)

    def add(self, row: int, columns: Sequence[int], values: NDArray[np.float32]) -> None:
        """Take the values of windows.

        Args:
            row: Their row of windows, the current one.
            columns: Their columns of windows.
            values: (windows, channels, rows, columns).
        """
        for column, value in zip(columns, values, strict=True):
            self._add(row, column, value)

    def _add(self, row: int, column: int, value: NDArray[np.float32]) -> None:
        expected = (len(self.mean), self.rows.cells, self.columns.cells)
        if value.shape != expected:
            raise ModelError(f"the model gives {value.shape} for a window, not {expected}")
        new = np.multiply.outer(
            self.rows.weights(row, self.blend), self.columns.weights(column, self.blend)
        )
        first = self.columns.firsts[column] - self.begin
        place = slice(first, first + self.columns.cells)
        weight = self.weight[:, place]
        weight += new
        share = np.divide(new, weight, out=np.zeros_like(new), where=new > 0)
        mean = self.mean[:, :, place]
        mean += share * (value - mean)

    def take(self, rows: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The uppermost cells, which are final, and go on to those below.

        Args:
            rows: How many.

        Returns:
            (channels, rows, columns) of the panel's own cells, and which of them a window brought.
        """
        final = self.mean[:, :rows, self.skip : self.width].copy()
        covered = self.weight[:rows, self.skip : self.width] > 0
        for array in (self.mean, self.weight):
            # numpy minds the overlap.
            kept = array.shape[-2] - rows
            array[..., :kept, :] = array[..., rows:, :]
            array[..., kept:, :] = 0
        return final, covered


@torch.inference_mode()
def sample(job: Job, device: torch.device) -> NDArray[np.float32]:
    """Cells from windows all over the raster, from which components and scales are fitted.

    Args:
        job: What to compute.
        device: Where the network is.

    Returns:
        (cells, channels).

    Raises:
        RasterError: No window has data.
    """
    random = np.random.default_rng(0)
    wide = len(job.columns.starts)
    found: list[NDArray[np.float32]] = []
    order = random.permutation(len(job.rows.starts) * wide)[:_SAMPLE_TRIES]
    for number in order.tolist():
        row, column = divmod(number, wide)
        panel = Panel(column, column, column + 1)
        reader = job.reader(panel)
        strip = reader.read(row)
        if not strip.filled[0]:
            continue
        pixels = strip.window(job.columns.starts[column], job.columns.size)
        value = apply(job.network, pixels[None], device)[0]
        # Only cells that count: those at a window's edge are unlike what becomes of them.
        rows, columns = (_counting(*each) for each in ((job.rows, row), (job.columns, column)))
        top, left = job.rows.firsts[row], job.columns.firsts[column]
        enough = reader.enough(
            (top + rows.start, top + rows.stop), (left + columns.start, left + columns.stop)
        )
        cells = value[:, rows, columns].reshape(job.channels, -1).T[enough.ravel()]
        if len(cells) > _SAMPLE_CELLS:
            cells = cells[random.choice(len(cells), _SAMPLE_CELLS, replace=False)]
        found.append(cells)
        if len(found) == _SAMPLE_WINDOWS:
            break
    values = np.concatenate(found) if found else np.empty((0, job.channels), dtype=np.float32)
    if not len(values):
        raise RasterError(
            f"{len(order)} windows all over the raster have no data, so that neither components "
            f"nor scales can be fitted; check nodata="
        )
    return values


def _counting(axis: Axis, index: int) -> slice:
    """Cells of a window that are nearest to its centre, of all windows'."""
    place = np.flatnonzero(axis.weights(index, "centre"))
    return slice(int(place[0]), int(place[-1]) + 1)
