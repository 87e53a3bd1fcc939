"""Numbers of samples."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["checked_index"]


def checked_index(index: Any, count: int, what: str) -> int:
    """A sample's number.

    Args:
        index: What was given; below 0 from the end.
        count: How many there are.
        what: They are called, for the message.

    Returns:
        As given.

    Raises:
        TypeError: It is no whole number.
        IndexError: There is no such sample.
    """
    try:
        number = operator.index(index)
    except TypeError as error:
        raise TypeError(
            f"{what} must be a whole number, got {index!r}; several samples at once are "
            f"[dataset[i] for i in range(...)], or a DataLoader"
        ) from error
    if not -count <= number < count:
        raise IndexError(f"{what} {number} of {count}")
    return number
