"""Data in the formats their authors publish, and generated samples."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geofm.datasets.globalgeotree import GlobalGeoTree, read_shards, write_shards
    from geofm.datasets.mmearth import MMEarth, write_mmearth
    from geofm.datasets.monthly import read_monthly_folder
    from geofm.datasets.observations import Observation, collate
    from geofm.datasets.open import open_observations
    from geofm.datasets.ssl4eco import SSL4Eco, index_places, write_ssl4eco
    from geofm.datasets.tiles import TileFolder
    from geofm.datasets.timeseries import monthly_median, read_series_h5

_LAZY = {
    "GlobalGeoTree": "globalgeotree",
    "MMEarth": "mmearth",
    "Observation": "observations",
    "SSL4Eco": "ssl4eco",
    "TileFolder": "tiles",
    "collate": "observations",
    "index_places": "ssl4eco",
    "monthly_median": "timeseries",
    "open_observations": "open",
    "read_monthly_folder": "monthly",
    "read_series_h5": "timeseries",
    "read_shards": "globalgeotree",
    "write_mmearth": "mmearth_samples",
    "write_shards": "globalgeotree",
    "write_ssl4eco": "ssl4eco",
}

__all__ = [
    "GlobalGeoTree",
    "MMEarth",
    "Observation",
    "SSL4Eco",
    "TileFolder",
    "collate",
    "index_places",
    "monthly_median",
    "open_observations",
    "read_monthly_folder",
    "read_series_h5",
    "read_shards",
    "write_mmearth",
    "write_shards",
    "write_ssl4eco",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'geofm.datasets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"geofm.datasets.{_LAZY[name]}"), name)
