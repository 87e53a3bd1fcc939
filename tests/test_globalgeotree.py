"""Observations: GlobalGeoTree's shards, real series, and what must not pass unnoticed."""

from __future__ import annotations

import csv
import datetime
import functools
import gzip
import importlib
import io
import json
import logging
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from geofm.datasets._places import pixel_size
from geofm.datasets.globalgeotree import (
    BANDS,
    GlobalGeoTree,
    ReadReport,
    ShardError,
    collate,
    read_shards,
    resume_points,
    shards_for,
    write_shards,
)
from geofm.datasets.globalgeotree_samples import TAXA
from geofm.datasets.monthly import read_monthly_folder
from geofm.datasets.observations import (
    DataNotFoundError,
    Observation,
    centre_crop,
    present_months,
)
from geofm.datasets.timeseries import TREESATAI_BANDS, monthly_median, read_series_h5
from geofm.errors import (
    BandError,
    GeofmError,
    MissingExtraError,
    PixelError,
    RasterError,
    UnsafeFileError,
)

VARIABLES = (
    "longitude latitude elevation slope aspect soil_moisture_0_5cm soil_moisture_5_15cm "
    "soil_moisture_15_30cm"
).split() + [f"bio{k:02d}" for k in range(1, 20)]
SHAPE = (12, 10, 5, 5)
TREES = {
    # Coordinates as the data's manifest states them.
    "Abies_alba_1_1005_WEFL_NLF_2020": (9.9585, 52.0852, "aerial_Abies_alba_1_1005_WEFL_NLF"),
    "Betula_spec._1_15679_WEFL_NLF_2019": (
        7.9353,
        52.9113,
        "aerial_Betula_spec._1_15679_WEFL_NLF",
    ),
}


# Shards -------------------------------------------------------------------------------------


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def sample(key: str = "7", **changes: bytes | None) -> dict[str, bytes]:
    """A good sample's members; a change replaces one, None removes it."""
    text = {
        "level0": "Deciduous Broadleaf",
        "level1_family": "Fagaceae",
        "level2_genus": "Quercus",
        "level3_species": "Quercus robur",
    }
    site = {"sample_id": 7, "longitude": 9.5, "latitude": 48.25, "elevation": None, "bio01": 81}
    members: dict[str, bytes | None] = {
        "images.pth": saved(torch.full(SHAPE, 1500.0, dtype=torch.float64)),
        "text.json": json.dumps(text).encode(),
        "auxiliary.json": json.dumps(site).encode(),
    }
    for name, content in changes.items():
        members[{"images": "images.pth"}.get(name, f"{name}.json")] = content
    return {f"{key}.{kind}": content for kind, content in members.items() if content is not None}


def auxiliary(**changes: Any) -> bytes:
    site = {"sample_id": 7, "longitude": 9.5, "latitude": 48.25} | changes
    return json.dumps({k: v for k, v in site.items() if v != "absent"}).encode()


def shard(path: Path, *samples: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for name, content in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_written_shards_are_in_the_published_format(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3)
    with tarfile.open(path) as tar:
        names = [info.name for info in tar]
        assert len(names) == 9
        key = names[0].split(".")[0]
        kinds = ("images.pth", "text.json", "auxiliary.json")
        assert names[:3] == [f"{key}.{kind}" for kind in kinds]
        images = torch.load(tar.extractfile(names[0]), weights_only=True)  # type: ignore[arg-type]
        texts = [json.load(tar.extractfile(f"{k:07d}.text.json")) for k in (1, 2, 3)]  # type: ignore[arg-type]
        site = json.load(tar.extractfile(names[2]))  # type: ignore[arg-type]
    assert images.shape == SHAPE
    assert images.dtype == torch.float64
    assert isinstance(texts[0], dict) and isinstance(texts[2], list)
    assert list(texts[0]) == ["level0", "level1_family", "level2_genus", "level3_species"]
    assert sorted(site) == sorted([*VARIABLES, "sample_id"])


def test_written_samples_are_plausible_and_repeatable(tmp_path: Path) -> None:
    first = list(read_shards(write_shards(tmp_path / "a", 60, per_shard=25)))
    again = list(read_shards(write_shards(tmp_path / "b", 60, seed=0)))
    other = list(read_shards(write_shards(tmp_path / "c", 60, seed=1)))
    assert len(list((tmp_path / "a").glob("*.tar"))) == 3
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.images, two.images, equal_nan=True)
        assert one.auxiliary == two.auxiliary
    assert not np.array_equal(first[0].images, other[0].images, equal_nan=True)
    deciduous = [o for o in first if o.leaf_type == "Deciduous Broadleaf"]
    assert len({o.species for o in first}) == len(TAXA)
    for o in deciduous:
        assert o.latitude is not None and o.latitude > 30
    nir, red = BANDS.index("B8"), BANDS.index("B4")
    year = np.nanmean([o.images for o in deciduous], axis=(0, 3, 4))
    ndvi = (year[:, nir] - year[:, red]) / (year[:, nir] + year[:, red])
    assert ndvi[6] > 0.75
    assert ndvi[0] < 0.5
    for o in first:
        a = o.auxiliary
        assert all(value is None or value == round(value) for k, value in a.items() if "bio" in k)
        if None not in (a["bio05"], a["bio06"], a["bio07"]):
            assert a["bio05"] - a["bio06"] == pytest.approx(a["bio07"], abs=1.01)  # type: ignore[operator]
    missing = [value is None for o in first for value in o.auxiliary.values()]
    assert 0 < sum(missing) < 0.1 * len(missing)
    assert any(np.isnan(o.images).any() for o in first)


def test_given_taxa_are_written(tmp_path: Path) -> None:
    taxa = [("Evergreen Broadleaf", "Lauraceae", "Laurus", "Laurus nobilis"), TAXA[0]]
    read = list(read_shards(write_shards(tmp_path, 4, taxa=taxa)))
    assert [o.taxon for o in read] == [tuple(t) for t in taxa] * 2


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"n": 1, "per_shard": 0}, {"n": 1, "missing": 2.0}, {"n": 1, "taxa": [("a", "b")]}],
)
def test_a_writer_refuses_impossible_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(PixelError):
        write_shards(tmp_path, **wrong)


def test_a_sample_is_read_as_it_was_written(tmp_path: Path) -> None:
    images = torch.arange(3000, dtype=torch.float64).reshape(SHAPE)
    images[4] = torch.nan
    path = shard(tmp_path / "a.tar", sample(images=saved(images)))
    (observation,) = read_shards(path)
    assert observation.sample_id == "7"
    assert observation.key == "7"
    assert observation.taxon == ("Deciduous Broadleaf", "Fagaceae", "Quercus", "Quercus robur")
    assert (observation.longitude, observation.latitude) == (9.5, 48.25)
    assert dict(observation.auxiliary) == {
        "longitude": 9.5,
        "latitude": 48.25,
        "elevation": None,
        "bio01": 81.0,
    }
    assert observation.images.dtype == np.float32
    assert np.array_equal(observation.images, images.float().numpy(), equal_nan=True)
    assert observation.position == (0, 0, 0)
    assert list(observation.month_mask) == [month != 4 for month in range(12)]


def test_order_of_members_lists_and_extra_members_do_not_matter(tmp_path: Path) -> None:
    members = sample(
        "dir/sample_1_9.5_48.25", text=json.dumps([{"level3_species": "x y"}]).encode()
    )
    mixed = list(members.items())[::-1]
    mixed.insert(1, ("dir/sample_1_9.5_48.25.png", b"ignored"))
    path = shard(tmp_path / "a.tar", mixed, sample("2"))
    first, second = read_shards(path)
    assert first.key == "dir/sample_1_9.5_48.25"
    assert first.taxon == (None, None, None, "x y")
    assert second.key == "2"


def test_older_torch_files_and_float32_are_read(tmp_path: Path) -> None:
    value = torch.full(SHAPE, 3.5)
    old = saved(value, _use_new_zipfile_serialization=False)
    (observation,) = read_shards(shard(tmp_path / "a.tar", sample(images=old)))
    assert (observation.images == 3.5).all()


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3)
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(list(read_shards(packed))) == 3
    packed.write_bytes(gzip.compress(path.read_bytes())[:-5000])
    with pytest.raises(ShardError, match="truncated"):
        list(read_shards(packed))


def test_bands_come_by_name(tmp_path: Path) -> None:
    images = torch.arange(10.0, dtype=torch.float64).reshape(1, 10, 1, 1).expand(SHAPE).clone()
    path = shard(tmp_path / "a.tar", sample(images=saved(images)))
    (observation,) = read_shards(path, bands=["B8A", "B02", "nir"])
    assert observation.bands == ("B8A", "B2", "B8")
    assert [observation.images[0, k, 0, 0] for k in range(3)] == [7, 0, 3]
    with pytest.raises(BandError, match="B1"):
        read_shards(path, bands=["B1"])


def test_variables_come_in_the_order_asked_for_and_absent_ones_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard(tmp_path / "a.tar", sample())
    report = ReadReport()
    (observation,) = read_shards(path, auxiliary_names=["bio01", "slope"], report=report)
    assert list(observation.auxiliary.items()) == [("bio01", 81.0), ("slope", None)]
    assert report.absent == {"slope": 1}
    assert "slope" in caplog.text


def flipped(content: bytes) -> bytes:
    """One pixel changed."""
    where = content.rindex(torch.tensor(3.0).numpy().tobytes())
    return content[:where] + b"\x01" + content[where + 1 :]


def bomb() -> bytes:
    """A small archive that unpacks to something large."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    return file.getvalue()


BAD: dict[str, tuple[dict[str, bytes | None], type[GeofmError], str]] = {
    "no text": ({"text": None}, ShardError, "has no text.json"),
    "no images": ({"images": None}, ShardError, "has no images.pth"),
    "bad JSON": ({"text": b'{"level0": '}, ShardError, "text.json is no JSON"),
    "bad bytes": ({"auxiliary": b"\xff\xfe{"}, ShardError, "auxiliary.json is no JSON"),
    "deep JSON": ({"auxiliary": b"[" * 100_000}, ShardError, "auxiliary.json is no JSON"),
    "no object": ({"text": b"[1, 2]"}, ShardError, "list \\[1, 2\\]"),
    "two objects": ({"text": b"[{}, {}]"}, ShardError, "a list with one"),
    "wrong taxon": ({"text": b'{"level0": 3}'}, ShardError, "level0 is int 3"),
    "no latitude": ({"auxiliary": auxiliary(latitude="absent")}, ShardError, "has no latitude"),
    "null longitude": ({"auxiliary": auxiliary(longitude=None)}, ShardError, "has no longitude"),
    "NaN latitude": ({"auxiliary": auxiliary(latitude=float("nan"))}, ShardError, "no latitude"),
    "far longitude": ({"auxiliary": auxiliary(longitude=181)}, ShardError, "-180 to 180"),
    "word": ({"auxiliary": auxiliary(bio01="warm")}, ShardError, "bio01 is str 'warm'"),
    "truth": ({"auxiliary": auxiliary(bio01=True)}, ShardError, "bio01 is bool True"),
    "endless": ({"auxiliary": auxiliary(bio01=float("inf"))}, ShardError, "bio01 is float inf"),
    "huge": ({"auxiliary": auxiliary(bio01=10**400)}, ShardError, "bio01 is int 1000"),
    "wrong shape": ({"images": saved(torch.zeros(12, 10, 5))}, ShardError, r"\(12, 10, 5\)"),
    "wrong type": ({"images": saved(torch.zeros(SHAPE).short())}, ShardError, "torch.int16"),
    "sparse": ({"images": saved(torch.zeros(SHAPE).to_sparse())}, ShardError, "expected a tensor"),
    "meta": (
        {"images": saved(torch.zeros(SHAPE, dtype=torch.float64, device="meta"))},
        ShardError,
        "on meta",
    ),
    "no tensor": ({"images": saved({"a": 1})}, ShardError, "holds dict"),
    "infinite": (
        {"images": saved(torch.full(SHAPE, torch.inf))},
        ShardError,
        "infinite values",
    ),
    "too large": (
        {"images": saved(torch.full(SHAPE, 1e300, dtype=torch.float64))},
        ShardError,
        "infinite values",
    ),
    "empty": ({"images": b""}, ShardError, "damaged or was not written by"),
    "garbage": ({"images": b"hello" * 50}, ShardError, "not written by torch.save"),
    "half": (
        {"images": saved(torch.zeros(SHAPE))[:900]},
        ShardError,
        "damaged or was not written by",
    ),
    "flipped bit": (
        {"images": flipped(saved(torch.full(SHAPE, 3.0)))},
        ShardError,
        "damaged or was not written by",
    ),
    "bomb": ({"images": bomb()}, ShardError, "would take 100,000,000 bytes"),
    "NumPy pickle": (
        {"images": pickle.dumps(np.zeros(SHAPE))},
        UnsafeFileError,
        "Nothing was executed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_told_by_shard_and_key_or_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    changes, error, message = BAD[case]
    path = shard(tmp_path / "trees.tar", sample("1"), sample("bad-2", **changes), sample("3"))
    samples = read_shards(path)
    assert next(samples).key == "1"
    with pytest.raises(error, match=message) as caught:
        next(samples)
    assert str(path) in str(caught.value)
    assert "'bad-2'" in str(caught.value)
    assert isinstance(caught.value, ValueError)

    report = ReadReport()
    caplog.clear()
    keys = [o.key for o in read_shards(path, errors="skip", report=report)]
    assert keys == ["1", "3"]
    assert report.read == 2
    assert report.skipped.total() == 1
    (examples,) = report.examples.values()
    assert "'bad-2'" in examples[0]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 samples read, 1 skipped" in record.message


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "protocol 0"])
def test_a_shard_that_would_execute_code_executes_nothing(tmp_path: Path, form: str) -> None:
    trace = tmp_path / "executed"
    evil = Malicious(trace)
    content = {
        "torch": lambda: saved(evil),
        "old torch": lambda: saved(evil, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(evil),
        "protocol 0": lambda: pickle.dumps(evil, protocol=0),
    }[form]()
    path = shard(tmp_path / "evil.tar", sample("0"), sample("66", images=content))
    with pytest.raises(UnsafeFileError, match=r"evil\.tar, key '66'.*Nothing was executed"):
        list(read_shards(path))
    report = ReadReport()
    assert len(list(read_shards(path, errors="skip", report=report))) == 1
    assert report.skipped == {"unsafe pickle": 1}
    assert not trace.exists()


def test_a_worker_executes_nothing_either(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    path = shard(tmp_path / "evil.tar", sample("66", images=saved(Malicious(trace))))
    error = worker_error(path)
    assert isinstance(error, UnsafeFileError)
    assert "'66'" in str(error)
    assert not trace.exists()


def worker_error(path: Path) -> Exception | None:
    """What a loader with a worker raises."""
    try:
        list(DataLoader(GlobalGeoTree(path), num_workers=1, collate_fn=collate))
    except GeofmError as error:
        # Its frames hold the loader, which, left to the garbage collector, waits 5 s to end.
        return error.with_traceback(None)
    return None


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        program = torch.jit.script(torch.nn.Linear(2, 2))
        file = io.BytesIO()
        torch.jit.save(program, file)
    path = shard(tmp_path / "a.tar", sample("5", images=file.getvalue()))
    with pytest.raises(UnsafeFileError, match="key '5'"):
        list(read_shards(path))


def test_double_and_scattered_and_oversized_members_are_errors(tmp_path: Path) -> None:
    members = list(sample("1").items())
    twice = shard(tmp_path / "a.tar", [*members, members[0]])
    with pytest.raises(ShardError, match=r"'1' has two members images\.pth"):
        list(read_shards(twice))
    other = list(sample("2").items())
    scattered = shard(tmp_path / "b.tar", [members[0], other[0], *members[1:], *other[1:]])
    with pytest.raises(ShardError, match="neighbours"):
        list(read_shards(scattered))
    large = shard(tmp_path / "c.tar", sample("3", images=bytes(33 << 20)))
    with pytest.raises(ShardError, match="'3' has 34,603,008 bytes of images"):
        list(read_shards(large))


def test_wherever_a_shard_is_cut_its_loss_is_told(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
    length = end.offset_data + -(-end.size // 512) * 512
    cut = tmp_path / "cut.tar"
    counts = set()
    for size in [*range(512, length, 4096 - 512), length - 1, length, length + 511]:
        cut.write_bytes(whole[:size])
        report = ReadReport()
        read = list(read_shards(cut, errors="skip", report=report))
        counts.add(len(read))
        assert sum(report.skipped.values()) == 1, size
        with pytest.raises(ShardError, match=r"cut\.tar"):
            list(read_shards(cut))
    assert counts == {0, 1, 2, 3}
    cut.write_bytes(whole[: length + 512])
    assert len(list(read_shards(cut))) == 3


def test_the_cut_sample_is_named_and_the_next_shard_is_read(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, 4, per_shard=2)
    content = first.read_bytes()
    with tarfile.open(first) as tar:
        where = tar.getmembers()[3].offset_data + 100
    first.write_bytes(content[:where])
    with pytest.raises(ShardError, match=r"globalgeotree-000000\.tar is truncated .*'0000002'"):
        list(read_shards(tmp_path))
    report = ReadReport()
    ids = [o.sample_id for o in read_shards([first, second], errors="skip", report=report)]
    assert ids == ["1", "3", "4"]
    assert report.skipped == {"truncated tar": 1}


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        where = tar.getmembers()[4].offset
    content[where + 148 : where + 156] = b"garbage!"
    path.write_bytes(content)
    with pytest.raises(ShardError, match="begins no member"):
        list(read_shards(path))


def test_what_is_no_shard_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.tar"
    page.write_text("<html>not found</html>" * 100)
    with pytest.raises(ShardError, match="no tar file"):
        list(read_shards(page))
    with pytest.raises(FileNotFoundError, match="no shard"):
        read_shards(tmp_path / "absent.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"no \*\.tar"):
        GlobalGeoTree(tmp_path / "empty")
    with pytest.raises(DataNotFoundError, match="no shards"):
        shards_for([])
    with pytest.raises(ValueError, match="'ignore'"):
        read_shards(page, errors="ignore")
    with pytest.raises(ValueError, match="'ignore'"):
        GlobalGeoTree(page, errors="ignore")


# Division and resumption --------------------------------------------------------------------


@given(
    shards=st.integers(1, 12),
    world_size=st.integers(1, 4),
    n_workers=st.integers(1, 4),
    samples=st.integers(0, 40),
)
@settings(deadline=None, max_examples=60)
def test_shares_cover_every_sample_once(
    tmp_path_factory: pytest.TempPathFactory,
    shards: int,
    world_size: int,
    n_workers: int,
    samples: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty-shards"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.tar" for k in range(shards)]
    for path in paths:
        path.touch()
    seen: list[tuple[int, int]] = []
    loads = []
    for rank in range(world_size):
        for worker in range(n_workers):
            shares = shards_for(paths, rank, world_size, worker, n_workers)
            assert [s.shard for s in shares] == sorted(s.shard for s in shares)
            own = [(s.shard, k) for s in shares for k in range(s.offset, samples, s.step)]
            seen += own
            loads.append(sum(1 / s.step for s in shares))
    assert sorted(seen) == [(s, k) for s in range(shards) for k in range(samples)]
    # Nobody gets more than twice the least.
    assert max(loads) <= 2 * min(loads)


def test_impossible_ranks_and_workers_are_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        shards_for(path, rank=2, world_size=2)
    with pytest.raises(ValueError, match="worker -1 of 1"):
        shards_for(path, worker=-1)


@pytest.mark.parametrize("per_shard", [100, 7, 3])
def test_two_workers_read_every_sample_once(tmp_path: Path, per_shard: int) -> None:
    write_shards(tmp_path, 21, per_shard=per_shard)
    collator = functools.partial(collate, auxiliary_names=VARIABLES)
    loader = DataLoader(GlobalGeoTree(tmp_path), batch_size=4, num_workers=2, collate_fn=collator)
    batches = list(loader)
    ids = [int(k) for batch in batches for k in batch["sample_ids"]]
    assert sorted(ids) == list(range(1, 22))
    assert {int(w) for b in batches for w in b["positions"][:, 2]} == {0, 1}
    assert all(batch["auxiliary_names"] == tuple(VARIABLES) for batch in batches)
    alone = list(DataLoader(GlobalGeoTree(tmp_path), batch_size=None))
    assert [o.sample_id for o in alone] == [str(k) for k in range(1, 22)]


def test_ranks_and_workers_together_read_every_sample_once(tmp_path: Path) -> None:
    write_shards(tmp_path, 23, per_shard=9)
    ids: list[str] = []
    for rank in range(3):
        dataset = GlobalGeoTree(tmp_path, rank=rank, world_size=3)
        loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=collate)
        ids += [k for batch in loader for k in batch["sample_ids"]]
    assert sorted(map(int, ids)) == list(range(1, 24))


def test_reading_resumes_where_it_stopped_bad_samples_included(tmp_path: Path) -> None:
    a = shard(tmp_path / "a.tar", sample("1"), sample("2", text=b"?"), sample("3"), sample("4"))
    b = shard(tmp_path / "b.tar", sample("5"), sample("6"))
    everything = list(read_shards([a, b], errors="skip"))
    assert [o.key for o in everything] == list("13456")
    for number, observation in enumerate(everything):
        assert observation.position is not None
        start = (observation.position.shard, observation.position.sample + 1)
        rest = [o.key for o in read_shards([a, b], errors="skip", start=start)]
        assert rest == [o.key for o in everything[number + 1 :]]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_loader_with_workers_resumes_without_loss_or_repetition(
    tmp_path: Path, stop: int
) -> None:
    write_shards(tmp_path, 20, per_shard=6)
    options: dict[str, Any] = {"batch_size": 3, "num_workers": 2, "collate_fn": collate}
    ids: list[str] = []
    start: dict[int, tuple[int, int]] = {}
    for number, batch in enumerate(DataLoader(GlobalGeoTree(tmp_path), **options), start=1):
        ids += batch["sample_ids"]
        start = resume_points(batch["positions"], start)
        if number == stop:
            break
    for batch in DataLoader(GlobalGeoTree(tmp_path, start=start), **options):
        ids += batch["sample_ids"]
    assert sorted(map(int, ids)) == list(range(1, 21))


def test_an_error_in_a_worker_keeps_its_kind_and_reason(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", sample("9", text=b"?"))
    error = worker_error(path)
    assert isinstance(error, ShardError)
    assert "key '9'" in str(error)
    error = pickle.loads(pickle.dumps(ShardError("message", "bad JSON")))
    assert (str(error), error.reason) == ("message", "bad JSON")


def test_a_dataset_keeps_the_report_of_its_last_pass(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", sample("1"), sample("2", text=None))
    dataset = GlobalGeoTree(path, errors="skip", bands=["B4"])
    for _ in range(2):
        assert [o.images.shape for o in dataset] == [(12, 1, 5, 5)]
        assert (dataset.report.read, dataset.report.skipped) == (1, {"missing member": 1})


# Batches ------------------------------------------------------------------------------------


def test_a_batch_has_values_and_masks(tmp_path: Path) -> None:
    images = np.full(SHAPE, 100.0, np.float32)
    images[1] = np.nan  # missing
    images[2, 3] = np.nan  # one band missing: so is the month
    images[3, 0, 0, :2] = np.nan  # two pixels missing
    images[3, 0, 4, 4] = 123.0
    site = {"longitude": 1.0, "latitude": 2.0, "bio01": None}
    one = Observation("1", images, auxiliary=site)
    two = Observation("2", np.zeros(SHAPE, np.float32), auxiliary=site | {"bio01": 81.0})
    batch = collate([one, two])
    assert batch["images"].dtype == torch.float32
    assert batch["images"].shape == (2, *SHAPE)
    assert batch["image_mask"].tolist() == [
        [True, False, False, *[True] * 9],
        [True] * 12,
    ]
    month = batch["images"][0, 3, 0]
    assert month[0, 0] == pytest.approx(101.0)
    assert month[4, 4] == 123.0
    assert torch.isnan(batch["images"][0, 1:3]).all()
    assert torch.isfinite(batch["images"][batch["image_mask"]]).all()
    assert batch["auxiliary_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert torch.isnan(batch["auxiliary"][0, 2])
    assert batch["auxiliary"][1].tolist() == [1.0, 2.0, 81.0]
    assert batch["positions"] is None
    assert batch["taxa"] == [(None,) * 4] * 2
    alone = collate([one])
    assert torch.equal(alone["images"].nan_to_num(-1), batch["images"][:1].nan_to_num(-1))


def test_unlike_observations_make_no_batch() -> None:
    images = np.zeros(SHAPE, np.float32)
    site = {"longitude": 1.0, "latitude": 2.0}
    one = Observation("1", images, auxiliary=site)
    with pytest.raises(PixelError, match="at least one"):
        collate([])
    with pytest.raises(BandError, match="different bands"):
        collate([one, Observation("2", images, BANDS[::-1], auxiliary=site)])
    with pytest.raises(PixelError, match="different shapes"):
        collate([one, Observation("2", images[..., :4], auxiliary=site)])
    with pytest.raises(PixelError, match="variables bio01"):
        collate([one, Observation("2", images, auxiliary=site | {"bio01": 1.0})])
    names = ["bio01", "latitude"]
    batch = collate([one, Observation("2", images, auxiliary={"bio01": 1.0})], names)
    assert batch["auxiliary_mask"].tolist() == [[False, True], [True, False]]


@given(
    hnp.arrays(
        np.float32,
        (2, 2, 3, 5, 5),
        elements=st.one_of(st.just(np.float32("nan")), st.floats(0, 1e4, width=32)),
        fill=st.just(np.float32("nan")),
    )
)
@settings(deadline=None, max_examples=30)
def test_filling_never_touches_what_is_there(images: np.ndarray) -> None:
    bands = ("B2", "B3", "B4")
    batch = collate([Observation(str(k), image, bands) for k, image in enumerate(images)])
    out, mask = batch["images"].numpy(), batch["image_mask"].numpy()
    assert np.array_equal(mask, present_months(images))
    known = np.isfinite(images) & mask[..., None, None, None]
    assert np.array_equal(out[known], images[known])
    assert np.isfinite(out[mask]).all()
    assert np.isnan(out[~mask]).all()


def test_crops_keep_the_middle_or_the_place() -> None:
    pixels = np.arange(36).reshape(6, 6)
    assert centre_crop(pixels)[0, 0] == 0
    assert centre_crop(np.arange(49).reshape(7, 7))[0, 0] == 8
    assert centre_crop(pixels, centre=(3.0, 3.0))[0, 0] == 0
    assert centre_crop(pixels, centre=(5.9, 0.0))[0, 0] == 6
    assert centre_crop(np.arange(100).reshape(10, 10), centre=(5.5, 4.5))[2, 2] == 54
    with pytest.raises(PixelError, match="too small"):
        centre_crop(pixels[:4])
    with pytest.raises(PixelError, match="outside"):
        centre_crop(pixels, centre=(-1.0, 3.0))


# Monthly medians ----------------------------------------------------------------------------


def slow_median(
    dates: list[datetime.date], pixels: np.ndarray, mask: np.ndarray | None, year: int | None
) -> np.ndarray:
    out = np.full((12, *pixels.shape[1:]), np.nan, np.float32)
    for month in range(12):
        for place in np.ndindex(*pixels.shape[1:]):
            values = [
                float(pixels[(t, *place)])
                for t, date in enumerate(dates)
                if date.month == month + 1
                and (year is None or date.year == year)
                and (mask is None or mask[(t, *place[1:])])
                and np.isfinite(pixels[(t, *place)])
            ]
            if values:
                out[(month, *place)] = np.median(values)
    return out


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_monthly_median_is_the_median_of_each_month(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, 12))
    days = st.dates(datetime.date(2019, 1, 1), datetime.date(2020, 12, 31))
    dates = draw.draw(st.lists(days, min_size=count, max_size=count))
    value = st.one_of(st.just(np.float32("nan")), st.floats(0, 1e4, width=32))
    pixels = draw.draw(hnp.arrays(np.float32, (count, 2, 2, 1), elements=value))
    mask = draw.draw(st.one_of(st.none(), hnp.arrays(np.bool_, (count, 2, 1))))
    year = draw.draw(st.sampled_from([None, *{date.year for date in dates}]))
    kept = pixels.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = monthly_median(dates, pixels, mask, year=year)
    assert out.dtype == np.float32
    assert np.array_equal(out, slow_median(dates, pixels, mask, year), equal_nan=True)
    assert np.array_equal(pixels, kept, equal_nan=True)


def test_dates_in_any_form_and_order() -> None:
    pixels = np.array([30, 10, 20, 5], np.uint16).reshape(4, 1, 1, 1)
    texts = ["2020-03-30", "2019-03-01", "2020-03-02T10:30:31Z", "20200401"]
    forms: list[Any] = [
        texts,
        [datetime.datetime.fromisoformat(text) for text in texts],
        [datetime.datetime.fromisoformat(text).date() for text in texts],
        np.array(["2020-03-30", "2019-03-01", "2020-03-02", "2020-04-01"], "datetime64[ns]"),
    ]
    for dates in forms:
        out = monthly_median(dates, pixels)
        assert out[2:4].ravel().tolist() == [20.0, 5.0]
        assert np.isnan(out[[0, 1, *range(4, 12)]]).all()
        assert monthly_median(dates, pixels, year=2020)[2].item() == 25.0


def test_no_data_is_left_out_by_band() -> None:
    pixels = np.array([[0, 7], [4, 0], [8, 0]], np.int16).reshape(3, 2, 1, 1)
    out = monthly_median(["2020-01-01"] * 3, pixels, nodata=0)
    assert out[0].ravel().tolist() == [6.0, 7.0]
    assert monthly_median(["2020-01-01"] * 3, pixels)[0].ravel().tolist() == [4.0, 0.0]


@pytest.mark.parametrize("nodata", [1e20, np.float64(1e20), 0.1, -1.797e308])
def test_no_data_is_recognised_in_the_pixels_own_precision(nodata: float) -> None:
    with np.errstate(over="ignore"):
        pixels = np.array([nodata, 7], np.float32).reshape(2, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = monthly_median(["2020-01-01"] * 2, pixels, nodata=nodata)
    assert out[0].item() == 7.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["2020-01-01"], np.zeros((2, 1, 1, 1))), "1 dates for 2 images"),
        ((["2020-01-01"], np.zeros((1, 1, 1))), r"\(dates, bands, H, W\)"),
        ((["2020-01-01"], np.zeros((1, 1, 1, 1), bool)), "bool"),
        ((["spring"], np.zeros((1, 1, 1, 1))), "'spring' is no ISO 8601 date"),
        (([np.datetime64("NaT")], np.zeros((1, 1, 1, 1))), "a date is None"),
        (([5], np.zeros((1, 1, 1, 1))), "a date is 5"),
        ((["2020-01-01"], np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1))), "True where"),
        ((["2020-01-01"], np.zeros((1, 1, 1, 1)), np.ones((1, 1, 2), bool)), "True where"),
    ],
)
def test_what_makes_no_median_is_told(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PixelError, match=message):
        monthly_median(*arguments)


def test_a_year_without_dates_is_an_error() -> None:
    with pytest.raises(PixelError, match="no date is of 2021; there are 2019, 2020"):
        monthly_median(["2020-01-01", "2019-01-01"], np.zeros((2, 1, 1, 1)), year=2021)


# TreeSatAI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_treesatai_series_become_observations(name: str) -> None:
    h5py = pytest.importorskip("h5py")
    path = data("treesatai_ts", f"{name}.h5")
    longitude, latitude, aerial = TREES[name]
    observation = read_series_h5(path, georeference=data("treesatai_ts", f"{aerial}.tif"))
    assert observation.sample_id == name
    assert observation.images.shape == SHAPE
    assert observation.bands == BANDS
    assert observation.longitude == pytest.approx(longitude, abs=2e-4)
    assert observation.latitude == pytest.approx(latitude, abs=2e-4)
    assert observation.auxiliary["longitude"] == observation.longitude
    assert observation.month_mask.all()

    with h5py.File(path) as file:
        pixels, masks = file["sen-2-data"][()], file["sen-2-masks"][()]
        months = np.array([int(product[15:17]) for product in file["sen-2-products"][()]])
    for month, band in ((1, "B8A"), (6, "B8"), (7, "B2"), (12, "B11")):
        chosen = months == month
        clear = (masks[chosen, 0] <= 1) & (masks[chosen, 1] <= 20)
        values = np.where(clear, pixels[chosen, TREESATAI_BANDS.index(band)], np.nan)
        expected = np.nanmedian(values[:, :5, :5], axis=0)
        found = observation.images[month - 1, BANDS.index(band)]
        assert np.allclose(found, expected)
    blue, red, nir = (observation.images[:, BANDS.index(b)] for b in ("B2", "B4", "B8"))
    ndvi = np.nanmedian((nir - red) / (nir + red), axis=(1, 2))
    # A canopy, not a cloud, in every month; greenest in summer.
    assert np.nanmedian(blue, axis=(1, 2)).max() < 1000
    assert ndvi.min() > 0.3
    assert ndvi.argmax() in (5, 6, 7, 8)


def test_what_counts_as_clear_can_be_chosen() -> None:
    pytest.importorskip("h5py")
    path = data("treesatai_ts", "Abies_alba_1_1005_WEFL_NLF_2020.h5")
    blue = BANDS.index("B2")
    strict = read_series_h5(path)
    # Bright cloud that Sen2Cor takes for snow has no cloud probability.
    loose = read_series_h5(path, max_snow=100.0)
    assert np.nanmedian(loose.images[9, blue]) > 5 * np.nanmedian(strict.images[9, blue])
    none = read_series_h5(path, max_cloud=-1.0)
    assert not none.month_mask.any()
    assert np.isnan(none.images).all()


def test_treesatai_bands_come_by_name_and_the_place_may_be_unknown() -> None:
    pytest.importorskip("h5py")
    path = data("treesatai_ts", "Betula_spec._1_15679_WEFL_NLF_2019.h5")
    everything, few = read_series_h5(path), read_series_h5(path, bands=["B12", "B4"])
    assert np.array_equal(few.images[:, 0], everything.images[:, 9], equal_nan=True)
    assert np.array_equal(few.images[:, 1], everything.images[:, 2], equal_nan=True)
    assert few.longitude is None
    assert few.auxiliary == {"longitude": None, "latitude": None}
    with pytest.raises(BandError, match="B1"):
        read_series_h5(path, bands=["B1"])
    named = read_series_h5(path, longitude=7.9, latitude=52.9, auxiliary={"bio01": 92.0})
    same = read_series_h5(path, auxiliary={"latitude": 52.9, "longitude": 7.9, "bio01": 92.0})
    assert (same.longitude, same.latitude, same.auxiliary) == (7.9, 52.9, named.auxiliary)
    with pytest.raises(RasterError, match="together"):
        read_series_h5(path, longitude=7.9)
    batch = collate([named], ["latitude", "bio01", "bio02"])
    assert batch["auxiliary_mask"].tolist() == [[True, True, False]]


def series(path: Path, **changes: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    contents: dict[str, Any] = {
        "sen-2-data": np.full((3, 10, 6, 6), 1500, np.float32),
        "sen-2-masks": np.zeros((3, 2, 6, 6), np.float32),
        "sen-2-products": [
            f"S2{x}_MSIL2A_2020070{k}T102031_N0214_R065_T32UNC_20200730T110107"
            for k, x in enumerate("ABC", start=1)
        ],
    }
    contents |= {name.replace("_", "-"): value for name, value in changes.items()}
    with h5py.File(path, "w") as file:
        for name, value in contents.items():
            if value is not None:
                file[name] = value
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sen_2_masks": None}, "has no sen-2-masks; it has sen-2-data"),
        ({"sen_2_data": np.zeros((3, 13, 6, 6))}, "10 bands"),
        ({"sen_2_data": np.full((3, 10, 6, 6), 0.2)}, "expected digital numbers"),
        ({"sen_2_masks": np.ones((3, 10, 6, 6))}, "snow and cloud"),
        ({"sen_2_masks": np.zeros((2, 2, 6, 6))}, "snow and cloud"),
        ({"sen_2_masks": np.full((3, 2, 6, 6), 200.0)}, "per cent"),
        ({"sen_2_products": ["S2A_MSIL1C_20200701T1"] * 3}, "no name of a Sentinel-2 L2A product"),
        (
            {"sen_2_products": ["S2A_MSIL2A_20220701T102031_N0400_R065_T32UNC_2022"] * 3},
            "baseline N0400",
        ),
        ({"sen_2_products": ["S2A_MSIL2A_20200701T102031_N0214_"] * 2}, "2 dates for 3 images"),
    ],
)
def test_other_hdf5_files_are_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = series(tmp_path / "a.h5", **changes)
    with pytest.raises(PixelError, match=message):
        read_series_h5(path)


def test_an_offset_is_applied_if_given(tmp_path: Path) -> None:
    products = ["S2A_MSIL2A_20220701T102031_N0400_R065_T32UNC_2022"] * 3
    path = series(tmp_path / "a.h5", sen_2_products=products)
    assert read_series_h5(path, offset=-1000).images[6, 0, 0, 0] == 500
    assert read_series_h5(path, offset=0).images[6, 0, 0, 0] == 1500


def test_an_offset_is_refused_where_it_fits_some_of_the_products_only(tmp_path: Path) -> None:
    products = [
        "S2A_MSIL2A_20210701T102031_N0301_R065_T32UNC_2021",
        "S2A_MSIL2A_20220701T102031_N0400_R065_T32UNC_2022",
        "S2A_MSIL2A_20230701T102031_N0509_R065_T32UNC_2023",
    ]
    path = series(tmp_path / "a.h5", sen_2_products=products)
    with pytest.raises(PixelError, match=r"before 04\.00 and from after.*year=.*offset=0"):
        read_series_h5(path, offset=-1000)
    assert read_series_h5(path, offset=0).images[6, 0, 0, 0] == 1500
    # Of one year all are of one kind.
    assert read_series_h5(path, offset=-1000, year=2022).images[6, 0, 0, 0] == 500
    assert read_series_h5(path, year=2021).images[6, 0, 0, 0] == 1500
    with pytest.raises(PixelError, match="baseline N0509"):
        read_series_h5(path, year=2023)


def test_products_that_do_not_tell_their_baseline_take_any_offset(tmp_path: Path) -> None:
    names = [f"S2A_MSIL2A_20220701T102031_{n}_R065_T32UNC_2022" for n in ("N9999", "N0400")]
    path = series(tmp_path / "a.h5", sen_2_products=[*names, names[1]])
    assert read_series_h5(path, offset=-1000).images[6, 0, 0, 0] == 500


def test_unreadable_hdf5_and_absent_h5py_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = series(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError):
        read_series_h5(tmp_path / "absent.h5")
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(PixelError, match="no readable HDF5"):
        read_series_h5(text)
    hide(monkeypatch, "h5py")
    with pytest.raises(MissingExtraError, match=r"pip install 'geofm\[raster\]'"):
        read_series_h5(path)


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def absent(module: str, package: str | None = None) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(module)
        return real(module, package)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", absent)


# Monthly GeoTIFFs ---------------------------------------------------------------------------


def geotiff(
    path: Path,
    pixels: np.ndarray,
    bands: tuple[str, ...] | None = BANDS,
    corner: tuple[float, float] = (500_000.0, 5_400_000.0),
    side: float = 10.0,
    crs: str | None = "EPSG:32632",
    nodata: float | None = None,
) -> Path:
    rasterio = pytest.importorskip("rasterio")
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff",
        "dtype": pixels.dtype.name,
        "count": len(pixels),
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "crs": crs,
        "transform": rasterio.Affine(side, 0, corner[0], 0, -side, corner[1]),
        "nodata": nodata,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        if bands is not None:
            file.descriptions = bands
    return path


def month_image(month: int, size: int = 5) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (1000 * np.arange(1, 11)[:, None, None] + 100 * month + 10 * rows + columns).astype(
        np.uint16
    )


def test_a_folder_of_monthly_geotiffs_is_an_observation(tmp_path: Path) -> None:
    folder = tmp_path / "plot"
    for name, month in (("s2_1", 1), ("S2_2020-07", 7), ("20201215", 12), ("m_03", 3)):
        image = month_image(month)
        if month == 3:
            image[2, 1, 1] = 0
        geotiff(folder / f"{name}.tif", image[::-1], BANDS[::-1])
    (observation,) = read_monthly_folder(folder)
    assert observation.sample_id == "plot"
    assert list(np.flatnonzero(observation.month_mask) + 1) == [1, 3, 7, 12]
    assert np.array_equal(observation.images[6], month_image(7))
    assert np.isnan(observation.images[2, 2, 1, 1])
    # 25 m east of zone 32's central meridian.
    assert observation.longitude == pytest.approx(9.00034, abs=1e-5)
    assert observation.latitude == pytest.approx(48.75279, abs=1e-5)


def test_a_folder_of_folders_as_the_authors_name_them(tmp_path: Path) -> None:
    for sample_id, longitude in (("12", 9.0005), ("a_b", 9.001)):
        folder = tmp_path / f"sample_{sample_id}_{longitude:.5f}_48.75000"
        # As Earth Engine delivers them: in degrees.
        degree = 10 / 111_320
        corner = (longitude - 3.5 * degree, 48.75 + 3.5 * degree)
        geotiff(folder / "s2_5.tif", month_image(5, 7), corner=corner, side=degree, crs="EPSG:4326")
    (folder / "auxiliary.json").write_text(json.dumps({"sample_id": 1, "bio01": 81, "bio02": None}))
    first, second = read_monthly_folder(tmp_path)
    assert (first.sample_id, first.longitude, first.latitude) == ("12", 9.0005, 48.75)
    assert np.array_equal(first.images[4], month_image(5, 7)[:, 1:6, 1:6])
    assert second.sample_id == "a_b"
    assert second.auxiliary == {
        "bio01": 81.0,
        "bio02": None,
        "longitude": 9.001,
        "latitude": 48.75,
    }


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_of_monthly_geotiffs(tmp_path: Path) -> None:
    for month in (6, 7):
        geotiff(tmp_path / "images" / f"july{month}x.tif", month_image(month, 21))
    rows = [
        {"sample_id": "b", "month": 6, "path": "images/july6x.tif", "longitude": 9.0006,
         "latitude": 48.753},
        {"sample_id": "b", "month": "07", "path": str(tmp_path / "images" / "july7x.tif"),
         "longitude": "", "latitude": ""},
        {"sample_id": "a", "month": 6, "path": "images/july6x.tif", "longitude": "",
         "latitude": ""},
    ]  # fmt: skip
    b, a = read_monthly_folder(table(tmp_path / "list.csv", rows), bands=["B8", "B2"])
    assert (b.sample_id, b.longitude, b.bands) == ("b", 9.0006, ("B8", "B2"))
    # Around the coordinates: 44 m east of the corner, so in the fifth column.
    assert b.images[5, 1, 0, 2] % 10 == 4
    assert np.array_equal(b.images[6] - b.images[5], np.full((2, 5, 5), 100))
    assert np.array_equal(a.images[5, 0], month_image(6, 21)[3, 8:13, 8:13])


def test_reflectance_must_be_said(tmp_path: Path) -> None:
    path = tmp_path / "a"
    geotiff(path / "1.tif", (month_image(1) / 10_000).astype(np.float32))
    with pytest.raises(PixelError, match="looks like reflectance"):
        list(read_monthly_folder(path))
    (observation,) = read_monthly_folder(path, units="reflectance")
    assert np.allclose(observation.images[0], month_image(1), atol=0.01)
    with pytest.raises(PixelError, match="expected 'dn'"):
        read_monthly_folder(path, units="percent")
    geotiff(path / "1.tif", month_image(1))
    with pytest.raises(PixelError, match="no reflectance"):
        list(read_monthly_folder(path, units="reflectance"))


def test_stored_no_data_is_missing(tmp_path: Path) -> None:
    image = month_image(1).astype(np.int16)
    image[:, 2, 2] = -9999
    image[0, 0, 0] = 0
    geotiff(tmp_path / "1.tif", image, nodata=-9999)
    (observation,) = read_monthly_folder(tmp_path)
    assert np.isnan(observation.images[0, :, 2, 2]).all()
    assert np.isnan(observation.images[0]).sum() == 11
    (observation,) = read_monthly_folder(tmp_path, nodata=None)
    assert observation.images[0, 0, 0, 0] == 0


def test_folders_that_cannot_be_read_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FileNotFoundError):
        read_monthly_folder(tmp_path / "absent")
    with pytest.raises(DataNotFoundError, match="no GeoTIFF"):
        read_monthly_folder(tmp_path)
    geotiff(tmp_path / "odd" / "summer.tif", month_image(1))
    with pytest.raises(RasterError, match="does not end in a month"):
        read_monthly_folder(tmp_path / "odd")
    for name in ("2019-07", "2020-07"):
        geotiff(tmp_path / "twice" / f"{name}.tif", month_image(7))
    with pytest.raises(RasterError, match="month 7 is in"):
        read_monthly_folder(tmp_path / "twice")
    geotiff(tmp_path / "nowhere" / "1.tif", month_image(1), crs=None)
    with pytest.raises(RasterError, match="no coordinate"):
        list(read_monthly_folder(tmp_path / "nowhere"))
    geotiff(tmp_path / "small" / "1.tif", month_image(1, 4))
    with pytest.raises(PixelError, match=r"1\.tif: .* too small"):
        list(read_monthly_folder(tmp_path / "small"))
    geotiff(tmp_path / "unnamed" / "1.tif", month_image(1), bands=None)
    with pytest.raises(BandError, match="without names"):
        list(read_monthly_folder(tmp_path / "unnamed"))
    geotiff(tmp_path / "few" / "1.tif", month_image(1)[:9], BANDS[:9])
    with pytest.raises(BandError, match="B12"):
        list(read_monthly_folder(tmp_path / "few"))
    geotiff(tmp_path / "sample_1_12.0_48.75" / "1.tif", month_image(1))
    with pytest.raises(PixelError, match=r"1\.tif: the point .* outside"):
        list(read_monthly_folder(tmp_path / "sample_1_12.0_48.75"))
    geotiff(tmp_path / "coarse" / "1.tif", month_image(1), side=30.0)
    caplog.clear()
    assert len(list(read_monthly_folder(tmp_path / "coarse"))) == 1
    assert "about 30 m" in caplog.text
    (tmp_path / "coarse" / "auxiliary.json").write_text('{"bio01": "warm"}')
    with pytest.raises(RasterError, match="bio01 is 'warm'"):
        read_monthly_folder(tmp_path / "coarse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"month": 13}, "line 2: month is '13'"),
        ({"month": "July"}, "month is 'July'"),
        ({"sample_id": ""}, "sample_id or path is empty"),
        ({"path": "absent.tif"}, "absent.tif"),
        ({"longitude": "east"}, "could not convert"),
        ({"longitude": ""}, "together"),
        ({"latitude": 95}, "no longitude and latitude"),
    ],
)
def test_wrong_rows_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    geotiff(tmp_path / "1.tif", month_image(1))
    row = {"sample_id": "a", "month": 1, "path": "1.tif", "longitude": 9.0, "latitude": 48.75}
    with pytest.raises(GeofmError, match=message):
        read_monthly_folder(table(tmp_path / "list.csv", [row | change]))


def test_wrong_tables_are_told(tmp_path: Path) -> None:
    geotiff(tmp_path / "1.tif", month_image(1))
    row = {"sample_id": "a", "month": 1, "path": "1.tif", "longitude": 9.0, "latitude": 48.75}
    with pytest.raises(RasterError, match="is at"):
        read_monthly_folder(table(tmp_path / "a.csv", [row, row | {"latitude": 48.0, "month": 2}]))
    with pytest.raises(RasterError, match="month 1 is in"):
        read_monthly_folder(table(tmp_path / "b.csv", [row, row]))
    with pytest.raises(RasterError, match="no column month, path"):
        read_monthly_folder(table(tmp_path / "c.csv", [{"sample_id": 1}]))
    empty = tmp_path / "d.csv"
    empty.write_text("sample_id,month,path\n")
    with pytest.raises(DataNotFoundError, match="lists no files"):
        read_monthly_folder(empty)
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RasterError, match="no readable CSV"):
        read_monthly_folder(empty)


def test_rasterio_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "rasterio")
    with pytest.raises(MissingExtraError, match=r"geofm\[raster\]"):
        pixel_size((10, 0, 0, 0, -10, 0), "EPSG:32632")
