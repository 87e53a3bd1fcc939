"""MMEarth's pretraining checkpoints: sparse convolutions (MinkowskiEngine) to dense ones.

Source: the published checkpoints of Nedungadi et al., ECCV 2024 (arXiv 2405.02771).
"""

from __future__ import annotations

import math

from torch import Tensor

from geofm.errors import LayoutError

__all__ = ["convert", "matches"]

_ENCODER = "encoder."
# What only pretraining needs: the decoder, its heads and the loss.
_PRETRAINING = ("mask_token", "proj.", "decoder_dict.", "pred_dict.", "loss_fn.", "layer_norm_tmp.")
# The dense model's own parts, which fine-tuned files of the same code may hold beside the encoder.
_DENSE = ("norm.", "head.", "upsample_layers.", "initial_conv_upsample.")


def matches(state: dict[str, Tensor]) -> bool:
    """Whether this is a sparse pretraining checkpoint.

    Args:
        state: Names and tensors.

    Returns:
        True if there are kernels of sparse convolutions.
    """
    return any(key.startswith(_ENCODER) and key.endswith(".kernel") for key in state)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense encoder weights under the published dense names.

    Args:
        state: ``encoder.*`` with ``kernel`` entries, and the pretraining decoder.

    Returns:
        Names and tensors of `geofm.models.mpmae.MPMAE`, without its head.

    Raises:
        LayoutError: A name is neither the encoder's nor a known part of pretraining.
    """
    dense: dict[str, Tensor] = {}
    strange = []
    for key, value in state.items():
        if key.startswith(_ENCODER):
            name, tensor = _dense_entry(key.removeprefix(_ENCODER), value)
            dense[name] = tensor
        elif key.startswith(_DENSE):
            dense[key] = value
        elif not key.startswith(_PRETRAINING):
            strange.append(key)
    if strange:
        raise LayoutError(
            f"an MMEarth checkpoint with {len(strange)} unknown entries: {', '.join(strange[:5])}"
        )
    return dense


def _dense_entry(name: str, value: Tensor) -> tuple[str, Tensor]:
    name = name.replace(".ln.", ".").replace(".linear.", ".")
    if name.endswith(".kernel"):
        return name.removesuffix("kernel") + "weight", _dense_kernel(name, value)
    if name.endswith((".grn.gamma", ".grn.beta")):
        return name, value.reshape(1, 1, 1, -1)
    if name.endswith(".bias"):
        return name, value.reshape(-1)
    return name, value


def _dense_kernel(name: str, kernel: Tensor) -> Tensor:
    """[taps, in, out], or [taps, channels] where depthwise, to a convolution's weight.

    The taps count rows of x before columns of y, hence the transposition.
    """
    side = math.isqrt(kernel.shape[0])
    if side * side != kernel.shape[0] or kernel.ndim not in (2, 3):
        raise LayoutError(
            f"{name} should be [k*k taps, in, out] or [k*k taps, channels], "
            f"found {tuple(kernel.shape)}"
        )
    if kernel.ndim == 2:
        weight = kernel.permute(1, 0).reshape(kernel.shape[1], 1, side, side)
    else:
        weight = kernel.permute(2, 1, 0).reshape(kernel.shape[2], kernel.shape[1], side, side)
    return weight.transpose(3, 2).contiguous()
