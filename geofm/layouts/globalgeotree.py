"""GlobalGeoTree's checkpoint: CLIP towers under the names of transformers 4.24.

Source: the published checkpoint of Mu et al., 2025 (arXiv 2505.12513).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geofm.errors import LayoutError

__all__ = ["convert", "matches"]

_VISION = "temporal_extractor.clip_vit.model.vision_model."
_TEXT = "text_encoder.text_encoder.text_model."
# Plain renamings, longest first.
_PREFIXES = {
    "temporal_extractor.temporal_attention.attn.": "series.attention.",
    "auxiliary_encoder.geo_encoder.": "auxiliary.groups.geo.",
    "auxiliary_encoder.terrain_encoder.": "auxiliary.groups.terrain.",
    "auxiliary_encoder.soil_encoder.": "auxiliary.groups.soil.",
    "auxiliary_encoder.bio_encoder.": "auxiliary.groups.bio.",
    "auxiliary_encoder.fusion.": "auxiliary.fusion.",
    "image_projection.": "image_projection.",
    "aux_projection.": "auxiliary_projection.",
    "fusion.": "fusion.",
}
_VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm.weight": "norm_pre.weight",
    "pre_layrnorm.bias": "norm_pre.bias",
}
_TEXT_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
# Parts of a layer: (transformers, timm, open_clip).
_LAYER = (
    ("layer_norm1.", "norm1.", "ln_1."),
    ("layer_norm2.", "norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.fc2.", "mlp.c_proj."),
    ("self_attn.out_proj.", "attn.proj.", "attn.out_proj."),
)


def matches(state: dict[str, Tensor]) -> bool:
    """Whether this is a GeoTreeCLIP checkpoint.

    Args:
        state: Names and tensors.

    Returns:
        True if the vision tower is there.
    """
    return any(key.startswith(_VISION) for key in state)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of `geofm.models.geotreeclip.GeoTreeCLIP`.

    Args:
        state: Names and tensors as published, with or without ``position_ids``.

    Returns:
        Names and tensors. The unused norm after the vision transformer is left out; the published
        factor of the cosine similarities, which is not in the file, is added as ``logit_scale``.

    Raises:
        LayoutError: A name is unknown, or a part of an attention layer is missing.
    """
    out: dict[str, Tensor] = {"logit_scale": torch.tensor(math.log(100.0))}
    strange = []
    for key, value in state.items():
        if key.endswith("position_ids") or key.startswith(f"{_VISION}post_layernorm."):
            continue
        name = _name(key)
        if name is None:
            strange.append(key)
        elif name.endswith(("cls_token", "pos_embed")):
            out[name] = value.reshape(1, -1, value.shape[-1])
        elif not name.endswith(("q", "k", "v")):
            out[name] = value
    if strange:
        raise LayoutError(
            f"a GeoTreeCLIP checkpoint with {len(strange)} unknown entries: "
            f"{', '.join(strange[:5])}"
        )
    out |= _fused(state, _VISION, "series.trunk.blocks", ("attn.qkv.weight", "attn.qkv.bias"))
    out |= _fused(
        state, _TEXT, "text.transformer.resblocks", ("attn.in_proj_weight", "attn.in_proj_bias")
    )
    return out


def _name(key: str) -> str | None:
    """Our name; one that ends in q, k or v for a projection that is fused elsewhere."""
    for old, new in _PREFIXES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    for prefix, names, ours, blocks, column in (
        (_VISION, _VISION_NAMES, "series.trunk.", "blocks", 1),
        (_TEXT, _TEXT_NAMES, "text.", "transformer.resblocks", 2),
    ):
        if not key.startswith(prefix):
            continue
        rest = key.removeprefix(prefix)
        if rest in names:
            return ours + names[rest]
        number, _, part = rest.removeprefix("encoder.layers.").partition(".")
        if rest == f"encoder.layers.{number}.{part}" and number.isdecimal():
            if part.startswith(("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")):
                return f"{ours}{blocks}.{number}.{part[10]}"
            for row in _LAYER:
                if part.startswith(row[0]):
                    return f"{ours}{blocks}.{number}.{row[column]}{part.removeprefix(row[0])}"
    return None


def _fused(
    state: dict[str, Tensor], prefix: str, blocks: str, names: tuple[str, str]
) -> dict[str, Tensor]:
    """Query, key and value projections, one after the other in one tensor."""
    out = {}
    start = f"{prefix}encoder.layers."
    numbers = sorted({int(k[len(start) :].split(".")[0]) for k in state if k.startswith(start)})
    for number in numbers:
        for kind, name in zip(("weight", "bias"), names, strict=True):
            parts = [f"{start}{number}.self_attn.{p}_proj.{kind}" for p in "qkv"]
            missing = [part for part in parts if part not in state]
            if missing:
                raise LayoutError(f"a GeoTreeCLIP checkpoint without {missing[0]}")
            out[f"{blocks}.{number}.{name}"] = torch.cat([state[part] for part in parts])
    return out
