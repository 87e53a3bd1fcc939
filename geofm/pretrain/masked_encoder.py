"""The MP-MAE encoder on visible patches alone, in plain tensors; and the decoder on all of them.

The published pretraining encoder runs on sparse tensors (submanifold convolutions): a site exists
only where its patch is visible. Here the sites of visible patches are the rows of a matrix. What
works on single sites (norms, linear layers, GRN) and within a patch (stem, downsampling) runs on
these rows; only the depthwise 7×7 convolution, whose window crosses patches, runs on the whole
grid, with zeros at the removed patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geofm.models.grn import grn_linear
from geofm.models.mpmae import LAYER_NORM_EPS, MPMAE, Block
from geofm.pretrain.depthwise import depthwise
from geofm.pretrain.visible import Visible

__all__ = ["decode", "encode_visible"]


def encode_visible(encoder: MPMAE, pixels: Tensor, visible: Visible, grn_scope: str) -> Tensor:
    """Features of the visible patches.

    Args:
        encoder: With aligned padding.
        pixels: Prepared input, (N, C, H, W), in squares of patches.
        visible: Which patches are visible.
        grn_scope: ``"sample"`` or ``"batch"``: the visible sites that global response
            normalization goes over.

    Returns:
        One row per visible patch, (V, num_features).
    """
    x = _initial(encoder.initial_conv, pixels, visible, encoder.patch_size)
    conv, norm = _two(encoder.stem)
    x = _norm(_reduce_depthwise(x, conv), norm)
    scopes = visible.count if grn_scope == "sample" else 1
    for index, stage in enumerate(encoder.stages):
        if index > 0:
            norm, conv = _two(encoder.downsample_layers[index - 1])
            x = _reduce(_norm(x, norm), conv)
        side = x.shape[1]
        sites = visible.sites(side)
        rows = x.flatten(0, 2)
        for block in stage.children():
            rows = _block(rows, block, visible, sites, side, scopes)
        x = rows.view(-1, side, side, rows.shape[-1])
    return x.flatten(0, 2)


def decode(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Run the decoder's blocks.

    Args:
        blocks: Each a `Block`.
        x: All patches, (N, C, h, w), channels last in memory.

    Returns:
        (N, h, w, C).
    """
    count, channels, height, width = x.shape
    out = x.permute(0, 2, 3, 1)
    for block in blocks:
        assert isinstance(block, Block)
        y = depthwise(out.permute(0, 3, 1, 2), block.dwconv.weight)
        y = _pointwise(y.permute(0, 2, 3, 1).reshape(-1, channels), block, count)
        out = out + y.view(count, height, width, channels)
    return out


def _initial(layer: nn.Sequential, pixels: Tensor, visible: Visible, patch: int) -> Tensor:
    """The 3×3 convolution, its norm and activation on visible patches: (V, patch, patch, C)."""
    conv, norm, act = layer
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    seen = pixels * visible.pixel_mask(patch, pixels.dtype)
    # Each visible patch with the ring of pixels around it that the convolution reaches.
    tiles = F.pad(seen, (1, 1, 1, 1)).unfold(2, patch + 2, patch).unfold(3, patch + 2, patch)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[visible.patches]
    x = F.conv2d(tiles.contiguous(memory_format=torch.channels_last), conv.weight)
    out: Tensor = act(_norm(x.permute(0, 2, 3, 1) + conv.bias, norm))
    return out


def _block(
    rows: Tensor, block: Any, visible: Visible, sites: Tensor, side: int, scopes: int
) -> Tensor:
    """`Block` on the rows of the visible sites, (S, C)."""
    assert isinstance(block, Block)
    dense = visible.to_grid(rows, side, sites)
    y = depthwise(dense, block.dwconv.weight, visible, side)
    return rows + _pointwise(y.permute(0, 2, 3, 1).flatten(0, 2)[sites], block, scopes)


def _pointwise(y: Tensor, block: Block, scopes: int) -> Tensor:
    """What follows the convolution in `Block`, on rows (S, C)."""
    # The bias is added to the rows: oneDNN's gradient of it costs as much as the weights'.
    assert block.dwconv.bias is not None
    y = y + block.dwconv.bias
    y = block.act(block.pwconv1(block.norm(y)))
    y = grn_linear(
        y.view(scopes, -1, 1, y.shape[-1]),
        block.grn.gamma,
        block.grn.beta,
        block.pwconv2.weight,
        block.pwconv2.bias,
        block.grn_eps,
    )
    return y.view(-1, y.shape[-1])


def _two(layers: nn.Module) -> tuple[Any, Any]:
    first, second = layers.children()
    return first, second


def _norm(x: Tensor, norm: Any) -> Tensor:
    """A channels-first layer norm's weights, on channels-last data."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, LAYER_NORM_EPS)


def _reduce(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose stride is its kernel, on patches (V, h, w, C) alone."""
    count, side, _, channels = x.shape
    k = conv.kernel_size[0]
    x = x.view(count, side // k, k, side // k, k, channels).permute(0, 1, 3, 2, 4, 5)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(x.flatten(3), weight, conv.bias)


def _reduce_depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """As `_reduce`, for a depthwise convolution."""
    assert conv.bias is not None
    if conv.kernel_size[0] == 1:
        return x * conv.weight.flatten() + conv.bias
    x = x.permute(0, 3, 1, 2)
    x = F.conv2d(x, conv.weight, stride=conv.stride, groups=conv.groups)
    return x.permute(0, 2, 3, 1) + conv.bias
