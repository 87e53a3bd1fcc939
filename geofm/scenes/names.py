"""What the names of Sentinel-2 products and files say."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from geofm.errors import PixelError
from geofm.preprocess import offset_of_baseline

__all__ = ["Facts", "check_offset", "date_of", "facts_of_name", "offset_or_none"]

# S2A_MSIL2A_20170613T101031_N0500_R022_T33UUP_...; data sets shorten it after the date.
_PRODUCT = re.compile(
    r"S2[A-D]_MSI(?P<level>L1C|L2A)_(?P<date>\d{8})T\d{6}(?:_(?P<baseline>N\d{4})_)?"
)
# Earth Engine: 20200604T054639_20200604T054831_T43RCP. Image files: T43RCP_20200604T054639_B02.
_GRANULE = re.compile(r"(?<!\d)(?P<date>\d{8})T\d{6}_\d{8}T\d{6}_T\d{2}[A-Z]{3}(?![A-Z0-9])")
_IMAGE = re.compile(r"(?<![A-Z0-9])T\d{2}[A-Z]{3}_(?P<date>\d{8})T\d{6}(?!\d)")
# Earth Search: S2A_43RCP_20200604_0_L2A.
_COG = re.compile(r"S2[A-D]_\d{2}[A-Z]{3}_(?P<date>\d{8})_\d+_(?P<level>L1C|L2A)")

# Types of DN; 8 bits are a picture.
_DN = {"uint16", "int16", "uint32", "int32"}


@dataclass(frozen=True)
class Facts:
    """What is known of a scene besides its pixels; None where it is not.

    Attributes:
        units: ``"dn"``, ``"reflectance"`` or ``"uint8"``.
        level: ``"L1C"`` or ``"L2A"``.
        offset: Added to DN.
        date: Day of sensing, UTC.
        nodata: Stored values that mean "no data".
        product: Whether it is known to be Sentinel-2's, whose integers are DN.
    """

    units: str | None = None
    level: str | None = None
    offset: float | None = None
    date: datetime.date | None = None
    nodata: tuple[float, ...] = ()
    product: bool = False

    def filled(self, other: Facts) -> Facts:
        """These facts, and those of `other` where these know nothing.

        Args:
            other: Less trusted facts.
        """
        return Facts(
            units=self.units or other.units,
            level=self.level or other.level,
            offset=other.offset if self.offset is None else self.offset,
            date=self.date or other.date,
            nodata=self.nodata or other.nodata,
            product=self.product or other.product,
        )

    def corrected(self, given: Facts, strict: bool) -> Facts:
        """These facts, with what the caller says.

        Args:
            given: The caller's.
            strict: Whether a contradiction is an error; else the caller is right.

        Raises:
            PixelError: They contradict each other.
        """
        for name in ("units", "level", "offset", "date"):
            mine, said = getattr(self, name), getattr(given, name)
            if strict and mine is not None and said is not None and mine != said:
                mine, said = (str(v) if name == "date" else repr(v) for v in (mine, said))
                raise PixelError(
                    f"{name}={said} was given, but the scene's own name or metadata say {mine}; "
                    f"leave {name}= out, or say strict=False (on the command line: --no-strict) if "
                    f"they are wrong"
                )
        return replace(given.filled(self), product=self.product)

    def of_pixels(self, dtypes: Iterable[str]) -> Facts:
        """These facts, with the units that follow from them: integers of a product are DN.

        Args:
            dtypes: Types of the bands' pixels.
        """
        if self.units is None and self.product and set(dtypes) <= _DN:
            return replace(self, units="dn")
        return self


def facts_of_name(name: str) -> Facts:
    """What a product's, folder's or file's name says.

    Args:
        name: The name; other text around it does not matter.

    Returns:
        Level, date and, where the processing baseline is in the name, the offset.
    """
    for pattern in (_PRODUCT, _COG, _GRANULE, _IMAGE):
        match = pattern.search(name)
        if match:
            groups = match.groupdict()
            baseline = groups.get("baseline")
            return Facts(
                level=groups.get("level"),
                date=date_of(groups["date"]),
                offset=offset_or_none(baseline) if baseline else None,
                product=True,
            )
    return Facts()


def offset_or_none(baseline: str) -> float | None:
    """The offset of a processing baseline, None for one that does not tell (99.99, or no number).

    Args:
        baseline: For example ``"05.09"`` or ``"N0509"``.
    """
    try:
        return offset_of_baseline(baseline)
    except PixelError:
        return None


def check_offset(offset: float | None) -> float | None:
    """An offset as a float, if it is a number.

    Args:
        offset: What the caller gave.

    Raises:
        PixelError: It is not a number.
    """
    if offset is None:
        return None
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise PixelError(f"offset is a number, for example -1000; got {offset!r}")
    return float(offset)


def date_of(text: str | datetime.date | None) -> datetime.date | None:
    """The day that a date or a time stamp names.

    Args:
        text: ISO 8601 (``"2020-06-04"``, ``"20200604"``, with or without a time), or a date.

    Raises:
        PixelError: It is none.
    """
    if text is None:
        return None
    if isinstance(text, datetime.datetime):
        return text.date()
    if isinstance(text, datetime.date):
        return text
    try:
        return datetime.date.fromisoformat(text.strip().partition("T")[0])
    except (ValueError, AttributeError) as error:
        raise PixelError(f"a date looks like '2020-06-04', got {text!r}") from error
