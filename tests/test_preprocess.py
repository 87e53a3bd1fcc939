"""Preprocessing against a plain numpy reference, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geofm.cards import published_cards
from geofm.errors import BandError, PixelError
from geofm.factory import create_model, create_transform
from geofm.preprocess import Preprocess, offset_of_baseline
from geofm.spectral import NormalizedDifference

DATA = Path(__file__).parents[2] / "shared" / "data"
MPMAE = "mpmae_atto.mmearth64"
SSL = "ssl4eco_resnet50.seco_ndvi"

# The channel orders of the published checkpoints, written out again on purpose.
MP_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B11", "B12"]
SSL_BANDS = ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A"]
L1C = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
L2A = [name for name in L1C if name != "B10"]


def scene(bands=12, height=20, width=24, seed=0, low=1200, high=9000):
    return np.random.default_rng(seed).integers(low, high, (bands, height, width), np.int32)


def mpmae_reference(dn, names, level, missing=None):
    """(DN - mean) / std in the checkpoint's order, in float64."""
    stats = published_cards()[MPMAE].input.statistics[level]
    out = []
    for name, mean, std in zip(MP_BANDS, stats.mean, stats.std, strict=True):
        i = names.index(name)
        layer = (dn[i].astype(np.float64) - mean) / std
        gone = dn[i] == 0 if missing is None else missing[i]
        out.append(np.where(gone, 0.0, layer))
    return np.stack(out)


def ssl_reference(dn, names, side=32):
    """DN / 255 and NDVI * 10000 / 255, centre-cropped."""
    dn = dn.astype(np.float64)
    pick = {name: dn[names.index(name)] for name in SSL_BANDS}
    total = pick["B8"] + pick["B4"] + 1e-5
    pick["NDVI"] = np.clip((pick["B8"] - pick["B4"]) / total, 0, None) * 10000
    pick["NDVI"][(pick["B8"] == 0) | (pick["B4"] == 0)] = 0
    out = np.stack(list(pick.values())) / 255
    top, left = (out.shape[1] - side) // 2, (out.shape[2] - side) // 2
    return out[:, top : top + side, left : left + side]


def mpmae(bands=L2A, units="dn", level="L2A", **options):
    return create_transform(MPMAE, bands, units, level, **options)


def ssl(bands=L2A, units="dn", level="L2A", size=32, **options):
    # 32 px instead of the card's 224, which `size=None` brings back: this file runs in seconds.
    if options.get("fit") == "any":
        size = None
    return create_transform(SSL, bands, units, level, size=size, **options)


# --- the right numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_mpmae_is_the_z_score_of_the_level_in_the_checkpoints_order(level):
    dn = scene(13)
    out = mpmae(L1C, level=level)(dn)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), mpmae_reference(dn, L1C, level), atol=2e-6)


def test_mpmae_takes_b8a_before_b8():
    dn = np.full((12, 4, 4), 2000, np.uint16)
    dn[L2A.index("B8A")] = 9000
    out = mpmae()(dn)
    stats = published_cards()[MPMAE].input.statistics["L2A"]
    assert out[7, 0, 0] == pytest.approx((9000 - stats.mean[7]) / stats.std[7], rel=1e-6)
    assert out[8, 0, 0] == pytest.approx((2000 - stats.mean[8]) / stats.std[8], rel=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (225, 301)])
def test_ssl4eco_is_dn_over_255_with_ndvi_and_a_centre_crop(size):
    dn = scene(12, *size)
    out = ssl(size=None)(dn)
    assert out.shape == (9, 224, 224)
    np.testing.assert_allclose(out.numpy(), ssl_reference(dn, L2A, 224), rtol=1e-5, atol=1e-5)


def test_ssl4eco_clips_negative_ndvi_to_zero():
    dn = scene(12, 32, 32)
    dn[L2A.index("B8")] = 500
    assert ssl()(dn)[8].abs().max() == 0


def test_the_offset_is_taken_away_before_ndvi():
    dn = scene(12, 32, 32)
    np.testing.assert_allclose(
        ssl(offset=-1000)(dn + 1000).numpy(), ssl_reference(dn, L2A), rtol=1e-5, atol=1e-5
    )


def test_ndvi_of_negative_reflectance_stays_in_range():
    dn = np.full((12, 32, 32), 1000, np.int32)
    dn[L2A.index("B8"), :16] = 1050
    dn[L2A.index("B4"), :16] = 950
    dn[L2A.index("B8"), 16:] = 900
    dn[L2A.index("B4"), 16:] = 950
    ndvi = ssl(offset=-1000)(dn)[8]
    assert ndvi[0, 0] == pytest.approx(10000 / 255, rel=1e-5)
    assert ndvi[-1, -1] == 0


def test_ndvi_of_two_zeros_is_zero_where_zero_is_a_value():
    index = NormalizedDifference("NDVI", ("B8", "B4"))
    zero = torch.zeros(2, 2)
    assert torch.equal(index({"B8": zero, "B4": zero}), zero)
    assert ssl(nodata=[])(np.zeros((12, 32, 32), np.uint16)).abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.permutations(L1C), st.sampled_from(["L1C", "L2A"]))
def test_any_order_of_the_channels_gives_the_identical_result(names, level):
    dn = scene(13, 5, 6)
    shuffled = np.stack([dn[L1C.index(name)] for name in names])
    assert torch.equal(mpmae(names, level=level)(shuffled), mpmae(L1C, level=level)(dn))


@settings(max_examples=15, deadline=None)
@given(st.permutations(L2A))
def test_any_order_of_the_channels_gives_the_identical_result_with_ndvi(names):
    dn = scene(12, 6, 6)
    shuffled = np.stack([dn[L2A.index(name)] for name in names])
    assert torch.equal(ssl(names, size=6)(shuffled), ssl(size=6)(dn))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(L2A), min_size=2, max_size=2, unique=True))
def test_swapping_two_names_changes_the_result(pair):
    swapped = list(L2A)
    i, j = L2A.index(pair[0]), L2A.index(pair[1])
    swapped[i], swapped[j] = swapped[j], swapped[i]
    dn = scene(12, 5, 6)
    assert not torch.equal(mpmae(swapped)(dn), mpmae()(dn))


@pytest.mark.parametrize("make", [mpmae, ssl])
def test_dn_reflectance_and_uint8_of_one_scene_agree(make):
    grey = np.random.default_rng(0).integers(1, 256, (12, 32, 32)).astype(np.uint8)
    dn = grey.astype(np.float64) * 10000 / 255
    expected = make(units="dn")(dn)
    torch.testing.assert_close(
        make(units="reflectance")(dn / 10000), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(make(units="uint8")(grey), expected, rtol=1e-5, atol=1e-5)


def test_white_is_the_reflectance_of_255():
    grey = np.full((12, 3, 3), 255, np.uint8)
    expected = mpmae()(np.full((12, 3, 3), 3558, np.uint16))
    torch.testing.assert_close(mpmae(units="uint8", white=0.3558)(grey), expected)


@pytest.mark.parametrize("make", [mpmae, ssl])
@pytest.mark.parametrize("written", ["05.09", "N0509", "0509", "04.00"])
def test_the_baseline_gives_the_offset(make, written):
    dn = scene(12, 32, 32)
    assert torch.equal(make(baseline=written)(dn), make(offset=-1000)(dn))
    assert not torch.equal(make(baseline=written)(dn), make()(dn))


def test_older_baselines_have_no_offset():
    assert offset_of_baseline("03.01") == 0
    assert offset_of_baseline("N0214") == 0


@pytest.mark.parametrize("bad", ["5.9", "", "L2A", "05.1", "-4.00", 5.09, None])
def test_what_is_no_baseline_is_refused(bad):
    with pytest.raises(PixelError, match=r"looks like '05\.09'"):
        offset_of_baseline(bad)


def test_the_baseline_that_tells_nothing_is_refused():
    with pytest.raises(PixelError, match="offset=-1000 or offset=0"):
        mpmae(baseline="N9999")


def test_arrays_and_tensors_give_the_same():
    dn = scene()
    assert torch.equal(mpmae()(dn), mpmae()(torch.from_numpy(dn)))


def test_input_is_left_as_it_was():
    for dn in (scene().astype(np.float32), torch.from_numpy(scene()).float()):
        before = copy.deepcopy(dn)
        mpmae()(dn)
        assert (before == dn).all()


def test_bands_of_the_image_that_the_model_does_not_take_are_ignored():
    dn = scene()
    more = np.concatenate([np.full((1, *dn.shape[1:]), -30000, np.int32), dn])
    assert torch.equal(mpmae(["SCL", *L2A])(more), mpmae()(dn))


# --- no data ------------------------------------------------------------------------------------


def test_stored_zero_is_missing_before_the_offset_is_added():
    dn = scene(low=2000)
    dn[:, :3] = 0
    dn[:, 5] = 1000
    out = mpmae(offset=-1000)(dn)
    assert out[:, :3].abs().max() == 0
    expected = mpmae_reference(dn - 1000, L2A, "L2A", missing=dn == 0)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
    assert out[:, 5].abs().min() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("units", ["dn", "reflectance"])
def test_a_bad_pixel_is_zero_in_its_own_band_only(bad, units):
    pixels = scene().astype(np.float32) / (1 if units == "dn" else 10000)
    clean = mpmae(units=units)(pixels)
    pixels[L2A.index("B3"), 4, 7] = bad
    out = mpmae(units=units)(pixels)
    expected = clean.clone()
    expected[MP_BANDS.index("B3"), 4, 7] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("parent", ["B4", "B8"])
@pytest.mark.parametrize("bad", [np.nan, 0])
def test_ndvi_is_missing_where_a_parent_is(parent, bad):
    pixels = scene(12, 32, 32).astype(np.float32)
    pixels[L2A.index("B8")] += 10000
    clean = ssl()(pixels)
    pixels[L2A.index(parent), 4, 7] = bad
    expected = clean.clone()
    assert expected[8, 4, 7] > 0
    expected[SSL_BANDS.index(parent), 4, 7] = 0
    expected[8, 4, 7] = 0
    assert torch.equal(ssl()(pixels), expected)


@pytest.mark.parametrize(
    "value", [-9999, -9999.0, np.int16(-9999), np.float32(-9999), [0, -9999], np.array([-9999])]
)
def test_a_named_no_data_value_is_missing(value):
    dn = scene()
    dn[3, 2, 2] = -9999
    out = mpmae(nodata=value)(dn)
    assert out[MP_BANDS.index(L2A[3]), 2, 2] == 0
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("value", [-3.4028234663852886e38, -1.7976931348623157e308, 1e20])
def test_huge_no_data_values_are_understood(value):
    pixels = scene().astype(np.float64)
    pixels[0, 0, 0] = value
    out = mpmae(nodata=value)(pixels)
    assert out[0, 0, 0] == 0
    assert torch.isfinite(out).all()


def test_the_no_data_value_a_message_suggests_works():
    pixels = scene().astype(np.float32)
    pixels[0, 0, 0] = np.finfo(np.float32).min
    with pytest.raises(PixelError) as caught:
        mpmae()(pixels)
    suggested = float(str(caught.value).split("nodata=")[1].split(")")[0])
    assert mpmae(nodata=suggested)(pixels)[0, 0, 0] == 0


def test_naming_other_no_data_values_makes_zero_a_value():
    dn = scene()
    dn[0, 0, 0] = 0
    assert mpmae()(dn)[0, 0, 0] == 0
    assert mpmae(nodata=-9999)(dn)[0, 0, 0] != 0
    assert mpmae(nodata=[])(dn)[0, 0, 0] != 0


def test_black_is_a_value_in_8_bits():
    out = mpmae(units="uint8")(np.zeros((12, 3, 3), np.uint8))
    assert out.abs().min() > 0


def test_what_a_masked_array_masks_is_missing():
    dn = scene()
    mask = np.zeros(dn.shape, bool)
    mask[2, 3, 4] = True
    out = mpmae()(np.ma.masked_array(dn, mask))
    expected = mpmae()(dn)
    expected[MP_BANDS.index(L2A[2]), 3, 4] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", ["zero", ["a"], {}])
def test_no_data_that_is_no_number_is_refused(bad):
    with pytest.raises(PixelError, match="nodata must be a number"):
        mpmae(nodata=bad)


@pytest.mark.parametrize("fill", [0, np.nan])
@pytest.mark.parametrize("make", [mpmae, ssl])
def test_an_image_without_data_is_zero_not_refused(make, fill):
    out = make()(np.full((12, 32, 32), fill, np.float32))
    assert out.abs().max() == 0


# --- samples and batches ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mpmae, ssl])
@pytest.mark.parametrize("size", [(32, 32), (31, 33)])
def test_a_sample_does_not_depend_on_its_batch(make, size):
    batch = np.stack([scene(12, *size, seed=i) for i in range(5)]).astype(np.float32)
    batch[3, :, 4:9] = np.nan
    batch[4] = 0
    transform = make()
    together = transform(batch)
    for i, each in enumerate(batch):
        assert torch.equal(transform(each[None])[0], together[i])
        assert torch.equal(transform(each), together[i])


def test_memory_layout_does_not_matter():
    batch = torch.rand(3, 12, 31, 33) * 5000
    last = batch.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ssl()(last), ssl()(batch))


def test_an_empty_batch_is_an_empty_batch():
    assert mpmae()(np.zeros((0, 12, 8, 8), np.uint16)).shape == (0, 12, 8, 8)


def test_a_bad_sample_is_refused_in_a_batch_of_good_ones():
    batch = np.stack([scene(seed=i).astype(np.float32) for i in range(3)])
    batch[1] /= 10000
    with pytest.raises(PixelError, match=r"reflectance'.*sample 1 of 3"):
        mpmae()(batch)


# --- types --------------------------------------------------------------------------------------

NUMPY = ["<u2", ">u2", "i2", ">i2", "i4", "u4", "i8", "u8", "f2", "f4", ">f4", "f8", ">f8", "g"]


@pytest.mark.parametrize("dtype", NUMPY)
def test_all_numpy_types_give_the_same(dtype):
    dn = scene(low=1, high=2000)  # Integers that float16 holds exactly.
    assert torch.equal(mpmae()(dn.astype(dtype)), mpmae()(dn))


TORCH = ["uint16", "int16", "int32", "uint32", "int64", "uint64", "half", "float", "double"]


@pytest.mark.parametrize("dtype", TORCH)
def test_all_torch_types_give_the_same(dtype):
    dn = torch.from_numpy(scene(low=1, high=2000))
    out = mpmae()(dn.to(getattr(torch, dtype)))
    assert out.dtype == torch.float32
    assert torch.equal(out, mpmae()(dn))


def test_bfloat16_gives_the_result_of_its_values():
    dn = torch.from_numpy(scene()).bfloat16()
    assert torch.equal(mpmae()(dn), mpmae()(dn.float()))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.float32])
def test_0_to_255_images_may_have_any_type(dtype):
    grey = np.random.default_rng(0).integers(2, 128, (12, 4, 4))
    expected = mpmae(units="uint8")(grey.astype(np.int64))
    assert torch.equal(mpmae(units="uint8")(grey.astype(dtype)), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8])
def test_odd_arrays_work_without_warnings(dtype):
    base = np.random.default_rng(0).integers(1, 250, (24, 10, 12)).astype(dtype)
    units = "uint8" if dtype == np.uint8 else "dn"
    odd = [base[::2, ::-1, ::-1], base[::-2], base[:12].transpose(0, 2, 1)]
    odd += [np.asfortranarray(base[:12]), np.broadcast_to(base[:12, :1], (12, 10, 12))]
    frozen = base[:12].copy()
    frozen.flags.writeable = False
    for array in [*odd, frozen]:
        plain = np.array(array, order="C")
        assert torch.equal(mpmae(units=units)(array), mpmae(units=units)(plain))


@pytest.mark.parametrize(
    "pixels",
    [
        np.ones((12, 4, 4), bool),
        np.ones((12, 4, 4), complex),
        np.ones((12, 4, 4), object),
        np.full((12, 4, 4), "1"),
        np.zeros((12, 4, 4), "datetime64[s]"),
        torch.ones(12, 4, 4, dtype=torch.bool),
        torch.ones(12, 4, 4, dtype=torch.complex64),
    ],
    ids=lambda p: str(p.dtype),
)
def test_types_that_are_no_numbers_are_refused(pixels):
    with pytest.raises(PixelError, match="integers or floats") as caught:
        mpmae()(pixels)
    assert str(pixels.dtype) in str(caught.value)


@pytest.mark.parametrize("pixels", [[[1.0]], None, 3.0, "image.tif"])
def test_what_is_no_array_is_refused(pixels):
    with pytest.raises(PixelError, match="numpy array or a tensor"):
        mpmae()(pixels)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 12, 4, 4), (12,)])
def test_other_numbers_of_dimensions_are_refused(shape):
    with pytest.raises(PixelError, match=r"\(C, H, W\)") as caught:
        mpmae()(np.ones(shape, np.uint16))
    assert str(shape) in str(caught.value)


def test_another_number_of_channels_is_refused_with_the_names():
    with pytest.raises(PixelError, match="13 channels, but 12 bands") as caught:
        mpmae()(np.ones((13, 4, 4), np.uint16))
    assert "B1, B2" in str(caught.value)
    assert "channels last" not in str(caught.value)


@pytest.mark.parametrize("shape", [(20, 30, 12), (2, 20, 30, 12)])
def test_channels_last_is_recognised(shape):
    with pytest.raises(PixelError, match="Are the channels last"):
        mpmae()(np.ones(shape, np.uint16))


@pytest.mark.parametrize("shape", [(12, 0, 5), (2, 12, 5, 0)])
def test_tiles_without_pixels_are_refused(shape):
    with pytest.raises(PixelError, match="no height or no width"):
        mpmae()(np.ones(shape, np.uint16))


# --- units --------------------------------------------------------------------------------------


def refusal(units, pixels, **options):
    with pytest.raises(PixelError) as caught:
        mpmae(units=units, **options)(pixels)
    return str(caught.value)


def test_reflectance_as_dn_is_refused():
    pixels = (scene() / 10000).astype(np.float32)
    message = refusal("dn", pixels)
    assert "say units='reflectance'" in message
    assert f"from {pixels.min():.3g}"[:8] in message
    assert "float32" in message


def test_dn_as_reflectance_is_refused():
    message = refusal("reflectance", np.full((12, 4, 4), 4321.0))
    assert "say units='dn'" in message
    assert "4321" in message
    assert "float64" in message


@pytest.mark.parametrize(
    ("dtype", "units"), [("uint16", "dn"), ("int32", "dn"), ("uint8", "uint8")]
)
def test_integers_as_reflectance_are_refused(dtype, units):
    message = refusal("reflectance", np.ones((12, 4, 4), dtype))
    assert f"say units='{units}'" in message
    assert dtype in message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_8_bits_as_dn_are_refused(dtype):
    message = refusal("dn", torch.full((12, 4, 4), 99, dtype=dtype))
    assert "say units='uint8'" in message
    assert "99" in message


@pytest.mark.parametrize("low", [-9999, -32768])
@pytest.mark.parametrize("units", ["dn", "reflectance", "uint8"])
def test_a_no_data_value_is_suspected(units, low):
    pixels = np.full((12, 4, 4), 0.5)
    pixels[0, 0, 0] = low
    assert f"nodata={low})" in refusal(units, pixels)


def test_values_beyond_16_bits_are_refused():
    assert "nodata=70000)" in refusal("dn", np.full((12, 4, 4), 70000))


def test_dn_as_uint8_are_refused():
    message = refusal("uint8", np.full((12, 4, 4), 300, np.uint16))
    assert "say units='dn'" in message
    assert "300" in message


def test_reflectance_as_uint8_is_refused():
    assert "say units='reflectance'" in refusal("uint8", np.full((12, 4, 4), 0.3))


def test_channels_the_model_does_not_take_are_not_judged():
    pixels = np.concatenate([scene(), np.full((1, 20, 24), -99999, np.int32)])
    mpmae([*L2A, "elevation"])(pixels)


def test_a_refusal_does_not_look_at_missing_pixels():
    pixels = (scene() / 10000).astype(np.float32)
    pixels[:, 0] = -9999
    assert "reflectance'" in refusal("dn", pixels, nodata=-9999)


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 60000), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_real_dn_are_never_refused(high, share, seed):
    rng = np.random.default_rng(seed)
    dn = rng.uniform(high * (1 - share), high, (12, 5, 5)).round()
    for dtype in (np.uint16, np.int32, np.float32):
        mpmae()(dn.astype(dtype))


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 2.8), st.integers(0, 1000))
def test_real_reflectance_is_never_refused(high, seed):
    pixels = np.random.default_rng(seed).uniform(-0.05, high, (12, 5, 5))
    for dtype in (np.float16, np.float32, np.float64):
        mpmae(units="reflectance")(pixels.astype(dtype))


@pytest.mark.parametrize("offset", [0, -1000])
def test_water_is_not_refused(offset):
    rng = np.random.default_rng(0)
    dn = rng.integers(1, 60, (12, 20, 20)) - offset
    assert torch.isfinite(mpmae(offset=offset)(dn.astype(np.uint16))).all()
    assert torch.isfinite(mpmae()(rng.normal(20, 15, (12, 20, 20)))).all()
    assert torch.isfinite(mpmae(units="reflectance")(rng.normal(0.002, 0.002, (12, 9, 9)))).all()


def test_snow_is_not_refused():
    pixels = np.full((12, 20, 20), 1.5, np.float32)
    pixels[0, 0, 0] = 2.8
    torch.testing.assert_close(
        mpmae(units="reflectance")(pixels), mpmae()((pixels * 10000).round().astype(np.uint16))
    )


# --- options ------------------------------------------------------------------------------------


def test_unknown_units_are_refused():
    with pytest.raises(PixelError, match="got 'DN'"):
        mpmae(units="DN")


def test_the_level_must_be_named_where_it_matters():
    with pytest.raises(PixelError, match=r"L1C, L2A.*level='L2A'"):
        mpmae(level=None)
    with pytest.raises(PixelError, match="got 'L2'"):
        mpmae(level="L2")


def test_the_level_may_be_unspecified_where_it_does_not_matter():
    dn = scene(12, 32, 32)
    assert torch.equal(ssl(level=None)(dn), ssl(level="L2A")(dn))


def test_a_level_the_checkpoint_never_saw_is_warned_of():
    with pytest.warns(UserWarning, match="trained on L2A only") as caught:
        ssl(level="L1C")
    assert Path(caught[0].filename).name == "test_preprocess.py"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"offset": -1000, "baseline": "05.09"}, "not both"),
        ({"offset": -1000, "units": "reflectance"}, "belongs to units='dn'"),
        ({"baseline": "05.09", "units": "uint8"}, "belongs to units='dn'"),
        ({"offset": -0.1}, "got -0.1"),
        ({"offset": 1000}, "got 1000"),
        ({"offset": float("nan")}, "got nan"),
        ({"white": 0.3558}, "belongs to units='uint8'"),
        ({"white": 0.0, "units": "uint8"}, "must be positive"),
        ({"white": float("nan"), "units": "uint8"}, "must be positive"),
        ({"fit": "pad"}, "got 'pad'"),
        ({"fit": ""}, "got ''"),
        ({"size": 112}, "no effect"),
        ({"size": 0, "fit": "crop_or_resize"}, "got 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, problem):
    with pytest.raises(PixelError, match=problem):
        mpmae(**options)


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (223, 224), (100, 300), (300, 100), (1, 1)])
def test_tiles_too_small_on_a_side_are_resized_as_torch_does(size):
    dn = scene(12, *size)
    whole = ssl(fit="any")(dn)
    expected = nn.functional.interpolate(
        whole[None], size=(224, 224), mode="bicubic", align_corners=False
    )[0]
    assert torch.equal(ssl(size=None)(dn), expected)


@pytest.mark.parametrize(("size", "top", "left"), [((256, 256), 16, 16), ((225, 227), 0, 1)])
def test_larger_tiles_are_cropped_at_the_centre(size, top, left):
    dn = scene(12, *size)
    whole = ssl(fit="any")(dn)
    assert torch.equal(ssl(size=None)(dn), whole[:, top : top + 224, left : left + 224])


def test_any_size_is_kept_where_the_card_says_so():
    assert mpmae()(scene(12, 37, 5)).shape == (12, 37, 5)


def test_the_size_may_be_chosen():
    assert ssl(size=96)(scene(12, 100, 128)).shape == (9, 96, 96)
    assert mpmae(fit="crop_or_resize")(scene(12, 64, 64)).shape == (12, 56, 56)


# --- missing bands ------------------------------------------------------------------------------


def test_a_missing_band_is_an_error_that_names_it_and_the_others():
    with pytest.raises(BandError, match="needs B1, B9") as caught:
        mpmae([b for b in L2A if b not in ("B1", "B9")])
    message = str(caught.value)
    assert "it has B2, B3" in message
    assert "fill='mean'" in message


def test_another_sensors_names_are_hinted_at():
    with pytest.raises(BandError, match="landsat_oli"):
        mpmae(["SR_B2", "SR_B3", "SR_B4"])


def test_mean_is_zero_after_normalization_and_zero_is_dn_zero():
    few = [b for b in L2A if b != "B9"]
    dn = scene(11)
    stats = published_cards()[MPMAE].input.statistics["L2A"]
    assert mpmae(few, fill="mean")(dn)[9].abs().max() == 0
    zero = mpmae(few, fill="zero")(dn)[9]
    assert torch.allclose(zero, torch.tensor(-stats.mean[9] / stats.std[9]))


def test_a_copied_band_is_normalized_as_the_missing_one():
    few = [b for b in L2A if b != "B9"]
    dn = scene(11)
    full = np.insert(dn, L2A.index("B9"), dn[few.index("B8A")], axis=0)
    for fill in ({"B9": "B8A"}, {"B09": "B08A"}, "B8A"):
        assert torch.equal(mpmae(few, fill=fill)(dn), mpmae()(full))


def test_fills_may_differ_from_band_to_band():
    few = [b for b in L2A if b not in ("B1", "B9", "B12")]
    out = mpmae(few, fill={"B1": "mean", "B9": "zero", "B12": "B11"})(scene(9))
    assert out[0].abs().max() == 0
    assert out[9].unique().numel() == 1
    assert out[11].unique().numel() > 1


@pytest.mark.parametrize("fill", ["median", {"B9": "B10"}, {"B9": "nan"}])
def test_a_band_to_copy_that_is_not_there_is_refused(fill):
    with pytest.raises(BandError, match="fill copies"):
        mpmae([b for b in L2A if b != "B9"], fill=fill)


def test_a_fill_for_a_band_the_model_does_not_take_is_refused():
    with pytest.raises(BandError, match="fill names B10"):
        mpmae(fill={"B10": "mean"})


def test_there_are_no_means_where_the_checkpoint_divides():
    with pytest.raises(BandError, match="normalized without any"):
        ssl([b for b in L2A if b != "B5"], fill="mean")


def test_fills_alone_are_refused():
    with pytest.raises(BandError, match="nothing to compute from"):
        mpmae(["SCL"], fill="mean")


def test_ndvi_is_computed_from_a_copied_parent():
    few = [b for b in L2A if b != "B8"]
    dn = scene(11, 32, 32)
    full = np.insert(dn, L2A.index("B8"), dn[few.index("B8A")], axis=0)
    assert torch.equal(ssl(few, fill={"B8": "B8A"})(dn), ssl()(full))


def test_ndvi_is_filled_where_a_parent_is():
    out = ssl([b for b in L2A if b != "B4"], fill="zero")(scene(11, 32, 32))
    assert out[[2, 8]].abs().max() == 0
    assert out[[0, 1, 3, 4, 5, 6, 7]].abs().min() > 0


def test_near_bands_stand_in_only_when_asked_to():
    oli = ["B1", "B2", "B3", "B4", "B5", "B6", "B7"]
    with pytest.raises(BandError, match="needs B5, B6, B7, B8, NDVI"):
        ssl(oli, sensor="landsat_oli")
    rule = {"B5": "B4", "B6": "B5", "B7": "B5", "B8": "B5"}
    dn = scene(7, 32, 32)
    out = ssl(oli, sensor="landsat_oli", fill=rule)(dn)
    assert torch.equal(out[7], torch.from_numpy(dn[4]).float() / 255)
    assert torch.equal(out[2], torch.from_numpy(dn[3]).float() / 255)
    ndvi = (dn[4] - dn[3]) / (dn[4] + dn[3] + 1e-5)
    np.testing.assert_allclose(out[8].numpy(), ndvi.clip(0) * 10000 / 255, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("units", "ndvi"),
    [("dn", 6200.0), ("reflectance", 0.62), ("uint8", 158.1)],
)
def test_an_index_that_comes_with_the_image_is_taken_without_offset(units, ndvi):
    level = {"dn": 3000, "reflectance": 0.3, "uint8": 80}[units]
    pixels = np.full((13, 32, 32), level, np.float32)
    pixels[12] = ndvi
    options = {"offset": -1000} if units == "dn" else {}
    out = ssl([*L2A, "NDVI"], units, **options)(pixels)
    assert torch.allclose(out[8], torch.tensor(6200 / 255), rtol=1e-5)


def test_an_index_in_the_wrong_scale_is_refused():
    pixels = np.full((13, 4, 4), 3000, np.float32)
    pixels[12] = 0.62
    with pytest.raises(PixelError, match=r"index.*0\.62"):
        ssl([*L2A, "NDVI"])(pixels)
    pixels[:12] = 0.3
    pixels[12] = 6200
    with pytest.raises(PixelError, match=r"index.*6200"):
        ssl([*L2A, "NDVI"], "reflectance")(pixels)


def test_zero_is_a_value_in_an_index_and_a_named_no_data_value_is_not():
    pixels = np.full((13, 32, 32), 3000, np.float32)
    pixels[12] = 5000
    pixels[12, 0, 0] = -9999
    out = ssl([*L2A, "NDVI"], nodata=[0, -9999])(pixels)
    assert out[8, 0, 0] == 0
    assert out[8, 0, 1] > 0


# --- as a module --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mpmae, ssl])
def test_it_has_no_state_and_survives_copy_and_pickle(make):
    transform = make()
    dn = scene(12, 32, 32)
    assert transform.state_dict() == {}
    assert list(transform.parameters()) == []
    stream = io.BytesIO()
    torch.save(transform, stream)
    stream.seek(0)
    again = [copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))]
    again.append(torch.load(stream, weights_only=False))
    for other in again:
        assert torch.equal(other(dn), transform(dn))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_it_casts_the_result_only(dtype):
    dn = scene()
    expected = mpmae()(dn)
    out = mpmae().to(dtype)(dn)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(mpmae().to(dtype).float()(dn), expected)


def test_it_casts_together_with_a_model():
    model = nn.Sequential(mpmae(), nn.Conv2d(12, 4, 3)).bfloat16()
    assert model(scene()).dtype == torch.bfloat16


def test_tensors_stay_on_their_device_and_arrays_go_to_the_modules():
    transform = mpmae()
    assert transform(torch.ones(12, 4, 4, device="cpu")).device.type == "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the rest of this test moves to one")
    dn = scene()
    expected = transform(dn)
    assert torch.equal(transform(torch.from_numpy(dn).cuda()).cpu(), expected)
    moved = transform.cuda()(dn)
    assert moved.device.type == "cuda"
    torch.testing.assert_close(moved.cpu(), expected)


def test_gradients_reach_the_pixels_and_are_finite():
    pixels = torch.rand(12, 32, 32) * 5000 + 1
    pixels[:, 0] = 0
    pixels.requires_grad_()
    ssl()(pixels).sum().backward()
    assert torch.isfinite(pixels.grad).all()
    assert pixels.grad[L2A.index("B4")].abs().max() > 0


def test_print_shows_what_goes_where():
    text = repr(ssl(["B02", *L2A[2:]], offset=-1000))
    assert "B02→B2" in text
    assert "(B8, B4)→NDVI" in text
    assert "offset=-1000" in text
    assert "B9=zero" in repr(mpmae([b for b in L2A if b != "B9"], fill="zero"))


def exported(module, example):
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


@pytest.mark.parametrize("size", [40, 24])
@pytest.mark.parametrize("make", [mpmae, ssl])
def test_it_exports_with_any_batch(make, size):
    transform = make(offset=-1000, nodata=[0, -9999]).eval()
    batch = torch.from_numpy(np.stack([scene(12, size, size, i) for i in range(3)]))
    batch[0, 3, :9] = 0
    program = exported(transform, batch[:2])
    for some in (batch, batch[:1]):
        torch.testing.assert_close(program.module()(some), transform(some), rtol=1e-5, atol=1e-5)


def test_it_exports_in_front_of_a_model():
    model = create_model("mpmae_atto").eval()
    module = nn.Sequential(create_transform(model, L2A, "dn", "L2A"), model).eval()
    batch = torch.from_numpy(np.stack([scene(12, 56, 56, i) for i in range(3)])).float()
    program = exported(module, batch[:2])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), module(batch), rtol=1e-4, atol=1e-5)


def test_it_traces():
    transform = ssl().eval()
    batch = torch.from_numpy(np.stack([scene(12, 20, 20, i) for i in range(2)])).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(transform, batch)
    torch.testing.assert_close(traced(batch[:1]), transform(batch[:1]))


def test_onnx_runtime_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module = nn.Sequential(ssl(offset=-1000), nn.Conv2d(9, 4, 3, 2)).eval()
    batch = torch.from_numpy(np.stack([scene(12, 20, 20, i, low=1001) for i in range(3)])).float()
    batch[1, :, 3:9] = 0
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (batch[:2],),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            verbose=False,
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for some in (batch, batch[:1]):
        (out,) = session.run(None, {name: some.numpy()})
        with torch.no_grad():
            expected = module(some)
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4)


def test_every_card_has_a_transform():
    for card in published_cards().values():
        transform = create_transform(card, L1C, "dn", "L2A")
        assert isinstance(transform, Preprocess)
        out = transform(scene(13, 64, 64))
        assert out.shape[0] == len(card.input.bands)
        assert torch.isfinite(out).all()


# --- real data ----------------------------------------------------------------------------------

EUROSAT = [*L1C[:8], "B9", "B10", "B11", "B12", "B8A"]


def tiff(path):
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as file:
        return file.read()


def folder(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"real data are not here: {DATA / name}")
    return DATA / name


def test_eurosat_tiles_come_out_with_plausible_statistics():
    paths = sorted(folder("eurosat_ms_200").glob("*/*.tif"))[::10]
    out = mpmae(EUROSAT, level="L1C")(np.stack([tiff(path) for path in paths]))
    assert out.mean((0, 2, 3)).abs().max() < 3
    assert out.std((0, 2, 3)).max() < 4


def test_b8a_of_eurosat_resembles_b8_only_with_the_right_names():
    paths = sorted(folder("eurosat_ms_200").glob("Forest/*.tif"))[:5]
    tiles = np.stack([tiff(path) for path in paths])

    def correlation(names):
        out = mpmae(names, level="L1C", fit="any")(tiles)
        return np.corrcoef(out[:, 7].flatten(), out[:, 8].flatten())[0, 1]

    assert correlation(EUROSAT) > correlation(L1C)
    assert correlation(EUROSAT) > 0.8


def test_an_l1c_scene_comes_out_with_plausible_statistics():
    pixels = tiff(folder("s2_scenes") / "copernicusfm_T60HWB_20201002_L1C.tif")
    out = mpmae(L1C, level="L1C")(pixels)
    assert out.mean((1, 2)).abs().max() < 3
    assert out.std((1, 2)).max() < 4


def test_l2a_scenes_are_accepted():
    for path in sorted(folder("s2_scenes").glob("eotdl*")):
        for make in (mpmae, ssl):
            assert torch.isfinite(make()(tiff(path))).all()


def test_reflectance_of_eolearn_equals_its_dn():
    pixels = np.load(folder("eolearn_testpatch") / "REFERENCE_SCENES.npy").transpose(0, 3, 1, 2)
    dn = (pixels * 10000).round().astype(np.uint16)
    out = mpmae(L1C, "reflectance", "L1C")(pixels)
    assert out.shape == (5, 12, 101, 100)
    torch.testing.assert_close(out, mpmae(L1C, "dn", "L1C")(dn), rtol=0, atol=1e-3)
    with pytest.raises(PixelError, match="sample 0 of 5"):
        mpmae(L1C, "dn", "L1C")(pixels)
    with pytest.raises(PixelError, match="uint16"):
        mpmae(L1C, "reflectance", "L1C")(dn)
