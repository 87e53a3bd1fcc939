"""The depthwise 7×7 convolution of pretraining, with a faster gradient of its weights.

oneDNN, which computes it on a CPU, takes eight times as long for that gradient as for the
convolution itself. But it is a depthwise convolution as well: of the input, with the output's
gradient as its kernel, each channel of each sample apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from geofm.pretrain.visible import Visible

__all__ = ["depthwise"]

# Sites along a side of the largest map, and of the smallest patch, that are fast as kernels.
_LARGEST_MAP, _SMALLEST_PATCH = 28, 4


def depthwise(x: Tensor, weight: Tensor, visible: Visible | None = None, side: int = 1) -> Tensor:
    """Convolve each channel with its own kernel, padded to the same size.

    Args:
        x: (N, C, H, W), channels last in memory.
        weight: (C, 1, k, k), k odd.
        visible: The patches whose output is used, if not all: the gradient must be 0 at the others.
        side: Sites along a side of a patch.

    Returns:
        (N, C, H, W).
    """
    # Of an autograd.Function, forward derivatives would need a jvp, which torch.compile refuses.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if x.device.type != "cpu" or forward_mode:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))
    patches, grid = (None, 0) if visible is None else (visible.patches, visible.grid)
    out: Tensor = _Depthwise.apply(x, weight, patches, grid, side)
    return out


class _Depthwise(torch.autograd.Function):
    # For torch.func.vmap, such as gradients of single samples.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, patches: Tensor | None, grid: int, side: int) -> Tensor:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, patches, ctx.grid, ctx.side = inputs
        ctx.kind = x.dtype
        ctx.save_for_backward(x, weight, patches)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, patches = ctx.saved_tensors
        channels, reach = len(weight), weight.shape[-1] // 2
        # In half precision the output's, and with it its gradient's, type is not the input's.
        x, cast = x.to(grad.dtype), weight.to(grad.dtype)
        # The kernel is odd: that of the input is the convolution with the kernel turned round.
        of_x = F.conv2d(grad, cast.flip(2, 3), padding=reach, groups=channels)
        if max(x.shape[2:]) <= _LARGEST_MAP:
            of_weight = _correlation(x, grad, reach)
        elif patches is not None and ctx.side >= _SMALLEST_PATCH:
            tiles = _tiles(x, patches, ctx.grid, ctx.side, reach)
            of_weight = _correlation(tiles, _tiles(grad, patches, ctx.grid, ctx.side, 0), 0)
        else:
            of_weight = conv2d_weight(x, weight.shape, grad, padding=reach, groups=channels)  # type: ignore[no-untyped-call]
        return of_x.to(ctx.kind), of_weight.to(weight.dtype), None, None, None


def _correlation(x: Tensor, kernels: Tensor, padding: int) -> Tensor:
    """Each channel of each sample, (V, C, H, W), with its kernel (V, C, h, w), summed over V."""
    # oneDNN is fastest with one channel after the other in memory.
    one = x.contiguous().view(1, -1, *x.shape[2:])
    flat = kernels.contiguous().view(-1, 1, *kernels.shape[2:])
    out = F.conv2d(one, flat, padding=padding, groups=len(flat))
    return out.view(*x.shape[:2], *out.shape[2:]).sum(0)[:, None]


def _tiles(x: Tensor, patches: Tensor, grid: int, side: int, reach: int) -> Tensor:
    """The visible patches, each with `reach` sites around it: (V, C, side + 2 reach, same)."""
    width = side + 2 * reach
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, reach, reach, reach, reach))
    windows = padded.unfold(1, width, side).unfold(2, width, side)
    return windows[patches // grid**2, patches % grid**2 // grid, patches % grid]
