"""MP-MAE encoders: ConvNeXt V2 with a stem for small satellite tiles.

Source: Nedungadi et al., MMEarth, ECCV 2024 (arXiv 2405.02771); ConvNeXt V2 blocks and global
response normalization (GRN): Woo et al., CVPR 2023 (arXiv 2301.00808).

The parameter names are the published ones, so a published dense checkpoint loads as it is.
"""
# No `from __future__ import annotations`: torch.fx and TorchScript read the annotations as types.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d, trunc_normal_
from timm.layers import calculate_drop_path_rates as drop_path_rates_of
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from geofm.errors import ModelError
from geofm.models.gelu import GELU
from geofm.models.grn import GlobalResponseNorm, grn_linear

__all__ = ["MPMAE", "VARIANTS", "Block", "grid_size"]

LAYER_NORM_EPS = 1e-6
# The dense published encoder uses 1e-4, the sparse pretraining encoder 1e-6.
GRN_EPS = 1e-4

# An upstream patch of 8 px is one pixel of the last stage, which is reached by three halvings.
_HALVINGS = 8


class Block(nn.Module):
    """ConvNeXt V2 block: ``x + drop_path(pw2(GRN(GELU(pw1(LN(dw7x7(x)))))))``.

    Args:
        dim: Channels in and out; the hidden layer has four times as many.
        drop_path: Probability of dropping the residual branch of a sample.
        grn_eps: Added to the mean response in the GRN.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        grn_eps: float = GRN_EPS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **dd)
        self.pwconv1 = nn.Linear(dim, 4 * dim, **dd)
        self.act = GELU()
        self.grn = GlobalResponseNorm(4 * dim, **dd)
        self.pwconv2 = nn.Linear(4 * dim, dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.grn_eps = grn_eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Feature map, (N, C, H, W).

        Returns:
            (N, C, H, W).
        """
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.act(self.pwconv1(self.norm(y)))
        y = grn_linear(
            y,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
            self.grn_eps,
        )
        out: Tensor = x + self.drop_path(y.permute(0, 3, 1, 2))
        return out


class Stage(nn.Sequential):
    """The blocks of one stage.

    Args:
        *blocks: Each a `Block`.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks, recomputing them in the backward pass if asked to.

        Args:
            x: Feature map, (N, C, H, W).

        Returns:
            (N, C, H, W).
        """
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class MPMAE(nn.Module):
    """MP-MAE encoder with timm's interface.

    The stem keeps full resolution (3×3 convolution) and then reduces by ``k = patch_size / 8`` with
    a depthwise k×k convolution; the four stages have strides k, 2k, 4k, 8k.

    Args:
        in_chans: Input channels.
        num_classes: Outputs of the linear head; 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` (timm's names) or ``""`` for none: then the
            output keeps its space, (N, C, H, W).
        depths: Blocks of each stage.
        dims: Channels of each stage.
        patch_size: Pixels of one cell of the last stage, a multiple of 8: 8 for the 56 px models,
            16 for the 112 px models.
        img_size: Side of the square tiles the weights were trained on, in px. Any size runs: this
            is recorded for timm's configuration and changes nothing.
        stem_padding: ``"classification"``: the 3×3 convolution is unpadded and the k×k one is
            padded by k // 2, as in the published classification encoder (56 px → 54, 27, 13, 6).
            ``"aligned"``: the 3×3 convolution is padded by 1 and the k×k one is not, as in
            pretraining and in the published U-Net (56 px → 56, 28, 14, 7), so that a cell covers
            exactly ``patch_size`` pixels. The weights are the same.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        grn_eps: Added to the mean response in every GRN: 1e-4 in the published dense encoder, 1e-6
            in the sparse pretraining encoder.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ModelError: `patch_size` is not a multiple of 8 or `stem_padding` is unknown.
    """

    # Parameters of the head: absent from a pretraining checkpoint, then left as initialised.
    head_prefixes: tuple[str, ...] = ("norm.", "head.")

    def __init__(
        self,
        in_chans: int = 12,
        num_classes: int = 0,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (40, 80, 160, 320),
        patch_size: int = 8,
        img_size: int | tuple[int, int] = 56,
        stem_padding: str = "classification",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        grn_eps: float = GRN_EPS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(patch_size, int) or patch_size < _HALVINGS or patch_size % _HALVINGS:
            raise ModelError(f"patch_size must be a multiple of {_HALVINGS}, got {patch_size!r}")
        if stem_padding not in ("classification", "aligned"):
            raise ModelError(
                f"stem_padding must be 'classification' (as the published classification encoder) "
                f"or 'aligned' (as pretraining and the U-Net), got {stem_padding!r}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        k = patch_size // _HALVINGS
        aligned = stem_padding == "aligned"

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.img_size = img_size
        self.stem_padding = stem_padding
        self.drop_rate = drop_rate
        # Where the first cell of the last stage's map begins, in input pixels from the edge. With
        # aligned padding cells tile the image; otherwise the unpadded 3×3 convolution moves them by
        # 1, and the padding of the k×k one back by k // 2.
        self.cell_offset = 0.0 if aligned else 1.0 - k // 2
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": k * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]

        self.initial_conv = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 3, padding=1 if aligned else 0, **dd),
            LayerNorm2d(dims[0], eps=LAYER_NORM_EPS, **dd),
            GELU(),
        )
        self.stem = nn.Sequential(
            nn.Conv2d(
                dims[0],
                dims[0],
                k,
                stride=k,
                padding=0 if aligned else k // 2,
                groups=dims[0],
                **dd,
            ),
            LayerNorm2d(dims[0], eps=LAYER_NORM_EPS, **dd),
        )
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(
                LayerNorm2d(dims[i], eps=LAYER_NORM_EPS, **dd),
                nn.Conv2d(dims[i], dims[i + 1], 2, stride=2, **dd),
            )
            for i in range(len(dims) - 1)
        )
        rates: Any = drop_path_rates_of(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            Stage(*(Block(dim, rates[i][j], grn_eps, **dd) for j in range(depths[i])))
            for i, dim in enumerate(dims)
        )
        self._build_head(global_pool, dims, dd)
        self.init_weights()

    @classmethod
    def arguments_in(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that a state dict implies.

        Args:
            state: Names and tensors of such a model.

        Returns:
            ``in_chans``, ``patch_size``, ``depths`` and ``dims``.

        Raises:
            KeyError: A layer that every such model has is absent; its name.
        """
        places = [tuple(key.split(".")[1:3]) for key in state if key.startswith("stages.")]
        stages = sorted({int(stage) for stage, _ in places})
        return {
            "in_chans": state["initial_conv.0.weight"].shape[1],
            "patch_size": state["stem.0.weight"].shape[-1] * _HALVINGS,
            "depths": tuple(len({b for s, b in set(places) if int(s) == i}) for i in stages),
            "dims": tuple(state[f"stages.{i}.0.norm.weight"].shape[0] for i in stages),
        }

    def _build_head(self, global_pool: str, dims: Sequence[int], dd: dict[str, Any]) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=LAYER_NORM_EPS, **dd)
        self.head = _linear(dims[-1], self.num_classes, **dd)

    def init_weights(self) -> None:
        """Initialise all parameters: truncated normal, σ 0.02, as published; GRN starts at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, GlobalResponseNorm):
                nn.init.zeros_(module.gamma)
                nn.init.zeros_(module.beta)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for timm's layer-wise learning-rate decay.

        Args:
            coarse: One group a stage instead of one a block.

        Returns:
            A matcher for ``timm.models.group_parameters``.
        """
        blocks: Any = [
            (r"^stages\.(\d+)\.(\d+)", None),
            # The reduction after stage i is a layer of its own, after all of the stage's blocks.
            (r"^downsample_layers\.(\d+)", (1000,)),
        ]
        if coarse:
            blocks = [(r"^stages\.(\d+)", None), (r"^downsample_layers\.(\d+)", (0.5,))]
        return {"stem": r"^initial_conv|^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and vectors: GRN's (1, 1, 1, D).

        Returns:
            Their names.
        """
        return {name for name, _ in self.named_parameters() if ".grn." in name}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Args:
            enable: Switch on or off.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """The linear head, or an identity where there is none.

        Returns:
            The module.
        """
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: New pooling; None keeps the current one.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=global_pool, flatten=bool(global_pool)
            )
        parameter = next(self.parameters())
        self.head = _linear(
            self.num_features, num_classes, device=parameter.device, dtype=parameter.dtype
        )
        self.head.train(self.training)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map of the last stage.

        Args:
            x: Prepared pixels, (N, in_chans, H, W).

        Returns:
            (N, num_features, h, w), with one cell per `patch_size` pixels.
        """
        x = self.stem(self.initial_conv(x))
        # Written for TorchScript, which can iterate over modules but not index or slice them.
        for index, stage in enumerate(self.stages):
            for before, downsample in enumerate(self.downsample_layers):
                if before + 1 == index:
                    x = downsample(x)
            x = stage(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages.

        Args:
            x: Prepared pixels, (N, in_chans, H, W).
            indices: The last n stages if a number, all if None, else these stages.
            norm: Has no effect: the norm belongs to the pooled head. Kept for timm's interface.
            stop_early: Do not run stages after the last one asked for.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return the list alone.

        Returns:
            The maps, (N, C_i, H_i, W_i) each; with the map of the last stage run before them
            unless `intermediates_only`.

        Raises:
            ModelError: Another output format was asked for.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(self.initial_conv(x))
        for index in range(last + 1 if stop_early else len(self.stages)):
            if index > 0:
                x = self.downsample_layers[index - 1](x)
            x = self.stages[index](x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last one asked for, and the head.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Has no effect: the norm goes with the head.
            prune_head: Remove the head even where all stages stay.

        Returns:
            The stages kept as outputs.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        prune_end = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[:last]
        if prune_end:
            self.num_features = self.head_hidden_size = int(self.feature_info[last]["num_chs"])
        if prune_head or prune_end:
            self.norm = nn.Identity()
            self.reset_classifier(0, "")
        return list(take)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise and classify a feature map.

        Args:
            x: Map of the last stage, (N, C, h, w).
            pre_logits: Stop before dropout and the linear layer.

        Returns:
            (N, num_classes), or (N, C) without a head; with a trailing (h, w) where `global_pool`
            is ``""``.
        """
        pooled = not self.global_pool.is_identity()  # type: ignore[no-untyped-call]
        x = self.global_pool(x)
        x = self.norm(x if pooled else x.permute(0, 2, 3, 1))
        if not pre_logits:
            x = self.head(F.dropout(x, self.drop_rate, training=self.training))
        return x if pooled else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features or logits of tiles.

        Args:
            x: Prepared pixels, (N, in_chans, H, W).

        Returns:
            As `forward_head`.
        """
        return self.forward_head(self.forward_features(x))


def grid_size(size: int, patch_size: int, stem_padding: str = "classification") -> int:
    """Cells along a side of the last stage's map.

    Args:
        size: Pixels along the side of the tile.
        patch_size: As given to `MPMAE`.
        stem_padding: As given to `MPMAE`.

    Returns:
        For 56 px and patches of 8: 6, or 7 with aligned padding.
    """
    k = patch_size // _HALVINGS
    if stem_padding == "aligned":
        return size // k // _HALVINGS
    return (size - 2 + 2 * (k // 2)) // k // _HALVINGS


def _linear(inputs: int, outputs: int, **dd: Any) -> nn.Module:
    return nn.Linear(inputs, outputs, **dd) if outputs > 0 else nn.Identity()


# Depths and widths of the stages: arXiv 2301.00808, table 14 of its appendix; the published MP-MAE
# sizes are atto and tiny.
VARIANTS: dict[str, dict[str, Any]] = {
    "atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},
    "pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},
    "nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "huge": {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)},
}
