"""`embed_xarray`: a lazy array of pixels in, a lazy array of embeddings out."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from geofm.arrays.encoder import Encoder, cut, embed_chunk
from geofm.arrays.grid import (
    Chunks,
    cell_centres,
    chunks_along,
    geotransform,
    moved_geotransform,
    source_parts,
    window_sides,
)
from geofm.errors import BandError, MissingExtraError, PixelError, RasterError
from geofm.factory import create_transform
from geofm.preprocess import Preprocess
from geofm.raster.networks import check_size, default_window, weights_tags

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["embed_xarray"]

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "float16")
# Attributes that tell where an array lies, not what its pixels are; CF's and rioxarray's.
_PLACE_ATTRS = ("crs", "crs_wkt", "spatial_ref", "grid_mapping")


def embed_xarray(
    model: nn.Module,
    array: xr.DataArray,
    *,
    units: str,
    level: str | None = None,
    bands: Sequence[str] | None = None,
    offset: float | None = None,
    nodata: float | Sequence[float] | None = None,
    chunks: int | None = None,
    halo: int | None = None,
    stride: int | None = None,
    min_valid: float = 0.5,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    **options: Any,
) -> xr.DataArray:
    """Embed every cell of an array, lazily, chunk by chunk, on whatever runs dask.

    Nothing is read or computed here. A chunk of the result is one task: it takes the pixels below
    it and a halo around them, its *window*, prepares them, and runs the model on each time step by
    itself. Where a model looks at its whole window, as the global response normalization of MP-MAE
    and the attention of a ViT do, values depend on `chunks` and `halo`; they do not depend on how
    the array was stored, nor on how many workers there are.

    Args:
        model: An encoder from `create_model`; a copy of it, in evaluation mode, goes to the
            workers. With MP-MAE, ``stem_padding="aligned"`` makes cells tile the image.
        array: Dimensions ``y``, ``x``, ``band`` and, if there are several, ``time``, in any order.
            In memory, or lazy (from ``open_zarr``, ``open_dataset(chunks=...)`` …).
        units: As in `create_transform`.
        level: As in `create_transform`.
        bands: Names of the array's bands, in order; None: the ``band`` coordinate holds them.
        offset: As in `create_transform`.
        nodata: Stored values that mean "no data"; None for the card's. NaN, and the array's
            ``_FillValue`` attribute, always do.
        chunks: Pixels along the side of a chunk, a multiple of the model's cells; None: so that a
            window is as large as `embed_raster`'s. The array is brought to such chunks, which costs
            nothing where it has them already. Chunks along time stay as they are; of an array in
            memory they are single steps.
        halo: Pixels around a chunk, a multiple of the model's cells; None: an eighth of the window.
            At the array's edges windows are moved inward, so that all are alike.
        stride: Pixels per cell, one of the encoder's; None for its last: one cell a patch.
        min_valid: Share of the pixels of a cell that must have data; cells with less are NaN.
            Pixels outside the array do not count.
        dtype: ``"float32"`` or ``"float16"``.
        device: ``"auto"``: a worker's GPU if it has one, else its CPU; or a torch device.
        **options: More options of `create_transform`, but for its size rule.

    Returns:
        (time, component, y, x), or without time if the array has none. Coordinates of time are
        kept, those of y and x are the centres of cells; an array that ends inside a cell is
        continued by its last row and column. Attributes say what made it, as `embed_raster`'s tags.

    Raises:
        BandError: Bands are not named, unknown, or missing.
        PixelError: Dimensions, type, units or level are not as they must be. Values that cannot be
            in the stated units are found when computing.
        ModelError: The model has no map, or does not take such windows.
        RasterError: Chunks, halo, coordinates or options do not fit. Output that is not finite, or
            beyond float16, is found when computing.
        MissingExtraError: xarray or dask is not installed.
    """
    xarray, _ = _modules()
    if not isinstance(array, xarray.DataArray):
        raise PixelError(
            f"embed_xarray takes an xarray.DataArray, got {type(array).__name__}"
            + (
                "; bring its variables together: dataset.to_dataarray('band')"
                if isinstance(array, xarray.Dataset)
                else ""
            )
        )
    if dtype not in _DTYPES:
        raise RasterError(f"dtype is {' or '.join(_DTYPES)}, got {dtype!r}")
    if not 0 <= min_valid <= 1:
        raise RasterError(f"min_valid is a share from 0 to 1, got {min_valid}")
    _check_dims(array)
    if offset is not None:
        options["offset"] = offset
    array, prepare = _prepared(model, array, bands, units, level, nodata, options)
    encoder = Encoder(model, prepare, stride, str(device), min_valid, dtype)
    core, halo = window_sides(encoder.network, default_window(model), chunks, halo)
    rows, columns, channels = _plan(encoder, array.sizes["y"], array.sizes["x"], core, halo)
    source = _chunked(array, core)
    values = _graph(encoder, source.data, channels, rows, columns)
    return _labelled(model, encoder, array, values, rows, columns)


def _modules() -> tuple[Any, Any]:
    try:
        return importlib.import_module("xarray"), importlib.import_module("dask.array")
    except ImportError as error:
        raise MissingExtraError(
            "lazy arrays need xarray and dask: pip install 'geofm[dask]'"
        ) from error


# --- what goes in -------------------------------------------------------------------------------


def _check_dims(array: xr.DataArray) -> None:
    found = tuple(str(dim) for dim in array.dims)
    if sorted(found) not in (["band", "x", "y"], ["band", "time", "x", "y"]):
        raise PixelError(
            f"dimensions must be (time, band, y, x) or (band, y, x), in any order, got "
            f"({', '.join(found)}); rename others: array.rename({{'t': 'time'}})"
        )
    empty = [dim for dim in found if not array.sizes[dim]]
    if empty:
        raise PixelError(f"the array is empty along {', '.join(empty)}: {dict(array.sizes)}")
    if array.dtype.kind not in "iuf":
        raise PixelError(f"pixels must be integers or floats, got {array.dtype}")


def _prepared(
    model: nn.Module,
    array: xr.DataArray,
    bands: Sequence[str] | None,
    units: str,
    level: str | None,
    nodata: float | Sequence[float] | None,
    options: Mapping[str, Any],
) -> tuple[xr.DataArray, Preprocess]:
    """The bands that the model needs, and their preprocessing."""
    if "fit" in options or "size" in options:
        raise RasterError("a map has the size of its image; fit= and size= are for tiles")
    names = _band_names(array, bands)
    options = {**options, "fit": "any", "nodata": nodata}
    prepare = create_transform(model, names, units, level, **options)
    fill = array.attrs.get("_FillValue")
    if fill is not None:
        options["nodata"] = (*prepare.nodata, float(fill))
    # Bands that the model does not take need not be read.
    used = sorted({channel for each in prepare.sources for channel in each.channels})
    prepare = create_transform(model, [names[c] for c in used], units, level, **options)
    return (array if len(used) == len(names) else array.isel(band=used)), prepare


def _band_names(array: xr.DataArray, bands: Sequence[str] | None) -> list[str]:
    count = array.sizes["band"]
    if bands is not None:
        names = [bands] if isinstance(bands, str) else list(bands)
        if len(names) != count:
            raise BandError(f"the array has {count} bands, but {len(names)} are named: {names}")
        return names
    if "band" not in array.coords:
        raise BandError(
            f"the array's {count} bands have no names: it has no coordinate 'band'; name them in "
            f"order: bands=[...]"
        )
    values = array.coords["band"].values.tolist()
    if not all(isinstance(value, str) for value in values):
        raise BandError(
            f"the coordinate 'band' must hold names, but holds {values[:4]}; name the {count} "
            f"bands in order: bands=[...]"
        )
    return [str(value) for value in values]


def _plan(
    encoder: Encoder, height: int, width: int, core: int, halo: int
) -> tuple[Chunks, Chunks, int]:
    network = encoder.network
    check_size(network, height, width)
    sides = [min(core + 2 * halo, n + -n % network.unit) for n in (height, width)]
    channels, *cells = encoder.shape_of(*sides)
    rows, columns = (
        chunks_along(length, core, halo, network, size // network.stride - count)
        for length, size, count in zip((height, width), sides, cells, strict=True)
    )
    return rows, columns, channels


def _chunked(array: xr.DataArray, core: int) -> xr.DataArray:
    """The array as (time, band, y, x) in the chunks of the result, all bands together."""
    order = ("time", "band", "y", "x") if "time" in array.dims else ("band", "y", "x")
    wanted: dict[str, int] = {"band": -1, "y": core, "x": core}
    if array.chunks is None and "time" in array.dims:
        wanted["time"] = 1
    chunked = array.transpose(*order).chunk(wanted)
    if array.chunks is not None and array.transpose(*order).chunks != chunked.chunks:
        logger.info("chunks of %s are brought to %d x %d px", array.name or "array", core, core)
    return chunked


# --- the graph ----------------------------------------------------------------------------------


def _graph(encoder: Encoder, source: Any, channels: int, rows: Chunks, columns: Chunks) -> Any:
    """One task a chunk, and one for each part of a neighbour that it needs; none looks at all.

    Written by hand, since `map_overlap` gives smaller windows at the edges of an array.
    """
    dask_array = importlib.import_module("dask.array")
    graphs = importlib.import_module("dask.highlevelgraph")
    tokenize = importlib.import_module("dask.base").tokenize
    timed = source.ndim == 4
    blocks = source if timed else source[None]
    token = tokenize(encoder, blocks.name, rows, columns)
    name, part_name, model_name = (f"embed{kind}-{token}" for kind in ("", "-halo", "-model"))
    edges = [[0, *itertools.accumulate(sizes)] for sizes in blocks.chunks[2:]]
    # One key that all tasks depend on: a worker gets the model once.
    tasks: dict[Any, Any] = {model_name: encoder}
    for i, j in itertools.product(range(len(rows.cells)), range(len(columns.cells))):
        above = source_parts(*rows.pixels(i), edges[0])
        beside = source_parts(*columns.pixels(j), edges[1])
        for time in range(len(blocks.chunks[0])):
            window = []
            for (k, top, bottom), line in itertools.product(above, [beside]):
                keys = []
                for m, left, right in line:
                    key: Any = (blocks.name, time, 0, k, m)
                    if (bottom - top, right - left) != (blocks.chunks[2][k], blocks.chunks[3][m]):
                        whole = key
                        key = (part_name, time, k, m, top, bottom, left, right)
                        tasks[key] = (cut, whole, top, bottom, left, right)
                    keys.append(key)
                window.append(keys)
            parts = (rows.part(i), columns.part(j))
            tasks[(name, time, 0, i, j)] = (embed_chunk, model_name, window, channels, *parts)
    graph = graphs.HighLevelGraph.from_collections(name, tasks, dependencies=[blocks])
    shape = (blocks.chunks[0], (channels,), rows.cells, columns.cells)
    meta = np.empty((0, 0, 0, 0), dtype=encoder.dtype)
    result = dask_array.Array(graph, name, shape, meta=meta)
    return result if timed else result[0]


# --- what comes out -----------------------------------------------------------------------------


def _labelled(
    model: nn.Module,
    encoder: Encoder,
    array: xr.DataArray,
    values: Any,
    rows: Chunks,
    columns: Chunks,
) -> xr.DataArray:
    xarray, _ = _modules()
    dims = ("time", "component", "y", "x")[4 - values.ndim :]
    coords = {
        name: coord
        for name, coord in array.coords.items()
        if not {"band", "y", "x"} & set(coord.dims) and name not in ("band", "y", "x")
    }
    coords["component"] = np.arange(values.shape[-3])
    places = {}
    for name, chunks in (("y", rows), ("x", columns)):
        if name in array.coords:
            places[name] = cell_centres(name, array.coords[name].values, chunks.axis)
        place = places.get(name)
        if place is not None:
            coords[name] = xarray.DataArray(place[0], dims=name, attrs=array.coords[name].attrs)
    dropped = sorted(str(n) for n in array.coords if n not in coords and n != "band")
    if dropped:
        logger.info("coordinates that do not fit the cells are left out: %s", ", ".join(dropped))
    attrs = {key: array.attrs[key] for key in _PLACE_ATTRS if key in array.attrs}
    attrs |= _made_by(model, encoder, rows, columns)
    result = xarray.DataArray(values, coords=coords, dims=dims, name="embedding", attrs=attrs)
    mapping = array.encoding.get("grid_mapping")
    if mapping is not None and "grid_mapping" not in attrs:
        result.encoding["grid_mapping"] = mapping
    _move_geotransform(result, places, rows, columns)
    return result  # type: ignore[no-any-return]


def _move_geotransform(
    result: Any, places: Mapping[str, Any], rows: Chunks, columns: Chunks
) -> None:
    """Grid mappings that hold the pixels' transform get the cells'."""
    x, y = places.get("x"), places.get("y")
    for name, coord in list(result.coords.items()):
        if "GeoTransform" not in coord.attrs:
            continue
        if x is not None and y is not None:
            dx, dy = x[1] * columns.axis.spacing, y[1] * rows.axis.spacing
            text = geotransform(x[0], dx, y[0], dy)
        else:
            text = moved_geotransform(coord.attrs["GeoTransform"], columns.axis, rows.axis)
        moved = coord.copy()
        moved.attrs = {**coord.attrs, "GeoTransform": text}
        result.coords[name] = moved


def _made_by(model: nn.Module, encoder: Encoder, rows: Chunks, columns: Chunks) -> dict[str, str]:
    return {
        **weights_tags(model, encoder.weights_hash),
        "GEOFM_PREPARE": repr(encoder.prepare),
        "GEOFM_VALUES": encoder.network.label,
        "GEOFM_WINDOWS": (
            f"{rows.axis.size} x {columns.axis.size} px for chunks of {rows.core} px, moved inward "
            f"at the edges"
        ),
    }
