"""Maps of one band: similarities and classes, with colours and names."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from geofm.embeddings.grids import Grid
from geofm.raster.cog import (
    CACHE_BYTES,
    WITH_OVERVIEWS,
    check_complete,
    gdal_errors,
    reported,
    written,
)
from geofm.raster.sources import rasterio_module

__all__ = ["write_band"]

Colour = tuple[int, int, int]

# What is handed to rasterio at a time.
_COPIED_BYTES = 16 * 2**20


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

    Meanwhile there is a second, plain copy beside it on the disk; in memory there is none.

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
        "BIGTIFF": "IF_SAFER",
    }
    errors, note = gdal_errors(), ". Nothing of it is kept"
    with (
        reported(path, *errors, note=note),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        written(path) as temporary,
        tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".geofm-") as folder,
        # Again, before what fills the disk is gone.
        reported(path, *errors, note=note, size=WITH_OVERVIEWS * values.nbytes),
    ):
        plain = Path(folder) / "plain.tif"
        with rasterio.open(plain, "w", **options) as file:
            # rasterio copies what it is given.
            step = max(1, _COPIED_BYTES // max(values[:1].nbytes, 1))
            for top in range(0, len(values), step):
                rows = values[top : top + step]
                part = rasterio.windows.Window(0, top, rows.shape[1], len(rows))
                file.write(rows, 1, window=part)
            file.set_band_description(1, name)
            file.update_tags(**all_tags)
            if colours is not None:
                file.write_colormap(1, dict(enumerate(colours)))
        if plain.stat().st_size < values.nbytes:
            raise OSError(f"{plain.name} ends early; see that the disk has room")
        # Means of class numbers are no classes.
        resampling = "AVERAGE" if values.dtype.kind == "f" else "MODE"
        rasterio.shutil.copy(
            plain,
            temporary,
            driver="COG",
            COMPRESS="DEFLATE",
            PREDICTOR="NO" if colours is not None else "YES",
            OVERVIEW_RESAMPLING=resampling,
        )
        check_complete(temporary, *values.shape)
