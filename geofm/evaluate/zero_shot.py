"""Accuracy of species calls, also of their genera and families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geofm.predictions import Prediction, group_taxa
from geofm.taxonomy import Taxon, TaxonError, taxa_indices

__all__ = ["Accuracy", "ZeroShotAccuracy", "zero_shot_accuracy"]

_LEVELS = ("species", "genus", "family")
_ALL = "All"
# The published order; other categories follow by name.
_CATEGORIES = ("Rare", "Common", "Frequent")


@dataclass(frozen=True)
class Accuracy:
    """One number of an evaluation.

    Attributes:
        level: ``"species"``, ``"genus"`` or ``"family"``.
        k: Right if the true one is among this many.
        definition: ``"published"``: the true genus is that of one of the k best species.
            ``"sum"``: it is one of the k genera with the largest sums of probabilities. The same
            for families; for species there is no difference.
        category: Frequency class of the true species, or ``"All"``.
        value: Fraction of samples, 0 to 1.
        count: Samples.
    """

    level: str
    k: int
    definition: str
    category: str
    value: float
    count: int


@dataclass(frozen=True)
class ZeroShotAccuracy:
    """All numbers of an evaluation.

    Attributes:
        rows: Category by category, level by level.
    """

    rows: tuple[Accuracy, ...]

    def get(
        self, level: str, k: int = 1, category: str = _ALL, definition: str = "published"
    ) -> float:
        """One number.

        Args:
            level: As in `Accuracy`, as are all others.
            k: Among how many.
            category: Frequency class.
            definition: Which definition.

        Raises:
            KeyError: It was not evaluated.
        """
        wanted = (level, k, category, definition)
        for row in self.rows:
            if (row.level, row.k, row.category, row.definition) == wanted:
                return row.value
        raise KeyError(f"no accuracy for {wanted}")

    def table(self) -> str:
        """All numbers in percent, in Markdown."""
        columns = list(dict.fromkeys((row.level, row.k, row.definition) for row in self.rows))
        heads = [f"{level} top-{k} ({how})" for level, k, how in columns]
        lines = [
            f"| species | samples | {' | '.join(heads)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        for category in dict.fromkeys(row.category for row in self.rows):
            rows = [row for row in self.rows if row.category == category]
            values = " | ".join(f"{100 * row.value:.2f}" for row in rows)
            lines.append(f"| {category} | {rows[0].count} | {values} |")
        return "\n".join(lines)


def zero_shot_accuracy(
    prediction: Prediction | Tensor,
    taxa: Sequence[Taxon] | None,
    true_taxa: Sequence[Taxon | str] | Tensor,
    categories: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5),
) -> ZeroShotAccuracy:
    """Top-k accuracy of species, genera and families, per frequency class.

    Of equal probabilities those that come first among the taxa count as better.

    Args:
        prediction: Of N samples, or its probabilities or logits, (N, S). Sums are of what is given:
            with logits only the published definition means something.
        taxa: The S species of the columns; None for those of the prediction.
        true_taxa: The species of each sample: N taxa, names, or places in `taxa`.
        categories: Frequency class of each sample; None for that of its true taxon, and none at all
            if these have none.
        ks: Among how many.

    Returns:
        The numbers, for all samples and for each category.

    Raises:
        TaxonError: A true species is not among the taxa, or lengths differ.
    """
    prediction = _as_prediction(prediction, taxa)
    taxa = prediction.taxa
    true = _true_indices(taxa, true_taxa)
    count = len(prediction)
    if len(true) != count or count == 0:
        raise TaxonError(f"{len(true)} true species for {count} samples")
    masks = {_ALL: torch.ones(count, dtype=torch.bool)}
    masks |= _category_masks(taxa, true, true_taxa, categories)

    right = _right(prediction, true, ks)
    rows = [
        Accuracy(level, k, definition, category, float(hit[mask].double().mean()), int(mask.sum()))
        for category, mask in masks.items()
        for (level, k, definition), hit in right.items()
    ]
    return ZeroShotAccuracy(tuple(rows))


def _right(
    prediction: Prediction, true: Tensor, ks: Sequence[int]
) -> dict[tuple[str, int, str], Tensor]:
    """Whether each sample is right, by level, k and definition."""
    best = prediction.top(max(ks)).indices.cpu()
    right = {}
    for level in _LEVELS:
        _, groups = group_taxa(prediction.taxa, level)
        wanted = groups[true][:, None]
        for k in ks:
            right[level, k, "published"] = (groups[best[:, :k]] == wanted).any(dim=1)
        sums = best if level == "species" else prediction.roll_up(level).top(max(ks)).indices.cpu()
        for k in ks:
            right[level, k, "sum"] = (sums[:, :k] == wanted).any(dim=1)
    return right


def _as_prediction(prediction: Prediction | Tensor, taxa: Sequence[Taxon] | None) -> Prediction:
    if isinstance(prediction, Prediction):
        if taxa is not None and tuple(taxa) != prediction.taxa:
            raise TaxonError("the prediction is for other taxa; give taxa=None to use its own")
        return prediction
    if taxa is None:
        raise TaxonError("probabilities do not tell which species their columns are; give taxa")
    return Prediction(torch.as_tensor(prediction), tuple(taxa))


def _true_indices(taxa: Sequence[Taxon], true_taxa: Sequence[Taxon | str] | Tensor) -> Tensor:
    if isinstance(true_taxa, Tensor):
        true = true_taxa.cpu().long()
        if true.ndim != 1 or bool(((true < 0) | (true >= len(taxa))).any()):
            raise TaxonError(f"true species must be (N,), each from 0 to {len(taxa) - 1}")
        return true
    return torch.tensor(taxa_indices(taxa, true_taxa), dtype=torch.long)


def _category_masks(
    taxa: Sequence[Taxon],
    true: Tensor,
    true_taxa: Sequence[Taxon | str] | Tensor,
    categories: Sequence[str] | None,
) -> dict[str, Tensor]:
    if categories is None:
        # What the caller says of a sample's species goes before what the list of taxa says.
        said = [None] * len(true) if isinstance(true_taxa, Tensor) else list(true_taxa)
        own = [
            (taxon.category if isinstance(taxon, Taxon) else None) or taxa[place].category
            for taxon, place in zip(said, true.tolist(), strict=True)
        ]
    else:
        own = list(categories)
    if len(own) != len(true):
        raise TaxonError(f"{len(own)} categories for {len(true)} samples")
    names = {name for name in own if name}
    order = [name for name in _CATEGORIES if name in names] + sorted(names - set(_CATEGORIES))
    return {name: torch.tensor([category == name for category in own]) for name in order}
