"""geofm's encoders under timm's names: ``timm.create_model("mpmae_atto", in_chans=12)``.

Each entry point calls `geofm.create_model`, so weights are found, verified and loaded in one place.
The U-Nets are not registered: timm's models are encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from geofm import registry
from geofm.cards import WeightCard, published_cards
from geofm.models.mpmae import grid_size
from geofm.registry import Architecture

__all__: list[str] = []


def _config(architecture: Architecture, card: WeightCard) -> dict[str, Any]:
    size = card.input.size
    patch = int(card.arguments.get("patch_size", 8))
    grid = grid_size(size, patch) if architecture.name.startswith("mpmae") else size // 32
    if architecture.name.startswith("ssl4eco_vit"):
        grid = size // 16
    channels = len(card.input.bands)
    own = card.model == architecture.weights_of
    source: dict[str, Any] = {}
    if own and card.source.kind == "huggingface":
        source = {"hf_hub_id": card.source.repo, "hf_hub_filename": card.source.filename}
    elif own:
        source = {"url": card.source.url or str(card.path.parent / str(card.source.filename))}
    return {
        **source,
        "num_classes": 0,
        "input_size": (channels, size, size),
        "pool_size": (grid, grid),
        # Normalization is the card's, done by geofm.create_transform.
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "first_conv": architecture.first_conv,
        "classifier": architecture.classifier,
        "license": card.licence.weights,
    }


def _configs(architecture: Architecture) -> dict[str, dict[str, Any]]:
    cards = registry.cards_of(architecture)
    if not cards:
        card = published_cards()[architecture.input_card]
        return {architecture.name: _config(architecture, card)}
    # timm takes the first as the default; a trailing * marks it.
    return {
        f"{architecture.name}.{tag}{'*' if card.default else ''}": _config(architecture, card)
        for tag, card in cards.items()
    }


def _entry_point(architecture: Architecture) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        feature_cls: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        from geofm.factory import create_model

        tag = pretrained_cfg if isinstance(pretrained_cfg, str) and pretrained_cfg else None
        if kwargs.get("features_only") and architecture.name.startswith("mpmae"):
            # timm's feature pyramids feed decoders, which need cells that tile the image.
            kwargs.setdefault("stem_padding", "aligned")
        name = f"{architecture.name}.{tag}" if tag else architecture.name
        return create_model(name, pretrained=pretrained, **kwargs)

    build.__name__ = build.__qualname__ = architecture.name
    build.__module__ = __name__
    build.__doc__ = f"geofm's {architecture.name}; see geofm.create_model."
    return build


_ENCODERS = [a for a in registry.architectures().values() if a.features_only]
default_cfgs = generate_default_cfgs(
    {name: config for a in _ENCODERS for name, config in _configs(a).items()}
)
for _architecture in _ENCODERS:
    globals()[_architecture.name] = register_model(_entry_point(_architecture))
