"""GeoParquet 1.1 of places and their species: one row a place, in degrees on WGS 84."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geofm.embeddings.geoparquet import geo_metadata, points, pyarrow_modules
from geofm.errors import RasterError
from geofm.raster.cog import written

__all__ = ["write_points"]


def write_points(
    path: Path, rows: Sequence[Mapping[str, Any]], families: Sequence[str], tags: Mapping[str, str]
) -> None:
    """Write places, complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        rows: As `species_points` returns them, at least one.
        families: Names of the families.
        tags: What made them, for the metadata key ``geofm``.

    Raises:
        RasterError: It cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    pa, pq = pyarrow_modules()
    texts = ("species", "genus", "family", "leaf_type")
    xy = np.array([(row["longitude"], row["latitude"]) for row in rows], dtype=np.float64)
    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.int64()),
        "longitude": pa.array(xy[:, 0]),
        "latitude": pa.array(xy[:, 1]),
        **{name: pa.array([row[name] for row in rows], pa.string()) for name in texts},
        "probability": pa.array([row["probability"] for row in rows], pa.float32()),
        "top_species": pa.array([row["top_species"] for row in rows], pa.list_(pa.string())),
        "top_probabilities": pa.array(
            [row["top_probabilities"] for row in rows], pa.list_(pa.float32())
        ),
    }
    for family in families:
        values = [(row["families"] or {}).get(family) for row in rows]
        columns[f"family_{family}"] = pa.array(values, pa.float32())
    columns["geometry"] = points(xy)
    # Without a crs it is OGC:CRS84: longitude, latitude.
    geo = geo_metadata("Point", [*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist()])
    metadata = {"geo": geo, "geofm": json.dumps({"tags": dict(tags)})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    try:
        with written(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except (pa.ArrowException, OSError) as error:
        raise RasterError(f"cannot write {path}: {error}") from error
