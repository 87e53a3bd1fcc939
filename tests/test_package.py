"""What a user installs, and what the README tells them to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import rasterio

import geofm
from geofm.cards import published_cards, weights_dir
from geofm.datasets import samples

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_brings_the_cards_and_finds_them(tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "geofm/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    code = (
        "import geofm; from geofm.cards import published_cards, weights_dir;"
        "print(geofm.__file__, weights_dir(), len(published_cards()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert out == [
        str(site / "geofm" / "__init__.py"),
        str(site / "geofm" / "weights"),
        str(len(published_cards())),
    ]


def test_a_checkout_finds_its_cards() -> None:
    assert weights_dir() == ROOT / "weights"
    assert len(published_cards()) >= 13


def test_the_readmes_eight_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) == 8
    scene = samples.landscape((64, 64))
    samples.write_scene(tmp_path / "all.tif", scene)
    with rasterio.open(tmp_path / "all.tif") as file:
        profile = file.profile | {"count": 4}
        with rasterio.open(tmp_path / "scene.tif", "w", **profile) as four:
            four.write(file.read([2, 3, 4, 8]))
    monkeypatch.chdir(tmp_path)
    # The only change: no published weights can be had in a test.
    assert "pretrained=True" in block
    names: dict[str, object] = {}
    exec(block.replace("pretrained=True", "pretrained=False"), names)
    assert names["features"].shape == (1, 320)


def test_the_version_is_the_changelogs() -> None:
    assert re.search(
        r"^## \[(Unreleased|" + re.escape(geofm.__version__) + r")\]",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )
