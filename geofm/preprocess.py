"""From pixels in named bands to what a model takes.

Every step is a function of one sample: units → offset → bands and derived bands → no data →
normalization → size. Nothing depends on the other samples of a batch.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geofm.cards import InputSpec
from geofm.errors import BandError, PixelError
from geofm.spectral import (
    Band,
    Match,
    NormalizedDifference,
    Sensor,
    match_bands,
    missing_message,
    resolve_bands,
)
from geofm.spectral import sensor as sensor_of

__all__ = ["Preprocess", "offset_of_baseline"]

logger = logging.getLogger(__name__)

UNITS = ("dn", "reflectance", "uint8")
# Sentinel-2's quantification value: DN = reflectance x 10000.
DN_PER_REFLECTANCE = 10_000.0
# From processing baseline 04.00 on (2022-01-25), stored DN are 1000 too large.
_OFFSET_BASELINE = (4, 0)
_OFFSET_DN = -1000.0
# What Sen2Cor writes when it is not run by ESA.
_NO_BASELINE = "9999"

# Limits by which data in other units are recognised. Reflectance above 1 is real (snow, glint,
# cloud tops reach 2.8 in the MMEarth statistics); above 10 it is not.
_MAX_REFLECTANCE = 10.0
# 65535 itself marks saturated or missing pixels.
_MAX_DN = 65_534.0
_MIN_DN = -2_000.0
# No real scene stays below reflectance 0.0003 nearly everywhere in all bands; reflectance does.
_LOOKS_LIKE_REFLECTANCE = 3.0
_MOST = 0.98
# An index in the scale of DN; a little more than 1 is rounding.
_MAX_INDEX_DN = 10_500.0


def offset_of_baseline(baseline: str) -> float:
    """The number to add to stored DN for a processing baseline.

    Args:
        baseline: As in the product name or metadata: ``"05.09"``, ``"N0509"`` or ``"0509"``.

    Returns:
        -1000 from baseline 04.00 on, else 0.

    Raises:
        PixelError: It is not a baseline, or it is 99.99, which says nothing.
    """
    digits = str(baseline).strip().upper().removeprefix("N").replace(".", "")
    if not isinstance(baseline, str) or not digits.isdecimal() or len(digits) != 4:
        raise PixelError(f"a processing baseline looks like '05.09' or 'N0509', got {baseline!r}")
    if digits == _NO_BASELINE:
        raise PixelError(
            f"{baseline!r} marks products made outside ESA's processing and does not tell the "
            f"offset; read BOA_ADD_OFFSET or RADIO_ADD_OFFSET in the product's metadata and give "
            f"offset=-1000 or offset=0"
        )
    return _OFFSET_DN if (int(digits[:2]), int(digits[2:])) >= _OFFSET_BASELINE else 0.0


@dataclass(frozen=True)
class _Source:
    """Where one of the model's bands comes from.

    Attributes:
        band: The model's band.
        kind: ``"channel"`` (a channel in the stated units), ``"derived"`` (computed from two
            channels), ``"index"`` (a derived band that came with the image), ``"other"`` (a channel
            in units of its own, such as an elevation), ``"mean"`` or ``"zero"``.
        channels: The channels it is made of.
        rule: How to derive or to finish it.
        shown: What ``print`` says.
    """

    band: str
    kind: str
    channels: tuple[int, ...] = ()
    rule: NormalizedDifference | None = None
    shown: str = ""


class Preprocess(nn.Module):
    """Turn pixels of a described image into a model's input.

    Args:
        spec: What the model takes.
        bands: The image's bands, in channel order.
        units: ``"dn"`` (stored integers, reflectance × 10000), ``"reflectance"`` (0 to 1), or
            ``"uint8"`` (0 to 255). A derived band that comes with the image (NDVI) is expected in
            the checkpoint's scale, from -1 to 1, or × 255.
        level: ``"L1C"`` (top of atmosphere) or ``"L2A"`` (surface). Required if the checkpoint's
            statistics differ by level.
        sensor: Sensor whose names `bands` are; None for the model's.
        offset: Added to DN, for example -1000; with ``units="dn"`` only.
        baseline: Processing baseline, from which the offset follows; instead of `offset`.
        nodata: Stored value or values that mean "no data"; None for the card's (not for
            ``"uint8"``, where 0 is black). NaN, infinities and what a masked array masks always do.
            0 never does in an index or a band without wavelength, where it is a value.
        fill: For bands the image lacks: ``"mean"`` (the training mean), ``"zero"`` (DN 0), the name
            of a band to copy, or a mapping of a missing band to one of these. None: a missing band
            is an error.
        tolerance: Let the nearest band within this many nm stand in for one that is not found by
            name.
        fit: ``"any"``, ``"crop_or_resize"``, or None for the card's rule.
        size: Side in px for ``"crop_or_resize"``; None for the card's.
        white: Reflectance that a ``"uint8"`` value of 255 means. Sentinel-2 true-colour images
            saturate at 0.3558 (L1C) or 0.2 (L2A).
        statistics: Mean and standard deviation of bands the checkpoint was not trained on, in DN;
            for bands that are not the sensor's (elevation, radar) in the unit they are stored in.

    Raises:
        BandError: A band is missing, repeated, or has no statistics.
        PixelError: Units, level or options are unknown or contradict each other.
    """

    _like: Tensor

    def __init__(
        self,
        spec: InputSpec,
        bands: Sequence[str | Band],
        units: str,
        level: str | None = None,
        *,
        sensor: str | Sensor | None = None,
        offset: float | None = None,
        baseline: str | None = None,
        nodata: float | Sequence[float] | None = None,
        fill: str | Mapping[str, str] | None = None,
        tolerance: float | None = None,
        fit: str | None = None,
        size: int | None = None,
        white: float = 1.0,
        statistics: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.units = _check_units(units)
        self.level = _check_level(spec, level)
        self.fit, self.size = _check_size(spec, fit, size)
        self.factor, self.offset = _to_dn(units, offset, baseline, white)
        self.nodata = _check_nodata(spec, units, nodata)

        planner = _Planner(spec, bands, sensor, fill, tolerance)
        self.source_bands = planner.names
        self.sources = planner.plan()
        shift, scale = spec.shift_and_scale(self.level)
        self.shift, self.scale = _complete_statistics(spec.bands, shift, scale, statistics)
        if spec.normalization != "zscore" and any(s.kind == "mean" for s in self.sources):
            raise BandError(
                "fill='mean' needs training means, and this checkpoint is normalized without any; "
                "use fill='zero' or copy a band"
            )
        # A model that normalizes by itself tells missing pixels from a value by NaN.
        self.blank = math.nan if spec.normalization == "range" else 0.0
        # Holds no number, only the device and type that the module was moved to.
        self.register_buffer("_like", torch.empty(0, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Prepare pixels.

        Args:
            pixels: (C, H, W), (N, C, H, W) or (T, C, H, W), numpy or torch, any numeric type, with
                C the bands that were described.

        Returns:
            float32 (or what the module was cast to; it computes in float32) with the model's bands
            in place of C, the other dimensions kept, unless the size rule changes H and W. Missing
            pixels are 0, or NaN for a model that normalizes by itself. Tensors stay on their
            device, arrays go to the module's.

        Raises:
            PixelError: The shape is wrong, or the values cannot be in the stated units.
        """
        stored = str(pixels.dtype) if isinstance(pixels, np.ndarray | Tensor) else ""
        floats = self._as_floats(pixels)
        self._check_shape(floats)
        gaps = True
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[no-untyped-call]
            # Looks at values, so it cannot be part of an exported graph.
            gaps = self._check_values(floats, stored)
        return self._fit(self._prepare(floats, gaps)).to(self._like.dtype)

    def _as_floats(self, pixels: Tensor | np.ndarray[Any, Any]) -> Tensor:
        if isinstance(pixels, np.ndarray):
            if pixels.dtype.kind not in "iuf":
                raise PixelError(f"pixels must be integers or floats, got {pixels.dtype}")
            # A copy, as torch takes neither byte-swapped, reversed nor read-only arrays.
            with np.errstate(over="ignore"):
                floats = pixels.astype(np.float32, order="C")
            if isinstance(floats, np.ma.MaskedArray):
                floats = floats.filled(np.nan)
            return torch.from_numpy(np.asarray(floats)).to(self._like.device)
        if not isinstance(pixels, Tensor):
            raise PixelError(f"pixels must be a numpy array or a tensor, got {type(pixels)}")
        if pixels.dtype == torch.bool or pixels.is_complex():
            raise PixelError(f"pixels must be integers or floats, got {pixels.dtype}")
        return pixels.float()

    def _check_shape(self, pixels: Tensor) -> None:
        if pixels.ndim not in (3, 4):
            raise PixelError(
                f"pixels must be (C, H, W), (N, C, H, W) or (T, C, H, W), got {tuple(pixels.shape)}"
            )
        if pixels.shape[-3] != len(self.source_bands):
            last = " Are the channels last? Move them to the front of height and width."
            raise PixelError(
                f"pixels have {pixels.shape[-3]} channels, but {len(self.source_bands)} bands were "
                f"named: {', '.join(self.source_bands)}; the shape is {tuple(pixels.shape)}."
                + (last if pixels.shape[-1] == len(self.source_bands) else "")
            )
        if pixels.shape[-1] == 0 or pixels.shape[-2] == 0:
            raise PixelError(f"pixels have no height or no width: {tuple(pixels.shape)}")

    def _check_values(self, pixels: Tensor, stored: str) -> bool:
        """Refuse samples that cannot be in the stated units, each judged by itself.

        Returns:
            Whether any value may be missing.
        """
        # Channels in units of their own cannot be judged, and are not looked at.
        gaps = any(s.kind == "other" for s in self.sources)
        for kinds in (("channel", "derived"), ("index",)):
            used = sorted({c for s in self.sources if s.kind in kinds for c in s.channels})
            if not used:
                continue
            some = pixels if len(used) == pixels.shape[-3] else pixels[..., used, :, :]
            values = some.reshape(-1, len(used), *pixels.shape[-2:])
            if kinds == ("index",):
                missing = self._is_missing_in_other(values)
            else:
                missing = self._is_missing(values)
            gaps_here = bool(missing.any())
            gaps = gaps or gaps_here
            seen = _seen(values, missing if gaps_here else None, stored)
            for number, one in enumerate(seen):
                if one.low > one.high:
                    continue
                judge = _index_refusal if kinds == ("index",) else _refusal
                problem = judge(self.units, one)
                if problem:
                    where = f" (sample {number} of {len(seen)})" if len(seen) > 1 else ""
                    raise PixelError(problem + where)
        return gaps

    def _is_missing(self, pixels: Tensor) -> Tensor:
        missing = self._is_missing_in_other(pixels)
        return missing | (pixels == 0) if 0 in self.nodata else missing

    def _is_missing_in_other(self, pixels: Tensor) -> Tensor:
        # Where 0 is a value like any other: an index, an elevation. NaN is not below infinity.
        missing = ~(pixels.abs() < torch.inf)
        for value in self.nodata:
            if value != 0:
                missing = missing | (pixels == value)
        return missing

    def _prepare(self, pixels: Tensor, gaps: bool) -> Tensor:
        layers = []
        for source, shift, scale in zip(self.sources, self.shift, self.scale, strict=True):
            planes = [pixels.select(-3, channel) for channel in source.channels]
            missing = None
            if source.kind == "mean":
                layer = torch.full_like(pixels.select(-3, 0), shift)
            elif source.kind == "zero":
                layer = torch.zeros_like(pixels.select(-3, 0))
            elif source.kind == "channel":
                layer = planes[0] * self.factor + self.offset
                missing = self._is_missing(planes[0]) if gaps else None
            elif source.kind == "derived":
                assert source.rule is not None
                parts = [plane * self.factor + self.offset for plane in planes]
                layer = source.rule(dict(zip(source.rule.bands, parts, strict=True)))
                if gaps:
                    missing = self._is_missing(planes[0]) | self._is_missing(planes[1])
            else:
                layer = planes[0]
                missing = self._is_missing_in_other(layer) if gaps else None
                if source.rule is not None:
                    unit = {"dn": source.rule.scale, "reflectance": 1.0, "uint8": 255.0}
                    layer = source.rule.finish(layer / unit[self.units])
            layer = (layer - shift) / scale
            layers.append(layer if missing is None else layer.masked_fill(missing, self.blank))
        return torch.stack(layers, -3)

    def _fit(self, x: Tensor) -> Tensor:
        if self.fit == "any":
            return x
        height, width = x.shape[-2:]
        side = self.size
        if height >= side and width >= side:
            top, left = (height - side) // 2, (width - side) // 2
            return x[..., top : top + side, left : left + side]
        batched = x if x.ndim == 4 else x[None]
        resized = nn.functional.interpolate(
            batched, size=(side, side), mode="bicubic", align_corners=False
        )
        return resized if x.ndim == 4 else resized[0]

    def extra_repr(self) -> str:
        """One line for ``print``."""
        return (
            f"units={self.units}, level={self.level}, offset={self.offset:g}, "
            f"nodata={[*self.nodata]}, "
            f"bands=[{', '.join(source.shown for source in self.sources)}], fit={self.fit}"
            + (f", size={self.size}" if self.fit != "any" else "")
        )


class _Planner:
    """Decides for every band of a model where it comes from.

    Args:
        spec: What the model takes.
        bands: The image's bands, in channel order.
        sensor: Sensor whose names `bands` are; None for the model's.
        fill: As in `Preprocess`.
        tolerance: As in `Preprocess`.
    """

    def __init__(
        self,
        spec: InputSpec,
        bands: Sequence[str | Band],
        sensor: str | Sensor | None,
        fill: str | Mapping[str, str] | None,
        tolerance: float | None,
    ) -> None:
        self.spec = spec
        self.own = sensor_of(spec.sensor)
        self.sensor = self.own if sensor is None else sensor_of(sensor)
        self.resolved = resolve_bands(bands, self.sensor)
        self.bands = tuple(bands)
        self.names = tuple(b.name if isinstance(b, Band) else str(b) for b in bands)
        self.tolerance = tolerance
        self.fill = self._check_fill(fill)

    def plan(self) -> tuple[_Source, ...]:
        """One source for each of the model's bands.

        Raises:
            BandError: A band is missing and no fill was chosen, or nothing is left but fills.
        """
        matches = self._match(self.spec.bands)
        sources = []
        missing = []
        for match in matches:
            source = self._found(match) or self._derived(match.wanted) or self._filled(match.wanted)
            if source is None:
                missing.append(match)
            else:
                sources.append(source)
        if missing:
            found = [match for match in matches if match.index is not None]
            raise BandError(
                missing_message([*missing, *found], self.bands, "the model", read_as=self.sensor)
                + " To go on without: fill='mean', fill='zero', or fill={'<missing>': '<band to "
                "copy>'}; or create the model for the bands you have (bands=[...])."
            )
        if not any(source.channels for source in sources):
            raise BandError(
                missing_message(
                    [Match(band, None, None, "missing") for band in self.spec.bands],
                    self.bands,
                    "the model",
                    read_as=self.sensor,
                )
                + " With none of them there is nothing to compute from."
            )
        return tuple(sources)

    def _match(self, wanted: Sequence[str]) -> tuple[Match, ...]:
        return match_bands(
            wanted,
            self.bands,
            wanted_sensor=self.own,
            available_sensor=self.sensor,
            tolerance=self.tolerance,
        )

    def _check_fill(self, fill: str | Mapping[str, str] | None) -> str | Mapping[str, str] | None:
        if fill is None or isinstance(fill, str):
            return fill
        if not isinstance(fill, Mapping):
            raise PixelError(f"fill is 'mean', 'zero', a band or a mapping of these, got {fill!r}")
        parents = [name for rule in self.spec.derived.values() for name in rule.bands]
        known = {*self.spec.bands, *parents}
        rules = {}
        for name, how in fill.items():
            band = self.own.find(name)
            own = name if name in known or band is None else band.name
            if own not in known:
                raise BandError(
                    f"fill names {name}, which the model does not take; it takes "
                    f"{', '.join(self.spec.bands)}"
                )
            rules[own] = how
        return rules

    def _found(self, match: Match) -> _Source | None:
        if match.index is None:
            return None
        name = match.wanted
        shown = name if match.found == name else f"{match.found}→{name}"
        if match.how == "wavelength":
            logger.info("%s stands in for %s", match.found, name)
        have = self.resolved[match.index]
        if name in self.spec.derived:
            return _Source(name, "index", (match.index,), self.spec.derived[name], shown)
        spectral = self.own.find(name) or have.wavelength or have.common_name
        return _Source(name, "channel" if spectral else "other", (match.index,), None, shown)

    def _derived(self, name: str) -> _Source | None:
        rule = self.spec.derived.get(name)
        if rule is None or (isinstance(self.fill, Mapping) and name in self.fill):
            return None
        channels = []
        for match in self._match(rule.bands):
            index = match.index
            how = self._how(match.wanted)
            if index is None and how is not None and how not in ("mean", "zero"):
                index = self._to_copy(match.wanted, how)
            if index is None:
                return None
            channels.append(index)
        parts = ", ".join(self.names[channel] for channel in channels)
        return _Source(name, "derived", tuple(channels), rule, f"({parts})→{name}")

    def _filled(self, name: str) -> _Source | None:
        how = self._how(name)
        if how is None:
            return None
        if how in ("mean", "zero"):
            return _Source(name, how, shown=f"{name}={how}")
        channel = self._to_copy(name, how)
        return _Source(name, "channel", (channel,), None, f"{self.names[channel]}→{name}")

    def _how(self, name: str) -> str | None:
        return self.fill.get(name) if isinstance(self.fill, Mapping) else self.fill

    def _to_copy(self, wanted: str, how: str) -> int:
        (match,) = match_bands(
            [how], self.bands, wanted_sensor=self.sensor, available_sensor=self.sensor
        )
        if match.index is None:
            raise BandError(
                f"fill copies {how!r} into {wanted!r}, but the input has "
                f"{', '.join(self.names)}; or use 'mean' or 'zero'"
            )
        return match.index


@dataclass(frozen=True)
class _Seen:
    """What the valid pixels of one sample are like.

    Attributes:
        low: Lowest value.
        high: Highest value.
        whole: Whether all are whole numbers.
        small: Share of values that would be reflectance rather than DN.
        stored: The type they came in.
    """

    low: float
    high: float
    whole: bool
    small: float
    stored: str

    @property
    def integer(self) -> bool:
        return "int" in self.stored

    def __str__(self) -> str:
        return f"values from {_number(self.low)} to {_number(self.high)} ({self.stored})"


def _seen(values: Tensor, missing: Tensor | None, stored: str) -> list[_Seen]:
    """What samples are like, (N, C, H, W); `missing` is None where nothing is."""
    lowest = values if missing is None else values.masked_fill(missing, torch.inf)
    highest = values if missing is None else values.masked_fill(missing, -torch.inf)
    lows, highs = lowest.amin((1, 2, 3)).tolist(), highest.amax((1, 2, 3)).tolist()
    wholes, smalls = [True] * len(lows), [0.0] * len(lows)
    # The slow looks at all values only where they tell something: integers are whole.
    if "int" not in stored:
        whole = values == values.round()
        whole = whole if missing is None else whole | missing
        wholes = whole.flatten(1).all(1).tolist()
    if not all(wholes):
        known = torch.ones_like(values, dtype=torch.bool) if missing is None else ~missing
        small = (values.abs() < _LOOKS_LIKE_REFLECTANCE) & known
        smalls = (small.flatten(1).sum(1) / known.flatten(1).sum(1)).tolist()
    rows = zip(lows, highs, wholes, smalls, strict=True)
    return [_Seen(low, high, whole, small, stored) for low, high, whole, small in rows]


def _number(value: float) -> str:
    """As short as can be, but exact: the reader may copy it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _refusal(units: str, seen: _Seen) -> str | None:
    """Why pixels cannot be in the stated units; None if they can."""
    says = {
        "dn": "units='dn' means reflectance x 10000",
        "reflectance": "units='reflectance' means 0 to 1",
        "uint8": "units='uint8' means 0 to 255",
    }[units]
    problem = f"{says}, but the pixels have {seen}"
    nodata = f"{problem}. Is there a no-data value to name (nodata={{}})?"
    like_reflectance = f"{problem}: that looks like reflectance; say units='reflectance'"
    if units == "dn":
        if seen.stored.endswith("int8"):
            return f"{problem}: these are 8 bits; for 0 to 255 images say units='uint8'"
        if seen.low < _MIN_DN:
            return nodata.format(_number(seen.low))
        if seen.high > _MAX_DN:
            return nodata.format(_number(seen.high))
        if seen.small > _MOST and not seen.whole:
            return like_reflectance
    elif units == "reflectance":
        if seen.integer:
            meant = "uint8" if seen.stored.endswith("int8") else "dn"
            return f"{problem}: integers are not reflectance; say units='{meant}'"
        if seen.low < -1:
            return nodata.format(_number(seen.low))
        if seen.high > _MAX_REFLECTANCE:
            return f"{problem}: that looks like DN; say units='dn'"
    elif seen.low < 0:
        return nodata.format(_number(seen.low))
    elif seen.high > 255:
        return f"{problem}: that looks like DN; say units='dn'"
    elif seen.high <= 1 and not seen.whole:
        return like_reflectance
    return None


def _index_refusal(units: str, seen: _Seen) -> str | None:
    """The same for an index that comes with the image, in the scale that goes with the units."""
    problem = f"the image's own index (NDVI) has {seen}, which does not go with units={units!r}"
    help_ = "scale it, or leave it out: it is computed from its bands"
    if units == "dn" and seen.low >= -1 and seen.high <= 1 and not seen.whole:
        return f"{problem} (× 10000); {help_}"
    if units == "dn" and max(-seen.low, seen.high) > _MAX_INDEX_DN:
        return f"{problem} (-10000 to 10000); {help_}"
    if units == "reflectance" and max(-seen.low, seen.high) > _MAX_INDEX_DN / 10_000:
        return f"{problem} (-1 to 1); {help_}"
    if units == "uint8" and (seen.low < 0 or seen.high > 255 or not (seen.whole or seen.high > 1)):
        return f"{problem} (0 to 255); {help_}"
    return None


def _check_units(units: str) -> str:
    if units not in UNITS:
        raise PixelError(
            f"units must be 'dn' (reflectance x 10000), 'reflectance' (0 to 1) or 'uint8' "
            f"(0 to 255), got {units!r}"
        )
    return units


def _check_level(spec: InputSpec, level: str | None) -> str | None:
    if level is not None and level not in ("L1C", "L2A"):
        raise PixelError(f"level must be 'L1C' or 'L2A', got {level!r}")
    if level is None and spec.level_matters:
        raise PixelError(
            f"this checkpoint's statistics differ by product level ({', '.join(spec.statistics)}): "
            f"say level='L2A' for surface reflectance or level='L1C' for top of atmosphere"
        )
    if level is not None and level not in spec.levels:
        warnings.warn(
            f"the checkpoint was trained on {', '.join(spec.levels)} only; {level} pixels are "
            f"prepared alike, but lie outside its training data",
            stacklevel=4,
        )
    return level


def _check_size(spec: InputSpec, fit: str | None, size: int | None) -> tuple[str, int]:
    rule = spec.fit if fit is None else fit
    if rule not in ("any", "crop_or_resize"):
        raise PixelError(f"fit must be 'any' or 'crop_or_resize', got {fit!r}")
    if size is None:
        return rule, spec.size
    if rule == "any":
        raise PixelError(
            f"size={size} has no effect with fit='any', which keeps every tile as it is; "
            f"add fit='crop_or_resize'"
        )
    if not isinstance(size, int) or size < 1:
        raise PixelError(f"size must be a number of pixels, got {size!r}")
    return rule, int(size)


def _check_nodata(
    spec: InputSpec, units: str, nodata: float | Sequence[float] | None
) -> tuple[float, ...]:
    if nodata is None:
        return () if units == "uint8" else spec.nodata
    try:
        values = np.asarray(nodata, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PixelError(f"nodata must be a number or several, got {nodata!r}") from error
    # As the pixels will be: 0.1 is another number in float32.
    with np.errstate(over="ignore"):
        kept = values.ravel().astype(np.float32)
    return tuple(float(value) for value in kept if np.isfinite(value))


def _to_dn(
    units: str, offset: float | None, baseline: str | None, white: float
) -> tuple[float, float]:
    """Factor and offset with which ``stored * factor + offset`` is DN."""
    if offset is not None and baseline is not None:
        raise PixelError("give offset or baseline, not both: the offset follows from the baseline")
    if units != "dn" and (offset or baseline is not None):
        raise PixelError(
            f"an offset or a baseline belongs to units='dn'; {units} has none left to remove"
        )
    if white != 1.0 and units != "uint8":
        raise PixelError("white belongs to units='uint8': the reflectance that 255 means")
    if not 0 < white < math.inf:
        raise PixelError(f"white must be positive, got {white}")
    if units == "reflectance":
        return DN_PER_REFLECTANCE, 0.0
    if units == "uint8":
        return DN_PER_REFLECTANCE * white / 255.0, 0.0
    if baseline is not None:
        return 1.0, offset_of_baseline(baseline)
    if offset is not None and not isinstance(offset, int | float):
        raise PixelError(f"offset is a number, for example -1000; got {offset!r}")
    if offset and not -math.inf < offset <= -1:
        raise PixelError(
            f"offset is added to DN to take away what the product added: -1000 from baseline "
            f"04.00 on; got {offset:g}"
        )
    return 1.0, float(offset or 0.0)


def _complete_statistics(
    bands: Sequence[str],
    shift: Sequence[float],
    scale: Sequence[float],
    given: Mapping[str, tuple[float, float]] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    given = dict(given or {})
    for name, pair in given.items():
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise BandError(f"statistics of {name} must be (mean, std), got {pair!r}")
    known = {name: pair for name, *pair in zip(bands, shift, scale, strict=True)}
    unknown = [name for name in bands if np.isnan(known[name]).any() and name not in given]
    if unknown:
        raise BandError(
            f"the checkpoint has no statistics for {', '.join(unknown)}; give them: "
            f"statistics={{{unknown[0]!r}: (mean, std)}}, in DN"
        )
    strange = [name for name in given if not np.isnan(known.get(name, [0.0])).any()]
    if strange:
        raise BandError(
            f"statistics are only for bands without their own; the checkpoint has them for, or "
            f"does not take, {', '.join(strange)}"
        )
    pairs = [given.get(name, tuple(known[name])) for name in bands]
    if not all(math.isfinite(mean) and 0 < std < math.inf for mean, std in pairs):
        raise BandError("a mean must be finite and a standard deviation positive")
    return tuple(float(p[0]) for p in pairs), tuple(float(p[1]) for p in pairs)
