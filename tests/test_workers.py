"""Batches computed by several threads at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_windows import noise, small_mpmae
from torch import Tensor

from geofm.raster import embed_raster
from geofm.raster.networks import Network
from geofm.raster.workers import Workers

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def network(apply) -> Network:
    return Network(apply, 1, 1, 0.0, False, "test")


def batches(count: int) -> Iterator[tuple[list[int], Tensor]]:
    return (([i], torch.full((1, 1, 2, 2), float(i))) for i in range(count))


@pytest.mark.usefixtures("four_threads")
def test_results_come_in_order_though_batches_end_in_any() -> None:
    def apply(pixels: Tensor) -> Tensor:
        time.sleep(0.02 if pixels[0, 0, 0, 0] % 3 == 0 else 0.001)
        return pixels * 2

    with Workers(network(apply), CPU, 3) as workers:
        found = list(workers.map(batches(20)))
    assert [windows for windows, _ in found] == [[i] for i in range(20)]
    assert [value[0, 0, 0, 0] for _, value in found] == [2 * i for i in range(20)]


@pytest.mark.usefixtures("four_threads")
def test_threads_of_torch_are_divided_among_workers_and_left_as_they_were() -> None:
    seen = set()
    barrier = threading.Barrier(2)

    def apply(pixels: Tensor) -> Tensor:
        # Both workers are here at once.
        barrier.wait(10)
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return pixels

    with Workers(network(apply), CPU, 2) as workers:
        list(workers.map(batches(2)))
        assert torch.get_num_threads() == 4
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]
    assert len(seen) == 2
    assert {threads for _, threads in seen} == {2}


@pytest.mark.usefixtures("four_threads")
def test_autocast_of_the_caller_is_kept() -> None:
    dtypes = set()

    def apply(pixels: Tensor) -> Tensor:
        dtypes.add(torch.nn.functional.linear(pixels, torch.ones(2, 2)).dtype)
        return pixels

    with torch.autocast("cpu", torch.bfloat16), Workers(network(apply), CPU, 4) as workers:
        list(workers.map(batches(4)))
    assert dtypes == {torch.bfloat16}


@pytest.mark.usefixtures("four_threads")
def test_an_error_of_a_batch_is_raised_and_ends_the_others() -> None:
    done = []

    def apply(pixels: Tensor) -> Tensor:
        number = int(pixels[0, 0, 0, 0])
        if number == 1:
            raise ValueError("batch one")
        done.append(number)
        return pixels

    with (
        pytest.raises(ValueError, match="batch one"),
        Workers(network(apply), CPU, 2) as workers,
    ):
        list(workers.map(batches(100)))
    assert len(done) < 10


def test_the_map_is_the_same_to_the_bit_on_any_number_of_cores() -> None:
    model = small_mpmae(0.5, stem_padding="aligned")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grid = embed_raster(model, noise(150, 190), window=64, overlap=32, batch_size=2)
            found.append(grid.values)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
