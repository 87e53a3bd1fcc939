"""SSL4Eco (Plekhanova et al. 2025, arXiv 2504.18256), read as its authors publish it.

``imgs/<6-digit index>/<patch id>.tif``: one folder a place, up to four dates in different seasons
of its vegetation year, each an image of 13 bands of uint16 (`BANDS`), Level-2A digital numbers
without offset.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from geofm.cards import InputSpec, published_cards
from geofm.datasets._geotiff import ImageError, check_errors, opened
from geofm.datasets._index import checked_index
from geofm.datasets._report import SkipReport
from geofm.datasets.observations import band_indices
from geofm.datasets.ssl4eco_places import (
    BANDS,
    PLACES_CSV,
    PlaceRow,
    Places,
    check_image,
    index_places,
    list_places,
    place_weights,
    read_mountains,
    read_places,
)
from geofm.datasets.ssl4eco_samples import write_ssl4eco
from geofm.errors import DataNotFoundError, PixelError

__all__ = [
    "BANDS",
    "PlaceRow",
    "Places",
    "SSL4Eco",
    "index_places",
    "list_places",
    "place_weights",
    "read_mountains",
    "read_places",
    "write_ssl4eco",
]

# The card that knows how the images go into the published model.
_CARD = "ssl4eco_resnet50.seco_ndvi"
# So many neighbours without readable images are no accident but a disk that is gone.
_MAX_BROKEN = 100


class SSL4Eco(Dataset[dict[str, Any]]):
    """Places with images of their seasons.

    A sample is ``{"id": six digits, "image": float32 tensor (seasons, C, size, size)}`` in digital
    numbers (NDVI × 10000); dividing by 255 is the method's part. Where a place has fewer dates
    than seasons are asked for, its last one is repeated. Larger images are cropped to the centre.

    With ``errors="skip"`` a batch is never short: instead of an image that cannot be used another
    date of the place is taken, and instead of a place with fewer than two usable dates (fewer than
    one for ``seasons=1``) the next place. Both depend on nothing but the files and the generator,
    so all processes agree. `report` counts them.

    Args:
        root: The folder that holds ``imgs``.
        bands: Bands of the sample, in order, of `BANDS`.
        seasons: Dates in a sample, at least 1.
        size: Side of the sample in pixels. Images are 256 px; where some are a few pixels smaller,
            give the smallest side.
        errors: ``"raise"``, or ``"skip"``: see above. A file cannot be used if it cannot be read,
            has not 13 bands, is not uint16 (so there is no NaN), is smaller than `size`, holds
            nothing but 0 in the chosen bands, or an NDVI above 10000.
        weights: How often each place is to be drawn, positive numbers in the order of `ids`;
            ``"published"`` for `place_weights` from ``places.csv`` (see `index_places`) and
            `mountains`; None for alike.
        mountains: With ``weights="published"``: whether a place is in mountains, by id, or the CSV
            file that says so (`read_mountains`).
        places: From `list_places`, to list a quarter of a million folders only once; None to list.

    Attributes:
        ids: The places' six digits.
        places: What was listed.
        report: What was left out or replaced, each time it was met, over all DataLoader workers: a
            `Report`.
        weights: As a float64 array of one number a place, or None.

    Raises:
        DataNotFoundError: There is no such folder or no place with two images in it, or a table
            that `weights` needs is missing.
        BandError: A band is not among `BANDS`.
        PixelError: `seasons`, `size` or `weights` cannot be.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        bands: Sequence[str] = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "NDVI"),
        seasons: int = 3,
        size: int = 256,
        errors: str = "raise",
        weights: Sequence[float] | NDArray[np.float64] | str | None = None,
        *,
        mountains: Mapping[str, bool] | str | os.PathLike[str] | None = None,
        places: Places | None = None,
    ) -> None:
        if seasons < 1 or size < 1:
            raise PixelError(f"seasons={seasons}, size={size}: expected at least 1 of each")
        self.root = Path(root)
        indices, self.bands = band_indices(bands, BANDS, "the sample")
        self._channels = [index + 1 for index in indices]
        self.seasons = seasons
        self.size = size
        self.errors = check_errors(errors)
        self.places = list_places(self.root) if places is None else places
        self.ids = self.places.ids
        self.report = SkipReport()
        for count, reason in (
            (self.places.single, "place with fewer than two images"),
            (self.places.ignored, "entry that is no place"),
        ):
            if count:
                self.report.add(reason, f"{count} in {self.root / 'imgs'}", count, log=False)
        self.weights = self._weights(weights, mountains)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The first dates of a place in the order of their names.

        Args:
            index: Number of the place.

        Returns:
            The sample.

        Raises:
            ImageError: An image cannot be used.
            IndexError: There is no such place.
        """
        return self._sample(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Different dates of a place in random order; only these are read.

        Args:
            index: Number of the place.
            rng: What the choice follows from.

        Returns:
            The sample.

        Raises:
            ImageError: An image cannot be used.
            IndexError: There is no such place.
        """
        return self._sample(index, rng)

    def input_spec(self, size: int = 224) -> InputSpec:
        """What a model pretrained on these samples, divided by 255, expects.

        Args:
            size: Side of its images in pixels.

        Returns:
            The published model's, for this data set's bands.
        """
        published = published_cards()[_CARD].input
        derived = {name: rule for name, rule in published.derived.items() if name in self.bands}
        return dataclasses.replace(published, bands=self.bands, size=size, derived=derived)

    def _weights(
        self,
        weights: Sequence[float] | NDArray[np.float64] | str | None,
        mountains: Mapping[str, bool] | str | os.PathLike[str] | None,
    ) -> NDArray[np.float64] | None:
        if weights is None or isinstance(weights, str):
            if weights is None and mountains is None:
                return None
            if weights != "published":
                raise PixelError(
                    f"weights is {weights!r}; expected numbers, None, or 'published', which is "
                    f"what mountains= belongs to"
                )
            table = self.root / PLACES_CSV
            if not table.is_file():
                raise DataNotFoundError(
                    f"weights='published' needs {table}; make it once with: from geofm.datasets "
                    f"import index_places; index_places({str(self.root)!r})"
                )
            if isinstance(mountains, str | os.PathLike):
                mountains = read_mountains(mountains)
            return place_weights(self.ids, read_places(table), mountains)
        numbers = np.asarray(weights, np.float64)
        if numbers.shape != (len(self),) or not (np.isfinite(numbers) & (numbers > 0)).all():
            raise PixelError(
                f"weights must be {len(self)} positive numbers, one a place, got shape "
                f"{numbers.shape}"
            )
        return numbers

    def _sample(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        count = len(self)
        index = checked_index(index, count, "place")
        tries = min(count, _MAX_BROKEN)
        for number in range(index, index + tries):
            place = number % count
            paths = self.places.paths(self.root, place)
            order = np.arange(len(paths)) if rng is None else rng.permutation(len(paths))
            images = self._read_some(paths[date] for date in order)
            if len(images) >= min(2, self.seasons):
                images += images[-1:] * (self.seasons - len(images))
                return {"id": str(self.ids[place]), "image": torch.from_numpy(np.stack(images))}
            self.report.add("place replaced by the next", str(paths[0].parent))
        raise ImageError(
            f"{tries} places in a row have too few usable images, beginning with "
            f"{self.places.paths(self.root, index % count)[0].parent}: {self.report}"
        )

    def _read_some(self, paths: Iterable[Path]) -> list[NDArray[np.float32]]:
        """The first images that can be used, as many as there are seasons."""
        images: list[NDArray[np.float32]] = []
        for path in paths:
            try:
                images.append(self._read(path))
            except ImageError as error:
                if self.errors == "raise":
                    raise
                self.report.add_error(error)
            if len(images) == self.seasons:
                break
        return images

    def _read(self, path: Path) -> NDArray[np.float32]:
        with opened(path) as file:
            check_image(file, path)
            top, left = (file.height - self.size) // 2, (file.width - self.size) // 2
            if top < 0 or left < 0:
                raise ImageError(
                    f"{path} is {file.height} x {file.width} px, smaller than size={self.size}; "
                    f"give the side of the smallest image as size",
                    "too small",
                )
            window = ((top, top + self.size), (left, left + self.size))
            pixels = file.read(self._channels, window=window)
        spectral = [i for i, band in enumerate(self.bands) if band != "NDVI"]
        if spectral and not pixels[spectral].any():
            raise ImageError(f"{path} holds nothing but 0, which is no data", "empty")
        if "NDVI" in self.bands and pixels[self.bands.index("NDVI")].max() > 10_000:
            raise ImageError(f"{path} has an NDVI above 10000, which stands for 1", "bad NDVI")
        return np.asarray(pixels, np.float32)
