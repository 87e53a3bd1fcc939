"""From pixels in named bands to what a model takes.

Every step is a function of one sample: units → offset → bands and derived bands → no data →
normalization → size. Nothing depends on the other samples of a batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geofm.cards import InputSpec
from geofm.errors import BandError, PixelError
from geofm.spectral import Band, Match, NormalizedDifference, Sensor, match_bands, missing_message

__all__ = ["Preprocess", "offset_of_baseline"]

logger = logging.getLogger(__name__)

UNITS = ("dn", "reflectance", "uint8")
# Sentinel-2's quantification value: DN = reflectance x 10000.
DN_PER_REFLECTANCE = 10_000.0
# From processing baseline 04.00 on (2022-01-25), stored DN are 1000 too large.
_OFFSET_BASELINE = (4, 0)
_OFFSET_DN = -1000.0

# Limits by which data in other units are recognised. Reflectance above 1 is real (snow, glint,
# cloud tops reach 2.8 in the MMEarth statistics); above 10 it is not.
_MAX_REFLECTANCE = 10.0
_MAX_DN = 65_535.0
_MIN_DN = -2_000.0
# No real scene stays below reflectance 0.0003 everywhere in all bands; reflectance itself does.
_MAX_LOOKS_LIKE_REFLECTANCE = 3.0


def offset_of_baseline(baseline: str) -> float:
    """The number to add to stored DN for a processing baseline.

    Args:
        baseline: As in the product name or metadata: ``"05.09"``, ``"N0509"`` or ``"0509"``.

    Returns:
        -1000 from baseline 04.00 on, else 0.

    Raises:
        PixelError: It is not a baseline.
    """
    digits = baseline.strip().upper().removeprefix("N").replace(".", "")
    if not digits.isdigit() or len(digits) != 4:
        raise PixelError(f"a processing baseline looks like '05.09' or 'N0509', got {baseline!r}")
    return _OFFSET_DN if (int(digits[:2]), int(digits[2:])) >= _OFFSET_BASELINE else 0.0


class Preprocess(nn.Module):
    """Turn pixels of a described image into a model's input.

    Args:
        spec: What the model takes.
        bands: The image's bands, in channel order.
        units: ``"dn"`` (stored integers, reflectance × 10000), ``"reflectance"`` (0 to 1), or
            ``"uint8"`` (0 to 255).
        level: ``"L1C"`` (top of atmosphere) or ``"L2A"`` (surface). Required if the checkpoint's
            statistics differ by level.
        sensor: Sensor whose names `bands` are; None for the model's.
        offset: Added to DN, for example -1000; with ``units="dn"`` only.
        baseline: Processing baseline, from which the offset follows; instead of `offset`.
        nodata: Stored value or values that mean "no data"; None for the card's (not for
            ``"uint8"``, where 0 is black). NaN and infinities always do.
        fill: For bands the image lacks: ``"mean"`` (the training mean), ``"zero"`` (DN 0), or a
            mapping of a missing band to ``"mean"``, ``"zero"`` or the band to copy. None: a missing
            band is an error.
        tolerance: Let the nearest band within this many nm stand in for one that is not found by
            name.
        fit: ``"any"``, ``"crop_or_resize"``, or None for the card's rule.
        size: Side in px for ``"crop_or_resize"``; None for the card's.
        white: Reflectance that a ``"uint8"`` value of 255 means. Sentinel-2 true-colour images
            saturate at 0.3558 (L1C) or 0.2 (L2A).
        statistics: Mean and standard deviation, in DN, of bands the checkpoint was not trained on.

    Raises:
        BandError: A band is missing, repeated, or has no statistics.
        PixelError: Units, level or options are unknown or contradict each other.
    """

    shift: Tensor
    scale: Tensor
    nodata: Tensor
    constant: Tensor
    channels: Tensor

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
        self.fit = fit or spec.fit
        self.size = size or spec.size
        if self.fit not in ("any", "crop_or_resize"):
            raise PixelError(f"fit must be 'any' or 'crop_or_resize', got {fit!r}")
        self.factor, self.offset = _to_dn(units, offset, baseline, white)
        self.matches = match_bands(
            spec.bands,
            bands,
            wanted_sensor=spec.sensor,
            available_sensor=sensor,
            tolerance=tolerance,
        )
        self.source_bands = tuple(b.name if isinstance(b, Band) else str(b) for b in bands)
        self._plan(fill, sensor, tolerance)

        shift, scale = spec.shift_and_scale(self.level)
        shift, scale = _complete_statistics(spec.bands, shift, scale, statistics)
        if any(c == "mean" for c in self.constants.values()) and spec.normalization == "divide":
            raise BandError(
                "fill='mean' needs training means, and this checkpoint divides by a constant and "
                "publishes none; use fill='zero' or copy a band"
            )
        column = (-1, 1, 1)
        self.register_buffer("shift", torch.tensor(shift).view(column), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(column), persistent=False)
        if nodata is None:
            values: Sequence[float] = () if units == "uint8" else spec.nodata
        else:
            values = [nodata] if isinstance(nodata, int | float) else nodata
        self.register_buffer("nodata", torch.tensor(list(values)), persistent=False)
        # What a filled band is after normalization: its mean is 0, DN 0 is -mean / std.
        constant = [
            -shift[i] / scale[i] if self.constants.get(name) == "zero" else 0.0
            for i, name in enumerate(spec.bands)
        ]
        self.register_buffer("constant", torch.tensor(constant).view(column), persistent=False)
        plain = [self.copies.get(name, 0) for name in spec.bands]
        self.register_buffer("channels", torch.tensor(plain), persistent=False)

    def _plan(
        self,
        fill: str | Mapping[str, str] | None,
        sensor: str | Sensor | None,
        tolerance: float | None,
    ) -> None:
        """Decide for every wanted band: a channel to take, an index to compute, or a constant."""
        self.copies: dict[str, int] = {}
        self.derived: dict[str, tuple[NormalizedDifference, tuple[int, int]]] = {}
        self.constants: dict[str, str] = {}
        missing: list[Match] = []
        for match in self.matches:
            if match.index is not None:
                self.copies[match.wanted] = match.index
                if match.how == "wavelength":
                    logger.info("%s stands in for %s", match.found, match.wanted)
                continue
            rule = self.spec.derived.get(match.wanted)
            parts = self._indices_of(rule.bands, sensor, tolerance) if rule else None
            if rule and parts:
                self.derived[match.wanted] = (rule, parts)
                continue
            how = fill if isinstance(fill, str) else (fill or {}).get(match.wanted)
            if how in ("mean", "zero"):
                self.constants[match.wanted] = how
            elif how is not None:
                self.copies[match.wanted] = self._index_to_copy(match.wanted, how, sensor)
            else:
                missing.append(match)
        if missing:
            raise BandError(
                missing_message(missing, self.source_bands, "the model")
                + " To go on without: fill='mean', fill='zero', or fill={'<missing>': '<band to "
                "copy>'}; or create the model for the bands you have (bands=[...])."
            )
        if isinstance(fill, Mapping):
            unused = [name for name in fill if name not in {m.wanted for m in self.matches}]
            if unused:
                raise BandError(
                    f"fill names {', '.join(unused)}, which the model does not take; it takes "
                    f"{', '.join(self.spec.bands)}"
                )
        if not self.copies and not self.derived:
            raise BandError("none of the model's bands is in the input; nothing to compute from")

    def _indices_of(
        self, names: Sequence[str], sensor: str | Sensor | None, tolerance: float | None
    ) -> tuple[int, int] | None:
        found = match_bands(
            names,
            self.source_bands,
            wanted_sensor=self.spec.sensor,
            available_sensor=sensor,
            tolerance=tolerance,
        )
        a, b = (match.index for match in found)
        return None if a is None or b is None else (a, b)

    def _index_to_copy(self, wanted: str, how: str, sensor: str | Sensor | None) -> int:
        (match,) = match_bands(
            [how],
            self.source_bands,
            wanted_sensor=sensor or self.spec.sensor,
            available_sensor=sensor or self.spec.sensor,
        )
        if match.index is None:
            raise BandError(
                f"fill copies {how!r} into {wanted!r}, but the input has "
                f"{', '.join(self.source_bands)}; or use 'mean' or 'zero'"
            )
        return match.index

    def forward(self, pixels: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Prepare pixels.

        Args:
            pixels: (C, H, W), (N, C, H, W) or (T, C, H, W), numpy or torch, any numeric type, with
                C the bands that were described.

        Returns:
            float32 with the model's bands in place of C, the other dimensions kept, unless the size
            rule changes H and W. Missing pixels are 0.

        Raises:
            PixelError: The shape is wrong, or the values cannot be in the stated units.
        """
        tensor = self._as_tensor(pixels)
        floats = tensor.float()
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            # Looks at values, so it cannot be part of an exported graph.
            self._check_values(floats, tensor.dtype)
        return self._prepare(floats)

    def _as_tensor(self, pixels: Tensor | np.ndarray[Any, Any]) -> Tensor:
        if isinstance(pixels, np.ndarray):
            if pixels.dtype.kind not in "iuf":
                raise PixelError(f"pixels must be integers or floats, got {pixels.dtype}")
            # torch has no byte-swapped arrays and little arithmetic for uint16 and uint32.
            wide = pixels.dtype.kind == "f" and pixels.dtype.itemsize > 4
            kept = pixels.dtype in (np.uint8, np.float32)
            pixels = torch.from_numpy(
                np.ascontiguousarray(
                    pixels if kept else pixels.astype(np.float64 if wide else np.float32)
                )
            )
        elif not isinstance(pixels, Tensor):
            raise PixelError(f"pixels must be a numpy array or a tensor, got {type(pixels)}")
        elif pixels.dtype == torch.bool or pixels.is_complex():
            raise PixelError(f"pixels must be integers or floats, got {pixels.dtype}")
        if pixels.ndim not in (3, 4):
            raise PixelError(
                f"pixels must be (C, H, W), (N, C, H, W) or (T, C, H, W), got {tuple(pixels.shape)}"
            )
        if pixels.shape[-3] != len(self.source_bands):
            last = " Are the channels last? Move them: pixels.permute(..., 2, 0, 1)."
            raise PixelError(
                f"pixels have {pixels.shape[-3]} channels, but {len(self.source_bands)} bands were "
                f"named: {', '.join(self.source_bands)}."
                + (last if pixels.shape[-1] == len(self.source_bands) else "")
            )
        return pixels

    def _check_values(self, pixels: Tensor, stored: torch.dtype) -> None:
        used = sorted({*self.copies.values(), *(i for _, p in self.derived.values() for i in p)})
        used = [i for i in used if i not in self._index_channels()]
        values = pixels[..., used, :, :]
        if stored == torch.uint8 and self.units == "dn":
            raise PixelError(
                "pixels are 8-bit, but units='dn' means reflectance x 10000; "
                "for 0 to 255 images say units='uint8'"
            )
        values = values[~self._is_missing(values)]
        if values.numel() == 0:
            return
        low, high = float(values.min()), float(values.max())
        seen = f"values from {low:g} to {high:g} ({stored})"
        if self.units == "dn":
            if high < _MAX_LOOKS_LIKE_REFLECTANCE and bool((values != values.round()).any()):
                raise PixelError(
                    f"units='dn' means reflectance x 10000, but the pixels have {seen}: that looks "
                    f"like reflectance; say units='reflectance'"
                )
            if low < _MIN_DN or high > _MAX_DN:
                raise PixelError(
                    f"units='dn' allows {_MIN_DN:g} to {_MAX_DN:g}, but the pixels have {seen}. Is "
                    f"there a no-data value to name (nodata={low if low < _MIN_DN else high:g})?"
                )
        elif self.units == "reflectance":
            if high > _MAX_REFLECTANCE or low < -1:
                raise PixelError(
                    f"units='reflectance' means 0 to 1, but the pixels have {seen}: "
                    + (
                        f"is there a no-data value to name (nodata={low:g})?"
                        if low < -1
                        else "that looks like DN; say units='dn'"
                    )
                )
            if not stored.is_floating_point and high > 1:
                raise PixelError(
                    f"units='reflectance' means 0 to 1, but the pixels are integers with {seen}"
                )
        elif high > 255 or low < 0:
            raise PixelError(f"units='uint8' means 0 to 255, but the pixels have {seen}")
        elif high <= 1 and bool((values != values.round()).any()):
            raise PixelError(
                f"units='uint8' means 0 to 255, but the pixels have {seen}: that looks like "
                f"reflectance; say units='reflectance'"
            )

    def _index_channels(self) -> set[int]:
        """Channels that hold an index (NDVI), to which limits of reflectance do not apply."""
        return {self.copies[name] for name in self.spec.derived if name in self.copies}

    def _is_missing(self, pixels: Tensor) -> Tensor:
        missing = ~torch.isfinite(pixels)
        for value in self.nodata:
            missing = missing | (pixels == value)
        return missing

    def _prepare(self, pixels: Tensor) -> Tensor:
        missing = self._is_missing(pixels)
        dn = pixels * self.factor + self.offset
        picked = dn.index_select(-3, self.channels)
        absent = missing.index_select(-3, self.channels)
        layers = list(picked.unbind(-3))
        masks = list(absent.unbind(-3))
        for i, name in enumerate(self.spec.bands):
            if name in self.derived:
                rule, (a, b) = self.derived[name]
                first, second = dn.select(-3, a), dn.select(-3, b)
                layers[i] = rule(dict(zip(rule.bands, (first, second), strict=True)))
                masks[i] = missing.select(-3, a) | missing.select(-3, b)
            elif name in self.spec.derived and name in self.copies:
                # An index that came with the image: no offset, and 0 is a value like any other.
                raw = pixels.select(-3, self.copies[name])
                rule = self.spec.derived[name]
                layers[i] = rule.finish(raw * self.factor / rule.scale)
                masks[i] = ~torch.isfinite(raw)
        out = (torch.stack(layers, -3) - self.shift) / self.scale
        mask = torch.stack(masks, -3)
        out = torch.where(mask, torch.zeros_like(out), out)
        if self.constants:
            filled = [name in self.constants for name in self.spec.bands]
            where = torch.tensor(filled, device=out.device).view(-1, 1, 1)
            out = torch.where(where, self.constant.expand_as(out), out)
        return self._fit(out)

    def _fit(self, x: Tensor) -> Tensor:
        if self.fit == "any":
            return x
        height, width = x.shape[-2:]
        side = self.size
        if height >= side and width >= side:
            top, left = (height - side) // 2, (width - side) // 2
            return x[..., top : top + side, left : left + side]
        batched = x if x.ndim == 4 else x[None]
        resized = F.interpolate(batched, size=(side, side), mode="bicubic", align_corners=False)
        return resized if x.ndim == 4 else resized[0]

    def extra_repr(self) -> str:
        """One line for ``print``."""
        taken = [
            f"{m.found}→{m.wanted}" if m.found not in (None, m.wanted) else m.wanted
            for m in self.matches
            if m.wanted not in self.constants
        ]
        filled = [f"{name}={how}" for name, how in self.constants.items()]
        return (
            f"units={self.units}, level={self.level}, offset={self.offset:g}, "
            f"bands=[{', '.join(taken)}]"
            + (f", filled=[{', '.join(filled)}]" if filled else "")
            + f", fit={self.fit}"
        )


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
    if white <= 0:
        raise PixelError(f"white must be positive, got {white}")
    if units == "reflectance":
        return DN_PER_REFLECTANCE, 0.0
    if units == "uint8":
        return DN_PER_REFLECTANCE * white / 255.0, 0.0
    if baseline is not None:
        return 1.0, offset_of_baseline(baseline)
    if offset is not None and abs(offset) < 1:
        raise PixelError(f"offset is added to DN, for example -1000, got {offset:g}")
    return 1.0, float(offset or 0.0)


def _complete_statistics(
    bands: Sequence[str],
    shift: Sequence[float],
    scale: Sequence[float],
    given: Mapping[str, tuple[float, float]] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    given = dict(given or {})
    known = {name: pair for name, *pair in zip(bands, shift, scale, strict=True)}
    unknown = [name for name in bands if np.isnan(known[name]).any() and name not in given]
    if unknown:
        raise BandError(
            f"the checkpoint has no statistics for {', '.join(unknown)}; give them in DN: "
            f"statistics={{{unknown[0]!r}: (mean, std)}}"
        )
    strange = [name for name in given if not np.isnan(known.get(name, [0.0])).any()]
    if strange:
        raise BandError(
            f"statistics are only for bands without their own; the checkpoint has them for, or "
            f"does not take, {', '.join(strange)}"
        )
    pairs = [given.get(name, tuple(known[name])) for name in bands]
    if any(pair[1] <= 0 for pair in pairs):
        raise BandError("a standard deviation must be positive")
    return tuple(float(p[0]) for p in pairs), tuple(float(p[1]) for p in pairs)
