"""Weight cards: the shipped ones are sound, and a broken one is refused with its name and field."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import data

from geofm.cards import WeightCard, cards_in, published_cards, read_card, weights_dir
from geofm.errors import CardError
from geofm.layouts import LAYOUTS
from geofm.registry import architectures
from geofm.spectral import SENSORS

Table = dict[str, Any]

CARDS = published_cards()
ALL = pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))

# Has every field that a card can have, two levels, a derived band and a score.
SOUND: Table = {
    "name": "mpmae_atto.test",
    "title": "A card",
    "default": True,
    "layout": "native",
    "citation": "@misc{x}",
    "arguments": {"in_chans": 3, "patch_size": 8},
    "input": {
        "sensor": "sentinel2",
        "bands": ["B4", "B8", "NDVI"],
        "levels": ["L1C", "L2A"],
        "normalization": "zscore",
        "size": 56,
        "fit": "any",
        "nodata": [0],
        "statistics": {
            "L1C": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 3.0]},
            "L2A": {"mean": [4.0, 5.0, 6.0], "std": [4.0, 5.0, 6.0]},
        },
        "derived": {"NDVI": {"bands": ["B8", "B4"], "scale": 10000, "minimum": 0, "eps": 1e-5}},
    },
    "source": {
        "kind": "huggingface",
        "repo": "someone/something",
        "repo_type": "dataset",
        "revision": "0" * 40,
        "filename": "folder/file.pth",
        "sha256": "0123abcd",
    },
    "licence": {"weights": "MIT", "code": "MIT", "data": "CC BY 4.0", "note": "A note."},
    "training": {"epochs": 3},
    "scores": [{"task": "t", "metric": "m", "value": 1, "protocol": "p", "source": "s"}],
}


def toml(table: Table) -> str:
    """The table as TOML; inline below the first level."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {_value(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return json.dumps(value)


def changed(**changes: Any) -> Table:
    """A copy of the sound card; ``input__size`` is a nested field, and None removes a field."""
    table = copy.deepcopy(SOUND)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place: Any = table
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return table


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Table], WeightCard]:
    def read_table(table: Table) -> WeightCard:
        path = tmp_path / "mpmae_atto.test.toml"
        path.write_text(toml(table))
        return read_card(path)

    return read_table


# --- the shipped cards --------------------------------------------------------------------------


def test_every_shipped_file_is_a_card() -> None:
    assert sorted(CARDS) == sorted(path.stem for path in weights_dir().glob("*.toml"))
    assert len(CARDS) >= 13


@ALL
def test_a_shipped_card_belongs_to_an_architecture_and_a_layout(card: WeightCard) -> None:
    assert card.model in architectures()
    assert card.layout in LAYOUTS
    assert card.tag
    assert card.path.is_file()


@ALL
def test_a_shipped_card_has_a_licence_a_citation_and_a_source(card: WeightCard) -> None:
    assert card.licence.weights
    assert card.citation.startswith("@")
    assert str(card.source)


@ALL
def test_a_shipped_card_normalizes_each_of_its_bands(card: WeightCard) -> None:
    for level in card.input.levels:
        shift, scale = card.input.shift_and_scale(level)
        assert len(shift) == len(scale) == len(card.input.bands)
        assert all(value > 0 for value in scale)
    sensor = SENSORS[card.input.sensor]
    assert all(sensor.find(b) or b in card.input.derived for b in card.input.bands)


@ALL
def test_a_shipped_card_with_a_bundled_file_has_it_and_it_is_small(card: WeightCard) -> None:
    if not card.bundled:
        return
    file = card.path.parent / str(card.source.filename)
    assert file.stat().st_size < 50e6
    assert len(str(card.source.sha256)) == 64


def test_no_two_shipped_cards_share_a_source() -> None:
    sources = [str(card.source) for card in CARDS.values()]
    assert len(set(sources)) == len(sources)


def test_each_model_with_published_weights_has_one_default() -> None:
    published = {card.model for card in CARDS.values() if not card.bundled}
    defaults = sorted(card.model for card in CARDS.values() if card.default)
    assert defaults == sorted(published)


# The file of the set a card was trained on, or of the nearest public one.
STATISTICS = {"64": "data_1M_v001_64_band_stats.json", "128": "data_100k_v001_band_stats.json"}
MMEARTH_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12"]


@pytest.mark.parametrize(
    "card",
    [pytest.param(c, id=c.name) for c in CARDS.values() if c.tag.startswith("mmearth")],
)
def test_mmearth_statistics_are_the_published_ones_band_by_band(card: WeightCard) -> None:
    side = card.tag.removeprefix("mmearth").partition("_")[0]
    published = json.loads(data("mmearth_band_stats", STATISTICS[side]).read_text())
    assert set(card.input.statistics) == {"L1C", "L2A"}
    for level, found in card.input.statistics.items():
        wanted = published[f"sentinel2_{level.lower()}"]
        for kind in ("mean", "std"):
            by_band = dict(zip(MMEARTH_BANDS, wanted[kind], strict=True))
            assert getattr(found, kind) == tuple(by_band[band] for band in card.input.bands)


def test_the_rgb_models_take_blue_first() -> None:
    assert CARDS["mpmae_atto.mmearth64_rgb"].input.bands == ("B2", "B3", "B4")


# --- a card of one's own ------------------------------------------------------------------------


def test_every_field_is_read(read: Callable[[Table], WeightCard]) -> None:
    card = read(SOUND)
    assert (card.name, card.model, card.tag) == ("mpmae_atto.test", "mpmae_atto", "test")
    assert card.default
    assert card.arguments == {"in_chans": 3, "patch_size": 8}
    assert card.input.bands == ("B4", "B8", "NDVI")
    assert card.input.level_matters
    assert card.input.shift_and_scale("L2A") == ((4.0, 5.0, 6.0), (4.0, 5.0, 6.0))
    assert card.input.derived["NDVI"].bands == ("B8", "B4")
    assert card.input.derived["NDVI"].scale == 10000
    assert card.input.nodata == (0.0,)
    assert card.source.sha256 == "0123abcd"
    assert str(card.source) == "Hugging Face datasets/someone/something@00000000/folder/file.pth"
    assert card.licence.note == "A note."
    assert card.scores[0].value == 1.0
    assert not card.bundled


def test_a_level_without_statistics_is_an_error(read: Callable[[Table], WeightCard]) -> None:
    for level in (None, "L3A"):
        with pytest.raises(CardError, match=r"L1C, L2A"):
            read(SOUND).input.shift_and_scale(level)


def test_a_card_cannot_be_changed_but_copied_and_pickled(
    read: Callable[[Table], WeightCard],
) -> None:
    card = read(SOUND)
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.title = "other"  # type: ignore[misc]
    # Models carry their card, and are copied and sent to other processes.
    assert copy.deepcopy(card) == card
    assert pickle.loads(pickle.dumps(card)) == card


def test_one_set_of_statistics_serves_any_level(read: Callable[[Table], WeightCard]) -> None:
    one = {"any": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0]}}
    spec = read(changed(input__statistics=one)).input
    assert not spec.level_matters
    assert spec.shift_and_scale(None) == spec.shift_and_scale("L1C")


DIVIDE = {"input__normalization": "divide", "input__statistics": None, "input__divisor": 255}


def test_a_divisor_serves_every_band(read: Callable[[Table], WeightCard]) -> None:
    spec = read(changed(**DIVIDE)).input
    assert spec.shift_and_scale(None) == ((0.0,) * 3, (255.0,) * 3)


THREE = [1.0, 2.0, 3.0]
URL = {"kind": "url", "url": "https://example.org/a.pth"}
BUNDLED = {"kind": "bundled", "filename": "a.safetensors", "sha256": "0" * 64}

# What is changed, and the field that the message must name.
BROKEN: list[tuple[Table, str]] = [
    # Unknown keys at every level: a misspelt field must not be ignored.
    ({"tittle": "x"}, "tittle"),
    ({"input__sizes": 3}, "input.sizes"),
    ({"input__divisor": 255}, "input.divisor"),
    ({"input__statistics__L1C__median": THREE}, "input.statistics.L1C.median"),
    ({"input__statistics__L1B": {"mean": THREE, "std": THREE}}, "input.statistics.L1B"),
    ({"input__derived__NDVI__offset": 1}, "input.derived.NDVI.offset"),
    ({"source__url": "https://example.org"}, "source.url"),
    ({"licence__wieghts": "MIT"}, "licence.wieghts"),
    ({"scores__0__values": 1}, "scores[0].values"),
    # Missing fields.
    ({"name": None}, "name"),
    ({"title": None}, "title"),
    ({"layout": None}, "layout"),
    ({"citation": None}, "citation"),
    ({"arguments": None}, "arguments"),
    ({"arguments__in_chans": None}, "arguments.in_chans"),
    ({"input": None}, "input"),
    ({"input__sensor": None}, "input.sensor"),
    ({"input__bands": None}, "input.bands"),
    ({"input__levels": None}, "input.levels"),
    ({"input__normalization": None}, "input.normalization"),
    ({"input__size": None}, "input.size"),
    ({"input__fit": None}, "input.fit"),
    ({"input__statistics": None}, "input.statistics"),
    ({"input__statistics__L1C": None}, "input.statistics"),
    ({"input__statistics__L1C__mean": None}, "input.statistics.L1C.mean"),
    ({"input__statistics__L1C__std": None}, "input.statistics.L1C.std"),
    ({"input__derived__NDVI__bands": None}, "input.derived.NDVI.bands"),
    ({**DIVIDE, "input__divisor": None}, "input.divisor"),
    ({"source": None}, "source"),
    ({"source__kind": None}, "source.kind"),
    ({"source__repo": None}, "source.repo"),
    ({"source__revision": None}, "source.revision"),
    ({"source__filename": None}, "source.filename"),
    ({"source": {"kind": "url"}}, "source.url"),
    ({"source": {**BUNDLED, "sha256": ""}}, "source.sha256"),
    ({"source": {"kind": "bundled", "filename": "a"}}, "source.sha256"),
    ({"source": {"kind": "bundled", "sha256": "0" * 64}}, "source.filename"),
    ({"licence": None}, "licence"),
    ({"licence__weights": None}, "licence.weights"),
    ({"scores__0__metric": None}, "scores[0].metric"),
    ({"scores__0__value": None}, "scores[0].value"),
    # Wrong types.
    ({"name": 3}, "name"),
    ({"title": ["x"]}, "title"),
    ({"default": "yes"}, "default"),
    ({"default": 1}, "default"),
    ({"arguments": [1]}, "arguments"),
    ({"input": "sentinel2"}, "input"),
    ({"input__bands": "B4"}, "input.bands"),
    ({"input__bands": ["B4", 8, "NDVI"]}, "input.bands"),
    ({"input__bands": []}, "input.bands"),
    ({"input__size": 56.0}, "input.size"),
    ({"input__size": True}, "input.size"),
    ({"input__nodata": 0}, "input.nodata"),
    ({"input__nodata": ["0"]}, "input.nodata"),
    ({"input__statistics__L1C": THREE}, "input.statistics.L1C"),
    ({"input__statistics__L1C__mean": ["1", "2", "3"]}, "input.statistics.L1C.mean"),
    ({"input__statistics__L1C__mean": [True, True, True]}, "input.statistics.L1C.mean"),
    ({"input__derived": ["NDVI"]}, "input.derived"),
    ({"input__derived__NDVI__scale": "1"}, "input.derived.NDVI.scale"),
    ({"licence": "MIT"}, "licence"),
    ({"training": "long"}, "training"),
    ({"scores": {"task": "t"}}, "scores"),
    ({"scores": ["t"]}, "scores[0]"),
    ({"scores__0__value": "1"}, "scores[0].value"),
    # Empty texts.
    ({"title": " "}, "title"),
    ({"citation": ""}, "citation"),
    ({"licence__weights": ""}, "licence.weights"),
    ({"source": {**URL, "url": ""}}, "source.url"),
    # Wrong values.
    ({"name": "mpmae_atto"}, "name"),
    ({"name": "mpmae_atto."}, "name"),
    ({"name": ".test"}, "name"),
    ({"arguments__in_chans": 4}, "arguments.in_chans"),
    ({"input__sensor": "sentinel9"}, "input.sensor"),
    ({"input__bands": ["B4", "B99", "NDVI"]}, "input.bands"),
    ({"input__bands": ["B4", "B4", "NDVI"]}, "input.bands"),
    ({"input__levels": ["L2A", "L3A"]}, "input.levels"),
    ({"input__levels": []}, "input.levels"),
    ({"input__levels": ["L2A"]}, "input.statistics"),
    ({"input__normalization": "minmax"}, "input.normalization"),
    ({"input__fit": "stretch"}, "input.fit"),
    ({"input__nodata": [math.nan]}, "input.nodata"),
    ({"input__statistics__L1C__mean": [1.0, 2.0]}, "input.statistics.L1C.mean"),
    ({"input__statistics__L2A__std": [1.0, 2.0, 3.0, 4.0]}, "input.statistics.L2A.std"),
    ({"input__statistics__L1C__mean": [1.0, math.nan, 3.0]}, "input.statistics.L1C.mean"),
    ({"input__statistics__L1C__std": [1.0, 0.0, 3.0]}, "input.statistics.L1C.std"),
    ({"input__statistics__L1C__std": [1.0, -2.0, 3.0]}, "input.statistics.L1C.std"),
    ({**DIVIDE, "input__divisor": 0}, "input.divisor"),
    ({**DIVIDE, "input__divisor": math.nan}, "input.divisor"),
    ({"input__derived__NDVI__bands": ["B8"]}, "input.derived.NDVI.bands"),
    ({"input__derived__EVI": {"bands": ["B8", "B4"]}}, "input.derived.EVI"),
    ({"source__kind": "ftp"}, "source.kind"),
    ({"source__repo_type": "space"}, "source.repo_type"),
    ({"source__sha256": "0123abc"}, "source.sha256"),
    ({"source__sha256": "0123ABCD"}, "source.sha256"),
    ({"source__sha256": "0" * 65}, "source.sha256"),
    ({"source__sha256": "nonsense"}, "source.sha256"),
    ({"source__filename": "../file.pth"}, "source.filename"),
    ({"source__filename": "folder/../../file.pth"}, "source.filename"),
    ({"source__filename": "/etc/passwd"}, "source.filename"),
    ({"source__filename": "..\\file.pth"}, "source.filename"),
    ({"source": {**BUNDLED, "filename": "../a.safetensors"}}, "source.filename"),
]


@pytest.mark.parametrize(
    ("changes", "field"), BROKEN, ids=[f"{field}-{i}" for i, (_, field) in enumerate(BROKEN)]
)
def test_a_broken_card_is_refused_with_its_name_and_field(
    read: Callable[[Table], WeightCard], changes: Table, field: str
) -> None:
    with pytest.raises(CardError) as caught:
        read(changed(**changes))
    assert str(caught.value).startswith(f"card mpmae_atto.test.toml: {field}: ")


@pytest.mark.parametrize("source", [URL, BUNDLED], ids=["url", "bundled"])
def test_the_other_kinds_of_source_are_read(
    read: Callable[[Table], WeightCard], source: Table
) -> None:
    card = read(changed(source=source))
    assert card.source.kind == source["kind"]
    assert card.source.sha256 == source.get("sha256")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"name = 1\nname = 2\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.y.toml"
    path.write_bytes(content)
    with pytest.raises(CardError, match=r"card x\.y\.toml: not valid TOML"):
        read_card(path)


# --- folders of cards ---------------------------------------------------------------------------


def _folder(folder: Path, *tables: Table) -> Path:
    for table in tables:
        (folder / f"{table['name']}.toml").write_text(toml(table))
    return folder


def test_two_defaults_of_one_model_are_refused_naming_both(tmp_path: Path) -> None:
    folder = _folder(tmp_path, changed(name="mpmae_atto.a"), changed(name="mpmae_atto.b"))
    with pytest.raises(CardError, match=r"mpmae_atto\.b\.toml: default: mpmae_atto\.a"):
        cards_in(folder)


def test_defaults_of_two_models_are_fine(tmp_path: Path) -> None:
    folder = _folder(tmp_path, changed(name="mpmae_tiny.a"), changed(name="mpmae_atto.b"))
    assert list(cards_in(folder)) == ["mpmae_atto.b", "mpmae_tiny.a"]


def test_a_card_under_another_name_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mpmae_atto.other.toml").write_text(toml(SOUND))
    with pytest.raises(CardError, match=r"mpmae_atto\.other\.toml: name"):
        cards_in(tmp_path)


def test_a_folder_without_cards_has_none(tmp_path: Path) -> None:
    assert dict(cards_in(tmp_path)) == {}
