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


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the names are the models' own.

    Args:
        state: Names and tensors.
    """
    state = _without_wrapper(state)
    return any(first in state for first in _FIRST)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict, without a wrapper's ``module.`` prefix.

    Args:
        state: Names and tensors.

    Returns:
        Names and tensors.
    """
    return _without_wrapper(state)


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # DistributedDataParallel and torch.compile put every name below one more module.
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
