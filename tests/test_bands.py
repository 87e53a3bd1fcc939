"""create_model(bands=...): the first layer adapted to the bands at hand."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch

from geofm import create_model, create_transform
from geofm.errors import BandError, ModelError
from geofm.spectral import Band

MP_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B11", "B12")
SSL_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "NDVI")
LANDSAT = ["B2", "B3", "B4", "B5", "B6", "B7"]


@cache
def full_model(name, path, **options):
    return create_model(name, path, **options).eval()


def saved(tmp_path_factory, name, **options):
    torch.manual_seed(0)
    model = create_model(name, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def atto(tmp_path_factory):
    return saved(tmp_path_factory, "mpmae_atto")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return saved(tmp_path_factory, "mpmae_unet_atto", num_classes=3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return saved(tmp_path_factory, "ssl4eco_resnet18")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tmp_path_factory, "ssl4eco_vit_tiny_patch16", img_size=32)


def scene(bands, side=56, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(300, 6000, (2, len(bands), side, side)).astype(np.uint16)


def features(model, transform, pixels):
    with torch.no_grad():
        return model.eval()(transform(pixels))


def agree(out, expected):
    assert out.std() > 0
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


SUBSETS = [["B4"], ["B4", "B3", "B2"], ["B8", "B8A", "B2", "B12"], list(reversed(MP_BANDS))]


@pytest.mark.parametrize("bands", SUBSETS, ids=len)
def test_a_subset_equals_the_full_mpmae_with_the_other_bands_at_their_mean(atto, bands):
    small = create_model("mpmae_atto", atto, bands=bands)
    full = full_model("mpmae_atto", atto)
    pixels = scene(bands)
    out = features(small, create_transform(small, bands, "dn", "L2A"), pixels)
    expected = features(full, create_transform(full, bands, "dn", "L2A", fill="mean"), pixels)
    agree(out, expected)
    assert small.get_submodule("initial_conv.0").in_channels == len(bands)
    assert small.input_spec.bands == tuple(bands)


@pytest.mark.parametrize("bands", [["B3"], ["B8", "B2", "B8A"], ["B4", "B3"]], ids=str)
def test_a_subset_equals_the_full_ssl4eco_with_the_other_bands_at_zero(resnet, bands):
    small = create_model("ssl4eco_resnet18", resnet, bands=bands)
    full = full_model("ssl4eco_resnet18", resnet)
    pixels = scene(bands, 64)
    out = features(small, create_transform(small, bands, "dn", size=64), pixels)
    fill = create_transform(full, bands, "dn", fill="zero", size=64)
    agree(out, features(full, fill, pixels))


def test_ndvi_is_still_derived_for_a_subset(resnet):
    bands = ["NDVI", "B8", "B4"]
    small = create_model("ssl4eco_resnet18", resnet, bands=bands)
    full = full_model("ssl4eco_resnet18", resnet)
    pixels = scene(["B4", "B8"], 64)
    pixels[:, 1] += 6000
    prepare = create_transform(small, ["B4", "B8"], "dn", size=64)
    prepared = prepare(pixels)
    assert prepared.shape == (2, 3, 64, 64)
    assert prepared[:, 0].min() > 0
    fill = create_transform(full, ["B4", "B8"], "dn", fill="zero", size=64)
    agree(features(small, prepare, pixels), features(full, fill, pixels))


def test_ndvi_is_derived_from_bands_the_subset_does_not_take(resnet):
    small = create_model("ssl4eco_resnet18", resnet, bands=["B2", "NDVI"])
    prepare = create_transform(small, ["B2", "B4", "B8"], "dn", size=64)
    assert prepare(scene(["B2", "B4", "B8"], 64)).shape == (2, 2, 64, 64)
    with pytest.raises(BandError, match="needs NDVI"):
        create_transform(small, ["B2", "B4"], "dn")


def test_another_order_of_the_bands_gives_the_same_features(atto):
    bands = [MP_BANDS[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    pixels = scene(MP_BANDS)
    one, other = full_model("mpmae_atto", atto), create_model("mpmae_atto", atto, bands=bands)
    expected = features(one, create_transform(one, MP_BANDS, "dn", "L1C"), pixels)
    agree(features(other, create_transform(other, MP_BANDS, "dn", "L1C"), pixels), expected)


def test_aliases_are_understood(atto):
    model = create_model("mpmae_atto", atto, bands=["red", "B08", "b8a"])
    assert model.input_spec.bands == ("B4", "B8", "B8A")


def test_an_unknown_band_is_an_error_that_names_it_and_the_checkpoints(atto):
    with pytest.raises(BandError, match="needs B10") as caught:
        create_model("mpmae_atto", atto, bands=["B2", "B10"])
    message = str(caught.value)
    assert ", ".join(MP_BANDS) in message
    assert "new_bands='mean'" in message
    assert "tolerance" in message


def test_a_new_band_starts_from_the_mean_of_the_others(atto):
    model = create_model("mpmae_atto", atto, bands=["B10", "B2"], new_bands="mean")
    full = torch.load(atto)["initial_conv.0.weight"]
    new = model.get_submodule("initial_conv.0").weight
    torch.testing.assert_close(new[:, 0], full.mean(1))
    assert torch.equal(new[:, 1], full[:, 1])


def test_a_new_band_needs_statistics(atto):
    model = create_model("mpmae_atto", atto, bands=["B10", "B2"], new_bands="mean")
    with pytest.raises(BandError, match="no statistics for B10"):
        create_transform(model, ["B2", "B10"], "dn", "L1C")
    given = {"B10": (50.0, 20.0)}
    prepare = create_transform(model, ["B2", "B10"], "dn", "L1C", statistics=given, offset=-1000)
    assert prepare(np.full((2, 4, 4), 1090, np.uint16))[0, 0, 0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"B10": (0.0, 1.0), "B2": (0.0, 1.0)}, "only for bands without their own.*B2"),
        ({"B10": (0.0, 1.0), "B99": (0.0, 1.0)}, "does not take, B99"),
        ({"B10": (0.0, 0.0)}, "must be finite"),
        ({"B10": (float("nan"), 1.0)}, "must be finite"),
    ],
)
def test_impossible_statistics_are_refused(atto, given, problem):
    model = create_model("mpmae_atto", atto, bands=["B10", "B2"], new_bands="mean")
    with pytest.raises(BandError, match=problem):
        create_transform(model, ["B2", "B10"], "dn", "L1C", statistics=given)


@pytest.mark.parametrize(("units", "factor"), [("dn", 1), ("reflectance", 1e-4)])
def test_a_new_band_that_is_not_the_sensors_keeps_its_own_unit(atto, units, factor):
    model = create_model("mpmae_atto", atto, bands=["B2", "elevation"], new_bands="mean")
    options = {"offset": -1000} if units == "dn" else {}
    prepare = create_transform(
        model, ["elevation", "B2"], units, "L2A", statistics={"elevation": (500, 250)}, **options
    )
    pixels = np.full((2, 4, 4), 3000.0 * factor)
    pixels[0] = 1000
    pixels[0, 1, 1] = 0
    pixels[0, 2, 2] = np.nan
    out = prepare(pixels)[1]
    assert out[0, 0] == pytest.approx(2.0)
    assert out[1, 1] == pytest.approx(-2.0)
    assert out[2, 2] == 0


def test_bands_of_a_sensor_of_ones_own_are_spectral(atto):
    mine = [Band("one", "blue", 490.0), Band("two", None, 1000.0)]
    model = create_model("mpmae_atto", atto, bands=mine, new_bands="mean")
    given = {"two": (0.0, 1.0)}
    prepare = create_transform(model, mine, "reflectance", "L2A", statistics=given)
    assert prepare(np.full((2, 4, 4), 0.25))[1, 0, 0] == pytest.approx(2500.0)


def test_landsat_takes_the_weights_of_the_same_common_names(atto):
    names = ["B2", "B3", "B4", "B5", "B6", "B7"]
    model = create_model("mpmae_atto", atto, bands=names, sensor="landsat_oli")
    same = ["B2", "B3", "B4", "B8A", "B11", "B12"]
    other = create_model("mpmae_atto", atto, bands=same)
    pixels = scene(names)
    out = features(model, create_transform(model, names, "dn", "L2A"), pixels)
    agree(out, features(other, create_transform(other, same, "dn", "L2A"), pixels))


def test_a_landsat_band_without_counterpart_needs_a_tolerance(atto):
    options = {"bands": ["B8"], "sensor": "landsat_oli"}
    with pytest.raises(BandError, match="needs B8"):
        create_model("mpmae_atto", atto, **options, tolerance=20)
    model = create_model("mpmae_atto", atto, **options, tolerance=40)
    full = torch.load(atto)["initial_conv.0.weight"]
    assert torch.equal(model.get_submodule("initial_conv.0").weight[:, 0], full[:, 2])


def test_ndvi_of_landsat_comes_from_its_own_bands(resnet):
    model = create_model(
        "ssl4eco_resnet18", resnet, bands=["B4", "NDVI"], sensor="landsat_oli", tolerance=35
    )
    pixels = scene(["B4", "B5"], 64)
    pixels[:, 1] += 6000
    out = create_transform(model, ["B4", "B5"], "dn", size=64)(pixels)[:, 1]
    red, nir = pixels[:, 0].astype(float), pixels[:, 1].astype(float)
    np.testing.assert_allclose(out, (nir - red) / (nir + red) * 10000 / 255, rtol=1e-4)


def test_in_chans_that_contradicts_the_bands_is_refused(atto):
    with pytest.raises(ModelError, match="in_chans=4, but 3 bands"):
        create_model("mpmae_atto", atto, bands=["B2", "B3", "B4"], in_chans=4)
    with pytest.raises(ModelError, match="takes 12 channels"):
        create_model("mpmae_atto", atto, in_chans=3)


@pytest.mark.parametrize("bad", [[], ["B2", "B02"], "B2,B3"])
def test_impossible_lists_of_bands_are_refused(atto, bad):
    with pytest.raises(BandError, match=r"empty|listed twice|list of names"):
        create_model("mpmae_atto", atto, bands=bad)


def test_feature_maps_with_bands(atto):
    bands = ["B4", "B3", "B2"]
    small = create_model("mpmae_atto", atto, bands=bands, features_only=True)
    full = full_model("mpmae_atto", atto, features_only=True)
    pixels = scene(bands)
    with torch.no_grad():
        few = small.eval()(create_transform(small, bands, "dn", "L2A")(pixels))
        all_ = full.eval()(create_transform(full, bands, "dn", "L2A", fill="mean")(pixels))
    assert len(few) == len(all_) > 1
    for one, other in zip(few, all_, strict=True):
        agree(one, other)


def test_unet_with_bands(unet):
    bands = ["B8", "B4", "B3"]
    small = create_model("mpmae_unet_atto", unet, bands=bands, num_classes=3)
    full = create_model("mpmae_unet_atto", unet, num_classes=3)
    pixels = scene(bands)
    out = features(small, create_transform(small, bands, "dn", "L2A"), pixels)
    assert out.shape == (2, 3, 56, 56)
    fill = create_transform(full, bands, "dn", "L2A", fill="mean")
    agree(out, features(full, fill, pixels))


def test_vit_with_bands(vit):
    bands = ["B8", "B4", "NDVI"]
    small = create_model("ssl4eco_vit_tiny_patch16", vit, bands=bands)
    full = full_model("ssl4eco_vit_tiny_patch16", vit)
    pixels = scene(["B8", "B4"], 32)
    out = features(small, create_transform(small, ["B8", "B4"], "dn", size=32), pixels)
    fill = create_transform(full, ["B8", "B4"], "dn", fill="zero", size=32)
    agree(out, features(full, fill, pixels))


def test_bands_without_weights_build_a_model_for_them():
    model = create_model("mpmae_atto", bands=["B2", "B3", "VV"])
    assert model.get_submodule("initial_conv.0").in_channels == 3
    prepare = create_transform(model, ["B2", "B3", "VV"], "dn", "L2A", statistics={"VV": (-12, 4)})
    pixels = np.full((3, 56, 56), 1000.0)
    pixels[2] = -8
    out = prepare(pixels)
    assert out[2, 0, 0] == pytest.approx(1.0)
    assert model.eval()(out[None]).shape == (1, 320)


def test_an_adapted_model_survives_copy_and_pickle(atto):
    model = create_model("mpmae_atto", atto, bands=["B2", "B3"]).eval()
    x = torch.rand(1, 2, 56, 56)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.input_spec == model.input_spec
        assert torch.equal(again(x), model(x))
