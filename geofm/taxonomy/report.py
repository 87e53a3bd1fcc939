"""What is odd in a list of taxa."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geofm.taxonomy.taxon import LEAF_TYPES, LEVELS, Taxon, TaxonError, fold, read_rows

__all__ = ["TaxaIssue", "TaxaReport", "taxa_report"]

_BINOMIAL = re.compile(r"[A-Z][a-zë-]+ (?:× ?)?[a-z][a-zë-]+")
# Placeholders for an unknown epithet.
_NO_EPITHET = ("sp", "spec", "spp", "species", "indet")


@dataclass(frozen=True)
class TaxaIssue:
    """Something odd about a taxon.

    Attributes:
        kind: A key of `TaxaReport.KINDS`.
        index: Its place among the distinct taxa.
        species: Its name.
        detail: What is odd.
    """

    kind: str
    index: int
    species: str
    detail: str


@dataclass(frozen=True)
class TaxaReport:
    """What is odd in a list of taxa. Nothing was removed.

    Attributes:
        count: Distinct taxa looked at.
        issues: In their order.
    """

    KINDS = {  # noqa: RUF012  (a constant of the class, not a field)
        "not_binomial": "are not binomials",
        "family_not_aceae": "have a family that does not end in -aceae (animals?)",
        "genus_not_first_word": "have a genus that is not the first word of the name",
        "duplicate_name": "have the name of another taxon",
        "unknown_leaf_type": "have an unknown leaf type",
    }

    count: int
    issues: tuple[TaxaIssue, ...]

    def of(self, kind: str) -> tuple[TaxaIssue, ...]:
        """The issues of a kind.

        Args:
            kind: A key of `KINDS`.

        Raises:
            KeyError: There is no such kind.
        """
        if kind not in self.KINDS:
            raise KeyError(f"{kind!r} is not one of {', '.join(self.KINDS)}")
        return tuple(issue for issue in self.issues if issue.kind == kind)

    def summary(self) -> str:
        """All in a sentence, with examples."""
        if not self.issues:
            return f"{self.count} taxa, nothing odd"
        counts = Counter(issue.kind for issue in self.issues)
        parts = [
            f"{counts[kind]} {words} ({', '.join(i.species for i in self.of(kind)[:3])}"
            f"{', …' if counts[kind] > 3 else ''})"
            for kind, words in self.KINDS.items()
            if counts[kind]
        ]
        return f"of {self.count} taxa, {'; '.join(parts)}. All are kept"


def taxa_report(
    taxa: str | Path | Iterable[Taxon | Mapping[str, str]], warn: bool = True
) -> TaxaReport:
    """Look for what is odd in a list of taxa.

    Args:
        taxa: CSV as in `read_taxa`; or taxa, or mappings with leaf_type, family, genus and species.
            A file's repeated lines count once.
        warn: Warn, once, with a summary, if anything is odd.

    Returns:
        The report. Nothing is removed from anywhere.

    Raises:
        TaxonError: A column is missing.
    """
    if isinstance(taxa, str | Path):
        columns, lines = read_rows(taxa)
        if missing := [level for level in LEVELS if level not in columns]:
            raise TaxonError(f"{taxa} has no column {', '.join(missing)}")
        rows = list({row.key: row.values for row in lines}.values())
    else:
        rows = [
            {level: getattr(taxon, level) for level in LEVELS}
            if isinstance(taxon, Taxon)
            else {level: taxon.get(level) or "" for level in LEVELS}
            for taxon in taxa
        ]
    report = TaxaReport(len(rows), tuple(_issues(rows)))
    if warn and report.issues:
        warnings.warn(report.summary(), stacklevel=2)
    return report


def _issues(rows: Sequence[Mapping[str, str]]) -> Iterator[TaxaIssue]:
    known = {leaf_type.casefold() for leaf_type in LEAF_TYPES}
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        species, genus, family = row["species"], row["genus"], row["family"]
        words = species.split()
        if not _BINOMIAL.fullmatch(species) or words[-1] in _NO_EPITHET:
            yield TaxaIssue("not_binomial", i, species, f"{species!r} is not genus and epithet")
        if not family.endswith("aceae"):
            yield TaxaIssue("family_not_aceae", i, species, f"family {family!r}")
        if words[:1] != [genus]:
            yield TaxaIssue("genus_not_first_word", i, species, f"genus {genus!r}")
        before = first.setdefault(fold(species), i)
        if before != i:
            detail = f"as taxon {before}, {' / '.join(rows[before].values())}"
            yield TaxaIssue("duplicate_name", i, species, detail)
        if row["leaf_type"].casefold() not in known:
            yield TaxaIssue("unknown_leaf_type", i, species, f"leaf type {row['leaf_type']!r}")
