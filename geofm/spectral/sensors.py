"""The sensors geofm knows: their bands, names and wavelengths.

Common names are those of the STAC EO extension, version 2. Its narrow and wide near infrared are
kept apart (``nir08`` and ``nir``), so Landsat OLI's B5 has the common name ``nir08``; where a
sensor has only one of the two, the other plain word is an alias and ``"nir"`` finds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from geofm.errors import BandError
from geofm.spectral.bands import Band, Sensor

__all__ = [
    "HLS_L30",
    "HLS_S30",
    "LANDSAT_ETM",
    "LANDSAT_OLI",
    "LANDSAT_TM",
    "MODIS",
    "NAIP",
    "PLANETSCOPE",
    "RGB",
    "RGBN",
    "SENSORS",
    "SENTINEL2",
    "SENTINEL2A",
    "SENTINEL2B",
    "SENTINEL2C",
    "sensor",
]

# Words people use for a common name, for sensors on which they can mean one band only.
_COASTAL = ("coastal_aerosol", "coastal_blue", "aerosol", "ultra_blue")
_WATER = ("water_vapour", "water_vapor")
_NARROW_NIR = ("nir_narrow", "narrow_nir", "nirn")
_SWIR1 = ("swir1", "swir_1")
_SWIR2 = ("swir2", "swir_2")
_PAN = ("panchromatic",)
_THERMAL = ("thermal", "tir")
_THERMAL1 = ("tirs1", "tirs_1", "thermal1", "thermal_1", "tir1")
_THERMAL2 = ("tirs2", "tirs_2", "thermal2", "thermal_2", "tir2")


def _red_edge(number: int) -> tuple[str, ...]:
    return (f"rededge{number}", f"rededge_{number}", f"red_edge_{number}", f"re{number}")


def _spanning(
    name: str,
    common_name: str | None,
    low: float,
    high: float,
    resolution: float,
    aliases: tuple[str, ...] = (),
) -> Band:
    # For sources that print a band's limits: as in STAC, the centre is their midpoint.
    return Band(name, common_name, (low + high) / 2, high - low, resolution, aliases)


# Sentinel-2 ---------------------------------------------------------------------------------------

# Name, common name, resolution, aliases. Copernicus files write "B01", Earth Engine "B1".
_MSI: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("B1", "coastal", 60.0, ("B01", *_COASTAL)),
    ("B2", "blue", 10.0, ("B02",)),
    ("B3", "green", 10.0, ("B03",)),
    ("B4", "red", 10.0, ("B04",)),
    ("B5", "rededge071", 20.0, ("B05", *_red_edge(1))),
    ("B6", "rededge075", 20.0, ("B06", *_red_edge(2))),
    ("B7", "rededge078", 20.0, ("B07", *_red_edge(3))),
    ("B8", "nir", 10.0, ("B08", "nir_broad", "broad_nir")),
    # GDAL writes "B08A"; Earth Engine and several datasets count it as the fourth red edge.
    ("B8A", "nir08", 20.0, ("B08A", *_NARROW_NIR, *_red_edge(4))),
    ("B9", "nir09", 60.0, ("B09", *_WATER)),
    ("B10", "cirrus", 60.0, ()),
    ("B11", "swir16", 20.0, _SWIR1),
    ("B12", "swir22", 20.0, _SWIR2),
)

_MSI_SOURCE = (
    "ESA, Sentinel-2 spectral response functions (COPE-GSEG-EOPG-TN-15-0007) "
    "and the MSI band tables derived from them"
)

# Centre and width of each band, in the order of `_MSI`.
_S2A = (
    (442.7, 20.0),
    (492.7, 65.0),
    (559.8, 35.0),
    (664.6, 30.0),
    (704.1, 14.0),
    (740.5, 14.0),
    (782.8, 19.0),
    (832.8, 105.0),
    (864.7, 21.0),
    (945.1, 19.0),
    (1373.5, 29.0),
    (1613.7, 90.0),
    (2202.4, 174.0),
)
_S2B = (
    (442.3, 20.0),
    (492.3, 65.0),
    (558.9, 35.0),
    (664.9, 31.0),
    (703.8, 15.0),
    (739.1, 13.0),
    (779.7, 19.0),
    (832.9, 104.0),
    (864.0, 21.0),
    (943.2, 20.0),
    (1376.9, 29.0),
    (1610.4, 94.0),
    (2185.7, 184.0),
)
# No width is given because none could be checked; B9 and B10 are known to the nanometre only.
_S2C = (
    (444.2, None),
    (489.0, None),
    (560.6, None),
    (666.5, None),
    (707.1, None),
    (741.1, None),
    (784.7, None),
    (834.6, None),
    (865.6, None),
    (947.0, None),
    (1372.0, None),
    (1612.0, None),
    (2191.3, None),
)


def _sentinel2(name: str, title: str, numbers: tuple[tuple[float, float | None], ...]) -> Sensor:
    bands = tuple(
        Band(band, common_name, wavelength, width, resolution, aliases)
        for (band, common_name, resolution, aliases), (wavelength, width) in zip(
            _MSI, numbers, strict=True
        )
    )
    return Sensor(name, title, bands, _MSI_SOURCE)


SENTINEL2 = _sentinel2("sentinel2", "Sentinel-2 MSI (numbers of Sentinel-2A)", _S2A)
SENTINEL2A = _sentinel2("sentinel2a", "Sentinel-2A MSI", _S2A)
SENTINEL2B = _sentinel2("sentinel2b", "Sentinel-2B MSI", _S2B)
SENTINEL2C = _sentinel2("sentinel2c", "Sentinel-2C MSI", _S2C)

# Landsat ------------------------------------------------------------------------------------------

_USGS = "USGS, What are the band designations for the Landsat satellites? (midpoints of the ranges)"

# Collection 2 level 2 calls reflectance SR_B* and surface temperature ST_B*. On TM and ETM+, B4 is
# STAC's wide "nir", but USGS's own STAC items label it "nir08": both find it.
LANDSAT_TM = Sensor(
    name="landsat_tm",
    title="Landsat 4-5 TM",
    bands=(
        _spanning("B1", "blue", 450.0, 520.0, 30.0, ("B01", "SR_B1")),
        _spanning("B2", "green", 520.0, 600.0, 30.0, ("B02", "SR_B2")),
        _spanning("B3", "red", 630.0, 690.0, 30.0, ("B03", "SR_B3")),
        _spanning("B4", "nir", 760.0, 900.0, 30.0, ("B04", "SR_B4", "nir08")),
        _spanning("B5", "swir16", 1550.0, 1750.0, 30.0, ("B05", "SR_B5", *_SWIR1)),
        _spanning("B6", "lwir", 10400.0, 12500.0, 120.0, ("B06", "ST_B6", *_THERMAL)),
        _spanning("B7", "swir22", 2080.0, 2350.0, 30.0, ("B07", "SR_B7", *_SWIR2)),
    ),
    source=_USGS,
)

LANDSAT_ETM = Sensor(
    name="landsat_etm",
    title="Landsat 7 ETM+",
    bands=(
        _spanning("B1", "blue", 450.0, 520.0, 30.0, ("B01", "SR_B1")),
        _spanning("B2", "green", 520.0, 600.0, 30.0, ("B02", "SR_B2")),
        _spanning("B3", "red", 630.0, 690.0, 30.0, ("B03", "SR_B3")),
        _spanning("B4", "nir", 770.0, 900.0, 30.0, ("B04", "SR_B4", "nir08")),
        _spanning("B5", "swir16", 1550.0, 1750.0, 30.0, ("B05", "SR_B5", *_SWIR1)),
        # Level 1 delivers this one band twice, at low and at high gain.
        _spanning(
            "B6",
            "lwir",
            10400.0,
            12500.0,
            60.0,
            ("B06", "ST_B6", "B6_VCID_1", "B6_VCID_2", *_THERMAL),
        ),
        _spanning("B7", "swir22", 2090.0, 2350.0, 30.0, ("B07", "SR_B7", *_SWIR2)),
        _spanning("B8", "pan", 520.0, 900.0, 15.0, ("B08", *_PAN)),
    ),
    source=_USGS,
)

LANDSAT_OLI = Sensor(
    name="landsat_oli",
    title="Landsat 8-9 OLI and TIRS",
    bands=(
        Band("B1", "coastal", 442.96, 15.98, 30.0, ("B01", "SR_B1", *_COASTAL)),
        Band("B2", "blue", 482.04, 60.04, 30.0, ("B02", "SR_B2")),
        Band("B3", "green", 561.41, 57.33, 30.0, ("B03", "SR_B3")),
        Band("B4", "red", 654.59, 37.47, 30.0, ("B04", "SR_B4")),
        Band("B5", "nir08", 864.67, 28.25, 30.0, ("B05", "SR_B5", "nir")),
        Band("B6", "swir16", 1608.86, 84.72, 30.0, ("B06", "SR_B6", *_SWIR1)),
        Band("B7", "swir22", 2200.73, 186.66, 30.0, ("B07", "SR_B7", *_SWIR2)),
        Band("B8", "pan", 589.50, 172.40, 15.0, ("B08", *_PAN)),
        Band("B9", "cirrus", 1373.43, 20.39, 30.0, ("B09",)),
        _spanning("B10", "lwir11", 10600.0, 11190.0, 100.0, ("ST_B10", *_THERMAL1)),
        _spanning("B11", "lwir12", 11500.0, 12510.0, 100.0, _THERMAL2),
    ),
    source=(
        "Barsi et al. 2014, The Spectral Response of the Landsat-8 Operational Land Imager, "
        "Remote Sensing 6 (OLI); " + _USGS + " (TIRS)"
    ),
)

# Harmonized Landsat Sentinel-2 --------------------------------------------------------------------

# Everything is on the 30 m grid, whatever the instrument's own sampling.
HLS_L30 = Sensor(
    name="hls_l30",
    title="HLS L30 (Landsat 8-9 on the Sentinel-2 grid)",
    bands=(
        Band("B01", "coastal", 442.96, 15.98, 30.0, ("B1", *_COASTAL)),
        Band("B02", "blue", 482.04, 60.04, 30.0, ("B2",)),
        Band("B03", "green", 561.41, 57.33, 30.0, ("B3",)),
        Band("B04", "red", 654.59, 37.47, 30.0, ("B4",)),
        # "Narrow" because S30 pairs its B8A, not its B08, with this band.
        Band("B05", "nir08", 864.67, 28.25, 30.0, ("B5", "nir", *_NARROW_NIR)),
        Band("B06", "swir16", 1608.86, 84.72, 30.0, ("B6", *_SWIR1)),
        Band("B07", "swir22", 2200.73, 186.66, 30.0, ("B7", *_SWIR2)),
        Band("B09", "cirrus", 1373.43, 20.39, 30.0, ("B9",)),
        _spanning("B10", "lwir11", 10600.0, 11190.0, 30.0, _THERMAL1),
        _spanning("B11", "lwir12", 11500.0, 12510.0, 30.0, _THERMAL2),
    ),
    source="NASA HLS, L30 product description; numbers as for landsat_oli, which it is made from",
)

# S30 is adjusted to OLI's bandpasses where OLI has a counterpart: there the numbers are OLI's. The
# red edges, B08, B09 and B10 have none and stay Sentinel-2's.
HLS_S30 = Sensor(
    name="hls_s30",
    title="HLS S30 (Sentinel-2 adjusted to Landsat OLI)",
    bands=(
        Band("B01", "coastal", 442.96, 15.98, 30.0, ("B1", *_COASTAL)),
        Band("B02", "blue", 482.04, 60.04, 30.0, ("B2",)),
        Band("B03", "green", 561.41, 57.33, 30.0, ("B3",)),
        Band("B04", "red", 654.59, 37.47, 30.0, ("B4",)),
        Band("B05", "rededge071", 704.1, 14.0, 30.0, ("B5", *_red_edge(1))),
        Band("B06", "rededge075", 740.5, 14.0, 30.0, ("B6", *_red_edge(2))),
        Band("B07", "rededge078", 782.8, 19.0, 30.0, ("B7", *_red_edge(3))),
        Band("B08", "nir", 832.8, 105.0, 30.0, ("B8", "nir_broad", "broad_nir")),
        Band("B8A", "nir08", 864.67, 28.25, 30.0, ("B08A", *_NARROW_NIR)),
        Band("B09", "nir09", 945.1, 19.0, 30.0, ("B9", *_WATER)),
        Band("B10", "cirrus", 1373.5, 29.0, 30.0),
        Band("B11", "swir16", 1608.86, 84.72, 30.0, _SWIR1),
        Band("B12", "swir22", 2200.73, 186.66, 30.0, _SWIR2),
    ),
    source=(
        "NASA HLS, S30 product description and bandpass adjustment; numbers as for landsat_oli "
        "where adjusted, else as for sentinel2a"
    ),
)

# Others -------------------------------------------------------------------------------------------


def _modis(
    number: int, common_name: str | None, low: float, high: float, resolution: float
) -> Band:
    # MOD09/MYD09 and MCD43 name their layers differently. "swir1" and "swir2" are no aliases:
    # some count B5 (1240 nm) as the first, some do not.
    aliases = (f"B0{number}", f"sur_refl_b0{number}", f"Nadir_Reflectance_Band{number}")
    return _spanning(f"B{number}", common_name, low, high, resolution, aliases)


MODIS = Sensor(
    name="modis",
    title="MODIS land bands 1-7 (Terra and Aqua)",
    bands=(
        _modis(1, "red", 620.0, 670.0, 250.0),
        _modis(2, "nir", 841.0, 876.0, 250.0),
        _modis(3, "blue", 459.0, 479.0, 500.0),
        _modis(4, "green", 545.0, 565.0, 500.0),
        # STAC has no common name for 1.24 um.
        _modis(5, None, 1230.0, 1250.0, 500.0),
        _modis(6, "swir16", 1628.0, 1652.0, 500.0),
        _modis(7, "swir22", 2105.0, 2155.0, 500.0),
    ),
    source="NASA, MODIS Specifications (midpoints of the bandwidths)",
)

# Named as the band descriptions in Planet's GeoTIFFs; 3 m is the pixel of the ortho products.
PLANETSCOPE = Sensor(
    name="planetscope",
    title="PlanetScope SuperDove (PSB.SD)",
    bands=(
        Band("coastal_blue", "coastal", 443.0, 20.0, 3.0, ("B1", "B01", "coastal_aerosol")),
        Band("blue", "blue", 490.0, 50.0, 3.0, ("B2", "B02")),
        Band("green_i", "green05", 531.0, 36.0, 3.0, ("B3", "B03", "green1", "green_1")),
        Band("green", "green", 565.0, 36.0, 3.0, ("B4", "B04", "green_ii", "green2", "green_2")),
        Band("yellow", "yellow", 610.0, 20.0, 3.0, ("B5", "B05")),
        Band("red", "red", 665.0, 31.0, 3.0, ("B6", "B06")),
        Band("rededge", "rededge071", 705.0, 15.0, 3.0, ("B7", "B07", "red_edge", *_red_edge(1))),
        Band("nir", "nir08", 865.0, 40.0, 3.0, ("B8", "B08")),
    ),
    source="Planet, PlanetScope instruments and 8-band asset description (PSB.SD)",
)

# Contractors fly cameras of their choice and the ground sampling went from 2 m to 0.3 m, so there
# is no one wavelength, width or resolution to give.
NAIP = Sensor(
    name="naip",
    title="NAIP aerial imagery (USDA)",
    bands=(
        Band("R", "red", aliases=("B1", "B01")),
        Band("G", "green", aliases=("B2", "B02")),
        Band("B", "blue", aliases=("B3", "B03")),
        Band("N", "nir", aliases=("B4", "B04")),
    ),
    source="STAC EO extension 2.0, common band names (band order)",
)

# Pictures of no particular camera: only the order and the colours are known.
RGB = Sensor(
    name="rgb",
    title="Red, green and blue of any camera",
    bands=(
        Band("red", "red", aliases=("R",)),
        Band("green", "green", aliases=("G",)),
        Band("blue", "blue", aliases=("B",)),
    ),
    source="By definition",
)

RGBN = Sensor(
    name="rgbn",
    title="Red, green, blue and near infrared of any camera",
    bands=(*RGB.bands, Band("nir", "nir", aliases=("N",))),
    source="By definition",
)

SENSORS: Mapping[str, Sensor] = MappingProxyType(
    {
        each.name: each
        for each in (
            SENTINEL2,
            SENTINEL2A,
            SENTINEL2B,
            SENTINEL2C,
            LANDSAT_TM,
            LANDSAT_ETM,
            LANDSAT_OLI,
            HLS_L30,
            HLS_S30,
            MODIS,
            PLANETSCOPE,
            NAIP,
            RGB,
            RGBN,
        )
    }
)


def _key(name: str) -> str:
    # "Sentinel-2", "sentinel_2" and "SENTINEL 2" are one name.
    return "".join(character for character in name.lower() if character.isalnum())


# "landsat" and "hls" are missing on purpose: their bands are numbered differently from instrument
# to instrument, so the caller has to say which.
_ALIASES: Mapping[str, Sensor] = MappingProxyType(
    {
        _key(alias): target
        for alias, target in (
            *((each.name, each) for each in SENSORS.values()),
            ("s2", SENTINEL2),
            ("sentinel-2-l1c", SENTINEL2),
            ("sentinel-2-l2a", SENTINEL2),
            ("s2a", SENTINEL2A),
            ("s2b", SENTINEL2B),
            ("s2c", SENTINEL2C),
            ("landsat-4", LANDSAT_TM),
            ("landsat-5", LANDSAT_TM),
            ("tm", LANDSAT_TM),
            ("landsat-7", LANDSAT_ETM),
            ("etm", LANDSAT_ETM),
            ("landsat-8", LANDSAT_OLI),
            ("landsat-9", LANDSAT_OLI),
            ("oli", LANDSAT_OLI),
            ("l30", HLS_L30),
            ("s30", HLS_S30),
            ("superdove", PLANETSCOPE),
        )
    }
)


def sensor(name_or_sensor: str | Sensor) -> Sensor:
    """The sensor of this name.

    Case, hyphens, underscores and spaces do not matter, and platform names such as
    ``"landsat8"``, ``"s2"`` or ``"superdove"`` are understood.

    Args:
        name_or_sensor: A name, or a sensor, which is returned as it is.

    Returns:
        The sensor.

    Raises:
        BandError: No sensor has this name; the message suggests the nearest.
    """
    if isinstance(name_or_sensor, Sensor):
        return name_or_sensor
    key = _key(name_or_sensor)
    found = _ALIASES.get(key)
    if found is not None:
        return found
    near = [_ALIASES[match].name for match in difflib.get_close_matches(key, _ALIASES, n=5)]
    hint = (
        f"did you mean {' or '.join(repr(each) for each in dict.fromkeys(near))}? " if near else ""
    )
    raise BandError(f"no sensor {name_or_sensor!r}; {hint}known sensors: {', '.join(SENSORS)}")
