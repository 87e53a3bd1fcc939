"""k-means, seeded, on a sample that fits into memory.

k-means++ (Arthur & Vassilvitskii 2007) with several candidates a centre, then Lloyd's iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.grids import Floats
from geofm.errors import RasterError

__all__ = ["KMeans", "fit_kmeans"]

# Vectors whose distances are computed together.
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class KMeans:
    """Centres of classes.

    Attributes:
        centres: (classes, channels) float32.
        inertia: Sum of the squared distances of the sample to their centres.
        iterations: Until the centres stood still.
    """

    centres: Floats
    inertia: float
    iterations: int

    def assign(self, vectors: Floats) -> NDArray[np.int64]:
        """The nearest centre of each vector.

        Args:
            vectors: (n, channels).

        Returns:
            (n,), from 0.
        """
        return _nearest(vectors, self.centres)[0]


def fit_kmeans(
    vectors: Floats, classes: int, *, seed: int = 0, starts: int = 4, iterations: int = 100
) -> KMeans:
    """Find classes of vectors.

    Args:
        vectors: (n, channels).
        classes: How many.
        seed: Of the draws.
        starts: How often to begin anew; the best is kept.
        iterations: At most, of each start.

    Returns:
        The centres.

    Raises:
        RasterError: There are fewer different vectors than classes.
    """
    if len(vectors) < classes:
        raise RasterError(f"{classes} classes need as many cells with data, got {len(vectors)}")
    draws = np.random.default_rng(seed)
    # Distances are differences of large squares unless the origin is among the vectors.
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = vectors - mean
    found = [_lloyd(centred, _plusplus(centred, classes, draws), iterations) for _ in range(starts)]
    best = min(found, key=lambda each: each.inertia)
    return KMeans(best.centres + mean, best.inertia, best.iterations)


def _plusplus(vectors: Floats, classes: int, draws: np.random.Generator) -> Floats:
    """First centres: each far from those before it, by chance."""
    candidates = 2 + int(math.log(classes))
    centres = np.empty((classes, vectors.shape[1]), dtype=np.float32)
    centres[0] = vectors[draws.integers(len(vectors))]
    squares = (vectors**2).sum(axis=1)
    # What rounding makes of zero.
    floor = 1e-6 * float(squares.max())
    distance = _to_one(vectors, squares, centres[0], floor)
    for number in range(1, classes):
        total = float(distance.sum(dtype=np.float64))
        if total == 0:
            raise RasterError(
                f"there are only {number} different vectors, fewer than the {classes} classes"
            )
        chance = draws.random(candidates) * total
        picked = np.searchsorted(np.cumsum(distance, dtype=np.float64), chance)
        tried = [
            np.minimum(distance, _to_one(vectors, squares, vectors[i], floor))
            for i in picked.clip(max=len(vectors) - 1)
        ]
        best = int(np.argmin([each.sum(dtype=np.float64) for each in tried]))
        centres[number] = vectors[min(int(picked[best]), len(vectors) - 1)]
        distance = tried[best]
    return centres


def _lloyd(vectors: Floats, centres: Floats, iterations: int) -> KMeans:
    previous: NDArray[np.int64] | None = None
    done = 0
    while done < iterations:
        done += 1
        labels, distance = _nearest(vectors, centres)
        if previous is not None and np.array_equal(labels, previous):
            break
        previous = labels
        centres = _means(vectors, labels, distance, len(centres))
    labels, distance = _nearest(vectors, centres)
    return KMeans(centres, float(distance.sum(dtype=np.float64)), done)


def _means(vectors: Floats, labels: NDArray[np.int64], distance: Floats, classes: int) -> Floats:
    sums = np.zeros((classes, vectors.shape[1]), dtype=np.float64)
    sizes = np.bincount(labels, minlength=classes)
    order = np.argsort(labels, kind="stable")
    begins = np.concatenate([[0], np.cumsum(sizes)])
    for number in range(classes):
        sums[number] = vectors[order[begins[number] : begins[number + 1]]].sum(
            axis=0, dtype=np.float64
        )
    means: Floats = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        # A class without members goes to where the others fit worst.
        means[empty] = vectors[np.argsort(-distance, kind="stable")[: len(empty)]]
    return means


def _nearest(vectors: Floats, centres: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Nearest centre of each vector, and the squared distance to it."""
    labels = np.empty(len(vectors), dtype=np.int64)
    distance = np.empty(len(vectors), dtype=np.float32)
    lengths = (centres**2).sum(axis=1)
    for begin in range(0, len(vectors), _CHUNK):
        part = vectors[begin : begin + _CHUNK]
        scores = lengths - 2 * (part @ centres.T)
        best = scores.argmin(axis=1)
        labels[begin : begin + _CHUNK] = best
        distance[begin : begin + _CHUNK] = scores[np.arange(len(part)), best] + (part**2).sum(
            axis=1
        )
    return labels, np.maximum(distance, 0)


def _to_one(vectors: Floats, squares: Floats, centre: Floats, floor: float) -> Floats:
    distance: Floats = squares - 2 * (vectors @ centre) + (centre**2).sum()
    distance[distance <= floor] = 0
    return distance
