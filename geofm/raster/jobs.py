"""What is computed: how a raster is cut into windows, and how many of them at a time."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geofm.errors import ModelError, RasterError
from geofm.factory import input_spec_of
from geofm.preprocess import Preprocess
from geofm.raster.networks import Network, check_size, default_window
from geofm.raster.runs import Job
from geofm.raster.sources import Source
from geofm.raster.windows import BLENDS, Axis, maps, panels, vectors

__all__ = ["Tiling", "make_job", "workers_for"]

# What one window may take; MP-MAE atto needs 2 KB a pixel.
_MAX_WINDOW_BYTES = 10e9
# What a batch of windows is chosen to take. On a CPU each of torch's threads has one of its own,
# and all of them together take no more than so much for each.
_BATCH_BYTES = {"cpu": 64e6}
_BATCH_BYTES_ELSEWHERE = 2e9
_WORKER_BYTES = 256e6
# Batches of pixels and of cells that wait for each other, for each one that is computed.
_WAITING_BATCHES = 4
# What a panel's strip of prepared pixels, and its unfinished cells, may take each.
_PANEL_BYTES = 48e6


@dataclass(frozen=True)
class Tiling:
    """How a raster is cut into windows and put together again.

    Attributes:
        window: Pixels along the side of a window; ``"tile"``: the size of the tiles the model was
            trained on, side by side, so that each cell is what the model gives on one tile alone
            (`blend` has no part in it);
            ``"image"``: all in one pass; None: see `default_window`.
        overlap: Pixels that neighbouring windows share; None for a quarter of a window (none for
            ``"tile"`` and for one vector a window).
        blend: ``"smooth"``: means, weighted by the distance from each window's edge; ``"centre"``:
            each cell from the window whose centre is nearest.
        min_valid: Share of the pixels of a cell that must have data.
        batch_size: Windows at a time; None for what takes about 2 GB on a GPU, or 64 MB on a CPU,
            where each of torch's threads has a batch of its own.
    """

    window: int | str | None = None
    overlap: int | None = None
    blend: str = "smooth"
    min_valid: float = 0.5
    batch_size: int | None = None

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            RasterError: An option is unknown or out of range.
        """
        window, overlap = self.window, self.overlap
        if isinstance(window, str) and window not in ("tile", "image"):
            raise RasterError(f"window is pixels, 'tile' or 'image', got {window!r}")
        _check_whole("window", None if isinstance(window, str) else window, 1)
        _check_whole("overlap", overlap, 0)
        if self.blend not in BLENDS:
            raise RasterError(f"blend is {' or '.join(BLENDS)}, got {self.blend!r}")
        if not 0 <= self.min_valid <= 1:
            raise RasterError(f"min_valid is a share from 0 to 1, got {self.min_valid}")
        _check_whole("batch_size", self.batch_size, 1)


def _check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is neither None nor a whole number of at least so many."""
    if value is None:
        return
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise RasterError(f"{name} must be a whole number, {least} or more, got {value!r}")


def make_job(
    model: nn.Module,
    source: Source,
    prepare: Preprocess,
    network: Network,
    tiling: Tiling,
    device: torch.device,
) -> Job:
    """Decide how a raster is cut into windows, panels and batches.

    Args:
        model: What is run; it is on `device`.
        source: What is read.
        prepare: Its preprocessing.
        network: What is computed from a window.
        tiling: What the caller asked for.
        device: Where the model is.

    Returns:
        All that the values depend on.

    Raises:
        RasterError: Window or overlap do not fit the model's cells, or a window takes too much.
        ModelError: The model gives no map, or the raster is smaller than a cell.
    """
    side = _side(model, source, tiling)
    check_size(network, source.height, source.width)
    unit = network.unit
    if tiling.window is not None and tiling.window != "image" and side % unit:
        raise RasterError(
            f"a window must be a multiple of the model's cells of {unit} px, got {side}; take "
            f"{max(unit, round(side / unit) * unit)}"
        )
    side += -side % unit
    overlap = tiling.overlap
    if overlap is None:
        none = tiling.window == "tile" or network.whole
        overlap = 0 if none else side // 4 // unit * unit
        # Cells of unpadded stems do not reach the window's edges.
        overlap = max(overlap, 0 if network.whole else math.ceil(network.offset))
        overlap += -overlap % unit
    if overlap % unit or overlap >= side:
        raise RasterError(
            f"an overlap is a multiple of the model's cells of {unit} px and less than the window "
            f"of {side} px, got {overlap}"
        )
    sides = [min(side, length + -length % unit) for length in (source.height, source.width)]
    _check_memory(model, sides)
    channels, cells = _probe(network, len(prepare.spec.bands), sides, device)
    axes = [
        _axis(network, length, size, min(overlap, size - unit), count)
        for length, size, count in zip((source.height, source.width), sides, cells, strict=True)
    ]
    waiting = 4 * (len(prepare.spec.bands) * math.prod(sides) + channels * math.prod(cells))
    waiting *= _WAITING_BATCHES
    return Job(
        source=source,
        bands=prepare.source_bands,
        prepare=prepare,
        network=network,
        channels=channels,
        rows=axes[0],
        columns=axes[1],
        panels=panels(axes[1], _panel_width(prepare, channels, *axes)),
        # The last tile, moved back to end where the raster ends, shares cells with its neighbour.
        blend="centre" if tiling.window == "tile" else tiling.blend,
        batch=tiling.batch_size or _batch_size(_window_bytes(model, sides) + waiting, device),
        min_valid=tiling.min_valid,
    )


def _side(model: nn.Module, source: Source, tiling: Tiling) -> int:
    """Pixels along the side of a window, before it is brought to the network's unit."""
    if tiling.window == "tile":
        return input_spec_of(model).size
    if tiling.window == "image":
        return max(source.height, source.width)
    return int(tiling.window) if tiling.window is not None else default_window(model)


def _axis(network: Network, length: int, size: int, overlap: int, cells: int) -> Axis:
    if network.whole:
        return vectors(length, size, overlap)
    return maps(length, size, overlap, network.unit, network.stride, cells, network.offset)


@torch.inference_mode()
def _probe(
    network: Network, bands: int, sides: Sequence[int], device: torch.device
) -> tuple[int, tuple[int, int]]:
    """Channels and cells of one window."""
    found = network.apply(torch.zeros(1, bands, *sides, device=device))
    if found.ndim != 4 or len(found) != 1:
        raise ModelError(f"the model gives {tuple(found.shape)}, which is no map of cells")
    return found.shape[1], (found.shape[2], found.shape[3])


def _window_bytes(model: nn.Module, sides: Sequence[int]) -> float:
    info: Any = getattr(model, "feature_info", None)
    if not info:
        return 0.0
    # The widest activation is four times the first level's channels, float32, three at a time.
    per_pixel = info[0]["num_chs"] / info[0]["reduction"] ** 2 * 4 * 4 * 3
    return float(sides[0] * sides[1] * per_pixel)


def _check_memory(model: nn.Module, sides: Sequence[int]) -> None:
    needed = _window_bytes(model, sides)
    if needed > _MAX_WINDOW_BYTES:
        raise RasterError(
            f"{sides[0]} x {sides[1]} pixels need about {needed / 1e9:.0f} GB in one pass, and at "
            f"most {_MAX_WINDOW_BYTES / 1e9:.0f} GB are taken; choose a smaller window"
        )


def _batch_size(window_bytes: float, device: torch.device) -> int:
    most = _BATCH_BYTES.get(device.type, _BATCH_BYTES_ELSEWHERE)
    return max(1, min(256, int(most // window_bytes)))


def workers_for(model: nn.Module, job: Job) -> int:
    """How many batches a CPU computes at once, so that they take no more than is meant for them.

    Args:
        model: What is run.
        job: Its windows.
    """
    threads = torch.get_num_threads()
    needed = job.batch * _window_bytes(model, (job.rows.size, job.columns.size))
    return max(1, min(threads, int(threads * _WORKER_BYTES // max(needed, 1.0))))


def _panel_width(prepare: Preprocess, channels: int, rows: Axis, columns: Axis) -> int:
    pixel = len(prepare.spec.bands) * rows.size * 4
    cell = channels * rows.cells * 4 / columns.spacing
    return int(_PANEL_BYTES // max(pixel, cell, 1))
