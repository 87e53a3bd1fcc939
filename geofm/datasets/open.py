"""Opening observations of trees, whatever they are stored in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from geofm.datasets.globalgeotree import ReadReport, read_shards
from geofm.datasets.monthly import read_monthly_folder
from geofm.datasets.observations import DataNotFoundError, Observation
from geofm.datasets.timeseries import read_series_h5

__all__ = ["open_observations"]

_SERIES = (".h5", ".hdf5")


def open_observations(
    source: str | os.PathLike[str],
    *,
    bands: Sequence[str] | None = None,
    errors: str = "raise",
    longitude: float | None = None,
    latitude: float | None = None,
    georeference: str | os.PathLike[str] | None = None,
    auxiliary: Mapping[str, float | None] | None = None,
    report: ReadReport | None = None,
) -> Iterator[Observation]:
    """Observations from shards, series or monthly images, told apart by what is there.

    Args:
        source: A GlobalGeoTree shard (``.tar``) or a folder of them; a TreeSatAI time series
            (``.h5``); a CSV or a folder of monthly GeoTIFFs.
        bands: Bands to deliver, in order, by name; None for GlobalGeoTree's.
        errors: For shards: ``"raise"``, or ``"skip"`` to leave out and count what cannot be read.
        longitude: Of a series, in degrees east; a series' file does not tell.
        latitude: Of a series, in degrees north.
        georeference: A raster of the series' place, in place of coordinates.
        auxiliary: The environment of a series' place, by variable.
        report: Counts what was read from shards.

    Yields:
        One observation a sample.

    Raises:
        DataNotFoundError: There is nothing of these kinds.
        GeofmError: It cannot be read; which, is said by the function that reads it.
    """
    path = Path(source)
    if not path.exists():
        raise DataNotFoundError(f"there is no {path}")
    placed = longitude is not None or latitude is not None or georeference is not None
    if path.suffix.lower() in _SERIES:
        yield read_series_h5(
            path,
            bands=bands,
            longitude=longitude,
            latitude=latitude,
            georeference=georeference,
            auxiliary=auxiliary,
        )
        return
    if placed or auxiliary is not None:
        raise DataNotFoundError(
            f"{path} tells its own coordinates and environment; only a series (.h5) does not"
        )
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        yield from read_shards(path, bands=bands, errors=errors, report=report)
    elif path.is_dir() or path.suffix.lower() == ".csv":
        yield from read_monthly_folder(path, bands=bands)
    else:
        raise DataNotFoundError(
            f"{path} is neither GlobalGeoTree shards (.tar), a time series (.h5), nor a folder or "
            f"CSV of monthly GeoTIFFs"
        )
