"""From a weight card to verified tensors: fetch, verify, read, convert, cache.

The cache is ``$GEOFM_HOME`` (default ``~/.cache/geofm``):

* ``downloads/<key>/<file>``: files from plain addresses, as they came; Hugging Face files stay in
  the Hugging Face cache (``$HF_HOME``). The key is a hash of the whole address, because the ten
  MP-MAE files share one file name.
* ``hashes/<key>.json``: the sha256 of the first download, where none or only its beginning is
  published. A file that differs later is refused.
* ``converted/<source sha256>.<layout>.safetensors``: weights under geofm's names, with their own
  sha256 beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants as hf_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from geofm.cards import Source, WeightCard
from geofm.checkpoints import read_checkpoint
from geofm.download import download, explain_disk_error
from geofm.errors import DownloadError, HashMismatchError, LayoutError, WeightsNotFoundError
from geofm.layouts import convert, unwrap

__all__ = [
    "CacheEntry",
    "cache_dir",
    "cache_entries",
    "clean_cache",
    "fetch",
    "is_cached",
    "load_card_weights",
    "load_file_weights",
    "sha256_of",
    "verify_cache",
]

logger = logging.getLogger(__name__)

State = dict[str, Tensor]


def cache_dir() -> Path:
    """geofm's cache: ``$GEOFM_HOME``, else ``$XDG_CACHE_HOME/geofm``, else ``~/.cache/geofm``."""
    home = os.environ.get("GEOFM_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "geofm"


def sha256_of(path: Path) -> str:
    """The sha256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_cached(card: WeightCard) -> bool:
    """Whether a card's weights can be loaded without a network.

    Args:
        card: The card.
    """
    if card.bundled:
        return _bundled_path(card).is_file()
    known = _known_hash(card.source)
    if known and _converted_path(known, card.layout).is_file():
        return True
    return _cached_source(card.source) is not None


def fetch(card: WeightCard, accept_new_hash: bool = False) -> Path:
    """The verified file of a card, downloaded if it is not in the cache.

    Args:
        card: The card.
        accept_new_hash: Where no whole hash is published: record what arrives now as the truth,
            even if it differs from the first download.

    Returns:
        Path of the file as published.

    Raises:
        DownloadError: It cannot be fetched.
        HashMismatchError: It is not the published file, or not the one fetched the first time.
        WeightsNotFoundError: A bundled file is missing.
    """
    path, _ = _fetch_verified(card, accept_new_hash)
    return path


def load_card_weights(card: WeightCard) -> State:
    """The weights of a card, verified and under geofm's names.

    The conversion is done once and cached under the source file's hash.

    Args:
        card: The card.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        DownloadError: The file cannot be fetched.
        HashMismatchError: It is not the file it should be.
        LayoutError: It is no checkpoint, or in another layout than the card says.
        UnsafeFileError: It could only be read by executing code.
        WeightsNotFoundError: A bundled file is missing.
    """
    if card.bundled:
        state, _ = load_file_weights(_fetch_verified(card, False)[0], card.layout)
        return state
    known = _known_hash(card.source)
    if known:
        state = _read_converted(known, card.layout)
        if state is not None:
            return state
    path, digest = _fetch_verified(card, False)
    state, _ = load_file_weights(path, card.layout)
    _write_converted(digest, card.layout, state)
    return state


def load_file_weights(path: Path, layout: str | None = None) -> tuple[State, str]:
    """The weights in a local file, under geofm's names.

    Args:
        path: A checkpoint in any known layout.
        layout: The layout it must be in; None to recognise it.

    Returns:
        Names and tensors, and the name of the layout.

    Raises:
        LayoutError: It is no checkpoint, or in no known layout.
        UnsafeFileError: It could only be read by executing code.
        WeightsNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"there is no file {path}")
    try:
        return convert(unwrap(read_checkpoint(path)), layout)
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from error


# --- fetching ---------------------------------------------------------------------------------


def _fetch_verified(card: WeightCard, accept_new_hash: bool) -> tuple[Path, str]:
    if card.bundled:
        path = _bundled_path(card)
        if not path.is_file():
            raise WeightsNotFoundError(f"{card.name}: the bundled file {path} is missing; reinstall")
        return path, _verify(card, path, False)
    cached = _cached_source(card.source)
    if cached is not None:
        try:
            return cached, _verify(card, cached, accept_new_hash)
        except HashMismatchError as error:
            # A damaged cache heals itself; if the source changed, the fresh file says so below.
            logger.warning("%s; fetching it again", error)
            _forget(card.source, cached)
    path = _download(card, force=cached is not None)
    return path, _verify(card, path, accept_new_hash)


def _verify(card: WeightCard, path: Path, accept_new_hash: bool) -> str:
    digest = sha256_of(path)
    published = card.source.sha256
    if published and not digest.startswith(published):
        raise HashMismatchError(
            f"{card.name}: {path} has sha256 {digest}, the card says {published}"
            f"{'...' if len(published) < 64 else ''}: it is damaged or not the published file"
        )
    if card.bundled or (published and len(published) == 64):
        return digest
    record = _record_path(card.source)
    recorded = _read_record(record)
    if recorded is None or (accept_new_hash and recorded != digest):
        content = {"source": str(card.source), "sha256": digest, "size": path.stat().st_size}
        _write_atomically(record, lambda temporary: temporary.write_text(json.dumps(content)))
        logger.info("%s: recorded sha256 %s of the first download", card.name, digest)
    elif recorded != digest:
        raise HashMismatchError(
            f"{card.name}: {path} has sha256 {digest}, but the first download had {recorded}: the "
            f"file at {card.source} has changed. If that is as it should be, accept it with: "
            f"geofm download {card.name} --accept-new-hash"
        )
    return digest


def _download(card: WeightCard, force: bool) -> Path:
    source = card.source
    if _offline():
        raise DownloadError(
            f"{card.name} is not in the cache and HF_HUB_OFFLINE is set. Unset it, or fetch it on a "
            f"machine with a network (geofm download {card.name}) and copy {cache_dir()}"
        )
    logger.info("fetching %s from %s", card.name, source)
    if source.kind == "url":
        return download(str(source.url), _download_path(source))
    return _download_from_hub(card, force)


def _download_from_hub(card: WeightCard, force: bool) -> Path:
    source = card.source
    assert source.repo and source.filename
    try:
        with explain_disk_error(Path(hf_constants.HF_HUB_CACHE) / "x", str(source)):
            return Path(
                hf_hub_download(
                    source.repo,
                    source.filename,
                    revision=source.revision,
                    repo_type=source.repo_type,
                    force_download=force,
                )
            )
    except GatedRepoError as error:
        raise DownloadError(
            f"{card.name}: {source} needs its licence accepted and a token (hf auth login)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DownloadError(
            f"{card.name}: the hub does not know {source}: {_first_line(error)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{card.name}: the hub cannot be reached and {source} is not in its cache. Without a "
            f"network, put the file anywhere and pass pretrained=<its path>"
        ) from error
    except EntryNotFoundError as error:
        raise DownloadError(
            f"{card.name}: the hub has no such file: {source} ({_first_line(error)})"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{card.name}: fetching {source} failed: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _offline() -> bool:
    return bool(hf_constants.HF_HUB_OFFLINE)


def _bundled_path(card: WeightCard) -> Path:
    assert card.source.filename
    return card.path.parent / card.source.filename


def _cached_source(source: Source) -> Path | None:
    if source.kind == "url":
        path = _download_path(source)
        return path if path.is_file() else None
    assert source.repo and source.filename
    found = try_to_load_from_cache(
        source.repo, source.filename, revision=source.revision, repo_type=source.repo_type
    )
    return Path(found) if isinstance(found, str) else None


def _forget(source: Source, path: Path) -> None:
    # Hugging Face's cache replaces its own file when asked to download by force.
    if source.kind == "url":
        path.unlink(missing_ok=True)


def _key(source: Source) -> str:
    identity = f"{source.url}|{source.repo_type}|{source.repo}|{source.revision}|{source.filename}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _download_path(source: Source) -> Path:
    name = str(source.url).rsplit("/", 1)[-1] or "file"
    return cache_dir() / "downloads" / _key(source) / name


# --- hashes -----------------------------------------------------------------------------------


def _record_path(source: Source) -> Path:
    return cache_dir() / "hashes" / f"{_key(source)}.json"


def _read_record(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["sha256"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise HashMismatchError(
            f"the hash record {path} is damaged ({error}); delete it to trust the next download"
        ) from error


def _known_hash(source: Source) -> str | None:
    if source.sha256 and len(source.sha256) == 64:
        return source.sha256
    return _read_record(_record_path(source))


# --- the converted cache ----------------------------------------------------------------------


def _converted_path(digest: str, layout: str) -> Path:
    return cache_dir() / "converted" / f"{digest}.{layout}.safetensors"


def _read_converted(digest: str, layout: str) -> State | None:
    path = _converted_path(digest, layout)
    if not path.is_file():
        return None
    if not _converted_is_sound(path):
        logger.warning("%s does not have its recorded hash; converting again", path)
        path.unlink(missing_ok=True)
        return None
    return load_file(path)


def _converted_is_sound(path: Path) -> bool:
    beside = Path(f"{path}.sha256")
    return beside.is_file() and beside.read_text().strip() == sha256_of(path)


def _write_converted(digest: str, layout: str, state: State) -> None:
    path = _converted_path(digest, layout)
    # Separate, contiguous tensors: safetensors refuses ones that share memory.
    own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", "source_sha256": digest, "layout": layout}

    def write(temporary: Path) -> None:
        save_file(own, temporary, metadata)
        # The hash first: a file without one is converted again, a wrong one never loads.
        text = sha256_of(temporary) + "\n"
        _write_atomically(Path(f"{path}.sha256"), lambda other: other.write_text(text))

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    with explain_disk_error(path, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# --- looking after the cache --------------------------------------------------------------------


@dataclass(frozen=True)
class CacheEntry:
    """One file in geofm's own cache.

    Attributes:
        path: The file.
        kind: ``"download"`` or ``"converted"``.
        size: In bytes.
        card: Name of the card it belongs to; None if no card claims it.
    """

    path: Path
    kind: str
    size: int
    card: str | None


def cache_entries(cards: list[WeightCard]) -> list[CacheEntry]:
    """Files in geofm's own cache.

    Args:
        cards: Cards whose names are looked up.

    Returns:
        One entry a file, sorted by path.
    """
    owners: dict[Path, str] = {}
    for card in cards:
        if card.source.kind == "url":
            owners[_download_path(card.source)] = card.name
        known = _known_hash(card.source)
        if known:
            owners[_converted_path(known, card.layout)] = card.name
    entries = []
    for kind, pattern in (
        ("converted", "converted/*.safetensors"),
        ("download", "downloads/*/*"),
    ):
        for path in sorted(cache_dir().glob(pattern)):
            if path.is_file() and path.suffix not in (".lock", ".json"):
                entries.append(CacheEntry(path, kind, path.stat().st_size, owners.get(path)))
    return entries


def verify_cache(cards: list[WeightCard]) -> list[tuple[CacheEntry, bool]]:
    """Hash every file in the cache again.

    Args:
        cards: Cards against whose hashes downloads are checked.

    Returns:
        Each entry and whether it is sound; a partial download, or one of no card, is not.
    """
    by_name = {card.name: card for card in cards}
    out = []
    for entry in cache_entries(cards):
        if entry.kind == "converted":
            sound = _converted_is_sound(entry.path)
        else:
            card = by_name.get(entry.card or "")
            sound = card is not None and _is_known_file(card, entry.path)
        out.append((entry, sound))
    return out


def _is_known_file(card: WeightCard, path: Path) -> bool:
    digest = sha256_of(path)
    known = _known_hash(card.source) or card.source.sha256
    return known is not None and digest.startswith(known)


def clean_cache(cards: list[WeightCard], names: list[str] | None = None) -> int:
    """Delete files from geofm's own cache; the recorded hashes stay, so that a change is noticed.

    Args:
        cards: Cards whose names are looked up.
        names: Delete only these cards' files; None deletes all.

    Returns:
        Bytes freed.
    """
    freed = 0
    for entry in cache_entries(cards):
        if names is None or entry.card in names:
            entry.path.unlink()
            Path(f"{entry.path}.sha256").unlink(missing_ok=True)
            freed += entry.size
    return freed
