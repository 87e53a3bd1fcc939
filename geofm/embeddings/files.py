"""Embeddings from wherever they are, and into tables and arrays."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.arrays import read_zarr, write_zarr
from geofm.embeddings.grids import Embeddings, Grid, Reader, WindowedEmbeddings, of_array
from geofm.embeddings.table import read_table, write_table
from geofm.errors import DataNotFoundError, RasterError
from geofm.raster.cog import CACHE_BYTES
from geofm.raster.grids import Embedding, decoded
from geofm.raster.sources import rasterio_module
from geofm.scenes.files import unreadable

__all__ = [
    "EmbeddingsLike",
    "export_embeddings",
    "lasting_tags",
    "read_embeddings",
    "refuse_overwriting",
]

EmbeddingsLike: TypeAlias = "str | os.PathLike[str] | Embedding | Embeddings"

TABLES = (".parquet", ".geoparquet")

# GDAL's own is no news, and what is read has been scaled back.
_DROPPED = ("AREA_OR_POINT", "GEOFM_SCALE", "GEOFM_ZERO")


def read_embeddings(source: EmbeddingsLike) -> Embeddings:
    """Open embeddings: nothing but their description is read yet.

    Args:
        source: A GeoTIFF from `geofm.embed_raster` (or any raster of two bands or more, each a
            component); a ``.zarr`` folder or a ``.parquet`` from `export_embeddings`; or what
            `geofm.embed_raster` returned. Quantised values are scaled back.

    Returns:
        Their cells, to be read block by block.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: It holds no embeddings.
        MissingExtraError: rasterio, pyarrow or zarr is not installed.
    """
    if isinstance(source, Embeddings):
        return source
    if isinstance(source, Embedding):
        if source.path is not None:
            return read_embeddings(source.path)
        grid = Grid(source.shape, source.transform, source.crs, lasting_tags(source.tags))
        return of_array(source.values, grid, "embedding in memory")
    path = Path(source)
    if not path.exists():
        raise DataNotFoundError(f"there is no {path}")
    if path.suffix in TABLES:
        return read_table(path)
    if path.suffix == ".zarr":
        return read_zarr(path)
    return _read_raster(path)


def export_embeddings(
    raster: EmbeddingsLike,
    output: str | os.PathLike[str],
    *,
    geometry: str = "point",
    date: str | datetime.date | None = None,
    dtype: str = "float32",
) -> Path:
    """Write embeddings as a GeoParquet table or as zarr arrays, in bounded memory.

    The table has one row a cell with data: ``id`` (row · columns + column), ``row``, ``column``,
    ``date``, ``scene``, ``weights`` (name of the card), ``weights_hash`` (of the model as it
    computed), ``card_hash`` (sha256 of the card, as ``geofm info`` shows it), ``preprocessing`` (a
    hash; the full text is in the metadata), ``embedding`` (a list of fixed length) and
    ``geometry``, in the raster's own reference system, where cells are squares. What the raster
    does not say, as of weights without a card, is null. A zarr folder has the raster's tags as
    attributes, ``GEOFM_CARD_SHA256`` among them.

    Args:
        raster: As in `read_embeddings`.
        output: ``.parquet`` (replaced if it is there) or ``.zarr`` (must not be there).
        geometry: Of the table: ``"point"`` for the centres of cells, ``"polygon"`` for their
            outlines.
        date: Day of the image, ISO 8601; None for what the raster says.
        dtype: ``"float32"`` or ``"float16"``.

    Returns:
        The output.

    Raises:
        DataNotFoundError: There is no such raster.
        RasterError: An option is unknown, or the output cannot be written.
        MissingExtraError: pyarrow or zarr is not installed.
    """
    path = Path(output)
    if geometry not in ("point", "polygon"):
        raise RasterError(f"geometry is 'point' or 'polygon', got {geometry!r}")
    if dtype not in ("float32", "float16"):
        raise RasterError(f"dtype is 'float32' or 'float16', got {dtype!r}")
    if path.suffix not in (*TABLES, ".zarr"):
        raise RasterError(f"an export is a .parquet or a .zarr, got {path.name}")
    refuse_overwriting(path, raster)
    embeddings = read_embeddings(raster)
    grid = embeddings.grid
    if date is not None:
        grid = replace(grid, tags={**grid.tags, "GEOFM_DATE": _iso(date)})
    if path.suffix in TABLES:
        write_table(path, embeddings, grid, geometry, dtype)
    elif isinstance(embeddings, WindowedEmbeddings):
        write_zarr(path, embeddings, grid, dtype)
    else:
        raise RasterError(
            f"{embeddings.name} is a table, whose rows may be in any order; export zarr from the "
            f"GeoTIFF that it was made from"
        )
    return path


def refuse_overwriting(output: str | os.PathLike[str], *inputs: object) -> None:
    """See that an output is none of the files that it is made from.

    Args:
        output: What is to be written.
        inputs: Paths, and embeddings, which know theirs; what else there may be is in memory.

    Raises:
        RasterError: It is one of them.
    """
    target = Path(output)
    for each in inputs:
        source = each.path if isinstance(each, Embedding | Embeddings) else each
        if not isinstance(source, str | os.PathLike):
            continue
        path = Path(source)
        try:
            # One file has two names where case does not count, or by a link.
            same = path.samefile(target)
        except OSError:
            # One of them is not there, or is an address.
            same = path.resolve() == target.resolve()
        if same:
            raise RasterError(f"the output would overwrite the input: {target}")


def lasting_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """What is still true of values once they are read: not how they were stored.

    Args:
        tags: Of a file, or of an `Embedding`.
    """
    return {name: text for name, text in tags.items() if name not in _DROPPED}


def _iso(date: str | datetime.date) -> str:
    text = str(date)
    try:
        return datetime.date.fromisoformat(text[:10]).isoformat()
    except ValueError as error:
        raise RasterError(f"date must be like 2020-06-04, got {text!r}") from error


def _read_raster(path: Path) -> WindowedEmbeddings:
    """A GeoTIFF as `geofm.embed_raster` writes it; the one place that knows its form."""
    rasterio = rasterio_module()
    try:
        with rasterio.open(path) as file:
            grid = Grid(
                (file.count, file.height, file.width),
                tuple(file.transform)[:6],
                file.crs.to_wkt() if file.crs else None,
                lasting_tags(file.tags()),
            )
            tile = file.block_shapes[0]
    except rasterio.errors.RasterioError as error:
        raise unreadable(str(path), error) from error
    if grid.shape[0] < 2:
        raise RasterError(f"{path} has one band; embeddings have one for each component")

    @contextlib.contextmanager
    def opened() -> Iterator[Reader]:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), rasterio.open(path) as file:

            def read(top: int, left: int, high: int, wide: int) -> NDArray[np.float32]:
                window = rasterio.windows.Window(left, top, wide, high)
                try:
                    stored = file.read(window=window, masked=True)
                except rasterio.errors.RasterioError as error:
                    where = f" at row {top}, column {left}"
                    raise unreadable(str(path), error, where) from error
                # The mask tells no data, whatever the file says it with.
                return decoded(stored, None, file.scales, file.offsets)

            yield read

    return WindowedEmbeddings(grid, str(path), opened, tile, path)
