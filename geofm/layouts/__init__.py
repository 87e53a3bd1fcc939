"""Upstream checkpoint layouts, turned into the names and shapes of geofm's models.

A layout knows tensors and names, no files. `convert` unwraps what a
checkpoint file holds, recognises the layout and returns a plain state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geofm.errors import LayoutError
from geofm.layouts import globalgeotree, mmearth, native, ssl4eco

__all__ = ["LAYOUTS", "Layout", "convert", "unwrap"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints are written.

    Attributes:
        name: What a weight card calls it.
        matches: Whether a state dict is in this layout.
        convert: The state dict under geofm's names.
    """

    name: str
    matches: Callable[[State], bool]
    convert: Callable[[State], State]


# In the order in which they are tried: the most particular first.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("globalgeotree", globalgeotree.matches, globalgeotree.convert),
        Layout("mmearth", mmearth.matches, mmearth.convert),
        Layout("ssl4eco_sequential", ssl4eco.matches_sequential, ssl4eco.convert_sequential),
        Layout("ssl4eco_moco", ssl4eco.matches_moco, ssl4eco.convert_moco),
        Layout("native", native.matches, native.convert),
    )
}

# The keys under which training scripts keep the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema")
# What DistributedDataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


def unwrap(content: Any) -> State:
    """The state dict inside what a checkpoint file holds.

    Args:
        content: A state dict, or a dictionary that has one under ``state_dict``,
            ``model_state_dict`` or ``model``.

    Returns:
        Names and tensors; entries that are not tensors are left out.

    Raises:
        LayoutError: There are no tensors.
    """
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if state:
            return state
    keys = list(content) if isinstance(content, Mapping) else type(content).__name__
    raise LayoutError(
        f"found no state dict: expected tensors by name, or a dictionary with one under "
        f"{', '.join(_WRAPPERS)}; the file holds {keys}"
    )


def convert(state: Mapping[str, Tensor], layout: str | None = None) -> tuple[State, str]:
    """Turn a state dict into the names and shapes of geofm's models.

    Args:
        state: Names and tensors as in the file.
        layout: Name of the layout it must be in; None to recognise it.

    Returns:
        The state dict, and the name of its layout.

    Raises:
        LayoutError: No layout fits, the stated one does not fit, or it is unknown.
    """
    if layout is not None and layout not in LAYOUTS:
        raise LayoutError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    state = dict(state)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    tried = [LAYOUTS[layout]] if layout else list(LAYOUTS.values())
    for candidate in tried:
        if candidate.matches(state):
            return candidate.convert(state), candidate.name
    names = ", ".join(candidate.name for candidate in tried)
    keys = ", ".join(list(state)[:8])
    raise LayoutError(
        f"the checkpoint is in no known layout (tried: {names}). "
        f"It has {len(state)} tensors, the first: {keys}"
    )
