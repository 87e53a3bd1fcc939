"""Finding the weights a user asked for, and loading them exactly."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from geofm import hub, registry
from geofm.cards import WeightCard, published_cards, read_card
from geofm.errors import CardError, DownloadError, LayoutError, ModelError, WeightsNotFoundError
from geofm.registry import Architecture

__all__ = ["FoundWeights", "find_weights", "load_exactly"]

logger = logging.getLogger(__name__)

State = dict[str, Tensor]


@dataclass(frozen=True)
class FoundWeights:
    """Weights that were found.

    Attributes:
        state: Names and tensors, under geofm's names.
        card: The card that describes them; None for a file without one.
        origin: What to call them in messages: the card's name, or the file's path.
        layout: Name of the layout the file is in.
        sha256: Of the file; None if it is not known.
    """

    state: State
    card: WeightCard | None
    origin: str
    layout: str
    sha256: str | None = None


def find_weights(
    architecture: Architecture, tag: str | None, pretrained: bool | str | os.PathLike[str]
) -> FoundWeights | None:
    """The weights that ``pretrained=`` stands for.

    Args:
        architecture: The model.
        tag: Tag in the model's name, None without one.
        pretrained: As in `geofm.create_model`.

    Returns:
        The weights, None for ``pretrained=False``.

    Raises:
        UnknownModelError: No such tag.
        WeightsNotFoundError: No such file, or nothing published for this model.
        DownloadError: The checkpoint cannot be fetched and nothing stands in for it.
        HashMismatchError: The fetched file is not the published one.
        LayoutError: The file is in no known layout.
        UnsafeFileError: It could only be read by executing code.
    """
    if tag is not None:
        registry.card_of(architecture, tag)
    if pretrained is False:
        return None
    if pretrained is True:
        if tag is not None:
            return _from_card(registry.card_of(architecture, tag))
        return _best_available(architecture)
    if not isinstance(pretrained, str | os.PathLike) or not os.fspath(pretrained):
        raise ModelError(f"pretrained is True, False, a tag or a path; got {pretrained!r}")
    text = os.fspath(pretrained)
    if isinstance(pretrained, str):
        text = text.removeprefix(f"{architecture.name}.")
    if isinstance(pretrained, str) and text in registry.cards_of(architecture):
        return _from_card(registry.card_of(architecture, text))
    path = Path(text).expanduser()
    if path.exists():
        return _from_path(architecture, path)
    if isinstance(pretrained, str) and path.name == text and not path.suffix:
        registry.card_of(architecture, text)
    raise WeightsNotFoundError(
        f"pretrained={text!r} is neither a file nor a tag of {architecture.name}"
        + (
            f": {', '.join(registry.cards_of(architecture))}"
            if registry.cards_of(architecture)
            else ""
        )
    )


def _from_card(card: WeightCard) -> FoundWeights:
    state = hub.load_card_weights(card)
    # Known by now: the file was verified against it.
    return FoundWeights(state, card, card.name, card.layout, hub.file_sha256(card))


def _best_available(architecture: Architecture) -> FoundWeights:
    card = registry.default_card(architecture)
    if card is None:
        raise WeightsNotFoundError(
            f"{architecture.name} has no published weights{registry.elsewhere(architecture)}. "
            f"Use pretrained=False, or pretrained=<path> to your own"
        )
    try:
        return _from_card(card)
    except DownloadError as error:
        bundled = [c for c in registry.cards_of(architecture).values() if c.bundled]
        if not bundled:
            raise
        warnings.warn(
            f"{card.name} could not be fetched ({error}); loaded the small bundled checkpoint "
            f"{bundled[0].name} instead. Name a tag to get exactly that checkpoint or an error",
            stacklevel=4,
        )
        return _from_card(bundled[0])


def _from_own_card(architecture: Architecture, path: Path) -> FoundWeights:
    card = read_card(path)
    if card.model != architecture.weights_of:
        raise CardError(f"card {path}: name: is of {card.model}, not of {architecture.weights_of}")
    return _from_card(card)


def _from_path(architecture: Architecture, path: Path) -> FoundWeights:
    if path.is_dir():
        cards = sorted(path.glob("*.toml"))
        if len(cards) != 1:
            raise WeightsNotFoundError(
                f"{path} holds {len(cards)} weight cards (*.toml); a folder of weights has one, or "
                f"name the file itself"
            )
        return _from_own_card(architecture, cards[0])
    if path.suffix == ".toml":
        return _from_own_card(architecture, path)
    state, layout = hub.load_file_weights(path)
    card = None
    digest = hub.sha256_of(path)
    if layout == "native":
        # Copies of published files keep their hash, and with it their card.
        hashes = {c.source.sha256: c for c in published_cards().values() if c.source.sha256}
        card = next((c for known, c in hashes.items() if digest.startswith(str(known))), None)
    return FoundWeights(state, card, str(path), layout, digest)


def load_exactly(
    model: nn.Module, state: Mapping[str, Tensor], architecture: Architecture, origin: str
) -> None:
    """Load weights; every name and shape must match.

    Two things may differ, and both are said: a head for another number of classes is left out, and
    a head that a pretraining checkpoint does not have stays as initialised.

    Args:
        model: The model, built for the checkpoint's channels.
        state: Names and tensors.
        architecture: The model's architecture.
        origin: What to call the checkpoint in messages.

    Raises:
        LayoutError: A name is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ModelError(
            f"{origin} cannot be loaded into a model on the meta device; build it on the CPU"
        )
    spoilt = [n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if spoilt:
        raise LayoutError(f"{origin} has NaN or infinite weights: {', '.join(spoilt[:4])}")
    state = _without_foreign_head(dict(state), own, architecture.classifier, origin)
    hooks_drop = ("norm.weight", "norm.bias") if architecture.kind == "segmenter" else ()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own and name not in hooks_drop]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]

    fresh = [name for name in missing if name.startswith(model.head_prefixes)]  # type: ignore[arg-type]
    for prefix in model.head_prefixes:  # type: ignore[union-attr]
        parts = [name for name in own if name.startswith(prefix)]
        if any(name in state for name in parts):
            # A part of a head is no head: what is left of it must be complete.
            fresh = [name for name in fresh if name not in parts]
    lost = [name for name in missing if name not in fresh]
    problems = []
    if lost:
        problems.append(f"{len(lost)} missing: {', '.join(lost[:4])}")
    if unknown:
        hint = " (a U-Net's: use mpmae_unet_*)" if unknown[0].startswith("upsample_") else ""
        problems.append(f"{len(unknown)} unknown: {', '.join(unknown[:4])}{hint}")
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in shapes[:4]
    ]
    if problems:
        raise LayoutError(f"{origin} does not match {architecture.name}: {'; '.join(problems)}")
    if fresh:
        logger.info("%s has no %s: left as initialised", origin, ", ".join(fresh[:4]))
    model.load_state_dict({name: state.get(name, own[name]) for name in own}, strict=True)


def _without_foreign_head(
    state: State, own: Mapping[str, Tensor], classifier: str, origin: str
) -> State:
    key = f"{classifier}.weight"
    if not classifier or key not in state:
        return state
    if key in own and own[key].shape == state[key].shape:
        return state
    classes = state[key].shape[0]
    if key in own:
        warnings.warn(
            f"{origin} has a head for {classes} classes; the new head for {own[key].shape[0]} is "
            f"untrained",
            stacklevel=4,
        )
    else:
        logger.info("%s has a head for %d classes; left out", origin, classes)
    return {n: v for n, v in state.items() if n not in (key, f"{classifier}.bias")}
