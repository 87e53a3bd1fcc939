"""Applying a network to one batch after the other, on a CPU to several at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geofm.errors import RasterError
from geofm.raster.networks import Network

__all__ = ["Workers", "apply"]

Key = TypeVar("Key")


class Workers:
    """Threads that each apply a network to a batch of their own.

    Where all cores share a batch, each of its hundreds of operations waits for the core that is
    last, and a core that also reads or blends holds up the others. Cores with batches of their own
    do not wait for each other.

    With one worker, the network runs in the caller's thread: on a GPU, and under autocast, which
    belongs to a thread.

    Args:
        network: What to apply.
        device: Where it is.
        count: Batches at once on a CPU; torch's threads are divided among them.
    """

    def __init__(self, network: Network, device: torch.device, count: int) -> None:
        self.network, self.device = network, device
        one = device.type != "cpu" or torch.is_autocast_enabled("cpu")
        self.count = 1 if one else max(1, min(count, torch.get_num_threads()))
        self._threads = _pool(self.count) if self.count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def map(
        self, batches: Iterable[tuple[Key, Tensor]]
    ) -> Iterator[tuple[Key, NDArray[np.float32]]]:
        """Apply the network to batches.

        Args:
            batches: Something that belongs to a batch, and its pixels, (N, bands, h, w).

        Yields:
            The same, and what the network gives, (N, channels, rows, columns), in order.

        Raises:
            RasterError: A batch does not fit into the device's memory.
        """
        if self._threads is None:
            for key, pixels in batches:
                yield key, apply(self.network, pixels, self.device)
            return
        pending: deque[tuple[Key, Future[NDArray[np.float32]]]] = deque()
        for key, pixels in batches:
            # One more than there are workers, so that none of them waits for this thread.
            if len(pending) > self.count:
                done, found = pending.popleft()
                yield done, found.result()
            task = self._threads.submit(apply, self.network, pixels, self.device)
            pending.append((key, task))
        while pending:
            done, found = pending.popleft()
            yield done, found.result()


@torch.inference_mode()
def apply(network: Network, pixels: Tensor, device: torch.device) -> NDArray[np.float32]:
    """Apply a network to one batch.

    Args:
        network: The network.
        pixels: Prepared, (N, bands, h, w).
        device: Where the network is.

    Returns:
        (N, channels, rows, columns).

    Raises:
        RasterError: The batch does not fit into the device's memory.
    """
    try:
        found = network.apply(pixels.to(device, non_blocking=True)).float().cpu()
    except torch.OutOfMemoryError as error:
        raise RasterError(
            f"{len(pixels)} windows of {pixels.shape[-2]} x {pixels.shape[-1]} px do not fit into "
            f"the device's memory; take a smaller batch_size or window"
        ) from error
    return found.numpy()


def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that share those of torch evenly."""
    before = torch.get_num_threads()
    share = max(1, before // count)
    started = threading.Barrier(count + 1)

    def begin() -> None:
        # The number is each thread's own; what a thread does first with torch sets it anew.
        torch.get_num_threads()
        torch.set_num_threads(share)
        started.wait()

    pool = ThreadPoolExecutor(count, "geofm-compute", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    # It is also what threads to come begin with.
    torch.set_num_threads(before)
    return pool
