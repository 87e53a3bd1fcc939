"""The published MP-MAE U-Net for segmentation.

Source: Nedungadi et al., MMEarth, ECCV 2024 (arXiv 2405.02771) and its code. The encoder is an
`MPMAE` with aligned padding; the decoder's parameter names are the published ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from geofm.errors import ModelError
from geofm.models.mpmae import LAYER_NORM_EPS, MPMAE

__all__ = ["MPMAEUNet"]


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, 3×3 convolution, LayerNorm, GELU.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, **dd)
        self.norm = LayerNorm2d(outputs, eps=LAYER_NORM_EPS, **dd)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample to `size`, the size of the skip connection that follows.

        Args:
            x: (N, inputs, h, w).
            size: Height and width of the result. Taking the skip's own size instead of a factor of
                two gives the same for tiles that divide evenly, and fits for those that do not.

        Returns:
            (N, outputs, *size).
        """
        return F.gelu(self.norm(self.conv(F.interpolate(x, size=size, mode="nearest"))))


class MPMAEUNet(MPMAE):
    """U-Net on an MP-MAE encoder: class scores of every pixel.

    Skips, deepest first: stages 2 and 1, the stem's output, the initial convolution's output; the
    output of stage 0 feeds stage 1 only.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 returns the decoder's features, ``dims[0] / 2`` channels.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        patch_size: Pixels of one cell of the last stage, a multiple of 8.
        img_size: Side of the tiles the weights were trained on, in px; any size runs.
        drop_rate: Dropout (of whole channels) before the head.
        drop_path_rate: Stochastic depth of the encoder's last block.
        grn_eps: As in `MPMAE`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    head_prefixes = ("upsample_layers.", "initial_conv_upsample.", "head.")

    def __init__(
        self,
        in_chans: int = 12,
        num_classes: int = 0,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (40, 80, 160, 320),
        patch_size: int = 8,
        img_size: int | tuple[int, int] = 56,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        grn_eps: float = 1e-4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="",
            depths=depths,
            dims=dims,
            patch_size=patch_size,
            img_size=img_size,
            stem_padding="aligned",
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            grn_eps=grn_eps,
            device=device,
            dtype=dtype,
        )
        self.register_load_state_dict_pre_hook(_drop_unused_norm)  # type: ignore[no-untyped-call]

    def _build_head(self, global_pool: str, dims: Sequence[int], dd: dict[str, Any]) -> None:
        # What the encoder map is concatenated with after each upsampling.
        skips = (dims[2], dims[1], dims[0], dims[0])
        outputs = (dims[2], dims[1], dims[0], dims[0])
        inputs = (dims[3], *(out + skip for out, skip in zip(outputs, skips, strict=True)))
        self.upsample_layers = nn.ModuleList(
            Upsample(inputs[i], outputs[i], **dd) for i in range(len(outputs))
        )
        self.initial_conv_upsample = nn.Sequential(
            nn.Conv2d(inputs[-1], dims[0] // 2, 3, padding=1, **dd),
            LayerNorm2d(dims[0] // 2, eps=LAYER_NORM_EPS, **dd),
            nn.GELU(),
        )
        self.head_hidden_size = dims[0] // 2
        self.head = _pointwise(self.head_hidden_size, self.num_classes, **dd)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the 1×1 head by a new one.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: Only None or ``""``: a segmentation model does not pool.

        Raises:
            ModelError: Pooling was asked for.
        """
        if global_pool:
            raise ModelError("a U-Net labels pixels and cannot pool; use mpmae_* to classify tiles")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = _pointwise(
            self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype
        )
        self.head.train(self.training)
        if isinstance(self.head, nn.Conv2d):
            trunc_normal_(self.head.weight, std=0.02)
            assert self.head.bias is not None
            nn.init.zeros_(self.head.bias)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Refused: a pruned U-Net would be an encoder.

        Args:
            indices: Ignored.
            prune_norm: Ignored.
            prune_head: Ignored.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "a U-Net has no features_only form; use mpmae_* with features_only=True and "
            "stem_padding='aligned', which has the same encoder"
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Decoder features of every pixel.

        Args:
            x: Prepared pixels, (N, in_chans, H, W).

        Returns:
            (N, dims[0] / 2, H, W).
        """
        full = self.initial_conv(x)
        stem = self.stem(full)
        stage1 = self.stages[1](self.downsample_layers[0](self.stages[0](stem)))
        stage2 = self.stages[2](self.downsample_layers[1](stage1))
        x = self.stages[3](self.downsample_layers[2](stage2))
        for layer, skip in zip(self.upsample_layers, (stage2, stage1, stem, full), strict=True):
            x = torch.cat((layer(x, skip.shape[-2:]), skip), dim=1)
        out: Tensor = self.initial_conv_upsample(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify every pixel's features.

        Args:
            x: Decoder features, (N, dims[0] / 2, H, W).
            pre_logits: Return them as they are.

        Returns:
            (N, num_classes, H, W).
        """
        if pre_logits:
            return x
        out: Tensor = self.head(F.dropout2d(x, self.drop_rate, training=self.training))
        return out


def _pointwise(inputs: int, outputs: int, **dd: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, **dd) if outputs > 0 else nn.Identity()


def _drop_unused_norm(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # The published U-Net inherits the classifier's final norm and never applies it. A parameter
    # without a gradient stops DistributedDataParallel, so ours has none and reads such files.
    state.pop(f"{prefix}norm.weight", None)
    state.pop(f"{prefix}norm.bias", None)
