"""Plausible Sentinel-2 scenes for demonstrations and tests, made by arithmetic alone.

Nothing here is an observation. [`landscape`][geofm.datasets.samples.landscape] draws a place (a
river, a lake, forest stands, fields, a town, roads), gives each pixel a linear mixture of typical
surface spectra for the day of the year, and passes it through a simple sensor: point spread,
10/20/60 m sampling, noise and, for Level-1C, the atmosphere.

One seed gives one place, whatever the day. All lengths inside are in cells of 10 m, so that a
scene at another resolution shows features of the same size on the ground. The draws come from
``np.random.default_rng`` and the images are built by elementwise arithmetic, without FFT or BLAS,
whose order of summation would differ between machines.
"""

from __future__ import annotations

import datetime
import importlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.errors import MissingExtraError, PixelError, RasterError

__all__ = [
    "LAND_COVER",
    "SPECTRA",
    "Scene",
    "landscape",
    "tiles",
    "write_eurosat",
    "write_scene",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Spectrum = tuple[float, ...]

LAND_COVER: tuple[str, ...] = (
    "water",
    "forest_evergreen",
    "forest_deciduous",
    "crop",
    "grassland",
    "bare_soil",
    "built_up",
)
"""Names of the land cover classes; ``Scene.land_cover`` holds indices into this tuple."""

_WATER, _EVERGREEN, _DECIDUOUS, _CROP, _GRASS, _SOIL, _BUILT = range(len(LAND_COVER))

# Typical surface reflectances, rounded from what spectral libraries and atmospherically corrected
# scenes of temperate Europe commonly show; they are not measurements of any one site. What each
# must get right: the red edge (B4 to B7) and the moisture dips (B11, B12) of vegetation, the fall
# of water towards zero beyond B4, the steady rise of soil to the SWIR, the flatness of sealed land.
# Order: B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12.
# fmt: off
_TYPICAL: dict[str, dict[str, Spectrum]] = {
    "water": {  # dormant: clear winter water; peak: some algae and sediment
        "dormant": (.022, .025, .027, .017, .013, .009, .008, .007, .006, .006, .004, .003),
        "peak": (.026, .032, .046, .031, .028, .017, .016, .014, .012, .012, .006, .004),
    },
    "forest_evergreen": {
        "dormant": (.014, .021, .034, .025, .053, .140, .172, .187, .202, .205, .100, .050),
        "peak": (.014, .020, .036, .021, .055, .160, .200, .217, .236, .238, .103, .047),
    },
    "forest_deciduous": {  # dormant: bark, litter and understorey
        "dormant": (.025, .034, .050, .060, .083, .116, .132, .146, .160, .168, .180, .120),
        "peak": (.018, .024, .050, .025, .085, .275, .350, .372, .392, .388, .180, .078),
    },
    "crop": {  # dormant: tilled soil; peak: closed canopy
        "dormant": (.058, .073, .098, .121, .146, .166, .180, .194, .208, .216, .275, .228),
        "peak": (.022, .029, .060, .030, .090, .320, .415, .442, .458, .455, .190, .090),
    },
    "grassland": {
        "dormant": (.040, .052, .078, .086, .122, .180, .205, .225, .244, .252, .255, .165),
        "peak": (.025, .034, .070, .043, .110, .280, .345, .370, .390, .385, .210, .110),
    },
    "bare_soil": {  # dormant: moist, darker; peak: dry, brighter
        "dormant": (.068, .086, .113, .142, .170, .188, .203, .218, .233, .243, .305, .260),
        "peak": (.102, .128, .168, .210, .241, .260, .278, .294, .309, .314, .395, .350),
    },
    "built_up": {  # sealed land has no phenology; its gardens are mixed in as grassland and trees
        "dormant": (.100, .115, .130, .145, .160, .178, .188, .198, .205, .208, .225, .205),
        "peak": (.100, .115, .130, .145, .160, .178, .188, .198, .205, .208, .225, .205),
    },
}
# Surfaces that are parts or passing states of a class: roofs, roads, ripe and flowering crops.
_STRAW = (.060, .078, .115, .160, .195, .235, .260, .285, .305, .315, .350, .250)
_RAPE_FLOWER = (.030, .036, .125, .120, .170, .320, .375, .400, .415, .415, .200, .100)
_AUTUMN_LEAVES = (.024, .034, .066, .088, .130, .210, .245, .265, .282, .285, .225, .130)
_ASPHALT = (.065, .076, .088, .098, .106, .114, .119, .124, .130, .133, .155, .145)
_RED_TILE = (.055, .070, .098, .160, .190, .208, .218, .230, .245, .250, .285, .255)
_BRIGHT_ROOF = (.270, .300, .320, .340, .350, .355, .360, .365, .368, .368, .355, .325)
# fmt: on

SPECTRA: Mapping[str, Mapping[str, Spectrum]] = MappingProxyType(
    {name: MappingProxyType(ends) for name, ends in _TYPICAL.items()}
)
"""Typical surface reflectance (0 to 1) of each class at two ends of its year.

``SPECTRA[name]["dormant"]`` is the leaf-off, moist or winter state, ``SPECTRA[name]["peak"]`` the
green, dry or summer state; each has 12 values in the order B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12.
"""

_L2A: Final = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
_L1C: Final = (*_L2A[:10], "B10", *_L2A[10:])
_EUROSAT: Final = (*_L1C[:8], *_L1C[9:], "B8A")
_METRES: Final = {"B2": 10, "B3": 10, "B4": 10, "B8": 10, "B1": 60, "B9": 60, "B10": 60}  # else 20

# Reflectance of the path (mostly Rayleigh, so greatest in the blue) and two-way transmission for
# a clear mid-latitude day; B9 lies in a water vapour band and loses most of its signal. Tuned so
# that water and forest fall where EuroSAT's Level-1C tiles of them do.
_PATH: Final = (0.096, 0.066, 0.038, 0.022, 0.019, 0.015, 0.012, 0.010, 0.008, 0.003, 0.002, 0.001)
_TRANSMISSION: Final = (0.80, 0.83, 0.87, 0.91, 0.91, 0.92, 0.95, 0.93, 0.97, 0.29, 0.95, 0.92)

_SYNTHETIC: Final = "generated by geofm.datasets.samples, not an observation"
_LATITUDE: Final = math.radians(48.0)
_MIN_SIZE: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A synthetic scene with its georeference and its true land cover.

    Attributes:
        pixels: Digital numbers, uint16 of shape (bands, H, W): reflectance times 10,000, never 0.
        bands: Sentinel-2 names of the bands, in the order of ``pixels``.
        level: ``"L2A"`` (surface reflectance) or ``"L1C"`` (top of atmosphere).
        land_cover: Class of each pixel, uint8 of shape (H, W), an index into ``LAND_COVER``.
        transform: Affine coefficients a, b, c, d, e, f in metres, as rasterio orders them.
        crs: Coordinate reference system of ``transform``.
        date: Day of the scene, in 2021.
    """

    pixels: NDArray[np.uint16]
    bands: tuple[str, ...]
    level: str
    land_cover: NDArray[np.uint8]
    transform: tuple[float, float, float, float, float, float]
    crs: str
    date: datetime.date


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How much of what a place holds; lengths are shares of the scene's shorter side."""

    river: bool = True
    lake: float = 0.10  # radius
    town: float = 0.13  # radius
    centred: bool = False  # lake and town in the middle
    forest: float = 0.30  # share of the land
    evergreen: float = 0.45  # share of the forest
    crop: float = 0.74  # share of the fields; what is neither crop nor grass is bare
    grass: float = 0.22
    roads: float = 0.65  # share of the parish borders that carry one


@dataclass(frozen=True, slots=True, eq=False)
class _Fields:
    """Parcels: crop fields, meadows and forest compartments alike."""

    ident: Ints  # (H, W) index into the parcels
    edge: Floats  # (H, W) distance in cells to the nearest side of the parcel
    along: Floats  # (H, W) coordinate in cells across the direction of tillage
    count: int
    draws: Floats  # (8, count) uniform numbers, the parcel's own dice


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Everything about a place that does not depend on the date."""

    unit: float  # side of a pixel in cells of 10 m
    land_cover: NDArray[np.uint8]
    ground: NDArray[np.uint8]  # land cover without roads and water
    fields: _Fields
    water: Floats  # cover fractions, each (H, W) in 0 to 1
    road: Floats
    track: Floats
    turbid: Floats
    slope: tuple[Floats, Floats]  # rise per metre to the east and to the south
    elevation: Floats
    roof: Floats  # (H, W) uniform dice of each building
    garden: Floats  # green share of built-up land
    origin: tuple[float, float]  # easting, northing of the upper left corner, metres


# ---------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------


def _spline_axis(lattice: Floats, n: int, spacing: float, phase: float) -> Floats:
    """Cubic B-spline interpolation of the first axis of a lattice to n samples."""
    position = (np.arange(n) + phase) / spacing
    index = position.astype(np.int64)
    t = (position - index)[:, None]
    s = 1.0 - t
    out = s * s * s * lattice[index]
    out += (3.0 * t * t * t - 6.0 * t * t + 4.0) * lattice[index + 1]
    out += (3.0 * s * s * s - 6.0 * s * s + 4.0) * lattice[index + 2]
    out += t * t * t * lattice[index + 3]
    return np.asarray(out / 6.0)


def _noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    spacing: float,
    octaves: int = 1,
    gain: float = 0.5,
) -> Floats:
    """Smooth noise of about zero mean and unit deviation.

    A random lattice under a cubic B-spline has no visible axes, unlike bilinear value noise, and
    needs only local sums, unlike an FFT.
    """
    height, width = shape
    total = np.zeros(shape)
    power = 0.0
    for octave in range(octaves):
        step = max(spacing / 2**octave, 1.0)
        lattice = rng.standard_normal((int(height / step) + 5, int(width / step) + 5))
        phase = rng.random(2) * step
        rows = _spline_axis(lattice, height, step, float(phase[0]))
        total += gain**octave * _spline_axis(rows.T, width, step, float(phase[1])).T
        power += gain ** (2 * octave)
    # 151/315 is the mean of the squared B-spline weights of one axis.
    return total / (151.0 / 315.0 * math.sqrt(power))


def _cover(inside: Floats) -> Floats:
    """Share of a pixel inside a shape, from the signed distance to its border in pixels."""
    return np.clip(0.5 + inside, 0.0, 1.0)


def _signed_distance(level_set: Floats) -> Floats:
    """First-order distance in pixels to the zero line of a smooth function."""
    down, right = np.gradient(level_set)
    return np.asarray(level_set / (np.sqrt(down * down + right * right) + 1e-9))


def _logistic(x: Floats | float) -> Floats:
    """Logistic curve, its argument clipped so that no exponential overflows."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40.0, 40.0))))


def _season(day: float, start: Floats | float, end: Floats | float, pace: float = 8.0) -> Floats:
    """Double logistic of the year: 0 in winter, 1 between green-up and senescence."""
    return _logistic((day - start) / pace) * _logistic((end - day) / (1.3 * pace))


def _bump(day: float, centre: Floats | float, width: float) -> Floats:
    """Smooth hump of height 1 around a day."""
    x = (day - np.asarray(centre)) / width
    return np.asarray(np.exp(-0.5 * x * x))


def _point_spread(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blur of the optics: it mixes the pixels on either side of every border."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    centre, side = np.float32(0.72), np.float32(0.14)
    rows = centre * padded[:, 1:-1] + side * (padded[:, :-2] + padded[:, 2:])
    return np.asarray(centre * rows[:, :, 1:-1] + side * (rows[:, :, :-2] + rows[:, :, 2:]))


def _block_mean(image: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Mean over factor x factor pixels; borders that do not fill a block are repeated."""
    height, width = image.shape
    padded = np.pad(image, ((0, -height % factor), (0, -width % factor)), mode="edge")
    out = np.zeros((padded.shape[0] // factor, padded.shape[1] // factor), np.float32)
    for row in range(factor):
        for column in range(factor):
            out += padded[row::factor, column::factor]
    out /= np.float32(factor * factor)
    return out


def _bilinear(image: NDArray[np.float32], factor: int, n: int) -> NDArray[np.float32]:
    """Bilinear enlargement of the first axis, pixel areas aligned, to its first n samples."""
    position = np.clip((np.arange(n) + 0.5) / factor - 0.5, 0.0, image.shape[0] - 1.0)
    low = position.astype(np.int64)
    high = np.minimum(low + 1, image.shape[0] - 1)
    weight = (position - low).astype(np.float32)[:, None]
    return np.asarray(image[low] * (1 - weight) + image[high] * weight)


# ---------------------------------------------------------------------------------------------
# The place
# ---------------------------------------------------------------------------------------------


def _partition(
    rng: np.random.Generator, u: Floats, v: Floats, area: float, narrowest: float
) -> tuple[Ints, Floats, list[bool]]:
    """Cut a cloud of points into rectangles by repeated halving, as heirs divide land.

    Args:
        rng: Source of the cuts.
        u: First coordinate of each point, in cells.
        v: Second coordinate of each point, in cells.
        area: Typical area of a parcel, in square cells.
        narrowest: Least side of a parcel, in cells.

    Returns:
        The parcel of each point, its distance to the nearest side of the parcel, and for each
        parcel whether its longer side lies along u.
    """
    ident = np.zeros(u.size, np.int64)
    edge = np.zeros(u.size)
    lies_along_u: list[bool] = []
    box = (float(u.min()) - 1, float(u.max()) + 1, float(v.min()) - 1, float(v.max()) + 1)
    stack = [(np.arange(u.size), box)]
    while stack:
        members, (u0, u1, v0, v1) = stack.pop()
        if members.size == 0:
            continue
        long_side = max(u1 - u0, v1 - v0)
        size = (u1 - u0) * (v1 - v0)
        if size < area * rng.uniform(0.5, 2.2) or long_side < 2.2 * narrowest:
            pu, pv = u[members], v[members]
            ident[members] = len(lies_along_u)
            edge[members] = np.minimum(np.minimum(pu - u0, u1 - pu), np.minimum(pv - v0, v1 - pv))
            lies_along_u.append(u1 - u0 > v1 - v0)
            continue
        share = rng.uniform(0.36, 0.64)
        if u1 - u0 > v1 - v0:
            cut = u0 + share * (u1 - u0)
            first = u[members] < cut
            boxes = (u0, cut, v0, v1), (cut, u1, v0, v1)
        else:
            cut = v0 + share * (v1 - v0)
            first = v[members] < cut
            boxes = (u0, u1, v0, cut), (u0, u1, cut, v1)
        stack += [(members[first], boxes[0]), (members[~first], boxes[1])]
    return ident, edge, lies_along_u


def _parishes(
    rng: np.random.Generator, x: Floats, y: Floats, unit: float, share: float
) -> tuple[Ints, Floats, Floats]:
    """Voronoi regions, whose borders carry the roads and inside which fields share a direction.

    Returns:
        The region of each pixel; the distance in cells to a paved road; the same to a dirt track.
    """
    step = 85.0
    rows, columns = int(y.max() / step) + 3, int(x.max() / step) + 3
    jitter = rng.uniform(-0.42, 0.42, (2, rows, columns))
    site_y = ((np.arange(rows)[:, None] - 0.5 + jitter[0]) * step).ravel()
    site_x = ((np.arange(columns)[None, :] - 0.5 + jitter[1]) * step).ravel()
    first = np.full(x.shape, np.inf)
    second = np.full(x.shape, np.inf)
    nearest = np.zeros(x.shape, np.int64)
    next_nearest = np.zeros(x.shape, np.int64)
    # A pixel's two nearest sites of a jittered grid are less than 2.5 steps off in either axis;
    # looking no further keeps the work in proportion to the area. The rest is for bent borders.
    reach = 2.5 * step + 15.0
    for site in range(site_x.size):
        window = tuple(
            slice(max(0, int((at - reach) / unit)), max(0, int((at + reach) / unit)))
            for at in (site_y[site], site_x[site])
        )
        square = (x[window] - site_x[site]) ** 2 + (y[window] - site_y[site]) ** 2
        best, runner_up = first[window], nearest[window]
        closest = square < best
        closer = ~closest & (square < second[window])
        second[window] = np.where(closest, best, np.where(closer, square, second[window]))
        next_nearest[window] = np.where(
            closest, runner_up, np.where(closer, site, next_nearest[window])
        )
        first[window] = np.where(closest, square, best)
        nearest[window] = np.where(closest, site, runner_up)
    dx = site_x[nearest] - site_x[next_nearest]
    dy = site_y[nearest] - site_y[next_nearest]
    border = (second - first) / (2.0 * np.sqrt(dx * dx + dy * dy) + 1e-9)
    dice = rng.random((site_x.size, site_x.size))
    die = dice[np.minimum(nearest, next_nearest), np.maximum(nearest, next_nearest)]
    far = 1e6
    return (
        nearest,
        np.where(die < share, border, far),
        np.where((die >= share) & (die < share + 0.25), border, far),
    )


def _parcels(rng: np.random.Generator, region: Ints, x: Floats, y: Floats) -> _Fields:
    """Patchwork of rectangular parcels, turned by one angle within each region."""
    ident = np.zeros(region.size, np.int64)
    edge = np.zeros(region.size)
    along = np.zeros(region.size)
    flat, flat_x, flat_y = region.ravel(), x.ravel(), y.ravel()
    lean = rng.uniform(0.0, math.pi)
    count = 0
    for site in range(int(flat.max()) + 1):
        # Drawn for every region, so that none of the later draws depends on which are visible.
        angle = lean + rng.normal(0.0, 0.35)
        area = math.exp(rng.normal(math.log(420.0), 0.45))
        inside = np.nonzero(flat == site)[0]
        if inside.size == 0:
            continue
        cosine, sine = math.cos(angle), math.sin(angle)
        u = cosine * flat_x[inside] + sine * flat_y[inside]
        v = cosine * flat_y[inside] - sine * flat_x[inside]
        own, gap, lies_along_u = _partition(rng, u, v, area, 6.0)
        ident[inside] = own + count
        edge[inside] = gap
        along[inside] = np.where(np.array(lies_along_u)[own], v, u)
        count += len(lies_along_u)
    shape = region.shape
    return _Fields(
        ident.reshape(shape),
        edge.reshape(shape),
        along.reshape(shape),
        count,
        rng.random((8, count)),
    )


def _waters(
    rng: np.random.Generator, x: Floats, y: Floats, unit: float, recipe: _Recipe
) -> tuple[Floats, Floats, Floats]:
    """River and lake.

    Returns:
        Cover of the river, cover of the lake, and the distance to the river's middle in cells,
        negative on its one side.
    """
    height, width = float(y.max()), float(x.max())
    side = min(height, width)
    angle = rng.uniform(0.0, math.pi)
    middle = np.array([height, width]) * (0.5 + rng.uniform(-0.16, 0.16, 2))
    cosine, sine = math.cos(angle), math.sin(angle)
    phases = rng.uniform(0.0, 2.0 * math.pi, 2)
    wave = min(max(0.75 * side, 60.0), 190.0)
    swing = rng.uniform(0.10, 0.16) * wave
    bend = swing / 3.0 * _noise(rng, x.shape, 26.0 / unit, 2)
    s = cosine * (x - middle[1]) + sine * (y - middle[0]) + 1.4 * bend
    t = cosine * (y - middle[0]) - sine * (x - middle[1])
    turns = np.sin(2.0 * math.pi / wave * s + phases[0])
    turns = turns + 0.4 * np.sin(2.0 * math.pi / (0.41 * wave) * s + phases[1])
    offset = _signed_distance(t - swing * turns + bend) * unit
    to_river = np.abs(offset)
    half_width = min(max(0.008 * side, 1.3), 3.2) * (1.0 + 0.18 * _noise(rng, x.shape, 40.0 / unit))
    river = _cover((half_width - to_river) / unit)

    radius = recipe.lake * side if recipe.centred else min(recipe.lake * side, 42.0)
    # Beside the river, up or down the stream from its middle.
    reach = rng.uniform(0.22, 0.36) * side * (1.0 if rng.random() < 0.5 else -1.0)
    spin = rng.uniform(0.0, math.pi)
    wobble = _noise(rng, x.shape, max(0.8 * radius, 4.0) / unit, 4, 0.55)
    centre_y, centre_x = 0.5 * height, 0.5 * width
    if not recipe.centred:
        centre_y = float(middle[0]) - sine * reach + 1.3 * radius * cosine
        centre_x = float(middle[1]) - cosine * reach - 1.3 * radius * sine
        # Kept within the scene, so that there is a lake to see.
        centre_y = min(max(centre_y, 1.1 * radius), height - 1.1 * radius)
        centre_x = min(max(centre_x, 1.1 * radius), width - 1.1 * radius)
    p = math.cos(spin) * (x - centre_x) + math.sin(spin) * (y - centre_y)
    q = math.cos(spin) * (y - centre_y) - math.sin(spin) * (x - centre_x)
    shore = radius * (1.0 + 0.20 * wobble) - np.sqrt(0.6 * p * p + 1.5 * q * q)
    lake = _cover(_signed_distance(shore)) if radius > 0.5 else np.zeros(x.shape)
    if not recipe.river:
        river, offset = np.zeros(x.shape), np.full(x.shape, 1e6)
    return river, lake, offset


@dataclass(frozen=True, slots=True, eq=False)
class _Town:
    """Built-up land: where it is, and what each pixel of it holds."""

    inside: NDArray[np.bool_]
    street: Floats
    park: NDArray[np.bool_]
    roof: Floats
    garden: Floats


def _town(
    rng: np.random.Generator,
    x: Floats,
    y: Floats,
    unit: float,
    unfit: Floats,
    to_road: Floats,
    recipe: _Recipe,
) -> _Town:
    """A town with streets, blocks and an industrial quarter, and hamlets along the roads."""
    height, width = float(y.max()), float(x.max())
    side = min(height, width)
    radius = recipe.town * side if recipe.centred else min(recipe.town * side, 60.0)
    ragged = _noise(rng, x.shape, max(0.45 * radius, 3.0) / unit, 3, 0.6)

    def closeness(centre_y: float, centre_x: float, size: float) -> Floats:
        distance = np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2)
        return np.asarray((size * (1.0 + 0.22 * ragged) - distance) / max(size, 1e-6))

    candidates = rng.uniform(0.2, 0.8, (40, 2)) * (height, width)
    pixel = (candidates / unit).astype(np.int64)
    # The best of a few sites: dry, flat and on a road.
    burden = unfit[pixel[:, 0], pixel[:, 1]] + 0.03 * np.minimum(
        to_road[pixel[:, 0], pixel[:, 1]], 30.0
    )
    order = np.argsort(burden, kind="stable")
    centre = np.array([0.5 * height, 0.5 * width]) if recipe.centred else candidates[order[0]]
    depth = closeness(float(centre[0]), float(centre[1]), radius)
    if not recipe.centred and recipe.town > 0:
        for rank in order[1 : 1 + int(x.size * unit * unit / 16000.0)]:
            size = rng.uniform(4.0, 9.0)
            hamlet = closeness(float(candidates[rank, 0]), float(candidates[rank, 1]), size)
            depth = np.maximum(depth, 0.5 * hamlet)

    angle = rng.uniform(0.0, math.pi)
    bend = 1.5 * _noise(rng, x.shape, 30.0 / unit)
    u = math.cos(angle) * x + math.sin(angle) * y + bend
    v = math.cos(angle) * y - math.sin(angle) * x + bend
    block, gap, _ = _partition(rng, u.ravel(), v.ravel(), 110.0, 5.0)
    dice = rng.random((3, int(block.max()) + 1))[:, block].reshape(3, *x.shape)
    # The town ends with its blocks, more than at a line.
    inside = (depth + 0.30 * (dice[1] - 0.6) > 0.0) & (depth > -0.25) & (unfit < 3.0)
    street = _cover((0.42 - gap.reshape(x.shape)) / unit) * inside

    # Industry sits in whole blocks at the edge, with roofs four times as wide as houses.
    industry = (dice[0] < 0.22) & (depth < 0.45)
    house = rng.random((64, 64))[(u / 1.7).astype(np.int64) % 64, (v / 1.4).astype(np.int64) % 64]
    hall = rng.random((64, 64))[(u / 5.5).astype(np.int64) % 64, (v / 4.2).astype(np.int64) % 64]
    roof = np.where(industry, 1.0 + hall, house)
    lush = np.clip(0.66 - 0.45 * depth + 0.30 * (dice[1] - 0.5), 0.12, 0.75)
    lot = rng.random((64, 64))[(u / 1.9).astype(np.int64) % 64, (v / 2.3).astype(np.int64) % 64]
    garden = np.where(industry, 0.06, np.clip(lush + 0.5 * (lot - 0.5), 0.0, 0.85))
    park = inside & (dice[2] < 0.05) & (depth > 0.1)
    return _Town(inside, street, park, roof, garden)


def _build(shape: tuple[int, int], seed: int, unit: float, recipe: _Recipe) -> _Place:
    """Draw a place; every step reads the one generator, so the seed fixes all of it."""
    rng = np.random.default_rng([seed, 1])
    height, width = shape
    y, x = np.broadcast_arrays(
        ((np.arange(height) + 0.5) * unit)[:, None], ((np.arange(width) + 0.5) * unit)[None, :]
    )
    river, lake, offset = _waters(rng, x, y, unit, recipe)
    to_river = np.abs(offset)
    # Borders of fields and roads bend a little with the terrain.
    bent_x = x + 2.2 * _noise(rng, shape, 45.0 / unit)
    bent_y = y + 2.2 * _noise(rng, shape, 45.0 / unit)
    region, to_road, to_track = _parishes(rng, bent_x, bent_y, unit, recipe.roads)
    fields = _parcels(rng, region, bent_x, bent_y)

    valley = np.exp(-np.minimum(to_river / 28.0, 40.0))
    hills = np.clip(0.5 + 0.55 * _noise(rng, shape, 95.0 / unit, 2) - 0.8 * valley, 0.04, 1.6)
    elevation = hills * (50.0 + 48.0 * hills * _noise(rng, shape, 42.0 / unit, 4, 0.52))
    down, right = (np.asarray(rise) for rise in np.gradient(elevation, 10.0 * unit))
    water = np.maximum(river, lake)
    unfit = 1.5 * hills + 6.0 * (water > 0.01)
    if recipe.centred:
        unfit = 6.0 * (water > 0.01)
    town = _town(rng, x, y, unit, unfit, to_road, recipe)

    # Forest takes the hills; part of its edge follows the parcels, as cleared land does.
    own = fields.draws[:, fields.ident]
    wild = hills + 0.40 * _noise(rng, shape, 24.0 / unit, 4, 0.6) + 0.55 * own[0]
    forest = wild > np.quantile(wild, 1.0 - recipe.forest)
    riparian = (to_river < 7.5 + 3.0 * _noise(rng, shape, 9.0 / unit, 2)) & (recipe.forest > 0.1)
    conifer = 0.7 * _noise(rng, shape, 30.0 / unit, 3) + 2.0 * (own[1] - 0.5)
    evergreen = conifer > np.quantile(conifer, 1.0 - recipe.evergreen)
    ground = np.where(
        own[2] < recipe.crop, _CROP, np.where(own[2] < recipe.crop + recipe.grass, _GRASS, _SOIL)
    )
    # Flood plains are pasture rather than arable.
    if recipe.grass > 0.1:
        ground = np.where((to_river < 22.0 * own[3]) & (ground == _CROP), _GRASS, ground)
    ground = np.where(riparian, _DECIDUOUS, ground)
    ground = np.where(forest, np.where(evergreen & ~riparian, _EVERGREEN, _DECIDUOUS), ground)
    # Gravel bars, on one bank at a time.
    bar = 4.0 * _noise(rng, shape, 16.0 / unit, 2) * np.sign(offset)
    ground = np.where(to_river < np.minimum(bar - 0.8, 6.0), _SOIL, ground)
    ground = np.where(town.inside, np.where(town.park, _GRASS, _BUILT), ground)

    wide = np.where(own[4] < 0.3, 0.70, 0.52)
    road = np.maximum(_cover((wide - to_road) / unit), town.street * ~town.park)
    road = road * (1.0 - lake)
    track = _cover((0.30 - to_track) / unit) * (1.0 - water) * ~town.inside
    cover = np.where(water > 0.5, _WATER, ground)
    cover = np.where(track > 0.5, _SOIL, cover)
    cover = np.where(road > 0.5, _BUILT, cover)
    turbid = np.clip(
        0.15 + 0.45 * river * (1.0 - lake) + 0.10 * _noise(rng, shape, 25.0 / unit, 3), 0.0, 1.0
    )
    # The plough keeps to gentle ground.
    steep = np.where(forest | riparian, 1.0, 0.5)
    corner = rng.integers(0, 2500, 2) * 60.0
    return _Place(
        unit=unit,
        land_cover=cover.astype(np.uint8),
        ground=ground.astype(np.uint8),
        fields=fields,
        water=water,
        road=road,
        track=track,
        turbid=turbid,
        slope=(right * steep, down * steep),
        elevation=elevation,
        roof=town.roof,
        garden=town.garden,
        origin=(500_040.0 + float(corner[0]), 5_300_040.0 + float(corner[1])),
    )


# ---------------------------------------------------------------------------------------------
# The day
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _CropType:
    """Calendar of a crop, in days of the year, for central Europe."""

    share: float
    winter: float  # green cover of the autumn sown plant in winter
    start: float  # half way through green-up
    end: float  # half way through senescence
    spread: float  # between fields, days
    pace: float  # of green-up, days
    straw: float  # cover of dry residue after senescence
    till: float  # day on which the residue is ploughed in
    flower: float = 0.0  # day of yellow flowering, 0 for none


_CROP_TYPES: Final = (
    _CropType(0.38, 0.34, 90.0, 180.0, 9.0, 9.0, 0.80, 245.0),  # winter cereals
    _CropType(0.12, 0.58, 78.0, 176.0, 6.0, 9.0, 0.65, 228.0, flower=121.0),  # oilseed rape
    _CropType(0.25, 0.00, 168.0, 266.0, 10.0, 8.0, 0.55, 305.0),  # maize
    _CropType(0.13, 0.00, 150.0, 288.0, 12.0, 8.0, 0.10, 300.0),  # beet, potatoes, soya
    _CropType(0.12, 0.50, 82.0, 312.0, 8.0, 9.0, 0.05, 345.0),  # clover and other leys
)


def _crop_state(draws: Floats, day: int) -> tuple[Floats, Floats, Floats]:
    """Cover of green leaves, dry residue and yellow flowers in each parcel, were it a crop."""
    shares = np.array([crop.share for crop in _CROP_TYPES])
    kind = np.searchsorted(np.cumsum(shares)[:-1], draws[5], side="right")

    def of(name: str) -> Floats:
        return np.asarray(np.array([float(getattr(crop, name)) for crop in _CROP_TYPES])[kind])

    # The sum of two dice stands for a normal number; 2.4 gives it unit deviation.
    shift = 2.4 * (draws[6] + draws[7] - 1.0) * of("spread")
    start, end = of("start") + shift, of("end") + 0.6 * shift
    vigour = 0.82 + 0.18 * draws[4]
    growth = _logistic((day - start) / of("pace")) * _logistic((end - day) / 7.0)
    # Autumn sown crops stand green from sowing in one year to green-up in the next.
    sown = _logistic((day - 296.0 - shift) / 6.0) + _logistic((start - day) / 10.0)
    green = vigour * np.maximum(growth, of("winter") * np.minimum(sown, 1.0))
    till = of("till") + 2.0 * shift
    dry = of("straw") * _logistic((day - end) / 7.0) * _logistic((till - day) / 4.0)
    dry = np.minimum(dry, 1.0 - green)
    flower = np.where(of("flower") > 0, _bump(day, of("flower") + 0.7 * shift, 9.0), 0.0)
    return green, dry, 0.85 * flower * green


def _grass_state(draws: Floats, day: int) -> Floats:
    """Green cover of each parcel, were it a meadow: summer drought, and one or two mowings."""
    green = 0.34 + 0.62 * _season(day, 84.0 + 16.0 * draws[6], 306.0, 11.0)
    green = green - 0.14 * _bump(day, 218.0, 26.0)
    for cut in (146.0 + 28.0 * draws[7], 205.0 + 40.0 * draws[5]):
        since = day - cut
        mown = np.where(since >= 0.0, np.exp(-np.clip(since, 0.0, 200.0) / 13.0), 0.0)
        green = green * (1.0 - 0.45 * mown * (draws[4] < 0.7))
    return np.asarray(green)


def _field_surfaces(
    place: _Place, day: int, patch: Floats, dry: Floats
) -> Iterator[tuple[Spectrum, Floats]]:
    """Mixture of arable land, meadows and bare soil; fractions are zero elsewhere."""
    fields = place.fields
    of = fields.ident
    crop, grass = place.ground == _CROP, place.ground == _GRASS
    # A strip of grass and hedge lies between fields, more of it beside some than others.
    strip = np.clip(1.25 - fields.edge / max(1.0, place.unit), 0.0, 1.0) * crop
    strip = strip * (0.10 + 0.55 * fields.draws[1, of])
    green, straw, flower = (state[of] for state in _crop_state(fields.draws, day))
    # Growth is uneven with the soil: where it is half grown the difference is greatest.
    green = np.clip(green + 0.30 * green * (1.0 - green) * patch - 0.025 * np.abs(patch), 0.0, 1.0)
    flower = np.minimum(flower, green)
    straw = np.minimum(straw, 1.0 - green)
    soil = 1.0 - green - straw
    tilled = SPECTRA["crop"]["dormant"]
    inside = crop * (1.0 - strip)
    yield SPECTRA["crop"]["peak"], inside * (green - flower)
    yield _RAPE_FLOWER, inside * flower
    yield _STRAW, inside * straw
    yield tilled, inside * soil * (1.0 - 0.55 * dry)
    yield SPECTRA["bare_soil"]["peak"], inside * soil * 0.55 * dry

    meadow = np.clip(_grass_state(fields.draws, day)[of] + 0.09 * patch, 0.0, 1.0)
    hedge = float(_season(day, 112.0, 298.0))
    turf = grass + 0.6 * strip
    yield SPECTRA["grassland"]["peak"], turf * meadow
    yield SPECTRA["grassland"]["dormant"], turf * (1.0 - meadow)
    yield SPECTRA["forest_deciduous"]["peak"], 0.4 * strip * hedge
    yield SPECTRA["forest_deciduous"]["dormant"], 0.4 * strip * (1.0 - hedge)

    # Bare land keeps a little weed in summer.
    bare = (place.ground == _SOIL).astype(np.float64)
    weed = np.clip(0.05 + 0.05 * float(_season(day, 100.0, 290.0)) + 0.05 * patch, 0.0, 0.25)
    yield SPECTRA["grassland"]["peak"], bare * weed
    yield SPECTRA["bare_soil"]["peak"], bare * (1.0 - weed) * dry
    yield SPECTRA["bare_soil"]["dormant"], bare * (1.0 - weed) * (1.0 - dry)


def _tree_and_town_surfaces(
    place: _Place, day: int, patch: Floats
) -> Iterator[tuple[Spectrum, Floats]]:
    """Mixture of forest and built-up land; fractions are zero elsewhere."""
    stand = place.fields.draws[:, place.fields.ident]
    # Leaves come later and fall sooner higher up, by about three days in 100 m.
    late = 0.03 * place.elevation + 7.0 * (stand[6] - 0.5) + 1.5 * patch
    leaf = _season(day, 112.0 + late, 300.0 - late, 6.0)
    turning = 0.75 * _bump(day, 294.0 - late, 11.0)
    conifers = np.clip(0.15 * (stand[7] - 0.3) + 0.05 * patch, 0.0, 0.2)
    needles = float(_season(day, 112.0, 300.0, 18.0))
    # No stand is pure: some conifers among the broadleaves and the reverse.
    deciduous, evergreen = place.ground == _DECIDUOUS, place.ground == _EVERGREEN
    broad = deciduous * (1.0 - conifers) + evergreen * (0.4 * conifers)
    needle = deciduous * conifers + evergreen * (1.0 - 0.4 * conifers)
    yield SPECTRA["forest_evergreen"]["peak"], needle * needles
    yield SPECTRA["forest_evergreen"]["dormant"], needle * (1.0 - needles)

    built = (place.ground == _BUILT).astype(np.float64)
    green = float(_season(day, 100.0, 302.0))
    garden = built * place.garden
    yield SPECTRA["grassland"]["peak"], garden * 0.5 * (0.4 + 0.5 * green)
    yield SPECTRA["grassland"]["dormant"], garden * 0.5 * (0.6 - 0.5 * green)
    leafy = broad * leaf + 0.5 * garden * green
    bare = broad * (1.0 - leaf) + 0.5 * garden * (1.0 - green)
    yield SPECTRA["forest_deciduous"]["peak"], leafy * (1.0 - turning)
    yield SPECTRA["forest_deciduous"]["dormant"], bare * (1.0 - turning)
    yield _AUTUMN_LEAVES, (leafy + bare) * turning

    sealed = built * (1.0 - place.garden)
    roof = place.roof
    # Dice below 1 are houses, above 1 the halls of industry.
    tile = np.where(roof < 0.42, 0.65, 0.08)
    bright = np.where((roof > 0.965) & (roof < 1.0) | (roof > 1.75), 0.70, 0.02)
    dark = np.where((roof > 0.62) & (roof < 0.92) | (roof > 1.0) & (roof < 1.3), 0.75, 0.15)
    yield _RED_TILE, sealed * tile
    yield _BRIGHT_ROOF, sealed * bright
    yield _ASPHALT, sealed * dark
    yield SPECTRA["built_up"]["peak"], sealed * (1.0 - tile - bright - dark)


def _hillshade(place: _Place, day: int) -> Floats:
    """Direct sunlight on the slope relative to the flat, with a floor of light from the sky."""
    turn = 2.0 * math.pi * (284 + day) / 365.0
    declination = math.radians(23.44) * math.sin(turn)
    hour = math.radians(-22.0)  # the satellite passes about an hour and a half before noon
    up = math.sin(_LATITUDE) * math.sin(declination)
    up += math.cos(_LATITUDE) * math.cos(declination) * math.cos(hour)
    east = -math.cos(declination) * math.sin(hour)
    south = math.sin(_LATITUDE) * math.cos(declination) * math.cos(hour)
    south -= math.cos(_LATITUDE) * math.sin(declination)
    up = max(up, 0.42)  # lower suns would need cast shadows, which are not modelled
    to_east, to_south = place.slope
    light = (up - east * to_east - south * to_south) / np.sqrt(1.0 + to_east**2 + to_south**2)
    return np.asarray(np.clip(0.30 + 0.70 * light / up, 0.35, 1.55))


def _reflectance(place: _Place, day: int, seed: int) -> NDArray[np.float32]:
    """Surface reflectance at the pixel grid, (12, H, W), before the sensor."""
    shape = place.ground.shape
    # A generator of its own: the texture belongs to the place, not to the day.
    rng = np.random.default_rng([seed, 2])
    unit = place.unit
    patch = np.clip(_noise(rng, shape, 14.0 / unit, 4, 0.6), -2.5, 2.5)
    canopy = _noise(rng, shape, 1.25 / unit, 1)
    crowns = _noise(rng, shape, 5.0 / unit, 2)
    grain = _noise(rng, shape, 1.5 / unit, 1)
    stripes = rng.standard_normal(509)
    own = place.fields.draws[:, place.fields.ident]
    dry = np.clip(0.10 + 0.72 * _bump(day, 205.0, 58.0) + 0.5 * (own[3] - 0.5), 0.0, 1.0)

    # Light and texture scale the land; water is smooth and level.
    wood = (place.ground == _EVERGREEN) * 1.25 + (place.ground == _DECIDUOUS)
    open_land = (place.ground == _CROP) | (place.ground == _GRASS) | (place.ground == _SOIL)
    lane = (place.fields.along / 1.6).astype(np.int64) + 37 * place.fields.ident
    texture = 1.0 + wood * (0.105 * canopy + 0.05 * crowns + 0.16 * (own[2] - 0.5))
    texture += open_land * (0.022 * grain + 0.020 * stripes[lane % 509] + 0.34 * (own[1] - 0.5))
    texture += (place.ground == _BUILT) * 0.09 * grain
    open_sky = (1.0 - place.road) * (1.0 - place.track) * (1.0 - place.water)
    light = open_sky * np.clip(texture, 0.45, 1.7) * _hillshade(place, day)
    land = itertools.chain(
        _field_surfaces(place, day, patch, dry), _tree_and_town_surfaces(place, day, patch)
    )
    lit = ((spectrum, light * amount) for spectrum, amount in land)
    murk = np.clip(place.turbid + 0.25 * float(_season(day, 95.0, 300.0, 15.0)), 0.0, 1.0)
    wet = place.water * (1.0 - place.road) * (1.0 + 0.04 * grain)
    dirt = place.track * (1.0 - place.water) * (1.0 - place.road)
    flat = [
        (SPECTRA["water"]["peak"], wet * murk),
        (SPECTRA["water"]["dormant"], wet * (1.0 - murk)),
        (_ASPHALT, place.road * (1.0 + 0.05 * grain)),
        (SPECTRA["bare_soil"]["peak"], dirt),
    ]
    out = np.zeros((len(_L2A), *shape), np.float32)
    for spectrum, amount in itertools.chain(lit, flat):
        weight = amount.astype(np.float32)
        for band, value in enumerate(spectrum):
            out[band] += np.float32(value) * weight
    return out


# ---------------------------------------------------------------------------------------------
# The sensor
# ---------------------------------------------------------------------------------------------


def _top_of_atmosphere(
    surface: NDArray[np.float32], rng: np.random.Generator, unit: float
) -> NDArray[np.float32]:
    """Level-1C reflectance, (13, H, W): path radiance, transmission and the cirrus band."""
    shape = (surface.shape[1], surface.shape[2])
    haze = (1.0 + 0.025 * _noise(rng, shape, 120.0 / unit, 2)).astype(np.float32)
    vapour = (1.0 + 0.04 * _noise(rng, shape, 90.0 / unit, 2)).astype(np.float32)
    clarity = np.float32(rng.uniform(0.93, 1.08))
    moisture = np.float32(rng.uniform(0.85, 1.15))
    out = np.empty((len(_L1C), *shape), np.float32)
    for source, name in enumerate(_L2A):
        loss = moisture * vapour if name == "B9" else np.float32(1.0)
        seen = np.float32(_TRANSMISSION[source]) * loss * surface[source]
        out[_L1C.index(name)] = seen + np.float32(_PATH[source]) * clarity * haze
    # At 1.38 um the vapour hides the ground; only the thinnest high cloud is left.
    cirrus = 0.0015 + 0.00015 * _noise(rng, shape, 60.0 / unit, 2)
    out[_L1C.index("B10")] = np.clip(cirrus, 0.0010, 0.0028)
    return out


def _sense(
    image: NDArray[np.float32], bands: tuple[str, ...], rng: np.random.Generator, unit: float
) -> NDArray[np.uint16]:
    """Digital numbers as a stacked product holds them: native sampling, noise, common grid."""
    height, width = image.shape[1:]
    image = _point_spread(image)
    out = np.empty(image.shape, np.uint16)
    for index, name in enumerate(bands):
        factor = max(1, round(_METRES.get(name, 20) / (10.0 * unit)))
        native = _block_mean(image[index], factor)
        # Read-out noise and a part that grows with the signal; the cirrus band is all noise floor.
        floor, gain = (0.00006, 0.0) if name == "B10" else (0.0006, 0.005)
        error = rng.standard_normal(native.shape).astype(np.float32)
        native = native + error * (np.float32(floor) + np.float32(gain) * native)
        full = _bilinear(_bilinear(native, factor, height).T, factor, width).T
        # 0 means no data in these products, so the darkest valid number is 1.
        out[index] = np.clip(np.rint(full * np.float32(10_000.0)), 1, 65_535).astype(np.uint16)
    return out


def _render(
    shape: tuple[int, int], seed: int, day: int, level: str, resolution: float, recipe: _Recipe
) -> Scene:
    """A place on a day, as the sensor delivers it; the arguments are already checked."""
    unit = resolution / 10.0
    place = _build(shape, seed, unit, recipe)
    image = _reflectance(place, day, seed)
    rng = np.random.default_rng([seed, 3, day])
    bands: tuple[str, ...] = _L2A
    if level == "L1C":
        image, bands = _top_of_atmosphere(image, rng, unit), _L1C
    east, north = place.origin
    return Scene(
        pixels=_sense(image, bands, rng, unit),
        bands=bands,
        level=level,
        land_cover=place.land_cover,
        transform=(resolution, 0.0, east, 0.0, -resolution, north),
        crs="EPSG:32632",
        date=datetime.date(2021, 1, 1) + datetime.timedelta(days=day - 1),
    )


def landscape(
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    day_of_year: int = 180,
    level: str = "L2A",
    resolution: float = 10.0,
) -> Scene:
    """Generate a plausible Sentinel-2 scene of a temperate European landscape.

    The same ``size``, ``seed`` and ``resolution`` give the same place, with the same land cover,
    on every day of the year. The result is synthetic; use it to try software, not to draw
    conclusions about the Earth.

    Args:
        size: Height and width in pixels, each at least 32.
        seed: Which place, a non-negative integer.
        day_of_year: Day of 2021, 1 to 365; vegetation follows a northern mid-latitude year.
        level: ``"L2A"`` for surface reflectance in 12 bands, ``"L1C"`` for top-of-atmosphere
            reflectance in 13 bands (with B10).
        resolution: Side of a pixel in metres. Bands with a coarser native sampling are averaged
            to it and interpolated back, as in stacked products.

    Returns:
        The scene: pixels of shape (bands, H, W), uint16, reflectance times 10,000.

    Raises:
        PixelError: If an argument is out of its range.
    """
    if len(size) != 2 or min(size) < _MIN_SIZE:
        raise PixelError(
            f"size is {size!r}; expected (height, width) in pixels, each at least {_MIN_SIZE}."
        )
    if level not in ("L2A", "L1C"):
        raise PixelError(f"level is {level!r}; expected 'L2A' or 'L1C'.")
    if not 1 <= day_of_year <= 365:
        raise PixelError(f"day_of_year is {day_of_year!r}; expected 1 to 365 (a day of 2021).")
    if not (math.isfinite(resolution) and resolution > 0):
        raise PixelError(f"resolution is {resolution!r}; expected metres per pixel, above 0.")
    if seed < 0:
        raise PixelError(f"seed is {seed!r}; expected a non-negative integer.")
    shape = (int(size[0]), int(size[1]))
    return _render(shape, int(seed), int(day_of_year), level, float(resolution), _Recipe())


def _recipe_for(label: int, purity: float) -> _Recipe:
    """A place of which about the share ``purity`` (0 to 1) is one class."""
    rest = 1.0 - purity
    fields: dict[int, tuple[float, float]] = {
        _CROP: (purity, 0.7 * rest),
        _GRASS: (0.7 * rest, purity),
        _SOIL: (0.4 * rest, 0.6 * rest),
    }
    if label in fields:
        crop, grass = fields[label]
        return _Recipe(False, 0.0, 0.0, True, 0.3 * rest, 0.4, crop, grass, 0.25)
    if label in (_EVERGREEN, _DECIDUOUS):
        evergreen = 1.0 - 0.4 * rest if label == _EVERGREEN else 0.4 * rest
        return _Recipe(False, 0.0, 0.0, True, 1.0 - 0.5 * rest, evergreen, 0.5, 0.4, 0.25)
    if label == _WATER:
        return _Recipe(False, 0.36 + 0.5 * purity, 0.0, True, 0.4, 0.4, 0.5, 0.4, 0.3)
    return _Recipe(False, 0.0, 0.25 + 0.55 * purity, True, 0.1, 0.4, 0.6, 0.3, 0.6)


def _tile(label: int, size: int, seed: int, index: int, level: str) -> Scene:
    """One tile of which more than 60 % is the class ``label``."""
    rng = np.random.default_rng([seed, 4, label, index])
    purity = float(rng.uniform(0.72, 0.95))
    day = int(rng.integers(115, 265))
    scene: Scene | None = None
    for _ in range(12):
        place = int(rng.integers(0, 2**31))
        scene = _render((size, size), place, day, level, 10.0, _recipe_for(label, purity))
        if float(np.count_nonzero(scene.land_cover == label)) > 0.6 * size * size:
            return scene
        purity = min(purity + 0.06, 1.0)
    raise PixelError(f"no {size} x {size} tile of {LAND_COVER[label]!r} found for seed {seed}.")


def tiles(
    n: int, size: int = 64, seed: int = 0, level: str = "L1C"
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Generate small labelled tiles, each dominated by one class, for tests of fine-tuning.

    Args:
        n: How many tiles, at least 1.
        size: Side of a tile in pixels of 10 m, at least 32.
        seed: Which tiles, a non-negative integer.
        level: ``"L1C"`` (13 bands) or ``"L2A"`` (12 bands), ordered as in ``landscape``.

    Returns:
        The tiles, uint16 digital numbers of shape (n, bands, size, size), and their labels, int64
        indices into ``LAND_COVER`` of shape (n,). More than 60 % of each tile is its class; the
        classes differ by at most one tile in number, in shuffled order.

    Raises:
        PixelError: If an argument is out of its range.
    """
    _check_tiles(n, size, seed)
    if level not in ("L2A", "L1C"):
        raise PixelError(f"level is {level!r}; expected 'L2A' or 'L1C'.")
    labels = np.arange(n, dtype=np.int64) % len(LAND_COVER)
    np.random.default_rng([seed, 5]).shuffle(labels)
    made = [_tile(int(k), size, seed, i, level).pixels for i, k in enumerate(labels)]
    return np.stack(made), labels


def _check_tiles(n: int, size: int, seed: int) -> None:
    """Refuse counts, sizes and seeds no tile can have."""
    if n < 1:
        raise PixelError(f"asked for {n!r} tiles; expected at least 1.")
    if size < _MIN_SIZE:
        raise PixelError(f"size is {size!r}; expected at least {_MIN_SIZE} pixels.")
    if seed < 0:
        raise PixelError(f"seed is {seed!r}; expected a non-negative integer.")


def _rasterio() -> Any:
    """The rasterio module, imported late because geofm works without it."""
    try:
        return importlib.import_module("rasterio")
    except ImportError as error:
        raise MissingExtraError(
            "writing GeoTIFFs needs rasterio, which is not installed: pip install 'geofm[raster]'"
        ) from error


def _profile(rasterio: Any, scene: Scene, bands: int) -> dict[str, Any]:
    """What both writers tell rasterio about a file."""
    height, width = scene.land_cover.shape
    return {
        "driver": "GTiff",
        "dtype": "uint16",
        "count": bands,
        "height": height,
        "width": width,
        "crs": scene.crs,
        "transform": rasterio.Affine(*scene.transform),
    }


def write_scene(path: str | Path, scene: Scene) -> Path:
    """Write a scene as a GeoTIFF.

    The file has the band names as band descriptions, 0 as no-data value, deflate compression,
    tiles of 256 pixels (fewer if the scene is smaller) and the tags ``LEVEL``, ``DATE`` (ISO 8601)
    and ``SYNTHETIC``.

    Args:
        path: Where to write; its folder must exist.
        scene: The scene, as from [`landscape`][geofm.datasets.samples.landscape].

    Returns:
        The path written.

    Raises:
        MissingExtraError: If rasterio is not installed.
        RasterError: If the folder does not exist.
    """
    rasterio = _rasterio()
    if not Path(path).parent.is_dir():
        raise RasterError(f"cannot write {path}: there is no folder {Path(path).parent}")
    profile = _profile(rasterio, scene, len(scene.bands))
    profile.update(nodata=0, compress="deflate", predictor=2, interleave="band")
    # TIFF blocks are multiples of 16 pixels; a smaller scene stays in strips.
    block = min(256, min(scene.land_cover.shape) // 16 * 16)
    if block >= 64:
        profile.update(tiled=True, blockxsize=block, blockysize=block)
    with rasterio.open(path, "w", **profile) as file:
        file.write(scene.pixels)
        file.descriptions = scene.bands
        file.update_tags(LEVEL=scene.level, DATE=scene.date.isoformat(), SYNTHETIC=_SYNTHETIC)
    return Path(path)


def write_eurosat(
    folder: str | Path, n_per_class: int = 6, seed: int = 0, size: int = 64
) -> list[Path]:
    """Write tiles in the form of the multispectral EuroSAT set.

    The files are ``folder/<Class>/<Class>_<i>.tif`` with i from 1, the class being the land cover
    name in camel case (``ForestEvergreen``). As in EuroSAT they hold 13 Level-1C bands with B8A
    LAST (B1 ... B8, B9, B10, B11, B12, B8A), a CRS and a transform, but no band descriptions and
    no no-data value. Unlike EuroSAT's they carry a ``SYNTHETIC`` tag.

    Args:
        folder: Where to write; created if needed.
        n_per_class: Tiles of each class, at least 1.
        seed: Which tiles, a non-negative integer.
        size: Side of a tile in pixels of 10 m, at least 32.

    Returns:
        The paths written, class by class.

    Raises:
        MissingExtraError: If rasterio is not installed.
        PixelError: If an argument is out of its range.
    """
    _check_tiles(n_per_class, size, seed)
    rasterio = _rasterio()
    order = [_L1C.index(name) for name in _EUROSAT]
    paths: list[Path] = []
    for label, name in enumerate(LAND_COVER):
        # EuroSAT's names have no underscore but the one before the number.
        title = "".join(word.capitalize() for word in name.split("_"))
        (Path(folder) / title).mkdir(parents=True, exist_ok=True)
        for number in range(1, n_per_class + 1):
            scene = _tile(label, size, seed, number, "L1C")
            path = Path(folder) / title / f"{title}_{number}.tif"
            with rasterio.open(path, "w", **_profile(rasterio, scene, len(order))) as file:
                file.write(scene.pixels[order])
                file.update_tags(SYNTHETIC=_SYNTHETIC)
            paths.append(path)
    return paths
