"""GeoTreeCLIP at pixels: their windows, their environment, the probabilities of their species."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from geofm.datasets.observations import BANDS, fill_missing
from geofm.errors import BandError, ModelError, RasterError, TaxonError
from geofm.predictions import Prediction, group_taxa
from geofm.raster.networks import weights_tags
from geofm.series.cube import Cube
from geofm.series.sites import Given, Sites
from geofm.taxonomy import Taxon, as_taxa, taxa_report
from geofm.zeroshot import SpeciesClassifier

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["PixelClassifier", "Species"]

Species = str | Path | Sequence[Taxon | str] | SpeciesClassifier
Indices = NDArray[np.int64]

# A uint16 holds as many, besides 0 for no data.
_MOST_TAXA = 65535


class PixelClassifier:
    """Species of the pixels of monthly images.

    Args:
        model: A `GeoTreeCLIP`.
        monthly: As in `species_map`, as are all others.
        auxiliary: Environmental variables.
        species: The species to choose from.
        window: Side of the squares around the pixels.
        min_months: Months that a pixel needs.
        batch_size: Pixels encoded together.
        crs: Coordinate reference system.

    Attributes:
        classifier: The species, encoded once.
        families: Their families, by first appearance.
        cube: The pixels.
    """

    def __init__(
        self,
        model: Any,
        monthly: xr.DataArray,
        auxiliary: Mapping[str, Given] | None,
        species: Species,
        *,
        window: int,
        min_months: int,
        batch_size: int,
        crs: Any,
    ) -> None:
        _check_model(model)
        if not isinstance(window, int) or window < 1 or window % 2 == 0:
            raise RasterError(f"window is an odd number of pixels, as 5, got {window!r}")
        if not 1 <= min_months <= 12:
            raise RasterError(f"min_months is 1 to 12, got {min_months}")
        if batch_size < 1:
            raise RasterError(f"batch_size is a number of pixels from 1 on, got {batch_size}")
        self.cube = Cube(monthly, _bands_of(model), crs)
        self.sites = Sites(auxiliary, model.variables, self.cube)
        self.window, self.min_months, self.batch_size = window, min_months, batch_size
        if isinstance(species, SpeciesClassifier):
            if species.model is not model:
                raise TaxonError("the SpeciesClassifier was made with another model")
            self.classifier = species
        else:
            taxa = as_taxa(species)
            taxa_report(taxa)
            self.classifier = SpeciesClassifier(model, taxa)
        if len(self.classifier) > _MOST_TAXA:
            raise TaxonError(
                f"a map has {_MOST_TAXA} classes at most, got {len(self.classifier)} species; "
                f"restrict them to the region's flora"
            )
        self.families = group_taxa(self.classifier.taxa, "family")[0]

    def predict(self, rows: Indices, columns: Indices) -> Iterator[tuple[Indices, Prediction]]:
        """Probabilities of pixels that lie near each other: what lies between them is read.

        Args:
            rows: (n,), not empty.
            columns: (n,).

        Yields:
            Places in `rows` of some pixels that have data, and their probabilities.

        Raises:
            PixelError: These are no digital numbers.
            AuxiliaryError: A variable cannot be in its unit; the message names the pixel.
        """
        reach = self.window // 2
        top, left = int(rows.min()) - reach, int(columns.min()) - reach
        pixels = self.cube.read(
            top, left, int(rows.max()) + reach + 1 - top, int(columns.max()) + reach + 1 - left
        )
        own = pixels[:, :, rows - top, columns - left]
        months = np.isfinite(own).all(axis=1).sum(axis=0)
        usable = np.flatnonzero(months >= self.min_months)
        windows = np.lib.stride_tricks.sliding_window_view(
            pixels, (self.window, self.window), axis=(2, 3)
        )
        for start in range(0, len(usable), self.batch_size):
            chosen = usable[start : start + self.batch_size]
            part = windows[:, :, rows[chosen] - top - reach, columns[chosen] - left - reach]
            images = np.ascontiguousarray(part.transpose(2, 0, 1, 3, 4))
            images, mask = fill_missing(images)
            yield (
                chosen,
                self.classifier.predict(
                    torch.from_numpy(images),
                    torch.from_numpy(self.sites.table(rows[chosen], columns[chosen])),
                    image_mask=torch.from_numpy(mask),
                    batch_size=self.batch_size,
                ),
            )

    def tags(self) -> dict[str, str]:
        """What made it."""
        composite = self.cube.array.attrs.get("GEOFM_COMPOSITE")
        return {
            **weights_tags(self.classifier.model),
            "GEOFM_AUXILIARY": ", ".join(self.sites.known) or "none",
            "GEOFM_TEMPERATURE": f"{self.classifier.temperature:g}",
            "GEOFM_WINDOWS": f"{self.window} x {self.window} px around each pixel",
            **({} if composite is None else {"GEOFM_COMPOSITE": str(composite)}),
        }


def _check_model(model: Any) -> None:
    needed = ("encode_image", "encode_text", "variables", "in_chans", "logit_scale")
    if not all(hasattr(model, name) for name in needed):
        raise ModelError(
            f"maps of species are made with a GeoTreeCLIP, got {type(model).__name__}; "
            f"create_model('geotreeclip', pretrained=...)"
        )
    if getattr(model, "normalization", "fixed") != "fixed":
        raise ModelError(
            "with normalization='batch' a pixel's species depends on which pixels are in its "
            "batch; create the model with normalization='fixed' (and fit_normalization)"
        )


def _bands_of(model: Any) -> tuple[str, ...]:
    spec = getattr(model, "input_spec", None)
    names = BANDS if spec is None else tuple(spec.bands)
    if len(names) != model.in_chans:
        raise BandError(
            f"the model takes {model.in_chans} bands, of which the names are not known; create it "
            f"with bands=[...]"
        )
    return names
