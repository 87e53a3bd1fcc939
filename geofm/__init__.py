"""geofm: a model zoo for ecology from space.

Three published systems behind one small interface; nothing about bands, units, normalization or
weights is guessed. Start with `create_model` and `create_transform`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geofm import _timm_hook
from geofm.errors import (
    AuxiliaryError,
    BandError,
    CardError,
    DataNotFoundError,
    DownloadError,
    GeofmError,
    HashMismatchError,
    LayoutError,
    MissingExtraError,
    ModelError,
    PixelError,
    RasterError,
    TaxonError,
    UnknownModelError,
    UnsafeFileError,
    WeightsNotFoundError,
)

if TYPE_CHECKING:
    from geofm.arrays import embed_xarray
    from geofm.cards import WeightCard
    from geofm.factory import create_model, create_transform
    from geofm.preprocess import Preprocess
    from geofm.raster import embed_raster, predict_raster
    from geofm.registry import is_model, list_models, list_pretrained, model_card
    from geofm.scenes import Scene, open_scene
    from geofm.series import species_map
    from geofm.species import name_species
    from geofm.spectral import Band, Sensor
    from geofm.taxonomy import Taxon
    from geofm.zeroshot import SpeciesClassifier, zero_shot

__version__ = "0.1.0"

__all__ = [
    "AuxiliaryError",
    "Band",
    "BandError",
    "CardError",
    "DataNotFoundError",
    "DownloadError",
    "GeofmError",
    "HashMismatchError",
    "LayoutError",
    "MissingExtraError",
    "ModelError",
    "PixelError",
    "Preprocess",
    "RasterError",
    "Scene",
    "Sensor",
    "SpeciesClassifier",
    "Taxon",
    "TaxonError",
    "UnknownModelError",
    "UnsafeFileError",
    "WeightCard",
    "WeightsNotFoundError",
    "__version__",
    "create_model",
    "create_transform",
    "embed_raster",
    "embed_xarray",
    "is_model",
    "list_models",
    "list_pretrained",
    "model_card",
    "name_species",
    "open_scene",
    "predict_raster",
    "species_map",
    "zero_shot",
]

# Where the names live whose import is heavy; loaded on first use.
_LAZY = {
    "Band": "geofm.spectral",
    "Preprocess": "geofm.preprocess",
    "Scene": "geofm.scenes",
    "Sensor": "geofm.spectral",
    "SpeciesClassifier": "geofm.zeroshot",
    "Taxon": "geofm.taxonomy",
    "WeightCard": "geofm.cards",
    "create_model": "geofm.factory",
    "create_transform": "geofm.factory",
    "embed_raster": "geofm.raster",
    "embed_xarray": "geofm.arrays",
    "is_model": "geofm.registry",
    "list_models": "geofm.registry",
    "list_pretrained": "geofm.registry",
    "model_card": "geofm.registry",
    "name_species": "geofm.species",
    "open_scene": "geofm.scenes",
    "predict_raster": "geofm.raster",
    "species_map": "geofm.series",
    "zero_shot": "geofm.zeroshot",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'geofm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_timm_hook.install()
