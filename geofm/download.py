"""One file from one address, resumable and never half written."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from huggingface_hub.utils import WeakFileLock, tqdm  # type: ignore[attr-defined]

from geofm.errors import DownloadError

__all__ = ["download", "explain_disk_error"]

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_TIMEOUT_S = 30.0
_CHUNK = 1 << 20
# The last two: a file stands where a folder should be.
_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class _IncompleteError(Exception):
    """The connection ended before the body did; what arrived is kept."""


def download(url: str, target: Path) -> Path:
    """Fetch `url` into `target`, once, however many processes ask.

    What arrives is kept in ``<target>.part``. A later attempt continues it if the server still has
    the same file (by ETag or modification date), and starts anew if not.

    Args:
        url: An ``http`` or ``https`` address.
        target: Where the complete file goes; if it exists, nothing is fetched.

    Returns:
        `target`.

    Raises:
        DownloadError: No network, an HTTP error, a web page instead of a file, a body that stays
            incomplete, or a full disk. The message says what to do; what arrived is kept.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"can only fetch http and https addresses, not {url}")
    part = Path(f"{target}.part")
    with explain_disk_error(target, url):
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{target}.lock"):
            if target.exists():
                return target
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    _fetch_once(url, part)
                    break
                except _IncompleteError as problem:
                    if attempt == _ATTEMPTS:
                        raise DownloadError(
                            f"{url}: {problem}, {_ATTEMPTS} times. What arrived is kept in {part}: "
                            f"run again to continue"
                        ) from problem
                    logger.warning("%s: %s; continuing", url, problem)
                    time.sleep(0.5 * attempt)
            part.replace(target)
            _validator(part).unlink(missing_ok=True)
    return target


@contextmanager
def explain_disk_error(path: Path, what: str, home: str = "GEOFM_HOME") -> Iterator[None]:
    """Turn the operating system's "disk full" and "read-only" into errors that say what to do.

    Args:
        path: The file being written.
        what: What it is, for the message.
        home: Environment variable that moves the folder elsewhere.

    Raises:
        DownloadError: In place of such an `OSError`.
    """
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            # The folder itself may be what could not be made.
            there = next(folder for folder in path.parents if folder.exists())
            free = shutil.disk_usage(there).free
            raise DownloadError(
                f"the disk is full: {what} did not fit into {path.parent} "
                f"({free / 1e6:,.0f} MB free). Make room and run again, or set {home} to a folder "
                f"with more space"
            ) from error
        if error.errno in _UNWRITABLE:
            raise DownloadError(
                f"cannot write to {path.parent} ({error.strerror}); set {home} to a folder you can "
                f"write to"
            ) from error
        raise


def _validator(part: Path) -> Path:
    return Path(f"{part}.json")


def _fetch_once(url: str, part: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "geofm"})
    have = part.stat().st_size if part.exists() else 0
    known = _read_validator(part)
    if have and known:
        # The server sends the rest only if its file is still the one that was begun.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known)
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            # Nothing after what we have, though it was never finished: begin anew.
            part.unlink(missing_ok=True)
            raise _IncompleteError("the server has less than what was fetched before") from error
        hint = "; the address may have moved" if error.code in (404, 410) else ""
        raise DownloadError(
            f"{url}: the server answered {error.code} {error.reason}{hint}"
        ) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"{url} cannot be reached: {reason}. Without a network, put the file anywhere and pass "
            f"pretrained=<its path>"
        ) from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{url}: the server answered with a web page instead of a file; the address may "
                f"have moved or need a login"
            )
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if response.status != 206:
            have = 0
            # Emptied first: an old beginning must never stand beside the new file's validator.
            part.write_bytes(b"")
            _write_validator(part, validator)
        elif validator not in (None, known) or not _begins_at(response, have):
            # Some servers know Range but not If-Range, and send the rest of another file.
            part.unlink()
            raise _IncompleteError("the server's file has changed since it was begun")
        _receive(response, part, have)


def _begins_at(response: HTTPResponse, position: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {position}-")


def _receive(response: HTTPResponse, part: Path, have: int) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length is not None else None
    bar = tqdm(  # type: ignore[no-untyped-call]
        total=total, initial=have, unit="B", unit_scale=True, desc=part.stem
    )
    with part.open("ab" if have else "wb") as file, bar:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, HTTPException) as error:
                problem = f"the connection broke after {have:,} bytes ({error})"
                raise _IncompleteError(problem) from error
            if not chunk:
                break
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have != total:
        raise _IncompleteError(f"the connection ended after {have:,} of {total:,} bytes")


def _read_validator(part: Path) -> str | None:
    try:
        return str(json.loads(_validator(part).read_text())["validator"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write_validator(part: Path, validator: str | None) -> None:
    # A weak ETag does not promise identical bytes.
    if validator is None or validator.startswith("W/"):
        _validator(part).unlink(missing_ok=True)
    else:
        _validator(part).write_text(json.dumps({"validator": validator}))
