"""What `create_model` does with odd requests, foreign files and cards of one's own."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import geofm
from geofm.registry import architectures, model_card

FOUR = ["B4", "B2", "B8", "B11"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "atto.pth"
    torch.save(geofm.create_model("mpmae_atto").state_dict(), path)
    return path


def own_card(folder: Path, name: str = "mpmae_atto.mine", **changes: str) -> Path:
    """A folder with weights and a card of the user's own."""
    model = geofm.create_model(name.partition(".")[0])
    save_file(model.state_dict(), folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    text = model_card("mpmae_atto").path.read_text()
    start, end = text.index("[source]"), text.index("[licence]")
    source = (
        f'[source]\nkind = "bundled"\nfilename = "weights.safetensors"\nsha256 = "{digest}"\n\n'
    )
    text = text[:start] + source + "\n" + text[end:]
    text = text.replace('name = "mpmae_atto.mmearth64"', f'name = "{name}"')
    text = text.replace('layout = "mmearth"', 'layout = "native"')
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / f"{name}.toml").write_text(text)
    return folder


def test_a_folder_with_a_card_loads_with_its_bands(tmp_path: Path) -> None:
    model = geofm.create_model("mpmae_atto", own_card(tmp_path))
    assert model.card.name == "mpmae_atto.mine"
    assert model.input_spec.bands == model_card("mpmae_atto").input.bands
    again = geofm.create_model("mpmae_atto", tmp_path / "mpmae_atto.mine.toml")
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_a_card_that_contradicts_its_file_is_refused(tmp_path: Path) -> None:
    folder = own_card(tmp_path, **{"patch_size = 8": "patch_size = 16"})
    with pytest.raises(geofm.CardError, match=r"arguments\.patch_size is 16, but .* has 8"):
        geofm.create_model("mpmae_atto", folder)


def test_a_card_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(geofm.CardError, match="is of mpmae_atto, not of mpmae_tiny"):
        geofm.create_model("mpmae_tiny", own_card(tmp_path))


def test_a_tag_that_does_not_describe_the_file_is_refused(plain: Path) -> None:
    with pytest.raises(geofm.CardError, match=r"arguments\.patch_size is 16, but .* has 8"):
        geofm.create_model("mpmae_atto.mmearth128", plain)


def test_a_model_saved_with_four_bands_is_reloaded_by_naming_them(
    plain: Path, tmp_path: Path
) -> None:
    model = geofm.create_model("mpmae_atto", plain, bands=FOUR, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "four.pth")
    again = geofm.create_model(
        "mpmae_atto", tmp_path / "four.pth", trained_bands=FOUR, num_classes=3
    ).eval()
    x = torch.randn(2, 4, 56, 56)
    torch.testing.assert_close(again(x), model(x))
    assert again.input_spec == model.input_spec
    fewer = geofm.create_model(
        "mpmae_atto", tmp_path / "four.pth", trained_bands=FOUR, bands=["B8", "B4"]
    )
    assert fewer.in_chans == 2
    torch.testing.assert_close(
        fewer.initial_conv[0].weight[:, 0], model.initial_conv[0].weight[:, 2]
    )


def test_a_file_of_unknown_bands_says_how_to_name_them(plain: Path, tmp_path: Path) -> None:
    model = geofm.create_model("mpmae_atto", plain, bands=FOUR)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    with pytest.raises(geofm.BandError, match=r"trained_bands=\[...\]"):
        geofm.create_model("mpmae_atto", tmp_path / "four.pth", bands=FOUR)
    with pytest.raises(geofm.ModelError, match="takes 4 channels, but 3 trained_bands"):
        geofm.create_model("mpmae_atto", tmp_path / "four.pth", trained_bands=FOUR[:3])
    unknown = geofm.create_model("mpmae_atto", tmp_path / "four.pth")
    assert unknown.input_spec is None
    with pytest.raises(geofm.ModelError, match="is not known"):
        geofm.create_transform(unknown, FOUR, "dn", "L2A")


def test_a_bare_file_logs_whose_bands_it_is_taken_to_have(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="geofm"):
        geofm.create_model("mpmae_atto", plain)
    assert "taken from card mpmae_atto.mmearth64" in caplog.text
    assert "trained_bands" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "encoder.", "backbone."])
def test_a_holders_prefix_is_no_obstacle(prefix: str, plain: Path, tmp_path: Path) -> None:
    state = torch.load(plain, weights_only=True)
    torch.save({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "held.pth")
    model = geofm.create_model("mpmae_atto", tmp_path / "held.pth")
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_grn_vectors_may_be_stored_flat(plain: Path, tmp_path: Path) -> None:
    state = torch.load(plain, weights_only=True)
    flat = {k: v.reshape(1, -1) if ".grn." in k else v for k, v in state.items()}
    torch.save(flat, tmp_path / "flat.pth")
    model = geofm.create_model("mpmae_atto", tmp_path / "flat.pth")
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_a_unet_file_in_an_encoder_is_refused_with_a_hint(tmp_path: Path) -> None:
    torch.save(geofm.create_model("mpmae_unet_atto").state_dict(), tmp_path / "unet.pth")
    with pytest.raises(geofm.LayoutError, match=r"use mpmae_unet_\*"):
        geofm.create_model("mpmae_atto", tmp_path / "unet.pth")


def test_nan_weights_and_the_meta_device_are_refused(plain: Path, tmp_path: Path) -> None:
    state = torch.load(plain, weights_only=True)
    state["norm.weight"] = torch.full_like(state["norm.weight"], torch.nan)
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(geofm.LayoutError, match=r"NaN or infinite weights: norm\.weight"):
        geofm.create_model("mpmae_atto", tmp_path / "nan.pth")
    with pytest.raises(geofm.ModelError, match="meta device"):
        geofm.create_model("mpmae_atto", plain, device="meta")


def test_a_head_of_other_classes_is_replaced_with_a_warning(tmp_path: Path) -> None:
    torch.save(geofm.create_model("mpmae_atto", num_classes=7).state_dict(), tmp_path / "7.pth")
    for number in (7, None):
        model = geofm.create_model("mpmae_atto", tmp_path / "7.pth", num_classes=number)
        assert model.num_classes == 7
    with pytest.warns(UserWarning, match="a head for 7 classes; the new head for 3 is untrained"):
        geofm.create_model("mpmae_atto", tmp_path / "7.pth", num_classes=3)
    assert isinstance(geofm.create_model("mpmae_atto", tmp_path / "7.pth").head, nn.Identity)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sensor": "landsat_oli"}, "sensor says how to read bands"),
        ({"tolerance": 20, "new_bands": "mean"}, "tolerance, new_bands says how"),
        ({"in_chans": 0}, "in_chans must be 1 or more"),
        ({"in_chans": 3, "bands": ["B2"]}, "in_chans=3, but 1 bands"),
        ({"num_classes": "7"}, "num_classes must be 0 or more"),
        ({"num_classes": None}, "an untrained model has no head"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0"),
        ({"global_pool": "token"}, "global_pool must be"),
        ({"patch_size": "8"}, "multiple of 8"),
        ({"out_indices": (0,)}, "needs features_only=True"),
        ({"features_only": True, "out_indices": ()}, "out_indices is empty"),
        ({"trained_bands": ["B2"]}, "for a file without a card"),
        ({"pretrained": ""}, "a tag or a path; got"),
        ({"pretrained": None}, "a tag or a path; got None"),
    ],
)
def test_contradictions_are_refused_before_anything_is_fetched(options: dict, words: str) -> None:
    with pytest.raises(geofm.ModelError, match=words):
        geofm.create_model("mpmae_atto", **options)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(geofm.UnknownModelError, match="a model's name is a string"):
        geofm.create_model(None)


@pytest.mark.parametrize("name", ["mpmae_atto", "ssl4eco_resnet18", "mpmae_unet_atto"])
def test_models_can_be_copied_and_pickled(name: str) -> None:
    model = geofm.create_model(name, bands=["B2", "B3", "B4"]).eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        assert other.input_spec == model.input_spec


@pytest.mark.parametrize("name", ["mpmae_atto", "ssl4eco_resnet18"])
def test_torchscript_and_fx_give_the_same_features(name: str) -> None:
    model = geofm.create_model(name).eval()
    x = torch.randn(1, model.pretrained_cfg["input_size"][0], 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
    from timm.models import create_feature_extractor

    last = {"mpmae_atto": "stages.3.1", "ssl4eco_resnet18": "layer4.1"}[name]
    graph = create_feature_extractor(model, {last: "map"})
    torch.testing.assert_close(graph(x)["map"], model.forward_features(x), rtol=1e-4, atol=1e-5)


def test_timm_takes_a_file_of_ones_own_and_nothing_it_cannot_honour(plain: Path) -> None:
    import timm

    model = timm.create_model(
        "mpmae_atto", pretrained=True, pretrained_cfg_overlay={"file": str(plain)}
    )
    torch.testing.assert_close(
        dict(model.state_dict()), dict(torch.load(plain, weights_only=True)), rtol=0, atol=0
    )
    with pytest.raises(geofm.ModelError, match="takes no input_size through timm"):
        timm.create_model("mpmae_atto", pretrained_cfg_overlay={"input_size": (3, 8, 8)})


def test_every_architecture_has_a_card_for_its_input() -> None:
    for architecture in architectures().values():
        model_card(architecture.input_card)
