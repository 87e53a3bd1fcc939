"""Shared folders and fixtures; real data and published outputs lie beside the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA = SHARED / "data"
PARITY = SHARED / "parity"

# One thread for each of the processes that share two cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def data(*parts: str) -> Path:
    """A real file, or a skip that says what is missing."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data {Path(*parts)} is not beside the checkout")
    return path


@dataclass
class Fixture:
    """A checkpoint anyone can rebuild, an input, and what the published code made of it."""

    spec: dict[str, Any]
    state: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    pixels: torch.Tensor
    outputs: dict[str, np.ndarray]


def parity(name: str) -> Fixture:
    """Rebuild a fixture of ../shared/parity, or skip."""
    if not (PARITY / f"{name}.json").exists():
        pytest.skip(f"fixture {name} is not beside the checkout")
    fill = _fill()
    spec = json.loads((PARITY / f"{name}.json").read_text())
    salt = spec.get("salt", 0)

    def tensor(key: str, shape: list[int]) -> torch.Tensor:
        parts = key.split(".")
        if parts[0] == "decoder_dict" and parts[2] == "0":
            key = ".".join(["decoder_dict.shared", *parts[3:]])
        return torch.from_numpy(np.array(fill.values(key, tuple(shape), salt)))

    source = spec["input"]
    bounds = (source["low"], source["high"]) if "low" in source else ()
    return Fixture(
        spec=spec,
        state={key: tensor(key, shape) for key, shape in spec["checkpoint"].items()},
        head={k: tensor(k, s) for k, s in (spec.get("head_and_decoder") or {}).items()},
        pixels=torch.from_numpy(fill.inputs(source["tag"], tuple(source["shape"]), *bounds)),
        outputs=dict(np.load(PARITY / f"{name}.npz")),
    )


def _fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill", PARITY / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("GEOFM_HOME", str(tmp_path_factory.mktemp("geofm-home")))
