"""Runs that are killed, disks that are full, folders that are shared."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from filelock import FileLock
from test_windows import noise, small_mpmae

import geofm
from geofm.datasets import samples
from geofm.raster import embed_raster
from geofm.raster.stores import PartialStore

RUN = {"window": 64, "overlap": 32, "batch_size": 3, "dtype": "int8", "pca": 2}

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_raster_resume import RUN
from test_windows import noise, small_mpmae
from geofm.raster import embed_raster, stores
at, when = {at}, {when!r}
write, write_at = stores.PartialStore.write, stores._write_at
def killed(self, panel, row, *rest):
    if row == at and when == "in the middle of a block":
        def half(file, values, begin):
            write_at(file, values[: len(values) // 2], begin)
            os.kill(os.getpid(), signal.SIGKILL)
        stores._write_at = half
    write(self, panel, row, *rest)
    if row == at:
        os.kill(os.getpid(), signal.SIGKILL)
stores.PartialStore.write = killed
embed_raster(small_mpmae(0.5, stem_padding="aligned"), noise(300, 200), {out!r}, **RUN)
"""


@pytest.mark.parametrize(("at", "when"), [(3, "in the middle of a block"), (5, "after a block")])
def test_a_run_that_is_killed_continues_to_the_same_file(
    at: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = small_mpmae(0.5, stem_padding="aligned")
    image = noise(300, 200)
    embed_raster(model, image, tmp_path / "once.tif", **RUN)
    out = tmp_path / "killed.tif"
    code = KILLED.format(tests=str(Path(__file__).parent), at=at, when=when, out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    journal = (tmp_path / "killed.tif.partial" / "done.txt").read_text().splitlines()
    assert len(journal) == (at if when.startswith("in") else at + 1)
    rows = []
    monkeypatch.setattr(
        "geofm.raster.stores.PartialStore.write",
        lambda self, *args, write=PartialStore.write: (rows.append(args[1]), write(self, *args)),
    )
    embed_raster(model, image, out, **RUN)
    assert rows[0] == len(journal), "finished blocks are not computed again"
    assert out.read_bytes() == (tmp_path / "once.tif").read_bytes()
    assert not (tmp_path / "killed.tif.partial").exists()


WHOLE_TILE = """
import sys
sys.path.insert(0, {benchmarks!r})
import raster_speed
from geofm.raster import embed_raster
print("begins", flush=True)
embed_raster(raster_speed.build("pointwise"), {tile!r}, {out!r}, level="L2A", progress=False)
"""


@pytest.mark.slow
def test_a_whole_sentinel2_tile_killed_twice_at_random_times_is_the_same_file(
    tmp_path: Path,
) -> None:
    # 10,980 x 10,980 x 12; all but the encoder at full size. Needs 15 GB of disk and 7 minutes.
    benchmarks = str(Path(__file__).resolve().parents[1] / "benchmarks")
    tile = tmp_path / "tile.tif"
    write = [sys.executable, f"{benchmarks}/raster_speed.py", "--write", str(tile)]
    subprocess.run([*write, "--sizes", "10980"], check=True)

    def start(out: Path) -> subprocess.Popen[str]:
        code = WHOLE_TILE.format(benchmarks=benchmarks, tile=str(tile), out=str(out))
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        return process

    once, out = tmp_path / "once.tif", tmp_path / "killed.tif"
    begin = time.monotonic()
    assert start(once).wait() == 0
    duration = time.monotonic() - begin
    for _ in range(2):
        process = start(out)
        time.sleep(random.uniform(0.05, 0.45) * duration)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert start(out).wait() == 0
    digests = []
    for path in (once, out):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    assert digests[0] == digests[1]


def test_a_run_may_stop_after_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than half is shared, so that three rows of windows reach into one block; three panels.
    monkeypatch.setattr("geofm.raster.jobs._PANEL_BYTES", 40_000)
    model = small_mpmae(0.5, stem_padding="aligned")
    image = noise(150, 190)
    options: dict[str, Any] = {"window": 64, "overlap": 40, "batch_size": 2}
    embed_raster(model, image, tmp_path / "once.tif", **options)
    out = tmp_path / "out.tif"
    write = PartialStore.write
    blocks = 0

    def stops(self: PartialStore, *args: Any) -> None:
        nonlocal blocks
        if blocks % 2:
            blocks += 1
            raise KeyboardInterrupt
        blocks += 1
        write(self, *args)

    monkeypatch.setattr(PartialStore, "write", stops)
    stopped = 0
    while not out.exists():
        try:
            embed_raster(model, image, out, **options)
        except KeyboardInterrupt:
            stopped += 1
    assert stopped > 4
    assert out.read_bytes() == (tmp_path / "once.tif").read_bytes()


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.nn.Module:
    """A model whose run is interrupted after two blocks."""
    model = small_mpmae(0.0, stem_padding="aligned")
    with monkeypatch.context() as patch:
        write = PartialStore.write

        def stops(self: PartialStore, panel: int, row: int, *rest: Any) -> None:
            if row == 2:
                raise KeyboardInterrupt
            write(self, panel, row, *rest)

        patch.setattr(PartialStore, "write", stops)
        with pytest.raises(KeyboardInterrupt):
            embed_raster(model, noise(300, 80), out, window=64, overlap=16, **options)
    return model


def test_the_beginning_of_another_run_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    model = interrupted(out, monkeypatch)
    same: dict[str, Any] = {"window": 64, "overlap": 16}
    with pytest.raises(geofm.RasterError, match=r"another run \(blend: smooth then, centre now\)"):
        embed_raster(model, noise(300, 80), out, **same, blend="centre")
    with pytest.raises(geofm.RasterError, match=r"another run \(source: "):
        embed_raster(model, noise(300, 80, seed=1), out, **same)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(geofm.RasterError, match=r"another run \(weights: "):
        embed_raster(model, noise(300, 80), out, **same)
    # Nothing was lost by asking.
    assert len((tmp_path / "out.tif.partial" / "done.txt").read_text().splitlines()) == 2
    embed_raster(model, noise(300, 80), out, **same, resume=False)
    fresh = embed_raster(model, noise(300, 80), **same).values
    with rasterio.open(out) as file:
        np.testing.assert_array_equal(file.read(), fresh)


@pytest.mark.parametrize("lost", ["all of it", "its end"])
def test_cells_that_got_lost_are_computed_again(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    model = interrupted(out, monkeypatch)
    cells = tmp_path / "out.tif.partial" / "cells.raw"
    if lost == "its end":
        os.truncate(cells, cells.stat().st_size - 1)
    else:
        cells.unlink()
    options: dict[str, Any] = {"window": 64, "overlap": 16}
    embed_raster(model, noise(300, 80), out, **options)
    fresh = embed_raster(model, noise(300, 80), **options).values
    with rasterio.open(out) as file:
        np.testing.assert_array_equal(file.read(), fresh)


@pytest.mark.parametrize("name", ["done.txt", "plan.json", "fit.npz"])
def test_a_damaged_beginning_is_named_and_can_be_started_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    model = interrupted(out, monkeypatch, dtype="int8")
    (tmp_path / "out.tif.partial" / name).write_bytes(b"\xff\xfenothing\n")
    options: dict[str, Any] = {"window": 64, "overlap": 16, "dtype": "int8"}
    with pytest.raises(geofm.RasterError, match=f"{name} is damaged.*resume=False"):
        embed_raster(model, noise(300, 80), out, **options)
    embed_raster(model, noise(300, 80), out, **options, resume=False)
    assert out.exists()


def test_a_run_with_other_names_of_bands_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    model = interrupted(out, monkeypatch)
    image = noise(300, 80)
    named = list(image.bands)
    with pytest.raises(geofm.RasterError, match=r"another run.*bands"):
        embed_raster(model, image, out, named[::-1], window=64, overlap=16)


def test_two_runs_do_not_write_the_same_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tif"
    model = interrupted(out, monkeypatch)
    with (
        FileLock(tmp_path / "out.tif.partial" / "lock"),
        pytest.raises(geofm.RasterError, match="in use by another run"),
    ):
        embed_raster(model, noise(300, 80), out, window=64, overlap=16)


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    out = tmp_path / "out.tif"
    out.write_text("what was there before")
    options: dict[str, Any] = {"window": 64, "overlap": 16}
    room = 3

    def pwrite(file: int, data: Any, begin: int, real: Any = os.pwrite) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(file, data, begin))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(geofm.RasterError, match=r"disk is full.*kept in .*out\.tif\.partial"):
            embed_raster(model, noise(300, 80), out, **options)
    assert out.read_text() == "what was there before"
    embed_raster(model, noise(300, 80), out, **options)
    embed_raster(model, noise(300, 80), tmp_path / "once.tif", **options)
    assert out.read_bytes() == (tmp_path / "once.tif").read_bytes()


def test_a_disk_that_fills_while_the_output_is_put_together_keeps_all_values(
    tmp_path: Path,
) -> None:
    model = small_mpmae(0.0, stem_padding="aligned")
    out = tmp_path / "out.tif"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    image = noise(400, 400)
    try:
        # The rows of cells fit (8 x 50 x 50 x 4 bytes), rows and overviews and tiles do not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (81_000, hard))
        with pytest.raises(geofm.RasterError, match="All values are kept in"):
            embed_raster(model, image, out, compress="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not out.exists()
    assert not (tmp_path / "out.tif.partial" / "cells.tif").exists()
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is computed again.
        patch.setattr("geofm.raster.workers.apply", None)
        embed_raster(model, image, out, compress="none")
    np.testing.assert_array_equal(embed_raster(model, image).values, rasterio.open(out).read())


def test_a_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # The superuser may write anywhere, so a folder's mode would not do.
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(geofm.RasterError, match=r"cannot write .*out\.tif: Permission denied"):
        embed_raster(small_mpmae(0.0, stem_padding="aligned"), noise(40, 40), tmp_path / "out.tif")


def test_a_corrupt_block_is_an_error_and_leaves_no_output(tmp_path: Path) -> None:
    model = geofm.create_model("mpmae_atto", stem_padding="aligned")
    path = tmp_path / "scene.tif"
    samples.write_scene(path, samples.landscape((512, 96), seed=1))
    whole = path.read_bytes()
    # More than a block, so that one's beginning is gone: within one, damage need not show.
    half = len(whole) // 2
    path.write_bytes(whole[:half] + bytes(20_000) + whole[half + 20_000 :])
    out = tmp_path / "out.tif"
    words = r"scene\.tif cannot be read at rows .*Is it complete"
    with pytest.raises(geofm.RasterError, match=words):
        embed_raster(model, path, out, level="L2A", window=56, overlap=0)
    assert not out.exists()
