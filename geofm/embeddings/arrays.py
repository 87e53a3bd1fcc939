"""zarr: the embedding as one chunked array with coordinates, as xarray opens it.

The reference system is written as rioxarray reads it: a variable ``spatial_ref`` with ``crs_wkt``
and ``GeoTransform`` (the CF conventions' grid mapping).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.grids import Grid, Reader, WindowedEmbeddings
from geofm.errors import MissingExtraError, RasterError
from geofm.raster.cog import NotWrittenError

__all__ = ["read_zarr", "write_zarr"]


def write_zarr(path: Path, embeddings: WindowedEmbeddings, grid: Grid, dtype: str) -> None:
    """Write a zarr folder, complete or not at all; each chunk is written once.

    Args:
        path: The folder; it must not exist.
        embeddings: The cells.
        grid: Where they lie and what made them, which the folder is to say.
        dtype: ``"float32"`` or ``"float16"``.

    Raises:
        RasterError: It is there already, cannot be written, or values are beyond float16.
        MissingExtraError: zarr is not installed.
    """
    zarr = _zarr()
    if path.exists():
        raise RasterError(f"{path} is there already; delete it, or choose another name")
    if not path.parent.is_dir():
        raise RasterError(f"cannot write {path}: there is no folder {path.parent}")
    folder: str | None = None
    try:
        folder = tempfile.mkdtemp(dir=path.parent, prefix=".geofm-", suffix=".zarr")
        group = zarr.create_group(store=folder, attributes=dict(grid.tags), overwrite=True)
        _describe(group, grid)
        array = group.create_array(
            "embedding",
            shape=grid.shape,
            chunks=(grid.shape[0], *embeddings.window),
            dtype=dtype,
            fill_value=float("nan"),
            dimension_names=("band", "y", "x"),
            attributes={"grid_mapping": "spatial_ref"},
        )
        for top, left, values in embeddings.windows():
            _, high, wide = values.shape
            array[:, top : top + high, left : left + wide] = _narrowed(values, dtype)
        # mkdtemp folders are private.
        Path(folder).chmod(0o755)
        Path(folder).rename(path)
    except OSError as error:
        raise NotWrittenError(path, error, ". Nothing of it is kept") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def read_zarr(path: Path) -> WindowedEmbeddings:
    """Open a folder that `write_zarr` wrote.

    Args:
        path: The folder.

    Returns:
        Its cells.

    Raises:
        RasterError: It is none.
        MissingExtraError: zarr is not installed.
    """
    zarr = _zarr()
    try:
        group = zarr.open_group(store=str(path), mode="r")
        array, place = group["embedding"], group["spatial_ref"].attrs
        c, a, b, f, d, e = (float(v) for v in str(place["GeoTransform"]).split())
        crs, tags = place.get("crs_wkt"), group.attrs.asdict()
    except (OSError, KeyError, ValueError) as error:
        raise RasterError(f"{path} holds no embeddings that geofm wrote: {error}") from error
    if array.ndim != 3 or array.dtype.kind != "f" or min(array.shape) < 1 or a * e == b * d:
        raise RasterError(
            f"{path} must hold an array of (band, y, x) floats on a grid, got {array.shape} of "
            f"{array.dtype}"
        )
    grid = Grid(tuple(array.shape), (a, b, c, d, e, f), crs, {k: str(v) for k, v in tags.items()})

    @contextlib.contextmanager
    def opened() -> Iterator[Reader]:
        def read(top: int, left: int, high: int, wide: int) -> NDArray[np.float32]:
            try:
                part = np.asarray(array[:, top : top + high, left : left + wide])
            # What its codecs raise.
            except (OSError, RuntimeError, ValueError) as error:
                raise RasterError(
                    f"{path}: the array embedding is damaged at row {top}, column {left}: {error}. "
                    f"Export it again from the GeoTIFF that it was made from"
                ) from error
            return part.astype(np.float32, copy=False)

        yield read

    return WindowedEmbeddings(grid, str(path), opened, tuple(array.chunks[1:]), path)


def _describe(group: Any, grid: Grid) -> None:
    """Coordinates and reference system."""
    a, b, c, d, e, f = grid.transform
    place: dict[str, Any] = {"GeoTransform": " ".join(repr(float(v)) for v in (c, a, b, f, d, e))}
    if grid.crs is not None:
        place |= {"crs_wkt": grid.crs, "spatial_ref": grid.crs}
    reference = group.create_array(
        "spatial_ref", shape=(), dtype="int32", attributes=place, dimension_names=()
    )
    reference[...] = 0
    channels, rows, columns = grid.shape
    coordinates: dict[str, NDArray[Any]] = {"band": np.arange(channels, dtype=np.int32)}
    if b == d == 0:
        # A rotated grid has no x of a column.
        coordinates["x"] = c + a * (np.arange(columns) + 0.5)
        coordinates["y"] = f + e * (np.arange(rows) + 0.5)
    for name, values in coordinates.items():
        group.create_array(name, data=values, dimension_names=(name,))


def _narrowed(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    # A cell with any value that is not finite has no data, as in a table.
    narrow[:, ~np.isfinite(values).all(axis=0)] = np.nan
    if np.isinf(narrow).any():
        raise RasterError("values are beyond float16, which ends at 65504; use dtype='float32'")
    return narrow


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError(
            "zarr folders need zarr: pip install 'geofm[embeddings]'"
        ) from error
    return zarr
