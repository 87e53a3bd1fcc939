"""What a band and a sensor are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from geofm.errors import BandError

__all__ = ["Band", "Sensor"]


@dataclass(frozen=True)
class Band:
    """One spectral band.

    Attributes:
        name: The sensor's own name, for example ``"B8A"``.
        common_name: STAC ``eo:common_name``, for example ``"nir08"``; several bands of a sensor
            may share one (the red edges do); None where STAC defines none.
        wavelength: Centre wavelength in nm; None for a band that is not spectral (a class map) or
            derived from others (NDVI).
        width: Full width at half maximum in nm, None where unknown.
        resolution: Ground sampling distance in m, None where it varies.
        aliases: Other names in use for the band, matched without regard to case.
    """

    name: str
    common_name: str | None = None
    wavelength: float | None = None
    width: float | None = None
    resolution: float | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensor:
    """An ordered list of bands under one name.

    Names and aliases are compared without regard to case, and no two bands of a sensor may answer
    to the same one.

    Attributes:
        name: Registered name, for example ``"sentinel2"``.
        title: Name in words.
        bands: The bands in the order in which products list them.
        source: Where the numbers come from.

    Raises:
        BandError: Two bands answer to the same name.
    """

    name: str
    title: str
    bands: tuple[Band, ...]
    source: str = ""
    _index: Mapping[str, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        index: dict[str, int] = {}
        for position, band in enumerate(self.bands):
            for key in (band.name, *band.aliases):
                if index.setdefault(key.lower(), position) != position:
                    other = self.bands[index[key.lower()]].name
                    raise BandError(
                        f"sensor {self.name!r}: both {other!r} and {band.name!r} are called {key!r}"
                    )
        # A common name is an alias where only one band bears it ("red"), not where several do
        # ("rededge"): then it would be a guess.
        common = [band.common_name for band in self.bands]
        for position, name in enumerate(common):
            if name is not None and common.count(name) == 1:
                index.setdefault(name.lower(), position)
        object.__setattr__(self, "_index", MappingProxyType(index))

    @property
    def names(self) -> tuple[str, ...]:
        """The bands' own names, in order."""
        return tuple(band.name for band in self.bands)

    def __len__(self) -> int:
        return len(self.bands)

    def __iter__(self) -> Iterator[Band]:
        return iter(self.bands)

    def find(self, name: str) -> Band | None:
        """The band that answers to `name` (own name, alias or unambiguous common name), or None.

        Args:
            name: Any name of the band, in any case.

        Returns:
            The band, or None.
        """
        position = self._index.get(name.lower())
        return None if position is None else self.bands[position]

    def __getitem__(self, name: str) -> Band:
        """The band that answers to `name`.

        Raises:
            BandError: No band of this sensor answers to it.
        """
        band = self.find(name)
        if band is None:
            raise BandError(
                f"sensor {self.name!r} has no band {name!r}; it has {', '.join(self.names)}"
            )
        return band

    def select(self, names: Iterable[str]) -> tuple[Band, ...]:
        """The bands that answer to `names`, in that order.

        Args:
            names: Names or aliases.

        Returns:
            One band a name.

        Raises:
            BandError: A name is unknown.
        """
        return tuple(self[name] for name in names)

    def __reduce__(self) -> tuple[type[Sensor], tuple[str, str, tuple[Band, ...], str]]:
        # The index is a mappingproxy, which cannot be pickled; it is rebuilt.
        return (Sensor, (self.name, self.title, self.bands, self.source))
