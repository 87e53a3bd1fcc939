"""From observations in files to species: what ``geofm zero-shot`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geofm.datasets.globalgeotree import ReadReport
from geofm.datasets.observations import Observation, collate
from geofm.datasets.open import open_observations
from geofm.errors import MissingExtraError, ModelError
from geofm.factory import input_spec_of
from geofm.predictions import Prediction
from geofm.raster import weights_label
from geofm.taxonomy import Taxon, as_taxa, taxa_report
from geofm.zeroshot import SpeciesClassifier

__all__ = ["SpeciesAnswer", "name_species"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SpeciesAnswer:
    """Species of some observations.

    Attributes:
        prediction: Probabilities of all species.
        samples: Names of the observations, in order.
        weights: What made it: a card, a file, or "untrained (random initialisation)".
        top_k: How many species `rows` names.
        report: What was read and left out, of shards.
    """

    prediction: Prediction
    samples: tuple[str, ...]
    weights: str
    top_k: int
    report: ReadReport

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The best species of every observation, as `Prediction.table`."""
        return self.prediction.table(self.top_k, self.samples)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `rows`.

        Args:
            path: The CSV file.
        """
        self.prediction.to_csv(Path(path), self.top_k, self.samples)

    def plot(self, path: str | os.PathLike[str], sample: int = 0) -> None:
        """Draw one observation's answer: species, ranked, and their roll-up to genus and family.

        Args:
            path: PNG or any format matplotlib writes.
            sample: Which observation.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("plots need matplotlib: pip install 'geofm[raster]'") from error
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        axes = figure.subplots(1, 3)
        values, places = self.prediction.top(10)
        taxa = self.prediction.taxa
        best = zip(places[sample], values[sample], strict=True)
        _bars(axes[0], "species", [(taxa[i].species, v) for i, v in best])
        for axis, level in ((axes[1], "genus"), (axes[2], "family")):
            groups = self.prediction.roll_up(level)
            values, places = groups.top(10)
            pairs = zip(places[sample], values[sample], strict=True)
            _bars(axis, f"{level} (sum over its species)", [(groups.names[i], v) for i, v in pairs])
        untrained = self.weights.startswith("untrained")
        figure.suptitle(
            f"{self.samples[sample]}   {'UNTRAINED WEIGHTS' if untrained else self.weights}",
            color="red" if untrained else "black",
        )
        figure.savefig(path, dpi=120)


def name_species(
    model: nn.Module,
    source: str | os.PathLike[str] | Iterable[Observation],
    species: str | Path | Sequence[str | Taxon],
    *,
    top_k: int = 5,
    taxonomy: str | Path | Sequence[Taxon] | None = None,
    batch_size: int = 64,
    skip_broken: bool = False,
    auxiliary: Mapping[str, float | None] | None = None,
    longitude: float | None = None,
    latitude: float | None = None,
    georeference: str | os.PathLike[str] | None = None,
) -> SpeciesAnswer:
    """Name the trees of observations.

    Args:
        model: A `GeoTreeCLIP` from `create_model`.
        source: What `open_observations` opens, or observations.
        species: The species to choose from, as in `geofm.zero_shot`.
        top_k: How many to name.
        taxonomy: Completes bare names.
        batch_size: Observations read and encoded together.
        skip_broken: Leave out and count shards' samples that cannot be read, instead of stopping.
        auxiliary: The environment of a series' place.
        longitude: Of a series, in degrees east.
        latitude: Of a series, in degrees north.
        georeference: A raster of the series' place.

    Returns:
        Probabilities and the names of the observations.

    Raises:
        ModelError: The model is no dual tower, or there are no observations.
        GeofmError: Something cannot be read; the message says what.
    """
    variables = getattr(model, "variables", None)
    if variables is None:
        raise ModelError("naming species needs a dual tower; use create_model('geotreeclip', ...)")
    bands = input_spec_of(model).bands
    report = ReadReport()
    if isinstance(source, str | os.PathLike):
        source = open_observations(
            source,
            bands=bands,
            errors="skip" if skip_broken else "raise",
            longitude=longitude,
            latitude=latitude,
            georeference=georeference,
            auxiliary=auxiliary,
            report=report,
        )
    taxa = as_taxa(species, taxonomy)
    taxa_report(taxa)
    classifier = SpeciesClassifier(model, taxa, batch_size=256)
    names = [variable.name for variable in variables]
    parts: list[torch.Tensor] = []
    samples: list[str] = []
    incomplete = 0
    for batch in _batches(iter(source), batch_size):
        stacked = collate(batch, names)
        prediction = classifier.predict(
            stacked["images"],
            stacked["auxiliary"],
            stacked["image_mask"],
            stacked["auxiliary_mask"],
            batch_size,
        )
        parts.append(prediction.probabilities)
        samples += stacked["sample_ids"]
        incomplete += int((~stacked["auxiliary_mask"].all(dim=1)).sum())
    if not parts:
        raise ModelError("there are no observations to name")
    if incomplete:
        logger.warning(
            "%d of %d observations lack some of the %d environmental variables, which then take "
            "the middle of their range",
            incomplete,
            len(samples),
            len(names),
        )
    return SpeciesAnswer(
        Prediction(torch.cat(parts), classifier.taxa, classifier.temperature),
        tuple(samples),
        weights_label(model),
        top_k,
        report,
    )


def _batches(observations: Iterator[Observation], size: int) -> Iterator[list[Observation]]:
    while batch := list(islice(observations, size)):
        yield batch


def _bars(axis: Any, title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    names, values = [name for name, _ in pairs], [float(value) for _, value in pairs]
    axis.barh(range(len(names)), values, color="#4b7f52")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("probability")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
