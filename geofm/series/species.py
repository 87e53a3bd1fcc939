"""Maps and tables of tree species from monthly images."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geofm.colours import NO_DATA, colour_of
from geofm.embeddings.geoparquet import pyarrow_modules
from geofm.embeddings.grids import Grid
from geofm.embeddings.rasters import write_band
from geofm.errors import RasterError
from geofm.predictions import Prediction
from geofm.raster.cog import Layout, NotWrittenError, raw_to_cog, written
from geofm.series.pixels import PixelClassifier, Species
from geofm.series.points import write_points
from geofm.series.sites import Given
from geofm.taxonomy import LEVELS, Taxon

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SpeciesMap", "species_map", "species_points"]

logger = logging.getLogger(__name__)

# Pixels along the side of what is read at a time: 12 months of 10 bands are 31 MB.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class SpeciesMap:
    """A map of species.

    Attributes:
        path: GeoTIFF of the classes.
        probabilities: GeoTIFF of probabilities.
        classes: (rows, columns) uint16: 1 is the first of `taxa`; 0 is no data.
        taxa: The species.
        families: Their families, in the order of the bands after the first.
        grid: Where the cells lie.
    """

    path: Path
    probabilities: Path
    classes: NDArray[np.uint16]
    taxa: tuple[Taxon, ...]
    families: tuple[str, ...]
    grid: Grid

    def table(self) -> str:
        """Species that were found, the most frequent first, as text."""
        counts = np.zeros(len(self.taxa) + 1, np.int64)
        # Some rows at a time: bincount makes 8 bytes of each cell.
        for top in range(0, len(self.classes), _BLOCK):
            rows = self.classes[top : top + _BLOCK]
            counts += np.bincount(rows.reshape(-1), minlength=len(counts))
        counts = counts[1:]
        total = max(1, int(counts.sum()))
        lines = ["class     cells   share  species"]
        for place in np.argsort(-counts, kind="stable"):
            if size := int(counts[place]):
                name = self.taxa[place].species
                lines.append(f"{place + 1:5d} {size:9d} {100 * size / total:6.1f}%  {name}")
        return "\n".join(lines)


def species_map(
    model: Any,
    monthly: xr.DataArray,
    auxiliary: Mapping[str, Given] | None,
    species: Species,
    *,
    output: str | os.PathLike[str] = "species.tif",
    probabilities: str | os.PathLike[str] | None = None,
    families: bool = True,
    step: int = 1,
    window: int = 5,
    min_months: int = 1,
    batch_size: int = 256,
    crs: Any = None,
) -> SpeciesMap:
    """Map the likeliest species of every pixel, or of every n-th.

    Each pixel is an observation of its own: twelve months of the square around it, and its
    environment, as `SpeciesClassifier` takes them. Values of the square that are not known, and
    those outside the region, take the mean of the others of their month and band, as in
    `geofm.datasets.collate`; a month with no value in a band is missing.

    The region is read in blocks of 256 x 256 pixels. In memory besides is the map of classes, 2
    bytes a cell; probabilities wait in a file beside the output. Both files appear at the end, when
    both are complete; if that fails, nothing is kept of what was computed.

    Args:
        model: A `GeoTreeCLIP`.
        monthly: (month, band, y, x), in any order, in memory or lazy: what `monthly_composite`
            gives. Digital numbers, reflectance times 10,000 without offset, with the names of the
            bands as the coordinate ``band`` and the centres of the pixels as ``x`` and ``y``. More
            bands than the model takes may be there. NaN, and the attribute ``_FillValue``, are no
            data; 0 is a number like any other (`monthly_composite` has ``nodata=0`` for it).
        auxiliary: Environmental variables by name: a number for all pixels, a DataArray (y, x) of
            the same pixels, a function of longitudes and latitudes, (n,) each, that returns (n,)
            values, or None. The model knows that those left out, or NaN, are missing; longitude
            and latitude come from the georeference.
        species: The species to choose from, as in `SpeciesClassifier`; or one, for its temperature.
        output: GeoTIFF of the species: uint16, 0 for no data, with colours, and the names as the
            tag ``GEOFM_CLASSES`` (JSON, from 0 on).
        probabilities: GeoTIFF of float32 bands: the probability of the species, then the sum over
            each family; None for the output's name with ``_probabilities``.
        families: Write those of families, too: 4 bytes each a cell.
        step: Pixels along the side of a cell. A cell is computed from its central pixel alone; the
            last rows and columns, where a cell's centre would lie outside, are not mapped.
        window: Side of the squares, odd; the published model was trained with 5.
        min_months: Months that a pixel itself must have, in all bands; those with less are no data.
        batch_size: Pixels encoded together, on the model's device.
        crs: Coordinate reference system; None: what the array says.

    Returns:
        The map.

    Raises:
        PixelError: Dimensions, months or units are not as they must be.
        BandError: A band is missing, or the bands are not named.
        AuxiliaryError: A variable is unknown, not of these pixels, or cannot be in its unit.
        TaxonError: A species is unknown.
        ModelError: The model is no GeoTreeCLIP, or normalizes by batch.
        RasterError: There is no reference system or no coordinates, the region has no cell of
            `step` pixels, or an output cannot be written.
        MissingExtraError: xarray or rasterio is not installed.
    """
    if not isinstance(step, int) or step < 1:
        raise RasterError(f"step is a number of pixels from 1 on, got {step!r}")
    target = Path(output)
    _check_output(target)
    beside = target.with_name(f"{target.stem}_probabilities{target.suffix}")
    second = beside if probabilities is None else Path(probabilities)
    _check_output(second)
    if target == second:
        raise RasterError(f"species and probabilities are two files, got {target} for both")
    pixels = PixelClassifier(
        model,
        monthly,
        auxiliary,
        species,
        window=window,
        min_months=min_months,
        batch_size=batch_size,
        crs=crs,
    )
    names = pixels.families if families else ()
    _, height, width = pixels.cube.grid.shape
    rows, columns = (np.arange(step // 2, n, step) for n in (height, width))
    if not len(rows) or not len(columns):
        raise RasterError(
            f"the region of {height} x {width} px has no centre of a cell of {step} px; take a "
            f"step of {min(height, width)} or less"
        )
    a, b, c, d, e, f = pixels.cube.grid.transform
    shape = (1 + len(names), len(rows), len(columns))
    transform = (a * step, b * step, c, d * step, e * step, f)
    grid = Grid(shape, transform, pixels.cube.grid.crs, pixels.tags())
    with _folder_beside(second) as folder:
        cells = Path(folder) / "cells.raw"
        classes = _fill_cells(pixels, rows, columns, cells, len(names))
        made = SpeciesMap(target, second, classes, pixels.classifier.taxa, names, grid)
        _write(made, cells)
    return made


def _check_output(path: Path) -> None:
    """Refuse what cannot be written, before anything is computed."""
    if path.is_dir():
        raise RasterError(f"the output is a folder: {path}; name a file in it")
    if not path.parent.is_dir():
        raise RasterError(f"cannot write {path}: there is no folder {path.parent}")


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(dir=path.parent, prefix=".geofm-")
    except OSError as error:
        raise RasterError(f"cannot write {path}: {error.strerror or error}") from error


def _fill_cells(
    pixels: PixelClassifier, rows: NDArray[Any], columns: NDArray[Any], cells: Path, families: int
) -> NDArray[np.uint16]:
    """Compute block by block; probabilities go to a file, (rows, bands, columns)."""
    classes = np.zeros((len(rows), len(columns)), np.uint16)
    # Not buffered: what a full disk does not take would be written again on closing.
    with cells.open("wb", buffering=0) as file:
        for down in _parts(rows):
            for right in _parts(columns):
                places = np.meshgrid(rows[down], columns[right], indexing="ij")
                high, wide = places[0].shape
                block = np.full((high, 1 + families, wide), np.nan, np.float32)
                for chosen, found in pixels.predict(*(part.reshape(-1) for part in places)):
                    row, column = np.divmod(chosen, wide)
                    top = found.top(1)
                    classes[down.start + row, right.start + column] = 1 + top.indices[:, 0].numpy()
                    block[row, 0, column] = top.values[:, 0].numpy()
                    if families:
                        block[row, 1:, column] = found.roll_up("family").probabilities.numpy()
                _put(file, block, down.start, right.start, len(columns))
            logger.info("%d of %d rows of the map are done", down.stop, len(rows))
    if not classes.any():
        logger.warning("no pixel of the map has data in %d months", pixels.min_months)
    return classes


def _put(file: BinaryIO, block: NDArray[np.float32], top: int, left: int, columns: int) -> None:
    """Write a block to its place among plain rows."""
    high, bands, _ = block.shape
    try:
        for row, band in itertools.product(range(high), range(bands)):
            file.seek(4 * (((top + row) * bands + band) * columns + left))
            line = block[row, band].tobytes()
            while line:
                line = line[file.write(line) :]
    except OSError as error:
        raise RasterError(
            f"cannot write {file.name}, where probabilities wait: {error.strerror or error}. "
            f"Nothing is kept of what was computed; see that the disk has room, and run it again"
        ) from error


def _parts(places: NDArray[Any]) -> Iterator[slice]:
    """Slices of places, in order, that lie in the same block."""
    numbers = places // _BLOCK
    edges = np.flatnonzero(np.diff(numbers)) + 1
    ends = [0, *edges.tolist(), len(places)]
    return (slice(first, last) for first, last in itertools.pairwise(ends))


def _write(made: SpeciesMap, cells: Path) -> None:
    """Write both files; they take their names once both are complete."""
    grid, taxa = made.grid, made.taxa
    layout = Layout(
        shape=grid.shape,
        dtype="float32",
        transform=grid.transform,
        crs=grid.crs,
        nodata=float("nan"),
        names=["probability", *(f"family {family}" for family in made.families)],
        tags={**grid.tags, "GEOFM_VALUES": "probability of the likeliest species, and of families"},
    )
    try:
        with written(made.probabilities) as probabilities, written(made.path) as species:
            raw_to_cog(cells, probabilities, layout)
            write_band(
                species,
                made.classes,
                grid,
                nodata=0,
                name="species",
                tags={
                    "GEOFM_VALUES": "the likeliest species",
                    "GEOFM_PROBABILITIES": made.probabilities.name,
                },
                colours=[NO_DATA, *(colour_of(i) for i in range(len(taxa)))],
                classes=["no data", *(taxon.species for taxon in taxa)],
            )
    except (RasterError, OSError) as error:
        reason = error.reason if isinstance(error, NotWrittenError) else error
        raise RasterError(
            f"cannot write {made.path} and {made.probabilities}: {reason}. "
            f"Neither is written, and nothing is kept of what was computed; see that the disk has "
            f"room, and run it again"
        ) from error


def species_points(
    model: Any,
    monthly: xr.DataArray,
    auxiliary: Mapping[str, Given] | None,
    species: Species,
    points: ArrayLike | int,
    *,
    output: str | os.PathLike[str] | None = None,
    top_k: int = 5,
    window: int = 5,
    min_months: int = 1,
    batch_size: int = 256,
    crs: Any = None,
) -> list[dict[str, Any]]:
    """The likeliest species of some places of a region.

    Args:
        model: As in `species_map`, as are all others that are not told here.
        monthly: Monthly images.
        auxiliary: Environmental variables.
        species: The species to choose from.
        points: (n, 2) longitudes and latitudes in degrees, of which the pixels are taken that they
            lie in; or a number of pixels, for a grid of points that are so far apart.
        output: GeoParquet to write, in degrees; None for none.
        top_k: How many species to report.
        window: Side of the squares around the pixels.
        min_months: Months that a pixel must have.
        batch_size: Pixels encoded together.
        crs: Coordinate reference system.

    Returns:
        A dict for each point, in their order: ``id`` (its number), ``longitude``, ``latitude``,
        ``species``, ``genus``, ``family``, ``leaf_type``, ``probability``, ``top_species`` and
        ``top_probabilities`` (lists, best first) and ``families`` (probabilities by name); all from
        species on are None where there is no data. The file has a column ``family_...`` for each.

    Raises:
        RasterError: A point lies outside the region, or as in `species_map`.
        GeofmError: As in `species_map`.
        MissingExtraError: pyarrow is not installed, or as in `species_map`.
    """
    if top_k < 1:
        raise RasterError(f"top_k is a number of species from 1 on, got {top_k}")
    if output is not None:
        _check_output(Path(output))
        pyarrow_modules()
    pixels = PixelClassifier(
        model,
        monthly,
        auxiliary,
        species,
        window=window,
        min_months=min_months,
        batch_size=batch_size,
        crs=crs,
    )
    places, rows, columns = _places(pixels, points)
    out = [
        {"id": number, "longitude": lon, "latitude": lat, **_EMPTY}
        for number, (lon, lat) in enumerate(places.tolist())
    ]
    blocks = np.stack((rows // _BLOCK, columns // _BLOCK), axis=1)
    for block in np.unique(blocks, axis=0):
        here = np.flatnonzero((blocks == block).all(axis=1))
        for chosen, found in pixels.predict(rows[here], columns[here]):
            for place, row in zip(here[chosen], _described(found, top_k), strict=True):
                out[place] |= row
    if output is not None:
        write_points(Path(output), out, pixels.families, pixels.tags())
    return out


_EMPTY: dict[str, Any] = {
    **dict.fromkeys(LEVELS),
    **dict.fromkeys(("probability", "top_species", "top_probabilities", "families")),
}


def _described(found: Prediction, top_k: int) -> Iterator[dict[str, Any]]:
    top = found.top(top_k)
    families = found.roll_up("family")
    for values, indices, sums in zip(
        top.values.tolist(), top.indices.tolist(), families.probabilities.tolist(), strict=True
    ):
        best = found.taxa[indices[0]]
        yield {
            **{level: getattr(best, level) for level in LEVELS},
            "probability": values[0],
            "top_species": [found.taxa[i].species for i in indices],
            "top_probabilities": values,
            "families": dict(zip(families.names, sums, strict=True)),
        }


def _places(
    pixels: PixelClassifier, points: Any
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Longitudes and latitudes, and the rows and columns of the pixels."""
    cube, (_, height, width) = pixels.cube, pixels.cube.grid.shape
    if isinstance(points, int):
        if points < 1:
            raise RasterError(f"points are so many pixels apart, from 1 on, got {points}")
        lines = (np.arange(points // 2, n, points) for n in (height, width))
        rows, columns = (part.reshape(-1) for part in np.meshgrid(*lines, indexing="ij"))
        if not len(rows):
            raise RasterError(
                f"the region of {height} x {width} px has no points {points} px apart"
            )
        return np.stack(cube.lonlat(rows, columns), axis=1), rows, columns
    places = np.asarray(points, dtype=np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not len(places):
        raise RasterError(
            f"points are longitudes and latitudes, (n, 2), or their distance in pixels; got shape "
            f"{places.shape}"
        )
    # It says what is missing where there is no reference system.
    cube.lonlat(np.zeros(1), np.zeros(1))
    warp = importlib.import_module("rasterio.warp").transform
    x, y = (np.asarray(v) for v in warp("EPSG:4326", cube.grid.crs, *places.T.tolist()))
    across, down = cube.grid.fractional(x, y)
    # Also of places that the reference system does not know, infinite there.
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    if not inside.all():
        number = int(np.flatnonzero(~inside)[0])
        west, south, east, north = cube.grid.extent()
        raise RasterError(
            f"{int((~inside).sum())} of {len(places)} points lie outside the images: number "
            f"{number} is at {places[number, 0]:g}, {places[number, 1]:g} (longitude, latitude); "
            f"they go from {west:.5f} to {east:.5f} east and from {south:.5f} to {north:.5f} north"
        )
    return places, down.astype(np.int64), across.astype(np.int64)
