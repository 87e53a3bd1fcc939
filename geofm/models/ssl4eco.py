"""SSL4Eco encoders: timm's ResNet and Vision Transformer for Sentinel-2 bands.

Source: Plekhanova et al., SSL4Eco, EarthVision at CVPR 2025 (arXiv 2504.18256). The published
encoders (SeCo-Eco, MoCo-Eco) are ResNet-50; the Vision Transformers have no published weights.
"""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer

__all__ = ["RESNETS", "VITS", "SSL4EcoResNet", "SSL4EcoViT"]


class SSL4EcoResNet(ResNet):
    """timm's ResNet (names and layout are torchvision's), nine input channels and no head by default.

    Args:
        in_chans: Input channels.
        num_classes: Outputs of the linear head; 0 for none.
        **kwargs: Arguments of ``timm.models.resnet.ResNet``.
    """

    # Parameters of the head: absent from a pretraining checkpoint, then left as initialised.
    head_prefixes: tuple[str, ...] = ("fc.",)

    def __init__(self, in_chans: int = 9, num_classes: int = 0, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, **kwargs)


class SSL4EcoViT(VisionTransformer):
    """timm's Vision Transformer, nine input channels and no head by default.

    Args:
        in_chans: Input channels.
        num_classes: Outputs of the linear head; 0 for none.
        dynamic_img_size: Accept tiles of any size that is a multiple of the patch, by
            interpolating the position embedding.
        **kwargs: Arguments of ``timm.models.vision_transformer.VisionTransformer``.
    """

    head_prefixes: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        in_chans: int = 9,
        num_classes: int = 0,
        dynamic_img_size: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            dynamic_img_size=dynamic_img_size,
            **kwargs,
        )


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
