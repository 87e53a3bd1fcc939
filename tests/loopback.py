"""Real HTTP servers on 127.0.0.1: a plain file host with faults, and a little Hugging Face hub.

The tests download from these; nothing leaves the machine.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["FileHost", "HubHost", "Request", "damage", "serving"]

_RANGE = re.compile(r"bytes=(\d+)-$")


@dataclass(frozen=True)
class Request:
    """One request as the server saw it, and how many bytes of a body it sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    sent: int

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class FileHost:
    """A plain file host. Every attribute may be changed between requests.

    Attributes:
        files: Content by path.
        etag: ``"strong"``, ``"weak"``, ``"date"`` (Last-Modified instead) or ``""``: no validator.
        ranges: Whether it answers Range with 206.
        if_range: Whether it minds If-Range; some servers do not.
        content_length: Whether it says how long the body is.
        truncate: End the connection after so many bytes of a body.
        truncations: How often it does so; None: always.
        status: Answer with this status instead of files.
        html: Answer with a web page, in this content type.
        delay: Seconds before each chunk.
        redirect: Paths answered by a redirection to another.
        requests: What was asked.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = "strong"
    ranges: bool = True
    if_range: bool = True
    content_length: bool = True
    truncate: int | None = None
    truncations: int | None = 1
    status: int | None = None
    html: str = ""
    delay: float = 0.0
    redirect: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path

    @property
    def bodies(self) -> list[Request]:
        """The requests that were answered by a file or a part of one."""
        return [r for r in self.requests if r.method == "GET" and r.status in (200, 206)]

    def answer(self, handler: _Handler) -> None:
        path = handler.path.partition("?")[0]
        if self.status is not None:
            handler.reply(self.status, b"no")
        elif path in self.redirect:
            handler.reply(302, b"", {"Location": self.redirect[path]})
        elif self.html:
            handler.reply(200, b"<!DOCTYPE html><p>Log in", {"Content-Type": self.html})
        elif path not in self.files:
            handler.reply(404, b"no such file")
        else:
            self._send_file(handler, self.files[path])

    def _send_file(self, handler: _Handler, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        validator = self._validator(content)
        if validator:
            headers["Last-Modified" if self.etag == "date" else "ETag"] = validator
        status, start = 200, 0
        asked = _RANGE.match(handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if asked and self.ranges and (not self.if_range or condition in (None, validator)):
            start = int(asked[1])
            if start >= len(content):
                handler.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = None
        if self.truncate is not None and self.truncations != 0:
            limit = self.truncate
            self.truncations = None if self.truncations is None else self.truncations - 1
        handler.reply(
            status,
            content[start:],
            headers,
            limit=limit,
            delay=self.delay,
            content_length=self.content_length,
        )

    def _validator(self, content: bytes) -> str:
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if self.etag == "date":
            # Differs between two contents as the date of a replaced file does.
            return f"Mon, 01 Jan 2024 00:00:{int(digest, 16) % 60:02d} GMT"
        return {"strong": f'"{digest}"', "weak": f'W/"{digest}"'}.get(self.etag, "")


@dataclass
class HubHost:
    """The part of the Hugging Face hub that `hf_hub_download` talks to.

    Attributes:
        files: Content by (repository with ``datasets/`` before a data set's, commit, file).
        gated: Repositories that want a token.
        truncate: End the connection after so many bytes of a body, always.
        status: Answer with this status, whatever is asked.
        requests: What was asked.
    """

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    truncate: int | None = None
    status: int | None = None
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    @property
    def bodies(self) -> list[Request]:
        """The requests that were answered by a file."""
        return [r for r in self.requests if r.method == "GET" and r.status in (200, 206)]

    def answer(self, handler: _Handler) -> None:
        if self.status is not None:
            handler.reply(self.status, b"no")
            return
        match = re.match(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)$", handler.path)
        if not match:
            handler.reply(404, b"no such page")
            return
        repo, revision, name = match.groups()
        commits = {commit for known, commit, _ in self.files if known == repo}
        # A branch stands for the only commit.
        commit = min(commits) if revision == "main" and commits else revision
        if repo in self.gated:
            self._refuse(handler, 403, "GatedRepo")
        elif not commits:
            # What the hub says to someone without a token, who might lack the right to know.
            self._refuse(handler, 401, "RepoNotFound")
        elif commit not in commits:
            self._refuse(handler, 404, "RevisionNotFound")
        elif (repo, commit, name) not in self.files:
            self._refuse(handler, 404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            content = self.files[repo, commit, name]
            etag = hashlib.sha256(content).hexdigest()
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{etag}"',
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(len(content)),
            }
            handler.reply(200, content, headers, limit=self.truncate)

    @staticmethod
    def _refuse(
        handler: _Handler, status: int, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        handler.reply(status, b"", {"X-Error-Code": code, **(headers or {})})


class _Handler(BaseHTTPRequestHandler):
    host: FileHost | HubHost

    def do_GET(self) -> None:
        self.host.answer(self)

    def do_HEAD(self) -> None:
        self.host.answer(self)

    def reply(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        limit: int | None = None,
        delay: float = 0.0,
        content_length: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if content_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[:limit] if self.command == "GET" else b""
        # Recorded first: a test must not look before the server has written it down.
        asked = {name.lower(): value for name, value in self.headers.items()}
        self.host.requests.append(Request(self.command, self.path, asked, status, len(sent)))
        for start in range(0, len(sent), 1 << 16):
            time.sleep(delay)
            self.wfile.write(sent[start : start + (1 << 16)])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no event here."""


@contextmanager
def serving(host: FileHost | HubHost) -> Iterator[None]:
    """Serve `host` on a free port of 127.0.0.1; sets its address."""
    handler = type("Handler", (_Handler,), {"host": host})
    with _Server(("127.0.0.1", 0), handler) as server:
        host.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def damage(path: Path, position: int = -100) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
