"""Maps of species: each pixel as if it were an observation of its own, with place and legend."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import geopandas
import h5py
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  (brings .rio)
import torch
import xarray as xr
from conftest import data

import geofm
from geofm import zeroshot
from geofm.datasets import Observation, collate
from geofm.datasets.observations import BANDS
from geofm.maps import open_layer
from geofm.predictions import group_taxa
from geofm.series import SpeciesMap, monthly_composite, species, species_map, species_points
from geofm.series.cube import Cube
from geofm.series.sites import Sites
from geofm.zeroshot import SpeciesClassifier

FLORA = ["Fagus sylvatica", "Quercus robur", "Quercus petraea", "Picea abies", "Pinus sylvestris"]
UTM = "EPSG:32632"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = geofm.create_model("geotreeclip_tiny").eval()
    with torch.no_grad():
        # So that untrained features, all alike, still tell species apart.
        made.logit_scale.fill_(6.0)
    return made


@pytest.fixture(scope="module")
def classifier(model: Any) -> SpeciesClassifier:
    return SpeciesClassifier(model, FLORA)


def months(size: tuple[int, int] = (9, 11), seed: int = 0) -> xr.DataArray:
    """Every pixel its own colour; some unknown values, months and pixels."""
    rng = np.random.default_rng(seed)
    values = rng.integers(100, 9000, (12, 11, 1, 1)) * rng.uniform(0.5, 1, (12, 11, *size))
    values[3] = np.nan
    values[rng.random(values.shape) < 0.02] = np.nan
    values[:, :, 0, 0] = np.nan
    # One band too many, and in another order than the model's.
    names = [*sorted(BANDS), "B1"]
    return xr.DataArray(
        values.astype(np.float32),
        dims=("month", "band", "y", "x"),
        coords={
            "month": range(1, 13),
            "band": names,
            "y": 5_300_000 - 10.0 * np.arange(size[0]),
            "x": 600_000 + 10.0 * np.arange(size[1]),
        },
        attrs={"crs": UTM, "GEOFM_COMPOSITE": "median of 2020"},
    )


def site(array: xr.DataArray, row: int, column: int) -> tuple[float, float]:
    """Longitude and latitude of a pixel, another way."""
    found = rasterio.warp.transform(
        UTM, "EPSG:4326", [float(array.x[column])], [float(array.y[row])]
    )
    return found[0][0], found[1][0]


def alone(
    classifier: SpeciesClassifier, array: xr.DataArray, row: int, column: int, **variables: float
) -> torch.Tensor:
    """Probabilities of one pixel, as an observation."""
    outside = xr.DataArray(array).pad(y=2, x=2, constant_values=np.nan)
    square = outside.sel(band=list(BANDS))[:, :, row : row + 5, column : column + 5].values
    longitude, latitude = site(array, row, column)
    one = Observation(
        "one", square, auxiliary={"longitude": longitude, "latitude": latitude, **variables}
    )
    batch = collate([one])
    auxiliary = dict(zip(batch["auxiliary_names"], batch["auxiliary"].T.tolist(), strict=True))
    return classifier.predict(batch["images"], auxiliary, batch["image_mask"]).probabilities[0]


def read(path: Path) -> tuple[np.ndarray, Any]:
    with rasterio.open(path) as file:
        return file.read(), file


@pytest.mark.parametrize("lazy", [False, True])
def test_each_pixel_is_what_the_classifier_says_of_its_observation(
    classifier: SpeciesClassifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lazy: bool,
) -> None:
    # Several blocks of a small region, which must not show.
    monkeypatch.setattr(species, "_BLOCK", 4)
    array = months()
    slope = xr.DataArray(np.random.default_rng(1).uniform(0, 40, (9, 11)), dims=("y", "x"))
    slope[2, 2] = np.nan
    auxiliary = {
        "elevation": 430,
        "slope": slope,
        "bio12": lambda lon, lat: np.round(lat * 20),
        "bio01": None,
    }
    made = species_map(
        classifier.model,
        array.chunk(month=1, y=4, x=5) if lazy else array,
        auxiliary,
        classifier,
        output=tmp_path / "species.tif",
        batch_size=7,
    )
    classes, _ = read(made.path)
    probabilities, _ = read(made.probabilities)
    np.testing.assert_array_equal(classes[0], made.classes)
    names, groups = group_taxa(classifier.taxa, "family")
    assert made.families == names
    assert len(set(made.classes[1:, 1:].reshape(-1).tolist())) > 1
    assert np.nanmin(probabilities[0]) < 0.7
    assert np.nanstd(probabilities[0]) > 0.02
    for row, column in [(0, 1), (2, 2), (3, 4), (4, 3), (8, 10), (7, 0), (5, 6)]:
        variables: dict[str, Any] = {
            "elevation": 430,
            "slope": float(slope[row, column]),
            "bio12": round(site(array, row, column)[1] * 20),
        }
        wanted = alone(classifier, array, row, column, **variables)
        assert made.classes[row, column] == 1 + int(wanted.argmax())
        sums = torch.zeros(len(names)).index_add_(0, groups, wanted)
        found = torch.from_numpy(probabilities[:, row, column])
        torch.testing.assert_close(found[0], wanted.max(), atol=1e-4, rtol=0)
        torch.testing.assert_close(found[1:], sums, atol=1e-4, rtol=0)


def test_map_has_place_legend_and_what_made_it(model: Any, tmp_path: Path) -> None:
    array = months((6, 7))
    made = species_map(model, array, None, FLORA, output=tmp_path / "trees.tif")
    assert made.probabilities == tmp_path / "trees_probabilities.tif"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trees.tif", "trees_probabilities.tif"]
    with rasterio.open(made.path) as file:
        assert (file.dtypes, file.nodata, file.shape) == (("uint16",), 0, (6, 7))
        assert file.crs.to_epsg() == 32632
        # The corner of the first pixel, not its centre.
        assert tuple(file.transform)[:6] == (10, 0, 599_995, 0, -10, 5_300_005)
        tags = file.tags()
        colours = [file.colormap(1)[i][:3] for i in range(len(FLORA) + 1)]
    assert json.loads(tags["GEOFM_CLASSES"]) == ["no data", *FLORA]
    assert len(set(colours)) == len(FLORA) + 1
    assert tags["GEOFM_WEIGHTS"] == "untrained (random initialisation)"
    assert tags["GEOFM_AUXILIARY"] == "longitude, latitude"
    assert tags["GEOFM_COMPOSITE"] == "median of 2020"
    with rasterio.open(made.probabilities) as file:
        assert file.descriptions == ("probability", "family Fagaceae", "family Pinaceae")
        values, tags = file.read(), file.tags()
    assert tags["GEOFM_WEIGHTS"] == "untrained (random initialisation)"
    assert np.isnan(values[:, 0, 0]).all()
    assert made.classes[0, 0] == 0
    known = made.classes > 0
    assert known.sum() == 41
    np.testing.assert_allclose(values[1:].sum(axis=0)[known], 1, atol=1e-5)
    shown = open_layer(made.path)
    assert {entry.label for entry in shown.entries} <= set(FLORA)
    assert made.table().splitlines()[1].split(maxsplit=3)[3] in FLORA


def test_step_takes_the_central_pixel_of_each_cell(model: Any, tmp_path: Path) -> None:
    array = months()
    one, three = (
        species_map(model, array, None, FLORA, output=tmp_path / f"{n}.tif", step=n, families=False)
        for n in (1, 3)
    )
    np.testing.assert_array_equal(three.classes, one.classes[1::3, 1::3])
    values, file = read(three.probabilities)
    # Of 9 x 11 px; the last cell ends beyond them, but its centre does not.
    assert values.shape == (1, 3, 4)
    assert tuple(file.transform)[:6] == (30, 0, 599_995, 0, -30, 5_300_005)


def test_pixels_after_the_last_centre_of_a_cell_are_not_mapped(model: Any, tmp_path: Path) -> None:
    array = months((9, 11))
    made = species_map(model, array, None, FLORA, output=tmp_path / "s.tif", step=6)
    # Centres at rows 3 and 9, columns 3 and 9: row 9 is outside.
    assert made.classes.shape == (1, 2)


def test_names_are_encoded_once_for_all_blocks(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(species, "_BLOCK", 2)
    calls: list[int] = []
    plain = zeroshot.encode_prompts

    def counted(model: Any, prompts: Any, *rest: Any) -> Any:
        calls.append(len(prompts))
        return plain(model, prompts, *rest)

    monkeypatch.setattr(zeroshot, "encode_prompts", counted)
    species_map(model, months((5, 5)), None, FLORA, output=tmp_path / "s.tif", batch_size=3)
    assert calls == [len(FLORA)]


def test_no_block_reads_more_than_its_pixels_and_a_margin(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(species, "_BLOCK", 4)
    sizes: list[tuple[int, int]] = []
    plain = species.PixelClassifier.predict

    def watched(self: Any, rows: Any, columns: Any) -> Any:
        whole = self.cube.read

        def counted(top: int, left: int, height: int, width: int) -> Any:
            sizes.append((height, width))
            return whole(top, left, height, width)

        monkeypatch.setattr(self.cube, "read", counted)
        yield from plain(self, rows, columns)
        monkeypatch.setattr(self.cube, "read", whole)

    monkeypatch.setattr(species.PixelClassifier, "predict", watched)
    species_map(model, months(), None, FLORA, output=tmp_path / "s.tif", step=2)
    # Of 2 x 2 cells each, but for the last column.
    assert sizes == 2 * [(7, 7), (7, 7), (7, 5)]


def test_points_are_the_map_at_their_pixels(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(species, "_BLOCK", 4)
    array = months()
    made = species_map(model, array, None, FLORA, output=tmp_path / "s.tif")
    values, _ = read(made.probabilities)
    pixels = [(8, 10), (0, 0), (2, 2), (5, 1)]
    places = [site(array, *pixel) for pixel in pixels]
    output = tmp_path / "points.parquet"
    rows = species_points(model, array, None, FLORA, places, output=output, top_k=3)
    table = geopandas.read_parquet(output)
    assert table.crs.to_string() == "OGC:CRS84"
    np.testing.assert_allclose(table.geometry.x, [lon for lon, _ in places])
    np.testing.assert_allclose(table.geometry.y, [lat for _, lat in places])
    for number, pixel in enumerate(pixels):
        row, line = rows[number], table.iloc[number]
        if pixel == (0, 0):
            assert row["species"] is None
            assert line.isna()[["species", "probability", "top_species", "family_Fagaceae"]].all()
            continue
        assert row["species"] == line["species"] == FLORA[made.classes[pixel] - 1]
        assert list(line["top_species"]) == row["top_species"]
        assert len(row["top_species"]) == 3
        np.testing.assert_allclose(row["probability"], values[0][pixel], atol=1e-5)
        np.testing.assert_allclose(line["probability"], values[0][pixel], atol=1e-5)
        families = [line["family_Fagaceae"], line["family_Pinaceae"]]
        np.testing.assert_allclose(families, values[(slice(1, None), *pixel)], atol=1e-5)
    regular = species_points(model, array, None, FLORA, 4)
    assert [row["species"] for row in regular] == [
        FLORA[c - 1] for c in made.classes[2::4, 2::4].reshape(-1)
    ]
    with pytest.raises(
        geofm.RasterError, match=r"1 of 2 points lie outside .* number 1 is at 0, 0"
    ):
        species_points(model, array, None, FLORA, [places[0], (0.0, 0.0)])


def test_table_of_a_large_map_takes_little_memory(classifier: SpeciesClassifier) -> None:
    classes = np.zeros((9000, 1000), np.uint16)
    classes[3:, :] = 2
    grid = species.Grid((1, 9000, 1000), (1, 0, 0, 0, -1, 0), None)
    made = SpeciesMap(Path("a"), Path("b"), classes, classifier.taxa, (), grid)
    tracemalloc.start()
    try:
        table = made.table()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.splitlines()[1:] == ["    2   8997000  100.0%  Quercus robur"]
    # In 8 bytes a cell, as it is counted, the whole would be 72 MB.
    assert peak < 10e6


def test_a_failure_leaves_neither_file_new_and_promises_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "s.tif"
    both = [output, tmp_path / "s_probabilities.tif"]
    for path in both:
        path.write_text("before")
    # While one, then the other is put together.
    for place in ("geofm.raster.cog.check_complete", "geofm.embeddings.rasters.check_complete"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(geofm.RasterError, match="the disk is full") as caught:
                species_map(model, months((4, 4)), None, FLORA, output=output)
        for path in both:
            assert str(path) in str(caught.value)
        assert "nothing is kept" in str(caught.value)
        assert "are kept" not in str(caught.value)
        assert ".geofm-" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == both
        assert [path.read_text() for path in both] == ["before", "before"]


def test_a_disk_too_small_for_the_probabilities_is_told(model: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A row of three bands takes 3 x 11 x 4 bytes, and there are nine.
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        with pytest.raises(geofm.RasterError, match=r"where probabilities wait.*Nothing is kept"):
            species_map(model, months(), None, FLORA, output=tmp_path / "s.tif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_points_that_cannot_be_written_are_refused_before_anything_is_computed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(species, "PixelClassifier", None)

    def points(output: Path) -> None:
        species_points(model, months((4, 4)), None, FLORA, 2, output=output)

    with pytest.raises(geofm.RasterError, match="there is no folder"):
        points(tmp_path / "none" / "p.parquet")
    with pytest.raises(geofm.RasterError, match="is a folder"):
        points(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(geofm.MissingExtraError, match=r"geofm\[embeddings\]"):
        points(tmp_path / "p.parquet")


def test_a_variable_in_another_unit_is_told_with_its_pixel(model: Any, tmp_path: Path) -> None:
    array = months((6, 7)).fillna(1000.0)
    warmest = xr.DataArray(np.full((6, 7), 213.4), dims=("y", "x"))
    options: dict[str, Any] = {"output": tmp_path / "s.tif", "batch_size": 4}
    # An annual mean of 4.5 degC in interpolated tenths.
    species_map(model, array, {"bio01": 45.3}, FLORA, **options)
    species_map(model, array, {"bio01": 45.3, "bio10": warmest}, FLORA, **options)
    warmest[2, 5] = 21.3
    with pytest.raises(
        geofm.AuxiliaryError, match=r"bio01 of the pixel at row 2, column 5 is 45\.3: .*Celsius"
    ):
        species_map(model, array, {"bio01": 45.3, "bio10": warmest}, FLORA, **options)
    elevation = xr.DataArray(np.full((6, 7), 300), dims=("y", "x"))
    elevation[4, 1] = -9999
    with pytest.raises(geofm.AuxiliaryError, match="elevation of the pixel at row 4, column 1 is"):
        species_map(model, array, {"elevation": elevation}, FLORA, **options)
    with pytest.raises(geofm.AuxiliaryError, match="elevation of the pixel at row 4, column 1 is"):
        species_points(model, array, {"elevation": elevation}, FLORA, 1)


def test_species_named_twice_are_warned_of_once(model: Any, tmp_path: Path) -> None:
    names = [*FLORA, FLORA[0]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = species_map(model, months((4, 4)), None, names, output=tmp_path / "s.tif")
    told = [str(w.message) for w in caught if "name of another taxon" in str(w.message)]
    assert len(told) == 1
    assert FLORA[0] in told[0]
    assert len(made.taxa) == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a * 0, r"only zeros in rows 0 to 3, columns 0 to 3; .*\(..., nodata=0\)"),
        (lambda a: a.where(a.x != a.x[1], 65535), "go from .* to 65535.*no-data value"),
        (lambda a: a.where(a.x != a.x[1], -9999), "go from -9999 .*no-data value"),
        (lambda a: a / 10_000, "highest value in rows 0 to 3, columns 0 to 3 .*reflectance"),
    ],
)
def test_what_is_no_digital_number_is_told_with_a_place_inside_the_region(
    model: Any, tmp_path: Path, change: Any, says: str
) -> None:
    array = change(months((4, 4)).fillna(1000.0))
    with pytest.raises(geofm.PixelError, match=says):
        species_map(model, array, None, FLORA, output=tmp_path / "s.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fill", [1e20, np.float64(1e20), np.float32(1e20), 65535])
def test_fill_values_are_recognised_in_the_pixels_own_precision(fill: float) -> None:
    array = months((4, 4)).fillna(1000.0).assign_attrs(_FillValue=fill)
    array[5, :, 1, 2] = fill
    found = Cube(array, BANDS).read(0, 0, 4, 4)
    assert np.isnan(found[5, :, 1, 2]).all()
    assert np.isfinite(found).sum() == found.size - 10


def test_fill_values_of_variables_are_not_known(model: Any) -> None:
    slope = xr.DataArray(np.full((4, 4), 7, np.float32), dims=("y", "x"))
    slope = slope.assign_attrs(_FillValue=np.float64(-1e20))
    slope[1, 2] = -1e20
    sites = Sites({"slope": slope}, model.variables, Cube(months((4, 4)), BANDS))
    found = sites.table(np.array([1, 1]), np.array([1, 2]))[:, sites.names.index("slope")]
    np.testing.assert_array_equal(found, [7, np.nan])


def epsg(array: xr.DataArray) -> int | None:
    crs = Cube(array, BANDS).grid.crs
    return None if crs is None else rasterio.crs.CRS.from_wkt(crs).to_epsg()


def test_the_declared_grid_mapping_tells_the_reference_system() -> None:
    bare = months((4, 4)).drop_attrs()
    assert epsg(bare) is None
    written = bare.rio.write_crs("EPSG:32633")
    assert epsg(written) == 32633
    # From before a reprojection, and before the declared one in the order of coordinates.
    stale = bare.rio.write_crs("EPSG:4326").assign_attrs(crs="EPSG:3857")
    named = stale.rio.write_crs("EPSG:32633", grid_mapping_name="here")
    assert list(named.coords).index("spatial_ref") < list(named.coords).index("here")
    assert named.encoding["grid_mapping"] == "here"
    assert epsg(named) == 32633
    declared = named.assign_attrs(grid_mapping="here")
    declared.encoding.clear()
    assert epsg(declared) == 32633
    # One that is named, but not there, tells nothing.
    assert epsg(named.drop_vars("here")) == 4326
    assert epsg(written.assign_coords(crs=0)) == 32633


@pytest.mark.parametrize("lazy", [False, True])
def test_the_grid_mapping_survives_the_composite(lazy: bool) -> None:
    dates = np.array(["2020-01-05", "2020-07-05"], dtype="datetime64[ns]")
    dated = months((4, 4))[:2].drop_attrs().rename(month="time").assign_coords(time=dates)
    dated = dated.rio.write_crs("EPSG:4326").rio.write_crs("EPSG:32633", grid_mapping_name="here")
    monthly = monthly_composite(dated.chunk(time=1) if lazy else dated)
    assert monthly.rio.crs.to_epsg() == 32633
    assert epsg(monthly) == 32633


def test_months_that_a_pixel_needs_can_be_set(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = months((5, 5)).fillna(1000.0)
    array[4:, :, 2, 2] = np.nan
    made = species_map(model, array, None, FLORA, output=tmp_path / "a.tif", min_months=5)
    assert (made.classes == 0).sum() == 1
    assert made.classes[2, 2] == 0
    with caplog.at_level(logging.WARNING):
        made = species_map(model, array * np.nan, None, FLORA, output=tmp_path / "b.tif")
    assert not made.classes.any()
    assert "no pixel of the map has data" in caplog.text


def test_worldcereal_months_are_mapped(model: Any, tmp_path: Path) -> None:
    with h5py.File(data("worldcereal", "worldcereal_preprocessed_inputs.nc")) as file:
        names = [name for name in file if name.startswith("S2-L2A-B")]
        part = (slice(None), slice(40, 52), slice(30, 44))
        # Unsigned numbers in a signed type, as its attributes say.
        values = np.stack([file[name][part].view(np.uint16) for name in names], axis=1)
        series = xr.DataArray(
            values,
            dims=("time", "band", "y", "x"),
            coords={
                "time": file["t"][:].astype("timedelta64[D]") + np.datetime64("1990-01-01", "ns"),
                "band": [name.removeprefix("S2-L2A-") for name in names],
                "y": file["y"][part[1]],
                "x": file["x"][part[2]],
            },
            attrs={"crs": file["crs"].attrs["crs_wkt"].decode(), "_FillValue": 65535},
        )
        elevation = xr.DataArray(file["elevation"][:][0][part[1:]], dims=("y", "x"))
    monthly = monthly_composite(series.chunk(time=1), nodata=0)
    missing = np.isnan(monthly.values).all(axis=(1, 2, 3))
    assert missing.sum() == 2
    with pytest.raises(geofm.BandError, match="B8A"):
        species_map(model, monthly, None, FLORA, output=tmp_path / "s.tif")
    # The nearest band stands in for it, which is the user's choice.
    stand_in = monthly.sel(band=["B08"]).assign_coords(band=["B8A"])
    monthly = xr.concat([monthly, stand_in], "band")
    made = species_map(
        model, monthly, {"elevation": elevation}, FLORA, output=tmp_path / "s.tif", step=3
    )
    assert made.classes.shape == (4, 5)
    assert made.classes.all()
    west, south, east, north = made.grid.extent()
    assert 5.2 < west < east < 5.4
    assert 50.5 < south < north < 50.7


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        (lambda a: a.values, {}, geofm.PixelError, "xarray.DataArray, got ndarray"),
        (lambda a: a.rename(month="time"), {}, geofm.PixelError, "monthly_composite"),
        (lambda a: a[:11], {}, geofm.PixelError, "12 months, got 11"),
        (lambda a: a.assign_coords(month=range(12)), {}, geofm.PixelError, "numbers 1 to 12"),
        (lambda a: a.drop_vars("band"), {}, geofm.BandError, "have no names"),
        (lambda a: a.drop_sel(band="B8A"), {}, geofm.BandError, r"B8A.*xr\.concat"),
        (lambda a: a.drop_attrs(), {}, geofm.RasterError, "crs='EPSG:32632'"),
        (lambda a: a.drop_vars("x"), {}, geofm.RasterError, "no coordinate 'x'"),
        (lambda a: a, {"crs": "nowhere"}, geofm.RasterError, "'nowhere' is no coordinate"),
        (lambda a: a / 10_000, {}, geofm.PixelError, "looks like reflectance"),
        (lambda a: a, {"species": ["Arbor ficta"]}, geofm.TaxonError, "Arbor ficta"),
        (lambda a: a, {"auxiliary": {"bio20": 1}}, geofm.AuxiliaryError, "bio20; known are"),
        (lambda a: a, {"auxiliary": {"slope": "3"}}, geofm.AuxiliaryError, "slope is a str"),
        (lambda a: a, {"auxiliary": {"slope": months((3, 3))[0, 0]}}, geofm.AuxiliaryError, "'y'"),
        (
            lambda a: a,
            {"auxiliary": {"slope": months((4, 4))[0, 0].assign_coords(x=[1, 2, 3, 4])}},
            geofm.AuxiliaryError,
            "slope lies elsewhere",
        ),
        (
            lambda a: a,
            {"auxiliary": {"slope": lambda lon, lat: 3}},
            geofm.AuxiliaryError,
            "expected a number for each",
        ),
        (lambda a: a, {"window": 4}, geofm.RasterError, "window is an odd number"),
        (lambda a: a, {"step": 0}, geofm.RasterError, "step is a number"),
        (lambda a: a, {"step": 9}, geofm.RasterError, "4 x 4 px has no centre of a cell of 9 px"),
        (lambda a: a[:, :, :1], {"step": 2}, geofm.RasterError, "a single pixel along y"),
        (lambda a: a, {"output": "."}, geofm.RasterError, "the output is a folder"),
        (lambda a: a, {"min_months": 0}, geofm.RasterError, "min_months"),
        (lambda a: a, {"batch_size": 0}, geofm.RasterError, "batch_size"),
        (lambda a: a, {"output": "none/s.tif"}, geofm.RasterError, "there is no folder"),
    ],
)
def test_what_does_not_fit_is_told_and_leaves_nothing(
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    options: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"auxiliary": None, "species": FLORA, **options}
    with pytest.raises(error, match=says):
        species_map(model, change(months((4, 4))), **arguments)
    assert not list(tmp_path.iterdir())


def test_array_without_crs_is_mapped_where_the_place_is_given(model: Any, tmp_path: Path) -> None:
    given = {"longitude": 10.3, "latitude": 47.8}
    array = months((4, 4)).drop_attrs()
    made = species_map(model, array, given, FLORA, output=tmp_path / "s.tif")
    assert made.grid.crs is None
    assert made.classes.any()


def test_model_that_normalizes_by_batch_is_refused(tmp_path: Path) -> None:
    model = geofm.create_model("geotreeclip_tiny", normalization="batch")
    with pytest.raises(geofm.ModelError, match="normalization='fixed'"):
        species_map(model, months((4, 4)), None, FLORA, output=tmp_path / "s.tif")
    with pytest.raises(geofm.ModelError, match="GeoTreeCLIP, got Linear"):
        species_map(torch.nn.Linear(1, 1), months((4, 4)), None, FLORA, output=tmp_path / "s.tif")
