"""Plain state dicts that already have the models' own names: geofm's, timm's, torchvision's."""

from __future__ import annotations

from torch import Tensor

__all__ = ["convert", "matches"]

# The first layers of the model families, by which a plain state dict is known.
_FIRST = (
    "initial_conv.0.weight",
    "conv1.weight",
    "patch_embed.proj.weight",
    "series.trunk.patch_embed.proj.weight",
)


# Under what training modules keep their encoder: timm's feature pyramids, Lightning, decoders.
_HOLDERS = ("model.", "encoder.", "backbone.")


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the names are the models' own.

    Args:
        state: Names and tensors.

    Returns:
        True if the first layer of a model family is there.
    """
    state = _without_holder(state)
    return any(first in state for first in _FIRST)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict, without the prefix of a module that holds the model alone.

    Args:
        state: Names and tensors.

    Returns:
        Names and tensors; the vectors of a GRN layer in the shape (1, 1, 1, D).
    """
    return {
        key: value.reshape(1, 1, 1, -1) if key.endswith((".grn.gamma", ".grn.beta")) else value
        for key, value in _without_holder(state).items()
    }


def _without_holder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _HOLDERS:
        if state and all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state
