"""GlobalGeoTree for pretraining: endless, shuffled, divided, resumed exactly, and from the hub."""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import HubHost, serving
from torch.utils.data import DataLoader, default_collate

from geofm.datasets import globalgeotree_stream as module
from geofm.datasets.globalgeotree import GlobalGeoTree, ShardError, collate, read_shards
from geofm.datasets.globalgeotree_hub import HubShard, shards_at, shards_from_hub
from geofm.datasets.globalgeotree_samples import write_shards
from geofm.datasets.globalgeotree_stream import GlobalGeoTreeStream, ResumeError
from geofm.datasets.observations import DataNotFoundError
from geofm.errors import DownloadError

REPO = "geo/trees"
COMMIT = "1234567890" * 4
NAMES = ("train/t-00.tar", "train/t-01.tar", "train/t-02.tar")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven shards of 1 to 11 samples, 40 together."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = (7, 3, 11, 5, 1, 4, 9)
    for k, size in enumerate(sizes):
        (path,) = write_shards(folder / str(k), size, seed=k)
        _renamed(path, folder / f"{k}.tar", f"{k}-")
    return sorted(folder.glob("*.tar"))


def _renamed(source: Path, target: Path, prefix: str) -> None:
    """Give each sample an identifier that no other shard has."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for info in old:
            file = old.extractfile(info)
            assert file is not None
            content = file.read()
            if info.name.endswith("auxiliary.json"):
                values = json.loads(content)
                content = json.dumps(values | {"sample_id": f"{prefix}{info.name[:7]}"}).encode()
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))


ALL = 40


def take(stream: GlobalGeoTreeStream, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(stream, count))


def ids(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["id"] for sample in samples]


class Loader:
    """What a DataLoader does with an iterable data set, in this process."""

    def __init__(
        self, stream: GlobalGeoTreeStream, n_workers: int, size: int, patch: pytest.MonkeyPatch
    ) -> None:
        self.size = size
        self.readers = []
        for number in range(n_workers):
            info = type("Info", (), {"id": number, "num_workers": n_workers})
            patch.setattr(module, "get_worker_info", lambda info=info: info)
            # A worker has a copy of the data set.
            self.readers.append(iter(copy.deepcopy(stream)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for reader in itertools.cycle(self.readers):
            yield default_collate(list(itertools.islice(reader, self.size)))


# The stream ----------------------------------------------------------------------------------


def test_a_sample_is_what_the_shard_holds(shards: list[Path]) -> None:
    stream = GlobalGeoTreeStream(shards[0], mix=1, block=1)
    names = [variable.name for variable in stream.variables]
    assert len(names) == 27
    for sample, observation in zip(take(stream, 7), read_shards(shards[0]), strict=True):
        expected = collate([observation], names)
        assert sample["id"] == observation.sample_id
        torch.testing.assert_close(sample["image"], expected["images"][0], equal_nan=True)
        torch.testing.assert_close(sample["auxiliary"], expected["auxiliary"][0], equal_nan=True)
        assert sample["prompt"] == " / ".join(str(level) for level in observation.taxon)
    batch = default_collate(take(stream, 3))
    assert batch["image"].shape == (3, 12, 10, 5, 5)
    assert batch["auxiliary"].shape == (3, 27)
    assert len(batch["prompt"]) == len(batch["id"]) == 3


def test_every_epoch_has_all_samples_in_another_order_the_same_for_one_seed(
    shards: list[Path],
) -> None:
    seen = ids(take(GlobalGeoTreeStream(shards, block=4), 3 * ALL))
    epochs = [seen[i : i + ALL] for i in range(0, 3 * ALL, ALL)]
    assert all(len(set(epoch)) == ALL for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(take(GlobalGeoTreeStream(shards, block=4), 3 * ALL)) == seen
    assert ids(take(GlobalGeoTreeStream(shards, block=4, seed=1), ALL)) != seen[:ALL]
    assert ids(take(GlobalGeoTreeStream(shards, block=4, epoch=1), 2 * ALL)) == seen[ALL:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_what_it_left_out_over_its_workers(
    shards: list[Path], tmp_path: Path, workers: int
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shards[2].read_bytes()[: shards[2].stat().st_size // 2])
    stream = GlobalGeoTreeStream([shards[0], cut], block=4, errors="skip")
    assert stream.report.counts == {}
    for _ in zip(range(8), DataLoader(stream, 5, num_workers=workers), strict=False):
        pass
    assert stream.report.counts["truncated tar"] >= 2
    assert str(cut) in stream.report.examples["truncated tar"][0]


def test_samples_of_several_shards_are_mixed(shards: list[Path]) -> None:
    near = [len({k[0] for k in w}) for w in _windows(ids(take(GlobalGeoTreeStream(shards), ALL)))]
    assert np.mean(near) > 2
    apart = ids(take(GlobalGeoTreeStream(shards, mix=1), ALL))
    assert len([1 for a, b in itertools.pairwise(apart) if a[0] != b[0]]) == 6
    assert apart[:3] != sorted(apart[:3]) or apart[5:9] != sorted(apart[5:9])


def _windows(values: list[str]) -> list[list[str]]:
    return [values[i : i + 4] for i in range(len(values) - 4)]


@given(
    world_size=st.integers(1, 3),
    n_workers=st.integers(1, 3),
    size=st.integers(1, 5),
    mix=st.integers(1, 3),
    block=st.integers(1, 6),
    stop=st.integers(1, 14),
    more=st.integers(1, 8),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=15)
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(
    shards: list[Path],
    world_size: int,
    n_workers: int,
    size: int,
    mix: int,
    block: int,
    stop: int,
    more: int,
    seed: int,
) -> None:
    for rank in range(world_size):
        options: dict[str, Any] = {"seed": seed, "mix": mix, "block": block}
        options |= {"rank": rank, "world_size": world_size}
        with pytest.MonkeyPatch.context() as patch:
            whole = Loader(GlobalGeoTreeStream(shards, **options), n_workers, size, patch)
            expected = [b["id"] for b in itertools.islice(whole, stop + more)]
            keeper = GlobalGeoTreeStream(shards, **options)
            batches = list(itertools.islice(Loader(keeper, n_workers, size, patch), stop))
            for batch in batches:
                state = keeper.state_after(batch)
            resumed = GlobalGeoTreeStream(shards, **options)
            resumed.load_state(json.loads(json.dumps(state)))
            rest = list(itertools.islice(Loader(resumed, n_workers, size, patch), more))
            assert [b["id"] for b in batches + rest] == expected
            # A second interruption, soon after the first.
            state = resumed.state_after(rest[0])
            again = GlobalGeoTreeStream(shards, **options)
            again.load_state(state)
            last = itertools.islice(Loader(again, n_workers, size, patch), more - 1)
            assert [b["id"] for b in last] == expected[stop + 1 :]


@given(world_size=st.integers(1, 4), n_workers=st.integers(1, 3), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=12)
def test_ranks_and_workers_together_read_an_epoch_once(
    shards: list[Path], world_size: int, n_workers: int, epoch: int
) -> None:
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world_size):
            stream = GlobalGeoTreeStream(
                shards, epoch=epoch, mix=2, block=3, rank=rank, world_size=world_size
            )
            for reader in Loader(stream, n_workers, 1, patch).readers:
                own = itertools.takewhile(lambda s: int(s["position"][0]) == epoch, reader)
                seen.update(sample["id"] for sample in own)
    assert len(seen) == ALL
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_real_loader_resumes_exactly(shards: list[Path], num_workers: int) -> None:
    def loader(stream: GlobalGeoTreeStream) -> Any:
        return DataLoader(stream, batch_size=4, num_workers=num_workers)

    expected = [b["id"] for b in itertools.islice(loader(GlobalGeoTreeStream(shards)), 9)]
    keeper = GlobalGeoTreeStream(shards)
    for batch in itertools.islice(loader(keeper), 5):
        state = keeper.state_after(batch)
    resumed = GlobalGeoTreeStream(shards)
    resumed.load_state(state)
    assert resumed.state() == state
    assert [b["id"] for b in itertools.islice(loader(resumed), 4)] == expected[5:]


def test_a_state_of_other_data_or_processes_is_refused(shards: list[Path]) -> None:
    stream = GlobalGeoTreeStream(shards)
    state = stream.state_after(default_collate(take(stream, 2)))
    for other, message in (
        (GlobalGeoTreeStream(shards[1:]), "shards"),
        (GlobalGeoTreeStream(shards, seed=1), "seed 0"),
        (GlobalGeoTreeStream(shards, block=8), "block 256"),
        (GlobalGeoTreeStream(shards, rank=1, world_size=2), "rank 0"),
    ):
        with pytest.raises(ResumeError, match=message):
            other.load_state(state)
    same = GlobalGeoTreeStream(shards)
    same.load_state(state)
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(ResumeError, match="of 1 workers, but there are 2"):
            Loader(same, 2, 2, patch)
        other = next(iter(Loader(GlobalGeoTreeStream(shards), 2, 2, patch)))
    with pytest.raises(ResumeError, match="a batch of 2 workers after batches of 1"):
        same.state_after(other)


def broken(path: Path, source: Path, number: int, member: str, content: bytes) -> Path:
    """A shard of which one member is another."""
    with tarfile.open(source) as old, tarfile.open(path, "w") as new:
        for info in old:
            file = old.extractfile(info)
            assert file is not None
            value = content if info.name == f"{number:07d}.{member}" else file.read()
            info.size = len(value)
            new.addfile(info, io.BytesIO(value))
    return path


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("text.json", b"?", "no JSON"),
        ("text.json", b'{"level0": "a", "level3_species": "b c"}', "lacks a level"),
        ("auxiliary.json", b'{"longitude": 1, "latitude": 2, "bio12": -32768}', "bio12"),
    ],
)
def test_bad_samples_are_told_or_skipped_without_moving_the_others(
    shards: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    member: str,
    content: bytes,
    message: str,
) -> None:
    path = broken(tmp_path / shards[0].name, shards[0], 3, member, content)
    with pytest.raises(ShardError, match=f"key '0000003'.*{message}"):
        take(GlobalGeoTreeStream(path), 7)
    whole = ids(take(GlobalGeoTreeStream(shards[0], block=4), 14))
    rest = take(GlobalGeoTreeStream(path, block=4, errors="skip"), 12)
    assert ids(rest) == [name for name in whole if name != "0-0000003"]
    assert "1 skipped" in caplog.text
    stream = GlobalGeoTreeStream(path, block=4, errors="skip")
    for k, sample in enumerate(rest[:-1]):
        stream.load_state(stream.state_after(sample))
        assert next(iter(stream))["id"] == rest[k + 1]["id"]


def test_a_process_without_samples_is_told_instead_of_waiting_for_ever(
    shards: list[Path],
) -> None:
    stream = GlobalGeoTreeStream(shards[4], rank=1, world_size=2)
    with pytest.raises(DataNotFoundError, match="rank 1 of 2 got no sample out of 9 epochs"):
        next(iter(stream))
    with pytest.raises(DataNotFoundError):
        GlobalGeoTreeStream(shards[0].parent / "absent.tar")
    for wrong in ({"seed": -1}, {"mix": 0}, {"block": 0}, {"errors": "hide"}):
        with pytest.raises(ValueError):
            GlobalGeoTreeStream(shards, **wrong)


# The hub -------------------------------------------------------------------------------------


@dataclass
class ListingHost(HubHost):
    """A hub that also tells which files a data set has."""

    listed: list[str] = field(default_factory=list)

    def answer(self, handler: Any) -> None:
        if not handler.path.startswith("/api/datasets/"):
            return super().answer(handler)
        self.listed.append(handler.path)
        names = [{"rfilename": n} for repo, _, n in self.files if repo == f"datasets/{REPO}"]
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode()
        return handler.reply(200, body, {"Content-Type": "application/json"})


@pytest.fixture
def host(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ListingHost]:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    key = f"datasets/{REPO}"
    files = {(key, COMMIT, n): p.read_bytes() for n, p in zip(NAMES, shards[:3], strict=True)}
    host = ListingHost(files={**files, (key, COMMIT, "README.md"): b"trees"})
    with serving(host):
        monkeypatch.setattr(constants, "ENDPOINT", host.address)
        template = host.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield host


def fetched(host: HubHost) -> list[str]:
    return [request.path.rpartition("/")[2] for request in host.bodies]


def test_numbered_shards_are_named_without_asking(host: ListingHost) -> None:
    found = shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    assert found == tuple(HubShard(REPO, name, COMMIT) for name in NAMES)
    twice = shards_from_hub(REPO, "{8..11}/t-{1..2}.tar")
    assert [s.filename for s in twice[::3]] == ["8/t-1.tar", "9/t-2.tar", "11/t-1.tar"]
    assert twice[0].revision == "main"
    with pytest.raises(ValueError, match="backwards"):
        shards_from_hub(REPO, "t-{3..1}.tar")
    assert not host.requests
    assert not host.listed


def test_a_pattern_finds_shards_of_one_commit(host: ListingHost) -> None:
    assert shards_from_hub(REPO, "train/*.tar") == tuple(HubShard(REPO, n, COMMIT) for n in NAMES)
    with pytest.raises(DataNotFoundError, match=r"none of the 4 files.*README\.md"):
        shards_from_hub(REPO, "test/*.tar")
    assert fetched(host) == ["trees"] * len(host.listed) == ["trees"] * 2


def test_a_shard_is_fetched_when_its_turn_comes_and_once(host: ListingHost) -> None:
    files = shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    reader = iter(GlobalGeoTree(files))
    assert not host.bodies
    first = [next(reader).sample_id for _ in range(7)]
    assert fetched(host) == ["t-00.tar"]
    assert len([*first, *reader]) == 21
    assert len(list(read_shards(files))) == 21
    assert fetched(host) == ["t-00.tar", "t-01.tar", "t-02.tar"]


def test_an_address_names_shards_in_one_line_as_a_recipe_does(host: ListingHost) -> None:
    address = f"hf://datasets/{REPO}@{COMMIT}/train/t-{{00..02}}.tar"
    stream = GlobalGeoTreeStream(address)
    assert stream.files == shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    assert len(take(stream, 7)) == 7
    assert shards_at(f"hf://datasets/{REPO}/t.{{1..1}}")[0].revision == "main"
    with pytest.raises(DataNotFoundError, match="expected hf://datasets/<owner>/<name>"):
        GlobalGeoTreeStream("hf://datasets/trees")


def test_resuming_does_not_fetch_what_is_done(host: ListingHost) -> None:
    files = shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    assert len(list(GlobalGeoTree(files, start={0: (2, 1)}))) == 10
    assert fetched(host) == ["t-02.tar"]


def test_each_process_fetches_only_its_own_shards(host: ListingHost) -> None:
    files = shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    for rank in range(3):
        before = len(fetched(host))
        stream = GlobalGeoTreeStream(files, rank=rank, world_size=3)
        own = {sample["id"][0] for sample in take(stream, 3)}
        assert len(own) == 1
        assert fetched(host)[before:] == [f"t-0{own.pop()}.tar"]


def test_without_a_network_the_cache_is_enough(
    host: ListingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards_from_hub(REPO, "train/t-{00..02}.tar", COMMIT)
    expected = ids(take(GlobalGeoTreeStream(files[:2]), 10))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(host.requests)
    assert ids(take(GlobalGeoTreeStream(files[:2]), 10)) == expected
    assert len(host.requests) == count
    with pytest.raises(DownloadError, match=r"t-02\.tar is not in the cache"):
        take(GlobalGeoTreeStream(files), 21)


def test_a_lost_shard_is_no_damaged_one_and_never_skipped(
    host: ListingHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "huggingface_hub")
    files = shards_from_hub(REPO, "train/t-{00..03}.tar", COMMIT)
    with pytest.raises(DownloadError, match=r"t-03\.tar"):
        list(GlobalGeoTree(files, errors="skip"))


def test_a_list_that_cannot_be_fetched_is_told(
    host: ListingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The port of discarded data, on which nobody listens.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"list of files of the data set geo/trees.*number"):
        shards_from_hub(REPO, "*.tar")
