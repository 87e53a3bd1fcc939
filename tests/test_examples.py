"""The examples run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import data

from geofm.datasets import samples, write_shards

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXAMPLE = EXAMPLES / "finetune_eurosat.py"


def accuracy(*words: object, example: Path = EXAMPLE) -> float:
    done = subprocess.run(
        [sys.executable, str(example), *map(str, words)],
        capture_output=True,
        text=True,
        # Threads that fight with another test's over the cores make it ten times slower.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"(?:held-out accuracy|top-1 after few-shot:) ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found.group(1))


def test_the_example_is_under_120_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 120


@pytest.mark.parametrize("frozen", [[], ["--frozen"]])
def test_finetuning_learns_generated_tiles(tmp_path: Path, frozen: list[str]) -> None:
    samples.write_eurosat(tmp_path, n_per_class=8, size=32)
    # Chance is 1/7.
    assert accuracy(tmp_path, "--weights", "none", "--epochs", 8, *frozen) > 0.4


def test_finetuning_clearly_beats_chance_on_real_tiles() -> None:
    folder = data("eurosat_ms_200")
    # Chance is 1/10.
    assert accuracy(folder, "--weights", "none", "--epochs", 3) > 0.25


def test_few_shot_learns_generated_species(tmp_path: Path) -> None:
    write_shards(tmp_path, 60, seed=0)
    words = [tmp_path, "--model", "geotreeclip_tiny", "--weights", "none", "--k", 2]
    result = accuracy(*words, "--lr", 1e-3, "--epochs", 8, example=EXAMPLES / "few_shot_species.py")
    # Chance is 1/10.
    assert result > 0.2
