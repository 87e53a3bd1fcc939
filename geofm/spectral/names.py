"""Names that a user gives: a list, where a string is easily taken for one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from geofm.errors import BandError, GeofmError

__all__ = ["refuse_string"]


def refuse_string(
    given: Iterable[Any] | str, argument: str, error: type[GeofmError] = BandError
) -> None:
    """Refuse a string where a list of names is expected: its letters would be taken for names.

    Args:
        given: What was given.
        argument: Its name.
        error: What to raise.

    Raises:
        GeofmError: It is a string; `error` says which. The message shows the list to write.
    """
    if isinstance(given, str):
        names = [name.strip() for name in given.replace(";", ",").split(",")]
        raise error(
            f"{argument} must be a list of names, got the string {given!r}; write "
            f"{argument}={names!r}"
        )
