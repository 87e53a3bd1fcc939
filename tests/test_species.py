"""From files to species: the command and the function behind it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data

import geofm
from geofm.cli import main
from geofm.datasets import open_observations, write_shards
from geofm.models.geotreeclip import GeoTreeCLIP

NAMES = ["Fagus sylvatica", "Picea abies", "Quercus robur", "Betula pendula", "Abies alba"]


@pytest.fixture(scope="module")
def tiny() -> GeoTreeCLIP:
    torch.manual_seed(0)
    return geofm.create_model("geotreeclip_tiny").eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 9, seed=3)
    return folder


def test_shards_are_answered_in_order_whatever_the_batch(tiny: GeoTreeCLIP, shards: Path) -> None:
    whole = geofm.name_species(tiny, shards, NAMES)
    parts = geofm.name_species(tiny, shards, NAMES, batch_size=2)
    assert len(whole.samples) == 9
    assert whole.samples == parts.samples
    torch.testing.assert_close(
        whole.prediction.probabilities, parts.prediction.probabilities, rtol=1e-4, atol=1e-5
    )
    assert [row["rank"] for row in whole.rows[:5]] == [1, 2, 3, 4, 5]
    assert whole.weights.startswith("untrained")


@pytest.mark.parametrize(
    ("series", "aerial"),
    [
        ("Abies_alba_1_1005_WEFL_NLF_2020.h5", "aerial_Abies_alba_1_1005_WEFL_NLF.tif"),
        ("Betula_spec._1_15679_WEFL_NLF_2019.h5", "aerial_Betula_spec._1_15679_WEFL_NLF.tif"),
    ],
)
def test_real_series_run_end_to_end(tiny: GeoTreeCLIP, series: str, aerial: str) -> None:
    source, place = data("treesatai_ts", series), data("treesatai_ts", aerial)
    answer = geofm.name_species(tiny, source, NAMES, georeference=place)
    assert answer.samples == (source.stem,)
    assert float(answer.prediction.probabilities.sum()) == pytest.approx(1, abs=1e-5)
    (observation,) = open_observations(source, georeference=place)
    assert np.isfinite(observation.images).any()
    assert observation.bands == geofm.model_card("geotreeclip").input.bands
    # The same sample among 63 others.
    images = torch.from_numpy(observation.images)
    many = torch.rand(64, *images.shape) * 3000
    many[17] = images
    auxiliary = {"latitude": [observation.latitude] * 64, "longitude": [observation.longitude] * 64}
    with torch.inference_mode():
        together = tiny.encode_image(many, auxiliary)[17]
        alone = tiny.encode_image(images[None], {k: v[:1] for k, v in auxiliary.items()})[0]
    assert (together - alone).abs().max() < 1e-5


def test_the_command_writes_a_table_and_a_picture(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, picture = tmp_path / "species.csv", tmp_path / "species.png"
    words = ["zero-shot", str(shards), "--species", ",".join(NAMES), "--model", "geotreeclip_tiny"]
    words += ["--no-pretrained", "--top", "3", "-o", str(table), "--picture", str(picture)]
    assert main(words) == 0
    out = capsys.readouterr()
    assert len(out.out.strip().splitlines()) == 27
    assert "UNTRAINED WEIGHTS" in out.err
    rows = list(csv.DictReader(table.open()))
    assert {row["species"] for row in rows} <= set(NAMES)
    assert {row["family"] for row in rows} <= {"Fagaceae", "Pinaceae", "Betulaceae"}
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("source", "species", "words"),
    [
        ("nowhere.tar", "Fagus sylvatica", "there is no"),
        (__file__, "Fagus sylvatica", "is neither GlobalGeoTree shards"),
        (None, "Fagus silvatica", "near: Fagus sylvatica"),
        (None, "nowhere.csv", "there is no table of species nowhere.csv"),
    ],
)
def test_what_cannot_be_answered_is_explained(
    source: str | None, species: str, words: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["zero-shot", source or str(shards), "--species", species]
    assert main([*arguments, "--model", "geotreeclip_tiny", "--no-pretrained"]) == 2
    assert words in capsys.readouterr().err


def test_an_encoder_names_no_species(shards: Path) -> None:
    with pytest.raises(geofm.ModelError, match="needs a dual tower"):
        geofm.name_species(geofm.create_model("mpmae_atto"), shards, NAMES)


def test_broken_samples_are_counted_if_asked_for(
    tiny: GeoTreeCLIP, shards: Path, tmp_path: Path
) -> None:
    source = next(shards.glob("*.tar"))
    broken = tmp_path / source.name
    content = source.read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(geofm.GeofmError, match=broken.name):
        geofm.name_species(tiny, broken, NAMES)
    answer = geofm.name_species(tiny, broken, NAMES, skip_broken=True)
    assert 0 < len(answer.samples) < 9
    assert answer.report.skipped.total() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "nowhere/a.csv"], "there is no folder nowhere"),
        (["--picture", "nowhere/a.png"], "there is no folder nowhere"),
        (["--auxiliary", "nowhere.json"], "there is no nowhere.json"),
        (["--auxiliary", __file__], "is no JSON"),
    ],
)
def test_files_that_are_not_there_are_named_before_anything_is_computed(
    words: list[str], message: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["zero-shot", str(shards), "--species", "Fagus sylvatica", *words]
    assert main([*arguments, "--model", "geotreeclip_tiny", "--no-pretrained"]) == 2
    assert message in capsys.readouterr().err


def test_unknown_environments_are_counted_over_all_batches(
    tiny: GeoTreeCLIP, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observations = list(open_observations(shards))
    lacking = sum(any(v is None for v in o.auxiliary.values()) for o in observations)
    assert 0 < lacking < len(observations)
    with caplog.at_level("WARNING", logger="geofm"):
        geofm.name_species(tiny, shards, NAMES, batch_size=2)
    assert f"{lacking} of 9 observations lack" in caplog.text
