"""Checkpoints of a run: one file each, whole or not there, readable without executing anything.

A checkpoint holds the method, the optimizer, the gradient scaler, the states of the random number
generators of every process, the position in the data, the step, the recipe, and what the weight
card will say. It is written beside its place and moved there once it is on the disk, so a process
that is killed leaves the one before. Every record in the file has a checksum (PyTorch's files are
ZIP archives), by which a damaged file is known.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geofm.errors import GeofmError

__all__ = [
    "CheckpointError",
    "checkpoints_in",
    "find_checkpoint",
    "is_sound",
    "path_of",
    "prune",
    "random_states",
    "read_state",
    "restore_random_states",
    "write_state",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})\.ckpt")


class CheckpointError(GeofmError, ValueError):
    """A checkpoint is damaged, is none, or belongs to another run."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies.

    Args:
        folder: Of the run.
        step: Steps done.

    Returns:
        Its path.
    """
    return folder / "checkpoints" / f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run, sound or not.

    Args:
        folder: Of the run.

    Returns:
        Paths by step, ascending.
    """
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt")):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return found


def is_sound(path: Path) -> bool:
    """Whether a checkpoint is complete and undamaged.

    Args:
        path: The file.

    Returns:
        True if every record has its checksum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError):
        return False


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: Of the run.
        resume: ``"auto"``: the latest sound one in `folder`, if there is any; damaged ones are
            left aside with a warning. ``"none"``: a new run. Else a checkpoint or a run's folder.

    Returns:
        Its path, None to begin anew.

    Raises:
        CheckpointError: There is nothing sound where one is named, all checkpoints in `folder` are
            damaged, or `folder` already holds a run that a new one would mix with.
    """
    known = checkpoints_in(folder)
    if resume == "none":
        if known:
            raise CheckpointError(
                f"{folder} already holds a run of {max(known)} steps: go on with it "
                f"(--resume auto) or choose another folder (-o)"
            )
        return None
    if resume == "auto":
        found = _latest_sound(known)
        if known and found is None:
            raise CheckpointError(
                f"all {len(known)} checkpoints in {folder / 'checkpoints'} are damaged, the latest "
                f"of step {max(known)}: bring back a copy of one, or begin anew in another folder "
                f"(-o)"
            )
        return found
    path = Path(resume).expanduser()
    if path.is_dir():
        inside = checkpoints_in(path)
        found = _latest_sound(inside)
        if found is None:
            raise CheckpointError(f"{path} holds no sound checkpoint; it has {len(inside)} files")
    elif not is_sound(path):
        state = "is damaged or no checkpoint" if path.exists() else "does not exist"
        raise CheckpointError(f"cannot resume from {path}: it {state}")
    else:
        found = path
    latest = max(known, default=0)
    if known and known[latest].resolve() != found.resolve():
        raise CheckpointError(
            f"{folder} already holds a run of {latest} steps; to go on from {found}, choose "
            f"another folder (-o)"
        )
    return found


def _latest_sound(known: dict[int, Path]) -> Path | None:
    damaged: list[Path] = []
    for path in reversed(known.values()):
        if is_sound(path):
            for bad in damaged:
                logger.warning("%s is damaged; going on from %s", bad, path.name)
            return path
        damaged.append(path)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, on the CPU.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: It is damaged or no checkpoint of a run.
    """
    if not is_sound(path):
        raise CheckpointError(f"{path} is damaged or no checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a run: {error}") from error
    if not isinstance(content, dict) or not {"method", "recipe", "progress"} <= set(content):
        raise CheckpointError(f"{path} is no checkpoint of a run")
    return content


def write_state(fabric: Any, path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; to be called by all processes.

    Args:
        fabric: Lightning Fabric.
        path: Where it is to lie.
        state: Modules, optimizers and plain values.
    """
    unfinished = path.with_name(f".{path.name}.part")
    if fabric.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".step-*.part"):
            left.unlink()
    fabric.barrier()
    fabric.save(unfinished, state)
    if fabric.is_global_zero:
        _to_disk(unfinished)
        unfinished.replace(path)
        _to_disk(path.parent)
    fabric.barrier()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Delete checkpoints but the latest and the best.

    Those of later steps are damaged ones that the run went back from: they do not count, or they
    would crowd out the sound ones.

    Args:
        folder: Of the run.
        step: Steps done.
        keep: How many of the latest stay.
        best: Step of the one that stays besides.
    """
    known = {number: path for number, path in checkpoints_in(folder).items() if number <= step}
    for number in sorted(known)[:-keep]:
        if number != best:
            known[number].unlink()


# --- random numbers -----------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of this process's random number generators, in plain values and tensors.

    Returns:
        Of Python, NumPy, PyTorch and CUDA.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(w) for w in key], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set this process's random number generators.

    Args:
        states: From `random_states`.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, np.array(key, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
