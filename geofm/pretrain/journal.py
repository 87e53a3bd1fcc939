"""The log of a run: one CSV that a resumed run continues without gap or repetition, TensorBoard."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geofm.errors import MissingExtraError

__all__ = ["Journal"]


class Journal:
    """Rows of numbers by step, in ``log.csv`` and for TensorBoard in ``tensorboard/``.

    Rows after the step that a run goes on from are removed: they are about to come again.

    Args:
        folder: Of the run.
        step: Steps done.
        tensorboard: Whether to write TensorBoard's events too.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "log.csv"
        self.columns = _cut(self.path, step)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._events = _events(folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row; it is with the operating system when this returns.

        Args:
            step: Steps done.
            row: Numbers by column; the first row decides the columns.
        """
        writer = csv.writer(self._file)
        if not self.columns:
            self.columns = ["step", *row]
            writer.writerow(self.columns)
        # repr is exact: a resumed run can be compared bit by bit.
        writer.writerow(
            [step, *(repr(float(row[c])) if c in row else "" for c in self.columns[1:])]
        )
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, value, step)

    def to_disk(self) -> None:
        """Wait until all rows are on the disk, as the checkpoint that follows them will be."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _cut(path: Path, step: int) -> list[str]:
    """Keep the rows up to a step; returns the columns."""
    if not path.exists() or not step:
        path.unlink(missing_ok=True)
        return []
    text = path.read_text(encoding="utf-8")
    # A row whose end is missing was being written when the process was killed.
    header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]
    kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
    beside = path.with_name(f".{path.name}.part")
    beside.write_text("".join(f"{line}\n" for line in [header, *kept] if line), encoding="utf-8")
    beside.replace(path)
    return header.split(",") if header else []


def _events(folder: Path, step: int) -> Any:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise MissingExtraError(
            "TensorBoard is not installed: pip install 'geofm[train]', or output.tensorboard=false"
        ) from error
    return tensorboard.SummaryWriter(str(folder), purge_step=step + 1 if step else None)
