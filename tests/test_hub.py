"""From a card to verified weights, against real servers on this machine; nothing leaves it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hf_constants
from loopback import FileHost, HubHost, damage, serving
from safetensors.torch import save_file
from test_checkpoints import dense_weights, published, same, torch_bytes

from geofm import cards as cards_module
from geofm import create_model, hub
from geofm.cards import Source, WeightCard, published_cards, read_card
from geofm.download import download
from geofm.errors import (
    CardError,
    DownloadError,
    HashMismatchError,
    LayoutError,
    UnsafeFileError,
    WeightsNotFoundError,
)

PATH = "/share/checkpoint-199.pth"
DENSE = dense_weights()
CONTENT = torch_bytes(published(DENSE))
OTHER_DENSE = {name: value + 1 for name, value in DENSE.items()}
OTHER_CONTENT = torch_bytes(published(OTHER_DENSE))
COMMIT = "1234567890" * 4

MODEL_CARD = published_cards()["mpmae_atto.mmearth64"]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of geofm's and of Hugging Face's own."""
    monkeypatch.setenv("GEOFM_HOME", str(tmp_path / "geofm"))
    monkeypatch.setattr(hf_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "geofm"


@pytest.fixture
def host() -> Iterator[FileHost]:
    host = FileHost(files={PATH: CONTENT})
    with serving(host):
        yield host


@pytest.fixture
def hub_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubHost]:
    host = HubHost(
        files={
            ("geo/model", COMMIT, "weights.pth"): CONTENT,
            ("datasets/geo/data", COMMIT, "checkpoints/weights.pth"): CONTENT,
        }
    )
    with serving(host):
        point_hub_at(host.address, monkeypatch)
        yield host


def point_hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hf_constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def url_card(url: str, digest: str | None = None) -> WeightCard:
    return replace(MODEL_CARD, source=Source("url", url=url, sha256=digest))


def hub_card(**changes: Any) -> WeightCard:
    source = Source("huggingface", repo="geo/model", revision=COMMIT, filename="weights.pth")
    return replace(MODEL_CARD, source=replace(source, **changes))


def files_in(folder: Path) -> list[str]:
    """Names of all files below a folder, without the empty files that locks are."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which a file can only be so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- downloading --------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_leaves_nothing_else(host: FileHost, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "checkpoint.pth"
    for _ in range(2):
        assert download(host.url(PATH), target) == target
        assert target.read_bytes() == CONTENT
    assert [(r.method, r.path, r.range) for r in host.requests] == [("GET", PATH, None)]
    assert files_in(target.parent) == ["checkpoint.pth"]


def test_progress_is_shown_with_the_name_and_the_size(
    host: FileHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(host.url(PATH), tmp_path / "checkpoint-199.pth")
    shown = capsys.readouterr().err
    assert "checkpoint-199.pth" in shown
    assert "100%" in shown


def test_a_redirection_is_followed(host: FileHost, tmp_path: Path) -> None:
    host.redirect["/share_redirect/x"] = PATH
    assert download(host.url("/share_redirect/x"), tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ["strong", "date"])
def test_a_broken_download_goes_on_where_it_stopped(
    host: FileHost, tmp_path: Path, etag: str, no_waiting: None
) -> None:
    host.etag, host.truncate = etag, 5000
    target = download(host.url(PATH), tmp_path / "x.pth")
    assert target.read_bytes() == CONTENT
    first, second = host.requests
    assert (first.status, first.sent) == (200, 5000)
    assert (second.status, second.range) == (206, "bytes=5000-")
    assert second.headers["if-range"]
    assert second.sent == len(CONTENT) - 5000


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(
    host: FileHost, tmp_path: Path, no_waiting: None
) -> None:
    host.truncate, host.truncations = 5000, None
    with pytest.raises(DownloadError) as caught:
        download(host.url(PATH), tmp_path / "x.pth")
    message = str(caught.value)
    part = tmp_path / "x.pth.part"
    assert "connection ended after 15,000 of" in message
    assert "3 times" in message
    assert str(part) in message
    assert part.read_bytes() == CONTENT[:15_000]
    host.truncate = None
    host.requests.clear()
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT
    assert [r.range for r in host.requests] == ["bytes=15000-"]
    assert files_in(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    "settings",
    [
        {"etag": "strong"},
        {"etag": "date"},
        {"etag": "strong", "if_range": False},
        {"etag": "date", "if_range": False},
        {"etag": "weak"},
        {"etag": "weak", "if_range": False},
        {"etag": "", "if_range": False},
        {"ranges": False},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_two_versions_of_a_file_are_never_mixed(
    host: FileHost, tmp_path: Path, settings: dict[str, Any], no_waiting: None
) -> None:
    for name, value in settings.items():
        setattr(host, name, value)
    host.truncate, host.truncations = 5000, None
    with pytest.raises(DownloadError):
        download(host.url(PATH), tmp_path / "x.pth")
    host.files[PATH] = OTHER_CONTENT
    host.truncate = None
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == OTHER_CONTENT
    assert files_in(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("etag", ["", "weak"])
def test_without_a_strong_validator_a_broken_download_begins_anew(
    host: FileHost, tmp_path: Path, etag: str, no_waiting: None
) -> None:
    host.etag, host.truncate = etag, 5000
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT
    assert [r.range for r in host.requests] == [None, None]


def test_a_part_longer_than_the_file_is_thrown_away(
    host: FileHost, tmp_path: Path, no_waiting: None
) -> None:
    host.truncate, host.truncations = 5000, None
    with pytest.raises(DownloadError):
        download(host.url(PATH), tmp_path / "x.pth")
    (tmp_path / "x.pth.part").write_bytes(b"x" * (len(CONTENT) + 10))
    host.truncate = None
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_damaged_note_of_the_validator_begins_anew(
    host: FileHost, tmp_path: Path, no_waiting: None
) -> None:
    host.truncate, host.truncations = 5000, None
    with pytest.raises(DownloadError):
        download(host.url(PATH), tmp_path / "x.pth")
    (tmp_path / "x.pth.part.json").write_bytes(b"\xff\x00")
    host.truncate = None
    host.requests.clear()
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT
    assert [r.range for r in host.requests] == [None]


@pytest.mark.parametrize(
    ("status", "said"), [(404, "404 .*may have moved"), (403, "403"), (500, "500"), (503, "503")]
)
def test_an_http_error_is_a_download_error(
    host: FileHost, tmp_path: Path, status: int, said: str
) -> None:
    host.status = status
    with pytest.raises(DownloadError, match=f"{re.escape(host.url(PATH))}.*{said}"):
        download(host.url(PATH), tmp_path / "x.pth")
    assert files_in(tmp_path) == []


def test_a_web_page_instead_of_a_file_is_a_download_error(host: FileHost, tmp_path: Path) -> None:
    host.html = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="web page instead of a file"):
        download(host.url(PATH), tmp_path / "x.pth")
    assert files_in(tmp_path) == []


def test_a_refused_connection_says_how_to_do_without(tmp_path: Path) -> None:
    closed = FileHost()
    with serving(closed):
        pass
    with pytest.raises(DownloadError, match=r"cannot be reached.*refused.*pretrained=<its path>"):
        download(closed.url(PATH), tmp_path / "x.pth")


def test_a_silent_server_is_given_up(
    host: FileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geofm.download._TIMEOUT_S", 0.1)
    monkeypatch.setattr("geofm.download._ATTEMPTS", 1)
    host.delay = 1.0
    with pytest.raises(DownloadError, match=r"broke after 0 bytes.*timed out"):
        download(host.url(PATH), tmp_path / "x.pth")


def test_a_server_that_does_not_say_how_long_the_file_is_is_believed(
    host: FileHost, tmp_path: Path
) -> None:
    host.content_length = False
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_slow_server_is_waited_for(host: FileHost, tmp_path: Path) -> None:
    host.delay = 0.05
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["ftp://example.org/x", "file:///etc/passwd", "/etc/passwd"])
def test_only_http_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="http and https"):
        download(url, tmp_path / "x")


# --- disks --------------------------------------------------------------------------------------


def test_a_full_disk_is_a_download_error_that_names_the_folder(
    host: FileHost, tmp_path: Path
) -> None:
    (tmp_path / "x.pth.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="disk is full") as caught:
        download(host.url(PATH), tmp_path / "x.pth")
    assert str(tmp_path) in str(caught.value)
    assert "MB free" in str(caught.value)
    assert "GEOFM_HOME" in str(caught.value)


def test_after_a_full_disk_the_download_goes_on(host: FileHost, tmp_path: Path) -> None:
    with largest_file(20_000), pytest.raises(DownloadError, match="disk is full"):
        download(host.url(PATH), tmp_path / "x.pth")
    assert (tmp_path / "x.pth.part").read_bytes() == CONTENT[:20_000]
    assert download(host.url(PATH), tmp_path / "x.pth").read_bytes() == CONTENT
    assert host.requests[-1].range == "bytes=20000-"


def test_a_cache_that_cannot_be_written_says_so(
    host: FileHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of a folder: unlike permissions, this stops root too.
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/geofm"):
        monkeypatch.setenv("GEOFM_HOME", str(tmp_path / folder))
        card = url_card(host.url(PATH))
        assert not hub.is_cached(card)
        with pytest.raises(DownloadError, match=r"cannot write to .*GEOFM_HOME"):
            hub.load_card_weights(card)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_says_so(host: FileHost, home: Path) -> None:
    home.mkdir()
    home.chmod(0o555)
    with pytest.raises(DownloadError, match=r"cannot write to .*GEOFM_HOME"):
        hub.load_card_weights(url_card(host.url(PATH)))


def test_weights_load_though_their_conversion_cannot_be_cached(
    host: FileHost, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = url_card(host.url(PATH), sha256(CONTENT))
    hub.fetch(card)
    with largest_file(1000):
        assert same(hub.load_card_weights(card), DENSE)
    assert "could not be cached" in caplog.text
    assert not (home / "converted").exists() or files_in(home / "converted") == []
    assert same(hub.load_card_weights(card), DENSE)


# --- verifying ----------------------------------------------------------------------------------


def test_weights_come_from_an_address_verified_and_converted(host: FileHost) -> None:
    card = url_card(host.url(PATH), sha256(CONTENT))
    assert not hub.is_cached(card)
    assert same(hub.load_card_weights(card), DENSE)
    assert hub.is_cached(card)


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_without_the_published_hash_is_refused_and_not_kept(
    host: FileHost, home: Path, digits: int
) -> None:
    card = url_card(host.url(PATH), sha256(OTHER_CONTENT)[:digits])
    with pytest.raises(HashMismatchError) as caught:
        hub.load_card_weights(card)
    assert sha256(CONTENT) in str(caught.value)
    assert sha256(OTHER_CONTENT)[:digits] in str(caught.value)
    assert not hub.is_cached(card)
    assert files_in(home) == []


def test_the_beginning_of_a_hash_is_verified_and_the_whole_recorded(
    host: FileHost, home: Path
) -> None:
    card = url_card(host.url(PATH), sha256(CONTENT)[:8])
    assert hub.file_sha256(card) is None
    assert same(hub.load_card_weights(card), DENSE)
    (record,) = (home / "hashes").iterdir()
    assert json.loads(record.read_text())["sha256"] == sha256(CONTENT)
    assert hub.file_sha256(card) == sha256(CONTENT)


def test_a_record_that_contradicts_the_card_is_not_believed(host: FileHost) -> None:
    assert same(hub.load_card_weights(url_card(host.url(PATH))), DENSE)
    # The card has since learnt the beginning of the hash, and the first download was another file.
    with pytest.raises(HashMismatchError, match="0123abcd"):
        hub.load_card_weights(url_card(host.url(PATH), "0123abcd"))


def test_a_file_that_changed_since_the_first_download_is_refused_until_accepted(
    host: FileHost,
) -> None:
    card = url_card(host.url(PATH))
    assert same(hub.load_card_weights(card), DENSE)
    hub.clean_cache([card])
    host.files[PATH] = OTHER_CONTENT
    for _ in range(2):
        with pytest.raises(HashMismatchError, match="--accept-new-hash") as caught:
            hub.load_card_weights(card)
        assert card.name in str(caught.value)
        assert not hub.is_cached(card)
    hub.fetch(card, accept_new_hash=True)
    assert same(hub.load_card_weights(card), OTHER_DENSE)


def test_accepting_leaves_a_sound_cache_alone(host: FileHost) -> None:
    card = url_card(host.url(PATH))
    hub.fetch(card)
    hub.fetch(card, accept_new_hash=True)
    assert len(host.requests) == 1


def test_accepting_never_takes_a_damaged_cache_for_the_new_truth(host: FileHost) -> None:
    card = url_card(host.url(PATH))
    hub.fetch(card).write_bytes(OTHER_CONTENT)
    assert hub.fetch(card, accept_new_hash=True).read_bytes() == CONTENT


@pytest.mark.parametrize("digest", [None, sha256(CONTENT)[:8], sha256(CONTENT)])
def test_a_damaged_download_in_the_cache_is_fetched_again(
    host: FileHost, digest: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    card = url_card(host.url(PATH), digest)
    damage(hub.fetch(card))
    assert hub.fetch(card).read_bytes() == CONTENT
    assert len(host.bodies) == 2
    assert "fetching it again" in caplog.text


def test_a_damaged_download_without_a_network_is_an_error(
    host: FileHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = url_card(host.url(PATH), sha256(CONTENT))
    damage(hub.fetch(card))
    monkeypatch.setattr(hf_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="damaged in the cache"):
        hub.load_card_weights(card)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"<!DOCTYPE html><p>Log in", LayoutError),
        (CONTENT[:-1000], LayoutError),
        (b"", LayoutError),
        (torch_bytes({"backbone.first": torch.ones(1)}), LayoutError),
        (torch_bytes({"model": WeightCard}), UnsafeFileError),
    ],
    ids=["page", "truncated", "empty", "layout", "unsafe"],
)
def test_what_is_no_checkpoint_is_not_recorded_as_the_truth(
    host: FileHost, home: Path, content: bytes, error: type[Exception]
) -> None:
    host.files[PATH] = content
    card = url_card(host.url(PATH))
    for load in (hub.fetch, hub.load_card_weights):
        with pytest.raises(error):
            load(card)
    assert not (home / "hashes").exists()
    if error is LayoutError:
        host.files[PATH] = CONTENT
        assert same(hub.load_card_weights(card), DENSE)


def test_a_damaged_record_is_an_error_that_names_it(host: FileHost, home: Path) -> None:
    card = url_card(host.url(PATH))
    path = hub.fetch(card)
    (record,) = (home / "hashes").iterdir()
    for content in (b"", b"{", b"[]", b"{}", b"\xff"):
        record.write_bytes(content)
        for load in (hub.fetch, hub.load_card_weights):
            with pytest.raises(HashMismatchError, match=re.escape(str(record))):
                load(card)
        assert path.read_bytes() == CONTENT


def test_files_of_one_name_at_two_addresses_are_kept_apart(host: FileHost) -> None:
    host.files["/other/checkpoint-199.pth"] = OTHER_CONTENT
    assert same(hub.load_card_weights(url_card(host.url(PATH))), DENSE)
    other = url_card(host.url("/other/checkpoint-199.pth"))
    assert same(hub.load_card_weights(other), OTHER_DENSE)


# --- the converted cache ------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [None, sha256(CONTENT)])
def test_the_second_load_touches_neither_the_network_nor_the_source_file(
    host: FileHost, home: Path, digest: str | None
) -> None:
    card = url_card(host.url(PATH), digest)
    first = hub.load_card_weights(card)
    for path in (home / "downloads").rglob("*.pth"):
        path.unlink()
    assert same(hub.load_card_weights(card), first)
    assert len(host.requests) == 1
    assert hub.is_cached(card)


@pytest.mark.parametrize("what", ["weights", "hash", "no hash", "empty"])
def test_a_damaged_conversion_is_made_again(host: FileHost, home: Path, what: str) -> None:
    card = url_card(host.url(PATH))
    hub.load_card_weights(card)
    (converted,) = (home / "converted").glob("*.safetensors")
    sound = converted.read_bytes()
    beside = Path(f"{converted}.sha256")
    if what == "weights":
        damage(converted)
    elif what == "hash":
        beside.write_bytes(b"\xff nonsense")
    elif what == "no hash":
        beside.unlink()
    else:
        converted.write_bytes(b"")
    assert same(hub.load_card_weights(card), DENSE)
    assert converted.read_bytes() == sound
    assert [ok for _, ok in hub.verify_cache([card])] == [True, True]
    assert len(host.requests) == 1


def test_other_users_of_a_shared_cache_may_read_it(host: FileHost, home: Path) -> None:
    before = os.umask(0o022)
    try:
        hub.load_card_weights(url_card(host.url(PATH)))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in home.rglob("*") if path.is_file()}
    assert {mode & 0o644 for mode in modes} == {0o644}


# --- several processes --------------------------------------------------------------------------

# Prints the hash of what it loaded, once told to start.
LOAD = """
import hashlib, json, sys, time
from pathlib import Path
import torch
from geofm import hub
from geofm.cards import read_card
from geofm.errors import GeofmError
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
for path in sys.argv[1:]:
    try:
        state = hub.load_card_weights(read_card(Path(path)))
        parts = (name.encode() + state[name].numpy().tobytes() for name in sorted(state))
        print(hashlib.sha256(b"".join(parts)).hexdigest(), flush=True)
    except GeofmError as error:
        print(type(error).__name__, str(error).replace("\\n", " "), flush=True)
"""


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    return sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))


def run(cards: Sequence[Path], processes: int = 1, **environment: str) -> list[list[str]]:
    """Load cards in fresh processes at the same time; their answers."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, *map(str, cards)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = []
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        answers.append(out.splitlines())
    return answers


def card_file(folder: Path, source: str, name: str = "mpmae_atto.mmearth64") -> Path:
    """A copy of a shipped card with another source."""
    text = (cards_module.weights_dir() / f"{name}.toml").read_text()
    section = f"[source]\n{source}\n\n"
    text, count = re.subn(r"(?ms)^\[source\].*?(?=^\[)", lambda _: section, text)
    assert count == 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def url_source(url: str) -> str:
    return f'kind = "url"\nurl = "{url}"'


def test_two_processes_at_once_share_one_download(
    host: FileHost, home: Path, tmp_path: Path
) -> None:
    host.delay = 0.1
    path = card_file(tmp_path / "cards", url_source(host.url(PATH)))
    assert run([path], processes=2) == [[fingerprint(DENSE)]] * 2
    assert len(host.requests) == 1
    card = read_card(path)
    assert [ok for _, ok in hub.verify_cache([card])] == [True, True]
    kinds = [re.sub(r"[0-9a-f]{16,}", "#", name) for name in files_in(home)]
    assert kinds == [
        "converted/#.mmearth.v1.safetensors",
        "converted/#.mmearth.v1.safetensors.sha256",
        "downloads/#/checkpoint-199.pth",
        "hashes/#.json",
    ]


def test_hub_settings_of_the_environment_are_obeyed_online_and_offline(
    hub_host: HubHost, tmp_path: Path
) -> None:
    model = 'kind = "huggingface"\nrepo = "geo/model"\n'
    model += f'revision = "{COMMIT}"\nfilename = "weights.pth"'
    dataset = 'kind = "huggingface"\nrepo = "geo/data"\nrepo_type = "dataset"\n'
    dataset += f'revision = "{COMMIT}"\nfilename = "checkpoints/weights.pth"'
    other = url_source(f"{hub_host.address}/never-fetched.pth")
    cards = [
        card_file(tmp_path / "cards" / str(number), source)
        for number, source in enumerate((model, dataset, other))
    ]
    environment = {
        "HF_ENDPOINT": hub_host.address,
        "HF_HOME": str(tmp_path / "own-hf"),
        "GEOFM_HOME": str(tmp_path / "own-geofm"),
    }
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    ((*missing,),) = run(cards, **offline)
    assert hub_host.requests == []
    for answer in missing:
        assert re.match(r"DownloadError .*not in the cache and HF_HUB_OFFLINE is set", answer)
        assert str(tmp_path / "own-geofm") in answer

    assert run(cards[:2], **environment) == [[fingerprint(DENSE)] * 2]
    assert [r.path for r in hub_host.bodies] == [
        f"/geo/model/resolve/{COMMIT}/weights.pth",
        f"/datasets/geo/data/resolve/{COMMIT}/checkpoints/weights.pth",
    ]
    assert (tmp_path / "own-hf" / "hub" / "models--geo--model").is_dir()
    assert (tmp_path / "own-hf" / "hub" / "datasets--geo--data").is_dir()
    assert (tmp_path / "own-geofm" / "hashes").is_dir()

    hub_host.requests.clear()
    ((first, second, third),) = run(cards, **offline)
    assert (first, second) == (fingerprint(DENSE), fingerprint(DENSE))
    assert third.startswith("DownloadError")
    assert hub_host.requests == []


def test_the_cache_moves_with_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOFM_HOME", str(tmp_path / "a"))
    assert hub.cache_dir() == tmp_path / "a"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GEOFM_HOME", "~/b")
    assert hub.cache_dir() == tmp_path / "b"
    monkeypatch.delenv("GEOFM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert hub.cache_dir() == tmp_path / "c" / "geofm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == tmp_path / ".cache" / "geofm"


# --- the Hugging Face hub -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"repo": "geo/data", "repo_type": "dataset", "filename": "checkpoints/weights.pth"}],
    ids=["model", "dataset"],
)
def test_weights_come_from_the_hub_once(hub_host: HubHost, changes: dict[str, str]) -> None:
    card = hub_card(**changes)
    for _ in range(2):
        assert same(hub.load_card_weights(card), DENSE)
    assert len(hub_host.bodies) == 1
    assert hub.is_cached(card)


def test_a_branch_of_the_hub_is_found_in_the_cache_again(hub_host: HubHost) -> None:
    card = hub_card(revision="main")
    path = hub.fetch(card)
    hub_host.requests.clear()
    assert hub.fetch(card) == path
    assert hub_host.requests == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repo": "geo/unknown"}, "does not know.*geo/unknown"),
        ({"revision": "f" * 40}, "does not know.*ffffffff"),
        ({"filename": "other.pth"}, "has no such file.*other.pth"),
    ],
    ids=["repository", "revision", "file"],
)
def test_what_the_hub_does_not_have_is_a_download_error(
    hub_host: HubHost, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(DownloadError, match=said):
        hub.load_card_weights(hub_card(**changes))


def test_a_gated_repository_says_what_is_needed(hub_host: HubHost) -> None:
    hub_host.gated.add("geo/model")
    with pytest.raises(DownloadError, match="licence accepted and a token"):
        hub.load_card_weights(hub_card())


@pytest.mark.parametrize("repo", ["a b", "../x", "a/b/c"])
def test_a_repository_that_cannot_exist_is_an_error_of_the_card(repo: str) -> None:
    with pytest.raises(CardError, match=r"mpmae_atto.mmearth64.toml: source\.repo"):
        hub.load_card_weights(hub_card(repo=repo))


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_that_cannot_be_reached_is_a_download_error(hub_host: HubHost) -> None:
    with serving(closed := HubHost()):
        pass
    with pytest.MonkeyPatch.context() as patch:
        point_hub_at(closed.address, patch)
        with pytest.raises(DownloadError, match=r"cannot be reached.*pretrained=<its path>"):
            hub.load_card_weights(hub_card())


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_with_an_internal_error_is_a_download_error(hub_host: HubHost) -> None:
    hub_host.status = 500
    with pytest.raises(DownloadError, match="500"):
        hub.load_card_weights(hub_card())


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_that_always_breaks_off_is_a_download_error(
    hub_host: HubHost, tmp_path: Path
) -> None:
    hub_host.truncate = 0
    with pytest.raises(DownloadError, match=r"fetching .* failed"):
        hub.load_card_weights(hub_card())
    assert list((tmp_path / "hf").rglob("*.incomplete")) == []


def test_a_full_disk_below_the_hub_names_the_right_variable(hub_host: HubHost) -> None:
    with largest_file(20_000), pytest.raises(DownloadError, match=r"disk is full.*HF_HOME"):
        hub.load_card_weights(hub_card())


@pytest.mark.parametrize("digest", [None, sha256(CONTENT)[:8], sha256(CONTENT)])
def test_a_damaged_file_in_the_hubs_cache_is_replaced(
    hub_host: HubHost, digest: str | None
) -> None:
    card = hub_card(sha256=digest)
    damage(hub.fetch(card).resolve())
    assert hub.fetch(card).read_bytes() == CONTENT
    assert same(hub.load_card_weights(card), DENSE)


@pytest.mark.usefixtures("no_waiting")
def test_a_damaged_file_in_the_hubs_cache_without_a_hub_is_a_download_error(
    hub_host: HubHost,
) -> None:
    card = hub_card(sha256=sha256(CONTENT))
    damage(hub.fetch(card).resolve())
    with serving(closed := HubHost()):
        pass
    with pytest.MonkeyPatch.context() as patch:
        point_hub_at(closed.address, patch)
        with pytest.raises(DownloadError, match="refused"):
            hub.load_card_weights(card)


def test_a_wrong_hash_of_a_hub_file_is_refused(hub_host: HubHost) -> None:
    with pytest.raises(HashMismatchError, match=sha256(CONTENT)):
        hub.load_card_weights(hub_card(sha256="0123abcd"))


# --- staying inside the cache -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "", "...", "a\\..\\b", "x.pth?download=1", "%2e%2e"])
def test_the_name_of_a_download_stays_in_its_folder(home: Path, host: FileHost, name: str) -> None:
    url = host.url(f"/folder/{name}")
    host.files[f"/folder/{name}".partition("?")[0]] = CONTENT
    path = hub.fetch(url_card(url))
    assert path.resolve().parent.parent == (home / "downloads").resolve()
    assert "?" not in path.name
    assert "\\" not in path.name


@pytest.mark.parametrize("filename", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x"])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, filename: str) -> None:
    source = f'kind = "bundled"\nfilename = \'{filename}\'\nsha256 = "{"0" * 64}"'
    with pytest.raises(CardError, match=r"source\.filename"):
        read_card(card_file(tmp_path, source))


# --- looking after the cache --------------------------------------------------------------------


def test_the_cache_is_listed_verified_and_cleaned_by_card(host: FileHost, home: Path) -> None:
    host.files["/other.pth"] = OTHER_CONTENT
    first = url_card(host.url(PATH))
    second = replace(url_card(host.url("/other.pth")), name="mpmae_atto.other")
    for card in (first, second):
        hub.load_card_weights(card)
    cards = [first, second]
    entries = hub.cache_entries(cards)
    assert [entry.kind for entry in entries] == ["converted"] * 2 + ["download"] * 2
    assert sorted(str(entry.card) for entry in entries) == sorted(
        [first.name, first.name, second.name, second.name]
    )
    assert all(sound for _, sound in hub.verify_cache(cards))
    damaged = next(e for e in entries if e.kind == "download" and e.card == second.name)
    damage(damaged.path)
    assert [e.path for e, sound in hub.verify_cache(cards) if not sound] == [damaged.path]

    freed = hub.clean_cache(cards, [second.name])
    assert freed == sum(entry.size for entry in entries if entry.card == second.name)
    assert {entry.card for entry in hub.cache_entries(cards)} == {first.name}
    hub.clean_cache(cards)
    assert hub.cache_entries(cards) == []
    assert {Path(name).parts[0] for name in files_in(home)} == {"hashes"}


def test_a_partial_download_is_listed_as_unsound_and_cleaned_with_its_card(
    host: FileHost, home: Path, no_waiting: None
) -> None:
    host.truncate, host.truncations = 5000, None
    card = url_card(host.url(PATH))
    with pytest.raises(DownloadError):
        hub.fetch(card)
    ((entry, sound),) = hub.verify_cache([card])
    assert (entry.card, entry.size, sound) == (card.name, 15_000, False)
    hub.clean_cache([card], [card.name])
    assert files_in(home) == []


# --- create_model -------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Replace the shipped cards by copies of some, with other sources."""
    folder = tmp_path / "weights"
    monkeypatch.setattr(cards_module, "weights_dir", lambda: folder)
    published_cards.cache_clear()
    yield lambda name, source: card_file_of(folder, name, source)
    published_cards.cache_clear()


ORIGINALS = cards_module.weights_dir()


def card_file_of(folder: Path, name: str, source: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards_module, "weights_dir", lambda: ORIGINALS)
        return card_file(folder, source, name)


@pytest.fixture(scope="module")
def atto() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = create_model("mpmae_atto").state_dict()
    return {name: value for name, value in state.items() if not name.startswith("norm.")}


def _encoder_is(model: torch.nn.Module, atto: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in atto.items())


def test_create_model_fetches_converts_and_loads_a_card(
    host: FileHost, shipped: Callable[..., Path], atto: dict[str, torch.Tensor]
) -> None:
    host.files[PATH] = torch_bytes(published(atto))
    shipped("mpmae_atto.mmearth64", url_source(host.url(PATH)))
    for arguments in (
        {"name": "mpmae_atto", "pretrained": True},
        {"name": "mpmae_atto", "pretrained": "mmearth64"},
        {"name": "mpmae_atto.mmearth64", "pretrained": True},
    ):
        model = create_model(**arguments)
        assert _encoder_is(model, atto)
        assert model.card.name == "mpmae_atto.mmearth64"
    assert len(host.requests) == 1


def bundle(
    shipped: Callable[..., Path], folder: Path, atto: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A bundled checkpoint beside the cards; its weights."""
    state = {name: value + 1 for name, value in atto.items()}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "small.safetensors")
    digest = hub.sha256_of(folder / "small.safetensors")
    source = f'kind = "bundled"\nfilename = "small.safetensors"\nsha256 = "{digest}"'
    path = shipped("mpmae_atto.mmearth64_s2", source)
    text = path.read_text().replace('"mpmae_atto.mmearth64_s2"', '"mpmae_atto.small"')
    (folder / "mpmae_atto.small.toml").write_text(
        text.replace('layout = "mmearth"', 'layout = "native"')
    )
    path.unlink()
    return state


def test_without_a_network_true_means_the_bundled_checkpoint_and_says_so(
    shipped: Callable[..., Path], tmp_path: Path, atto: dict[str, torch.Tensor]
) -> None:
    with serving(closed := FileHost()):
        pass
    shipped("mpmae_atto.mmearth64", url_source(closed.url(PATH)))
    state = bundle(shipped, tmp_path / "weights", atto)
    with pytest.warns(UserWarning, match=r"mmearth64 could not be.*mpmae_atto\.small"):
        model = create_model("mpmae_atto", pretrained=True)
    assert _encoder_is(model, state)
    assert model.card.name == "mpmae_atto.small"
    # A tag is that checkpoint or an error, and so is a file that is not what it was.
    for arguments in (
        {"name": "mpmae_atto", "pretrained": "mmearth64"},
        {"name": "mpmae_atto.mmearth64", "pretrained": True},
    ):
        with pytest.raises(DownloadError, match="cannot be reached"):
            create_model(**arguments)


def test_a_wrong_hash_does_not_fall_back(
    host: FileHost,
    shipped: Callable[..., Path],
    tmp_path: Path,
    atto: dict[str, torch.Tensor],
) -> None:
    shipped("mpmae_atto.mmearth64", url_source(host.url(PATH)) + '\nsha256 = "0123abcd"')
    bundle(shipped, tmp_path / "weights", atto)
    with pytest.raises(HashMismatchError):
        create_model("mpmae_atto", pretrained=True)


def test_a_bundled_file_is_verified_and_missed(
    shipped: Callable[..., Path], tmp_path: Path, home: Path, atto: dict[str, torch.Tensor]
) -> None:
    shipped("mpmae_atto.mmearth64", url_source("http://127.0.0.1:9/x"))
    state = bundle(shipped, tmp_path / "weights", atto)
    assert _encoder_is(create_model("mpmae_atto", pretrained="small"), state)
    assert not home.exists()
    damage(tmp_path / "weights" / "small.safetensors")
    with pytest.raises(HashMismatchError, match=r"mpmae_atto\.small"):
        create_model("mpmae_atto", pretrained="small")
    (tmp_path / "weights" / "small.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match="reinstall"):
        create_model("mpmae_atto", pretrained="small")


# --- the servers themselves ---------------------------------------------------------------------


def test_the_file_host_answers_ranges_as_a_server_does(host: FileHost) -> None:
    request = urllib.request.Request(host.url(PATH), headers={"Range": "bytes=10-"})
    with urllib.request.urlopen(request) as response:
        assert response.status == 206
        total = len(CONTENT)
        assert response.headers["Content-Range"] == f"bytes 10-{total - 1}/{total}"
        assert response.read() == CONTENT[10:]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geofm")
