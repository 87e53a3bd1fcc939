"""From a weight card to verified tensors: fetch, verify, read, convert, cache.

The cache is ``$GEOFM_HOME`` (default ``~/.cache/geofm``):

* ``downloads/<key>/<file>``: files from plain addresses, as they came; Hugging Face files stay in
  the Hugging Face cache (``$HF_HOME``). The key is a hash of the whole address, because the ten
  MP-MAE files share one file name.
* ``hashes/<key>.json``: the sha256 of the first download, where none or only its beginning is
  published. A file that differs later is refused.
* ``converted/<source sha256>.<layout>.<version>.safetensors``: weights under geofm's names, with
  their own sha256 beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants as hf_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from geofm.cards import Source, WeightCard
from geofm.checkpoints import read_checkpoint
from geofm.download import download, explain_disk_error
from geofm.errors import (
    CardError,
    DownloadError,
    HashMismatchError,
    LayoutError,
    WeightsNotFoundError,
)
from geofm.layouts import convert, unwrap

__all__ = [
    "CacheEntry",
    "cache_dir",
    "cache_entries",
    "clean_cache",
    "fetch",
    "file_sha256",
    "is_cached",
    "load_card_weights",
    "load_file_weights",
    "sha256_of",
    "verify_cache",
]

# Part of the converted files' names: raise it when a layout's conversion changes, so that files
# of the old one are not used any more.
_CONVERSION = "v1"

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# The base of all errors of the HTTP library below huggingface_hub: requests, httpx or httpx2.
_TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]


def cache_dir() -> Path:
    """The cache: ``$GEOFM_HOME``, else ``$XDG_CACHE_HOME/geofm``, else ``~/.cache/geofm``.

    Returns:
        Its path, whether or not it exists.
    """
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


def file_sha256(card: WeightCard) -> str | None:
    """The whole sha256 of a card's file.

    Args:
        card: The card.

    Returns:
        As the card states it, or as it was recorded at the first download; None if it is not known
        yet: the card states none or only its beginning, and the file was never fetched.

    Raises:
        HashMismatchError: The record is damaged.
    """
    if card.bundled and len(card.source.sha256 or "") < 64:
        path = _bundled_path(card)
        return sha256_of(path) if path.is_file() else None
    return _known_hash(card.source)


def is_cached(card: WeightCard) -> bool:
    """Whether a card's weights can be loaded without a network.

    Args:
        card: The card.

    Returns:
        True if they are bundled or in a cache.
    """
    if card.bundled:
        return _bundled_path(card).is_file()
    known = _known_hash(card.source)
    if known and _converted_path(known, card.layout).is_file():
        return True
    return _cached_source(card) is not None


def fetch(card: WeightCard, accept_new_hash: bool = False) -> Path:
    """The verified file of a card, downloaded if it is not in the cache.

    Args:
        card: The card.
        accept_new_hash: Where no whole hash is published: record what arrives now as the truth,
            even if it differs from the first download. A sound file in the cache stays.

    Returns:
        Path of the file as published.

    Raises:
        DownloadError: It cannot be fetched.
        HashMismatchError: It is not the published file, or not the one fetched the first time.
        LayoutError: Without a whole published hash: the first download is no such checkpoint.
        UnsafeFileError: Likewise, and it could only be read by executing code.
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
        converted = _read_converted(known, card.layout)
        if converted is not None:
            return converted
    path, digest = _fetch_verified(card, False)
    state, _ = load_file_weights(path, card.layout)
    try:
        _write_converted(digest, card.layout, state)
    except (DownloadError, SafetensorError) as error:
        # The weights are in hand: only the next load takes longer.
        logger.warning("%s: the converted weights could not be cached: %s", card.name, error)
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
    content = read_checkpoint(path)
    try:
        return convert(unwrap(content), layout)
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from error


# --- fetching ---------------------------------------------------------------------------------


def _fetch_verified(card: WeightCard, accept_new_hash: bool) -> tuple[Path, str]:
    if card.bundled:
        path = _bundled_path(card)
        if not path.is_file():
            raise WeightsNotFoundError(
                f"{card.name}: the bundled file {path} is missing; reinstall"
            )
        return path, _verify(card, path, None)
    recorded = _read_record(_record_path(card.source))
    cached = _cached_source(card)
    if cached is not None:
        try:
            # Never accepted as new: what differs in the cache may just as well be damaged.
            return cached, _verify(card, cached, recorded)
        except (HashMismatchError, LayoutError) as error:
            # A damaged cache heals itself; if the source changed, the fresh file says so below.
            logger.warning("%s; fetching it again", error)
            _forget(card.source, cached)
    path = _download(card, force=cached is not None)
    try:
        return path, _verify(card, path, None if accept_new_hash else recorded)
    except (HashMismatchError, LayoutError):
        _forget(card.source, path)
        raise


def _verify(card: WeightCard, path: Path, recorded: str | None) -> str:
    digest = sha256_of(path)
    published = card.source.sha256
    if published and not digest.startswith(published):
        raise HashMismatchError(
            f"{card.name}: {path.name} has sha256 {digest}, the card says {published}"
            f"{'...' if len(published) < 64 else ''}: it is damaged or not the published file"
        )
    if card.bundled or (published and len(published) == 64):
        return digest
    if recorded is None:
        # Only a file that can be used is worth keeping to.
        load_file_weights(path, card.layout)
        content = {"source": str(card.source), "sha256": digest, "size": path.stat().st_size}
        text = json.dumps(content)
        _write_atomically(_record_path(card.source), lambda temporary: temporary.write_text(text))
        logger.info("%s: recorded sha256 %s", card.name, digest)
    elif recorded != digest:
        raise HashMismatchError(
            f"{card.name}: {path.name} has sha256 {digest}, but the first download had {recorded}: "
            f"the file at {card.source} has changed. If that is as it should be, accept it with: "
            f"geofm download {card.name} --accept-new-hash"
        )
    return digest


def _download(card: WeightCard, force: bool) -> Path:
    source = card.source
    if hf_constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{card.name} is {'damaged' if force else 'not'} in the cache and HF_HUB_OFFLINE is "
            f"set. Unset it, or fetch it on a machine with a network (geofm download {card.name}) "
            f"and copy {cache_dir()}"
        )
    logger.info("fetching %s from %s", card.name, source)
    if source.kind == "url":
        return download(str(source.url), _download_path(source))
    return _download_from_hub(card, force)


def _download_from_hub(card: WeightCard, force: bool) -> Path:
    source = card.source
    assert source.repo
    assert source.filename
    try:
        target = Path(hf_constants.HF_HUB_CACHE) / "file"
        with explain_disk_error(target, str(source), "HF_HOME"):
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
            f"{card.name}: the hub cannot be reached and {source} is not in its cache "
            f"({_first_line(error.__cause__ or error)}). Without a network, put the file anywhere "
            f"and pass pretrained=<its path>"
        ) from error
    except EntryNotFoundError as error:
        raise DownloadError(
            f"{card.name}: the hub has no such file: {source} ({_first_line(error)})"
        ) from error
    except DownloadError:
        raise
    # ValueError: without a network, where a damaged file was to be replaced. RuntimeError: hf_xet.
    except (_TransportError, OSError, RuntimeError, ValueError) as error:
        raise DownloadError(
            f"{card.name}: fetching {source} failed: {_first_line(error.__cause__ or error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _bundled_path(card: WeightCard) -> Path:
    assert card.source.filename
    return card.path.parent / card.source.filename


def _cached_source(card: WeightCard) -> Path | None:
    source = card.source
    if source.kind == "url":
        path = _download_path(source)
        return path if path.is_file() else None
    assert source.repo
    assert source.filename
    try:
        found = try_to_load_from_cache(
            source.repo, source.filename, revision=source.revision, repo_type=source.repo_type
        )
    except HFValidationError as error:
        raise CardError(f"card {card.path.name}: source.repo: {error}") from error
    return Path(found) if isinstance(found, str) else None


def _forget(source: Source, path: Path) -> None:
    # Hugging Face's cache replaces its own file when asked to download by force.
    if source.kind == "url":
        path.unlink(missing_ok=True)


def _key(source: Source) -> str:
    identity = f"{source.url}|{source.repo_type}|{source.repo}|{source.revision}|{source.filename}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _download_path(source: Source) -> Path:
    name = urlsplit(str(source.url)).path.rpartition("/")[2].replace("\\", "_")
    return cache_dir() / "downloads" / _key(source) / (name.lstrip(".") or "file")


# --- hashes -----------------------------------------------------------------------------------


def _record_path(source: Source) -> Path:
    return cache_dir() / "hashes" / f"{_key(source)}.json"


def _read_record(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise HashMismatchError(
            f"the hash record {path} is damaged ({error}); delete it to trust the next download"
        ) from error


def _known_hash(source: Source) -> str | None:
    if source.sha256 and len(source.sha256) == 64:
        return source.sha256
    recorded = _read_record(_record_path(source))
    # A card may learn the beginning of the hash after the first download.
    return recorded if recorded and recorded.startswith(source.sha256 or "") else None


# --- the converted cache ----------------------------------------------------------------------


def _converted_path(digest: str, layout: str) -> Path:
    return cache_dir() / "converted" / f"{digest}.{layout}.{_CONVERSION}.safetensors"


def _read_converted(digest: str, layout: str) -> State | None:
    path = _converted_path(digest, layout)
    if not path.is_file():
        return None
    if not _converted_is_sound(path):
        logger.warning("%s does not have its recorded hash; converting again", path)
        return None
    return load_file(path)


def _converted_is_sound(path: Path) -> bool:
    beside = Path(f"{path}.sha256")
    return beside.is_file() and beside.read_bytes().strip() == sha256_of(path).encode()


def _write_converted(digest: str, layout: str, state: State) -> None:
    path = _converted_path(digest, layout)
    # Separate, contiguous tensors: safetensors refuses ones that share memory.
    own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

    def write(temporary: Path) -> None:
        # One entry of metadata: several are written in random order, and processes that convert at
        # the same time must write the same bytes, or one's hash stands beside the other's file.
        save_file(own, temporary, {"format": "pt"})
        # The hash first: a file without one is converted again, a wrong one never loads.
        text = sha256_of(temporary) + "\n"
        _write_atomically(Path(f"{path}.sha256"), lambda other: other.write_text(text))

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    with explain_disk_error(path, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            # Safetensors' files are their owner's alone; a cache may be shared: the umask decides.
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            temporary.replace(path)
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
            target = _download_path(card.source)
            owners[target] = owners[Path(f"{target}.part")] = card.name
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
            for suffix in (".sha256", ".json"):
                Path(f"{entry.path}{suffix}").unlink(missing_ok=True)
            freed += entry.size
    return freed
