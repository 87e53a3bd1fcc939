"""Species of a place, from their names alone.

`SpeciesClassifier` encodes names once and then compares any number of observations with them;
`zero_shot` does both in a call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofm.errors import PixelError
from geofm.predictions import Prediction, RollUp, Top
from geofm.taxonomy import Taxon, TaxonError, as_taxa, select_taxa, taxa_report
from geofm.text_features import encode_prompts, evaluating

__all__ = [
    "Observations",
    "Prediction",
    "RollUp",
    "SpeciesClassifier",
    "Top",
    "fit_temperature",
    "zero_shot",
]

# Bounds of a fitted temperature, and when it is exact enough.
_COLDEST, _HOTTEST = 1e-3, 1e3
_TOLERANCE = 1e-7
_STEPS = 100
# Elements of logits in double precision at a time: 128 MiB.
_CHUNK = 1 << 24


class SpeciesClassifier:
    """Compares observations with species names.

    Args:
        model: A `GeoTreeCLIP`, or what has its ``encode_image``, ``encode_text``, ``tokenize`` and
            ``logit_scale``. It is not changed. Names are encoded now: after further training, make
            a new classifier.
        taxa: The species to choose from: taxa, names, or a CSV, as in `as_taxa`.
        temperature: Logits are divided by it; None for 1, as published. `calibrate` fits it.
        batch_size: Names encoded together.
        cache: Folder to keep the encoded names in, as in `encode_prompts`; None keeps nothing.
        taxonomy: Completes bare names, as in `complete_taxa`.

    Attributes:
        model: The model.
        taxa: The S species, in the order of the columns of a prediction.
        text_features: (S, embed_dim) float32 of unit length, on the CPU.
        temperature: The temperature.

    Raises:
        TaxonError: A species is unknown, or there is none.
        ValueError: The temperature is not positive.
    """

    def __init__(
        self,
        model: Any,
        taxa: str | Path | Sequence[Taxon | str],
        temperature: float | None = None,
        batch_size: int = 256,
        cache: str | Path | None = None,
        taxonomy: str | Path | Sequence[Taxon] | None = None,
    ) -> None:
        self.model = model
        self.taxa = tuple(as_taxa(taxa, taxonomy))
        self.temperature = _check_temperature(1.0 if temperature is None else temperature)
        self.text_features = encode_prompts(
            model, [taxon.prompt for taxon in self.taxa], batch_size, cache
        )

    def __len__(self) -> int:
        return len(self.taxa)

    def logits(
        self,
        images: Tensor,
        auxiliary: Any,
        image_mask: Tensor | None = None,
        auxiliary_mask: Tensor | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Scaled cosine similarities, before the temperature and the softmax.

        Args:
            images: As in `predict`, as are all others.
            auxiliary: Environmental variables.
            image_mask: Observed months.
            auxiliary_mask: Known variables.
            batch_size: Observations encoded together.

        Returns:
            (N, S) float32, on the CPU.

        Raises:
            PixelError: Arguments are of different lengths.
        """
        inputs = Observations(images, auxiliary, image_mask, auxiliary_mask)
        return self._scores(inputs, batch_size, None)

    def predict(
        self,
        images: Tensor,
        auxiliary: Any,
        image_mask: Tensor | None = None,
        auxiliary_mask: Tensor | None = None,
        batch_size: int = 64,
    ) -> Prediction:
        """Probabilities of the species.

        Args:
            images: (N, 12, bands, h, w), monthly median DN, NaN in missing months; without N, one
                observation.
            auxiliary: Environmental variables: (N, variables), a dict of columns, or a list of
                dicts, as in the model's ``encode_image``.
            image_mask: (N, 12), True where a month was observed; None: where it has no NaN.
            auxiliary_mask: (N, variables), True where a value is known; None: where it is finite.
            batch_size: Observations encoded together.

        Returns:
            softmax(logit scale · cosine similarity / temperature), on the CPU.

        Raises:
            PixelError: Arguments are of different lengths.
        """
        inputs = Observations(images, auxiliary, image_mask, auxiliary_mask)
        scores = self._scores(inputs, batch_size, self.temperature)
        return Prediction(scores, self.taxa, self.temperature)

    def _scores(self, inputs: Observations, batch_size: int, temperature: float | None) -> Tensor:
        """Logits, or probabilities if there is a temperature."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        out = torch.empty(inputs.count, len(self.taxa))
        with evaluating(self.model), torch.inference_mode():
            factor = self.model.logit_scale.exp().float()
            text = self.text_features.to(factor.device).T
            for start in range(0, inputs.count, batch_size):
                part = slice(start, start + batch_size)
                features = self.model.encode_image(*inputs[part], normalize=True)
                logits = factor * (features.float() @ text)
                out[part] = logits if temperature is None else (logits / temperature).softmax(1)
        return out

    def calibrate(self, scores: Tensor | Prediction, labels: Tensor | Sequence[int]) -> float:
        """Fit the temperature to labelled observations, and use it from now on.

        Args:
            scores: From `logits` or `predict`, for observations that training has not seen.
            labels: (N,), the place of each observation's species in `taxa`.

        Returns:
            The temperature.

        Raises:
            TaxonError: As in `fit_temperature`, or the scores are not for these taxa.
        """
        columns = scores.probabilities if isinstance(scores, Prediction) else scores
        other = isinstance(scores, Prediction) and scores.taxa != self.taxa
        if columns.ndim != 2 or columns.shape[1] != len(self.taxa) or other:
            raise TaxonError(
                f"the scores {tuple(columns.shape)} are not for the classifier's {len(self)} taxa"
            )
        self.temperature = fit_temperature(scores, labels)
        return self.temperature

    def restrict(
        self,
        species: Iterable[str | Taxon] | None = None,
        *,
        genus: str | Iterable[str] | None = None,
        family: str | Iterable[str] | None = None,
        leaf_type: str | Iterable[str] | None = None,
        ignore_missing: bool = False,
    ) -> SpeciesClassifier:
        """A classifier for some of the species; nothing is encoded again.

        Args:
            species: A region's flora, for example; as in `select_taxa`, as are all others.
            genus: Genus or genera to keep.
            family: Family or families to keep.
            leaf_type: Leaf type or types to keep.
            ignore_missing: Warn of, instead of refuse, species that are not among the taxa.

        Returns:
            Another classifier, with the same model and temperature.

        Raises:
            TaxonError: Something wanted is not among the taxa, or no taxon is left.
        """
        keep = select_taxa(
            self.taxa,
            species,
            genus=genus,
            family=family,
            leaf_type=leaf_type,
            ignore_missing=ignore_missing,
        )
        other = object.__new__(type(self))
        other.model = self.model
        other.taxa = tuple(self.taxa[i] for i in keep)
        other.temperature = self.temperature
        other.text_features = self.text_features[torch.tensor(keep)]
        return other


class Observations:
    """What `encode_image` takes, to be taken in parts.

    Args:
        images: As in `SpeciesClassifier.predict`, as are all others.
        auxiliary: Environmental variables.
        image_mask: Observed months.
        auxiliary_mask: Known variables.
    """

    def __init__(
        self, images: Tensor, auxiliary: Any, image_mask: Any = None, auxiliary_mask: Any = None
    ) -> None:
        images = torch.as_tensor(images)
        if images.ndim == 4:
            images = images[None]
        if not isinstance(auxiliary, Mapping) and _is_numbers(auxiliary):
            auxiliary = torch.as_tensor(auxiliary)
            auxiliary = auxiliary[None] if auxiliary.ndim == 1 else auxiliary
        self.count = images.shape[0]
        masks = [
            None if mask is None else torch.as_tensor(mask) for mask in (image_mask, auxiliary_mask)
        ]
        masks = [mask[None] if mask is not None and mask.ndim == 1 else mask for mask in masks]
        self.parts = (images, auxiliary, *masks)
        names = ("images", "auxiliary", "image_mask", "auxiliary_mask")
        for name, part in zip(names, self.parts, strict=True):
            columns = part.items() if isinstance(part, Mapping) else [("", part)]
            for column, values in columns:
                if _is_column(values) and len(values) != self.count:
                    raise PixelError(
                        f"{' '.join((name, column)).strip()} has {len(values)} rows for "
                        f"{self.count} observations"
                    )

    def __getitem__(self, rows: slice | Tensor) -> tuple[Any, ...]:
        return tuple(
            {name: _take(values, rows) for name, values in part.items()}
            if isinstance(part, Mapping)
            else _take(part, rows)
            if part is not None
            else None
            for part in self.parts
        )


def _is_column(values: Any) -> bool:
    """Not a single number, of which the model will say whether one is enough."""
    return hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0


def _take(values: Any, rows: slice | Tensor) -> Any:
    if not _is_column(values):
        return values
    if isinstance(rows, slice) or hasattr(values, "ndim"):
        return values[rows]
    return [values[row] for row in rows.tolist()]


def _is_numbers(auxiliary: Any) -> bool:
    """Not a list of dicts."""
    return hasattr(auxiliary, "ndim") or not any(isinstance(row, Mapping) for row in auxiliary)


def _check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return float(temperature)


def fit_temperature(scores: Tensor | Prediction, labels: Tensor | Sequence[int]) -> float:
    """The temperature at which scores are the likeliest for the labels (Guo et al., 2017).

    The mean negative log-likelihood of softmax(logits / T) is convex in 1/T; its minimum is found
    by Newton's method within shrinking bounds.

    Args:
        scores: Logits, (N, S), or a prediction, whose own temperature is taken into account.
        labels: (N,), the column of each sample's species.

    Returns:
        T, between 0.001 and 1000; with a warning at these bounds, where the labels fit ever better
        (or ever worse).

    Raises:
        TaxonError: Labels and scores do not go together, or a prediction has probabilities of 0,
            which tell nothing of their logits.
    """
    if isinstance(scores, Prediction):
        if bool((scores.probabilities <= 0).any()):
            raise TaxonError("some probabilities are 0; calibrate with SpeciesClassifier.logits")
        logits = scores.probabilities.log() * scores.temperature
    else:
        logits = scores
    labels = torch.as_tensor(labels, device=logits.device)
    if labels.is_floating_point() or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise TaxonError(
            f"labels must be {logits.shape[0]} integers, one for each of the {tuple(logits.shape)} "
            f"scores; got {tuple(labels.shape)}"
        )
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise TaxonError(f"labels must be columns, 0 to {logits.shape[1] - 1}, and at least one")
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    ends = [
        end for end, sign in ((low, -1), (high, 1)) if sign * _slope(logits, labels, end)[0] <= 0
    ]
    if ends:
        warnings.warn(
            f"the likelihood has no maximum at a temperature between {_COLDEST:g} and "
            f"{_HOTTEST:g}; {1 / ends[0]:g} is used. Are there enough labels, and do they belong "
            f"to the scores?",
            stacklevel=2,
        )
        return 1 / ends[0]
    beta = 1.0
    for _ in range(_STEPS):
        slope, curvature = _slope(logits, labels, beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curvature if curvature > 0 else low
        # Outside the bounds Newton's step is worth nothing; halve them instead.
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - beta) <= _TOLERANCE * beta:
            return 1 / following
        beta = following
    return 1 / beta


def _slope(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood by beta = 1/T."""
    first = second = 0.0
    step = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), step):
        z = logits[start : start + step].double()
        probabilities = (beta * z).softmax(dim=1)
        mean = (probabilities * z).sum(dim=1, keepdim=True)
        own = z.gather(1, labels[start : start + step, None].long())
        first += float((mean - own).sum())
        second += float((probabilities * (z - mean).square()).sum())
    return first / len(logits), second / len(logits)


def zero_shot(
    model: Any,
    images: Tensor,
    auxiliary: Any,
    species: str | Path | Sequence[str | Taxon],
    top_k: int = 5,
    *,
    image_mask: Tensor | None = None,
    auxiliary_mask: Tensor | None = None,
    taxonomy: str | Path | Sequence[Taxon] | None = None,
    batch_size: int = 64,
) -> list[list[dict[str, Any]]]:
    """The likeliest species of each observation.

    Args:
        model: A `GeoTreeCLIP`.
        images: (N, 12, bands, h, w), monthly median DN, NaN in missing months; without N, one
            observation.
        auxiliary: Environmental variables: (N, variables), a dict of columns, or a list of dicts.
        species: The species to choose from: names, taxa, or a CSV of either, as in `as_taxa`.
        top_k: How many to report.
        image_mask: (N, 12), True where a month was observed; None: where it has no NaN.
        auxiliary_mask: (N, variables), True where a value is known; None: where it is finite.
        taxonomy: CSV or taxa to complete bare names from, before the built-in table of common
            forest trees is tried.
        batch_size: Observations encoded together.

    Returns:
        For each observation a table, best first: dicts with sample, rank, species, genus, family,
        leaf_type and probability. Oddities of the species' names are warned of; none is left out.

    Raises:
        TaxonError: A species is unknown, or there is none.
        PixelError: Arguments are of different shapes.
    """
    taxa = as_taxa(species, taxonomy)
    taxa_report(taxa)
    classifier = SpeciesClassifier(model, taxa)
    prediction = classifier.predict(images, auxiliary, image_mask, auxiliary_mask, batch_size)
    rows = prediction.table(top_k)
    count = min(top_k, len(taxa))
    return [rows[start : start + count] for start in range(0, len(rows), count)]
