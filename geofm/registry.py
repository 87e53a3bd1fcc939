"""Names: architectures, tags of checkpoints, wildcards."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from torch import nn

from geofm.cards import WeightCard, published_cards
from geofm.errors import UnknownModelError

__all__ = [
    "Architecture",
    "architecture",
    "card_of",
    "cards_of",
    "default_card",
    "elsewhere",
    "is_model",
    "list_models",
    "list_pretrained",
    "model_card",
    "split_name",
    "timm_config",
]


@dataclass(frozen=True)
class Architecture:
    """A model that can be built by name.

    Attributes:
        name: What users call it.
        build: The model's class.
        arguments: What distinguishes it from the others of its class.
        weights_of: The architecture whose checkpoints it loads: its own name, or an encoder's.
        input_card: Card whose input section describes what the model takes without weights.
        first_conv: Name of the layer that sees the bands.
        classifier: Name of the linear head.
        kind: ``"encoder"`` (images to features or classes; registered in timm), ``"segmenter"``
            (a label for every pixel) or ``"dual"`` (observations and text in one space).
        aligned: Arguments with which the cells of its maps tile the image, where they do not
            already.
    """

    name: str
    build: Callable[..., nn.Module]
    arguments: Mapping[str, Any]
    weights_of: str
    input_card: str
    first_conv: str
    classifier: str
    kind: str = "encoder"
    aligned: Mapping[str, Any] | None = None


@cache
def architectures() -> Mapping[str, Architecture]:
    """All architectures by name; the variants stand at the bottom of each model's file.

    Returns:
        A read-only mapping.
    """
    # Imported here: timm takes seconds, and `import geofm` must not.
    geotreeclip = importlib.import_module("geofm.models.geotreeclip")
    mpmae = importlib.import_module("geofm.models.mpmae")
    ssl4eco = importlib.import_module("geofm.models.ssl4eco")
    unet = importlib.import_module("geofm.models.unet")
    mmearth_card = "mpmae_atto.mmearth64"
    ssl4eco_card = "ssl4eco_resnet50.seco_ndvi"
    rows: list[Architecture] = []
    for size, arguments in mpmae.VARIANTS.items():
        encoder = f"mpmae_{size}"
        rows.append(
            Architecture(
                encoder,
                mpmae.MPMAE,
                arguments,
                encoder,
                mmearth_card,
                "initial_conv.0",
                "head",
                aligned={"stem_padding": "aligned"},
            )
        )
        rows.append(
            Architecture(
                f"mpmae_unet_{size}",
                unet.MPMAEUNet,
                arguments,
                encoder,
                mmearth_card,
                "initial_conv.0",
                "head",
                kind="segmenter",
            )
        )
    for variants, build, first_conv, classifier in (
        (ssl4eco.RESNETS, ssl4eco.SSL4EcoResNet, "conv1", "fc"),
        (ssl4eco.VITS, ssl4eco.SSL4EcoViT, "patch_embed.proj", "head"),
    ):
        for size, arguments in variants.items():
            name = f"ssl4eco_{size}"
            rows.append(
                Architecture(name, build, arguments, name, ssl4eco_card, first_conv, classifier)
            )
    for name, arguments in geotreeclip.VARIANTS.items():
        rows.append(
            Architecture(
                name,
                geotreeclip.GeoTreeCLIP,
                arguments,
                name,
                "geotreeclip.ggt6m",
                "series.trunk.patch_embed.proj",
                classifier="",
                kind="dual",
            )
        )
    return MappingProxyType({row.name: row for row in rows})


def timm_config(architecture: Architecture, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What timm records about a model: sizes and the names of its first and last layers.

    Args:
        architecture: The model's architecture.
        arguments: Arguments of its constructor.

    Returns:
        Fields of timm's ``PretrainedCfg``.
    """
    from geofm.models.mpmae import grid_size

    channels = int(arguments["in_chans"])
    if architecture.name.startswith("mpmae"):
        # Tiles of the published models have seven patches to a side.
        size = int(arguments.get("img_size", 7 * arguments["patch_size"]))
        padding = arguments.get("stem_padding", "classification")
        grid = grid_size(size, int(arguments["patch_size"]), padding)
    else:
        size = int(arguments.get("img_size", 224))
        grid = size // (16 if architecture.name.startswith("ssl4eco_vit") else 32)
    return {
        "num_classes": int(arguments.get("num_classes", 0)),
        "input_size": (channels, size, size),
        "pool_size": (grid, grid),
        # Normalization is the card's, done by geofm.create_transform.
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "first_conv": architecture.first_conv,
        "classifier": architecture.classifier,
    }


def split_name(name: str) -> tuple[str, str | None]:
    """Split ``model.tag``.

    Args:
        name: With or without a tag.

    Returns:
        The model's name, and the tag or None.
    """
    model, _, tag = name.partition(".")
    return model, tag or None


def is_model(name: str) -> bool:
    """Whether `name` can be given to `create_model`.

    Args:
        name: ``"mpmae_atto"`` or ``"mpmae_atto.mmearth64"``.

    Returns:
        True for a known model, with a known tag or none.
    """
    model, tag = split_name(name)
    found = architectures().get(model)
    return found is not None and (tag is None or tag in cards_of(found))


def architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Args:
        name: Without a tag.

    Returns:
        The architecture.

    Raises:
        UnknownModelError: There is none; the message suggests the nearest.
    """
    known = architectures()
    if not isinstance(name, str):
        raise UnknownModelError(f"a model's name is a string, got {name!r}")
    if name not in known:
        raise UnknownModelError(f"there is no model {name!r}{_suggest(name, list(known))}")
    return known[name]


def cards_of(model: Architecture) -> Mapping[str, WeightCard]:
    """The checkpoints a model can load, by tag.

    Args:
        model: The architecture.

    Returns:
        Cards by tag, empty where nothing is published.
    """
    return {c.tag: c for c in published_cards().values() if c.model == model.weights_of}


def default_card(model: Architecture) -> WeightCard | None:
    """The published default of a model, or None where nothing is published.

    Args:
        model: The architecture.

    Returns:
        The card, or None.
    """
    return next((card for card in cards_of(model).values() if card.default), None)


def card_of(model: Architecture, tag: str) -> WeightCard:
    """The card of one checkpoint.

    Args:
        model: The architecture.
        tag: Tag of the checkpoint.

    Returns:
        The card.

    Raises:
        UnknownModelError: There is none; the message lists those there are.
    """
    cards = cards_of(model)
    if tag not in cards:
        if not cards:
            raise UnknownModelError(
                f"{model.name} has no published weights, so no tag {tag!r}{elsewhere(model)}"
            )
        raise UnknownModelError(f"{model.name} has no weights {tag!r}{_suggest(tag, list(cards))}")
    return cards[tag]


def model_card(name: str) -> WeightCard:
    """The weight card of a checkpoint.

    Args:
        name: ``"mpmae_atto.mmearth64"``; without a tag, the model's default.

    Returns:
        Bands, units, statistics, source, licence, citation and hash of the checkpoint.

    Raises:
        UnknownModelError: No such model or tag, or the model has no published weights.
    """
    base, tag = split_name(name)
    model = architecture(base)
    if tag is not None:
        return card_of(model, tag)
    card = default_card(model)
    if card is None:
        raise UnknownModelError(f"{base} has no published weights{elsewhere(model)}")
    return card


def list_models(filter: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """Names for `create_model`.

    Args:
        filter: Wildcard, or several, for example ``"mpmae_*"``.
        pretrained: List checkpoints as ``name.tag`` instead of architectures.

    Returns:
        Sorted names.
    """
    patterns = [filter] if isinstance(filter, str) else list(filter)
    if pretrained:
        names = [f"{a.name}.{tag}" for a in architectures().values() for tag in cards_of(a)]
    else:
        names = list(architectures())
    return sorted(
        name
        for name in names
        if any(
            fnmatch.fnmatchcase(name, pattern)
            or (pretrained and fnmatch.fnmatchcase(split_name(name)[0], pattern))
            for pattern in patterns
        )
    )


def list_pretrained(filter: str | Sequence[str] = "*") -> list[str]:
    """Names with tags of all checkpoints: ``list_models(filter, pretrained=True)``.

    Args:
        filter: Wildcard, or several.

    Returns:
        Sorted names.
    """
    return list_models(filter, pretrained=True)


def elsewhere(model: Architecture) -> str:
    """Words on what published weights a model's family has, for one that has none.

    Args:
        model: The architecture without weights.

    Returns:
        A clause that begins with a semicolon, or nothing.
    """
    family = model.name.split("_")[0]
    names = list_models(f"{family}_*", pretrained=True)
    names = [name for name in names if not name.startswith("mpmae_unet")]
    return f"; of its family there are {', '.join(names)}" if names else ""


def _suggest(word: str, among: list[str]) -> str:
    close = difflib.get_close_matches(word, among, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{meant}; there are {', '.join(among)}"
