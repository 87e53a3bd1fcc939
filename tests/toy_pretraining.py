"""A method and data small enough to train in milliseconds; recipes name them by module."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geofm.cards import InputSpec, Statistics
from geofm.datasets._report import SkipReport
from geofm.errors import GeofmError
from geofm.factory import create_model
from geofm.pretrain.method import Exported, Method, draws_of, random_of


class ToyMethod(Method):
    """Predicts one band from two; chance from the draws, and from torch's generator (dropout)."""

    def __init__(self, width: int = 8, dropout: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(width, 1),
        )  # fmt: skip
        if not dropout:
            # Statistics of a process's own batch would differ between one process and two.
            self.net[1] = nn.Identity()

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        x = batch["x"]
        noise = [random_of(draw).normal(size=2) for draw in draws_of(batch, len(x))]
        x = x + 0.1 * torch.tensor(np.array(noise), dtype=x.dtype, device=x.device)
        error = (self.net(x)[:, 0] - batch["y"]).square().mean()
        return {"total": error, "error": error}

    def export(self) -> Exported:
        state = create_model("mpmae_atto", in_chans=2).state_dict()
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        return Exported("mpmae_atto", {"in_chans": 2, "patch_size": 8, "img_size": 56}, zeros)


class ToyError(GeofmError, OSError):
    """A sample cannot be read."""


class ToyData:
    """Numbered samples.

    `nan` is the number of one that spoils the loss, `broken` of one that cannot be read, and
    `skipped` are numbers of others that are counted as such.
    """

    def __init__(
        self,
        path: str | None = None,
        n: int = 40,
        nan: int = -1,
        pause: float = 0.0,
        broken: int = -1,
        skipped: Sequence[int] = (),
    ) -> None:
        self.broken, self.skipped = broken, set(skipped)
        self.report = SkipReport()
        if skipped:
            self.report.add("too few dates", "tile-40", log=False)
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(n, 2)).astype(np.float32)
        self.y = (self.x[:, 0] * self.x[:, 1]).astype(np.float32)
        if nan >= 0:
            self.y[nan] = np.nan
        self.pause = pause

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        time.sleep(self.pause)
        if self.broken in indices:
            raise ToyError(f"tile-{self.broken} cannot be read: broken disk")
        for index in self.skipped.intersection(indices):
            self.report.add("unreadable", f"tile-{index}", log=False)
        return [{"id": f"tile-{i}", "x": self.x[i], "y": self.y[i]} for i in indices]

    def input_spec(self) -> InputSpec:
        statistics = {"L2A": Statistics((1.0, 2.0), (3.0, 4.0))}
        return InputSpec(
            "sentinel2", ("B4", "B8"), ("L2A",), "zscore", 56, "any", (0.0,), statistics
        )


def content(**data: Any) -> dict[str, Any]:
    """A recipe of the toys, as a mapping."""
    return {
        "name": "toy",
        "method": "toy_pretraining:ToyMethod",
        "data": {"kind": "toy_pretraining:ToyData", "workers": 0, "options": data},
        "train": {"epochs": 4, "batch": 4, "clip": 1.0, "accelerator": "cpu"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"warmup_epochs": 1},
        "output": {"save_every": 5, "log_every": 1, "tensorboard": False},
        "card": {"tag": "toy", "data": "made up", "weights_licence": "CC0-1.0"},
    }


def train(content: dict[str, Any], folder: str) -> None:
    """What a process of its own does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from geofm.pretrain.loop import pretrain
    from geofm.pretrain.recipe import read_recipe

    pretrain(read_recipe(content), folder)
