"""Bands that are computed from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NormalizedDifference"]


@dataclass(frozen=True)
class NormalizedDifference:
    """``clip((a - b) / (a + b + eps), minimum, 1) * scale``: NDVI in a checkpoint's scale.

    Negative a and b, which a subtracted offset leaves over dark water, count as 0: their sum can be
    0 or negative, and the quotient then is any number. Where a + b + eps is 0, so is the index.

    Attributes:
        name: Name of the resulting band, for example ``"NDVI"``.
        bands: Names of a and b, for example ``("B8", "B4")``.
        scale: Multiplies the index: 10000 keeps it in the integer scale of DN.
        minimum: Lower bound of the index before scaling; None for -1.
        eps: Added to the denominator, in DN.
    """

    name: str
    bands: tuple[str, str]
    scale: float = 1.0
    minimum: float | None = None
    eps: float = 0.0

    def __call__(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Compute the index.

        Args:
            pixels: The two bands in DN, tensors of one shape, by name.

        Returns:
            The scaled index, in that shape.
        """
        a, b = (torch.clamp(pixels[name], min=0.0) for name in self.bands)
        total = a + b + self.eps
        return self.finish((a - b) / torch.where(total == 0, torch.ones_like(total), total))

    def finish(self, index: Tensor) -> Tensor:
        """Clip and scale an index that is already computed.

        Args:
            index: Values from -1 to 1.

        Returns:
            The scaled index.
        """
        # A float, also where a card says 0: ONNX's clamp takes one type.
        minimum = -1.0 if self.minimum is None else float(self.minimum)
        return torch.clamp(index, min=minimum, max=1.0) * self.scale
