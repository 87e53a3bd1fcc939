"""Maps of one band: similarities and classes, with colours and names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from geofm.embeddings.grids import Grid
from geofm.errors import RasterError
from geofm.raster.cog import CACHE_BYTES, written
from geofm.raster.sources import rasterio_module

__all__ = ["write_band"]

Colour = tuple[int, int, int]


def write_band(
    path: str | os.PathLike[str],
    values: NDArray[Any],
    grid: Grid,
    *,
    nodata: float,
    name: str,
    tags: Mapping[str, str] | None = None,
    colours: Sequence[Colour] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a map as a cloud-optimised GeoTIFF, complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        values: (rows, columns).
        grid: Where they lie; its tags are kept.
        nodata: What marks cells without data.
        name: Description of the band.
        tags: More tags.
        colours: Colour of each value from 0 on, of a map of bytes.
        classes: Name of each value from 0 on, for the tag ``GEOFM_CLASSES`` (JSON).

    Raises:
        RasterError: It cannot be written.
        MissingExtraError: rasterio is not installed.
    """
    rasterio = rasterio_module()
    all_tags = {**grid.tags, **(tags or {})}
    if classes is not None:
        all_tags["GEOFM_CLASSES"] = json.dumps(list(classes), ensure_ascii=False)
    options = {
        "driver": "GTiff",
        "height": values.shape[0],
        "width": values.shape[1],
        "count": 1,
        "dtype": values.dtype.name,
        "crs": grid.crs,
        "transform": rasterio.Affine(*grid.transform),
        "nodata": nodata,
    }
    try:
        with (
            rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
            written(path) as temporary,
            rasterio.MemoryFile() as memory,
        ):
            with memory.open(**options) as file:
                file.write(values, 1)
                file.set_band_description(1, name)
                file.update_tags(**all_tags)
                if colours is not None:
                    file.write_colormap(1, dict(enumerate(colours)))
            # Means of class numbers are no classes.
            resampling = "AVERAGE" if values.dtype.kind == "f" else "MODE"
            rasterio.shutil.copy(
                memory.name,
                temporary,
                driver="COG",
                COMPRESS="DEFLATE",
                PREDICTOR="NO" if colours is not None else "YES",
                OVERVIEW_RESAMPLING=resampling,
            )
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError, OSError) as error:
        raise RasterError(f"cannot write {path}: {error}") from error
