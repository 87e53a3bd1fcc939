"""What is computed from a window: the map of a stage, one vector, or classes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geofm.errors import ModelError, RasterError
from geofm.factory import input_spec_of

__all__ = [
    "Network",
    "classes_of",
    "default_window",
    "embedding_map",
    "features_of",
    "moved",
    "running",
    "weights_hash",
    "weights_label",
    "weights_tags",
]

logger = logging.getLogger(__name__)

# Windows are about this large unless a model says otherwise (benchmarks/window_shift.py).
_WINDOW = 224


@dataclass(frozen=True)
class Network:
    """A function of windows.

    Attributes:
        apply: Takes prepared pixels, (N, bands, h, w), and gives (N, channels, rows, columns).
        unit: Windows are as large as, and begin at, multiples of this many pixels.
        stride: Pixels per cell.
        offset: Where the first cell of a window begins, in pixels from its left or top edge.
        whole: A window brings one vector, not a map.
        label: What it computes, in words that go into the tags.
    """

    apply: Callable[[Tensor], Tensor]
    unit: int
    stride: int
    offset: float
    whole: bool
    label: str


def features_of(model: nn.Module, stride: int | None, pooled: bool) -> Network:
    """The embedding of every cell, or of every window.

    Args:
        model: An encoder from `create_model`.
        stride: Pixels per cell, one of the encoder's; None for its last (coarsest).
        pooled: One vector a window, as the model itself pools and normalizes it.

    Returns:
        The function.

    Raises:
        ModelError: The model has no such map.
    """
    offset = getattr(model, "cell_offset", None)
    info: Any = getattr(model, "feature_info", None)
    if (
        offset is None
        or not info
        or not hasattr(model, "forward_intermediates")
        or hasattr(model, "upsample_layers")
    ):
        raise ModelError(
            "the model has no embedding map; use an encoder from create_model(..., "
            "features_only=False)"
        )
    strides = [int(level["reduction"]) for level in info]
    last = strides[-1]
    if pooled:
        if stride is not None:
            raise ModelError("stride= chooses a map; pooled=True gives one vector a window")
        return Network(_pooled(model), last, last, float(offset), True, "pooled embedding")
    stride = last if stride is None else stride
    if stride not in strides:
        raise ModelError(
            f"the model has no map with {stride} px per cell; it has {sorted(set(strides))}"
        )
    # Several stages may share a stride (those of a ViT do): the last has seen most.
    level = len(strides) - 1 - strides[::-1].index(stride)
    shift = float(offset)
    if shift + last / 2 == 0.5:
        # Cells centred on a pixel, as of a ResNet, are so at every stage; others begin together.
        shift = 0.5 - stride / 2

    def apply(pixels: Tensor) -> Tensor:
        found: Tensor = model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=[level], stop_early=True, intermediates_only=True
        )[-1]
        return found

    return Network(apply, last, stride, shift, False, f"embedding of {stride} px cells")


def _pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ModelError("the model has no pooled embedding: it lacks forward_head")

    def apply(pixels: Tensor) -> Tensor:
        features = model.forward_features(pixels)  # type: ignore[operator]
        vector: Tensor = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        if vector.ndim != 2:
            raise ModelError(
                f"the model does not pool (global_pool=''), it gives {tuple(vector.shape)}; "
                f"create it with global_pool='avg', or leave pooled=True out"
            )
        return vector[:, :, None, None]

    return apply


def classes_of(model: nn.Module, probabilities: bool) -> Network:
    """Class scores: of every pixel, of every cell, or of every window, as the model has it.

    Args:
        model: A model with a head: a U-Net (pixels), a classifier without pooling (cells), or a
            classifier with pooling (windows).
        probabilities: Give the softmax of the scores.

    Returns:
        The function.

    Raises:
        ModelError: The model has no head, or gives what is neither scores nor a map of them.
    """
    if not getattr(model, "num_classes", 0):
        raise ModelError(
            "the model has no head (num_classes=0), so there is nothing to predict; give it one "
            "and train it, or use embed_raster"
        )
    info: Any = getattr(model, "feature_info", None) or [{"reduction": 1}]
    unit = int(info[-1]["reduction"])

    def apply(pixels: Tensor) -> Tensor:
        scores: Tensor = model(pixels)
        if scores.ndim == 2:
            scores = scores[:, :, None, None]
        return scores.float().softmax(dim=1) if probabilities else scores

    # What kind of answer it gives shows on one tile.
    spec = input_spec_of(model)
    size = spec.size + -spec.size % unit
    with running(model) as device, torch.inference_mode():
        scores = model(torch.zeros(1, len(spec.bands), size, size, device=device))
    label = "probabilities" if probabilities else "scores"
    if scores.ndim == 2:
        return Network(apply, unit, unit, 0.0, True, f"{label} of windows")
    if scores.ndim != 4:
        raise ModelError(f"the model gives {tuple(scores.shape)}, which is no map of classes")
    if scores.shape[-1] == size:
        return Network(apply, unit, 1, 0.0, False, f"{label} of pixels")
    offset = float(getattr(model, "cell_offset", 0.0))
    return Network(apply, unit, unit, offset, False, f"{label} of {unit} px cells")


def default_window(model: nn.Module) -> int:
    """Side of a window where none is asked for.

    Args:
        model: The model.

    Returns:
        Pixels: the smallest multiple of the tiles the model was trained on that reaches 224; for a
        transformer, whose position embedding is for one size, those tiles themselves.
    """
    size = input_spec_of(model).size
    if hasattr(model, "pos_embed"):
        return size
    return size * max(1, -(-_WINDOW // size))


@torch.inference_mode()
def embedding_map(model: nn.Module, prepared: Tensor) -> tuple[Tensor, int, float]:
    """The finest-grained final embedding of a model: the map of its last stage, in one pass.

    Args:
        model: An encoder; it is run in evaluation mode and left as it was.
        prepared: Prepared pixels, (N, bands, H, W). They are continued beyond the right and lower
            edges to whole cells.

    Returns:
        The map, (N, channels, rows, columns), on the CPU; pixels per cell; and where the first cell
        begins, in pixels from the left or top edge.

    Raises:
        ModelError: The model has no such map.
    """
    network = features_of(model, None, pooled=False)
    stride = network.stride
    height, width = prepared.shape[-2:]
    check_size(network, height, width)
    right, below = -width % stride, -height % stride
    if right or below:
        prepared = F.pad(prepared, (0, right, 0, below), mode="replicate")
    with running(model) as device:
        found = network.apply(prepared.to(device))
    return found.float().cpu().contiguous(), stride, network.offset


def check_size(network: Network, height: int, width: int) -> None:
    """Refuse an image that does not hold one cell.

    Args:
        network: What is to be run.
        height: Of the image, in px.
        width: Likewise.

    Raises:
        ModelError: It does not.
    """
    unit = network.unit
    side = min(height, width)
    if side < 1 or side + -side % unit < unit + 2 * abs(network.offset):
        raise ModelError(f"{height} x {width} pixels are less than one cell of {unit}")


def moved(model: nn.Module, device: torch.device | str) -> torch.device:
    """Move a model to a device.

    Args:
        model: The model.
        device: Where to.

    Returns:
        The device.

    Raises:
        RasterError: The device is not there, or has no room.
    """
    try:
        target = torch.device(device)
        model.to(target)
    except (AssertionError, RuntimeError) as error:
        # Of CUDA's own messages, all but the first line is advice for programmers.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RasterError(
            f"the model cannot run on {device}: {reason.rstrip('.')}. Choose a device that is "
            f"there, such as cpu"
        ) from error
    return target


@contextlib.contextmanager
def running(model: nn.Module, device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Run a model in evaluation mode, then leave it as it was and where it was.

    Args:
        model: The model.
        device: Where to run it; None for where it is.

    Yields:
        The device.

    Raises:
        RasterError: As in `moved`.
    """
    first = next(model.parameters(), None)
    home = first.device if first is not None else torch.device("cpu")
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield home if device is None else moved(model, device)
    finally:
        for module, was in training:
            module.training = was
        model.to(home)


def weights_label(model: nn.Module) -> str:
    """What an output says about the weights that made it.

    Args:
        model: A model from `create_model`.

    Returns:
        The card's name, the file's path, or "untrained (random initialisation)".
    """
    origin = getattr(model, "weights_origin", None)
    return str(origin) if origin else "untrained (random initialisation)"


def weights_tags(model: nn.Module, digest: str | None = None) -> dict[str, str]:
    """What every output says about the model that made it.

    Args:
        model: A model from `create_model`.
        digest: Its `weights_hash`, to save computing it again.

    Returns:
        Version of geofm; architecture; name of the weights and ``GEOFM_WEIGHTS_HASH``, the
        `weights_hash` of the model as it computes. Of the checkpoint it was made from:
        ``GEOFM_FILE_SHA256``, the sha256 of its file; and where it has a card ``GEOFM_CARD``, that
        card's name, ``GEOFM_CARD_SHA256``, the sha256 of the card, and the weights' licence.
    """
    from geofm import __version__

    config: Any = getattr(model, "pretrained_cfg", None) or {}
    card: Any = getattr(model, "card", None)
    tags = {
        "GEOFM_VERSION": __version__,
        "GEOFM_MODEL": str(config.get("architecture", type(model).__name__)),
        "GEOFM_WEIGHTS": weights_label(model),
        "GEOFM_WEIGHTS_HASH": digest or weights_hash(model),
    }
    digest = getattr(model, "weights_sha256", None)
    if digest:
        tags["GEOFM_FILE_SHA256"] = digest
    if card is not None:
        tags |= {
            "GEOFM_CARD": card.name,
            "GEOFM_CARD_SHA256": card.sha256,
            "GEOFM_LICENCE": card.licence.weights,
        }
    return tags


def weights_hash(model: nn.Module) -> str:
    """The sha256 of everything a model computes with.

    Args:
        model: The model.

    Returns:
        Hash of its modules as printed, its numbers (such as paddings), and its tensors.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        for other in ("training", "weights_origin", "weights_sha256"):
            plain.pop(other, None)
        digest.update(f"{name}{sorted(plain.items())}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since numpy has no bfloat16.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()
