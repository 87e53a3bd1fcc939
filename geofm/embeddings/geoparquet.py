"""What files of GeoParquet have in common: pyarrow, geometries, and the metadata key ``geo``.

They follow GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0): geometries as well-known
binary, the reference system as PROJJSON.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import MissingExtraError

__all__ = ["geo_metadata", "points", "polygons", "pyarrow_modules"]

_POINT = np.dtype([("order", "u1"), ("type", "<u4"), ("xy", "<f8", 2)])
_POLYGON = np.dtype(
    [("order", "u1"), ("type", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))]
)


def pyarrow_modules() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        pyarrow, parquet = (importlib.import_module(n) for n in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise MissingExtraError(
            "GeoParquet needs pyarrow: pip install 'geofm[embeddings]'"
        ) from error
    return pyarrow, parquet


def points(xy: NDArray[np.float64]) -> Any:
    """A column of points.

    Args:
        xy: (n, 2).

    Returns:
        A pyarrow array of well-known binary.
    """
    parts = np.zeros(len(xy), _POINT)
    parts["type"], parts["xy"] = 1, xy
    return _binary(parts)


def polygons(xy: NDArray[np.float64]) -> Any:
    """A column of polygons with four corners.

    Args:
        xy: (n, 5, 2), anticlockwise; the last corner is the first.

    Returns:
        A pyarrow array of well-known binary.
    """
    parts = np.zeros(len(xy), _POLYGON)
    parts["type"], parts["rings"], parts["points"], parts["xy"] = 3, 1, 5, xy
    return _binary(parts)


def _binary(parts: NDArray[Any]) -> Any:
    """Geometries that all have the same length, little-endian."""
    pa, _ = pyarrow_modules()
    parts["order"] = 1
    offsets = np.arange(len(parts) + 1, dtype=np.int32) * parts.itemsize
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(parts.tobytes())]
    return pa.Array.from_buffers(pa.binary(), len(parts), buffers)


def geo_metadata(kind: str, bbox: Sequence[float], **more: Any) -> str:
    """The value of the metadata key ``geo``, for the column ``geometry``.

    Args:
        kind: ``"Point"`` or ``"Polygon"``.
        bbox: Least x and y, largest x and y.
        **more: More about the column, such as its ``crs`` (None: not known). Left out, it is
            longitude and latitude on WGS 84.

    Returns:
        JSON.
    """
    column = {"encoding": "WKB", "geometry_types": [kind], "bbox": list(bbox), **more}
    return json.dumps(
        {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    )
