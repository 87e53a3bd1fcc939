"""Finding a model's bands among the bands of an image: by name, by alias, or by wavelength."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from geofm.errors import BandError
from geofm.spectral.bands import Band, Sensor
from geofm.spectral.sensors import SENSORS, sensor

__all__ = ["Match", "match_bands", "resolve_bands"]


@dataclass(frozen=True)
class Match:
    """Where one wanted band was found.

    Attributes:
        wanted: Name of the wanted band.
        found: Name of the band it was found in, as the caller wrote it; None where it is missing.
        index: That band's position among the available ones; None where it is missing.
        how: ``"name"``, ``"alias"``, ``"wavelength"`` or ``"missing"``.
    """

    wanted: str
    found: str | None
    index: int | None
    how: str


def resolve_bands(bands: Sequence[str | Band], of: str | Sensor) -> tuple[Band, ...]:
    """The bands that names stand for.

    A name the sensor does not know becomes a band of that name with nothing else known (an elevation
    model stacked with the image, a cloud mask).

    Args:
        bands: Names, aliases or bands.
        of: The sensor whose names they are.

    Returns:
        One band each.

    Raises:
        BandError: The sequence is a single string, or two entries are the same band.
    """
    if isinstance(bands, str):
        raise BandError(
            f"bands must be a list of names, got the string {bands!r}; "
            f"write bands={bands.replace(';', ',').split(',')!r}"
        )
    of = sensor(of)
    out: list[Band] = []
    for band in bands:
        resolved = band if isinstance(band, Band) else of.find(band) or Band(str(band))
        for position, other in enumerate(out):
            if other.name == resolved.name:
                raise BandError(
                    f"band {resolved.name!r} is listed twice, as {_name(bands[position])!r} and "
                    f"{_name(band)!r}: which channel is it?"
                )
        out.append(resolved)
    return tuple(out)


def match_bands(
    wanted: Sequence[str | Band],
    available: Sequence[str | Band],
    *,
    wanted_sensor: str | Sensor = "sentinel2",
    available_sensor: str | Sensor | None = None,
    tolerance: float | None = None,
) -> tuple[Match, ...]:
    """Find each wanted band among the available ones.

    Within one sensor, names and aliases decide, and numbers mean what that sensor means by them.
    Between two sensors a number means nothing ("B5" is red edge on Sentinel-2, near infrared on
    Landsat 8): there the common name decides (``"red"``), and nothing else unless `tolerance` is
    given.

    Args:
        wanted: Bands a model takes.
        available: Bands an image has.
        wanted_sensor: Sensor of the wanted names.
        available_sensor: Sensor of the available names; None for the same one.
        tolerance: Largest distance of centre wavelengths, in nm, at which the nearest available
            band may stand in. None: no band may.

    Returns:
        One match for each wanted band, missing ones included.

    Raises:
        BandError: A band is listed twice, or two wanted bands would take the same available one.
    """
    first = sensor(wanted_sensor)
    second = first if available_sensor is None else sensor(available_sensor)
    wants = resolve_bands(wanted, first)
    haves = resolve_bands(available, second)
    names = [_name(band) for band in available]
    same_names = _shares_names(first, second)

    matches: list[Match] = []
    for want in wants:
        index, how = _find(want, haves, same_names)
        if index is not None and how == "name" and names[index] != want.name:
            how = "alias"
        if index is None and tolerance is not None:
            index, how = _nearest(want, haves, tolerance), "wavelength"
        if index is None:
            how = "missing"
        matches.append(Match(want.name, None if index is None else names[index], index, how))
    _refuse_shared(matches)
    return tuple(matches)


def missing_message(
    matches: Sequence[Match], available: Sequence[str | Band], needed_by: str
) -> str:
    """The message for bands that were not found: which, among what, and what could be done.

    Args:
        matches: From `match_bands`.
        available: What was searched.
        needed_by: What needs the bands.

    Returns:
        A sentence or several.
    """
    missing = [match.wanted for match in matches if match.index is None]
    names = [_name(band) for band in available]
    message = (
        f"{needed_by} needs {', '.join(missing)}, which the input does not have; "
        f"it has {', '.join(names) or 'none'}."
    )
    for name in missing:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        if close and close[0] not in [match.found for match in matches]:
            message += f" Is {close[0]!r} meant to be {name!r}?"
    known = [s for s in SENSORS.values() if names and all(s.find(n) for n in names)]
    if known and not any(s.find(name) for s in known for name in missing):
        message += f" If the names are those of another sensor, say so: sensor={known[0].name!r}."
    return message


def _name(band: str | Band) -> str:
    return band.name if isinstance(band, Band) else str(band)


def _shares_names(a: Sensor, b: Sensor) -> bool:
    # Sentinel-2 A, B and C, and HLS S30, call the same bands by the same names.
    shared = [band for band in a if b.find(band.name) is not None]
    return len(shared) == len(a) and all(
        band.common_name == b[band.name].common_name for band in shared
    )


def _find(want: Band, haves: Sequence[Band], same_names: bool) -> tuple[int | None, str]:
    for index, have in enumerate(haves):
        # A band that no sensor describes (NDVI, elevation) is the same thing everywhere.
        opaque = want.wavelength is None and have.wavelength is None
        if have.name.lower() == want.name.lower() and (same_names or opaque or have == want):
            return index, "name"
    if want.common_name is None:
        return None, "missing"
    named = [i for i, have in enumerate(haves) if have.common_name == want.common_name]
    return (named[0], "alias") if len(named) == 1 and not same_names else (None, "missing")


def _nearest(want: Band, haves: Sequence[Band], tolerance: float) -> int | None:
    if want.wavelength is None:
        return None
    distances = [
        (abs(have.wavelength - want.wavelength), index)
        for index, have in enumerate(haves)
        if have.wavelength is not None
    ]
    distance, index = min(distances, default=(float("inf"), -1))
    return index if distance <= tolerance else None


def _refuse_shared(matches: Sequence[Match]) -> None:
    # One channel under two names would look like two observations to the model.
    taken: dict[int, str] = {}
    for match in matches:
        if match.index is None:
            continue
        if match.index in taken:
            raise BandError(
                f"{match.found!r} is the nearest band to both {taken[match.index]!r} and "
                f"{match.wanted!r}; lower the tolerance, or copy it explicitly with "
                f"fill={{{match.wanted!r}: {match.found!r}}}"
            )
        taken[match.index] = match.wanted
