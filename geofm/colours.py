"""Colours that people with any colour vision tell apart.

Nine categorical colours are Paul Tol's "muted" scheme (https://personal.sron.nl/~pault/, 2021). No
scheme of that quality has more; from the tenth class on, lighter and darker ones of the same hues
follow, which are told apart with the legend's help only.
"""

from __future__ import annotations

__all__ = ["CATEGORIES", "NO_DATA", "OTHER", "colour_of"]

Colour = tuple[int, int, int]

_MUTED: tuple[Colour, ...] = (
    (0x33, 0x22, 0x88),
    (0xDD, 0xCC, 0x77),
    (0x11, 0x77, 0x33),
    (0x88, 0xCC, 0xEE),
    (0xCC, 0x66, 0x77),
    (0x99, 0x99, 0x33),
    (0x88, 0x22, 0x55),
    (0x44, 0xAA, 0x99),
    (0xAA, 0x44, 0x99),
)


def _mixed(colour: Colour, other: int, share: float) -> Colour:
    red, green, blue = (round(v * (1 - share) + other * share) for v in colour)
    return red, green, blue


CATEGORIES: tuple[Colour, ...] = (
    *_MUTED,
    *(_mixed(colour, 255, 0.5) for colour in _MUTED),
    *(_mixed(colour, 0, 0.5) for colour in _MUTED),
)
"""Of classes, in their order; neighbours differ in lightness."""

NO_DATA: Colour = (0xDD, 0xDD, 0xDD)
"""Of cells without data."""

OTHER: Colour = (0x77, 0x77, 0x77)
"""Of all classes that a legend has no room for."""


def colour_of(number: int) -> Colour:
    """Colour of a class.

    Args:
        number: From 0 on; after the last colour comes the first.
    """
    return CATEGORIES[number % len(CATEGORIES)]
