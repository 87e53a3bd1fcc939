"""SSL4Eco encoders: timm's ResNet and Vision Transformer for Sentinel-2 bands.

Source: Plekhanova et al., SSL4Eco, EarthVision at CVPR 2025 (arXiv 2504.18256). The published
encoders (SeCo-Eco, MoCo-Eco) are ResNet-50; the Vision Transformers have no published weights.
"""

from __future__ import annotations

import math
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["RESNETS", "VITS", "SSL4EcoResNet", "SSL4EcoViT"]


class SSL4EcoResNet(ResNet):
    """timm's ResNet (with torchvision's names); nine input channels, no head by default.

    Args:
        in_chans: Input channels.
        num_classes: Outputs of the linear head; 0 for none.
        **kwargs: Arguments of ``timm.models.resnet.ResNet``.
    """

    # Parameters of the head: absent from a pretraining checkpoint, then left as initialised.
    head_prefixes: tuple[str, ...] = ("fc.",)

    # Where the first cell of the last map begins, in input pixels. Every reduction of a ResNet is
    # centred on even pixels, so cell i is centred on pixel 32 i, not on the middle of 32 pixels.
    cell_offset: float = 0.5 - 32 / 2

    def __init__(self, in_chans: int = 9, num_classes: int = 0, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, **kwargs)

    @classmethod
    def arguments_in(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that a state dict implies.

        Args:
            state: Names and tensors of such a model.

        Returns:
            ``in_chans``, ``block`` and ``layers``.

        Raises:
            KeyError: A layer that every such model has is absent; its name.
        """
        blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
        return {
            "in_chans": state["conv1.weight"].shape[1],
            "block": Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock,
            "layers": tuple(sum(b[0] == f"layer{i}" for b in blocks) for i in range(1, 5)),
        }


class SSL4EcoViT(VisionTransformer):
    """timm's Vision Transformer, nine input channels and no head by default.

    Args:
        in_chans: Input channels.
        num_classes: Outputs of the linear head; 0 for none.
        global_pool: ``"avg"`` over the patch tokens, ``"token"`` (class token) or ``""`` (none).
        dynamic_img_size: Accept tiles of any size that is a multiple of the patch, by
            interpolating the position embedding.
        **kwargs: Arguments of ``timm.models.vision_transformer.VisionTransformer``.
    """

    head_prefixes: tuple[str, ...] = ("head.",)

    # Patches tile the image.
    cell_offset: float = 0.0

    def __init__(
        self,
        in_chans: int = 9,
        num_classes: int = 0,
        global_pool: str = "avg",
        dynamic_img_size: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            dynamic_img_size=dynamic_img_size,
            **kwargs,
        )

    @classmethod
    def arguments_in(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that a state dict implies.

        Args:
            state: Names and tensors of such a model.

        Returns:
            ``in_chans``, ``embed_dim``, ``depth`` and ``img_size``.

        Raises:
            KeyError: A layer that every such model has is absent; its name.
        """
        kernel = state["patch_embed.proj.weight"]
        tokens = state["pos_embed"].shape[1] - state["cls_token"].shape[1]
        return {
            "in_chans": kernel.shape[1],
            "embed_dim": kernel.shape[0],
            "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            "img_size": math.isqrt(tokens) * kernel.shape[-1],
        }


# Standard sizes: He et al. 2016 (arXiv 1512.03385), table 1; Dosovitskiy et al. 2021
# (arXiv 2010.11929), table 1, and Touvron et al. 2021 (arXiv 2012.12877) for tiny and small.
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
}
VITS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
