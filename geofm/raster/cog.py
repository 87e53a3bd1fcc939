"""Cloud-optimised GeoTIFFs: from plain rows to tiles with overviews, complete or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geofm.errors import RasterError
from geofm.raster.sources import Coefficients, rasterio_module

__all__ = [
    "COMPRESSIONS",
    "Layout",
    "NotWrittenError",
    "array_to_cog",
    "check_complete",
    "gdal_errors",
    "raw_to_cog",
    "reported",
    "written",
]

COMPRESSIONS = ("deflate", "zstd", "lzw", "none")

# Side of a tile: the largest of these whose values, all bands together, stay within the limit.
_BLOCKS = (512, 256, 128)
_BLOCK_BYTES = 32 * 2**20
# Overviews until the longer side is at most this long.
_SMALLEST = 512
# What is halved at a time.
_CHUNK_BYTES = 16 * 2**20
# Left to itself, GDAL takes 5 % of the machine's memory.
CACHE_BYTES = 128 * 2**20

# GDAL does not say why a write failed; where less than this is free, that is why.
_NO_ROOM = 2**20
# Of the size of values: what they take with their overviews.
WITH_OVERVIEWS = 1.4

_GDAL = {"float32": "Float32", "int8": "Int8", "uint8": "Byte"}


@dataclass(frozen=True)
class Layout:
    """What an output is like, besides its values.

    Attributes:
        shape: (bands, rows, columns).
        dtype: Of the stored values: ``"float32"``, ``"int8"`` or ``"uint8"``.
        transform: Affine coefficients.
        crs: As WKT; None for none.
        nodata: Stored value of cells without data.
        names: Of the bands.
        tags: Of the dataset.
        scale: Of each band: value = stored · scale + zero.
        zero: Of each band.
        half: Store float32 values in 16 bits.
        compress: One of `COMPRESSIONS`.
        colours: Of values, from 0 to 255, of one band of bytes.
    """

    shape: tuple[int, int, int]
    dtype: str
    transform: Coefficients
    crs: str | None
    nodata: float
    names: Sequence[str]
    tags: Mapping[str, str] = field(default_factory=dict)
    scale: Sequence[float] | None = None
    zero: Sequence[float] | None = None
    half: bool = False
    compress: str = "deflate"
    colours: Mapping[int, tuple[int, int, int]] | None = None


class NotWrittenError(RasterError):
    """An output cannot be written.

    Args:
        path: The output.
        error: What writing raised; what was written so far is still on the disk.
        note: What else to say.
        size: Bytes that what GDAL writes may take; GDAL deletes what it cannot complete.

    Attributes:
        reason: Why, in words.
    """

    def __init__(
        self, path: str | os.PathLike[str], error: BaseException, note: str = "", size: float = 0
    ) -> None:
        self.reason = _reason(error, Path(path).absolute().parent, size)
        super().__init__(f"cannot write {path}: {self.reason}{note}")


def _reason(error: BaseException, folder: Path, size: float) -> str:
    # GDAL's errors have numbers of their own.
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room"
    # rasterio's own words are "see previous exception".
    said = getattr(error, "strerror", None) or str(error.__cause__ or error)
    if number is None and folder.is_dir():
        free, needed = shutil.disk_usage(folder).free, max(size, _NO_ROOM)
        if free < needed:
            return (
                f"the disk is full; make room: {free / 1e6:.1f} MB are free, and up to "
                f"{needed / 1e6:.1f} MB may be needed ({said})"
            )
    return said


@contextlib.contextmanager
def reported(
    path: str | os.PathLike[str], *others: type[BaseException], note: str = "", size: float = 0
) -> Iterator[None]:
    """Tell what goes wrong while an output is written, while what was written is still there.

    Args:
        path: The output.
        *others: What else than `OSError` writing may raise.
        note: As in `NotWrittenError`.
        size: As in `NotWrittenError`.

    Raises:
        NotWrittenError: It cannot be written.
    """
    kinds: tuple[type[BaseException], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        raise NotWrittenError(path, error, note, size) from error


def gdal_errors() -> tuple[type[BaseException], ...]:
    """What rasterio raises.

    Raises:
        MissingExtraError: rasterio is not installed.
    """
    rasterio = rasterio_module()
    return rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is complete.

    Args:
        path: The file to be.

    Yields:
        The temporary file.

    Raises:
        RasterError: There is no such folder, or it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise RasterError(f"cannot write {target}: there is no folder {target.parent}")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".geofm-", suffix=target.suffix)
    except OSError as error:
        raise RasterError(f"cannot write {target}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp files are private; what replaces them has the usual rights.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def raw_to_cog(cells: Path, output: Path, layout: Layout, note: str = "") -> None:
    """Turn plain rows into a cloud-optimised GeoTIFF.

    The work is done in the folder of `cells`, which stay; the output appears at once and complete.

    Args:
        cells: (rows, bands, columns) in native byte order.
        output: The file to be; an existing one is replaced.
        layout: What it is like.
        note: As in `NotWrittenError`.

    Raises:
        NotWrittenError: It cannot be written.
    """
    rasterio = rasterio_module()
    temporary = cells.with_name("cells.tif")
    made = [temporary]
    size = math.prod(layout.shape) * np.dtype(layout.dtype).itemsize * WITH_OVERVIEWS
    try:
        with (
            reported(output, *gdal_errors(), note=note, size=size),
            rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_VRT_ENABLE_RAWRASTERBAND="YES"),
        ):
            overviews = _write_overviews(rasterio, cells, layout, made)
            description = cells.with_name("cells.vrt")
            description.write_bytes(_vrt(layout, cells.name))
            rasterio.shutil.copy(
                description, temporary, driver="COG", **_options(layout, overviews)
            )
            check_complete(temporary, *layout.shape[1:])
            temporary.replace(output)
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def array_to_cog(
    values: np.ndarray[Any, Any], output: str | os.PathLike[str], layout: Layout
) -> None:
    """Write an array as a cloud-optimised GeoTIFF, complete or not at all.

    Args:
        values: (bands, rows, columns) of the layout's type.
        output: The file to be; an existing one is replaced.
        layout: What it is like.

    Raises:
        RasterError: It cannot be written.
    """
    target = Path(output)
    if not target.parent.is_dir():
        raise RasterError(f"cannot write {target}: there is no folder {target.parent}")
    note = ". Nothing of it is kept"
    with (
        reported(target, note=note),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".geofm-") as folder,
        # Again, before the folder is gone.
        reported(target, note=note),
    ):
        cells = Path(folder) / "cells.raw"
        with cells.open("wb") as file:
            # Not tofile(), whose errors do not say why.
            file.write(np.ascontiguousarray(values.transpose(1, 0, 2), dtype=layout.dtype).data)
        raw_to_cog(cells, target, layout, note)


def _block(layout: Layout) -> int:
    bands = layout.shape[0]
    item = np.dtype(layout.dtype).itemsize
    return next((b for b in _BLOCKS if bands * b * b * item <= _BLOCK_BYTES), _BLOCKS[-1])


def _options(layout: Layout, overviews: int) -> dict[str, Any]:
    options = {
        "BLOCKSIZE": _block(layout),
        "COMPRESS": layout.compress.upper(),
        "OVERVIEWS": "FORCE_USE_EXISTING" if overviews else "NONE",
        "BIGTIFF": "IF_SAFER",
        "NUM_THREADS": torch.get_num_threads(),
    }
    # Neighbouring class numbers are not alike.
    if layout.compress != "none" and layout.colours is None:
        options["PREDICTOR"] = "YES"
    if layout.compress in ("deflate", "zstd") and layout.dtype == "float32":
        # The low bits of features are noise: more effort gains a percent or two.
        options["LEVEL"] = 1
    if layout.half:
        options["NBITS"] = 16
    return options


def _write_overviews(rasterio: Any, cells: Path, layout: Layout, made: list[Path]) -> int:
    """Write coarser levels beside plain rows, where GDAL looks for them.

    GDAL's own take a block of every band at a time and run out of any bounded cache where bands are
    many and rows are wide; two rows at a time suffice.

    Args:
        rasterio: The module.
        cells: (rows, bands, columns) in native byte order.
        layout: What they are like.
        made: Gets the files written.

    Returns:
        How many levels there are.
    """
    level, name = 0, "cells.vrt"
    while max(layout.shape[1:]) > _SMALLEST:
        level += 1
        smaller = cells.with_name(f"level{level}.raw")
        made.append(smaller)
        layout = _halved(cells, smaller, layout)
        description = smaller.with_suffix(".vrt")
        made.append(description)
        description.write_bytes(_vrt(layout, smaller.name))
        # The overview of x is x.ovr, that of x.ovr is x.ovr.ovr.
        name += ".ovr"
        overview = cells.with_name(name)
        made.append(overview)
        block = _block(layout)
        options = {"TILED": "YES", "BLOCKXSIZE": block, "BLOCKYSIZE": block, "INTERLEAVE": "PIXEL"}
        if layout.half:
            options["NBITS"] = 16
        rasterio.shutil.copy(description, overview, driver="GTiff", BIGTIFF="IF_SAFER", **options)
        cells = smaller
    return level


def _halved(cells: Path, smaller: Path, layout: Layout) -> Layout:
    bands, rows, columns = layout.shape
    dtype = np.dtype(layout.dtype)
    line = bands * columns
    pairs = max(1, _CHUNK_BYTES // (2 * line * dtype.itemsize))
    with cells.open("rb") as source, smaller.open("wb") as target:
        for _ in range(0, rows, 2 * pairs):
            part = np.fromfile(source, dtype, 2 * pairs * line).reshape(-1, bands, columns)
            if part.shape[0] % 2 or columns % 2:
                odd = ((0, part.shape[0] % 2), (0, 0), (0, columns % 2))
                part = np.pad(part, odd, constant_values=dtype.type(layout.nodata))
            target.write(_mean_of_four(part, layout).data)
    a, b, c, d, e, f = layout.transform
    return dataclasses.replace(
        layout,
        shape=(bands, (rows + 1) // 2, (columns + 1) // 2),
        transform=(2 * a, 2 * b, c, 2 * d, 2 * e, f),
    )


def _mean_of_four(cells: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Means of two by two cells, of those with data; of classes, which have none, one of them."""
    four = [cells[i::2, :, j::2] for i in (0, 1) for j in (0, 1)]
    if layout.dtype == "uint8":
        return np.ascontiguousarray(four[0])
    total = np.zeros(four[0].shape, dtype=np.float32)
    count = np.zeros(four[0].shape, dtype=np.float32)
    for each in four:
        valid = np.isfinite(each) if layout.dtype == "float32" else each != layout.nodata
        np.add(total, each, out=total, where=valid)
        count += valid
    mean = total / np.maximum(count, 1)
    if layout.dtype != "float32":
        mean = mean.round()
    elif layout.half:
        mean = mean.astype(np.float16).astype(np.float32)
    return np.where(count > 0, mean, layout.nodata).astype(layout.dtype)


def check_complete(path: Path, rows: int, columns: int) -> None:
    """The last thing GDAL writes is there: it does not report every failure on closing.

    Args:
        path: A tiled GeoTIFF.
        rows: How many it has.
        columns: How many it has.

    Raises:
        OSError: Its last tile is not all there.
    """
    size = path.stat().st_size
    with rasterio_module().open(path) as file:
        side, _ = file.block_shapes[0]
        column, row = (columns - 1) // side, (rows - 1) // side
        begin = file.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1)
        count = file.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=1)
        if begin is not None and int(begin) + int(count) > size:
            raise OSError(f"{path.name} ends after {size} bytes, before its last tile")


def _vrt(layout: Layout, cells: str) -> bytes:
    """GDAL's description of plain rows."""
    bands, rows, columns = layout.shape
    item = np.dtype(layout.dtype).itemsize
    root = ET.Element("VRTDataset", rasterXSize=str(columns), rasterYSize=str(rows))
    if layout.crs is not None:
        ET.SubElement(root, "SRS").text = layout.crs
    a, b, c, d, e, f = layout.transform
    ET.SubElement(root, "GeoTransform").text = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    tags = ET.SubElement(root, "Metadata")
    for key, value in sorted(layout.tags.items()):
        ET.SubElement(tags, "MDI", key=key).text = value
    for band in range(bands):
        node = ET.SubElement(
            root,
            "VRTRasterBand",
            dataType=_GDAL[layout.dtype],
            band=str(band + 1),
            subClass="VRTRawRasterBand",
        )
        parts: dict[str, Any] = {
            "Description": layout.names[band],
            "NoDataValue": repr(layout.nodata),
            "ImageOffset": band * columns * item,
            "PixelOffset": item,
            "LineOffset": bands * columns * item,
            "ByteOrder": "LSB" if sys.byteorder == "little" else "MSB",
        }
        if layout.scale is not None and layout.zero is not None:
            parts |= {"Offset": repr(layout.zero[band]), "Scale": repr(layout.scale[band])}
        if layout.colours is not None:
            parts["ColorInterp"] = "Palette"
        for key, value in parts.items():
            ET.SubElement(node, key).text = str(value)
        if layout.colours is not None:
            table = ET.SubElement(node, "ColorTable")
            for number in range(256):
                red, green, blue = layout.colours.get(number, (0, 0, 0))
                ET.SubElement(table, "Entry", c1=str(red), c2=str(green), c3=str(blue), c4="255")
        ET.SubElement(node, "SourceFilename", relativeToVRT="1").text = cells
    return ET.tostring(root)
