"""How good models are: accuracies as published, and better defined ones beside them."""

from geofm.evaluate.few_shot import few_shot, sample_few_shot
from geofm.evaluate.zero_shot import Accuracy, ZeroShotAccuracy, zero_shot_accuracy

__all__ = [
    "Accuracy",
    "ZeroShotAccuracy",
    "few_shot",
    "sample_few_shot",
    "zero_shot_accuracy",
]
