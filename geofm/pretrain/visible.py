"""Which patches of a batch are visible, and the way between their rows and the whole grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geofm.errors import ModelError

__all__ = ["Visible"]


@dataclass(frozen=True, slots=True)
class Visible:
    """Which patches of a batch are visible, as rows of the flattened (N, grid, grid).

    Attributes:
        patches: Rows of the visible patches, sample by sample, (V,).
        removed: Rows of the others, (R,).
        count: Samples in the batch.
        grid: Patches along a side.
    """

    patches: Tensor
    removed: Tensor
    count: int
    grid: int

    @classmethod
    def of(cls, mask: Tensor, count: int, grid: int) -> Visible:
        """Read a mask.

        Args:
            mask: (count, grid²) or (count, grid, grid), not 0 where a patch is removed.
            count: Samples in the batch.
            grid: Patches along a side.

        Returns:
            The visible patches.

        Raises:
            ModelError: There is no sample, the shape does not fit, or samples differ in their
                number of visible patches.
        """
        if not count:
            raise ModelError("the batch has no sample")
        flat = mask.reshape(len(mask), -1)
        if tuple(flat.shape) != (count, grid * grid):
            raise ModelError(
                f"the mask should be ({count}, {grid * grid}), a value for each patch; "
                f"found {tuple(mask.shape)}"
            )
        removed = flat != 0
        numbers = (~removed).sum(1)
        low, high = int(numbers.min()), int(numbers.max())
        if low != high or not low or low == grid * grid:
            raise ModelError(
                f"every sample needs the same number of visible patches, at least 1 and at most "
                f"{grid * grid - 1}; found {low} to {high}"
            )
        flat = removed.flatten()
        return cls(torch.nonzero(~flat)[:, 0], torch.nonzero(flat)[:, 0], count, grid)

    def to(self, device: torch.device) -> Visible:
        """The same on another device.

        Args:
            device: Where to.

        Returns:
            A copy there.
        """
        patches = self.patches.to(device, non_blocking=True)
        removed = self.removed.to(device, non_blocking=True)
        return Visible(patches, removed, self.count, self.grid)

    def pixel_mask(self, patch: int, dtype: torch.dtype) -> Tensor:
        """Which pixels are visible.

        Args:
            patch: Pixels along a side of a patch.
            dtype: Of the result.

        Returns:
            1 at the pixels of visible patches, else 0: (N, 1, H, W).
        """
        cells = torch.zeros(self.count * self.grid**2, dtype=dtype, device=self.patches.device)
        cells[self.patches] = 1
        cells = cells.view(self.count, 1, self.grid, 1, self.grid, 1)
        side = self.grid * patch
        shape = (self.count, 1, self.grid, patch, self.grid, patch)
        return cells.expand(shape).reshape(self.count, 1, side, side)

    def sites(self, side: int) -> Tensor:
        """Where the sites of visible patches lie in a map.

        Args:
            side: Sites along a side of a patch.

        Returns:
            Rows of the flattened (N, H, W), patch by patch.
        """
        offset = torch.arange(side, device=self.patches.device)
        sample, cell = self.patches // self.grid**2, self.patches % self.grid**2
        length = self.grid * side
        row = (cell // self.grid * side)[:, None] + offset
        column = (cell % self.grid * side)[:, None] + offset
        rows = (sample[:, None] * length + row)[:, :, None] * length + column[:, None, :]
        return rows.flatten()

    def to_grid(self, rows: Tensor, side: int, sites: Tensor | None = None) -> Tensor:
        """Bring rows of visible sites into a map.

        Args:
            rows: (S, C), in the order of `sites`.
            side: Sites along a side of a patch.
            sites: From `sites`, to save computing it again.

        Returns:
            (N, C, H, W), zero at removed patches, channels last in memory.
        """
        sites = self.sites(side) if sites is None else sites
        dense = rows.new_zeros(self.count * (self.grid * side) ** 2, rows.shape[1])
        return self.map_of(dense.index_copy(0, sites, rows), side)

    def map_of(self, rows: Tensor, side: int) -> Tensor:
        """Bring rows of all sites into a map.

        Args:
            rows: (N·H·W, C).
            side: Sites along a side of a patch.

        Returns:
            (N, C, H, W), channels last in memory.
        """
        length = self.grid * side
        return rows.view(self.count, length, length, -1).permute(0, 3, 1, 2)

    def hidden_patches(self, target: Tensor, patch: int) -> Tensor:
        """What a map holds at the removed patches.

        Args:
            target: (N, C, H, W).
            patch: Pixels along a side of a patch.

        Returns:
            (R, C, patch²).
        """
        count, channels = target.shape[:2]
        split = target.reshape(count, channels, self.grid, patch, self.grid, patch)
        split = split.permute(0, 2, 4, 1, 3, 5)
        sample, cell = self.removed // self.grid**2, self.removed % self.grid**2
        return split[sample, cell // self.grid, cell % self.grid].flatten(2)
