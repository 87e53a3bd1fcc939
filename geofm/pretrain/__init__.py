"""Pretraining: the methods of the three systems and one loop that runs them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geofm.pretrain.clip import ContrastiveLanguageImage
    from geofm.pretrain.contrast import MomentumContrast, SeasonContrast
    from geofm.pretrain.method import Exported, Method
    from geofm.pretrain.mpmae import MaskedAutoencoder
    from geofm.pretrain.pretext import MODALITIES, Modality

_LAZY = {
    "MODALITIES": "pretext",
    "ContrastiveLanguageImage": "clip",
    "Exported": "method",
    "MaskedAutoencoder": "mpmae",
    "Method": "method",
    "Modality": "pretext",
    "MomentumContrast": "contrast",
    "SeasonContrast": "contrast",
}

__all__ = [
    "MODALITIES",
    "ContrastiveLanguageImage",
    "Exported",
    "MaskedAutoencoder",
    "Method",
    "Modality",
    "MomentumContrast",
    "SeasonContrast",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'geofm.pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"geofm.pretrain.{_LAZY[name]}"), name)
