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
from geofm.errors import ModelError
from geofm.registry import Architecture, timm_config

__all__: list[str] = []


def _config_of_card(architecture: Architecture, card: WeightCard) -> dict[str, Any]:
    config = timm_config(architecture, card.arguments)
    if card.source.kind == "huggingface":
        config |= {"hf_hub_id": card.source.repo, "hf_hub_filename": card.source.filename}
    else:
        config["url"] = card.source.url or str(card.path.parent / str(card.source.filename))
    return config | {"license": card.licence.weights}


def _configs(architecture: Architecture) -> dict[str, dict[str, Any]]:
    cards = registry.cards_of(architecture)
    if not cards:
        card = published_cards()[architecture.input_card]
        return {architecture.name: timm_config(architecture, card.arguments)}
    # timm takes the first as the default; a trailing * marks it.
    return {
        f"{architecture.name}.{tag}{'*' if card.default else ''}": _config_of_card(
            architecture, card
        )
        for tag, card in cards.items()
    }


def _entry_point(architecture: Architecture) -> Callable[..., nn.Module]:
    def build(
        pretrained: Any = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        feature_cls: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        # The factory imports timm, which is what is being imported when this module is.
        from geofm.factory import create_model

        overlay = dict(pretrained_cfg_overlay or {})
        path = overlay.pop("file", None)
        if overlay or feature_cls not in (None, "getter"):
            raise ModelError(
                f"{architecture.name} takes no {', '.join(overlay) or f'feature_cls={feature_cls}'}"
                f" through timm; what a checkpoint is stands on its card"
            )
        if path and pretrained:
            pretrained = path
        tag = pretrained_cfg if isinstance(pretrained_cfg, str) and pretrained_cfg else None
        if kwargs.get("features_only"):
            # timm's feature pyramids feed decoders, which need cells that tile the image.
            kwargs = dict(architecture.aligned or {}) | kwargs
        name = f"{architecture.name}.{tag}" if tag else architecture.name
        return create_model(name, pretrained=pretrained, **kwargs)

    build.__name__ = build.__qualname__ = architecture.name
    build.__module__ = __name__
    build.__doc__ = f"geofm's {architecture.name}; see geofm.create_model."
    return build


_ENCODERS = [a for a in registry.architectures().values() if a.kind == "encoder"]
default_cfgs = generate_default_cfgs(
    {name: config for a in _ENCODERS for name, config in _configs(a).items()}
)
for _architecture in _ENCODERS:
    globals()[_architecture.name] = register_model(_entry_point(_architecture))
