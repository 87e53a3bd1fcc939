"""The masked autoencoder: published numbers, what masks hide, targets that are missing."""

from __future__ import annotations

import json
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY, _fill, parity
from torch.func import grad, hessian, jvp, vmap

import geofm
from geofm.pretrain import MODALITIES, MaskedAutoencoder, Modality
from geofm.pretrain.depthwise import depthwise
from geofm.pretrain.mpmae import BANDS
from geofm.pretrain.pretext import UncertaintyWeighting, means, summary
from geofm.pretrain.visible import Visible

WIDTH = {"decoder_dim": 32}
TINY = {"decoder_dim": 32, "modalities": ["sentinel2", "month"]}


def tile_batch(count: int = 3, side: int = 56, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for m in MODALITIES.values():
        if m.kind == "pixels":
            batch[m.name] = torch.randn(count, m.channels, side, side, generator=generator)
        elif m.kind == "classes":
            shape = (count, 1, side, side)
            batch[m.name] = torch.randint(-1, m.channels, shape, generator=generator)
        elif m.kind == "vector":
            batch[m.name] = torch.randn(count, m.channels, generator=generator)
        else:
            classes = torch.randint(m.channels, (count,), generator=generator)
            batch[m.name] = F.one_hot(classes, m.channels).float()
    return batch


@pytest.mark.parametrize(
    ("name", "patch_size", "scope"),
    [("mpmae_masked_atto_8", 8, "sample"), ("mpmae_masked_atto_16_batchgrn", 16, "batch")],
)
def test_masked_features_are_the_published_ones(name: str, patch_size: int, scope: str) -> None:
    fixture = parity(name)
    method = MaskedAutoencoder("mpmae_atto", patch_size=patch_size, grn_scope=scope)  # type: ignore[arg-type]
    found = method.load_state_dict(fixture.state, strict=False)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if key.startswith("encoder")]
    with torch.no_grad():
        encoded = method.encode(fixture.pixels, torch.from_numpy(fixture.outputs["mask"]))
    np.testing.assert_allclose(encoded, fixture.outputs["encoded"], atol=5e-5)


@pytest.mark.parametrize("loss", ["uncertainty", "equal"])
def test_losses_are_the_published_ones(loss: str) -> None:
    name = "pretext_atto_16" + ("" if loss == "uncertainty" else "_unweighted")
    path = PARITY / f"{name}.json"
    if not path.exists():
        pytest.skip(f"fixture {name} is not beside the checkout")
    spec = json.loads(path.read_text())
    tag, side, count = spec["tag"], 112, spec["batch"]
    targets = _published_targets(tag, count, side)
    random = np.random.RandomState(zlib.crc32(tag.encode()))
    mask = torch.ones(count, 49)
    for row in mask:
        row[torch.from_numpy(random.permutation(49)[:19])] = 0
    encoded = torch.from_numpy(_fill().inputs(f"{tag}:encoded", (count, 320, 7, 7)))

    method = MaskedAutoencoder("mpmae_atto", patch_size=16, loss=loss)  # type: ignore[arg-type]
    found = method.load_state_dict(_published_state(spec), strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("encoder.") for key in found.missing_keys)
    with torch.no_grad():
        losses = method.losses(targets, encoded, mask)
    assert losses["total"].item() == pytest.approx(spec["total"], rel=1e-6)
    assert list(losses) == [*spec["order"], "total"]
    for modality, expected in spec["losses"].items():
        assert losses[modality].item() == pytest.approx(expected, rel=1e-6), modality


def _published_state(spec: dict) -> dict[str, torch.Tensor]:
    state = {}
    for key, shape in spec["keys"].items():
        parts = key.split(".")
        shared = parts[0] == "decoder_dict"
        name = ".".join(["decoder_dict.shared", *parts[2:]]) if shared else key
        state[key] = torch.from_numpy(_fill().values(name, tuple(shape), spec["salt"]))
    return state


def _published_targets(tag: str, count: int, side: int) -> dict[str, torch.Tensor]:
    inputs = _fill().inputs
    targets: dict[str, np.ndarray] = {}
    for m in MODALITIES.values():
        shape = (count, m.channels, side, side)
        if m.kind == "pixels":
            values = inputs(f"{tag}:{m.name}", shape)
            values[np.random.RandomState(7).rand(*shape) < 0.02] = np.nan
            targets[m.name] = values
        elif m.kind == "vector":
            targets[m.name] = inputs(f"{tag}:{m.name}", (count, m.channels))
        elif m.kind == "category":
            classes = inputs(f"{tag}:{m.name}", (count,), 0, m.channels)
            targets[m.name] = np.eye(m.channels, dtype=np.float32)[classes]
    targets["sentinel1"][0, 4:] = np.nan
    targets["era5"][1, 3] = np.nan
    targets["dynamic_world"] = inputs(f"{tag}:dw", (count, 1, side, side), -1, 9)
    targets["esa_worldcover"] = inputs(f"{tag}:wc", (count, 1, side, side), -1, 11)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in targets.items()}


def test_encoder_on_sparse_rows_equals_a_dense_one_masked_after_every_layer() -> None:
    method = MaskedAutoencoder("mpmae_atto", patch_size=16, modalities=["month"])
    _shake(method)
    pixels, mask = torch.randn(2, 12, 112, 112), method.random_mask({}, 2, 7)
    encoder = method.encoder
    keep = (~mask).view(2, 1, 7, 7).float()

    def visible(x: torch.Tensor) -> torch.Tensor:
        scale = x.shape[-1] // 7
        return x * keep.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

    with torch.no_grad():
        x = visible(encoder.stem(visible(encoder.initial_conv(visible(pixels)))))
        for index, stage in enumerate(encoder.stages):
            if index:
                x = visible(encoder.downsample_layers[index - 1](x))
            for block in stage:
                y = visible(block.dwconv(x)).permute(0, 2, 3, 1)
                y = block.act(block.pwconv1(block.norm(y)))
                y = visible(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                response = y.norm(dim=(1, 2), keepdim=True)
                y = block.grn.gamma * y * response / (response.mean(-1, keepdim=True) + 1e-6) + (
                    block.grn.beta + y
                )
                x = visible(x + block.pwconv2(y).permute(0, 3, 1, 2))
        encoded = method.encode(pixels, mask)
    torch.testing.assert_close(encoded, x, atol=1e-5, rtol=1e-4)


def _shake(method: MaskedAutoencoder) -> None:
    """Weights whose every part matters, unlike the GRN's zeros."""
    torch.manual_seed(3)
    for value in method.parameters():
        torch.nn.init.normal_(value, std=0.1)


def test_nothing_of_a_removed_patch_reaches_the_features() -> None:
    method = MaskedAutoencoder("mpmae_atto", **TINY)
    _shake(method)
    pixels, mask = torch.randn(2, 12, 56, 56), method.random_mask({}, 2, 7)
    hidden = mask.view(2, 1, 7, 7).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(hidden, torch.randn_like(pixels), pixels)
    with torch.no_grad():
        first, second = method.encode(pixels, mask), method.encode(changed, mask)
    assert torch.equal(first, second)
    assert not first.permute(0, 2, 3, 1)[mask.view(2, 7, 7)].any()
    assert first.permute(0, 2, 3, 1)[~mask.view(2, 7, 7)].abs().min() > 0


def test_a_sample_does_not_depend_on_its_batch_unless_grn_goes_over_it() -> None:
    pixels = torch.randn(3, 12, 56, 56)
    for scope, alone in (("sample", True), ("batch", False)):
        method = MaskedAutoencoder("mpmae_atto", grn_scope=scope, **TINY)  # type: ignore[arg-type]
        _shake(method)
        mask = method.random_mask({}, 3, 7)
        with torch.no_grad():
            whole, first = method.encode(pixels, mask), method.encode(pixels[:1], mask[:1])
        assert torch.allclose(whole[:1], first, atol=1e-4) is alone


def test_every_parameter_is_trained() -> None:
    method = MaskedAutoencoder("mpmae_atto", decoder_dim=32)
    _shake(method)
    method(tile_batch())["total"].backward()
    idle = [
        name
        for name, value in method.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    ]
    assert idle == []


def test_the_trained_encoder_loads_into_the_published_architecture(tmp_path) -> None:
    method = MaskedAutoencoder("mpmae_atto", patch_size=16, **TINY)
    _shake(method)
    exported = method.export()
    torch.save(exported.state, tmp_path / "encoder.pt")
    model = geofm.create_model(
        exported.model, pretrained=tmp_path / "encoder.pt", num_classes=0, **exported.arguments
    )
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_random_numbers_of_a_sample_follow_from_its_draw_alone() -> None:
    method = MaskedAutoencoder("mpmae_atto", flips=True, size=48, **TINY)
    batch = tile_batch(4) | {"draw": torch.tensor([3, 9, 27, 81])}
    part = {name: value[2:] for name, value in batch.items()}
    crop, crop_of_part = method._crop(batch), method._crop(part)
    assert torch.equal(crop["sentinel2"][2:], crop_of_part["sentinel2"])
    masks = method.random_mask(batch, 4, 7), method.random_mask(part, 2, 7)
    assert torch.equal(masks[0][2:], masks[1])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert (~masks[0]).sum(1).tolist() == [19] * 4


def test_all_pixel_targets_are_cropped_and_turned_alike() -> None:
    place = torch.arange(64 * 64.0).view(1, 1, 64, 64)
    other = [Modality("one", "pixels", 3), Modality("two", "pixels", 1)]
    method = MaskedAutoencoder("mpmae_atto", modalities=other, flips=True, input="image")
    batch = {
        "image": place.expand(20, 12, -1, -1),
        "one": place.expand(20, 3, -1, -1),
        "two": place.expand(20, 1, -1, -1),
        "draw": torch.arange(20),
    }
    crop = method._crop(batch)
    assert crop["one"].shape == (20, 3, 56, 56)
    assert torch.equal(crop["image"][:, :1], crop["two"])
    assert torch.equal(crop["one"][:, 2:], crop["two"])
    assert len({tuple(tile.flatten()[[0, 55, -56, -1]].tolist()) for tile in crop["two"]}) > 15
    # Each is a whole square of the tile, whichever way it lies.
    for tile in crop["two"]:
        rows, columns = tile // 64, tile % 64
        assert rows.max() - rows.min() == columns.max() - columns.min() == 55
    method.eval()
    centre = method._crop(batch)["two"]
    assert torch.equal(centre, batch["two"][:, :, 4:60, 4:60])


def test_missing_targets_add_nothing() -> None:
    method = MaskedAutoencoder("mpmae_atto", decoder_dim=32, missing="exclude")
    batch = tile_batch()
    mask = method.random_mask({}, 3, 7)
    full = method(batch, mask)
    gone = dict(batch)
    gone["sentinel1"] = torch.full_like(batch["sentinel1"], torch.nan)
    gone["era5"] = torch.full_like(batch["era5"], torch.nan)
    gone["dynamic_world"] = torch.full_like(batch["dynamic_world"], -1)
    gone["biome"] = torch.zeros_like(batch["biome"])
    losses = method(gone, mask)
    for name in ("sentinel1", "era5", "dynamic_world", "biome"):
        assert losses[name] == 0
    others = [m for m in MODALITIES if losses[m] != 0]
    assert len(others) == 8
    torch.testing.assert_close(losses["total"], sum(full[name] for name in others))
    losses["total"].backward()
    assert all(
        torch.isfinite(value.grad).all() for value in method.parameters() if value.grad is not None
    )


def test_a_process_that_knows_nothing_of_a_modality_counts_its_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two processes: the first knows both modalities, the second the first one alone.
    sums, counts = torch.tensor([[8.0, 6.0], [4.0, 0.0]]), torch.tensor([[2.0, 3.0], [2.0, 0.0]])
    everyone = torch.stack([counts.sum(0), sums.sum(0)])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.copy_(everyone))
    weighting = UncertaintyWeighting(2)
    torch.nn.init.constant_(weighting.log_vars, 0.5)
    totals = [
        weighting(*means(total.unbind(), count.unbind(), everywhere=True))
        for total, count in zip(sums, counts, strict=True)
    ]
    torch.stack(totals).mean().backward()
    losses = torch.tensor([12 / 4, 6 / 3])
    expected = (losses * math.exp(-0.5) + 0.5).sum()
    torch.testing.assert_close(torch.stack(totals).mean(), expected)
    torch.testing.assert_close(weighting.log_vars.grad, 1 - losses * math.exp(-0.5))


@pytest.mark.parametrize("missing", ["zero", "exclude"])
def test_infinities_are_as_unknown_as_nan(missing: str) -> None:
    summaries = {"name": "what", "kind": "summary", "channels": 12, "source": "sentinel2"}
    modalities = ["sentinel2", "sentinel1", "era5", "lat", summaries]
    method = MaskedAutoencoder(
        "mpmae_atto",
        modalities=modalities,
        decoder_dim=32,
        missing=missing,  # type: ignore[arg-type]
    ).eval()
    _shake(method)
    mask, found = method.random_mask({"draw": [1, 2, 3]}, 3, 7), []
    for unknown in (math.nan, math.inf, -math.inf):
        batch = tile_batch()
        for name in ("sentinel2", "sentinel1"):
            batch[name][:, 1, 10:30] = unknown
            batch[name][1] = unknown
        batch["era5"][:, 4], batch["lat"][0] = unknown, unknown
        with torch.no_grad():
            found.append(method(batch, mask))
    for losses in found:
        for name, value in losses.items():
            assert value.isfinite(), name
            torch.testing.assert_close(value, found[0][name])


def test_a_model_of_three_bands_predicts_these_three() -> None:
    rgb = MaskedAutoencoder(
        "mpmae_atto", input_bands=["B2", "B3", "B4"], modalities=["sentinel2", "era5"], **WIDTH
    )
    batch = tile_batch(2)
    batch["sentinel2"] = batch["sentinel2"][:, 1:4]
    losses = rgb(batch)
    assert losses["sentinel2"] > 0
    assert rgb.pred_dict["sentinel2"].weight.shape[0] == 64 * 3
    assert rgb.export().arguments["in_chans"] == 3
    # Two of three bands seen, all three predicted.
    some = MaskedAutoencoder(
        "mpmae_atto",
        input_bands=["B2", "B3", "B4"],
        bands=["B4"],
        modalities=["sentinel2"],
        **WIDTH,
    )
    assert some(batch)["sentinel2"] > 0
    with pytest.raises(geofm.ModelError, match=r"sentinel2 has 3 bands, expected 12.*input_bands="):
        MaskedAutoencoder("mpmae_atto", **TINY)(batch)
    other = MaskedAutoencoder("mpmae_atto", modalities=["sentinel1"], **WIDTH)
    with pytest.raises(
        geofm.ModelError, match=r"\{name: sentinel1, kind: pixels, channels: \.\.\.\}"
    ):
        other({**tile_batch(2), "sentinel1": torch.zeros(2, 2, 56, 56)})


def test_a_published_state_loads_into_some_of_its_modalities() -> None:
    published = MaskedAutoencoder("mpmae_atto", decoder_dim=32)
    state = published.state_dict()
    state["loss_fn.log_vars"] = torch.arange(12.0)
    state = {
        key.replace("decoder.", "decoder_dict.sentinel2."): value for key, value in state.items()
    }
    other = {"name": "other", "kind": "vector", "channels": 1}
    some = MaskedAutoencoder("mpmae_atto", modalities=["month", "sentinel1", other], decoder_dim=32)
    torch.nn.init.constant_(some.loss_fn.log_vars, -1.0)
    found = some.load_state_dict(dict(state), strict=False)
    assert some.loss_fn.log_vars.tolist() == [10, 1, -1]
    assert set(found.missing_keys) == {"pred_dict.other.weight", "pred_dict.other.bias"}
    # Its own order of twelve is its own business where the state is not the published one.
    turned = MaskedAutoencoder("mpmae_atto", modalities=[*MODALITIES][::-1], decoder_dim=32)
    turned.load_state_dict(dict(state))
    assert turned.loss_fn.log_vars.tolist() == list(range(12))[::-1]
    again = MaskedAutoencoder("mpmae_atto", modalities=[*MODALITIES][::-1], decoder_dim=32)
    again.load_state_dict(turned.state_dict())
    assert again.loss_fn.log_vars.tolist() == list(range(12))[::-1]


def test_a_class_outside_its_legend_is_an_error_that_names_both() -> None:
    method = MaskedAutoencoder("mpmae_atto", modalities=["dynamic_world"], decoder_dim=32)
    batch = tile_batch(2)
    batch["dynamic_world"][0, 0, 5, 5] = 255
    words = "dynamic_world holds class 255, expected 0 to 8, or -1"
    with pytest.raises(geofm.ModelError, match=words):
        method(batch)
    with pytest.raises(geofm.ModelError, match=words):
        method.check_batch(batch)


def test_a_batch_of_nothing_is_an_error() -> None:
    method = MaskedAutoencoder("mpmae_atto", **TINY)
    empty = {name: value[:0] for name, value in tile_batch(2).items()}
    with pytest.raises(geofm.ModelError, match="N at least 1"):
        method(empty)
    with pytest.raises(geofm.ModelError, match="no sample"):
        method.encode(empty["sentinel2"], torch.zeros(0, 49))


def test_excluded_pixels_leave_the_mean_over_the_others() -> None:
    target = torch.randn(2, 1, 56, 56)
    shown = [Modality("height", "pixels", 1)]
    method = MaskedAutoencoder(
        "mpmae_atto", modalities=shown, decoder_dim=16, missing="exclude", loss="equal"
    )
    for head in method.pred_dict.values():
        torch.nn.init.zeros_(head.weight)
    mask = torch.ones(2, 49)
    mask[:, 0] = 0
    target[0, 0, 0, 20] = torch.nan
    batch = {"sentinel2": torch.randn(2, 12, 56, 56), "height": target}
    patches = target.view(2, 7, 8, 7, 8).permute(0, 1, 3, 2, 4).reshape(2, 49, 64)[:, 1:]
    expected = patches.square().nanmean(-1).mean()
    torch.testing.assert_close(method(batch, mask)["total"], expected)


def test_one_array_can_be_two_targets() -> None:
    values = {"name": "reflectance", "kind": "pixels", "channels": 12, "source": "sentinel2"}
    method = MaskedAutoencoder("mpmae_atto", modalities=["sentinel2", values], decoder_dim=16)
    losses = method(tile_batch(2))
    assert list(losses) == ["sentinel2", "reflectance", "total"]
    assert losses["sentinel2"] != losses["reflectance"]


def test_a_summary_tells_mean_deviation_and_roughness_of_known_values() -> None:
    rows = torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 8)
    spiky = torch.where(torch.arange(64).view(1, 1, 8, 8) % 2 == 0, 1.0, -1.0)
    tiles = torch.cat([2 + 3 * rows, spiky, torch.full_like(rows, torch.nan)], 1)
    tiles[0, 0, 0] = torch.nan
    mean, deviation, roughness = summary(tiles, "exclude").view(3, 3)
    expected = 2 + 3 * np.arange(1, 8)
    assert mean[0].item() == pytest.approx(expected.mean())
    assert deviation[0].exp().item() == pytest.approx(expected.std() + 0.01, rel=1e-5)
    # Rows differ by 3, columns by nothing.
    assert roughness[0].exp().item() == pytest.approx(np.sqrt(9 / 2) + 0.01, rel=1e-5)
    assert mean[1].item() == 0
    assert roughness[1].exp().item() == pytest.approx(np.sqrt(4 / 2) + 0.01, rel=1e-5)
    assert torch.isnan(torch.stack([mean[2], deviation[2], roughness[2]])).all()


def test_tile_targets_can_be_told_from_the_features_that_users_get(tmp_path) -> None:
    method = MaskedAutoencoder("mpmae_atto", tile_targets="encoder", **TINY)
    _shake(method)
    batch = tile_batch(3)
    with torch.no_grad():
        mask = method.random_mask({}, 3, 7)
        encoded = method.encode(batch["sentinel2"], mask)
        pooled = method.encoder.norm(encoded.sum((2, 3)) / (~mask).sum(1, keepdim=True))
        expected = (method.pred_dict["month"](pooled) - batch["month"]).square().mean()
        torch.testing.assert_close(method(batch, mask)["month"], expected)
    method(batch)["total"].backward()
    assert method.encoder.norm.weight.grad.any()
    exported = method.export()
    torch.save(exported.state, tmp_path / "encoder.pt")
    model = geofm.create_model("mpmae_atto", pretrained=tmp_path / "encoder.pt", num_classes=0)
    assert torch.equal(model.norm.weight, method.encoder.norm.weight)


def test_a_weight_scales_one_loss() -> None:
    m = {"name": "what", "kind": "summary", "channels": 12, "source": "sentinel2"}
    batch, losses = tile_batch(2), []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        method = MaskedAutoencoder(
            "mpmae_atto", modalities=[{**m, "weight": weight}], decoder_dim=16, loss="equal"
        )
        losses.append(method(batch, method.random_mask({"draw": [1, 2]}, 2, 7))["total"])
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], 0.25 * losses[0])


def test_a_subset_of_bands_and_targets_trains() -> None:
    method = MaskedAutoencoder(
        "mpmae_atto", bands=["B4", "B8A"], modalities=["aster"], decoder_dim=16, loss="equal"
    )
    batch = tile_batch(2)
    batch["aster"] = torch.full_like(batch["aster"], 0.5)
    batch["sentinel2"] = torch.nn.Parameter(batch["sentinel2"])
    optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
    mask = method.random_mask({}, 2, 7)
    history = []
    for _ in range(8):
        loss = method(batch, mask)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
    seen = batch["sentinel2"].grad.abs().sum((0, 2, 3)) > 0
    assert [band for band, used in zip(BANDS, seen, strict=True) if used] == ["B4", "B8A"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"modalities": ["sentinel3"]}, "unknown modality 'sentinel3'"),
        ({"modalities": []}, "at least one"),
        ({"modalities": "sentinel2"}, r"got the string 'sentinel2'; write modalities="),
        ({"bands": "B2,B3"}, r"write bands=\['B2', 'B3'\]"),
        ({"input_bands": "B2"}, r"write input_bands=\['B2'\]"),
        ({"modalities": [Modality("values", "pixels", 1)]}, "cannot name a modality"),
        ({"bands": ["B4", "B10"]}, "B10: the input has B1"),
        ({"modalities": ["month"], "tile_targets": "encoder"}, "nothing to decode"),
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"size": 60}, "multiple of patch_size"),
        ({"loss": "sum"}, "'uncertainty', 'equal'"),
    ],
)
def test_wrong_arguments_are_explained(arguments: dict, words: str) -> None:
    with pytest.raises(geofm.GeofmError, match=words):
        MaskedAutoencoder("mpmae_atto", **arguments)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(geofm.ModelError, match="no MP-MAE encoder"):
        MaskedAutoencoder("ssl4eco_resnet50")


def test_wrong_batches_are_explained() -> None:
    method = MaskedAutoencoder("mpmae_atto", **TINY)
    batch = tile_batch(2)
    with pytest.raises(geofm.ModelError, match="lacks the input 'sentinel2'"):
        method({"month": batch["month"]})
    with pytest.raises(geofm.ModelError, match="lacks the modality 'month'"):
        method({"sentinel2": batch["sentinel2"]})
    with pytest.raises(geofm.ModelError, match="smaller than the crop"):
        method({**batch, "sentinel2": batch["sentinel2"][..., :40, :40]})
    uneven = torch.zeros(2, 49)
    uneven[0, :3] = 1
    uneven[1, :4] = 1
    with pytest.raises(geofm.ModelError, match="same number of visible patches"):
        method(batch, uneven)
    with pytest.raises(geofm.ModelError, match="a value for each patch"):
        method(batch, torch.zeros(2, 36))
    with pytest.raises(geofm.ModelError, match="month should be"):
        method({**batch, "month": batch["month"][:, :1]})


def test_half_precision_stays_finite_and_close() -> None:
    method = MaskedAutoencoder("mpmae_atto", decoder_dim=32)
    batch, mask = tile_batch(), method.random_mask({}, 3, 7)
    exact = method(batch, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(batch, mask)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(value.item(), rel=0.03), name
    rough["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_gives_the_same_losses() -> None:
    method = MaskedAutoencoder("mpmae_atto", **TINY)
    batch = tile_batch(4) | {"draw": torch.arange(4)}
    explained = torch._dynamo.explain(method)(batch)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(method)(batch)
    for name, value in method(batch).items():
        torch.testing.assert_close(compiled[name], value)


# Whole maps as kernels; patches as kernels, the map being large; torch's own gradient.
@pytest.mark.parametrize(("grid", "side"), [(3, 4), (4, 8), (17, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_the_depthwise_convolution_are_torchs(
    grid: int, side: int, masked: bool
) -> None:
    torch.manual_seed(0)
    length = grid * side
    x = torch.randn(2, 5, length, length, dtype=torch.double).requires_grad_()
    weight = torch.randn(5, 1, 7, 7, dtype=torch.double).requires_grad_()
    visible, used = None, torch.ones(2, 1, length, length, dtype=torch.double)
    if masked:
        hidden = torch.stack([torch.randperm(grid**2) >= 4 for _ in range(2)])
        visible = Visible.of(hidden, 2, grid)
        used = visible.pixel_mask(side, torch.double)
    weights_of_loss = torch.randn(2, 5, length, length, dtype=torch.double) * used
    ours = depthwise(x, weight, visible, side)
    theirs = F.conv2d(x, weight, padding=3, groups=5)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad((ours * weights_of_loss).sum(), (x, weight))
    expected = torch.autograd.grad((theirs * weights_of_loss).sum(), (x, weight))
    torch.testing.assert_close(found, expected)


def test_torch_func_takes_the_depthwise_convolution_apart() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 9, 9).double(), torch.randn(3, 1, 7, 7).double()

    def ours(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return depthwise(x[None], weight).square().sum()

    def theirs(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x[None], weight, padding=3, groups=3).square().sum()

    for number in (0, 1):
        each = [vmap(grad(f, number), (None, 0))(weight, x) for f in (ours, theirs)]
        torch.testing.assert_close(*each)
        second = [hessian(f, number)(weight, x[0]) for f in (ours, theirs)]
        torch.testing.assert_close(*second)
    tangents = (torch.randn_like(weight), torch.randn_like(x[0]))
    torch.testing.assert_close(*(jvp(f, (weight, x[0]), tangents) for f in (ours, theirs)))
