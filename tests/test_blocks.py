"""Damaged blocks of compressed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

import geofm
from geofm.scenes.blocks import BlockCheck

WHOLE = Window(0, 0, 200, 150)
PROFILE: dict[str, Any] = {
    "driver": "GTiff",
    "width": 200,
    "height": 150,
    "dtype": "uint16",
    "tiled": True,
    "blockxsize": 64,
    "blockysize": 64,
    "compress": "deflate",
    "crs": "EPSG:32631",
    "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6),
}


def written(path: Path, **options: Any) -> Path:
    random = np.random.default_rng(0)
    pixels = random.integers(1, 3000, (3, 150, 200), np.uint16)
    with rasterio.open(path, "w", **(PROFILE | {"count": 3} | options)) as file:
        file.write(pixels)
    return path


def damage(path: Path, band: int, row: int, column: int) -> None:
    """One bit in the middle of a block."""
    with rasterio.open(path) as file:
        offset, size = (
            int(file.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=band))
            for what in ("OFFSET", "SIZE")
        )
    whole = bytearray(path.read_bytes())
    whole[offset + size // 2] ^= 16
    path.write_bytes(whole)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_a_damaged_block_is_found_when_it_is_needed(
    interleave: str, predictor: int, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.tif", interleave=interleave, predictor=predictor)
    damage(path, 2, 1, 2)
    with rasterio.open(path) as file:
        check = BlockCheck(file)
        check.check([1, 2, 3], Window(0, 0, 200, 64))
        check.check([1, 2, 3], Window(0, 0, 128, 150))
        if interleave == "band":
            check.check([1, 3], WHOLE)
        for _ in range(2):
            with pytest.raises(geofm.RasterError, match=r"rows 64 to 127, columns 128 to 191.*dam"):
                check.check([2], Window(150, 100, 1, 1))


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 4000])
    with rasterio.open(path) as file, pytest.raises(geofm.RasterError, match="damaged"):
        BlockCheck(file).check([1, 2, 3], WHOLE)


def test_blocks_that_were_never_written_and_other_compressions_are_no_damage(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sparse.tif"
    with rasterio.open(path, "w", sparse_ok=True, count=1, **PROFILE) as file:
        file.write(np.ones((64, 64), np.uint16), 1, window=Window(0, 0, 64, 64))
    with rasterio.open(path) as file:
        BlockCheck(file).check([1], WHOLE)
    for compress in ("lzw", "zstd", "none"):
        path = written(tmp_path / f"{compress}.tif", compress=compress)
        with rasterio.open(path) as file:
            BlockCheck(file).check([1, 2, 3], WHOLE)
