"""Probabilities of species: ranked, as tables, summed over genera and families."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geofm.taxonomy import LEVELS, Taxon, TaxonError, select_taxa

__all__ = ["Prediction", "RollUp", "Top", "group_taxa", "top_k"]

# Elements that are copied or compared at a time: 64 MiB of float32.
_CHUNK = 1 << 24


class Top(NamedTuple):
    """The best of every sample, best first.

    Attributes:
        values: (N, k) probabilities.
        indices: (N, k) places among the taxa.
    """

    values: Tensor
    indices: Tensor


def top_k(scores: Tensor, k: int) -> Top:
    """The highest scores of every row; of equal ones those that come first.

    ``torch.topk`` takes any of equal scores.

    Args:
        scores: (N, S), without NaN.
        k: How many; all if there are fewer.

    Returns:
        Values and indices, (N, min(k, S)).

    Raises:
        ValueError: `k` is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    k = min(k, scores.shape[1])
    values, indices = _ordered(*scores.topk(k, dim=1))
    for rows in _row_chunks(scores):
        part = scores[rows]
        last = values[rows][:, -1:]
        # More scores reach the last one than there are places.
        tied = ((part >= last).sum(dim=1) > k).nonzero()[:, 0]
        if len(tied) == 0:
            continue
        part, last = part[tied], last[tied]
        above = part > last
        equal = part == last
        places = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1) <= places))
        first = chosen.nonzero()[:, 1].view(len(tied), k)
        where = tied + rows.start
        values[where], indices[where] = _ordered(part.gather(1, first), first)
    return Top(values, indices)


def _ordered(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Highest first, equal ones by index."""
    indices, order = indices.sort(dim=1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, by_value)


def _row_chunks(scores: Tensor) -> Iterable[slice]:
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    return (slice(start, start + step) for start in range(0, scores.shape[0], step))


def group_taxa(taxa: Sequence[Taxon], level: str) -> tuple[tuple[str, ...], Tensor]:
    """The groups that taxa belong to.

    Args:
        taxa: The taxa.
        level: ``"species"``, ``"genus"``, ``"family"`` or ``"leaf_type"``. A genus is what the list
            calls it, even where it is not the first word of the name.

    Returns:
        The groups' names, by first appearance, and the group of each taxon, (S,) int64.

    Raises:
        TaxonError: There is no such level.
    """
    if level not in LEVELS:
        raise TaxonError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    number: dict[str, int] = {}
    groups = [number.setdefault(getattr(taxon, level), len(number)) for taxon in taxa]
    return tuple(number), torch.tensor(groups, dtype=torch.long)


def _check_shape(probabilities: Tensor, names: Sequence[Any], what: str) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(names):
        raise TaxonError(
            f"probabilities must be (N, {len(names)}), one column for each of the {what}; got "
            f"{tuple(probabilities.shape)}"
        )


def _sample_names(samples: Sequence[Any] | None, count: int) -> Sequence[Any]:
    if samples is None:
        return range(count)
    if len(samples) != count:
        raise TaxonError(f"{len(samples)} sample names for {count} samples")
    return samples


def _write_csv(path: str | Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True, eq=False)
class RollUp:
    """Probabilities of genera, families or leaf types.

    Attributes:
        level: Which.
        method: ``"sum"`` or ``"top"``, as in `Prediction.roll_up`.
        names: The groups, by first appearance among the taxa.
        probabilities: (N, groups).
        counts: Species in each group.
    """

    level: str
    method: str
    names: tuple[str, ...]
    probabilities: Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_shape(self.probabilities, self.names, "groups")

    @property
    def columns(self) -> tuple[str, ...]:
        """Of `table`."""
        return ("sample", "rank", self.level, "species_count", "probability")

    def top(self, k: int = 5) -> Top:
        """The best groups of every sample; of equal ones those that come first.

        Args:
            k: How many; all if there are fewer.
        """
        return top_k(self.probabilities, k)

    def table(self, k: int = 5, samples: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """The best groups of every sample as rows.

        Args:
            k: How many; all if there are fewer.
            samples: A name for each sample; None numbers them from 0.

        Returns:
            Dicts with the keys in `columns`, sample after sample, ranks from 1.
        """
        values, indices = (part.tolist() for part in self.top(k))
        return [
            dict(
                zip(
                    self.columns,
                    (name, rank, self.names[i], self.counts[i], value),
                    strict=True,
                )
            )
            for n, name in enumerate(_sample_names(samples, len(values)))
            for rank, (i, value) in enumerate(zip(indices[n], values[n], strict=True), 1)
        ]

    def to_csv(self, path: str | Path, k: int = 5, samples: Sequence[Any] | None = None) -> None:
        """Write `table` to a file.

        Args:
            path: Where.
            k: As in `table`.
            samples: As in `table`.
        """
        _write_csv(path, self.table(k, samples), self.columns)


@dataclass(frozen=True, eq=False)
class Prediction:
    """Probabilities of species for some samples.

    Attributes:
        probabilities: (N, S), each row sums to 1.
        taxa: The S species.
        temperature: What the logits were divided by before the softmax.
    """

    COLUMNS = ("sample", "rank", "species", "genus", "family", "leaf_type", "probability")

    probabilities: Tensor
    taxa: tuple[Taxon, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_shape(self.probabilities, self.taxa, "taxa")

    def __len__(self) -> int:
        return len(self.probabilities)

    def top(self, k: int = 5) -> Top:
        """The best species of every sample; of equally probable ones those that come first.

        Args:
            k: How many; all if there are fewer.

        Returns:
            Probabilities and places in `taxa`, (N, k), best first.
        """
        return top_k(self.probabilities, k)

    def table(self, k: int = 5, samples: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """The best species of every sample as rows, for example for ``pandas.DataFrame``.

        Args:
            k: How many; all if there are fewer.
            samples: A name for each sample; None numbers them from 0.

        Returns:
            Dicts with the keys in `COLUMNS`, sample after sample, ranks from 1.
        """
        values, indices = (part.tolist() for part in self.top(k))
        rows = []
        for n, name in enumerate(_sample_names(samples, len(values))):
            for rank, (i, value) in enumerate(zip(indices[n], values[n], strict=True), 1):
                taxon = self.taxa[i]
                row: dict[str, Any] = {"sample": name, "rank": rank}
                row |= {level: getattr(taxon, level) for level in LEVELS}
                rows.append(row | {"probability": value})
        return rows

    def to_csv(self, path: str | Path, k: int = 5, samples: Sequence[Any] | None = None) -> None:
        """Write `table` to a file.

        Args:
            path: Where.
            k: As in `table`.
            samples: As in `table`.
        """
        _write_csv(path, self.table(k, samples), self.COLUMNS)

    def roll_up(self, level: str, method: str = "sum") -> RollUp:
        """Probabilities of genera, families or leaf types.

        Args:
            level: ``"genus"``, ``"family"`` or ``"leaf_type"``.
            method: ``"sum"``: the probability that the species is any of the group's. ``"top"``:
                that of the group's best species, so that the best group is the group of the best
                species, as published; these do not sum to 1.

        Returns:
            (N, groups), float32 or as exact as the probabilities. Of `probabilities`, nothing is
            copied as a whole.

        Raises:
            TaxonError: There is no such level or method.
        """
        names, groups = group_taxa(self.taxa, level)
        if method not in ("sum", "top"):
            raise TaxonError(f"method must be 'sum' or 'top', got {method!r}")
        scores = self.probabilities
        kind = torch.promote_types(scores.dtype, torch.float32)
        out = scores.new_zeros((scores.shape[0], len(names)), dtype=kind)
        counts = tuple(groups.bincount(minlength=len(names)).tolist())
        groups = groups.to(scores.device)
        for rows in _row_chunks(scores):
            part = scores[rows].to(kind)
            if method == "sum":
                out[rows].index_add_(1, groups, part)
            else:
                # Probabilities are not negative: the zeros in `out` change no maximum.
                out[rows].scatter_reduce_(1, groups.expand_as(part), part, "amax")
        return RollUp(level, method, names, out, counts)

    def restrict(
        self,
        species: Iterable[str | Taxon] | None = None,
        *,
        genus: str | Iterable[str] | None = None,
        family: str | Iterable[str] | None = None,
        leaf_type: str | Iterable[str] | None = None,
        ignore_missing: bool = False,
    ) -> Prediction:
        """What the prediction is once it is known that the species is among some.

        Args:
            species: As in `select_taxa`, as are all others.
            genus: Genus or genera to keep.
            family: Family or families to keep.
            leaf_type: Leaf type or types to keep.
            ignore_missing: Warn of, instead of refuse, species that are not among the taxa.

        Returns:
            Probabilities that sum to 1 over the remaining taxa.

        Raises:
            TaxonError: Something wanted is not among the taxa, no taxon is left, or the remaining
                ones had no probability at all; then restrict the classifier instead.
        """
        keep = select_taxa(
            self.taxa,
            species,
            genus=genus,
            family=family,
            leaf_type=leaf_type,
            ignore_missing=ignore_missing,
        )
        part = self.probabilities[:, torch.tensor(keep, device=self.probabilities.device)]
        total = part.sum(dim=1, keepdim=True)
        if empty := int((total <= 0).sum()):
            raise TaxonError(
                f"{empty} samples give the {len(keep)} remaining taxa a probability of 0; restrict "
                f"the classifier and predict again"
            )
        return Prediction(part / total, tuple(self.taxa[i] for i in keep), self.temperature)
