"""Bands that are computed from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NormalizedDifference"]


@dataclass(frozen=True)
class NormalizedDifference:
    """``clip((a - b) / (a + b + eps), minimum) * scale``, for example NDVI in a checkpoint's scale.

    Attributes:
        name: Name of the resulting band, for example ``"NDVI"``.
        bands: Names of a and b, for example ``("B8", "B4")``.
        scale: Multiplies the index: 10000 keeps it in the integer scale of DN.
        minimum: Lower bound of the index before scaling; None for none.
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
        a, b = (pixels[name] for name in self.bands)
        return self.finish((a - b) / (a + b + self.eps))

    def finish(self, index: Tensor) -> Tensor:
        """Clip and scale an index that is already computed.

        Args:
            index: Values from -1 to 1.

        Returns:
            The scaled index.
        """
        if self.minimum is not None:
            index = torch.clamp(index, min=self.minimum)
        return index * self.scale
