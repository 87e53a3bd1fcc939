"""How good models are: accuracies as published, and better defined ones beside them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geofm.evaluate.few_shot import few_shot, sample_few_shot
from geofm.evaluate.zero_shot import Accuracy, ZeroShotAccuracy, zero_shot_accuracy

if TYPE_CHECKING:
    from geofm.evaluate.knn import knn_accuracy, knn_votes
    from geofm.evaluate.probe import LinearProbe, linear_probe, stratified_folds

_LAZY = {
    "LinearProbe": "probe",
    "knn_accuracy": "knn",
    "knn_votes": "knn",
    "linear_probe": "probe",
    "stratified_folds": "probe",
}

__all__ = [
    "Accuracy",
    "LinearProbe",
    "ZeroShotAccuracy",
    "few_shot",
    "knn_accuracy",
    "knn_votes",
    "linear_probe",
    "sample_few_shot",
    "stratified_folds",
    "zero_shot_accuracy",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'geofm.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"geofm.evaluate.{_LAZY[name]}"), name)
