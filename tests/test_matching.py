"""Matching a model's bands to an image's: names, aliases, common names, wavelengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofm.errors import BandError
from geofm.spectral import SENSORS, Band, match_bands, missing_message, resolve_bands, sensor

S2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
OLI = SENSORS["landsat_oli"]


def found(wanted, available, **options):
    return {m.wanted: m.found for m in match_bands(wanted, available, **options)}


def test_names_are_found_whatever_their_order():
    matches = match_bands(["B8A", "B2"], ["B2", "B3", "B8A"])
    assert [(m.wanted, m.found, m.index, m.how) for m in matches] == [
        ("B8A", "B8A", 2, "name"),
        ("B2", "B2", 0, "name"),
    ]


@given(st.permutations(S2))
def test_any_order_of_the_image_gives_the_position_of_each_name(names):
    assert [names[m.index] for m in match_bands(S2, names)] == list(S2)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("B02", "B2"),
        ("b02", "B2"),
        ("BLUE", "B2"),
        ("nir", "B8"),
        ("nir08", "B8A"),
        ("B08A", "B8A"),
        ("RedEdge1", "B5"),
        ("swir_2", "B12"),
    ],
)
def test_aliases_and_any_case_are_found_and_reported_as_written(written, wanted):
    (match,) = match_bands([wanted], [written])
    assert (match.found, match.index, match.how) == (written, 0, "alias")


def test_the_wanted_names_may_be_aliases_too():
    assert found(["red", "B08A"], ["B4", "B8A"]) == {"B4": "B4", "B8A": "B8A"}


def test_common_names_match_across_sensors():
    assert found(S2, OLI.names, available_sensor="landsat_oli") == {
        "B1": "B1",
        "B2": "B2",
        "B3": "B3",
        "B4": "B4",
        "B5": None,
        "B6": None,
        "B7": None,
        "B8": None,
        "B8A": "B5",
        "B9": None,
        "B10": "B9",
        "B11": "B6",
        "B12": "B7",
    }


@pytest.mark.parametrize("other", ["hls_s30", "sentinel2a", "sentinel2b", "sentinel2c"])
@pytest.mark.parametrize("swapped", [False, True])
def test_all_sentinel_2_products_have_the_same_bands(other, swapped):
    names = {False: ("sentinel2", other), True: (other, "sentinel2")}[swapped]
    first, second = (sensor(name) for name in names)
    matches = match_bands(first.names, second.names, wanted_sensor=first, available_sensor=second)
    assert [m.index for m in matches] == list(range(13))


@pytest.mark.parametrize("name", sorted(SENSORS))
def test_every_sensor_matches_itself_by_name(name):
    each = SENSORS[name]
    matches = match_bands(each.names, each.names, wanted_sensor=each)
    assert [(m.index, m.how) for m in matches] == [(i, "name") for i in range(len(each))]


@pytest.mark.parametrize("first", sorted(SENSORS))
@pytest.mark.parametrize("second", sorted(SENSORS))
def test_bands_matched_without_tolerance_never_lie_far_apart(first, second):
    a, b = SENSORS[first], SENSORS[second]
    for m in match_bands(a.names, b.names, wanted_sensor=a, available_sensor=b):
        if m.index is None:
            continue
        one, other = a[m.wanted], b.bands[m.index]
        if one.wavelength is None or other.wavelength is None:
            continue
        # The widest honest gap: panchromatic of Landsat 7 and 8.
        assert abs(one.wavelength - other.wavelength) < 125


def test_landsat_b5_is_not_sentinel_2_b5():
    assert found(["B5"], ["B5"], available_sensor="landsat_oli") == {"B5": None}
    assert found(["B5"], ["B5"], wanted_sensor="landsat_oli", available_sensor="s2") == {"B5": None}


def test_landsat_b5_is_not_sentinel_2_b5_even_as_a_band_without_its_sensor():
    assert found(["B5"], [OLI["B5"]]) == {"B5": None}
    assert found(["B8A"], [OLI["B5"]]) == {"B8A": "B5"}


def test_an_unknown_b5_is_not_another_sensors_b5():
    assert found(["B5"], ["B5"], available_sensor="naip") == {"B5": None}
    assert found(["B5"], ["B5"], wanted_sensor="naip", available_sensor="s2") == {"B5": None}


def test_a_band_that_only_has_a_name_is_that_name():
    assert found(["B8"], [Band("b08")]) == {"B8": "b08"}


def test_a_band_with_roughly_the_right_wavelength_is_the_one_of_that_name():
    assert found(["B8"], [Band("B8", wavelength=842.0)]) == {"B8": "B8"}
    assert found(["B8"], [Band("B8", wavelength=945.0)]) == {"B8": None}
    assert found(["B8"], [Band("band_7", "nir", 842.0)]) == {"B8": "band_7"}


def test_bands_no_sensor_knows_match_by_name_across_sensors():
    assert found(["NDVI"], ["ndvi"], available_sensor="landsat_oli") == {"NDVI": "ndvi"}


def test_wavelength_matches_only_when_asked_for():
    names = OLI.names
    assert found(["B8"], names, available_sensor=OLI) == {"B8": None}
    assert found(["B8"], names, available_sensor=OLI, tolerance=31.0) == {"B8": None}
    (match,) = match_bands(["B8"], names, available_sensor=OLI, tolerance=32.0)
    assert (match.found, match.how) == ("B5", "wavelength")


def test_a_name_wins_over_a_nearer_wavelength():
    near = Band("other", wavelength=832.8)
    (match,) = match_bands(["B8"], [near, "B8"], tolerance=50.0)
    assert (match.found, match.how) == ("B8", "name")


def test_the_nearest_of_several_bands_stands_in():
    bands = [Band("a", wavelength=800.0), Band("b", wavelength=830.0), Band("c", wavelength=850.0)]
    assert found(["B8"], bands, tolerance=50.0) == {"B8": "b"}


def test_bands_without_wavelength_never_stand_in():
    assert found(["B8", "DEM"], ["SCL", "CLD"], tolerance=1e6) == {"B8": None, "DEM": None}


@pytest.mark.parametrize("wanted", [["B8A", "B8"], ["B8", "B8A"]])
def test_one_band_cannot_be_two(wanted):
    with pytest.raises(BandError, match=r"B5.*both.*fill=\{'B8': 'B5'\}") as caught:
        match_bands(wanted, ["B4", "B5"], available_sensor=OLI, tolerance=40.0)
    assert "lower the tolerance" in str(caught.value)


@pytest.mark.parametrize(
    "names", [["B2", "B2"], ["B2", "B02"], ["blue", "B2"], ["dem", "DEM"], ["B8A", Band("b8a")]]
)
def test_a_band_listed_twice_is_refused_with_both_spellings(names):
    spelled = [n.name if isinstance(n, Band) else n for n in names]
    with pytest.raises(BandError, match="listed twice") as caught:
        match_bands(["B2"], names)
    assert all(repr(name) in str(caught.value) for name in spelled)


def test_a_wanted_band_listed_twice_is_refused():
    with pytest.raises(BandError, match="listed twice"):
        match_bands(["B2", "blue"], ["B2"])


@pytest.mark.parametrize("text", ["B2,B3", "B2, B3", "B2;B3"])
def test_a_string_instead_of_a_list_is_refused_and_the_list_shown(text):
    with pytest.raises(BandError, match="list of names") as caught:
        match_bands(["B2"], text)
    assert "bands=['B2', 'B3']" in str(caught.value)


@pytest.mark.parametrize("bad", [1, None, 2.0, b"B2", ("B2",)])
def test_what_is_neither_name_nor_band_is_refused(bad):
    with pytest.raises(BandError, match="names or Band objects"):
        resolve_bands(["B2", bad], "sentinel2")


def test_unknown_extra_bands_are_ignored():
    assert found(["B2"], ["SCL", "B2", "my elevation", "QA60"]) == {"B2": "B2"}


def test_an_unknown_sensor_is_refused():
    with pytest.raises(BandError, match="no sensor 'sentinel5'"):
        match_bands(["B2"], ["B2"], available_sensor="sentinel5")


def test_the_message_names_what_is_missing_and_what_there_is():
    names = ["B2", "SCL"]
    message = missing_message(match_bands(["B2", "B3", "B4"], names), names, "the model")
    assert "needs B3, B4" in message
    assert "it has B2, SCL." in message


def test_names_of_another_sensor_are_recognised():
    names = ["SR_B2", "SR_B3", "SR_B4", "SR_B5"]
    message = missing_message(match_bands(["B2", "B3"], names), names, "the model")
    assert "sensor=" in message
    assert "'landsat_oli'" in message
    assert "'landsat_tm'" in message
    assert "'sentinel2'" not in message


def test_no_other_sensor_is_suggested_for_the_right_names():
    names = ["B2", "B3", "B4", "SCL"]
    message = missing_message(match_bands(["B2", "B8"], names), names, "the model")
    assert "sensor=" not in message


def test_the_callers_names_are_looked_at_where_they_are_the_wanted_ones():
    matches = match_bands(["SR_B2", "SR_B5"], S2)
    message = missing_message(matches, S2, "the layer", named=["SR_B2", "SR_B5"])
    assert "'landsat_oli'" in message


def test_a_misspelled_name_is_recognised_and_a_meaningful_one_is_not():
    names = ["B8_A", "B10"]
    message = missing_message(match_bands(["B8A", "B1"], names), names, "the model")
    assert "Is 'B8_A' meant to be 'B8A'?" in message
    assert "B10' meant" not in message


def test_a_common_name_that_two_bands_bear_matches_neither():
    bands = [Band("red_a", "red", 650.0), Band("red_b", "red", 670.0)]
    assert found(["B4"], bands) == {"B4": None}
