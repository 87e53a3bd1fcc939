"""SSL4Eco's contrastive checkpoints: the query encoder, under torchvision's names.

Source: the published checkpoints of Plekhanova et al., EarthVision 2025 (arXiv 2504.18256):
SeCo-Eco (a Lightning checkpoint, the ResNet's children in sequence) and MoCo-Eco (the layout of
the MoCo v2 code).
"""

from __future__ import annotations

import re

from torch import Tensor

from geofm.errors import LayoutError

__all__ = ["convert_moco", "convert_sequential", "matches_moco", "matches_sequential"]

# Positions of a torchvision ResNet's children: 2 (relu) and 3 (maxpool) have no weights.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# The rest of the contrastive learner: momentum encoder, projection heads, negatives.
_LEARNER = ("encoder_k.", "heads_q.", "heads_k.", "queue")
_SEQUENTIAL = re.compile(r"encoder_q\.\d+\.")


def matches_sequential(state: dict[str, Tensor]) -> bool:
    """Whether the query encoder's entries are numbered (SeCo-Eco).

    Args:
        state: Names and tensors.

    Returns:
        True for SeCo-Eco's layout.
    """
    return any(_SEQUENTIAL.match(key) for key in state)


def matches_moco(state: dict[str, Tensor]) -> bool:
    """Whether the query encoder's entries are named (MoCo-Eco).

    Args:
        state: Names and tensors.

    Returns:
        True for MoCo-Eco's layout.
    """
    return "encoder_q.conv1.weight" in state


def convert_sequential(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a ResNet from a SeCo-Eco checkpoint.

    Args:
        state: ``encoder_q.<position>.*`` and the contrastive learner.

    Returns:
        Names and tensors of `geofm.models.ssl4eco.SSL4EcoResNet`, without head.

    Raises:
        LayoutError: A position or a name is unknown.
    """
    encoder = _query_encoder(state)
    out = {}
    for key, value in encoder.items():
        position, _, rest = key.partition(".")
        if position not in _CHILDREN:
            raise LayoutError(
                f"encoder_q.{key} is at position {position}; a ResNet's weights are at "
                f"{', '.join(_CHILDREN)}"
            )
        out[f"{_CHILDREN[position]}.{rest}"] = value
    return out


def convert_moco(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a ResNet from a MoCo-Eco checkpoint; its projection head ``fc`` is left out.

    Args:
        state: ``encoder_q.<torchvision name>`` and the contrastive learner.

    Returns:
        Names and tensors of `geofm.models.ssl4eco.SSL4EcoResNet`, without head.

    Raises:
        LayoutError: A name is unknown.
    """
    encoder = _query_encoder(state)
    return {key: value for key, value in encoder.items() if not key.startswith("fc.")}


def _query_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    strange = [key for key in state if not key.startswith(("encoder_q.", *_LEARNER))]
    if strange:
        raise LayoutError(
            f"a contrastive checkpoint with {len(strange)} unknown entries: "
            f"{', '.join(strange[:5])}"
        )
    prefix = "encoder_q."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
