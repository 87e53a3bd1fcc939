"""Memory, overhead and growth of windowed inference over a synthetic Sentinel-2 tile.

    python benchmarks/raster_speed.py --sizes 1000 2000                    # quick
    python benchmarks/raster_speed.py --sizes 1000 2000 4000 --repeats 3 --json small.json
    python benchmarks/raster_speed.py --sizes 10980 --with-results small.json --plot plot.png
    python benchmarks/raster_speed.py --sizes 10980 --model pointwise      # memory alone

Each size runs in a process of its own, so that its peak memory is its own: that of the first run,
before the encoder is timed. "encoder" is the time that as many windows of noise take, from memory,
with nothing read, blended or written, timed after each run on some of them: each core with a batch
of its own, as `embed_raster` does it, and all cores on one batch at a time, as a loop over batches
would. "overhead" is what `embed_raster` takes beyond the former, by the clock and by processor
time; with `--repeats`, the median. On a machine with other work to do only processor time means
anything. `--model pointwise` puts one 1×1 convolution of 12 to 320 channels per 8 px in the
encoder's place: all the rest of the work, at its full size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from torch import Tensor, nn

import geofm
from geofm.raster import embed, embed_raster
from geofm.raster.runs import Job
from geofm.raster.workers import Workers

BANDS = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split()


class Pointwise(nn.Module):
    """Nearly no computation, and an output as large as MP-MAE atto's."""

    cell_offset = 0.0
    feature_info = ({"num_chs": 1, "reduction": 1}, {"num_chs": 320, "reduction": 8})

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = geofm.model_card("mpmae_atto.mmearth64").input
        self.conv = nn.Conv2d(12, 320, 1)

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [self.conv(x[:, :, ::8, ::8])]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "pointwise":
        return Pointwise().eval()
    return geofm.create_model(name, stem_padding="aligned").eval()


def write_tile(path: Path, size: int) -> None:
    """A tile of smooth fields and noise, in blocks of 512 as products are shipped."""
    random = np.random.default_rng(0)
    block = (random.normal(0, 150, (len(BANDS), 512, 512)) + 1500).astype(np.float32)
    wave = np.sin(np.linspace(0, 60, size, dtype=np.float32))
    profile = {
        "driver": "GTiff",
        "width": size,
        "height": size,
        "count": len(BANDS),
        "dtype": "uint16",
        "crs": "EPSG:32631",
        "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "zlevel": 1,
        "BIGTIFF": "IF_SAFER",
    }
    with rasterio.Env(GDAL_CACHEMAX=2**28), rasterio.open(path, "w", **profile) as file:
        file.descriptions = BANDS
        for top in range(0, size, 512):
            rows = min(512, size - top)
            for left in range(0, size, 512):
                columns = min(512, size - left)
                place = 400 * np.add.outer(wave[top : top + rows], wave[left : left + columns])
                values = np.clip(block[:, :rows, :columns] + place, 1, 9000).astype(np.uint16)
                file.write(values, window=rasterio.windows.Window(left, top, columns, rows))


def encoder_seconds(job: Job, workers: int, most: int) -> dict[str, float]:
    """Seconds for all windows of a job, from at most `most` of noise."""
    windows = sum((p.end - p.begin) for p in job.panels) * len(job.rows.starts)
    pixels = torch.randn(job.batch, len(BANDS), job.rows.size, job.columns.size)
    batches = max(workers, min(most, windows) // job.batch // workers * workers)
    share = windows / (batches * job.batch)

    def timed(count: int) -> tuple[float, float]:
        with Workers(job.network, torch.device("cpu"), count) as computing:
            # Twice: once to warm up.
            for number in (count, batches):
                begin, spent = time.perf_counter(), time.process_time()
                for _ in computing.map((None, pixels) for _ in range(number)):
                    pass
            return time.perf_counter() - begin, time.process_time() - spent

    (together, _), (apart, processor) = timed(1), timed(workers)
    return {
        "encoder, a batch at a time": together * share,
        "encoder": apart * share,
        "encoder, processor": processor * share,
    }


def measure(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """One size, in this process."""
    model = build(options.model)
    jobs: list[tuple[Job, int]] = []
    spent: dict[str, float] = {}
    run, finish = embed.run, embed.raw_to_cog

    def kept_run(job: Job, *rest: Any) -> None:
        jobs.append((job, rest[2]))
        begin = time.perf_counter()
        run(job, *rest)
        spent["windows"] = time.perf_counter() - begin

    def kept_finish(*arguments: Any) -> None:
        begin = time.perf_counter()
        finish(*arguments)
        spent["finish"] = time.perf_counter() - begin

    embed.run, embed.raw_to_cog = kept_run, kept_finish
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "tile.tif"
        # In a process of its own: its memory is not that of the run.
        subprocess.run(
            [sys.executable, __file__, "--write", str(source), "--sizes", str(size)], check=True
        )
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = 0
        output = Path(folder) / "out.tif"
        for _ in range(options.repeats):
            output.unlink(missing_ok=True)
            begin, processor = time.perf_counter(), time.process_time()
            embed_raster(model, source, output, level="L2A", dtype=options.dtype, progress=None)
            total = time.perf_counter() - begin
            processor = time.process_time() - processor
            # Of the first run alone, before anything else is measured here.
            peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            alone = encoder_seconds(*jobs[-1], options.windows)
            rows.append(
                {
                    "seconds": total,
                    "of which windows": spent["windows"],
                    "of which finish": spent["finish"],
                    **alone,
                    "overhead": total / alone["encoder"] - 1,
                    "processor overhead": processor / alone["encoder, processor"] - 1,
                    "over a batch at a time": total / alone["encoder, a batch at a time"] - 1,
                }
            )
        written = output.stat().st_size
    middle = {name: round(float(np.median([row[name] for row in rows])), 3) for name in rows[0]}
    return {
        "size": size,
        **middle,
        "overheads": [round(row["overhead"], 3) for row in rows],
        "us_per_pixel": round(middle["seconds"] / size**2 * 1e6, 3),
        "peak_mb": round(peak / 1024),
        "base_mb": round(base / 1024),
        "output_mb": round(written / 2**20),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    pixels = [r["size"] ** 2 / 1e6 for r in results]
    left.loglog(pixels, [r["seconds"] for r in results], "o-", label="embed_raster")
    left.loglog(pixels, [r["encoder"] for r in results], "s--", label="encoder alone")
    linear = [results[-1]["seconds"] * p / pixels[-1] for p in pixels]
    left.loglog(pixels, linear, ":", color="grey", label="linear")
    left.set(xlabel="million pixels", ylabel="seconds")
    left.legend()
    right.semilogx(pixels, [r["peak_mb"] / 1024 for r in results], "o-")
    right.axhline(2, ls=":", color="grey")
    right.set(xlabel="million pixels", ylabel="peak memory, GiB", ylim=(0, 2.2))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--model", default="mpmae_atto", help="or pointwise")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "int8"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--windows", type=int, default=80, help="to time the encoder with")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each size")
    parser.add_argument("--folder", type=Path, default=None, help="for temporary files")
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--with-results", type=Path, help="JSON of another run, for the plot")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.write:
        write_tile(options.write, options.sizes[0])
        return
    if options.one:
        print(json.dumps(measure(options, options.sizes[0])))
        return
    results = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--one", "--sizes", str(size)]
        command += ["--model", options.model, "--dtype", options.dtype]
        command += ["--windows", str(options.windows), "--repeats", str(options.repeats)]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += ["--folder", str(options.folder)] if options.folder else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.with_results:
        results = json.loads(options.with_results.read_text()) + results
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
