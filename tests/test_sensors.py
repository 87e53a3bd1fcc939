"""The sensor tables: names, aliases and numbers."""

from __future__ import annotations

import pickle

import pytest

from geofm.errors import BandError, GeofmError
from geofm.spectral import sensors as tables
from geofm.spectral.bands import Band, Sensor
from geofm.spectral.sensors import (
    HLS_L30,
    HLS_S30,
    LANDSAT_ETM,
    LANDSAT_OLI,
    LANDSAT_TM,
    MODIS,
    NAIP,
    PLANETSCOPE,
    RGB,
    RGBN,
    SENSORS,
    SENTINEL2,
    SENTINEL2A,
    SENTINEL2B,
    SENTINEL2C,
    sensor,
)

# STAC EO extension 2.0: common name to range in nm.
STAC = {
    "pan": (400, 1000),
    "coastal": (400, 450),
    "blue": (450, 530),
    "green": (510, 600),
    "green05": (510, 550),
    "yellow": (580, 620),
    "red": (620, 690),
    "rededge": (690, 790),
    "rededge071": (690, 730),
    "rededge075": (730, 760),
    "rededge078": (760, 790),
    "nir": (760, 1000),
    "nir08": (800, 900),
    "nir09": (900, 1000),
    "cirrus": (1350, 1400),
    "swir16": (1550, 1750),
    "swir22": (2080, 2350),
    "lwir": (10400, 12500),
    "lwir11": (10500, 11500),
    "lwir12": (11500, 12500),
}

ALL = pytest.mark.parametrize("table", SENSORS.values(), ids=list(SENSORS))
BANDS = pytest.mark.parametrize(
    "band",
    [
        pytest.param(band, id=f"{table.name}-{band.name}")
        for table in SENSORS.values()
        for band in table
    ],
)
MSI = pytest.mark.parametrize("table", [SENTINEL2, SENTINEL2A, SENTINEL2B, SENTINEL2C])


def wavelength(band: Band) -> float:
    assert band.wavelength is not None
    return band.wavelength


def test_registry_holds_every_sensor_under_its_own_name() -> None:
    assert set(SENSORS) == {
        "sentinel2", "sentinel2a", "sentinel2b", "sentinel2c",
        "landsat_tm", "landsat_etm", "landsat_oli", "hls_l30", "hls_s30",
        "modis", "planetscope", "naip", "rgb", "rgbn",
    }  # fmt: skip
    for name, table in SENSORS.items():
        assert table.name == name
        assert getattr(tables, name.upper()) is table


def test_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        SENSORS["mine"] = RGB  # type: ignore[index]


@ALL
def test_bands_are_unique_and_found_by_every_name_in_any_case(table: Sensor) -> None:
    assert len(set(table.names)) == len(table) > 0
    assert table.title and table.source
    for band in table:
        for name in (band.name, *band.aliases):
            for spelling in (name, name.lower(), name.upper()):
                assert table[spelling] is band
        # No alias is written twice, nor only in another case.
        lowered = [alias.lower() for alias in (band.name, *band.aliases)]
        assert len(set(lowered)) == len(lowered)


@ALL
def test_common_names_are_unique_within_a_sensor_and_find_their_band(table: Sensor) -> None:
    # STAC asks for uniqueness; and an alias must not take a name that is another band's.
    for band in table:
        if band.common_name is not None:
            assert table[band.common_name] is band


@ALL
def test_a_sensor_survives_pickling(table: Sensor) -> None:
    assert pickle.loads(pickle.dumps(table)) == table


@BANDS
def test_common_name_is_in_the_vocabulary_and_its_range(band: Band) -> None:
    if band.common_name is None:
        assert band is MODIS["B5"]
        return
    low, high = STAC[band.common_name]
    if band.wavelength is not None:
        assert low <= band.wavelength <= high


@BANDS
def test_numbers_are_plausible(band: Band) -> None:
    if band.wavelength is not None:
        # Nanometres, not micrometres, visible to thermal.
        assert 400 <= band.wavelength <= 12500
    if band.width is not None:
        assert 10 <= band.width < wavelength(band)
    if band.resolution is not None:
        assert 3 <= band.resolution <= 500


@ALL
def test_only_the_cameras_lack_wavelengths(table: Sensor) -> None:
    known = [band.wavelength is not None for band in table]
    assert not any(known) if table in (NAIP, RGB, RGBN) else all(known)


@ALL
def test_only_the_cameras_and_sentinel2c_lack_widths(table: Sensor) -> None:
    known = [band.width is not None for band in table]
    assert not any(known) if table in (NAIP, RGB, RGBN, SENTINEL2C) else all(known)


@MSI
def test_sentinel2_order_and_resolutions(table: Sensor) -> None:
    assert table.names == (
        "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12",
    )  # fmt: skip
    assert {b.name for b in table if b.resolution == 10} == {"B2", "B3", "B4", "B8"}
    assert {b.name for b in table if b.resolution == 60} == {"B1", "B9", "B10"}
    assert sum(b.resolution == 20 for b in table) == 6
    # Listed by wavelength, save that the wide B8 comes before B8A.
    centres = [wavelength(band) for band in table]
    assert centres == sorted(centres)


@MSI
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("B02", "B2"), ("b2", "B2"), ("blue", "B2"), ("BLUE", "B2"), ("b01", "B1"),
        ("coastal_aerosol", "B1"), ("rededge1", "B5"), ("Red_Edge_2", "B6"), ("re3", "B7"),
        ("rededge071", "B5"), ("nir", "B8"), ("B08", "B8"), ("b8a", "B8A"), ("B08A", "B8A"),
        ("nir08", "B8A"), ("narrow_nir", "B8A"), ("B09", "B9"), ("water_vapor", "B9"),
        ("water_vapour", "B9"), ("cirrus", "B10"), ("swir1", "B11"), ("swir16", "B11"),
        ("SWIR2", "B12"),
    ],
)  # fmt: skip
def test_sentinel2_names(table: Sensor, name: str, expected: str) -> None:
    assert table[name].name == expected


@MSI
@pytest.mark.parametrize("name", ["rededge", "red_edge", "swir", "08A", "8"])
def test_sentinel2_does_not_guess(table: Sensor, name: str) -> None:
    assert table.find(name) is None


def test_sentinel2_numbers() -> None:
    narrow, wide = SENTINEL2["B8A"], SENTINEL2["B8"]
    assert narrow.wavelength == pytest.approx(864.7, abs=1)
    assert wide.wavelength == pytest.approx(832.8, abs=1)
    assert narrow.width is not None and wide.width is not None
    assert narrow.width * 4 < wide.width
    assert SENTINEL2["B1"].wavelength == pytest.approx(442.7)
    assert SENTINEL2["B12"].wavelength == pytest.approx(2202.4)
    assert SENTINEL2.bands == SENTINEL2A.bands


def test_sentinel2_satellites_differ_a_little() -> None:
    for other in (SENTINEL2B, SENTINEL2C):
        shifts = [
            abs(wavelength(a) - wavelength(b)) for a, b in zip(SENTINEL2A, other, strict=True)
        ]
        # The largest is SWIR 2's, 16.7 nm on B; a swapped or mistyped row would be further off.
        assert min(shifts) > 0 and max(shifts) < 17
        assert max(shifts[:10]) < 5
    # B12 is what tells B from A, B5 what tells C from both.
    assert wavelength(SENTINEL2A["B12"]) - wavelength(SENTINEL2B["B12"]) == pytest.approx(16.7)
    assert wavelength(SENTINEL2C["B5"]) - wavelength(SENTINEL2A["B5"]) == pytest.approx(3.0)


def test_b5_depends_on_the_sensor() -> None:
    assert LANDSAT_OLI["B5"] is LANDSAT_OLI["nir"] is LANDSAT_OLI["nir08"]
    assert LANDSAT_OLI["B5"].wavelength == pytest.approx(864.67)
    assert SENTINEL2["B5"].common_name == "rededge071"
    assert LANDSAT_TM["B5"].common_name == LANDSAT_ETM["B5"].common_name == "swir16"
    assert HLS_L30["B05"].common_name == "nir08"
    assert HLS_S30["B05"].common_name == "rededge071"


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        (LANDSAT_TM, "SR_B4", "B4"), (LANDSAT_TM, "nir", "B4"), (LANDSAT_TM, "swir2", "B7"),
        (LANDSAT_TM, "ST_B6", "B6"), (LANDSAT_TM, "thermal", "B6"), (LANDSAT_TM, "B01", "B1"),
        (LANDSAT_ETM, "sr_b7", "B7"), (LANDSAT_ETM, "B6_VCID_2", "B6"), (LANDSAT_ETM, "pan", "B8"),
        (LANDSAT_OLI, "SR_B2", "B2"), (LANDSAT_OLI, "blue", "B2"), (LANDSAT_OLI, "ST_B10", "B10"),
        (LANDSAT_OLI, "lwir12", "B11"), (LANDSAT_OLI, "panchromatic", "B8"),
        (HLS_L30, "B5", "B05"), (HLS_L30, "nir", "B05"), (HLS_L30, "cirrus", "B09"),
        (HLS_S30, "nir", "B08"), (HLS_S30, "nir_narrow", "B8A"), (HLS_S30, "swir1", "B11"),
        (MODIS, "sur_refl_b02", "B2"), (MODIS, "nir", "B2"), (MODIS, "blue", "B3"),
        (PLANETSCOPE, "green", "green"), (PLANETSCOPE, "green_ii", "green"),
        (PLANETSCOPE, "B3", "green_i"), (PLANETSCOPE, "red_edge", "rededge"),
        (NAIP, "blue", "B"), (NAIP, "b", "B"), (NAIP, "nir", "N"), (RGB, "r", "red"),
        (RGBN, "n", "nir"),
    ],
)  # fmt: skip
def test_names_of_other_sensors(table: Sensor, name: str, expected: str) -> None:
    assert table[name].name == expected


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (LANDSAT_TM, "B8"), (LANDSAT_TM, "coastal"), (LANDSAT_TM, "SR_B6"), (HLS_L30, "B08"),
        (HLS_L30, "rededge1"), (MODIS, "swir1"), (MODIS, "B8"), (RGB, "nir"), (LANDSAT_OLI, "tir"),
    ],
)  # fmt: skip
def test_names_that_other_sensors_do_not_have(table: Sensor, name: str) -> None:
    with pytest.raises(BandError, match=table.name):
        table[name]


def test_names_in_product_order() -> None:
    assert LANDSAT_TM.names == tuple(f"B{n}" for n in range(1, 8))
    assert LANDSAT_ETM.names == tuple(f"B{n}" for n in range(1, 9))
    assert LANDSAT_OLI.names == tuple(f"B{n}" for n in range(1, 12))
    assert HLS_L30.names == tuple(f"B{n:02d}" for n in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11))
    assert [HLS_S30[name].name for name in SENTINEL2.names] == list(HLS_S30.names)
    assert MODIS.names == tuple(f"B{n}" for n in range(1, 8))
    assert [PLANETSCOPE[f"B{n}"].name for n in range(1, 9)] == list(PLANETSCOPE.names)
    assert [band.common_name for band in NAIP] == ["red", "green", "blue", "nir"]
    assert RGB.names == RGBN.names[:3] == ("red", "green", "blue")


def test_ranges_become_centre_and_width() -> None:
    # MODIS band 1 is 620-670 nm, TIRS band 10 is 10.60-11.19 um, ETM+ pan 0.52-0.90 um.
    assert (MODIS["B1"].wavelength, MODIS["B1"].width) == (645, 50)
    assert (LANDSAT_OLI["B10"].wavelength, LANDSAT_OLI["B10"].width) == (10895, 590)
    assert (LANDSAT_ETM["pan"].wavelength, LANDSAT_ETM["pan"].width) == (710, 380)


def test_landsat_resolutions() -> None:
    assert LANDSAT_TM["B6"].resolution == 120
    assert LANDSAT_ETM["B6"].resolution == 60
    assert LANDSAT_OLI["B10"].resolution == 100
    assert LANDSAT_OLI["pan"].resolution == LANDSAT_ETM["pan"].resolution == 15
    assert {band.resolution for band in (*HLS_L30, *HLS_S30)} == {30}


def test_hls_repeats_the_tables_it_is_made_from() -> None:
    for band in HLS_L30:
        origin = LANDSAT_OLI[band.name.replace("B0", "B")]
        assert (band.wavelength, band.width) == (origin.wavelength, origin.width)
    adjusted = {"B01", "B02", "B03", "B04", "B8A", "B11", "B12"}
    for band in HLS_S30:
        assert band.common_name is not None
        table = LANDSAT_OLI if band.name in adjusted else SENTINEL2A
        origin = table[band.common_name]
        assert (band.wavelength, band.width) == (origin.wavelength, origin.width)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sentinel2", SENTINEL2), ("Sentinel-2", SENTINEL2), ("SENTINEL 2", SENTINEL2),
        ("s2", SENTINEL2), ("sentinel-2-l2a", SENTINEL2), ("S2B", SENTINEL2B),
        ("sentinel-2c", SENTINEL2C), ("landsat4", LANDSAT_TM), ("landsat5", LANDSAT_TM),
        ("landsat7", LANDSAT_ETM), ("landsat8", LANDSAT_OLI), ("Landsat-9", LANDSAT_OLI),
        ("landsat_oli", LANDSAT_OLI), ("HLS-L30", HLS_L30), ("hls.s30", HLS_S30),
        ("superdove", PLANETSCOPE), ("SuperDove", PLANETSCOPE), ("NAIP", NAIP), ("rgb", RGB),
    ],
)  # fmt: skip
def test_sensor_by_name(name: str, expected: Sensor) -> None:
    assert sensor(name) is expected


def test_sensor_passes_a_sensor_through() -> None:
    mine = Sensor("mine", "Mine", (Band("x"),))
    assert sensor(mine) is mine


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("sentinal2", "'sentinel2'"),
        ("landsat_8_oli", "'landsat_oli'"),
        ("plantscope", "'planetscope'"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, suggested: str) -> None:
    with pytest.raises(BandError) as caught:
        sensor(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "did you mean" in message
    assert suggested in message.partition("known sensors")[0]
    assert isinstance(caught.value, GeofmError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["landsat", "hls"])
def test_a_family_is_not_a_sensor(name: str) -> None:
    # Their members number the bands differently.
    with pytest.raises(BandError):
        sensor(name)


@pytest.mark.parametrize("name", ["", "---", "qqqqqqqq"])
def test_a_name_like_no_other_lists_what_there_is(name: str) -> None:
    with pytest.raises(BandError) as caught:
        sensor(name)
    assert "did you mean" not in str(caught.value)
    for known in SENSORS:
        assert known in str(caught.value)
