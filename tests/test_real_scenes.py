"""Real Sentinel-2, opened as delivered and embedded with the bundled weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import data

import geofm

L2A_BANDS = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split()


def mean_embedding(scene: geofm.Scene | Path, **options) -> np.ndarray:
    """The mean of a scene's cells, (320,)."""
    model = geofm.create_model("mpmae_atto", pretrained="starter", stem_padding="aligned").eval()
    cells = geofm.embed_raster(model, scene, window=112, overlap=0, **options).values
    return np.nanmean(cells, axis=(1, 2))


@pytest.fixture(scope="module")
def embeddings() -> dict[str, np.ndarray]:
    folder = data("ssl4eo_s12")
    found = {}
    for level, product in (("L1C", "s2c"), ("L2A", "s2a")):
        for path in sorted((folder / product).glob("*/20200604*T43RCP*")):
            scene = geofm.open_scene(path, units="dn", level=level, offset=0, align="corner")
            found[f"{level} {path.name[:8]}"] = mean_embedding(scene)
    other = data("s2_scenes", "eotdl_Boadella_2020-01-13.tif")
    found["elsewhere"] = mean_embedding(other, bands=L2A_BANDS, units="dn", level="L2A")
    return found


def test_both_levels_of_a_place_and_day_are_closer_than_another_place(
    embeddings: dict[str, np.ndarray],
) -> None:
    first, second = embeddings["L1C 20200604"], embeddings["L2A 20200604"]
    here = np.linalg.norm(first - second)
    for level in (first, second):
        assert here < np.linalg.norm(level - embeddings["elsewhere"])


def test_cells_of_two_dates_resemble_their_own_place_more_than_others() -> None:
    paths = sorted(data("s2_scenes").glob("eotdl_Boadella_*.tif"))
    assert len(paths) == 2
    model = geofm.create_model("mpmae_atto", pretrained="starter", stem_padding="aligned").eval()
    dates = []
    for path in paths:
        grid = geofm.embed_raster(model, path, bands=L2A_BANDS, units="dn", level="L2A")
        assert grid.tags["GEOFM_LICENCE"] == "Apache-2.0"
        rows = grid.values.reshape(grid.shape[0], -1).T
        rows = rows - rows.mean(0)
        dates.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    similarity = dates[0] @ dates[1].T
    assert np.diag(similarity).mean() > similarity.mean() + 0.2


@pytest.mark.slow
def test_a_cell_of_bands_in_three_resolutions_is_embedded_with_its_georeference(
    tmp_path: Path,
) -> None:
    major = next(path for path in data("major_tom").rglob("B02.tif")).parent
    scene = geofm.open_scene(major, units="dn", level="L2A", offset=0)
    model = geofm.create_model("mpmae_atto", pretrained="starter", stem_padding="aligned").eval()
    geofm.embed_raster(model, scene, tmp_path / "cell.tif", pca=3, dtype="int8")
    with rasterio.open(tmp_path / "cell.tif") as file, rasterio.open(major / "B02.tif") as band:
        assert file.crs == band.crs
        assert (file.height, file.width) == (-(-band.height // 8), -(-band.width // 8))
        assert file.transform.a == 8 * band.transform.a
        assert (file.transform.c, file.transform.f) == (band.transform.c, band.transform.f)
        assert file.tags()["GEOFM_WEIGHTS"].startswith("mpmae_atto.starter")
        values = file.read(1)
        assert len(np.unique(values)) > 50
