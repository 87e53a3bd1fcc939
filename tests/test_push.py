"""What a run leaves is uploaded whole, and can be fetched from where it lies then."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import toy_pretraining as toy
from huggingface_hub import constants as hf_constants
from loopback import HubHost, _Handler, serving

import geofm
from geofm.cli import main
from geofm.errors import WeightsNotFoundError
from geofm.pretrain.loop import pretrain
from geofm.pretrain.push import UploadError, push_run
from geofm.pretrain.recipe import read_recipe

pytest.importorskip("lightning_fabric")

REPO = "geo/trees"
COMMIT = "abcdef0123" * 4


@dataclass
class UploadHost(HubHost):
    """The hub with the part that takes uploads; large files go to it in pieces of git LFS."""

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refuse: int | None = None

    def take(self, handler: _Handler, body: bytes) -> None:
        path = handler.path.partition("?")[0]
        if self.refuse is not None:
            handler.reply(self.refuse, b'{"error": "no"}')
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self._json(handler, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
            self.repos[name or asked["name"]] = asked
            self._json(handler, {"url": f"{self.address}/{REPO}", "name": REPO, "id": "1"})
        elif path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._json(handler, {"files": files})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json(handler, {"transfer": "basic", "objects": objects})
        elif path.startswith("/lfs/"):
            digest = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == digest
            self.blobs[digest] = body
            handler.reply(200, b"{}")
        elif path == f"/api/models/{REPO}/commit/main":
            self._commit(handler, [json.loads(line) for line in body.splitlines() if line])
        else:
            handler.reply(404, b"{}")

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def _commit(self, handler: _Handler, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.files[REPO, COMMIT, value["path"]] = content
            else:
                self.files[REPO, COMMIT, value["path"]] = self.blobs[value["oid"]]
        url = f"{self.address}/{REPO}/commit/{COMMIT}"
        self._json(handler, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    @staticmethod
    def _json(handler: _Handler, content: Any) -> None:
        handler.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


class _Taking(_Handler):
    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # Bodies are sent to any request that is not HEAD.
        self.command = "GET"
        self.host.take(self, body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHost]:
    monkeypatch.setattr("loopback._Handler", _Taking)
    monkeypatch.setattr(hf_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hf_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    host = UploadHost()
    with serving(host):
        template = host.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hf_constants, "ENDPOINT", host.address)
        monkeypatch.setattr(hf_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield host


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    content = toy.content()
    content["train"] |= {"epochs": None, "steps": 3}
    pretrain(read_recipe(content), folder)
    return folder


def test_a_run_is_uploaded_in_one_commit(run: Path, hub: UploadHost) -> None:
    pushed = push_run(run, REPO, private=True)
    assert pushed.revision == COMMIT
    names = {name for _, _, name in hub.files}
    assert names == {
        "README.md", "mpmae_atto.toy.safetensors", "mpmae_atto.toy.toml", "recipe.yaml",
    }  # fmt: skip
    uploaded = hub.files[REPO, COMMIT, "mpmae_atto.toy.safetensors"]
    assert uploaded == (run / "mpmae_atto.toy.safetensors").read_bytes()
    assert hub.messages == ["mpmae_atto.toy, 3 steps"]
    (asked,) = hub.repos.values()
    assert asked.get("private") or asked.get("visibility") == "private"
    readme = hub.files[REPO, COMMIT, "README.md"].decode()
    assert readme.startswith("---\nlibrary_name: geofm\nlicense: cc0-1.0\n")
    assert "B4 B8" in readme or "B4, B8" in readme
    assert "made up" in readme


def test_a_card_with_the_printed_source_fetches_the_upload(
    run: Path, hub: UploadHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), REPO]) == 0
    said = capsys.readouterr().out
    assert f"revision {COMMIT}" in said
    own = (run / "mpmae_atto.toy.toml").read_text()
    source = said[said.index("[source]") :].strip()
    card = re.sub(r"\[source\]\n(?:.+\n)+", source + "\n", own)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mpmae_atto.toy.toml").write_text(card)
    model = geofm.create_model("mpmae_atto", pretrained=tmp_path / "elsewhere")
    assert model.card.source.kind == "huggingface"
    assert model.card.source.revision == COMMIT


def test_a_refusal_is_explained(run: Path, hub: UploadHost) -> None:
    hub.refuse = 403
    with pytest.raises(UploadError, match=r"geo/trees failed.*hf auth login"):
        push_run(run, REPO)
    with pytest.raises(UploadError, match="no name of a repository"):
        push_run(run, "no/such/name")


def test_a_run_without_exported_weights_is_not_uploaded(
    run: Path, hub: UploadHost, tmp_path: Path
) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"holds 0 weight cards.*--export-only"):
        push_run(tmp_path, REPO)
    for file in run.glob("mpmae_atto.toy.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mpmae_atto.toy.safetensors").write_bytes(b"other")
    with pytest.raises(WeightsNotFoundError, match="is not the file"):
        push_run(tmp_path, REPO)
    assert hub.repos == {}
