"""Pretext targets of MP-MAE: what kinds there are, and how a prediction is compared with one.

Source: Nedungadi et al., MMEarth, ECCV 2024 (arXiv 2405.02771), and the outputs of its published
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MODALITIES",
    "Kind",
    "Modality",
    "UncertaintyWeighting",
    "cross_entropy",
    "means",
    "patch_error",
    "squared_error",
    "summary",
    "zeroed",
]

# Added to the variance of a target patch before it is divided by.
_PATCH_EPS = 1e-6

# Added to deviations before their logarithm: a hundredth of that of normalized data.
_DEVIATION_EPS = 1e-2

Kind = Literal["pixels", "classes", "vector", "category", "summary"]


@dataclass(frozen=True, slots=True)
class Modality:
    """One pretext target.

    Attributes:
        name: What its loss is called, and its key in a batch.
        kind: ``"pixels"``: (N, channels, H, W) values per pixel, squared error. ``"classes"``:
            (N, 1, H, W) integers per pixel below `channels`, -1 where unknown, cross-entropy.
            ``"vector"``: (N, channels) values per tile, NaN or infinite where unknown, squared
            error.
            ``"category"``: (N, channels) one-hot per tile, all zero where unknown, cross-entropy.
            ``"summary"``: (N, channels, H, W) values per pixel, of which the tile's summary is to
            be told (`summary`), squared error.
        channels: Channels, values or classes.
        patch_norm: Bring each patch of a ``"pixels"`` target to mean 0 and variance 1.
        source: Key in a batch, where it is not the name: one array may be two targets, for
            example each patch's structure (`patch_norm`) and the values themselves.
        weight: Factor on its error.
    """

    name: str
    kind: Kind
    channels: int
    patch_norm: bool = False
    source: str = ""
    weight: float = 1.0

    @property
    def key(self) -> str:
        """Its key in a batch."""
        return self.source or self.name

    @property
    def is_map(self) -> bool:
        """Whether the target comes as a map, which is cropped with the input."""
        return self.kind in ("pixels", "classes", "summary")

    @property
    def per_pixel(self) -> bool:
        """Whether pixels are predicted, rather than something about the tile."""
        return self.kind in ("pixels", "classes")

    @property
    def outputs(self) -> int:
        """Predictions for each pixel or tile."""
        return 3 * self.channels if self.kind == "summary" else self.channels


MODALITIES: Final = {
    m.name: m
    for m in (
        Modality("sentinel2", "pixels", 12, patch_norm=True),
        Modality("sentinel1", "pixels", 8),
        Modality("aster", "pixels", 2),
        Modality("era5", "vector", 12),
        Modality("dynamic_world", "classes", 9),
        Modality("canopy_height_eth", "pixels", 2),
        Modality("lat", "vector", 2),
        Modality("lon", "vector", 2),
        Modality("biome", "category", 14),
        Modality("eco_region", "category", 846),
        Modality("month", "vector", 2),
        Modality("esa_worldcover", "classes", 11),
    )
}
"""The twelve targets of MMEarth, in the order of the published loss."""


class UncertaintyWeighting(nn.Module):
    """Learned weights of losses: the sum of ``exp(-s) · loss + s`` with one s for each.

    Source: Kendall et al., CVPR 2018 (arXiv 1705.07115), as the published MP-MAE code has it.

    Args:
        count: Number of losses.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.log_vars = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine losses.

        Args:
            losses: (count,).
            present: (count,) bool, which of them had something to compare; the others add nothing.
                None: those that are not exactly 0.

        Returns:
            A scalar.
        """
        weighted = torch.exp(-self.log_vars) * losses + self.log_vars
        present = losses != 0 if present is None else present
        return torch.where(present, weighted, torch.zeros_like(weighted)).sum()


def zeroed(values: Tensor) -> Tensor:
    """Values with 0 for what is not known: NaN and infinities.

    Args:
        values: Any shape.

    Returns:
        The same shape, finite.
    """
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def squared_error(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of known values.

    Args:
        predicted: Any shape.
        target: The same shape; NaN or infinite where unknown.

    Returns:
        The sum and the number of values it is over.
    """
    known = torch.isfinite(target)
    error = torch.where(known, predicted - zeroed(target), 0).square().sum()
    return error, known.sum()


def cross_entropy(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of known classes.

    Args:
        logits: (N, classes) or (N, classes, L).
        classes: (N,) or (N, L) integers; -1 where unknown.

    Returns:
        The sum and the number of values it is over.
    """
    total = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
    return total, (classes != -1).sum()


def patch_error(
    predicted: Tensor, target: Tensor, patch_norm: bool, missing: str
) -> tuple[Tensor, Tensor]:
    """Squared error of patches, each the mean of its values.

    Args:
        predicted: (R, patch², channels).
        target: The same shape; NaN or infinite where unknown.
        patch_norm: Bring each target patch to mean 0 and variance 1 (unbiased, eps 1e-6).
        missing: ``"zero"``: unknown values count as 0, as published; ``"exclude"``: they and values
            of exactly 0, which normalized data hold where something is missing, do not count.

    Returns:
        The sum over patches and the number of those whose error is not 0.
    """
    target = zeroed(target).float()
    if missing == "zero":
        if patch_norm:
            variance, mean = torch.var_mean(target, (1, 2), keepdim=True)
            target = (target - mean) / (variance + _PATCH_EPS).sqrt()
        error = F.mse_loss(predicted, target, reduction="none").mean((1, 2))
        return error.sum(), (error != 0).sum()
    known = target != 0
    number = known.sum((1, 2)).clamp(min=1)
    if patch_norm:
        weight = known.float()
        average = (target * weight).sum((1, 2)) / number
        centred = (target - average[:, None, None]) * weight
        spread = centred.square().sum((1, 2)) / (number - 1).clamp(min=1)
        target = centred / (spread + _PATCH_EPS).sqrt()[:, None, None]
    error = torch.where(known, predicted - target, 0).square().sum((1, 2)) / number
    return error.sum(), (error != 0).sum()


def summary(target: Tensor, missing: str) -> Tensor:
    """What a tile's values are like: mean, deviation and roughness of each channel.

    Args:
        target: (N, C, H, W); NaN or infinite where unknown.
        missing: As in `patch_error`.

    Returns:
        (N, 3 C): means; logarithms of the standard deviation; logarithms of the root mean square
        difference of horizontal and vertical neighbours. NaN where nothing is known.
    """
    zero = target == 0 if missing == "exclude" else torch.zeros_like(target, dtype=torch.bool)
    known = ~zero & torch.isfinite(target)
    values = torch.where(known, target, 0).float()

    def mean(x: Tensor, where: Tensor) -> Tensor:
        # 0 / 0 is NaN: unknown.
        return (x * where).sum((2, 3)) / where.sum((2, 3))

    centre = mean(values, known)
    deviation = mean((values - centre.nan_to_num()[:, :, None, None]).square(), known).sqrt()
    steps = []
    for axis in (2, 3):
        length = target.shape[axis] - 1
        first, second = values.narrow(axis, 0, length), values.narrow(axis, 1, length)
        both = known.narrow(axis, 0, length) & known.narrow(axis, 1, length)
        steps.append(mean((second - first).square(), both))
    roughness = ((steps[0] + steps[1]) / 2).sqrt()
    return torch.cat([centre, *((x + _DEVIATION_EPS).log() for x in (deviation, roughness))], 1)


def means(
    sums: Sequence[Tensor], counts: Sequence[Tensor], everywhere: bool
) -> tuple[Tensor, Tensor]:
    """Means of losses, over the batches of all processes where there are several.

    Processes know different numbers of values; a mean of their means would depend on how samples
    are divided. With the common count, the mean over processes that distributed training takes of
    gradients is the gradient of the whole batch.

    Args:
        sums: Of each loss, of this process.
        counts: Numbers of values they are over.
        everywhere: Count over all processes; all of them must call this then.

    Returns:
        (losses,); 0 where nothing is known. And which are not 0, on any process where all count: a
        process that knows nothing of a modality still has to count its weight like the others.
    """
    total = torch.stack(list(sums))
    count = torch.stack(list(counts)).to(total.dtype)
    error = total.detach()
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if everywhere and grouped:
        both = torch.stack([count, error])
        torch.distributed.all_reduce(both)
        count, error = both[0] / torch.distributed.get_world_size(), both[1]
    # Below 1 only where processes have less than one value each on average.
    return total / torch.where(count > 0, count, 1), error != 0
