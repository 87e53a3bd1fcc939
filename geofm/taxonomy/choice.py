"""From names to taxa, and from many taxa to some."""

from __future__ import annotations

import difflib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from geofm.taxonomy.taxon import SHOWN, Taxon, TaxonError, builtin_taxa, fold, read_rows, read_taxa

__all__ = ["as_taxa", "complete_taxa", "select_taxa", "taxa_indices"]


def complete_taxa(
    names: Iterable[str | Taxon], taxonomy: str | Path | Sequence[Taxon] | None = None
) -> list[Taxon]:
    """Complete bare species names with family, genus and leaf type.

    Args:
        names: Binomials; case, underscores and the sign of hybrids do not matter. Taxa are taken as
            they are.
        taxonomy: CSV as in `read_taxa`, or taxa, where names are looked up first. Then, and with
            None, in the built-in table of common forest trees.

    Returns:
        One taxon a name, in the same order, spelled as in the table it was found in.

    Raises:
        TaxonError: Names are in neither table, or belong to several taxa.
    """
    given = read_taxa(taxonomy) if isinstance(taxonomy, str | Path) else list(taxonomy or ())
    tables = [_by_name(given), _by_name(builtin_taxa())]
    found: list[Taxon] = []
    missing: list[str] = []
    for name in names:
        if isinstance(name, Taxon):
            found.append(name)
            continue
        matches = next((table[fold(name)] for table in tables if fold(name) in table), [])
        if len(matches) > 1:
            prompts = "; ".join(taxon.prompt for taxon in matches)
            raise TaxonError(f"{name} belongs to several taxa ({prompts}); give the Taxon meant")
        if matches:
            found.append(matches[0])
        else:
            missing.append(name)
    if missing:
        known = [taxon.species for taxon in (*given, *builtin_taxa())]
        where = (
            "neither in the taxonomy given nor in the built-in table"
            if given
            else "not in the built-in table of common trees"
        )
        raise TaxonError(
            f"{_unknown(missing, known, where)}; give taxonomy=, a CSV with leaf_type, family, "
            f"genus and species, or a Taxon for each"
        )
    return found


def _by_name(taxa: Iterable[Taxon]) -> dict[str, list[Taxon]]:
    table: dict[str, list[Taxon]] = defaultdict(list)
    for taxon in dict.fromkeys(taxa):
        table[fold(taxon.species)].append(taxon)
    return table


def _unknown(missing: Sequence[str], known: Sequence[str], where: str) -> str:
    """Says what is missing, with near matches."""
    shown = []
    spelled = {fold(name): name for name in known}
    for name in missing[:SHOWN]:
        near = difflib.get_close_matches(fold(name), spelled, n=3, cutoff=0.75)
        shown.append(
            f"{name} (near: {', '.join(spelled[match] for match in near)})" if near else name
        )
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(shown)}{more} {verb} {where}"


def as_taxa(
    species: str | Path | Sequence[str | Taxon],
    taxonomy: str | Path | Sequence[Taxon] | None = None,
) -> list[Taxon]:
    """Taxa of whatever a user has.

    Args:
        species: CSV with taxa as in `read_taxa` or with a column of species names only; or names,
            taxa, or both.
        taxonomy: As in `complete_taxa`.

    Returns:
        The taxa, in the same order.

    Raises:
        TaxonError: It is empty, or as in `read_taxa` and `complete_taxa`.
        FileNotFoundError: There is no such file.
    """
    if isinstance(species, str) and not Path(species).suffix:
        raise TaxonError(f"{species!r} is neither a CSV nor a list; for one species: [{species!r}]")
    if isinstance(species, str | Path):
        columns, rows = read_rows(species)
        if columns & {"leaf_type", "family", "genus"}:
            taxa = read_taxa(species)
        else:
            names = dict.fromkeys(row.values["species"] for row in rows)
            taxa = complete_taxa(names, taxonomy)
    else:
        taxa = complete_taxa(species, taxonomy)
    if not taxa:
        raise TaxonError("there are no species to choose from")
    return taxa


def taxa_indices(taxa: Sequence[Taxon], wanted: Iterable[str | Taxon]) -> list[int]:
    """Places of species in a list of taxa.

    Args:
        taxa: The list.
        wanted: Names or taxa.

    Returns:
        One index each; the first if a name is there several times.

    Raises:
        TaxonError: Some are not in the list.
    """
    by_taxon: dict[Taxon, int] = {}
    by_name: dict[str, int] = {}
    for i, taxon in enumerate(taxa):
        by_taxon.setdefault(taxon, i)
        by_name.setdefault(fold(taxon.species), i)
    names = list(wanted)
    places = [
        by_taxon.get(item) if isinstance(item, Taxon) else by_name.get(fold(item)) for item in names
    ]
    missing = [
        item.prompt if isinstance(item, Taxon) else item
        for item, place in zip(names, places, strict=True)
        if place is None
    ]
    if missing:
        known = [taxon.species for taxon in taxa]
        raise TaxonError(_unknown(missing, known, f"not among the {len(taxa)} taxa"))
    return [place for place in places if place is not None]


def select_taxa(
    taxa: Sequence[Taxon],
    species: Iterable[str | Taxon] | None = None,
    *,
    genus: str | Iterable[str] | None = None,
    family: str | Iterable[str] | None = None,
    leaf_type: str | Iterable[str] | None = None,
    ignore_missing: bool = False,
) -> list[int]:
    """Choose among taxa.

    Args:
        taxa: What there is.
        species: Names or taxa to keep, such as a region's flora; None for all.
        genus: Genus or genera to keep; None for all.
        family: Likewise.
        leaf_type: Likewise.
        ignore_missing: Go on, with a warning, without species that are not among the taxa.

    Returns:
        Indices of the taxa that meet every condition, rising.

    Raises:
        TaxonError: Something wanted is not among the taxa, or no taxon is left.
    """
    keep = set(range(len(taxa)))
    if species is not None:
        keep &= _places_of(taxa, list(species), ignore_missing)
    for level, wanted in (("genus", genus), ("family", family), ("leaf_type", leaf_type)):
        if wanted is None:
            continue
        names = {wanted} if isinstance(wanted, str) else set(wanted)
        labels = [getattr(taxon, level) for taxon in taxa]
        if unknown := sorted(names - set(labels)):
            raise TaxonError(
                _unknown(unknown, labels, f"no {level.replace('_', ' ')} of the {len(taxa)} taxa")
            )
        keep &= {i for i, label in enumerate(labels) if label in names}
    if not keep:
        raise TaxonError("none of the taxa meets all conditions")
    return sorted(keep)


def _places_of(
    taxa: Sequence[Taxon], species: Sequence[str | Taxon], ignore_missing: bool
) -> set[int]:
    names = {fold(item) for item in species if isinstance(item, str)}
    whole = {item for item in species if isinstance(item, Taxon)}
    # All of a name, should it be there several times.
    places = {i for i, t in enumerate(taxa) if t in whole or fold(t.species) in names}
    if not ignore_missing:
        taxa_indices(taxa, species)
        return places
    there = {fold(taxon.species) for taxon in taxa}
    lost = len(names - there) + len(whole - set(taxa))
    if lost:
        warnings.warn(
            f"{lost} of {len(names) + len(whole)} species are not among the {len(taxa)} taxa and "
            f"cannot be predicted",
            stacklevel=5,
        )
    return places
