"""Class maps of rasters: of pixels, of cells, of windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from test_windows import noise

import geofm
from geofm import maps, predict_raster
from geofm.colours import NO_DATA, colour_of
from geofm.hub import sha256_of
from geofm.raster.networks import running, weights_tags

BANDS = ["B2", "B3"]


def head(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = geofm.create_model(name, bands=BANDS, num_classes=3, **options).eval()
    with torch.no_grad():
        # Scores of fresh weights are all alike.
        model.head.weight *= 20
    return model


def prepared(model: torch.nn.Module, image: Any) -> torch.Tensor:
    return geofm.create_transform(model, image.bands, "dn", "L2A")(image.pixels)[None]


def test_a_segmenter_labels_every_pixel_as_it_would_alone(tmp_path: Path) -> None:
    model, image = head("mpmae_unet_atto"), noise(72, 96)
    with torch.inference_mode():
        expected = model(prepared(model, image))[0]
    out = tmp_path / "out.tif"
    got = predict_raster(model, image, out, level="L2A", window="image", classes=["a", "b", "c"])
    np.testing.assert_allclose(got.values, expected.softmax(0).numpy(), atol=1e-5)
    logits = predict_raster(model, image, level="L2A", window="image", kind="logits").values
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    with rasterio.open(out) as file:
        assert file.descriptions == ("a", "b", "c")
        assert tuple(file.transform)[:6] == image.transform
        assert file.tags()["GEOFM_VALUES"] == "probabilities of pixels"


def test_the_map_of_classes_is_of_the_blended_probabilities(tmp_path: Path) -> None:
    model, image = head("mpmae_unet_atto"), noise(100, 150)
    image.pixels[:, :20, :30] = 0
    options: dict[str, Any] = {"level": "L2A", "window": 64, "overlap": 32}
    shares = predict_raster(model, image, **options).values
    assert shares.shape == (3, 100, 150)
    valid = np.isfinite(shares).all(axis=0)
    assert not valid[:20, :30].any()
    assert valid.sum() == 100 * 150 - 20 * 30
    np.testing.assert_allclose(shares.sum(axis=0)[valid], 1, atol=1e-5)
    out = tmp_path / "out.tif"
    predict_raster(model, image, out, **options, kind="classes")
    layer = maps.open_layer(out)
    assert {e.label for e in layer.entries} <= {"class_0", "class_1", "class_2"}
    assert {e.label: e.colour for e in layer.entries}.items() <= {
        f"class_{i}": colour_of(i) for i in range(3)
    }.items()
    with rasterio.open(out) as file:
        classes = file.read(1)
        colours = file.colormap(1)
        assert [colours[i][:3] for i in (0, 1, 2, 255)] == [*map(colour_of, range(3)), NO_DATA]
        assert file.dtypes == ("uint8",)
        assert file.nodata == 255
        assert json.loads(file.tags()["GEOFM_CLASSES"]) == ["class_0", "class_1", "class_2"]
    assert (classes[~valid] == 255).all()
    np.testing.assert_array_equal(classes[valid], shares.argmax(axis=0)[valid])
    assert len(np.unique(classes[valid])) > 1


def test_a_classifier_labels_windows_and_one_without_pooling_labels_cells() -> None:
    image = noise(112, 112)
    model = head("mpmae_atto", stem_padding="aligned")
    got = predict_raster(model, image, level="L2A", window="tile", kind="logits")
    assert got.shape == (3, 2, 2)
    assert got.stride == 56
    with torch.inference_mode():
        expected = model(prepared(model, image)[:, :, 56:, :56])[0].numpy()
    np.testing.assert_allclose(got.values[:, 1, 0], expected, atol=1e-4)
    cells = head("mpmae_atto", stem_padding="aligned", global_pool="")
    got = predict_raster(cells, image, level="L2A", window="image", kind="logits")
    with torch.inference_mode():
        expected = cells(prepared(cells, image))[0].numpy()
    np.testing.assert_allclose(got.values, expected, atol=1e-4)


def test_a_class_map_keeps_its_colours_and_classes_in_its_overviews(tmp_path: Path) -> None:
    model, out = head("mpmae_atto", stem_padding="aligned", global_pool=""), tmp_path / "out.tif"
    options: dict[str, Any] = {"level": "L2A", "kind": "classes", "classes": ["forest", "b", "ü"]}
    predict_raster(model, noise(8, 8 * 520), out, **options)
    with rasterio.open(out, overview_level=0) as file:
        assert file.shape == (1, 260)
        assert file.colorinterp == (rasterio.enums.ColorInterp.palette,)
        assert file.colormap(1)[1][:3] == colour_of(1)
        assert set(np.unique(file.read(1))) <= {0, 1, 2}
    assert {e.label for e in maps.open_layer(out).entries} <= {"forest", "b", "ü"}


@pytest.mark.parametrize("device", ["cuda:99", "no such device"])
def test_a_device_that_is_not_there_is_told_so(device: str) -> None:
    with pytest.raises(geofm.RasterError, match=f"cannot run on {device}: .*such as cpu"):
        predict_raster(head("mpmae_atto"), noise(64, 64), level="L2A", device=device)


def test_a_models_own_error_is_not_taken_for_a_missing_device() -> None:
    model = head("mpmae_atto")
    with pytest.raises(RuntimeError, match="on the device") as caught, running(model, "cpu"):
        raise RuntimeError("something of the model went wrong on the device")
    assert not isinstance(caught.value, geofm.GeofmError)


def test_the_models_mode_is_left_as_it_was() -> None:
    model = head("mpmae_atto").train()
    model.stages.eval()  # as one that is frozen while the rest is trained
    before = [module.training for module in model.modules()]
    predict_raster(model, noise(64, 64), level="L2A")
    assert [module.training for module in model.modules()] == before
    assert model.training


def test_an_image_beyond_memory_is_refused_before_the_model_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = head("mpmae_atto")
    monkeypatch.setattr("geofm.raster.jobs._MAX_WINDOW_BYTES", 1e8)
    largest = 0
    forward = model.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.shape[-1])
        return forward(x)

    monkeypatch.setattr(model, "forward", watched)
    with pytest.raises(geofm.RasterError, match="in one pass"):
        predict_raster(model, noise(64, 4000), level="L2A", window="image")
    assert largest <= 64


def test_scores_that_are_no_numbers_are_no_class() -> None:
    model = head("mpmae_atto")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    for kind in ("classes", "probabilities"):
        with pytest.raises(geofm.RasterError, match="not finite"):
            predict_raster(model, noise(64, 64), level="L2A", kind=kind)


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (0, {}, "no head"),
        (3, {"kind": "best"}, "kind is"),
        (3, {"classes": ["a"]}, "3 classes, but 1 are named"),
        (3, {"dtype": "uint8"}, "dtype is one of"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    classes: int, options: dict[str, Any], words: str
) -> None:
    model = geofm.create_model("mpmae_atto", bands=BANDS, num_classes=classes)
    with pytest.raises(geofm.GeofmError, match=words):
        predict_raster(model, noise(64, 64), level="L2A", **options)


def test_the_hash_of_the_weights_does_not_depend_on_where_they_were_read_from(
    tmp_path: Path,
) -> None:
    state = head("mpmae_atto").state_dict()
    tags = []
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
        model = geofm.create_model(
            "mpmae_atto", tmp_path / name, trained_bands=BANDS, num_classes=None
        )
        tags.append(weights_tags(model))
        assert tags[-1]["GEOFM_FILE_SHA256"] == sha256_of(tmp_path / name)
    assert tags[0]["GEOFM_WEIGHTS"] != tags[1]["GEOFM_WEIGHTS"]
    assert tags[0]["GEOFM_WEIGHTS_HASH"] == tags[1]["GEOFM_WEIGHTS_HASH"]
