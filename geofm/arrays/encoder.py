"""What a worker computes with, sent to it once, and how it computes one chunk."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import multiprocessing
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from geofm.arrays.grid import Cells
from geofm.errors import ModelError, RasterError
from geofm.preprocess import Preprocess
from geofm.raster.codecs import narrowed
from geofm.raster.networks import Network, features_of, moved, weights_hash
from geofm.raster.strips import has_data

__all__ = ["Encoder", "cut", "embed_chunk"]

# Networks that stay ready in a process: what runs, and what ran before it.
_KEPT = 2
_ready: OrderedDict[tuple[str, str], tuple[Network, torch.device]] = OrderedDict()
# The model runs on one window at a time: it then uses all threads of the worker, and memory for
# its activations once. Outside of the lock each thread reads and prepares a window of its own.
_lock = threading.Lock()


class Encoder:
    """A model and its preprocessing, as one object of a graph.

    It holds a copy of the model on the CPU, in evaluation mode: what happens to the original later
    changes nothing.

    Args:
        model: An encoder from `create_model`.
        prepare: Its preprocessing.
        stride: Pixels per cell; None for the model's last.
        device: ``"auto"`` for the worker's GPU if it has one, else its CPU; or a torch device.
        min_valid: Share of a cell's pixels that must have data.
        dtype: Type of the values.

    Attributes:
        token: Hash of all that the values depend on.
        network: What is computed from a window.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Preprocess,
        stride: int | None,
        device: str,
        min_valid: float,
        dtype: str,
    ) -> None:
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.prepare, self.stride, self.device = prepare, stride, device
        self.min_valid, self.dtype = min_valid, dtype
        self.weights_hash = weights_hash(self.model)
        facts = (
            self.weights_hash,
            repr(prepare),
            repr(prepare.spec),
            (prepare.sources, prepare.shift, prepare.scale, prepare.factor, prepare.offset),
            (stride, device, min_valid, dtype),
        )
        self.token = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.network = features_of(self.model, stride, pooled=False)

    def __getstate__(self) -> dict[str, Any]:
        # The network is a closure over the model.
        return {key: value for key, value in vars(self).items() if key != "network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.network = features_of(self.model, self.stride, pooled=False)

    def __dask_tokenize__(self) -> str:
        return self.token

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns that a window gives, found without computing.

        Args:
            height: Of the window.
            width: Of the window.

        Raises:
            ModelError: The model does not take such a window.
        """
        network = features_of(copy.deepcopy(self.model).to("meta"), self.stride, pooled=False)
        pixels = torch.empty(1, len(self.prepare.spec.bands), height, width, device="meta")
        try:
            with torch.inference_mode():
                found = network.apply(pixels)
        # timm's transformers assert their size.
        except (AssertionError, RuntimeError) as error:
            raise ModelError(
                f"the model does not take windows of {height} x {width} px (a chunk with its halo "
                f"on both sides, cut to the array): {error}"
            ) from error
        if found.ndim != 4 or len(found) != 1:
            raise ModelError(f"the model gives {tuple(found.shape)}, which is no map of cells")
        return found.shape[1], found.shape[2], found.shape[3]

    def apply(self, pixels: Tensor) -> NDArray[np.float32]:
        """Run the model on one window, on this process's device.

        Args:
            pixels: Prepared, (bands, height, width).

        Returns:
            (channels, rows, columns).

        Raises:
            RasterError: The device is not there, or its memory is too small.
        """
        with _lock, _threads(), torch.inference_mode():
            network, device = self._ready()
            try:
                found = network.apply(pixels[None].to(device))[0].float().cpu()
            except torch.OutOfMemoryError as error:
                raise RasterError(
                    f"a window of {pixels.shape[-2]} x {pixels.shape[-1]} px does not fit into the "
                    f"device's memory; take smaller chunks"
                ) from error
        return found.numpy()

    def _ready(self) -> tuple[Network, torch.device]:
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        key = (self.token, name)
        if key not in _ready:
            network, device = self.network, torch.device("cpu")
            if name != "cpu":
                model = copy.deepcopy(self.model)
                device = moved(model, name)
                network = features_of(model, self.stride, pooled=False)
            _ready[key] = (network, device)
            while len(_ready) > _KEPT:
                _ready.popitem(last=False)
        _ready.move_to_end(key)
        return _ready[key]


def embed_chunk(
    encoder: Encoder,
    blocks: Sequence[Sequence[NDArray[Any]]],
    channels: int,
    rows: Cells,
    columns: Cells,
) -> NDArray[Any]:
    """Embed one chunk: the task of the graph.

    Args:
        encoder: What to compute with.
        blocks: Parts of the array, by row and column, (time, bands, h, w) each, that make up the
            window as far as the array reaches.
        channels: Channels that the model gives.
        rows: Cells from top to bottom.
        columns: Cells from left to right.

    Returns:
        (time, channels, rows, columns), NaN where a cell has no data.

    Raises:
        PixelError: The pixels are not in the stated units.
        RasterError: The device is not there, its memory is too small, or the model's output is not
            finite or beyond float16.
    """
    stored = np.concatenate([np.concatenate(row, axis=-1) for row in blocks], axis=-2)
    pad = (0, columns.size - stored.shape[-1], 0, rows.size - stored.shape[-2])
    out = np.full((len(stored), channels, rows.count, columns.count), np.nan, dtype=encoder.dtype)
    for pixels, values in zip(stored, out, strict=True):
        valid = has_data(np.ma.asarray(pixels), encoder.prepare.nodata)
        enough = _enough(valid, rows, columns, encoder.min_valid)
        if not enough.any():
            continue
        prepared = encoder.prepare(pixels)
        if any(pad):
            prepared = F.pad(prepared[None], pad, mode="replicate")[0]
        found = encoder.apply(prepared)[:, rows.skip :, columns.skip :]
        found = narrowed(found[:, : rows.count, : columns.count], enough, encoder.dtype)
        values[:, enough] = found[:, enough]
    return out


def cut(block: NDArray[Any], top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
    """A part of a block: what a neighbour needs of it.

    Args:
        block: (time, bands, rows, columns).
        top: First row.
        bottom: The one after the last.
        left: First column.
        right: The one after the last.

    Returns:
        A copy, which does not keep the block in memory.
    """
    return block[..., top:bottom, left:right].copy()


def _enough(
    valid: NDArray[np.bool_], rows: Cells, columns: Cells, min_valid: float
) -> NDArray[np.bool_]:
    """Cells with enough pixels that have data; those at the edge by what lies in the array."""
    sums = np.zeros((valid.shape[0] + 1, valid.shape[1] + 1), dtype=np.int64)
    np.cumsum(valid, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    top, bottom, left, right = (
        np.asarray(edges).clip(0) for edges in (rows.first, rows.last, columns.first, columns.last)
    )
    area = np.multiply.outer(bottom - top, right - left)
    above = sums[bottom] - sums[top]
    count = above[:, right] - above[:, left]
    return np.asarray((count > 0) & (count >= min_valid * area))


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Let torch use as many threads as dask gives this worker, and no more."""
    before = torch.get_num_threads()
    wanted = _own_threads() or before
    try:
        if wanted != before:
            torch.set_num_threads(wanted)
        yield
    finally:
        if wanted != before:
            torch.set_num_threads(before)


def _own_threads() -> int | None:
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            return int(distributed.get_worker().state.nthreads)
        except ValueError:
            pass  # not in a task of a cluster
    # dask's scheduler of processes starts one per core.
    return 1 if multiprocessing.parent_process() is not None else None
