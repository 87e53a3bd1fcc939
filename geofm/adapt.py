"""Fitting a model's first layer to other bands: select, reorder, and begin new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from geofm.cards import InputSpec, Statistics
from geofm.errors import BandError, ModelError
from geofm.registry import Architecture
from geofm.spectral import Band, Match, Sensor, match_bands, missing_message
from geofm.spectral import sensor as sensor_of

__all__ = ["adapt_bands", "spec_for_bands"]


def adapt_bands(
    model: nn.Module,
    architecture: Architecture,
    spec: InputSpec,
    bands: Sequence[str | Band],
    *,
    sensor: str | Sensor | None,
    tolerance: float | None,
    new_bands: str | None,
    trained: bool,
) -> InputSpec:
    """Select and reorder the input channels of a model's first layer.

    Args:
        model: The model; a trained one is changed in place.
        architecture: Says which layer is the first.
        spec: What the model takes now.
        bands: What it shall take, in order.
        sensor: Sensor whose names `bands` are; None for the model's.
        tolerance: Largest distance in nm at which a near band's weights may stand in.
        new_bands: ``"mean"`` to begin unknown bands from the mean of the others' weights.
        trained: Whether there are weights to adapt; an untrained model was built to fit.

    Returns:
        What the model takes then; NaN stands for statistics that nobody has measured.

    Raises:
        BandError: A band is unknown to the model, or there are none.
        ModelError: `new_bands` is not known.
    """
    if new_bands not in (None, "mean"):
        raise ModelError(f"new_bands must be 'mean' or None, got {new_bands!r}")
    if len(bands) == 0:
        raise BandError("bands is empty; name at least one")
    matches = match_bands(
        bands,
        spec.bands,
        wanted_sensor=sensor or spec.sensor,
        available_sensor=spec.sensor,
        tolerance=tolerance,
    )
    absent = [match for match in matches if match.index is None]
    if absent and trained and new_bands is None:
        raise BandError(
            missing_message(
                absent,
                spec.bands,
                "the new first layer",
                named=bands,
                read_as=sensor or spec.sensor,
            ).replace("the input", "the checkpoint")
            + " To start such bands from the mean of the others: new_bands='mean'; to let near "
            "wavelengths stand in: tolerance=<nm>."
        )
    if trained:
        _select_channels(model.get_submodule(architecture.first_conv), matches)
        model.in_chans = len(matches)  # type: ignore[assignment]
        config: Any = model.pretrained_cfg
        config["input_size"] = (len(matches), *config["input_size"][1:])
    return _adapted_spec(spec, matches, sensor)


def spec_for_bands(
    spec: InputSpec, bands: Sequence[str | Band], sensor: str | Sensor | None = None
) -> InputSpec:
    """A specification like `spec`, for other bands.

    Args:
        spec: Where statistics are taken from.
        bands: The bands, in channel order.
        sensor: Sensor whose names they are; None for that of `spec`.

    Returns:
        The same normalization, with NaN for statistics of bands that `spec` does not have.

    Raises:
        BandError: A band is repeated.
    """
    matches = match_bands(
        bands,
        spec.bands,
        wanted_sensor=sensor or spec.sensor,
        available_sensor=spec.sensor,
    )
    return _adapted_spec(spec, matches, sensor)


def _select_channels(conv: nn.Module, matches: Sequence[Match]) -> None:
    assert isinstance(conv, nn.Conv2d)
    old = conv.weight.detach()
    mean = old.mean(dim=1)
    columns = [mean if m.index is None else old[:, m.index] for m in matches]
    conv.weight = nn.Parameter(torch.stack(columns, dim=1))
    conv.in_channels = len(columns)


def _adapted_spec(
    spec: InputSpec,
    matches: Sequence[Match],
    of: str | Sensor | None,
) -> InputSpec:
    names = [match.wanted for match in matches]
    new = sensor_of(spec.sensor if of is None else of)
    nan = float("nan")

    def pick(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(nan if m.index is None else values[m.index] for m in matches)

    derived = {}
    for name, rule in spec.derived.items():
        if name not in names:
            continue
        # The rule's bands under the new sensor's names: "nir" finds B8 here and B5 there.
        old = sensor_of(spec.sensor)
        parts = [
            new.find(part) if old == new else _counterpart(old[part], new) for part in rule.bands
        ]
        if parts[0] is None or parts[1] is None:
            raise BandError(
                f"{name} is computed from {rule.bands[0]} and {rule.bands[1]} of {old.name}, which "
                f"{new.name} has no counterparts of"
            )
        derived[name] = replace(rule, bands=(parts[0].name, parts[1].name))
    return replace(
        spec,
        sensor=new.name,
        bands=tuple(names),
        statistics={
            level: Statistics(pick(s.mean), pick(s.std)) for level, s in spec.statistics.items()
        },
        derived=derived,
    )


def _counterpart(band: Band, among: Sensor) -> Band | None:
    return None if band.common_name is None else among.find(band.common_name)
