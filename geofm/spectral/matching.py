"""Finding a model's bands among the bands of an image: by name, by alias, or by wavelength."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from geofm.errors import BandError
from geofm.spectral.bands import Band, Sensor
from geofm.spectral.names import refuse_string
from geofm.spectral.sensors import SENSORS, sensor

__all__ = ["Match", "match_bands", "missing_message", "resolve_bands"]

# Centre wavelengths, in nm, within which two bands of one name are one band: those of Sentinel-2A,
# B and C differ by up to 17 nm, different bands of one name by 30 and more.
_SAME_BAND = 25.0


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

    A name the sensor does not know becomes a band of that name with nothing else known (an
    elevation model stacked with the image, a cloud mask). A `Band` that says nothing but its name
    is taken as that name; any other stands for itself.

    Args:
        bands: Names, aliases or bands.
        of: The sensor whose names they are.

    Returns:
        One band each.

    Raises:
        BandError: The sequence is a single string, an entry is neither a name nor a band, or two
            entries are the same band.
    """
    refuse_string(bands, "bands")
    of = sensor(of)
    out: list[Band] = []
    positions: dict[str, int] = {}
    for position, band in enumerate(bands):
        if not isinstance(band, str | Band):
            raise BandError(
                f"bands must be names or Band objects, got {band!r} ({type(band).__name__})"
            )
        known = band if isinstance(band, Band) and _describes(band) else of.find(_name(band))
        resolved = known or Band(_name(band))
        first = positions.setdefault(resolved.name.lower(), position)
        if first != position:
            raise BandError(
                f"band {resolved.name!r} is listed twice, as {_name(bands[first])!r} and "
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

    Within one sensor, names and aliases decide. Between two sensors a number alone means nothing
    ("B5" is red edge on Sentinel-2, near infrared on Landsat 8): there the common name decides
    (``"red"``), or the same name for the same wavelength, and nothing else unless `tolerance` is
    given. Available bands that nobody wants are ignored.

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

    matches: list[Match] = []
    for want in wants:
        index = _find(want, haves, one_sensor=first == second)
        how = "name" if index is not None and names[index] == want.name else "alias"
        if index is None and tolerance is not None:
            index, how = _nearest(want, haves, tolerance), "wavelength"
        if index is None:
            how = "missing"
        matches.append(Match(want.name, None if index is None else names[index], index, how))
    _refuse_shared(matches)
    return tuple(matches)


def missing_message(
    matches: Sequence[Match],
    available: Sequence[str | Band],
    needed_by: str,
    *,
    named: Sequence[str | Band] | None = None,
    read_as: str | Sensor = "sentinel2",
) -> str:
    """The message for bands that were not found: which, among what, and what could be done.

    Args:
        matches: From `match_bands`.
        available: What was searched.
        needed_by: What needs the bands.
        named: The names the caller chose, which may be another sensor's; None for `available`.
        read_as: The sensor they were taken for.

    Returns:
        A sentence or several.
    """
    missing = [match.wanted for match in matches if match.index is None]
    names = [_name(band) for band in available]
    message = (
        f"{needed_by} needs {', '.join(missing)}, which the input does not have; "
        f"it has {', '.join(names) or 'none'}."
    )
    read_as = sensor(read_as)
    # A name that means something is no misspelling of another.
    odd = [name for name in names if read_as.find(name) is None]
    found = {match.found for match in matches}
    # One letter is near to too many names to mean one of them.
    odd = [name for name in odd if name not in found and len(name) > 1]
    for name in missing:
        close = difflib.get_close_matches(name.lower(), [o.lower() for o in odd], n=1)
        for meant in [o for o in odd if o.lower() in close]:
            message += f" Is {meant!r} meant to be {name!r}?"
    others = _sensors_knowing(available if named is None else named, read_as)
    if others:
        message += (
            f" If the names are those of another sensor, say so: "
            f"sensor={' or '.join(repr(other) for other in others)}."
        )
    return message


def _sensors_knowing(bands: Sequence[str | Band], read_as: Sensor) -> list[str]:
    """Sensors that know all the names, if `read_as` does not."""
    names = [_name(band) for band in bands]
    names = [name for name in names if any(s.find(name) for s in SENSORS.values())]
    if all(read_as.find(name) for name in names):
        return []
    return [s.name for s in SENSORS.values() if all(s.find(name) for name in names)]


def _name(band: str | Band) -> str:
    return band.name if isinstance(band, Band) else str(band)


def _describes(band: Band) -> bool:
    return band.wavelength is not None or band.common_name is not None


def _find(want: Band, haves: Sequence[Band], one_sensor: bool) -> int | None:
    for index, have in enumerate(haves):
        if have.name.lower() == want.name.lower() and _agree(want, have, one_sensor):
            return index
    if want.common_name is None:
        return None
    named = [i for i, have in enumerate(haves) if have.common_name == want.common_name]
    return named[0] if len(named) == 1 else None


def _agree(a: Band, b: Band, one_sensor: bool) -> bool:
    """Whether two bands of one name are one band."""
    if a == b:
        return True
    if not _describes(a) or not _describes(b):
        # A band that no sensor describes (NDVI, elevation) is the same thing everywhere.
        return one_sensor or not (_describes(a) or _describes(b))
    if a.wavelength is not None and b.wavelength is not None:
        return abs(a.wavelength - b.wavelength) <= _SAME_BAND
    return a.common_name == b.common_name


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
    taken: dict[int, Match] = {}
    for match in matches:
        if match.index is None:
            continue
        other = taken.setdefault(match.index, match)
        if other is not match:
            # The one that a name gives keeps the band; the other has to do without.
            loser = match if match.how == "wavelength" else other
            raise BandError(
                f"{match.found!r} would be both {other.wanted!r} and {match.wanted!r}; lower the "
                f"tolerance, so that {loser.wanted!r} is missing, or copy it on purpose: "
                f"create_transform(..., fill={{{loser.wanted!r}: {match.found!r}}})"
            )
