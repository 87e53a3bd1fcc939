"""Counting what a data set leaves out or replaces, over all processes that read it."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from geofm.errors import GeofmError

__all__ = ["Report", "SkipReport"]

logger = logging.getLogger(__name__)

# Processes that count apart, and the bytes that each one's counts and examples may take as JSON.
_ROWS: Final = 65
_BYTES: Final = 16_384
_EXAMPLES: Final = 3
_LONGEST_EXAMPLE: Final = 600
# Of the threads of one process.
_WRITING = threading.Lock()


class Report(Protocol):
    """What the ``report`` of every data set tells, in words as ``str(report)``."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How often something was missing, left out or replaced, by reason."""
        ...

    @property
    def examples(self) -> Mapping[str, Sequence[str]]:
        """Of each reason the first few cases."""
        ...


class SkipReport:
    """What was left out or replaced, by a process and the DataLoader workers it started.

    Counts lie in shared memory as JSON, a row for each worker's number, so that nobody has to wait
    for another. Loaders of one data set that run at the same time have workers of the same number,
    whose counts may get lost.
    """

    def __init__(self) -> None:
        self._rows: Tensor = torch.zeros(_ROWS, _BYTES, dtype=torch.uint8)
        self._rows.share_memory_()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy by pickle, which is nobody else's, counts for its own workers.
        self._rows.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def counts(self) -> Counter[str]:
        """How often something was left out or replaced, by reason."""
        found: Counter[str] = Counter()
        for content in self._contents():
            found.update({reason: count for reason, (count, _) in content.items()})
        return found

    @property
    def examples(self) -> dict[str, list[str]]:
        """For each reason the first few messages of each process, naming a file or folder."""
        found: dict[str, list[str]] = {}
        for content in self._contents():
            for reason, (_, examples) in content.items():
                found.setdefault(reason, []).extend(examples)
        return found

    def __str__(self) -> str:
        examples = self.examples
        return "; ".join(
            f"{count} x {reason}, for example: {(examples[reason] or ['not kept'])[0]}"
            for reason, count in self.counts.most_common()
        )

    def add(self, reason: str, example: str, count: int = 1, log: bool = True) -> None:
        """Count.

        Args:
            reason: In a word or two.
            example: A message that names the file.
            count: How many cases.
            log: Whether the first few messages go to the log.
        """
        info = get_worker_info()
        row = self._rows[0 if info is None else 1 + info.id % (_ROWS - 1)].numpy()
        with _WRITING:
            content = _read(row) or {}
            before, examples = content.get(reason, (0, []))
            new = len(examples) < _EXAMPLES
            if new:
                examples = [*examples, example[:_LONGEST_EXAMPLE]]
            content[reason] = (before + count, examples)
            _write(row, content)
        if new and log:
            # At once, also from a worker; the counts are read at the end.
            logger.warning("left out: %s", example)

    def add_error(self, error: GeofmError) -> None:
        """Count what an error says.

        Args:
            error: Counted by its ``reason`` if it has one, else by its class.
        """
        self.add(getattr(error, "reason", type(error).__name__), str(error))

    def _contents(self) -> list[dict[str, tuple[int, list[str]]]]:
        rows = self._rows.numpy()
        # Few processes have anything to tell.
        return [_read(rows[number]) or {} for number in np.flatnonzero(rows[:, 0])]


def _read(row: NDArray[np.uint8]) -> dict[str, tuple[int, list[str]]] | None:
    text = row.tobytes().partition(b"\0")[0]
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        # Another process is writing it just now.
        return None
    return {reason: (int(count), list(examples)) for reason, (count, examples) in content.items()}


def _write(row: NDArray[np.uint8], content: Mapping[str, tuple[int, Sequence[str]]]) -> None:
    for kept in range(_EXAMPLES, -1, -1):
        shown = {reason: (count, list(e)[:kept]) for reason, (count, e) in content.items()}
        text = json.dumps(shown).encode()
        if len(text) < _BYTES:
            row[: len(text) + 1] = np.frombuffer(text + b"\0", np.uint8)
            return
