"""Where finished blocks go: memory, or a folder from which an interrupted run continues.

`out.tif.partial/` holds `plan.json` (what the run is of), `cells.raw` (values, row by row, all
channels of a row together), `done.txt` (for each finished block its panel, its row, and the bytes
that `cells.raw` had then) and `fit.npz` (principal components and scales). A GeoTIFF that is killed
while it is written cannot be read again; plain rows can.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from geofm.errors import RasterError
from geofm.raster.codecs import Codec, Projection

__all__ = ["MemoryStore", "PartialStore", "Store", "cannot_write"]

logger = logging.getLogger(__name__)

_CELLS, _DONE, _PLAN, _FIT = "cells.raw", "done.txt", "plan.json", "fit.npz"


class Store(Protocol):
    """Takes finished blocks, from one thread."""

    def write(
        self,
        panel: int,
        row: int,
        place: tuple[int, int],
        block: NDArray[Any],
        enough: NDArray[np.bool_],
    ) -> None:
        """Take a block.

        Args:
            panel: Its panel.
            row: Its row of windows.
            place: Its first row and column of cells.
            block: (channels, rows, columns).
            enough: (rows, columns), False where there is no data.
        """
        ...

    def finished(self, panel: int) -> int:
        """Rows of windows of a panel that are there already."""
        ...


class MemoryStore:
    """Keeps the cells in an array.

    Args:
        codec: How they are stored.
        shape: (bands, rows, columns) of the output.
    """

    def __init__(self, codec: Codec, shape: tuple[int, int, int]) -> None:
        self.codec = codec
        self.cells = np.zeros(shape, dtype=codec.stored)

    def write(
        self,
        panel: int,
        row: int,
        place: tuple[int, int],
        block: NDArray[Any],
        enough: NDArray[np.bool_],
    ) -> None:
        """As `Store.write`."""
        top, left = place
        rows, columns = enough.shape
        part = self.codec.encode(block, enough)
        self.cells[:, top : top + rows, left : left + columns] = part

    def finished(self, panel: int) -> int:
        """None: memory does not outlive the run."""
        return 0


class PartialStore:
    """Keeps the cells in a folder beside the output until all are there.

    Args:
        output: The file to be.
        plan: All that the result depends on, by name.
        resume: Continue what is there.

    Raises:
        RasterError: The folder cannot be written, is in use, or holds the beginning of another
            run.
    """

    def __init__(
        self, output: str | os.PathLike[str], plan: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.output = Path(output)
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.plan = json.loads(json.dumps(plan))
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RasterError(f"{self.folder} is in use by another run; wait for it") from error
        except OSError as error:
            raise RasterError(f"cannot write {self.output}: {_reason(error)}") from error
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            self._begin(resume)
            undo.pop_all()

    def _begin(self, resume: bool) -> None:
        path = self.folder / _PLAN
        found = _read_plan(path) if resume else None
        if found is not None:
            self._check_plan(found)
        elif any(self.folder.joinpath(name).exists() for name in (_CELLS, _DONE, _FIT)):
            logger.warning("%s: what is there is put aside and computed anew", self.folder)
        try:
            if found is None:
                for name in (_PLAN, _DONE, _FIT, _CELLS):
                    (self.folder / name).unlink(missing_ok=True)
                (self.folder / _CELLS).touch()
                _write_whole(path, json.dumps(self.plan, indent=1).encode())
            self._done, size = _read_done(self.folder / _DONE)
            cells = self.folder / _CELLS
            if not cells.exists() or cells.stat().st_size < size:
                logger.warning("%s is shorter than what was finished; all is computed anew", cells)
                (self.folder / _DONE).unlink(missing_ok=True)
                cells.touch()
                self._done = set()
        except OSError as error:
            raise cannot_write(self.output, error, self.folder) from error
        if self._done:
            logger.info("%s: %d blocks are there already", self.folder, len(self._done))

    def _check_plan(self, found: Mapping[str, Any]) -> None:
        keys = {*found, *self.plan}
        changed = sorted(k for k in keys if found.get(k) != self.plan.get(k))
        if changed:
            shown = "; ".join(
                f"{key}: {_short(found.get(key))} then, {_short(self.plan.get(key))} now"
                for key in changed[:4]
            )
            raise RasterError(
                f"{self.folder} is the beginning of another run ({shown}). Ask for the same to "
                f"continue it, start over with resume=False (--no-resume), or delete the folder"
            )

    def prepare(self, codec: Codec, shape: tuple[int, int, int]) -> None:
        """Say what the cells are like, before the first is written.

        Args:
            codec: How they are stored.
            shape: (bands, rows, columns) of the output.
        """
        self.codec, self.shape = codec, shape

    @property
    def cells(self) -> Path:
        """The file of cells: (rows, bands, columns) of the codec's type, native byte order."""
        return self.folder / _CELLS

    def finished(self, panel: int) -> int:
        """Rows of windows of a panel that are there already: they are written in order."""
        row = 0
        while (panel, row) in self._done:
            row += 1
        return row

    def write(
        self,
        panel: int,
        row: int,
        place: tuple[int, int],
        block: NDArray[Any],
        enough: NDArray[np.bool_],
    ) -> None:
        """As `Store.write`; the block counts as done only once it is on the disk."""
        part = self.codec.encode(block, enough)
        # All bands of a row of cells together.
        lines = np.ascontiguousarray(part.transpose(1, 0, 2))
        bands, _, width = self.shape
        top, left = place
        item = lines.dtype.itemsize
        try:
            with self.cells.open("r+b", buffering=0) as file:
                if lines.shape[2] == width:
                    _write_at(file.fileno(), lines, top * bands * width * item)
                else:
                    for number, line in enumerate(lines.reshape(-1, lines.shape[2])):
                        begin = (top * bands + number) * width + left
                        _write_at(file.fileno(), line, begin * item)
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            with (self.folder / _DONE).open("ab") as journal:
                journal.write(f"{panel} {row} {size}\n".encode())
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise cannot_write(self.output, error, self.folder) from error
        self._done.add((panel, row))

    def save_fit(self, codec: Codec) -> None:
        """Keep what was fitted to a sample, so that a continued run uses the same.

        Args:
            codec: The codec.
        """
        arrays = {"scale": codec.scale, "zero": codec.zero}
        if codec.projection is not None:
            arrays |= vars(codec.projection)
        temporary = self.folder / "fit.tmp.npz"
        try:
            present: dict[str, Any] = {k: v for k, v in arrays.items() if v is not None}
            np.savez(temporary, **present)
            temporary.replace(self.folder / _FIT)
        except OSError as error:
            raise cannot_write(self.output, error, self.folder) from error

    def load_fit(self, dtype: str) -> Codec | None:
        """What an earlier run fitted.

        Args:
            dtype: Of the codec.

        Returns:
            The codec, or None if there is none yet.

        Raises:
            RasterError: It is damaged.
        """
        path = self.folder / _FIT
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from error
        names = ("mean", "loadings", "explained")
        projection = Projection(*(found[n] for n in names)) if "mean" in found else None
        return Codec(dtype, projection, found.get("scale"), found.get("zero"))

    def close(self, *, remove: bool) -> None:
        """Release the folder.

        Args:
            remove: Delete it: its output is complete, or it holds nothing worth keeping.
        """
        if remove:
            # Still locked, so that no other run begins in it meanwhile.
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    @property
    def worthless(self) -> bool:
        """Whether this run made the folder and finished nothing."""
        return self._made and not self._done


def cannot_write(path: str | os.PathLike[str], error: OSError, partial: Path) -> RasterError:
    """What to say when writing fails.

    Args:
        path: The output.
        error: Why.
        partial: Where finished blocks are.

    Returns:
        The error to raise.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RasterError(
            f"cannot write {path}: the disk is full. What is finished is kept in {partial}; make "
            f"room and run the same again to continue"
        )
    return RasterError(
        f"cannot write {path}: {_reason(error)}. What is finished is kept in {partial}"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _write_at(file: int, values: NDArray[Any], begin: int) -> None:
    if not values.size:
        return
    view = memoryview(values.data).cast("B")
    while view:
        count = os.pwrite(file, view, begin)
        view, begin = view[count:], begin + count


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _read_plan(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        plan: Mapping[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return plan


def _damaged(path: Path, error: Exception) -> RasterError:
    return RasterError(
        f"{path} is damaged ({error}), so that this run cannot be continued; start over with "
        f"resume=False (--no-resume), or delete {path.parent}"
    )


def _read_done(path: Path) -> tuple[set[tuple[int, int]], int]:
    """Panels and rows of finished blocks, and the bytes that the cells have at least."""
    if not path.exists():
        return set(), 0
    # A line without its end was being written when the run stopped.
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if complete != text:
        # Or the next line would be appended to it.
        _write_whole(path, complete)
    try:
        lines = [tuple(map(int, line.split())) for line in complete.splitlines()]
        blocks = {(panel, row) for panel, row, _ in lines}
    except ValueError as error:
        raise _damaged(path, error) from error
    return blocks, max((size for _, _, size in lines), default=0)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
