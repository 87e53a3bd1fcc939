"""SSL4Eco's folders: what a sample is, what becomes of what cannot be used, and the sampling."""

from __future__ import annotations

import datetime
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from geofm import create_transform
from geofm.cards import published_cards
from geofm.datasets import SSL4Eco, index_places, write_ssl4eco
from geofm.datasets._geotiff import ImageError
from geofm.datasets._report import SkipReport
from geofm.datasets.phenology import (
    SeasonError,
    choose_scenes,
    global_grid,
    season_windows,
)
from geofm.datasets.ssl4eco import BANDS, list_places, place_weights, read_places
from geofm.errors import BandError, DataNotFoundError, PixelError, RasterError, UnsafeFileError

SIZE = 32


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten places of generated samples: 000001 and 000006 have two dates, 000009 a single one."""
    return write_ssl4eco(tmp_path_factory.mktemp("ssl4eco"), n=10, size=SIZE)


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(published, tmp_path / "data"))


def write_image(path: Path, pixels: NDArray[np.generic], names: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width}
    grid = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
    with rasterio.open(path, "w", dtype=pixels.dtype.name, transform=grid, **profile) as file:
        file.write(pixels)
        if names:
            file.descriptions = names
    return path


def plain(value: int, shape: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.uint16]:
    return np.full((13, *shape), value, np.uint16)


def images(root: Path, place: str) -> list[Path]:
    return sorted((root / "imgs" / place).glob("*.tif"))


def values_of(sample: dict[str, torch.Tensor]) -> list[float]:
    return [float(image[0, 0, 0]) for image in sample["image"]]


# --- the format -----------------------------------------------------------------------------------


def test_the_written_samples_have_the_published_layout(published: Path) -> None:
    counts = [len(images(published, f"{i:06d}")) for i in range(10)]
    assert counts == [4, 2, 3, 4, 4, 4, 2, 3, 4, 1]
    assert [path.name for path in published.iterdir()] == ["imgs"]
    for path in images(published, "000000"):
        with rasterio.open(path) as file:
            assert (file.count, set(file.dtypes), file.shape) == (13, {"uint16"}, (SIZE, SIZE))
            assert file.crs is not None
            red, near, ndvi = (file.read(BANDS.index(b) + 1) for b in ("B4", "B8", "NDVI"))
            assert "SYNTHETIC" in file.tags()
        exact = (near.astype(float) - red) / (near.astype(float) + red + 1e-5)
        np.testing.assert_allclose(ndvi, np.clip(exact, 0, None) * 10_000, atol=0.51)


def test_one_seed_writes_the_same_samples(published: Path, tmp_path: Path) -> None:
    again = write_ssl4eco(tmp_path, n=10, size=SIZE)
    other = write_ssl4eco(tmp_path / "other", n=1, size=SIZE, seed=1)
    ours = SSL4Eco(published, size=SIZE)[0]["image"]
    assert torch.equal(ours, SSL4Eco(again, size=SIZE)[0]["image"])
    assert not torch.equal(ours, SSL4Eco(other, size=SIZE)[0]["image"])


def test_a_sample_is_the_first_dates_in_digital_numbers(published: Path) -> None:
    dataset = SSL4Eco(published, bands=["NDVI", "B8A", "blue"], size=SIZE)
    sample = dataset[0]
    assert dataset.bands == ("NDVI", "B8A", "B2")
    assert sample["id"] == "000000"
    assert sample["image"].shape == (3, 3, SIZE, SIZE)
    assert sample["image"].dtype == torch.float32
    for image, path in zip(sample["image"], images(published, "000000"), strict=False):
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(image, file.read([13, 9, 2]).astype(np.float32))
    assert torch.equal(dataset[0]["image"], sample["image"])
    assert dataset[-1]["id"] == "000008"
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_an_unknown_band_is_an_error_that_names_it(published: Path) -> None:
    with pytest.raises(BandError, match="B10"):
        SSL4Eco(published, bands=["B2", "B10"])


def test_places_with_one_image_are_dropped_and_counted(published: Path) -> None:
    dataset = SSL4Eco(published, size=SIZE)
    assert [str(i) for i in dataset.ids] == [f"{i:06d}" for i in range(9)]
    assert dataset.report.counts == {"place with fewer than two images": 1}


def test_other_entries_of_the_folder_are_counted_not_read(folder: Path) -> None:
    (folder / "imgs" / "12345").mkdir()
    (folder / "imgs" / "README").touch()
    (folder / "imgs" / "000000" / "notes.txt").touch()
    (folder / "imgs" / "000000" / "._hidden.tif").touch()
    dataset = SSL4Eco(folder, size=SIZE)
    assert dataset.report.counts["entry that is no place"] == 2
    assert len(dataset.places.paths(folder, 0)) == 4


def test_a_folder_without_places_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="patch id"):
        SSL4Eco(tmp_path)
    (tmp_path / "imgs" / "000000").mkdir(parents=True)
    with pytest.raises(DataNotFoundError, match="no place with two images"):
        SSL4Eco(tmp_path)


def test_a_list_made_once_serves_again_and_cannot_lead_elsewhere(published: Path) -> None:
    places = pickle.loads(pickle.dumps(list_places(published)))
    dataset = SSL4Eco(published, size=SIZE, places=places)
    assert torch.equal(dataset[2]["image"], SSL4Eco(published, size=SIZE)[2]["image"])
    places.files[0] = b"../../secret.tif"
    with pytest.raises(UnsafeFileError, match="secret"):
        dataset[0]


# --- dates ----------------------------------------------------------------------------------------


def test_a_draw_takes_different_dates_and_follows_from_its_generator(tmp_path: Path) -> None:
    for date in range(4):
        write_image(tmp_path / f"imgs/000000/{date}.tif", plain(10 + date))
    dataset = SSL4Eco(tmp_path, size=SIZE)
    drawn = [values_of(dataset.draw(0, np.random.default_rng(seed))) for seed in range(40)]
    assert all(len(set(dates)) == 3 for dates in drawn)
    assert len({tuple(dates) for dates in drawn}) > 10
    assert values_of(dataset.draw(0, np.random.default_rng(3))) == drawn[3]
    assert values_of(dataset[0]) == [10, 11, 12]


def test_of_two_dates_the_second_is_repeated(tmp_path: Path) -> None:
    for date in range(2):
        write_image(tmp_path / f"imgs/000000/{date}.tif", plain(10 + date))
    dataset = SSL4Eco(tmp_path, size=SIZE)
    drawn = {tuple(values_of(dataset.draw(0, np.random.default_rng(s)))) for s in range(20)}
    assert drawn == {(10, 11, 11), (11, 10, 10)}
    two = SSL4Eco(tmp_path, size=SIZE, seasons=2)
    assert len(values_of(two[0])) == 2


def test_a_draw_reads_only_the_dates_it_delivers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = SSL4Eco(folder, size=SIZE, seasons=2)
    opened: list[str] = []
    real = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path: opened.append(path.name) or real(path))
    dataset.draw(0, np.random.default_rng(0))
    assert len(opened) == len(set(opened)) == 2


def test_images_of_different_size_are_cropped_to_one_centre(tmp_path: Path) -> None:
    large = plain(1, (SIZE + 3, SIZE + 2))
    large[:, 1:-2, 1:-1] = 7
    write_image(tmp_path / "imgs/000000/0.tif", large)
    write_image(tmp_path / "imgs/000000/1.tif", plain(7))
    image = SSL4Eco(tmp_path, size=SIZE)[0]["image"]
    assert image.shape == (3, 9, SIZE, SIZE)
    assert (image == 7).all()


def test_batches_come_from_workers(published: Path) -> None:
    loader = DataLoader(SSL4Eco(published, size=SIZE), batch_size=3, num_workers=2)
    batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(3, 3, 9, SIZE, SIZE)] * 3
    assert batches[2]["id"] == ["000006", "000007", "000008"]


# --- what cannot be used --------------------------------------------------------------------------

BAD = {
    "unreadable": None,
    "wrong number of bands": plain(5)[:12],
    "wrong type": plain(5).astype(np.float32),
    "too small": plain(5, (SIZE - 1, SIZE)),
    "empty": plain(0),
    "bad NDVI": plain(20_000),
}


def spoil(path: Path, reason: str) -> None:
    pixels = BAD[reason]
    if pixels is None:
        path.write_bytes(path.read_bytes()[:700])
    else:
        write_image(path, pixels)


@pytest.mark.parametrize("reason", BAD)
def test_an_image_that_cannot_be_used_is_named_or_replaced_by_another_date(
    folder: Path, reason: str
) -> None:
    first, *others = images(folder, "000002")
    spoil(first, reason)
    with pytest.raises(ImageError, match=first.name) as caught:
        SSL4Eco(folder, size=SIZE)[2]
    assert caught.value.reason == reason
    dataset = SSL4Eco(folder, size=SIZE, errors="skip")
    sample = dataset[2]
    assert sample["id"] == "000002"
    assert dataset.report.counts[reason] == 1
    assert first.name in str(dataset.report)
    with rasterio.open(others[1]) as file:
        last = file.read(2).astype(np.float32)
    np.testing.assert_array_equal(sample["image"][1, 0], last)
    np.testing.assert_array_equal(sample["image"][2, 0], last)


def test_bands_in_another_order_are_refused(folder: Path) -> None:
    path = images(folder, "000000")[0]
    write_image(path, plain(5), names=("NDVI", *BANDS[:-1]))
    with pytest.raises(ImageError, match="names its bands NDVI"):
        SSL4Eco(folder, size=SIZE)[0]


def test_a_place_with_one_usable_date_is_replaced_by_the_next_so_batches_stay_whole(
    folder: Path,
) -> None:
    spoil(images(folder, "000006")[0], "unreadable")
    dataset = SSL4Eco(folder, size=SIZE, errors="skip")
    drawn = [dataset.draw(6, np.random.default_rng(5)) for _ in range(2)]
    assert [sample["id"] for sample in drawn] == ["000007", "000007"]
    assert torch.equal(drawn[0]["image"], drawn[1]["image"])
    assert dataset.report.counts["place replaced by the next"] == 2
    # The last place is followed by the first.
    for path in images(folder, "000008"):
        spoil(path, "empty")
    assert dataset[8]["id"] == "000000"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_report_counts_what_all_workers_met(folder: Path, start: str) -> None:
    spoilt = [images(folder, place)[0] for place in ("000002", "000007")]
    for path in spoilt:
        spoil(path, "unreadable")
    dataset = SSL4Eco(folder, size=SIZE, errors="skip")
    before = {"place with fewer than two images": 1}
    assert dataset.report.counts == before
    for passes in (1, 2):
        loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=start)
        assert sum(len(batch["id"]) for batch in loader) == 9
        assert dataset.report.counts == before | {"unreadable": 2 * passes}
    assert all(
        any(path.name in message for message in dataset.report.examples["unreadable"])
        for path in spoilt
    )


def test_a_report_keeps_counting_where_messages_are_long() -> None:
    report = SkipReport()
    for number in range(60):
        for turn in range(3):
            report.add(f"reason {number}", f"{turn}" * 5000, log=False)
    assert report.counts == {f"reason {number}": 3 for number in range(60)}
    copied = pickle.loads(pickle.dumps(report))
    copied.add("reason 0", "more", log=False)
    assert (copied.counts["reason 0"], report.counts["reason 0"]) == (4, 3)


@pytest.mark.parametrize("index", [slice(0, 2), "a"])
def test_what_is_no_number_of_a_place_is_explained(published: Path, index: object) -> None:
    with pytest.raises(TypeError, match="place must be a whole number, got"):
        SSL4Eco(published, size=SIZE)[index]


def test_a_disk_that_is_gone_is_an_error_even_when_skipping(folder: Path) -> None:
    dataset = SSL4Eco(folder, size=SIZE, errors="skip")
    shutil.rmtree(folder / "imgs")
    with pytest.raises(ImageError, match="9 places in a row"):
        dataset[4]


def test_images_smaller_than_the_published_size_say_what_to_give(published: Path) -> None:
    with pytest.raises(ImageError, match=r"32 x 32 px, smaller than size=256; give"):
        SSL4Eco(published)[0]


# --- weights --------------------------------------------------------------------------------------


def three_places(root: Path) -> Path:
    """000000 bare all year, 000001 green in one season, 000002 green."""
    for place, ndvi in enumerate([(500, 900), (500, 3000), (4000, 5000)]):
        for date, value in enumerate(ndvi):
            pixels = plain(1000)
            pixels[-1] = value
            # Half without data, which must not count.
            pixels[:, : SIZE // 2] = 0
            write_image(root / f"imgs/{place:06d}/{date}.tif", pixels)
    return root


def test_bare_places_are_drawn_a_quarter_and_mountains_twice_as_often(tmp_path: Path) -> None:
    three_places(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"import index_places; index_places\('/"):
        SSL4Eco(tmp_path, weights="published")
    index_places(tmp_path)
    weights = SSL4Eco(tmp_path, weights="published").weights
    np.testing.assert_array_equal(weights, [0.25, 1, 1])
    table = tmp_path / "mountains.csv"
    table.write_text("id,mountain\n000000,1\n000001,1\n000002,0\n")
    weights = SSL4Eco(tmp_path, weights="published", mountains=table).weights
    np.testing.assert_array_equal(weights, [0.5, 2, 1])
    table.write_text("id,mountain\n000000,1\n")
    with pytest.raises(DataNotFoundError, match="2 of 3 places are not in the table of mountains"):
        SSL4Eco(tmp_path, weights="published", mountains=table)
    table.write_text("id,mountain\n000000,yes\n")
    with pytest.raises(RasterError, match="line 2"):
        SSL4Eco(tmp_path, weights="published", mountains=table)


def test_the_index_holds_means_of_valid_pixels_and_the_place(folder: Path) -> None:
    three_places(folder)  # overwrites nothing of the generated dates, but adds to them
    for place in ("000000", "000001", "000002"):
        for path in images(folder, place)[2:]:
            path.unlink()
    spoil(images(folder, "000001")[1], "unreadable")
    rows = read_places(index_places(folder, workers=2))
    assert list(rows) == [f"{i:06d}" for i in range(9)]
    np.testing.assert_allclose(rows["000000"].ndvi, [0.05, 0.09])
    np.testing.assert_allclose(rows["000001"].ndvi, [0.05, np.nan])
    # These files have no coordinate system, the generated ones lie in the north of zone 32.
    assert rows["000000"].longitude is None
    assert 6 <= (rows["000003"].longitude or 0) <= 12
    assert 40 <= (rows["000003"].latitude or 0) <= 60
    np.testing.assert_array_equal(place_weights(["000001", "000000"], rows), [0.25, 0.25])
    assert not list(folder.glob(".places*"))


def test_own_weights_must_be_one_positive_number_a_place(published: Path) -> None:
    weights = SSL4Eco(published, weights=[1.0] * 9).weights
    assert weights is not None and weights.shape == (9,)
    for wrong in ([1.0] * 8, [1.0] * 8 + [0.0], [1.0] * 8 + [float("nan")], "sorted"):
        with pytest.raises(PixelError, match="weights"):
            SSL4Eco(published, weights=wrong)


# --- what a model gets ----------------------------------------------------------------------------


def test_the_input_is_that_of_the_published_card(published: Path) -> None:
    dataset = SSL4Eco(published, size=SIZE)
    card = published_cards()["ssl4eco_resnet50.seco_ndvi"].input
    assert dataset.input_spec() == card
    no_index = SSL4Eco(published, bands=["B2", "B8"], size=SIZE).input_spec(96)
    assert (no_index.bands, no_index.size, no_index.derived) == (("B2", "B8"), 96, {})


def test_a_sample_over_255_is_what_users_pixels_become(published: Path) -> None:
    dataset = SSL4Eco(published, size=SIZE)
    stored = SSL4Eco(published, bands=BANDS[:-1], size=SIZE)[0]["image"]
    prepare = create_transform(
        "ssl4eco_resnet50.seco_ndvi", bands=BANDS[:-1], units="dn", level="L2A", fit="any"
    )
    # Stored NDVI is rounded to whole numbers.
    torch.testing.assert_close(prepare(stored), dataset[0]["image"] / 255, atol=0.51 / 255, rtol=0)


# --- building such a data set ---------------------------------------------------------------------

GAPS = st.lists(st.integers(1, 120), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 365), gaps=GAPS)
def test_seasons_tile_the_year_wherever_it_begins(first: int, gaps: list[int]) -> None:
    events = [(first - 1 + sum(gaps[:k])) % 365 + 1 for k in range(4)]
    windows = season_windows(*events)
    assert windows.start.tolist() == events
    assert windows.length.tolist() == [*gaps, 365 - sum(gaps)]
    np.testing.assert_allclose(windows.end, np.roll(windows.start, -1))
    assert ((windows.middle >= 1) & (windows.middle < 366)).all()


def test_winter_wraps_the_year_in_the_north_and_summer_in_the_south() -> None:
    windows = season_windows([100, 280], [150, 330], [240, 60], [300, 130])
    assert windows.length.tolist() == [[50, 90, 60, 165], [50, 95, 70, 150]]
    # 300 + 82.5 days is 17.5; 330 + 47.5 is 12.5.
    assert windows.middle[0, 3] == 17.5
    assert windows.middle[1, 1] == 12.5


def test_events_that_do_not_follow_each_other_are_an_error_and_missing_ones_stay_missing() -> None:
    with pytest.raises(SeasonError, match="do not follow"):
        season_windows(100, 240, 150, 300)
    with pytest.raises(SeasonError, match="1970"):
        season_windows(17_000, 17_050, 17_100, 17_200)
    assert np.isnan(season_windows(np.nan, 150, 240, 300).start).all()


def test_the_clearest_scene_near_the_middle_is_chosen() -> None:
    windows = season_windows(100, 140, 220, 280)  # middles 120, 180, 250, 7.5
    scenes = {
        "2020-04-11": 0,  # day 102: clear, but at the edge of spring
        "2021-05-03": 5,
        "2022-04-29": 5,  # day 119: as clear and nearer to 120
        "2016-06-29": 0,  # before the years
        "2023-06-30": 19,
        "2021-09-07": 20,  # not below 20 %
        "2024-12-31": 3,  # day 366
    }
    chosen = choose_scenes(windows, list(scenes), list(scenes.values()))
    assert [list(scenes)[i] if i >= 0 else None for i in chosen] == [
        "2022-04-29",
        "2023-06-30",
        None,
        "2024-12-31",
    ]
    whole = choose_scenes(windows, list(scenes), list(scenes.values()), near=1.0)
    assert list(scenes)[whole[0]] == "2020-04-11"
    missing = season_windows(np.nan, 140, 220, 280)
    assert choose_scenes(missing, list(scenes), list(scenes.values())).tolist() == [-1] * 4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), first=st.integers(1, 365), gaps=GAPS)
def test_each_season_gets_the_clearest_scene_that_lies_in_it(
    seed: int, first: int, gaps: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    windows = season_windows(*[(first - 1 + sum(gaps[:k])) % 365 + 1 for k in range(4)])
    days = rng.choice(8 * 365, 50, replace=False)
    dates = np.datetime64("2017-01-01") + days
    cloud = rng.uniform(0, 60, 50)
    chosen = choose_scenes(windows, dates, cloud, near=1.0)
    of_year = [min(date.timetuple().tm_yday, 365) for date in dates.astype(datetime.date)]
    for season in range(4):
        ahead = [(day - windows.start[season]) % 365 for day in of_year]
        inside = [i for i in range(50) if ahead[i] < windows.length[season] and cloud[i] < 20]
        best = min(inside, key=lambda i: cloud[i], default=-1)
        assert chosen[season] == best
    taken = chosen[chosen >= 0].tolist()
    assert len(set(taken)) == len(taken)


def test_the_grid_is_as_dense_everywhere_and_has_no_seam() -> None:
    grid = global_grid(100.0)
    assert (np.abs(grid) <= [180, 90]).all()
    # A sphere of this radius has 510 million km2.
    assert len(grid) == pytest.approx(510.1e6 / 100**2, rel=0.005)
    for latitude in (0.0, 45.0, 70.0):
        row = grid[np.abs(grid[:, 1] - latitude) == np.abs(grid[:, 1] - latitude).min()]
        row = row[row[:, 1] == row[0, 1]]
        steps = np.diff(np.concatenate([row[:, 0], row[:1, 0] + 360]))
        km = steps * 111.195 * np.cos(np.deg2rad(row[0, 1]))
        np.testing.assert_allclose(km, 100, rtol=0.01)
    rows = np.unique(grid[:, 1])
    np.testing.assert_allclose(np.diff(rows) * 111.195, 100, rtol=0.01)
    assert rows[0] == pytest.approx(-90 + 0.5 * np.diff(rows)[0])
    inner = global_grid(100.0, latitudes=(-56, 80))
    assert set(map(tuple, inner)) < set(map(tuple, grid))
    with pytest.raises(SeasonError, match="grid"):
        global_grid(0)
