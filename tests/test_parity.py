"""The published code's outputs, through `create_model(pretrained=<upstream file>)`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Fixture, parity

import geofm

TOLERANCE = 1e-4


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.detach().numpy() - expected).max() <= TOLERANCE


def upstream_file(fixture: Fixture, folder: Path, with_head: bool = False) -> Path:
    """The checkpoint as the authors write it: weights among settings, optimizer and epoch."""
    state = fixture.state | (fixture.head if with_head else {})
    key = fixture.spec.get("checkpoint_wrapper", "model")
    path = folder / "checkpoint-199.pth"
    torch.save(
        {key: state, "args": argparse.Namespace(lr=1e-4), "optimizer": {}, "epoch": 199}, path
    )
    return path


@pytest.mark.parametrize("name", ["mpmae_atto_8", "mpmae_atto_16", "mpmae_tiny_8"])
def test_mpmae_matches_the_published_encoder(name: str, tmp_path: Path) -> None:
    fixture = parity(name)
    path = upstream_file(fixture, tmp_path, with_head=True)
    model = geofm.create_model(f"mpmae_{fixture.spec['model']}", path, num_classes=10).eval()
    with torch.inference_mode():
        last, stages = model.forward_intermediates(fixture.pixels)
        close(model.forward_head(last, pre_logits=True), fixture.outputs["pooled"])
        close(model(fixture.pixels), fixture.outputs["logits"])
    for i, stage in enumerate(stages):
        if f"stage{i}" in fixture.outputs:
            close(stage, fixture.outputs[f"stage{i}"])
        else:
            step = stage.shape[1] // 8
            close(stage[:, ::step, ::4, ::4], fixture.outputs[f"stage{i}_slice"])
            close(stage.mean((2, 3)), fixture.outputs[f"stage{i}_mean"])


def test_mpmae_features_only_returns_the_published_stages(tmp_path: Path) -> None:
    fixture = parity("mpmae_atto_8")
    path = upstream_file(fixture, tmp_path)
    model = geofm.create_model("mpmae_atto", path, features_only=True, out_indices=(2, 3)).eval()
    with torch.inference_mode():
        stage2, stage3 = model(fixture.pixels)
    close(stage2, fixture.outputs["stage2"])
    close(stage3, fixture.outputs["stage3"])


def test_a_pretraining_file_leaves_the_head_as_initialised_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fixture = parity("mpmae_atto_8")
    with caplog.at_level("INFO", logger="geofm"):
        model = geofm.create_model(
            "mpmae_atto", upstream_file(fixture, tmp_path), num_classes=10
        ).eval()
    assert "left as initialised" in caplog.text
    model.load_state_dict(fixture.head, strict=False)
    with torch.inference_mode():
        close(model(fixture.pixels), fixture.outputs["logits"])


def test_unet_matches_the_published_segmentation_model(tmp_path: Path) -> None:
    fixture = parity("mpmae_atto_8_unet")
    path = upstream_file(fixture, tmp_path, with_head=True)
    model = geofm.create_model("mpmae_unet_atto", path, num_classes=10).eval()
    with torch.inference_mode():
        logits = model(fixture.pixels)
    close(logits[:, :, ::4, ::4], fixture.outputs["logits_slice"])
    close(logits.mean((2, 3)), fixture.outputs["logits_mean"])


@pytest.mark.parametrize("name", ["ssl4eco_resnet50_seco_ndvi", "ssl4eco_resnet50_seco_12band"])
def test_ssl4eco_resnet_matches_the_published_encoder_from_dn(name: str, tmp_path: Path) -> None:
    fixture = parity(name)
    model = geofm.create_model("ssl4eco_resnet50", upstream_file(fixture, tmp_path)).eval()
    prepare = geofm.create_transform(model, bands=model.input_spec.bands, units="dn", level="L2A")
    with torch.inference_mode():
        prepared = prepare(fixture.pixels)
        close(model(prepared), fixture.outputs["pooled"])
        maps = model.forward_intermediates(prepared, intermediates_only=True)
    for i in range(1, 5):
        close(maps[i].mean((2, 3)), fixture.outputs[f"layer{i}_mean"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_moco_layout_gives_the_same_encoder_as_the_seco_layout(prefix: str, tmp_path: Path) -> None:
    fixture = parity("ssl4eco_resnet50_seco_ndvi")
    children = {
        "0": "conv1",
        "1": "bn1",
        "4": "layer1",
        "5": "layer2",
        "6": "layer3",
        "7": "layer4",
    }
    state = {}
    for key, value in fixture.state.items():
        parts = key.split(".")
        if parts[0] == "encoder_q":
            parts[1] = children[parts[1]]
        if parts[0] in ("encoder_q", "encoder_k", "queue", "queue_ptr"):
            state[prefix + ".".join(parts)] = value
    for layer in (0, 2):
        state[f"{prefix}encoder_q.fc.{layer}.weight"] = torch.zeros(8, 8)
    path = tmp_path / "moco-eco_099_checkpoint.pth.tar"
    torch.save({"epoch": 100, "arch": "resnet50", "state_dict": state}, path)
    model = geofm.create_model("ssl4eco_resnet50", path).eval()
    with torch.inference_mode():
        close(model(fixture.pixels.float() / 255), fixture.outputs["pooled"])


def test_aligned_padding_has_the_same_weights_and_whole_cells(tmp_path: Path) -> None:
    path = upstream_file(parity("mpmae_atto_8"), tmp_path)
    published = geofm.create_model("mpmae_atto", path)
    aligned = geofm.create_model("mpmae_atto", path, stem_padding="aligned")
    torch.testing.assert_close(published.state_dict(), aligned.state_dict(), rtol=0, atol=0)
    tile = torch.zeros(1, 12, 56, 56)
    assert [tuple(m.shape[2:]) for m in published.forward_intermediates(tile)[1]] == [
        (54, 54),
        (27, 27),
        (13, 13),
        (6, 6),
    ]
    assert [tuple(m.shape[2:]) for m in aligned.forward_intermediates(tile)[1]] == [
        (56, 56),
        (28, 28),
        (14, 14),
        (7, 7),
    ]


def test_a_file_of_another_size_is_refused_with_the_size_it_fits(tmp_path: Path) -> None:
    path = upstream_file(parity("mpmae_atto_8"), tmp_path)
    with pytest.raises(geofm.ModelError, match="it fits mpmae_atto"):
        geofm.create_model("mpmae_tiny", path)


def test_a_file_of_another_patch_size_is_recognised_and_a_wrong_wish_refused(
    tmp_path: Path,
) -> None:
    path = upstream_file(parity("mpmae_atto_16"), tmp_path)
    model = geofm.create_model("mpmae_atto", path)
    assert model.patch_size == 16
    assert model.input_spec.size == 112
    with pytest.raises(geofm.ModelError, match="patch_size=16, not patch_size=8"):
        geofm.create_model("mpmae_atto", path, patch_size=8)
