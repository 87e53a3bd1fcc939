"""How many MMEarth samples a second two workers read, against reading tile by tile.

    python benchmarks/mmearth_reading.py

Both sides read the same HDF5 file (generated tiles, repeated) with the twelve modalities of
pretraining, through a DataLoader with the same workers and batches, and deliver the same numbers;
that is checked first. The file is in the system's cache, so the processor is measured, not the
disk. First the file is laid out as the published conversion script does it, one gzip chunk a tile
(the published sizes fit no uncompressed file): inflating them takes a large part of geofm's time
then; what it takes alone is printed too, with ISA-L (the package isal) and with zlib. Then it is
unpacked with `unpack_mmearth`, as one would for many epochs.

What it is compared with, both reading one modality of one tile at a time:

* "per tile": ``file[modality][row, channels]``, then normalization in float64 and one ``np.where``
  for each missing value and each class; the usual way to write it, and the published loader's.
* "lean per tile": the same loop with what costs most left out: whole rows without a selection of
  channels, float32, classes by a table. (It still looks the array up by its name each time.)

The workers have begun when the clock starts. Runs alternate; each figure is the median. Processor
time of all processes is printed beside the rate: other work on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from isal import isal_zlib
from torch.utils.data import DataLoader, Dataset

from geofm.datasets.mmearth import STORED_BANDS, MMEarth, unpack_mmearth, write_mmearth

MODALITIES = (
    "sentinel2 sentinel1 aster era5 dynamic_world canopy_height_eth lat lon biome eco_region month "
    "esa_worldcover"
).split()
MISSING = {"sentinel2": 0, "canopy_height_eth": 255}
CODES = {"dynamic_world": range(1, 10), "esa_worldcover": [*range(10, 100, 10), 95, 100]}


class PerTile(Dataset):
    """Modality by modality, tile by tile."""

    lean = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = json.loads(path.with_name(f"{path.stem}_splits.json").read_text())["train"]
        self.info = json.loads(path.with_name(f"{path.stem}_tile_info.json").read_text())
        self.stats = json.loads(path.with_name(f"{path.stem}_band_stats.json").read_text())
        self.file: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        row = self.rows[index]
        name = self.file["metadata"][row][0].decode()
        sample: dict[str, Any] = {"id": name}
        for modality in MODALITIES:
            stats = modality
            if modality == "sentinel2":
                stats = f"sentinel2_{self.info[name]['S2_type']}"
            read = self.lean_modality if self.lean else self.modality
            sample[modality] = read(modality, row, self.stats.get(stats))
        return sample

    def modality(self, name: str, row: int, stats: dict[str, Any] | None) -> Any:
        array = self.file[name]
        if name in ("biome", "eco_region"):
            return array[row].astype(np.float32)
        channels = list(range(array.shape[1]))
        if name == "sentinel2":
            channels.remove(STORED_BANDS.index("B10"))
        raw = array[row, channels]
        if name in CODES:
            out = np.full(raw.shape, -1.0)
            for number, code in enumerate(CODES[name]):
                out = np.where(raw == code, number, out)
            return out.astype(np.int64)
        assert stats is not None
        shape = (-1, *(1 for _ in raw.shape[1:]))
        mean = np.array(stats["mean"])[channels].reshape(shape)
        std = np.array(stats["std"])[channels].reshape(shape)
        out = (raw - mean) / std
        if name in MISSING:
            out = np.where(raw == MISSING[name], np.nan, out)
        out = np.where(np.isinf(out), np.nan, out)
        if raw.ndim == 3:
            out = np.where(np.isnan(out), 0, out)
        return out.astype(np.float32)

    def lean_modality(self, name: str, row: int, stats: dict[str, Any] | None) -> Any:
        raw = self.file[name][row]
        if name in ("biome", "eco_region"):
            return raw.astype(np.float32)
        if name in CODES:
            table = np.full(256, -1)
            table[list(CODES[name])] = range(len(CODES[name]))
            return table[raw]
        assert stats is not None
        shape = (-1, *(1 for _ in raw.shape[1:]))
        mean = np.array(stats["mean"], np.float32).reshape(shape)
        std = np.array(stats["std"], np.float32).reshape(shape)
        if name == "sentinel2":
            keep = [band != "B10" for band in STORED_BANDS]
            raw, mean, std = raw[keep], mean[keep], std[keep]
        out = (raw - mean) / std
        if raw.ndim == 1:
            return out
        lost = raw == MISSING[name] if name in MISSING else ~np.isfinite(out)
        if lost.any():
            out[lost] = 0
        return out


class LeanPerTile(PerTile):
    lean = True


def write(folder: Path, count: int, size: int) -> Path:
    """`count` tiles, the generated ones over and over."""
    source = write_mmearth(folder / "few", n=64, size=size)
    target = folder / "many.h5"
    with h5py.File(source) as few, h5py.File(target, "w") as many:
        for name, array in few.items():
            shape = (count, *array.shape[1:])
            made = many.create_dataset(
                name, shape, array.dtype, chunks=(1, *shape[1:]), compression="gzip"
            )
            rest = (0,) * (len(shape) - 1)
            for row in range(count):
                _, stored = array.id.read_direct_chunk((row % 64, *rest))
                made.id.write_direct_chunk((row, *rest), stored)
    for suffix in ("band_stats", "tile_info"):
        shutil.copy(folder / "few" / f"sample_{suffix}.json", folder / f"many_{suffix}.json")
    (folder / "many_splits.json").write_text(json.dumps({"train": list(range(count))}))
    return target


def cpu() -> float:
    """Processor seconds of this process and of its living workers (Linux)."""
    used = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def inflating(path: Path, decompress: Callable[..., bytes]) -> float:
    """Seconds a tile that inflating alone takes, for the modalities that are read."""
    chunks = []
    with h5py.File(path) as file:
        for row in range(64):
            for name in MODALITIES:
                rest = (0,) * (file[name].ndim - 1)
                chunks.append(file[name].id.read_direct_chunk((row, *rest))[1])
    start = time.process_time()
    for chunk in chunks:
        decompress(chunk, bufsize=1 << 18)
    return (time.process_time() - start) / 64


def rate(dataset: Dataset, batch: int, workers: int, shuffle: bool) -> tuple[float, float]:
    """Samples a second, and processor seconds a sample, of workers that have already begun."""
    order = np.random.default_rng(0).permutation(len(dataset)) if shuffle else range(len(dataset))
    batches = np.array_split(np.array(order), len(dataset) // batch)
    now: list[list[int]] = [batches[0].tolist()] * 2 * workers
    loader = DataLoader(
        dataset, batch_sampler=now, num_workers=workers, persistent_workers=workers > 0
    )
    for _ in loader:
        pass
    now[:] = [rows.tolist() for rows in batches]
    start, used = time.perf_counter(), cpu()
    count = sum(len(samples["id"]) for samples in loader)
    return count / (time.perf_counter() - start), (cpu() - used) / count


def check(path: Path) -> float:
    """The largest difference between the sides, over the generated tiles."""
    sides = [MMEarth(path, "train", MODALITIES), PerTile(path), LeanPerTile(path)]
    largest = 0.0
    for index in range(64):
        ours, *others = [side[index] for side in sides]
        for other in others:
            assert ours["id"] == other["id"]
            for name in MODALITIES:
                a, b = np.asarray(ours[name], np.float64), np.asarray(other[name], np.float64)
                assert a.shape == b.shape
                assert np.array_equal(np.isnan(a), np.isnan(b))
                largest = max(largest, float(np.nanmax(np.abs(a - b))))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiles", type=int, default=1024)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--in-order", action="store_true", help="also without shuffling")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{arguments.tiles} tiles of {arguments.size} px, batches of {arguments.batch}, "
        f"{arguments.workers} workers, median of {arguments.runs}; {platform.machine()}, "
        f"h5py {h5py.__version__}"
    )
    orders = ("shuffled", "in order")[: 2 if arguments.in_order else 1]
    with tempfile.TemporaryDirectory() as folder:
        packed = write(Path(folder), arguments.tiles, arguments.size)
        unpacked = unpack_mmearth(packed, Path(folder) / "unpacked.h5")
        for what, path in (("as published", packed), ("unpacked", unpacked)):
            print(f"\n{what}: {path.stat().st_size / arguments.tiles / 1000:.0f} kB a tile")
            print(f"  largest difference between the sides {check(path):.1e}")
            if path == packed:
                for module in (isal_zlib, zlib):
                    spent = 1000 * inflating(path, module.decompress)
                    print(f"  {module.__name__} alone {spent:.2f} ms a sample")
            for order in orders:
                speed = compare(path, order, arguments)
                if path == packed:
                    plain = speed["per tile"]
        ratio = speed["geofm"] / plain
        print(f"\ngeofm, unpacked, against per tile, as published: {ratio:.1f} x")


def compare(path: Path, order: str, arguments: argparse.Namespace) -> dict[str, float]:
    sides = {
        "geofm": MMEarth(path, "train", MODALITIES),
        "per tile": PerTile(path),
        "lean per tile": LeanPerTile(path),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(arguments.runs):
        for name, side in sides.items():
            figures[name].append(
                rate(side, arguments.batch, arguments.workers, order == "shuffled")
            )
    speed = {name: statistics.median(f[0] for f in many) for name, many in figures.items()}
    effort = {name: statistics.median(f[1] for f in many) for name, many in figures.items()}
    for name in sides:
        ratio = f"; geofm: {speed['geofm'] / speed[name]:.1f} x, "
        ratio += f"by processor time {effort[name] / effort['geofm']:.1f} x"
        print(
            f"  {order:9} {name:14} {speed[name]:6.0f} samples/s, {1000 * effort[name]:5.2f} ms of "
            f"processor a sample{ratio if name != 'geofm' else ''}"
        )
    return speed


if __name__ == "__main__":
    main()
