"""Names, tags, wildcards; and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import geofm
from geofm import registry


def test_wildcards_list_architectures_and_checkpoints() -> None:
    assert "mpmae_atto" in geofm.list_models("mpmae_*")
    assert "ssl4eco_resnet50" not in geofm.list_models("mpmae_*")
    assert set(geofm.list_models(["*_tiny", "*resnet18"])) == {
        "geotreeclip_tiny",
        "mpmae_tiny",
        "mpmae_unet_tiny",
        "ssl4eco_resnet18",
    }
    assert geofm.list_pretrained("ssl4eco*") == [
        "ssl4eco_resnet50.seco",
        "ssl4eco_resnet50.seco_lightning",
        "ssl4eco_resnet50.seco_ndvi",
    ]
    assert geofm.list_models("mpmae_tiny", pretrained=True) == ["mpmae_tiny.mmearth64"]


def test_every_listed_name_is_a_model_and_has_a_card() -> None:
    for name in geofm.list_models():
        assert geofm.is_model(name)
    for name in geofm.list_pretrained():
        assert geofm.is_model(name)
        assert geofm.model_card(name).tag == name.partition(".")[2]
    assert not geofm.is_model("mpmae_atto.nothing")
    assert not geofm.is_model("nothing")


def test_a_model_has_one_default() -> None:
    assert geofm.model_card("mpmae_atto").name == "mpmae_atto.mmearth64"
    assert geofm.model_card("mpmae_unet_atto").name == "mpmae_atto.mmearth64"
    assert geofm.model_card("ssl4eco_resnet50").name == "ssl4eco_resnet50.seco_ndvi"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: geofm.create_model("mpmae_ato"), "did you mean 'mpmae_atto'"),
        (lambda: geofm.create_model("mpmae_atto.mmearth46"), "did you mean 'mmearth64'"),
        (lambda: geofm.create_model("mpmae_atto", "mmearth46"), "did you mean 'mmearth64'"),
        (lambda: geofm.model_card("mpmae_base"), "no published weights; of its family there are"),
        (lambda: geofm.model_card("zzz"), "there are mpmae_atto"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(call, words: str) -> None:
    with pytest.raises(geofm.UnknownModelError, match=words):
        call()


@pytest.mark.parametrize("name", ["ssl4eco_vit_small_patch16", "mpmae_base", "mpmae_unet_huge"])
def test_a_model_without_published_weights_says_so_and_lists_what_exists(name: str) -> None:
    with pytest.raises(geofm.WeightsNotFoundError, match=r"no published weights.*there are .*\."):
        geofm.create_model(name, pretrained=True)


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor a tag of mpmae_atto"):
        geofm.create_model("mpmae_atto", "/nowhere/checkpoint-199.pth")


def test_a_tag_without_weights_sets_the_architecture() -> None:
    model = geofm.create_model("mpmae_atto.mmearth128_rgb")
    assert model.patch_size == 16
    assert model.in_chans == 3
    assert model.input_spec.bands == ("B2", "B3", "B4")
    assert model.card is None


def test_errors_derive_from_geofm_and_from_the_builtin_one_expects() -> None:
    for name in registry.__all__:
        assert hasattr(registry, name)
    for error, builtin in (
        (geofm.BandError, ValueError),
        (geofm.WeightsNotFoundError, FileNotFoundError),
        (geofm.DownloadError, OSError),
        (geofm.UnknownModelError, ValueError),
    ):
        assert issubclass(error, geofm.GeofmError)
        assert issubclass(error, builtin)


def test_every_public_name_can_be_imported() -> None:
    for name in geofm.__all__:
        assert getattr(geofm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = geofm.nothing


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_geofm_costs_at_most_a_fifth_of_a_second_over_torch() -> None:
    code = (
        "import torch, time; t = time.perf_counter(); import geofm; print(time.perf_counter() - t)"
    )
    # The best of three: the machine may be busy.
    assert min(float(run(code)) for _ in range(3)) <= 0.2
    assert run("import sys, geofm; print('timm' in sys.modules, 'torch' in sys.modules)") == (
        "False False"
    )


@pytest.mark.parametrize("imports", ["geofm, timm", "timm, geofm", "geofm, timm.models, timm.data"])
def test_timm_knows_the_models_whichever_is_imported_first(imports: str) -> None:
    code = f"import {imports}; print(timm.create_model('mpmae_atto', in_chans=4).in_chans)"
    assert run(code) == "4"
