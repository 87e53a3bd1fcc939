"""Species and what they belong to: taxa, lists of them, and how good these lists are."""

from geofm.taxonomy.choice import as_taxa, complete_taxa, select_taxa, taxa_indices
from geofm.taxonomy.report import TaxaIssue, TaxaReport, taxa_report
from geofm.taxonomy.taxon import (
    LEAF_TYPES,
    LEVELS,
    Taxon,
    TaxonError,
    builtin_taxa,
    read_taxa,
)

__all__ = [
    "LEAF_TYPES",
    "LEVELS",
    "TaxaIssue",
    "TaxaReport",
    "Taxon",
    "TaxonError",
    "as_taxa",
    "builtin_taxa",
    "complete_taxa",
    "read_taxa",
    "select_taxa",
    "taxa_indices",
    "taxa_report",
]
