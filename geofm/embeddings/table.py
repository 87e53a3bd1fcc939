"""GeoParquet: one row a cell. The metadata key ``geofm`` keeps the grid, for maps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.geoparquet import geo_metadata, points, polygons, pyarrow_modules
from geofm.embeddings.grids import Cells, Embeddings, Floats, Grid
from geofm.errors import RasterError
from geofm.raster.cog import reported, written
from geofm.raster.sources import rasterio_module

__all__ = ["TableEmbeddings", "read_table", "write_table"]

# What the vectors of one group of rows may take.
_GROUP_BYTES = 32 * 2**20


def write_table(path: Path, embeddings: Embeddings, grid: Grid, geometry: str, dtype: str) -> None:
    """Write a GeoParquet, complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        embeddings: The cells.
        grid: Where they lie and what made them, which the file is to say.
        geometry: ``"point"`` or ``"polygon"``.
        dtype: ``"float32"`` or ``"float16"``.

    Raises:
        RasterError: It cannot be written, or values are beyond float16.
        MissingExtraError: pyarrow is not installed.
    """
    pa, pq = pyarrow_modules()
    schema = _schema(pa, grid, geometry, dtype)
    words = ["scene", "weights", "weights_hash", "card_hash", "preprocessing", "date"]
    note = ". Nothing of it is kept"
    with (
        reported(path, pa.ArrowException, note=note),
        written(path) as temporary,
        reported(path, pa.ArrowException, note=note),
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=words,
            use_byte_stream_split=["embedding.list.element"],
        ) as writer,
    ):
        size = max(1, _GROUP_BYTES // (4 * grid.shape[0]))
        for cells in embeddings.blocks():
            for begin in range(0, len(cells.ids), size):
                part = Cells(cells.ids[begin : begin + size], cells.vectors[begin : begin + size])
                writer.write_table(_rows(pa, schema, part, grid, geometry, dtype))


def read_table(path: Path) -> TableEmbeddings:
    """Open a GeoParquet that `write_table` wrote.

    Args:
        path: The file.

    Returns:
        Its cells.

    Raises:
        RasterError: It is none.
        MissingExtraError: pyarrow is not installed.
    """
    pa, pq = pyarrow_modules()
    try:
        schema = pq.read_schema(path)
        facts = json.loads((schema.metadata or {})[b"geofm"])
        channels, rows, columns = (int(v) for v in facts["shape"])
        a, b, c, d, e, f = (float(v) for v in facts["transform"])
        crs, tags = facts["crs"], facts["tags"]
    except (pa.ArrowException, OSError) as error:
        raise RasterError(f"{path} cannot be read: {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise RasterError(
            f"{path} does not say on what grid its cells lie; it was not written by "
            f"export_embeddings"
        ) from error
    field = schema.field("embedding") if "embedding" in schema.names else None
    if (
        field is None
        or not pa.types.is_fixed_size_list(field.type)
        or field.type.list_size != channels
        or min(channels, rows, columns) < 1
        or a * e - b * d == 0
    ):
        raise RasterError(f"{path} has no column of embeddings of {channels} values, as it says")
    grid = Grid((channels, rows, columns), (a, b, c, d, e, f), crs, tags)
    return TableEmbeddings(grid, path)


class TableEmbeddings(Embeddings):
    """Embeddings in a GeoParquet.

    Args:
        grid: Where the cells lie.
        path: The file.
    """

    def __init__(self, grid: Grid, path: Path) -> None:
        self.grid, self.path, self.name = grid, path, str(path)

    def blocks(self) -> Iterator[Cells]:
        """As `Embeddings.blocks`."""
        size = max(1, _GROUP_BYTES // (4 * self.grid.shape[0]))
        with self._opened() as file:
            for batch in file.iter_batches(size, columns=["id", "embedding"]):
                yield self._cells(batch)

    def vector(self, row: int, column: int) -> Floats:
        """As `Embeddings.vector`."""
        wanted = row * self.grid.shape[2] + column
        with self._opened() as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["id"])["id"].to_numpy()
                if wanted in ids:
                    cells = self._cells(file.read_row_group(group, columns=["id", "embedding"]))
                    found: Floats = cells.vectors[cells.ids == wanted][0]
                    return found
        return np.full(self.grid.shape[0], np.nan, dtype=np.float32)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        pa, pq = pyarrow_modules()
        try:
            with pq.ParquetFile(self.path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(" .")
            raise RasterError(
                f"{self.path} is damaged: {reason}. Export it again from the GeoTIFF that it was "
                f"made from"
            ) from error

    def _cells(self, rows: Any) -> Cells:
        channels, high, wide = self.grid.shape
        ids = rows["id"].to_numpy().astype(np.int64, copy=False)
        if len(ids) and (ids.min() < 0 or ids.max() >= high * wide):
            raise RasterError(f"{self.path} has cells outside its grid of {high} x {wide}")
        column = rows["embedding"]
        parts = column.chunks if hasattr(column, "chunks") else [column]
        flat = [part.flatten().to_numpy(zero_copy_only=False) for part in parts]
        vectors = np.concatenate([np.zeros(0, np.float32), *flat]).astype(np.float32, copy=False)
        if vectors.size != len(ids) * channels:
            raise RasterError(f"{self.path} has rows without an embedding")
        return Cells(ids, vectors.reshape(-1, channels))


def _schema(pa: Any, grid: Grid, geometry: str, dtype: str) -> Any:
    values = pa.float16() if dtype == "float16" else pa.float32()
    fields = [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("column", pa.int32(), nullable=False),
        pa.field("date", pa.date32()),
        pa.field("scene", pa.string()),
        pa.field("weights", pa.string()),
        pa.field("weights_hash", pa.string()),
        pa.field("card_hash", pa.string()),
        pa.field("preprocessing", pa.string()),
        pa.field("embedding", pa.list_(pa.field("element", values), grid.shape[0])),
        pa.field("geometry", pa.binary(), nullable=False),
    ]
    rows, columns = grid.shape[1:]
    x, y = grid.xy(np.array([0, 0, rows, rows]), np.array([0, columns, 0, columns]), (0, 0))
    bbox = [float(v) for v in (x.min(), y.min(), x.max(), y.max())]
    geo = geo_metadata(geometry.capitalize(), bbox, crs=_projjson(grid.crs))
    facts = {
        "shape": grid.shape,
        "transform": grid.transform,
        "crs": grid.crs,
        "tags": dict(grid.tags),
    }
    return pa.schema(fields, {"geo": geo, "geofm": json.dumps(facts)})


def _projjson(crs: str | None) -> dict[str, Any] | None:
    """As GeoParquet wants it; null says that it is not known."""
    if crs is None:
        return None
    rasterio_module()
    from rasterio.crs import CRS

    found: dict[str, Any] = CRS.from_user_input(crs).to_dict(projjson=True)
    return found


def _rows(pa: Any, schema: Any, cells: Cells, grid: Grid, geometry: str, dtype: str) -> Any:
    count = len(cells.ids)
    row, column = np.divmod(cells.ids, grid.shape[2])
    with np.errstate(over="ignore"):
        vectors = cells.vectors.astype(dtype)
    if not np.isfinite(vectors).all():
        raise RasterError("values are beyond float16, which ends at 65504; use dtype='float32'")
    tags = grid.tags

    def constant(name: str, value: Any) -> Any:
        return pa.array([value] * count, schema.field(name).type)

    columns = {
        "id": pa.array(cells.ids),
        "row": pa.array(row.astype(np.int32)),
        "column": pa.array(column.astype(np.int32)),
        "date": constant("date", grid.date),
        "scene": constant("scene", tags.get("GEOFM_SOURCE")),
        "weights": constant("weights", tags.get("GEOFM_WEIGHTS")),
        "weights_hash": constant("weights_hash", tags.get("GEOFM_WEIGHTS_HASH")),
        "card_hash": constant("card_hash", tags.get("GEOFM_CARD_SHA256")),
        "preprocessing": constant("preprocessing", grid.preprocessing),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=schema.field("embedding").type
        ),
        "geometry": _geometries(grid, row, column, geometry),
    }
    return pa.table(columns, schema=schema)


def _geometries(grid: Grid, row: NDArray[Any], column: NDArray[Any], kind: str) -> Any:
    if kind == "point":
        return points(np.stack(grid.xy(row, column), axis=1))
    # Down first: anticlockwise in a grid whose rows go south, as outer rings should be.
    corners = ((0, 0), (0, 1), (1, 1), (1, 0), (0, 0))
    outline = [np.stack(grid.xy(row, column, corner), axis=1) for corner in corners]
    return polygons(np.stack(outline, axis=1))
