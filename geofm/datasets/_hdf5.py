"""Rows of HDF5 arrays, many at a time, in as few and as cheap steps as the file allows."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.errors import MissingExtraError

zlib: Any
try:
    # The same format, inflated in 0.6 of the time; part of the extra, but not on every platform.
    zlib = importlib.import_module("isal.isal_zlib")
except ImportError:
    zlib = importlib.import_module("zlib")

__all__ = ["RowFile", "import_h5py"]

_DEFLATE: Final = 1  # H5Z_FILTER_DEFLATE
# What a damaged or absent chunk raises: in the file, in its structure, in its compression. For a
# chunk that was never written h5py tries to allocate the size -1.
_DAMAGE: Final[tuple[type[Exception], ...]] = (
    OSError,
    RuntimeError,
    ValueError,
    MemoryError,
    zlib.error,
)


def import_h5py() -> Any:
    """The module h5py, which is optional.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise MissingExtraError(
            "HDF5 files need h5py, which is not installed: pip install 'geofm[train]'"
        ) from error


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of the file and how its rows lie there.

    Attributes:
        dataset: h5py's.
        offset: Of the first row, in bytes, where rows lie one after the other, uncompressed.
        by_row: Whether each row is a chunk of its own, uncompressed or deflated.
        deflated: Whether chunks are deflated, where not one says that it is not.
    """

    dataset: Any
    offset: int | None
    by_row: bool
    deflated: bool


class RowFile:
    """An HDF5 file of arrays whose first axis is the row.

    It is opened when first read from, anew in each process: neither HDF5's state nor a file
    position is shared with the process this one was forked from. Threads may read at once, but not
    while one closes it.

    Two layouts are read around HDF5's own machinery, whose cost for each call is larger than that
    of the data: uncompressed arrays, a run of neighbouring rows in one system call, and arrays of
    one chunk a row, as stored, inflated with ISA-L or zlib. Whatever does not work out there, HDF5
    reads again and has the last word.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: int | None = None
        self._file: Any = None
        self._descriptor = -1
        self._arrays: dict[str, _Array] = {}
        self._opening = threading.Lock()
        # Of each thread, as it may still work on the rows while another one reads.
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def close(self) -> None:
        """Close the file; the next reading opens it again."""
        file, descriptor = self._file, self._descriptor
        self._file, self._descriptor, self._process = None, -1, None
        self._arrays.clear()
        if descriptor >= 0:
            os.close(descriptor)
        if file is not None:
            file.close()

    def file(self) -> Any:
        """The open h5py file of this process.

        Returns:
            The file.

        Raises:
            MissingExtraError: h5py is not installed.
            OSError: It cannot be opened or is no HDF5.
        """
        if self._process != os.getpid():
            with self._opening:
                if self._process != os.getpid():
                    self.close()
                    self._file = import_h5py().File(self.path, "r")
                    self._descriptor = os.open(self.path, os.O_RDONLY)
                    self._process = os.getpid()
        return self._file

    def read(self, name: str, rows: NDArray[np.int64]) -> tuple[NDArray[Any], dict[int, str]]:
        """Read rows of an array.

        Args:
            name: Of the array.
            rows: Ascending, without repetition.

        Returns:
            The rows in the array's type, in memory that this thread's next reading of this array
            uses again; and for each one that cannot be read its position in `rows` and why. Its
            values are undefined.
        """
        array = self._array(name)
        shape = array.dataset.shape[1:]
        # Fresh memory would cost more than filling it: the system has to clear every page first.
        room: dict[str, NDArray[Any]] = self._own.__dict__.setdefault("room", {})
        if name not in room or len(room[name]) < len(rows):
            room[name] = np.empty((len(rows), *shape), array.dataset.dtype)
        out = room[name][: len(rows)]
        failed: dict[int, str] = {}
        for start, stop in _runs(rows, 1 if array.by_row else len(rows)):
            try:
                self._read_run(array, int(rows[start]), out[start:stop])
            except _DAMAGE:
                for position in range(start, stop):
                    row = int(rows[position])
                    try:
                        array.dataset.read_direct(
                            out[position : position + 1], np.s_[row : row + 1]
                        )
                    except _DAMAGE as error:
                        failed[position] = str(error)
        return out, failed

    def _read_run(self, array: _Array, first: int, out: NDArray[Any]) -> None:
        """Read neighbouring rows from `first` on."""
        dataset = array.dataset
        if array.offset is not None:
            size = out.nbytes // len(out)
            view = out.reshape(-1).view(np.uint8).data
            got = os.preadv(self._descriptor, [view], array.offset + first * size)
            if got != out.nbytes:
                raise OSError(f"{got} of {out.nbytes} bytes")
        elif array.by_row:
            where = (first, *(0 for _ in out.shape[1:]))
            skipped, content = dataset.id.read_direct_chunk(where)
            if array.deflated and not skipped:
                content = zlib.decompress(content, bufsize=out.nbytes)
            out[0] = np.frombuffer(content, out.dtype).reshape(out.shape[1:])
        else:
            dataset.read_direct(out, np.s_[first : first + len(out)])

    def _array(self, name: str) -> _Array:
        file = self.file()
        if name not in self._arrays:
            dataset = file[name]
            properties = dataset.id.get_create_plist()
            filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
            rows_apart = dataset.chunks == (1, *dataset.shape[1:])
            plain = properties.get_external_count() == 0 and file.userblock_size == 0
            # Not on Windows.
            plain = plain and hasattr(os, "preadv")
            self._arrays[name] = _Array(
                dataset,
                dataset.id.get_offset() if dataset.chunks is None and plain else None,
                rows_apart and filters in ([], [_DEFLATE]),
                filters == [_DEFLATE],
            )
        return self._arrays[name]


def _runs(rows: NDArray[np.int64], longest: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of neighbouring rows."""
    start = 0
    for position in range(1, len(rows) + 1):
        if (
            position == len(rows)
            or rows[position] != rows[position - 1] + 1
            or position - start == longest
        ):
            yield start, position
            start = position
