"""The dual tower: parity with the published code, and what the fixed normalization promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Fixture, parity

import geofm
from geofm.auxiliary import auxiliary_table
from geofm.models.geotreeclip import AUXILIARY_GROUPS, VARIANTS, GeoTreeCLIP
from geofm.registry import model_card

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fixture, Path]:
    fixture = parity("geotreeclip")
    for key in list(fixture.state):
        if key.endswith("position_ids"):
            shape = fixture.spec["checkpoint"][key]
            fixture.state[key] = torch.arange(shape[-1])[None]
    path = tmp_path_factory.mktemp("ggt") / "GGT_6M.pth"
    torch.save({"model_state_dict": fixture.state}, path)
    return fixture, path


@pytest.fixture(scope="module")
def tiny() -> GeoTreeCLIP:
    torch.manual_seed(0)
    return geofm.create_model("geotreeclip_tiny").eval()


def places(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random series in DN and environments within the card's ranges."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.uniform(100, 5000, (n, 12, 10, 5, 5))).float()
    variables = model_card("geotreeclip").auxiliary
    columns = [rng.uniform(v.low, v.high, n).round() for v in variables]
    return images, torch.from_numpy(np.stack(columns, 1)).float()


def prompts(fixture: Fixture) -> list[str]:
    levels = ("level0", "level1_family", "level2_genus", "level3_species")
    return [" / ".join(text[level] for level in levels) for text in fixture.spec["texts"]]


def test_both_towers_match_the_published_code(published: tuple[Fixture, Path]) -> None:
    fixture, path = published
    model = geofm.create_model("geotreeclip", path, normalization="batch").eval()
    outputs = {key: torch.from_numpy(value) for key, value in fixture.outputs.items()}
    images = fixture.pixels.float()
    with torch.inference_mode():
        normalized = model.normalize_images(images, outputs["image_mask"])
        series = model.series(normalized, outputs["image_mask"])
        observed = model.encode_image(
            images, outputs["auxiliary"], outputs["image_mask"], outputs["auxiliary_mask"]
        )
        text = model.encode_text(prompts(fixture))
        torch.testing.assert_close(model.encode_text(fixture.spec["texts"]), text)
    means = normalized.mean((2, 3, 4))
    for actual, name in (
        (means, "normalized_images_mean"),
        (series, "temporal_features"),
        (observed, "observation_features"),
        (text, "text_features"),
    ):
        assert (actual - outputs[name]).abs().max() <= TOLERANCE, name


def test_masked_months_may_be_nan_and_position_ids_may_be_absent(
    published: tuple[Fixture, Path], tmp_path: Path
) -> None:
    fixture, _ = published
    state = {k: v for k, v in fixture.state.items() if not k.endswith("position_ids")}
    path = tmp_path / "without.pth"
    torch.save({"model_state_dict": state}, path)
    model = geofm.create_model("geotreeclip", path, normalization="batch").eval()
    outputs = {key: torch.from_numpy(value) for key, value in fixture.outputs.items()}
    images = fixture.pixels.float()
    images[~outputs["image_mask"]] = torch.nan
    auxiliary = outputs["auxiliary"].masked_fill(~outputs["auxiliary_mask"], torch.nan)
    with torch.inference_mode():
        observed = model.encode_image(images, auxiliary)
    assert (observed - outputs["observation_features"]).abs().max() <= TOLERANCE


def test_the_checkpoint_is_loaded_whole(published: tuple[Fixture, Path], tmp_path: Path) -> None:
    fixture, path = published
    model = geofm.create_model("geotreeclip", path)
    torch.testing.assert_close(
        model.fusion[0].weight.detach(), fixture.state["fusion.0.weight"], rtol=0, atol=0
    )
    broken = dict(fixture.state)
    del broken["aux_projection.0.weight"]
    torch.save({"model_state_dict": broken}, tmp_path / "broken.pth")
    with pytest.raises(geofm.LayoutError, match=r"auxiliary_projection\.0\.weight"):
        geofm.create_model("geotreeclip", tmp_path / "broken.pth")
    with pytest.raises(geofm.ModelError, match="it fits geotreeclip"):
        geofm.create_model("geotreeclip_tiny", path)


def test_the_card_and_the_architecture_name_the_same_variables() -> None:
    card = model_card("geotreeclip")
    groups: dict[str, list[str]] = {}
    for variable in card.auxiliary:
        groups.setdefault(variable.group, []).append(variable.name)
        assert variable.unit
    assert {k: tuple(v) for k, v in groups.items()} == AUXILIARY_GROUPS
    assert card.input.bands == ("B2", "B3", "B4", "B8", "B5", "B6", "B7", "B8A", "B11", "B12")


def test_fixed_normalization_makes_a_sample_independent_of_its_neighbours(
    tiny: GeoTreeCLIP,
) -> None:
    images, auxiliary = places(64)
    images[5, 3] = torch.nan
    with torch.inference_mode():
        together = tiny.encode_image(images, auxiliary)
        alone = tiny.encode_image(images[5:6], auxiliary[5:6])
    assert (together[5] - alone[0]).abs().max() < 1e-5


def test_nan_touches_only_its_own_month(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(3)
    holed = images.clone()
    holed[1, 6, 2, 0, 0] = torch.nan
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 6] = False
    with torch.inference_mode():
        plain = tiny.encode_image(images, auxiliary)
        by_nan = tiny.encode_image(holed, auxiliary)
        by_mask = tiny.encode_image(images, auxiliary, image_mask=mask)
    torch.testing.assert_close(by_nan, by_mask)
    torch.testing.assert_close(by_nan[[0, 2]], plain[[0, 2]])
    assert (by_nan[1] - plain[1]).abs().max() > 1e-4


def test_missing_months_are_not_computed(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(4)
    images[:, 3:] = torch.nan
    seen = []
    original = tiny.series.trunk.forward_features

    def counting(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return original(x)

    tiny.series.trunk.forward_features = counting
    try:
        with torch.inference_mode():
            tiny.encode_image(images, auxiliary)
    finally:
        del tiny.series.trunk.forward_features
    assert seen == [12]


def test_a_place_without_any_image_still_has_features(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(1)
    with torch.inference_mode():
        features = tiny.encode_image(torch.full_like(images, torch.nan), auxiliary)
    assert torch.isfinite(features).all()


def test_text_is_the_same_padded_or_trimmed(tiny: GeoTreeCLIP) -> None:
    names = ["Fagus sylvatica", "Deciduous Broadleaf / Fagaceae / Quercus / Quercus robur"]
    tokens = tiny.tokenize(names)
    assert tokens.shape == (2, 77)
    with torch.inference_mode():
        trimmed = tiny.encode_text(names)
        padded = tiny.text(tokens)
        alone = tiny.encode_text(names[0])
    torch.testing.assert_close(trimmed, padded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trimmed[:1], alone, rtol=1e-5, atol=1e-5)


def test_forward_answers_as_open_clips_models_do(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(2)
    with torch.inference_mode():
        out = tiny(images, auxiliary, ["Fagus sylvatica", "Picea abies"])
    assert set(out) == {"image_features", "text_features", "logit_scale"}
    torch.testing.assert_close(out["image_features"].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(out["logit_scale"], torch.tensor(100.0), rtol=1e-5, atol=1e-3)
    assert tiny(text="Fagus sylvatica")["image_features"] is None


def test_every_parameter_of_both_towers_is_trained(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(3)
    images[0, :6] = torch.nan
    model = geofm.create_model("geotreeclip_tiny")
    out = model(images, auxiliary, ["Fagus sylvatica", "Picea abies", "Larix decidua"])
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_fitted_ranges_are_the_median_extremes_of_the_batches() -> None:
    model = geofm.create_model("geotreeclip_tiny")
    batches = []
    for seed in range(3):
        images, auxiliary = places(8, seed)
        images[0, 0] = torch.nan
        batches.append({"images": images, "auxiliary": auxiliary})
    model.fit_normalization(batches)
    # A missing month counts as 0.
    assert bool((model.image_low == 0).all())
    highs = [b["images"].nan_to_num(0).amax(dim=(0, 1, 3, 4)) for b in batches]
    torch.testing.assert_close(model.image_high, torch.stack(highs).median(0).values)
    lows = [b["auxiliary"].amin(0) for b in batches]
    torch.testing.assert_close(model.auxiliary_low, torch.stack(lows).median(0).values)
    with pytest.raises(geofm.ModelError, match="at least one batch"):
        model.fit_normalization([])


def test_variables_come_as_tensor_columns_or_rows_alike(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(2)
    names = [v.name for v in tiny.variables]
    columns = {name: auxiliary[:, i].tolist() for i, name in enumerate(names)}
    rows = [{name: float(row[i]) for i, name in enumerate(names)} for row in auxiliary]
    del columns["aspect"]
    rows[0]["aspect"], rows[1]["aspect"] = None, float("nan")
    table = auxiliary.clone()
    table[:, names.index("aspect")] = torch.nan
    with torch.inference_mode():
        expected = tiny.encode_image(images, table)
        for given in (columns, rows, table.numpy()):
            torch.testing.assert_close(tiny.encode_image(images, given), expected)
        mask = np.ones((2, 12), dtype=bool)
        arrays = tiny.encode_image(images.numpy(), table.numpy(), mask, ~np.isnan(table.numpy()))
        torch.testing.assert_close(arrays, expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"bio01": 9.1, "bio05": 25.3},
            "bio01 of sample 0 is 9.1: .*degrees Celsius.*multiply temperatures by 10",
        ),
        ({"bio01": [91, None], "bio10": [170, 16.8]}, "bio10 of sample 1 is 16.8"),
        ({"bio01": 9, "bio06": -2.5, "bio10": 16}, "bio06 of sample 0 is -2.5"),
        ({"soil_moisture_0_5cm": 0.31}, "looks like a fraction.*multiply soil moisture by 1000"),
        ({"latitude": 480}, "latitude of sample 0 is 480.*from -90 to 90"),
        ({"elevation": -9999}, "no-data value"),
        ({"bio01": -999}, "bio01 of sample 0 is -999, a usual no-data value.*None or NaN"),
        ({"bio01": [91, -3.4e38]}, r"bio01 of sample 1 is -3\.4e\+38"),
        ({"bio12": np.float32(-999.9)}, "bio12 of sample 0 is -999.9, a usual no-data value"),
        ({"bio06": [-264, -32768]}, "bio06 of sample 1 is -32768, a usual no-data value"),
        ({"bio1": 250}, "unknown variables: bio1; known are longitude"),
        ({}, "none are given"),
        ({"bio01": [1, 2], "bio02": [1]}, "different lengths"),
        ([[0.0] * 26], r"must be \(N, 27\)"),
    ],
)
def test_wrong_variables_and_units_are_refused(tiny: GeoTreeCLIP, given, words: str) -> None:
    with pytest.raises(geofm.GeofmError, match=words):
        auxiliary_table(given, tiny.variables)


def test_real_tenths_of_a_degree_are_not_refused(tiny: GeoTreeCLIP) -> None:
    # An average over an area is no integer, and a cold site has small numbers.
    auxiliary_table({"bio01": 25, "bio05": 181, "bio06": -132}, tiny.variables)
    # Colder than what it was trained on is not yet a no-data value.
    auxiliary_table({"bio01": -230, "bio05": 81, "bio06": -500}, tiny.variables)
    auxiliary_table({"bio01": -999}, tiny.variables, check_units=False)
    auxiliary_table({"bio01": 25.3, "bio05": 181.2, "bio06": -132.4}, tiny.variables)
    # An annual mean of 4.5 degC, interpolated, and one beside a warm month that is not known.
    auxiliary_table({"bio01": 45.3}, tiny.variables)
    auxiliary_table({"bio01": 45.3, "bio05": None, "bio11": -12.5}, tiny.variables)
    # An ice cap, in whole tenths.
    auxiliary_table({"bio01": -95, "bio05": 21}, tiny.variables)


def test_rows_can_have_names_of_their_own(tiny: GeoTreeCLIP) -> None:
    table = {"elevation": [300, -9999], "soil_moisture_0_5cm": [210, 250]}
    with pytest.raises(geofm.AuxiliaryError, match="elevation of plot 1 is -9999"):
        auxiliary_table(table, tiny.variables, sample=lambda number: f"plot {number}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 3}, "compares observations with names"),
        ({"bands": ["B2"]}, "create_transform"),
        ({"features_only": True}, "no features_only form"),
        ({"normalization": "layer"}, "'fixed' or 'batch'"),
    ],
)
def test_what_a_dual_tower_cannot_do_is_refused(options: dict, words: str) -> None:
    with pytest.raises(geofm.ModelError, match=words):
        geofm.create_model("geotreeclip_tiny", **options)


def test_wrong_images_are_refused(tiny: GeoTreeCLIP) -> None:
    images, auxiliary = places(2)
    with pytest.raises(geofm.PixelError, match="12 months of 10 bands"):
        tiny.encode_image(images[:, :6], auxiliary)
    with pytest.raises(geofm.ModelError, match="2 image series, but auxiliary data of 1"):
        tiny.encode_image(images, auxiliary[:1])


def test_the_transform_orders_bands_and_keeps_missing_months_nan(tiny: GeoTreeCLIP) -> None:
    names = ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"]
    prepare = geofm.create_transform(tiny, names, units="dn", level="L2A")
    series = torch.arange(12 * 10 * 36).reshape(12, 10, 6, 6) % 3000 + 1
    series[4] = 0
    out = prepare(series)
    assert out.shape == (12, 10, 5, 5)
    assert torch.isnan(out[4]).all()
    assert torch.isfinite(out[[i for i in range(12) if i != 4]]).all()
    torch.testing.assert_close(out[0, 3], series[0, names.index("B8"), :5, :5].float())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_all_sizes_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = geofm.create_model(name)
    assert model.series.trunk.patch_embed.proj.weight.shape[1:] == (10, 16, 16)
