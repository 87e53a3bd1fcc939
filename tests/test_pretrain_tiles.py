"""From GeoTIFFs of one's own region to a model that knows its bands: the recipe of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import geofm
from geofm.datasets.samples import landscape, write_scene
from geofm.pretrain.loop import pretrain
from geofm.pretrain.recipe import load_recipe

DOCS = Path(__file__).resolve().parents[1] / "docs" / "pretraining.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("region")
    (folder / "scenes").mkdir()
    for day in (100, 200):
        write_scene(folder / "scenes" / f"day{day}.tif", landscape((128, 128), day_of_year=day))
    recipe = re.search(r"```yaml\n(method: mpmae\n.*?)```", DOCS.read_text(), re.DOTALL)
    assert recipe is not None
    (folder / "mine.yaml").write_text(recipe[1])
    words = [
        f"data.path={folder / 'scenes'}",
        "train.steps=2",
        "train.batch=4",
        "optimizer.lr=1e-3",
        "card.tag=mine",
        "data.workers=0",
        "output.tensorboard=false",
    ]
    done = pretrain(load_recipe(folder / "mine.yaml", words), folder / "run")
    assert done.progress.step == 2
    return folder / "run"


def test_the_card_names_the_bands_and_their_statistics(run: Path) -> None:
    model = geofm.create_model("mpmae_atto", pretrained=run, num_classes=0)
    assert model.card.input.bands == ("B2", "B3", "B4", "B8")
    assert model.card.input.levels == ("L2A",)
    assert all(value > 0 for value in model.card.input.statistics["L2A"].std)
    prepare = geofm.create_transform(model, bands=["B8", "B4", "B3", "B2"], units="dn", level="L2A")
    pixels = np.random.default_rng(0).integers(300, 4000, (4, 64, 64)).astype(np.uint16)
    with torch.no_grad():
        assert model.eval()(prepare(pixels)[None]).shape == (1, 320)


def test_a_run_on_some_of_a_data_sets_bands_says_so(tmp_path: Path) -> None:
    words = [
        "model.bands=[B4, B8A, B2]",
        "model.modalities=[sentinel2]",
        "train.epochs=null",
        "train.steps=1",
        "train.batch=4",
        "train.effective_batch=4",
        "data.generate.n=8",
        "schedule.warmup_epochs=0",
        "output.tensorboard=false",
    ]
    pretrain(load_recipe("mpmae_atto_mmearth64", words, quick=True), tmp_path)
    model = geofm.create_model("mpmae_atto", pretrained=tmp_path)
    assert model.card.input.bands == ("B4", "B8A", "B2")
    assert model.initial_conv[0].weight.shape[1] == 3
