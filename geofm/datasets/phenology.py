"""Where and when SSL4Eco looks: an equal-distance grid, and seasons from vegetation's own calendar.

For those who build such a data set. Plekhanova et al. 2025 (arXiv 2504.18256) take the seasons of a
place from MODIS MCD12Q2, whose days tell when the vegetation index (EVI) first crosses 15 % and
90 % of its yearly amplitude (greenup, maturity) and last crosses 90 % and 15 % (senescence,
dormancy).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geofm.errors import GeofmError

__all__ = [
    "SEASONS",
    "SeasonError",
    "SeasonWindows",
    "choose_scenes",
    "global_grid",
    "season_windows",
]

SEASONS = ("spring", "summer", "autumn", "winter")
"""The seasons in the order of `SeasonWindows`."""

_YEAR = 365
# Of a sphere with the Earth's mean radius, 6371.0088 km.
_KM_PER_DEGREE = 111.19508


class SeasonError(GeofmError, ValueError):
    """Days, clouds or a grid that cannot be."""


@dataclass(frozen=True, eq=False)
class SeasonWindows:
    """The four seasons of one place or many; together they make up one year.

    Attributes:
        start: First day of each season in `SEASONS`, (..., 4), day of the year from 1 to below 366.
        length: Days to the beginning of the next season, (..., 4); a window may reach into the
            next year. Where a day of the calendar was missing, both are NaN.
    """

    start: NDArray[np.float64]
    length: NDArray[np.float64]

    @property
    def end(self) -> NDArray[np.float64]:
        """First day after each season, (..., 4)."""
        return _day(self.start + self.length)

    @property
    def middle(self) -> NDArray[np.float64]:
        """Day in the middle of each season, (..., 4)."""
        return _day(self.start + self.length / 2)


def season_windows(
    greenup: ArrayLike, maturity: ArrayLike, senescence: ArrayLike, dormancy: ArrayLike
) -> SeasonWindows:
    """The seasons between the turns of the vegetation year.

    Spring is from greenup to maturity, summer to senescence, autumn to dormancy, and winter to the
    next greenup, over the end of the year where need be. On the southern hemisphere another season
    does.

    Args:
        greenup: Day of the year, 1 to 366, of one shape with the others; NaN where it is missing.
        maturity: Likewise.
        senescence: Likewise.
        dormancy: Likewise.

    Returns:
        Windows of that shape with 4 seasons as the last axis.

    Raises:
        SeasonError: A day is out of its range, or the days do not follow each other within a year.
    """
    events = np.stack(
        np.broadcast_arrays(
            *(np.asarray(e, np.float64) for e in (greenup, maturity, senescence, dormancy))
        ),
        axis=-1,
    )
    if ((events < 1) | (events >= _YEAR + 2)).any():
        raise SeasonError(
            f"days of the year are from 1 to 366, found {np.nanmin(events):g} to "
            f"{np.nanmax(events):g}; MCD12Q2 counts days since 1970-01-01: convert them first"
        )
    # One missing day leaves the year without its seams.
    events = np.where(np.isnan(events).any(-1, keepdims=True), np.nan, _day(events))
    length = (np.roll(events, -1, axis=-1) - events) % _YEAR
    total = length.sum(-1)
    bad = ~np.isnan(total) & (np.rint(total) != _YEAR)
    if bad.any():
        first = events[bad][0]
        raise SeasonError(
            f"{int(bad.sum())} places have days that do not follow each other within one year, "
            f"for example greenup {first[0]:g}, maturity {first[1]:g}, senescence {first[2]:g}, "
            f"dormancy {first[3]:g}; take one vegetation cycle a year"
        )
    return SeasonWindows(events, length)


def choose_scenes(
    windows: SeasonWindows,
    dates: ArrayLike,
    cloud: ArrayLike,
    *,
    max_cloud: float = 20.0,
    years: tuple[int, int] = (2017, 2024),
    near: float = 0.5,
) -> NDArray[np.int64]:
    """For each season of a place the least cloudy scene near its middle.

    Args:
        windows: Of one place.
        dates: Days of its scenes, (n,), anything numpy takes as ``datetime64``.
        cloud: Their cloud cover in percent, (n,).
        max_cloud: Scenes with as much or more are left out.
        years: First and last year to take scenes of.
        near: Share of a season, around its middle, in which scenes are looked for, above 0 to 1.

    Returns:
        Index of the scene for each of `SEASONS`, (4,); -1 where there is none. Of equally clear
        scenes it is the one nearest to the middle, then the earliest.

    Raises:
        SeasonError: The windows are of several places, the scenes differ in number, or cloud is not
            0 to 100.
    """
    days, clouds = np.asarray(dates, "datetime64[D]"), np.asarray(cloud, np.float64)
    if windows.start.shape != (4,):
        raise SeasonError(f"choose for one place at a time, got windows {windows.start.shape}")
    if days.ndim != 1 or days.shape != clouds.shape:
        raise SeasonError(f"one cloud cover a date is needed, got {days.shape} and {clouds.shape}")
    if not ((clouds >= 0) & (clouds <= 100)).all():
        raise SeasonError("cloud cover is in percent, from 0 to 100, and must not be missing")
    if not 0 < near <= 1:
        raise SeasonError(f"near is a share of the season above 0 and up to 1, got {near}")
    year = days.astype("datetime64[Y]")
    usable = clouds < max_cloud
    usable &= (year.astype(np.int64) + 1970 >= years[0]) & (
        year.astype(np.int64) + 1970 <= years[1]
    )
    # The last day of a leap year counts as the day before.
    of_year = np.minimum((days - year.astype("datetime64[D]")).astype(np.int64) + 1, _YEAR)
    ahead = (of_year - windows.middle[:, None]) % _YEAR
    distance = np.minimum(ahead, _YEAR - ahead)
    # Half open, as the day on which one season ends begins the next.
    span = near * windows.length[:, None]
    usable = usable & ((of_year - (windows.middle[:, None] - span / 2)) % _YEAR < span)
    chosen = np.full(4, -1, np.int64)
    for season in np.flatnonzero(usable.any(-1)):
        scenes = np.flatnonzero(usable[season])
        order = np.lexsort((days[scenes], distance[season, scenes], clouds[scenes]))
        chosen[season] = scenes[order[0]]
    return chosen


def global_grid(
    spacing_km: float = 23.0, latitudes: tuple[float, float] = (-90.0, 90.0)
) -> NDArray[np.float64]:
    """Points about as far from each other everywhere on the Earth, land and sea.

    Rows follow each other at the spacing; in a row the step of longitude is widened by
    1 / cos(latitude), to the nearest step that divides the circle, so that there is no seam at the
    date line. Points are the centres of their cells.

    Args:
        spacing_km: Distance between neighbours in km.
        latitudes: Southern and northern bound of the rows' centres in degrees.

    Returns:
        Longitude and latitude of each point in degrees, (n, 2), from south-west to north-east.

    Raises:
        SeasonError: The spacing or the bounds cannot be.
    """
    south, north = latitudes
    if not 0 < spacing_km <= 10_000 or not -90 <= south <= north <= 90:
        raise SeasonError(f"no grid of {spacing_km} km has rows from {south} to {north} degrees")
    step = spacing_km / _KM_PER_DEGREE
    rows = max(1, round(180 / step))
    latitude = -90 + 180 / rows * (np.arange(rows) + 0.5)
    latitude = latitude[(latitude >= south) & (latitude <= north)]
    counts = np.maximum(1, np.rint(360 / step * np.cos(np.deg2rad(latitude)))).astype(np.int64)
    firsts = np.cumsum(counts) - counts
    place = np.arange(counts.sum()) - np.repeat(firsts, counts)
    longitude = -180 + 360 / np.repeat(counts, counts) * (place + 0.5)
    return np.stack([longitude, np.repeat(latitude, counts)], axis=-1)


def _day(days: NDArray[np.float64]) -> NDArray[np.float64]:
    """Days counted on from some year's beginning, as days of a year of 365."""
    return np.asarray((days - 1) % _YEAR + 1)
