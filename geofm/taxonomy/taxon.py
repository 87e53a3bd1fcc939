"""A species and what it belongs to, and lists of them in files."""

from __future__ import annotations

import csv
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from geofm.errors import DataNotFoundError, TaxonError

__all__ = ["LEAF_TYPES", "LEVELS", "Taxon", "TaxonError", "builtin_taxa", "read_taxa"]

LEAF_TYPES = (
    "Deciduous Broadleaf",
    "Evergreen Broadleaf",
    "Evergreen Needleleaf",
    "Deciduous Needleleaf",
)
# From the finest on.
LEVELS = ("species", "genus", "family", "leaf_type")

# What columns are called, in GlobalGeoTree and elsewhere; compared without case.
_COLUMNS = {
    "leaf_type": ("leaf_type", "leaf type", "leaftype", "level0"),
    "family": ("family", "level1_family"),
    "genus": ("genus", "level2_genus"),
    "species": ("species", "level3_species"),
    "category": ("category",),
}
# Names that an error message lists, and looks up near matches for.
SHOWN = 5


@dataclass(frozen=True)
class Taxon:
    """A species and what it belongs to, as a list says it; `taxa_report` tells oddities.

    Attributes:
        leaf_type: One of `LEAF_TYPES`.
        family: For example ``"Fagaceae"``.
        genus: For example ``"Quercus"``.
        species: The binomial, for example ``"Quercus robur"``.
        category: How frequent it is in a data set (Rare, Common, Frequent), if known. Not part of
            what it is: taxa that differ in nothing else are equal.

    Raises:
        TaxonError: A part is empty, or the leaf type is unknown.
    """

    leaf_type: str
    family: str
    genus: str
    species: str
    category: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        empty = [level for level in LEVELS if not getattr(self, level).strip()]
        if empty:
            raise TaxonError(f"{self.species or 'a taxon'} has no {' and no '.join(empty)}")
        if self.leaf_type not in LEAF_TYPES:
            raise TaxonError(
                f"{self.species} has the unknown leaf type {self.leaf_type!r}; known are "
                f"{', '.join(LEAF_TYPES)}"
            )

    @property
    def prompt(self) -> str:
        """What the text tower reads: ``"leaf type / family / genus / species"``."""
        return f"{self.leaf_type} / {self.family} / {self.genus} / {self.species}"


@dataclass(frozen=True)
class Row:
    """A line of a list, as it is written."""

    line: int
    values: Mapping[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.values[level] for level in reversed(LEVELS))

    def taxon(self) -> Taxon:
        known = {leaf_type.casefold(): leaf_type for leaf_type in LEAF_TYPES}
        written = self.values["leaf_type"]
        return Taxon(
            known.get(written.casefold(), written),
            self.values["family"],
            self.values["genus"],
            self.values["species"],
            self.values.get("category") or None,
        )


def read_rows(path: str | Path) -> tuple[frozenset[str], list[Row]]:
    """The columns that a CSV has, of those in `_COLUMNS`, and its lines.

    Args:
        path: The CSV; commas, semicolons or tabs.

    Returns:
        The columns' names, and a row for each line.

    Raises:
        DataNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise DataNotFoundError(f"there is no table of species {path}")
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
        header = [name.strip().casefold() for name in next(reader, [])]
        places = {
            column: next(header.index(name) for name in names if name in header)
            for column, names in _COLUMNS.items()
            if any(name in header for name in names)
        }
        if "species" not in places:
            raise TaxonError(
                f"{path} has no column 'species' or 'level3_species'; it has "
                f"{', '.join(header) or 'no columns'}"
            )
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            values = {
                column: " ".join(cells[place].split()) if place < len(cells) else ""
                for column, place in places.items()
            }
            rows.append(Row(reader.line_num, values))
    return frozenset(places), rows


def read_taxa(path: str | Path) -> list[Taxon]:
    """Read the taxa of a list.

    Args:
        path: CSV with the columns leaf_type, family, genus and species (any case), or level0,
            level1_family, level2_genus and level3_species as in GlobalGeoTree, in any order and
            among others. A line may be an observation: taxa repeat.

    Returns:
        Each taxon once, in the order of their first lines, with its `category` if there is such a
        column and its lines agree. Nothing is left out or corrected but case in leaf types and
        repeated spaces; see `taxa_report` for what to correct.

    Raises:
        TaxonError: A column is missing, or a line is incomplete or has an unknown leaf type.
    """
    columns, rows = read_rows(path)
    missing = [level for level in LEVELS if level not in columns]
    if missing:
        raise TaxonError(
            f"{path} has no column {', '.join(missing)}; complete_taxa completes bare species names"
        )
    taxa: dict[Taxon, Taxon] = {}
    problems: list[str] = []
    contradicted: list[Taxon] = []
    for row in rows:
        try:
            taxon = row.taxon()
        except TaxonError as error:
            problems.append(f"line {row.line}: {error}")
            continue
        kept = taxa.setdefault(taxon, taxon)
        if kept.category != taxon.category:
            contradicted.append(kept)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TaxonError(f"{path}: {'; '.join(problems[:SHOWN])}{more}")
    for taxon in (contradicted := list(dict.fromkeys(contradicted))):
        taxa[taxon] = replace(taxon, category=None)
    if contradicted:
        warnings.warn(
            f"{path}: {len(contradicted)} taxa such as {contradicted[0].species} have more than "
            f"one category; none is kept for them",
            stacklevel=2,
        )
    return list(taxa.values())


@functools.cache
def builtin_taxa() -> tuple[Taxon, ...]:
    """The built-in table of common forest trees of the world.

    Leaf types are those of the living tree, except where GlobalGeoTree, whose words the published
    weights know, says otherwise of the same species; ``geofm/data/trees.csv`` remarks it.

    Returns:
        Several hundred taxa, by family, genus and species.
    """
    with resources.as_file(resources.files("geofm") / "data" / "trees.csv") as path:
        return tuple(read_taxa(path))


def fold(name: str) -> str:
    """A name without what is written one way here and another way there.

    Args:
        name: For example ``"Populus × canescens"``.

    Returns:
        Lower case, without hybrid signs and underscores.
    """
    words = name.replace("_", " ").replace("×", " ").casefold().split()
    return " ".join(word for word in words if word != "x")
