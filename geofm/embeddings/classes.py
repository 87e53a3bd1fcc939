"""A map of classes: cells grouped by k-means of their embeddings."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.colours import NO_DATA, colour_of
from geofm.embeddings.files import EmbeddingsLike, read_embeddings, refuse_overwriting
from geofm.embeddings.grids import Embeddings, Floats, Grid, single_band
from geofm.embeddings.kmeans import KMeans, fit_kmeans
from geofm.embeddings.rasters import write_band
from geofm.errors import RasterError

__all__ = ["Segmentation", "segment"]

# What the sample that classes are found on may take.
_SAMPLE_BYTES = 64 * 2**20
_SAMPLE_CELLS = 65536
# Cells that are counted and numbered together: numpy takes eight bytes for each.
_COUNTED = 2**20


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A map of classes.

    Attributes:
        classes: (rows, columns) uint8, 0 where there is no data; class 1 is the largest.
        sizes: Cells of each class, from class 1 on.
        centres: (classes, channels) float32, in that order.
        grid: Where the cells lie.
        inertia: Mean squared distance of the sample to the centres.
    """

    classes: NDArray[np.uint8]
    sizes: tuple[int, ...]
    centres: Floats
    grid: Grid
    inertia: float

    def table(self) -> str:
        """Classes, their sizes and colours, as text."""
        total = max(1, sum(self.sizes))
        lines = ["class     cells   share  colour"]
        for number, size in enumerate(self.sizes, start=1):
            colour = "#{:02x}{:02x}{:02x}".format(*colour_of(number - 1))
            lines.append(f"{number:5d} {size:9d} {100 * size / total:6.1f}%  {colour}")
        return "\n".join(lines)


def segment(
    source: EmbeddingsLike,
    output: str | os.PathLike[str] | None = None,
    *,
    classes: int = 8,
    seed: int = 0,
    cosine: bool = True,
    starts: int = 4,
) -> Segmentation:
    """Group the cells of an embedding by k-means.

    Classes are found on up to 65,536 cells, drawn evenly and the same whatever the file's format;
    a second pass gives every cell its class.

    Args:
        source: As in `read_embeddings`.
        output: GeoTIFF to write: uint8, 0 for no data, with a colour table and the classes' names.
        classes: How many, 2 to 254.
        seed: Of all draws, 0 or more.
        cosine: Bring vectors to length one first, so that, as in `similar`, only their direction
            counts.
        starts: How often to begin anew; the best is kept.

    Returns:
        The map.

    Raises:
        DataNotFoundError: There is no such file.
        RasterError: There are fewer different cells than classes, or the output cannot be written
            or is the input.
        MissingExtraError: rasterio, pyarrow or zarr is not installed.
    """
    if not 2 <= classes <= 254:
        raise RasterError(f"classes must be 2 to 254, got {classes}")
    if seed < 0:
        raise RasterError(f"seed must be 0 or more, got {seed}")
    embeddings = read_embeddings(source)
    if output is not None:
        refuse_overwriting(output, embeddings)
    grid = embeddings.grid
    sample = _sample(embeddings, seed)
    found = fit_kmeans(_directed(sample, cosine), classes, seed=seed, starts=starts)
    flat = single_band(grid, 0, "uint8")
    for cells in embeddings.blocks():
        flat[cells.ids] = 1 + found.assign(_directed(cells.vectors, cosine))
    result = _by_size(flat, found, len(sample), grid)
    if output is not None:
        names = ["no data", *(f"class {i}" for i in range(1, classes + 1))]
        write_band(
            output,
            result.classes,
            grid,
            nodata=0,
            name="class",
            tags={
                "GEOFM_VALUES": f"k-means of {'directions' if cosine else 'vectors'}, seed {seed}",
                "GEOFM_CLASS_SIZES": ",".join(map(str, result.sizes)),
            },
            colours=[NO_DATA, *(colour_of(i) for i in range(classes))],
            classes=names,
        )
    return result


def _by_size(flat: NDArray[np.uint8], found: KMeans, sample: int, grid: Grid) -> Segmentation:
    """Number the classes by their size, the largest first; in place."""
    count = len(found.centres)
    parts = [flat[begin : begin + _COUNTED] for begin in range(0, len(flat), _COUNTED)]
    totals = np.zeros(count + 1, dtype=np.int64)
    for part in parts:
        totals += np.bincount(part, minlength=count + 1)
    sizes = totals[1:]
    order = np.argsort(-sizes, kind="stable")
    numbers = np.zeros(count + 1, dtype=np.uint8)
    numbers[1 + order] = np.arange(1, count + 1)
    for part in parts:
        part[:] = numbers[part]
    return Segmentation(
        flat.reshape(grid.shape[1:]),
        tuple(int(v) for v in sizes[order]),
        found.centres[order],
        grid,
        found.inertia / sample,
    )


def _sample(embeddings: Embeddings, seed: int) -> Floats:
    """Cells with the smallest hashes: an even draw that does not depend on the order of blocks."""
    size = max(256, min(_SAMPLE_CELLS, _SAMPLE_BYTES // (4 * embeddings.grid.shape[0])))
    channels = embeddings.grid.shape[0]
    keys, ids = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    vectors = np.zeros((0, channels), np.float32)
    for cells in embeddings.blocks():
        fresh = _hash(cells.ids, seed)
        chosen = fresh < keys.max() if len(keys) == size else np.ones(len(fresh), bool)
        keys = np.concatenate([keys, fresh[chosen]])
        ids = np.concatenate([ids, cells.ids[chosen]])
        vectors = np.concatenate([vectors, cells.vectors[chosen]])
        if len(keys) > size:
            keep = np.argpartition(keys, size)[:size]
            keys, ids, vectors = keys[keep], ids[keep], vectors[keep]
    return vectors[np.argsort(ids)]


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014) of each id."""
    seeded = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seeded
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return keys


def _directed(vectors: Floats, cosine: bool) -> Floats:
    if not cosine:
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Floats = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)
    return directions
