"""Places like this one: cells ranked by the cosine similarity of their embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geofm.embeddings.files import EmbeddingsLike, read_embeddings, refuse_overwriting
from geofm.embeddings.grids import Floats, Grid, single_band
from geofm.embeddings.rasters import write_band
from geofm.errors import RasterError

__all__ = ["Place", "Similar", "similar"]


@dataclass(frozen=True)
class Place:
    """One of the places alike.

    Attributes:
        rank: From 1.
        lon: Degrees east of the cell's centre; None if the grid has no reference system.
        lat: Degrees north.
        similarity: Cosine, from -1 to 1.
        row: Of the cell.
        column: Of the cell.
        id: row · columns + column, as in the tables of `export_embeddings`.
    """

    rank: int
    lon: float | None
    lat: float | None
    similarity: float
    row: int
    column: int
    id: int


@dataclass(frozen=True, eq=False)
class Similar:
    """The places most alike, and how alike all are.

    Attributes:
        places: The place that was looked for, then the best first; of equals, the one further up
            and left.
        map: (rows, columns) float32, NaN where there is no data; None unless asked for.
        grid: Where its cells lie.
        query: The vector that was looked for.
        cell: Row and column of the place that was looked for; None for a vector.
    """

    places: list[Place]
    map: Floats | None
    grid: Grid
    query: Floats
    cell: tuple[int, int] | None

    def table(self) -> str:
        """The places as text, one a line."""
        lines = ["rank         lon        lat  similarity     row  column        id"]
        for p in self.places:
            at = f"{p.lon:11.5f} {p.lat:10.5f}" if p.lon is not None else f"{'-':>11} {'-':>10}"
            lines.append(
                f"{p.rank:4d} {at} {p.similarity:11.4f} {p.row:7d} {p.column:7d} {p.id:9d}"
            )
        return "\n".join(lines)


def similar(
    source: EmbeddingsLike,
    at: Sequence[float] | None = None,
    top_k: int = 20,
    *,
    vector: ArrayLike | None = None,
    output: str | os.PathLike[str] | None = None,
    with_map: bool = False,
) -> Similar:
    """Rank the cells of an embedding by cosine similarity to one of them, or to a vector.

    The embedding is read block by block; the best so far are kept. The cell of the place itself is
    among them, as the first, even where others equal it. Cells whose vector is zero have no
    direction and are left out.

    Args:
        source: As in `read_embeddings`.
        at: Longitude and latitude of the place, degrees.
        top_k: How many.
        vector: What to look for instead of a place, (channels,).
        output: GeoTIFF of all similarities to write, float32.
        with_map: Give all similarities as well.

    Returns:
        The places, and the map if it was asked for.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: The place is outside or has no data, the vector does not fit, or the output
            is the input or cannot be written.
        MissingExtraError: rasterio, pyarrow or zarr is not installed.
    """
    if (at is None) == (vector is None):
        raise RasterError(
            "similar() looks for a place (at=) or for a vector (vector=), one of them"
        )
    if top_k < 1:
        raise RasterError(f"top_k must be 1 or more, got {top_k}")
    embeddings = read_embeddings(source)
    if output is not None:
        refuse_overwriting(output, embeddings)
    grid, cell = embeddings.grid, None
    if at is not None:
        if len(at) != 2:
            raise RasterError(f"at= is longitude and latitude, got {len(at)} numbers")
        cell = grid.cell_at(float(at[0]), float(at[1]))
        query = embeddings.vector_at(float(at[0]), float(at[1]))
    else:
        query = np.asarray(vector, dtype=np.float32)
    unit = _unit_query(query, grid.shape[0])
    whole = single_band(grid, np.nan, "float32") if output is not None or with_map else None
    best = (np.zeros(0, np.float32), np.zeros(0, np.int64))
    for cells in embeddings.blocks():
        cosines = _cosines(cells.vectors, unit)
        if whole is not None:
            whole[cells.ids] = cosines
        best = _best(
            np.concatenate([best[0], cosines]), np.concatenate([best[1], cells.ids]), top_k
        )
    if cell is not None:
        best = _first(cell[0] * grid.shape[2] + cell[1], _cosines(query[None], unit), best, top_k)
    shaped = whole.reshape(grid.shape[1:]) if whole is not None else None
    if output is not None and shaped is not None:
        tags = {"GEOFM_VALUES": "cosine similarity", "GEOFM_QUERY": _shown(at)}
        write_band(output, shaped, grid, nodata=np.nan, name="cosine similarity", tags=tags)
    return Similar(_places(grid, *best), shaped, grid, query, cell)


def _unit_query(query: Floats, channels: int) -> Floats:
    if query.shape != (channels,):
        raise RasterError(f"the vector is {query.shape}, the embeddings have {channels} values")
    norm = float(np.linalg.norm(query.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0:
        raise RasterError("the vector that is looked for is zero or not finite: no direction")
    return (query.astype(np.float64) / norm).astype(np.float32)


def _cosines(vectors: Floats, unit: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Floats = (vectors @ unit) / norms
    # Rounding may lead beyond 1; a zero vector gives NaN, which clip keeps.
    return np.clip(cosines, -1, 1)


def _best(values: Floats, ids: NDArray[np.int64], count: int) -> tuple[Floats, NDArray[np.int64]]:
    """The largest values, best first, the smaller id first of equals."""
    keep = np.flatnonzero(np.isfinite(values))
    if len(keep) > count:
        # All equal to the last place count, so that ids decide, not the order of blocks.
        last = np.partition(values[keep], len(keep) - count)[len(keep) - count]
        keep = keep[values[keep] >= last]
    order = keep[np.lexsort((ids[keep], -values[keep]))][:count]
    return values[order], ids[order]


def _first(
    own: int, cosine: Floats, best: tuple[Floats, NDArray[np.int64]], count: int
) -> tuple[Floats, NDArray[np.int64]]:
    """The place itself before all others: of int8, or over water, many equal it."""
    others = best[1] != own
    values = np.concatenate([cosine, best[0][others]])
    ids = np.concatenate([[own], best[1][others]])
    return values[:count], ids[:count]


def _places(grid: Grid, values: Floats, ids: NDArray[np.int64]) -> list[Place]:
    rows, columns = np.divmod(ids, grid.shape[2])
    lonlat: Any = [(None, None)] * len(ids)
    if grid.crs is not None and len(ids):
        lon, lat = grid.lonlat(*grid.xy(rows, columns))
        lonlat = zip(lon.tolist(), lat.tolist(), strict=True)
    found = zip(lonlat, values.tolist(), rows.tolist(), columns.tolist(), ids.tolist(), strict=True)
    return [Place(i, *where, *rest) for i, (where, *rest) in enumerate(found, start=1)]


def _shown(at: Sequence[float] | None) -> str:
    return "a vector" if at is None else f"{float(at[0]):.6f}, {float(at[1]):.6f}"
