"""One place seen over a year: twelve monthly images, the site's variables, perhaps its taxon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geofm.errors import BandError, DataNotFoundError, PixelError
from geofm.spectral import match_bands, missing_message

__all__ = [
    "BANDS",
    "DataNotFoundError",
    "Observation",
    "Position",
    "band_indices",
    "centre_crop",
    "collate",
    "fill_missing",
    "present_months",
    "resume_points",
]

BANDS: Final = ("B2", "B3", "B4", "B8", "B5", "B6", "B7", "B8A", "B11", "B12")
"""Sentinel-2 bands of GlobalGeoTree, in its order: B8 comes before the red edge."""

MONTHS: Final = 12
SIDE: Final = 5
# As in geofm.preprocess: no real scene stays below this everywhere; reflectance does.
LOOKS_LIKE_REFLECTANCE: Final = 3.0
# Digital numbers lie between these, also as in geofm.preprocess; what does not marks no data.
LOWEST_DN: Final = -2_000.0
HIGHEST_DN: Final = 65_534.0


class Position(NamedTuple):
    """Where in a set of shards an observation stands.

    Attributes:
        shard: Index of the shard among the given paths.
        sample: Index of the sample in the shard, samples that cannot be read included.
        worker: Number of the loading process that read it.
    """

    shard: int
    sample: int
    worker: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A site and its year.

    Attributes:
        sample_id: Identifier given by the data's author; the key or file name where there is none.
        images: (12, bands, 5, 5) float32, digital numbers, January first; NaN where missing.
        bands: Names of the bands, in order.
        longitude: Degrees east, WGS 84; None where unknown.
        latitude: Degrees north, WGS 84; None where unknown.
        auxiliary: The site's variables by name, longitude and latitude among them, in the units of
            the source; None for one that is missing.
        leaf_type: For example ``"Deciduous Broadleaf"``; None where unknown.
        family: For example ``"Fagaceae"``; None where unknown.
        genus: For example ``"Quercus"``; None where unknown.
        species: For example ``"Quercus robur"``; None where unknown.
        key: Name of the sample in its shard, or the file or folder it was read from.
        position: Where in the shards it stands; None for what was not read from shards.
    """

    sample_id: str
    images: NDArray[np.float32]
    bands: tuple[str, ...] = BANDS
    longitude: float | None = None
    latitude: float | None = None
    auxiliary: Mapping[str, float | None] = field(default_factory=dict)
    leaf_type: str | None = None
    family: str | None = None
    genus: str | None = None
    species: str | None = None
    key: str = ""
    position: Position | None = None

    @property
    def taxon(self) -> tuple[str | None, str | None, str | None, str | None]:
        """Leaf type, family, genus, species."""
        return (self.leaf_type, self.family, self.genus, self.species)

    @property
    def month_mask(self) -> NDArray[np.bool_]:
        """Which months are present, as `present_months` tells; (12,)."""
        return present_months(self.images)


def present_months(images: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Which months can be used.

    A month is present if each of its bands has at least one value. A month whose pixels are all
    NaN, and one of which a whole band is NaN, is missing: nothing there could be filled honestly.

    Args:
        images: (..., months, bands, H, W), NaN where missing.

    Returns:
        (..., months), True where present.
    """
    return np.asarray(np.isfinite(images).any(axis=(-2, -1)).all(axis=-1))


def fill_missing(
    images: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Fill what a model cannot take: NaN pixels of months that are present.

    A NaN pixel takes the mean of the other pixels of its month and band. Missing months (see
    `present_months`) become NaN throughout.

    Args:
        images: (..., months, bands, H, W), NaN where missing; not changed.

    Returns:
        The images, and which months are present, (..., months).
    """
    mask = present_months(images)
    known = np.isfinite(images)
    count = known.sum(axis=(-2, -1), keepdims=True)
    # In double precision: the sum of 25 numbers does not depend on how numpy pairs them.
    total = np.where(known, images, 0).sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    mean = (total / np.maximum(count, 1)).astype(np.float32)
    filled = np.where(known, images, mean)
    return np.where(mask[..., None, None, None], filled, np.float32(np.nan)), mask


def band_indices(
    wanted: Sequence[str], available: Sequence[str], needed_by: str
) -> tuple[list[int], tuple[str, ...]]:
    """Where the wanted Sentinel-2 bands stand among the available ones.

    Args:
        wanted: Names or aliases.
        available: Names or aliases, in the order of the data.
        needed_by: What needs the bands, for the message.

    Returns:
        An index for each wanted band, and the wanted bands' own names.

    Raises:
        BandError: A band is missing, unknown or named twice.
    """
    matches = match_bands(wanted, available)
    indices = [match.index for match in matches if match.index is not None]
    if len(indices) < len(matches):
        raise BandError(missing_message(matches, available, needed_by))
    return indices, tuple(match.wanted for match in matches)


def centre_crop(
    pixels: NDArray[Any], size: int = SIDE, centre: tuple[float, float] | None = None
) -> NDArray[Any]:
    """Cut a square from the middle, or from around a point.

    Where the middle lies between two pixels (6 x 6 to 5 x 5) the square is the upper left one, so
    that its centre is half a pixel up and left of the image's. Around a point near the border the
    square is moved inwards.

    Args:
        pixels: (..., H, W).
        size: Side of the square in pixels.
        centre: Row and column of the point, in pixels from the upper left corner of the image;
            None for the middle.

    Returns:
        (..., size, size), a view.

    Raises:
        PixelError: The image is smaller than the square, or the point lies outside it.
    """
    corner = []
    for axis, length in enumerate(pixels.shape[-2:]):
        if length < size:
            raise PixelError(
                f"an image of {pixels.shape[-2]} x {pixels.shape[-1]} pixels is too small for a "
                f"square of {size} x {size}"
            )
        first = (length - size) // 2
        if centre is not None:
            if not 0 <= centre[axis] <= length:
                raise PixelError(
                    f"the point (row {centre[0]:.1f}, column {centre[1]:.1f}) lies outside the "
                    f"image of {pixels.shape[-2]} x {pixels.shape[-1]} pixels"
                )
            # The little that is taken off keeps a computed middle from jumping between two pixels.
            first = math.floor(centre[axis] - size / 2 + 0.5 - 1e-3)
            first = min(max(first, 0), length - size)
        corner.append(first)
    row, column = corner
    return pixels[..., row : row + size, column : column + size]


def collate(
    observations: Sequence[Observation], auxiliary_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Stack observations into a batch; a ``collate_fn`` for a DataLoader.

    A NaN pixel inside a month that is present takes the mean of that month's other pixels in the
    same band. A missing month (see `present_months`) is NaN throughout. Both depend on the sample
    alone.

    Args:
        observations: At least one, all with the same bands.
        auxiliary_names: Order of the variables; None for the order in the first observation, which
            the others must then share. Give a model's own names with ``functools.partial``.

    Returns:
        ``images`` (N, 12, bands, 5, 5) float32, digital numbers; ``image_mask`` (N, 12) bool, True
        where the month is present; ``auxiliary`` (N, variables) float32, NaN where missing;
        ``auxiliary_mask`` (N, variables) bool, True where present; ``auxiliary_names`` and
        ``bands``, tuples; ``taxa``, a list of (leaf type, family, genus, species); ``sample_ids``
        and ``keys``, lists; ``positions`` (N, 3) int64, columns as in `Position`, None unless all
        come from shards.

    Raises:
        PixelError: There is no observation, or their shapes or variables differ.
        BandError: Their bands differ.
    """
    if not observations:
        raise PixelError("a batch needs at least one observation")
    first = observations[0]
    names = tuple(first.auxiliary if auxiliary_names is None else auxiliary_names)
    for other in observations:
        if other.bands != first.bands:
            raise BandError(
                f"observations {first.sample_id} and {other.sample_id} have different bands: "
                f"{', '.join(first.bands)} and {', '.join(other.bands)}"
            )
        if other.images.shape != first.images.shape:
            raise PixelError(
                f"observations {first.sample_id} and {other.sample_id} have different shapes: "
                f"{first.images.shape} and {other.images.shape}"
            )
        if auxiliary_names is None and set(other.auxiliary) != set(names):
            differing = sorted(set(other.auxiliary) ^ set(names))
            raise PixelError(
                f"observations {first.sample_id} and {other.sample_id} differ in the variables "
                f"{', '.join(differing)}; give auxiliary_names to say which are meant"
            )
    images = np.stack([observation.images for observation in observations]).astype(np.float32)
    filled, mask = fill_missing(images)
    auxiliary = np.array([[_number(o.auxiliary.get(name)) for name in names] for o in observations])
    auxiliary = auxiliary.reshape(len(observations), len(names))
    positions = [o.position for o in observations if o.position is not None]
    return {
        "images": torch.from_numpy(filled),
        "image_mask": torch.from_numpy(mask),
        "auxiliary": torch.from_numpy(auxiliary.astype(np.float32)),
        "auxiliary_mask": torch.from_numpy(np.isfinite(auxiliary)),
        "auxiliary_names": names,
        "bands": first.bands,
        "taxa": [observation.taxon for observation in observations],
        "sample_ids": [observation.sample_id for observation in observations],
        "keys": [observation.key for observation in observations],
        "positions": torch.tensor(positions) if len(positions) == len(observations) else None,
    }


def resume_points(
    positions: Tensor, before: Mapping[int, tuple[int, int]] | None = None
) -> dict[int, tuple[int, int]]:
    """Where each loading process has to go on after a batch.

    Args:
        positions: (N, 3), a batch's ``positions``.
        before: What this function returned for the previous batch.

    Returns:
        For each worker the shard and sample to begin with: the ``start`` of a `GlobalGeoTree` that
        is loaded by as many workers and ranks as before.
    """
    points = dict(before or {})
    for shard, sample, worker in positions.tolist():
        points[worker] = max(points.get(worker, (0, 0)), (shard, sample + 1))
    return points


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
