"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio

from geofm.cli import main
from geofm.errors import DownloadError, GeofmError

ROOT = Path(__file__).resolve().parents[1]


def test_list_prints_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mpmae_*", "--pretrained"]) == 0
    assert "mpmae_atto.mmearth64" in capsys.readouterr().out.splitlines()


def test_info_shows_bands_source_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mpmae_atto"]) == 0
    text = capsys.readouterr().out
    for part in ("B7 B8A B8 B9", "sid.erda.dk", "weights: not stated", "cached:    no", "@inproc"):
        assert part in text
    assert main(["info", "ssl4eco_resnet50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"]["divisor"] == 255


def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mpmae_ato"]) == 2
    assert capsys.readouterr().err.startswith("geofm: error: there is no model 'mpmae_ato'")


def test_sample_and_embed_make_a_map_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, out = tmp_path / "scene.tif", tmp_path / "embedding.tif"
    assert main(["sample", "scene", str(scene), "--size", "96"]) == 0
    assert main(["embed", str(scene), "-o", str(out), "--no-pretrained", "--level", "L2A"]) == 0
    assert "12 x 12 cells of 8 px, 320 channels, weights: untrained" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
    with rasterio.open(out) as file:
        assert file.count == 320


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_sample_refuses_a_number_that_cannot_be(
    count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "mmearth", str(tmp_path / "set"), "--n", count])
    assert "whole number of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["embed", "s.tif", "-o", "e.tif", "--mask-classes", "cloud"], "class numbers, like 3,8"),
        (["embed", "s.tif", "-o", "e.tif", "--mask-classes", "3,,8"], "class numbers, like 3,8"),
        (["segment", "e.tif", "--seed", "-1"], "whole number of at least 0"),
        (["sample", "scene", "s.tif", "--seed", "-1"], "whole number of at least 0"),
    ],
)
def test_numbers_that_are_none_are_told_so(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_classes_to_mask_reach_the_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def embed(*_: object, **given: object) -> None:
        asked.update(given)
        raise GeofmError("far enough")

    monkeypatch.setattr("geofm.raster.embed_raster", embed)
    words = ["embed", "s.tif", "-o", str(tmp_path / "e.tif"), "--no-pretrained"]
    assert main([*words, "--mask-classes", "3, 8,10"]) == 2
    assert asked.pop("mask_classes") == [3, 8, 10]
    assert main(words) == 2
    assert "mask_classes" not in asked


def test_predict_is_not_advised_to_take_an_option_it_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise DownloadError("there is no network")

    monkeypatch.setattr("geofm.factory.create_model", offline)
    words = ["predict", "s.tif", "-o", "c.tif", "--weights", "some-tag", "--classes", "8"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "there is no network" in said
    assert "--no-pretrained" not in said
    assert main(["embed", "s.tif", "-o", "e.tif"]) == 2
    assert "--no-pretrained" in capsys.readouterr().err


def test_embed_is_the_same_every_time(tmp_path: Path) -> None:
    scene = tmp_path / "scene.tif"
    main(["sample", "scene", str(scene), "--size", "64"])
    for name in ("a.tif", "b.tif"):
        main(["embed", str(scene), "-o", str(tmp_path / name), "--no-pretrained", "--level", "L2A"])
    with rasterio.open(tmp_path / "a.tif") as a, rasterio.open(tmp_path / "b.tif") as b:
        assert (a.read() == b.read()).all()


@pytest.mark.parametrize("model", ["mpmae_atto", "mpmae_tiny"])
def test_embed_without_network_takes_bundled_weights_or_says_what_to_do(
    model: str, tmp_path: Path
) -> None:
    scene, out = tmp_path / "scene.tif", tmp_path / "o.tif"
    main(["sample", "scene", str(scene), "--size", "64"])
    words = ["embed", str(scene), "-o", str(out), "--level", "L2A", "--model", model]
    done = subprocess.run(
        [sys.executable, "-m", "geofm", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "HF_HUB_OFFLINE" in done.stderr
    if model == "mpmae_atto":
        assert done.returncode == 0
        assert "loaded the small bundled checkpoint mpmae_atto.starter instead" in done.stderr
        with rasterio.open(out) as file:
            assert file.tags()["GEOFM_WEIGHTS"].startswith("mpmae_atto.starter")
    else:
        assert done.returncode == 2
        assert "--no-pretrained" in done.stderr
        assert not out.exists()


def test_embed_takes_named_bands_and_fills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, few, out = tmp_path / "scene.tif", tmp_path / "few.tif", tmp_path / "o.tif"
    main(["sample", "scene", str(scene), "--size", "64"])
    with rasterio.open(scene) as source:
        profile = source.profile | {"count": 4}
        with rasterio.open(few, "w", **profile) as file:
            file.write(source.read([2, 3, 4, 8]))
    words = ["embed", str(few), "-o", str(out), "--no-pretrained", "--level", "L2A"]
    assert main([*words, "--bands", "B2,B3,B4,B8"]) == 2
    assert "needs B1, B5, B6, B7, B8A, B9, B11, B12" in capsys.readouterr().err
    assert main([*words, "--bands", "B2,B3,B4,B8", "--fill", "mean"]) == 0


def test_cache_commands_run_on_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    assert main(["cache", "verify"]) == 0
    assert main(["cache", "clean"]) == 0
    assert "freed 0.0 MB" in capsys.readouterr().out


def test_python_m_geofm_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "geofm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("geofm 0.")


def test_the_readmes_table_is_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--markdown"])
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "README.md").read_text()
