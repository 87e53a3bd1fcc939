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
from geofm.adapt import adapt_bands, spec_for_bands
from geofm.cards import InputSpec, WeightCard, published_cards
from geofm.errors import BandError, CardError, LayoutError, ModelError
from geofm.loading import FoundWeights, find_weights, load_exactly
from geofm.preprocess import Preprocess
from geofm.registry import Architecture
from geofm.spectral import Band, Sensor

__all__ = ["create_model", "create_transform", "input_spec_of"]

logger = logging.getLogger(__name__)


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    num_classes: int | None = 0,
    bands: Sequence[str | Band] | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    global_pool: str = "avg",
    drop_path_rate: float = 0.0,
    sensor: str | Sensor | None = None,
    tolerance: float | None = None,
    new_bands: str | None = None,
    trained_bands: Sequence[str | Band] | None = None,
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
            has as many. None: the file's own head, whatever it has, or an error.
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
        trained_bands: The bands, in order, that a file without a card was trained on: those with
            which you built the model whose ``state_dict`` you saved. None: those of the published
            card with the same architecture and number of channels; a warning is logged.
        **kwargs: Arguments of the architecture, for example ``patch_size``, ``stem_padding``.

    Returns:
        The model, in training mode, with four more attributes: ``card`` (its `WeightCard`, None
        for random weights or a file without one), ``weights_origin`` (the card's name or the path,
        None for random weights), ``weights_sha256`` (of the file they were read from, likewise) and
        ``input_spec`` (what its first layer expects, None if that is not known).

    Raises:
        UnknownModelError: No such model or tag.
        WeightsNotFoundError: No such file, or nothing published for this model.
        DownloadError: The checkpoint cannot be fetched and nothing stands in for it.
        HashMismatchError: The fetched file is not the published one.
        LayoutError: The checkpoint does not match the model exactly.
        UnsafeFileError: The checkpoint could only be read by executing code.
        BandError: A band is unknown to the checkpoint.
        ModelError: Arguments contradict each other or the checkpoint, or it has no head
            (num_classes=None).
    """
    architecture, tag = _named(name)
    _check_request(
        architecture,
        num_classes=num_classes,
        bands=bands,
        in_chans=in_chans,
        features_only=features_only,
        out_indices=out_indices,
        only_with_bands={"sensor": sensor, "tolerance": tolerance, "new_bands": new_bands},
        named=bands if bands is not None else trained_bands,
    )
    weights = find_weights(architecture, tag, pretrained)
    if num_classes is None:
        num_classes = _classes_in(architecture, weights)
    inferred = _arguments_in(architecture, weights) if weights else {}
    card = _describing_card(architecture, tag, weights, inferred)
    arguments = _resolve_arguments(architecture, weights, card, inferred, kwargs)
    trained = int(arguments["in_chans"])
    spec = _trained_spec(architecture, card, weights, trained, trained_bands, sensor)
    if weights is None:
        arguments["in_chans"] = in_chans or (trained if bands is None else len(bands))
    else:
        _check_channels(weights, spec, trained, in_chans, bands)
    model = _build(architecture, arguments, card, num_classes, global_pool, drop_path_rate)
    if weights is not None:
        load_exactly(model, weights.state, architecture, weights.origin)
    if bands is not None:
        if spec is None:
            raise BandError(
                f"{name}: no card tells which bands the file takes, so it cannot be adapted; say "
                f"which it was trained on: trained_bands=[...]"
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
    if features_only:
        model = _feature_pyramid(model, out_indices)
    model.card = weights.card if weights else None  # type: ignore[assignment]
    model.weights_origin = weights.origin if weights else None  # type: ignore[assignment]
    model.weights_sha256 = weights.sha256 if weights else None  # type: ignore[assignment]
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

    Returns:
        Its bands, units, statistics and sizes.

    Raises:
        ModelError: It is not known.
        UnknownModelError: No such name.
    """
    if isinstance(model, InputSpec):
        return model
    if isinstance(model, WeightCard):
        return model.input
    if isinstance(model, str):
        return _card_or_default(*_named(model)).input
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


def _named(name: str) -> tuple[Architecture, str | None]:
    base, tag = registry.split_name(name) if isinstance(name, str) else (name, None)
    return registry.architecture(base), tag


def _check_request(
    architecture: Architecture,
    *,
    num_classes: int | None,
    bands: Sequence[Any] | None,
    in_chans: int | None,
    features_only: bool,
    out_indices: Any,
    only_with_bands: Mapping[str, Any],
    named: Sequence[Any] | None,
) -> None:
    """Refuse arguments that contradict each other, before anything is fetched."""
    name = architecture.name
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 0):
        raise ModelError(f"num_classes must be 0 or more, got {num_classes!r}")
    if features_only and architecture.kind != "encoder":
        raise ModelError(f"{name} is no encoder and has no features_only form")
    if out_indices is not None and not features_only:
        raise ModelError("out_indices chooses feature maps; it needs features_only=True")
    if bands is not None and architecture.kind == "dual":
        raise ModelError(
            f"{name} takes the bands of its card; bring yours into their order with "
            f"create_transform(model, bands=[...], fill=...)"
        )
    if in_chans is not None and in_chans < 1:
        raise ModelError(f"in_chans must be 1 or more, got {in_chans}")
    if bands is not None and in_chans is not None and in_chans != len(bands):
        raise ModelError(f"in_chans={in_chans}, but {len(bands)} bands are named")
    idle = [key for key, value in only_with_bands.items() if value is not None]
    if idle and named is None:
        raise ModelError(f"{', '.join(idle)} says how to read bands=[...], which is not given")


def _card_or_default(architecture: Architecture, tag: str | None) -> WeightCard:
    if tag is not None:
        return registry.card_of(architecture, tag)
    default = registry.default_card(architecture)
    return default if default is not None else published_cards()[architecture.input_card]


def _describing_card(
    architecture: Architecture,
    tag: str | None,
    weights: FoundWeights | None,
    inferred: Mapping[str, Any],
) -> WeightCard | None:
    """The card that tells what the model takes: its own, or for a bare file one that fits it."""
    if weights is None:
        return _card_or_default(architecture, tag)
    card = weights.card
    if card is None and tag is not None:
        card = registry.card_of(architecture, tag)
    if card is None:
        return _card_that_fits(architecture, inferred)
    for key, value in card.arguments.items():
        if key in inferred and inferred[key] != value:
            raise CardError(
                f"card {card.name}: arguments.{key} is {value}, but {weights.origin} has "
                f"{inferred[key]}"
            )
    return card


def _resolve_arguments(
    architecture: Architecture,
    weights: FoundWeights | None,
    card: WeightCard | None,
    inferred: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of the constructor: the architecture's, the checkpoint's, the caller's."""
    for key, value in inferred.items():
        asked = given.get(key, architecture.arguments.get(key, value))
        if asked != value:
            assert weights is not None
            raise ModelError(
                _contradiction(architecture, weights.origin, key, value, asked, inferred)
            )
    of_card = dict(card.arguments) if card else {}
    return {**architecture.arguments, **of_card, **inferred, **given}


def _trained_spec(
    architecture: Architecture,
    card: WeightCard | None,
    weights: FoundWeights | None,
    channels: int,
    trained_bands: Sequence[str | Band] | None,
    sensor: str | Sensor | None,
) -> InputSpec | None:
    """What the checkpoint was trained on."""
    if trained_bands is not None:
        if weights is None or weights.card is not None:
            raise ModelError(
                "trained_bands is for a file without a card; here the bands are known: "
                + (" ".join(card.input.bands) if card else "")
            )
        if len(trained_bands) != channels:
            raise ModelError(
                f"{weights.origin} takes {channels} channels, but {len(trained_bands)} "
                f"trained_bands are named"
            )
        like = card or published_cards()[architecture.input_card]
        return spec_for_bands(like.input, trained_bands, sensor)
    if card is None:
        assert weights is not None
        logger.warning(
            "%s: no card tells what its %d channels are; say trained_bands=[...]",
            weights.origin,
            channels,
        )
        return None
    if weights is not None and weights.card is None:
        # The authors' layouts imply the authors' bands; a plain state dict may be anybody's.
        level = logging.WARNING if weights.layout == "native" else logging.INFO
        logger.log(
            level,
            "%s: bands and statistics are taken from card %s%s",
            weights.origin,
            card.name,
            "; if it was trained on others, say trained_bands=[...]"
            if level == logging.WARNING
            else "",
        )
    return card.input


def _check_channels(
    weights: FoundWeights,
    spec: InputSpec | None,
    trained: int,
    in_chans: int | None,
    bands: Sequence[str | Band] | None,
) -> None:
    if bands is None and in_chans not in (None, trained):
        raise ModelError(
            f"{weights.origin} takes {trained} channels"
            + (f" ({', '.join(spec.bands)})" if spec else "")
            + f", not {in_chans}; to use others, name them: bands=[...]"
        )


def _classes_in(architecture: Architecture, weights: FoundWeights | None) -> int:
    """Classes of a file's own head."""
    key = f"{architecture.classifier}.weight"
    if not architecture.classifier:
        raise ModelError(f"{architecture.name} has no head for classes; leave num_classes out")
    if weights is None or key not in weights.state:
        raise ModelError(
            f"{weights.origin if weights else 'an untrained model'} has no head (no {key}), so it "
            f"knows no classes: train one first, with create_model(..., num_classes=n) on labelled "
            f"images (docs/finetuning.md), and give the file that you save then"
        )
    return int(weights.state[key].shape[0])


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
    architecture: Architecture,
    arguments: dict[str, Any],
    card: WeightCard | None,
    classes: int,
    pool: str,
    drop_path: float,
) -> nn.Module:
    name = architecture.name
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path_rate must be from 0 to below 1, got {drop_path}")
    if architecture.kind == "dual":
        if classes or pool != "avg" or drop_path:
            raise ModelError(
                f"{name} has no classes, pooling or drop path to choose: it compares observations "
                f"with names, see geofm.zero_shot"
            )
        if card is not None:
            # It normalizes by itself, so it has to know the ranges.
            pairs = list(zip(card.input.low, card.input.high, strict=True))
            arguments = {"image_range": pairs, "variables": card.auxiliary} | arguments
        model = architecture.build(**arguments)
        model.pretrained_cfg = {"architecture": name}  # type: ignore[assignment]
        return model
    arguments = arguments | {"num_classes": classes, "drop_path_rate": drop_path}
    if architecture.kind == "encoder":
        arguments["global_pool"] = pool
        if pool not in ("", "avg", "max", "avgmax", *(["token"] if "vit" in name else [])):
            raise ModelError(f"global_pool must be 'avg', 'max', 'avgmax' or '', got {pool!r}")
    elif pool not in ("avg", ""):
        raise ModelError(f"{name} labels pixels and cannot pool them")
    elif arguments.pop("stem_padding", "aligned") != "aligned":
        raise ModelError(f"{name} has the aligned padding only, as published")
    if name.startswith("ssl4eco_resnet") and "img_size" in arguments:
        raise TypeError("a ResNet has no img_size: it takes tiles of any size")
    built: nn.Module = build_model_with_cfg(
        architecture.build,
        name,
        pretrained=False,
        pretrained_cfg={"architecture": name, **registry.timm_config(architecture, arguments)},
        kwargs_filter=None if architecture.kind == "encoder" else ("global_pool",),
        **arguments,
    )
    return built


def _feature_pyramid(model: nn.Module, out_indices: Sequence[int] | int | None) -> nn.Module:
    levels = len(model.feature_info)  # type: ignore[arg-type]
    if out_indices is None:
        out_indices = tuple(range(levels))
    chosen = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    if not chosen:
        raise ModelError("out_indices is empty; name at least one level")
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
