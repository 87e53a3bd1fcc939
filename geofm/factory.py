"""`create_model` and `create_transform`: from a name to a model, and to its preprocessing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._features import FeatureGetterNet
from torch import nn

from geofm import registry
from geofm.adapt import adapt_bands
from geofm.cards import InputSpec, WeightCard, published_cards
from geofm.errors import BandError, CardError, LayoutError, ModelError
from geofm.loading import FoundWeights, find_weights, load_exactly
from geofm.preprocess import Preprocess
from geofm.registry import Architecture
from geofm.spectral import Band, Sensor
from geofm.timm_models import timm_config

__all__ = ["create_model", "create_transform", "input_spec_of"]

logger = logging.getLogger(__name__)


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    num_classes: int = 0,
    bands: Sequence[str | Band] | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    global_pool: str = "avg",
    drop_path_rate: float = 0.0,
    sensor: str | Sensor | None = None,
    tolerance: float | None = None,
    new_bands: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model, with or without trained weights.

    Args:
        name: Architecture, or architecture and checkpoint: ``"mpmae_atto"``,
            ``"mpmae_atto.mmearth128"``. See `list_models`.
        pretrained: False: random weights. True: the checkpoint named in `name`, else the published
            default if it is cached or reachable, else the small bundled checkpoint where there is
            one, with a warning. A tag (``"mmearth64"``): exactly that checkpoint. A path: a file in
            any layout geofm or the authors write, or a folder (or TOML file) with a weight card.
        num_classes: Outputs of a new linear head; 0 for features. A file's own head is kept if it
            has as many.
        bands: Bands of the input, by name, in channel order. The first layer's weights are selected
            and reordered to fit, so four bands cost four channels. None: the checkpoint's bands.
        in_chans: Number of input channels; needed only for untrained models of unnamed bands.
        features_only: Return a list of feature maps, finest first, as timm does.
        out_indices: Which of them; None for all.
        global_pool: Pooling before the head; ``""`` for none.
        drop_path_rate: Stochastic depth of the last block (not for U-Net decoders).
        sensor: Sensor whose names `bands` are; None for the checkpoint's.
        tolerance: Let a band take the weights of the checkpoint's nearest band within this many nm.
        new_bands: ``"mean"``: bands the checkpoint does not have start from the mean of its
            first-layer weights. None: such bands are an error.
        **kwargs: Arguments of the architecture, for example ``patch_size``, ``stem_padding``.

    Returns:
        The model, in training mode, with three more attributes: ``card`` (its `WeightCard`, None
        for random weights or a file without one), ``weights_origin`` (the card's name or the path,
        None for random weights) and ``input_spec`` (what its first layer expects, None if that is
        not known).

    Raises:
        UnknownModelError: No such model or tag.
        WeightsNotFoundError: No such file, or nothing published for this model.
        DownloadError: The checkpoint cannot be fetched and nothing stands in for it.
        HashMismatchError: The fetched file is not the published one.
        LayoutError: The checkpoint does not match the model exactly.
        UnsafeFileError: The checkpoint could only be read by executing code.
        BandError: A band is unknown to the checkpoint.
        ModelError: Arguments contradict each other or the checkpoint.
    """
    base, tag = registry.split_name(name)
    architecture = registry.architecture(base)
    if features_only and architecture.kind != "encoder":
        raise ModelError(f"{base} is no encoder and has no features_only form")
    if bands is not None and architecture.kind == "dual":
        raise ModelError(
            f"{base} takes the bands of its card; bring yours into their order with "
            f"create_transform(model, bands=[...], fill=...)"
        )
    if bands is not None and in_chans is not None and in_chans != len(bands):
        raise ModelError(f"in_chans={in_chans}, but {len(bands)} bands are named")

    weights = find_weights(architecture, tag, pretrained)
    arguments = _resolve_arguments(architecture, tag, weights, kwargs)
    spec = _input_spec(architecture, tag, weights, arguments)
    trained_chans = int(arguments["in_chans"])
    if weights is None:
        arguments["in_chans"] = in_chans or (len(bands) if bands is not None else trained_chans)
    elif bands is None and in_chans not in (None, trained_chans):
        raise ModelError(
            f"{weights.origin} takes {trained_chans} channels"
            + (f" ({', '.join(spec.bands)})" if spec else "")
            + f", not {in_chans}; to use others, name them: bands=[...]"
        )
    if architecture.kind == "dual":
        arguments = _ranges_of(_described_by(architecture, tag, weights)) | arguments
    model = _build(architecture, arguments, num_classes, global_pool, drop_path_rate)
    if weights is not None:
        load_exactly(model, weights.state, architecture, weights.origin)

    if bands is not None:
        if spec is None:
            raise BandError(
                f"{base}: which bands the checkpoint takes is not known, so it cannot be adapted; "
                f"give it a weight card"
            )
        spec = adapt_bands(
            model,
            architecture,
            spec,
            bands,
            sensor=sensor,
            tolerance=tolerance,
            new_bands=new_bands,
            trained=weights is not None,
        )
    elif spec is not None and arguments["in_chans"] != len(spec.bands):
        spec = None
    card = weights.card if weights is not None else None
    if features_only:
        model = _feature_pyramid(model, out_indices)
    elif out_indices is not None:
        raise ModelError("out_indices chooses feature maps; it needs features_only=True")
    model.card = card  # type: ignore[assignment]
    model.weights_origin = weights.origin if weights else None  # type: ignore[assignment]
    model.input_spec = spec  # type: ignore[assignment]
    return model


def create_transform(
    model: nn.Module | WeightCard | InputSpec | str,
    bands: Sequence[str | Band],
    units: str,
    level: str | None = None,
    **options: Any,
) -> Preprocess:
    """Preprocessing that turns pixels of a described image into a model's input.

    Args:
        model: A model from `create_model`, or a card, or a name.
        bands: The image's bands, in channel order.
        units: ``"dn"`` (reflectance × 10000), ``"reflectance"`` (0 to 1) or ``"uint8"``.
        level: ``"L1C"`` or ``"L2A"``; required where the statistics differ by level.
        **options: ``sensor``, ``offset``, ``baseline``, ``nodata``, ``fill``, ``tolerance``,
            ``fit``, ``size``, ``white``, ``statistics``: see `geofm.preprocess.Preprocess`.

    Returns:
        A module: call it with pixels, (C, H, W), (N, C, H, W) or (T, C, H, W).

    Raises:
        BandError: A band is missing and no fill was chosen, or it is repeated.
        PixelError: Units, level or options are unknown or contradict each other.
        ModelError: What the model takes is not known.
    """
    return Preprocess(input_spec_of(model), bands, units, level, **options)


def input_spec_of(model: nn.Module | WeightCard | InputSpec | str) -> InputSpec:
    """What a model's first layer expects.

    Args:
        model: A model from `create_model`, a card, a specification, or a name.

    Raises:
        ModelError: It is not known.
        UnknownModelError: No such name.
    """
    if isinstance(model, InputSpec):
        return model
    if isinstance(model, WeightCard):
        return model.input
    if isinstance(model, str):
        base, tag = registry.split_name(model)
        architecture = registry.architecture(base)
        return _card_or_default(architecture, tag).input
    spec = getattr(model, "input_spec", None)
    if spec is None:
        raise ModelError(
            "which bands this model takes is not known: it was not made by geofm.create_model, or "
            "from a file without a card, or with in_chans instead of bands. Name them: "
            "create_model(..., bands=[...]), or pass the card or its name in place of the model"
        )
    assert isinstance(spec, InputSpec)
    return spec


# --- building ----------------------------------------------------------------------------------


def _card_or_default(architecture: Architecture, tag: str | None) -> WeightCard:
    if tag is not None:
        return registry.card_of(architecture, tag)
    default = registry.default_card(architecture)
    return default if default is not None else published_cards()[architecture.input_card]


def _described_by(
    architecture: Architecture, tag: str | None, weights: FoundWeights | None
) -> WeightCard:
    if weights is not None and weights.card is not None:
        return weights.card
    return _card_or_default(architecture, tag)


def _ranges_of(card: WeightCard) -> dict[str, Any]:
    """What a model that normalizes by itself needs to know of its card."""
    pairs = list(zip(card.input.low, card.input.high, strict=True))
    return {"image_range": pairs, "variables": card.auxiliary}


def _resolve_arguments(
    architecture: Architecture,
    tag: str | None,
    weights: FoundWeights | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of the constructor: the architecture's, the checkpoint's, the caller's."""
    arguments = dict(architecture.arguments)
    card = weights.card if weights else None
    if weights is None or card is not None:
        arguments |= dict((card or _card_or_default(architecture, tag)).arguments)
    if weights is not None:
        inferred = _arguments_in(architecture, weights)
        for key, value in inferred.items():
            asked = given.get(key, architecture.arguments.get(key, value))
            if asked != value:
                raise ModelError(
                    _contradiction(architecture, weights.origin, key, value, asked, inferred)
                )
        if "patch_size" in inferred and card is None:
            # The published sizes: 56 px with patches of 8, 112 px with patches of 16.
            arguments["img_size"] = 7 * inferred["patch_size"]
        arguments |= inferred
    return arguments | dict(given)


def _arguments_in(architecture: Architecture, weights: FoundWeights) -> dict[str, Any]:
    try:
        inferred: dict[str, Any] = architecture.build.arguments_in(weights.state)  # type: ignore[attr-defined]
    except KeyError as error:
        raise LayoutError(
            f"{weights.origin} does not hold {architecture.name}: there is no {error.args[0]!r}; "
            f"its first tensors are {', '.join(list(weights.state)[:6])}"
        ) from error
    return inferred


def _contradiction(
    architecture: Architecture,
    origin: str,
    key: str,
    value: Any,
    asked: Any,
    inferred: Mapping[str, Any],
) -> str:
    if key not in architecture.arguments:
        return f"{origin} has {key}={value}, not {key}={asked}; leave the argument out"
    fitting = [
        other.name
        for other in registry.architectures().values()
        if other.build is architecture.build
        and all(inferred.get(k, v) == v for k, v in other.arguments.items())
    ]
    hint = f"; it fits {' or '.join(fitting)}" if fitting else ""
    return f"{origin} has {key} {_show(value)}, {architecture.name} has {_show(asked)}{hint}"


def _show(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def _input_spec(
    architecture: Architecture,
    tag: str | None,
    weights: FoundWeights | None,
    arguments: Mapping[str, Any],
) -> InputSpec | None:
    if weights is not None and weights.card is not None:
        return weights.card.input
    if weights is None:
        return _card_or_default(architecture, tag).input
    if tag is not None:
        chosen: WeightCard | None = registry.card_of(architecture, tag)
    else:
        chosen = _card_that_fits(architecture, arguments)
    if chosen is None:
        logger.warning("%s: no card tells what its channels are", weights.origin)
        return None
    if chosen.arguments["in_chans"] != arguments["in_chans"]:
        raise CardError(
            f"{weights.origin} takes {arguments['in_chans']} channels, but {chosen.name} lists "
            f"{chosen.arguments['in_chans']} bands"
        )
    logger.info("%s: bands and statistics are taken from card %s", weights.origin, chosen.name)
    return chosen.input


def _card_that_fits(architecture: Architecture, arguments: Mapping[str, Any]) -> WeightCard | None:
    """The card of the architecture, else of its family, whose arguments are those of a file."""
    family = architecture.name.split("_")[0]
    own = list(registry.cards_of(architecture).values())
    others = [card for card in published_cards().values() if card.model.split("_")[0] == family]
    for group in (own, others):
        fitting = [
            card
            for card in group
            if all(arguments.get(key, value) == value for key, value in card.arguments.items())
        ]
        if fitting:
            return min(fitting, key=lambda card: (not card.default, card.name))
    return None


def _build(
    architecture: Architecture, arguments: dict[str, Any], classes: int, pool: str, drop_path: float
) -> nn.Module:
    name = architecture.name
    if architecture.kind == "dual":
        if classes or pool != "avg" or drop_path:
            raise ModelError(
                f"{name} has no classes, pooling or drop path to choose: it compares observations "
                f"with names, see geofm.zero_shot"
            )
        model = architecture.build(**arguments)
        model.pretrained_cfg = {"architecture": name}  # type: ignore[assignment]
        return model
    arguments = arguments | {"num_classes": classes, "drop_path_rate": drop_path}
    if architecture.kind == "encoder":
        arguments["global_pool"] = pool
    elif pool != "avg":
        raise ModelError(f"{name} labels pixels and cannot pool them")
    if name.startswith("ssl4eco_resnet") and "img_size" in arguments:
        raise TypeError("a ResNet has no img_size: it takes tiles of any size")
    built: nn.Module = build_model_with_cfg(
        architecture.build,
        name,
        pretrained=False,
        pretrained_cfg={"architecture": name, **timm_config(architecture, arguments)},
        kwargs_filter=None if architecture.kind == "encoder" else ("global_pool",),
        **arguments,
    )
    return built


def _feature_pyramid(model: nn.Module, out_indices: Sequence[int] | int | None) -> nn.Module:
    levels = len(model.feature_info)  # type: ignore[arg-type]
    if out_indices is None:
        out_indices = tuple(range(levels))
    chosen = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    if isinstance(out_indices, int):
        # timm: a number asks for the last n levels.
        if not 0 < out_indices <= levels:
            raise ModelError(f"out_indices={out_indices}: there are {levels} levels")
    elif not all(-levels <= i < levels for i in chosen):
        strides = [info["reduction"] for info in model.feature_info]  # type: ignore[union-attr]
        raise ModelError(
            f"out_indices={tuple(chosen)}: there are {levels} levels, 0 to {levels - 1}, with "
            f"strides {strides}. In segmentation_models_pytorch, give an encoder_depth that needs "
            f"no more"
        )
    wrapped: Any = FeatureGetterNet(model, out_indices=out_indices)  # type: ignore[arg-type]
    wrapped.pretrained_cfg = wrapped.default_cfg = model.pretrained_cfg
    built: nn.Module = wrapped
    return built
