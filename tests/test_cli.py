"""The command line, as a user types it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import torch
from loopback import FileHost, serving
from safetensors.torch import save_file

import geofm
from geofm.cli import main
from geofm.colours import colour_of
from geofm.errors import DownloadError, GeofmError
from geofm.hub import sha256_of

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


def test_info_shows_the_hashes_that_outputs_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    name = "mpmae_atto.starter"
    assert main(["info", name]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main(["info", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    weights = ROOT / "weights" / f"{name}.safetensors"
    card, file = sha256_of(weights.with_suffix(".toml")), sha256_of(weights)
    assert ["card", "hash:", card] in lines
    assert ["sha256:", file] in lines
    assert (told["sha256"], told["file_sha256"]) == (card, file)
    scene, out, table = (tmp_path / n for n in ("s.tif", "e.tif", "e.parquet"))
    main(["sample", "scene", str(scene), "--size", "64"])
    main(["embed", str(scene), "-o", str(out), "--weights", "starter", "--level", "L2A"])
    main(["export", str(out), "-o", str(table)])
    with rasterio.open(out) as opened:
        tags = opened.tags()
    assert tags["GEOFM_CARD"] == name
    assert (tags["GEOFM_CARD_SHA256"], tags["GEOFM_FILE_SHA256"]) == (card, file)
    column = importlib.import_module("pyarrow.parquet").read_table(table)["card_hash"]
    assert set(column.to_pylist()) == {card}


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


def test_embed_takes_level_and_date_from_the_sample_scene(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, out = tmp_path / "scene.tif", tmp_path / "embedding.tif"
    main(["sample", "scene", str(scene), "--size", "64", "--day", "180"])
    words = ["embed", str(scene), "-o", str(out), "--no-pretrained"]
    assert main(words) == 0
    with rasterio.open(out) as file, rasterio.open(scene) as source:
        assert file.tags()["GEOFM_DATE"] == source.tags()["DATE"]
        assert "level=L2A" in file.tags()["GEOFM_PREPARE"]
    assert main([*words, "--level", "L1C"]) == 2
    assert "level='L1C' was given, but" in capsys.readouterr().err
    assert main([*words, "--level", "L1C", "--date", "2020-06-04", "--no-strict"]) == 0
    with rasterio.open(out) as file:
        assert file.tags()["GEOFM_DATE"] == "2020-06-04"
        assert "level=L1C" in file.tags()["GEOFM_PREPARE"]


def test_embed_can_be_told_what_a_folder_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from geofm.scenes.samples import write_safe

    product = write_safe(tmp_path, 60)
    plain = tmp_path / "plain"
    plain.mkdir()
    for image in product.rglob("*_B*.jp2"):
        band, metres = image.stem.split("_")[-2:]
        place = plain / f"{band}.jp2"
        if metres == "60m" and band != "B01":
            continue
        # The coarsest lies half a pixel off, as SSL4EO-S12's do.
        with rasterio.open(image) as file:
            a, *_ = transform = file.transform
            shift = (a - 10) / 2 if band == "B01" else 0
            moved = transform.translation(-shift, shift) @ transform
            if not place.exists() or metres == "10m":
                with rasterio.open(
                    place.with_suffix(".tif"),
                    "w",
                    driver="GTiff",
                    width=file.width,
                    height=file.height,
                    count=1,
                    dtype="uint16",
                    crs=file.crs,
                    transform=moved,
                ) as copy:
                    copy.write(file.read())
    out = tmp_path / "e.tif"
    words = ["embed", str(plain), "-o", str(out), "--no-pretrained", "--fill", "mean"]
    for option in ("--align corner", "--units dn", "--level L2A", "--offset -1000"):
        assert main(words) == 2
        assert option.split()[0] in capsys.readouterr().err
        words += option.split()
    assert main([*words, "--date", "2021-06-29"]) == 0
    with rasterio.open(out) as file:
        assert "level=L2A, offset=-1000" in file.tags()["GEOFM_PREPARE"]
        assert file.tags()["GEOFM_DATE"] == "2021-06-29"


def test_embed_and_picture_take_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, out = tmp_path / "scene.tif", tmp_path / "embedding.tif"
    main(["sample", "scene", str(scene), "--size", "64"])
    host = FileHost(files={"/a/scene.tif": scene.read_bytes()})
    with serving(host):
        address = host.url("/a/scene.tif")
        assert main(["embed", address, "-o", str(out), "--no-pretrained"]) == 0
        page = tmp_path / "e.html"
        assert main(["picture", str(out), "-o", str(page), "--image", address]) == 0
        assert main(["embed", host.url("/a/no.json"), "-o", str(out), "--no-pretrained"]) == 2
    said = capsys.readouterr().err
    assert f"{host.address}/a/no.json cannot be fetched" in said


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


@pytest.fixture
def some_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``s.tif`` is there; what is in it does not matter."""
    (tmp_path / "s.tif").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("some_file")
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


@pytest.mark.usefixtures("some_file")
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


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene, a U-Net with a head for three classes, and one without."""
    folder = tmp_path_factory.mktemp("predict")
    main(["sample", "scene", str(folder / "scene.tif"), "--size", "64"])
    torch.manual_seed(0)
    for name, classes in (("trained", 3), ("bare", 0)):
        model = geofm.create_model("mpmae_unet_atto", num_classes=classes)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["--classes", "water, forest,field"], ["water", "forest", "field"]),
        (["--classes", "3"], ["class_0", "class_1", "class_2"]),
        ([], ["class_0", "class_1", "class_2"]),
    ],
)
def test_predict_takes_the_head_of_the_file(
    fine_tuned: Path, tmp_path: Path, classes: list[str], names: list[str]
) -> None:
    weights, out = fine_tuned / "trained.safetensors", tmp_path / "c.tif"
    words = ["predict", str(fine_tuned / "scene.tif"), "-o", str(out), "--level", "L2A"]
    assert main([*words, "--weights", str(weights), *classes]) == 0
    with rasterio.open(out) as file:
        tags = file.tags()
        assert file.colormap(1)[2][:3] == colour_of(2)
    assert json.loads(tags["GEOFM_CLASSES"]) == names
    assert tags["GEOFM_FILE_SHA256"] == sha256_of(weights)
    assert "GEOFM_CARD" not in tags


@pytest.mark.parametrize(
    ("weights", "classes", "says"),
    [
        ("trained", ["--classes", "7"], "has a head for 3 classes, 7 are named"),
        ("trained", ["--classes", "a"], "has a head for 3 classes, 1 are named"),
        ("trained", ["--classes", "0"], "has a head for 3 classes, 0 are named"),
        ("bare", ["--classes", "3"], "has no head (no head.weight), so it knows no classes: train"),
        ("bare", [], "has no head (no head.weight), so it knows no classes: train"),
    ],
)
def test_predict_does_not_answer_with_an_untrained_head(
    fine_tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
    classes: list[str],
    says: str,
) -> None:
    words = ["predict", str(fine_tuned / "scene.tif"), "-o", str(tmp_path / "c.tif")]
    words += ["--level", "L2A", "--weights", str(fine_tuned / f"{weights}.safetensors")]
    assert main([*words, *classes]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_one_line(
    fine_tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", str(fine_tuned / "scene.tif"), "-o", str(tmp_path / "e.tif")]
    assert main([*words, "--level", "L2A", "--no-pretrained", "--device", "cuda:99"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("geofm: error: the model cannot run on cuda:99: ")


@pytest.mark.usefixtures("some_file")
@pytest.mark.parametrize(
    ("words", "partial", "says"),
    [
        ([], True, "interrupted; the same command continues from "),
        (["--no-resume"], True, "the same command without --no-resume continues from "),
        ([], False, "interrupted"),
    ],
)
def test_an_interruption_is_one_line_that_says_how_to_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    partial: bool,
    says: str,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        if partial:
            (tmp_path / "e.tif.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("geofm.raster.embed_raster", stopped)
    command = ["embed", "s.tif", "-o", str(tmp_path / "e.tif"), "--no-pretrained", *words]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert said.startswith("geofm: ") and said.count("\n") == 1
    assert f"{says}{tmp_path / 'e.tif.partial' if partial else ''}\n" in said


@pytest.mark.parametrize("at", ["-3.1,40.2", "-.5,-40", "9.8,-47"])
def test_places_west_of_greenwich_need_no_sign_of_equality(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("geofm.maps.commands.run_similar", lambda options: asked.append(options.at))
    assert main(["similar", "e.tif", "--at", at]) == 0
    assert main(["similar", "e.tif", f"--at={at}", "--top", "3"]) == 0
    assert asked == [at, at]


def test_negative_values_of_options_may_have_exponents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("geofm.cli._embed", lambda options: asked.update(vars(options)) or 0)
    words = ["embed", "s.tif", "-o", "e.tif", "--nodata", "-3.4e38", "--nodata", "-9999"]
    assert main([*words, "--offset", "-1e3"]) == 0
    assert (asked["nodata"], asked["offset"]) == ([-3.4e38, -9999], -1000)


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


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_a_missing_image_is_told_before_weights_are_fetched(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("geofm.cli._model", None)
    words = [command, "nope.tif", "-o", "out.tif", "--weights", "starter"]
    assert main(words) == 2
    assert "there is no file or folder nope.tif" in capsys.readouterr().err
