"""What pixels come from: a file, a scene, or an image in memory, read part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from geofm.errors import BandError, MissingExtraError, RasterError
from geofm.scenes.files import is_remote, shown

if TYPE_CHECKING:
    from geofm.scenes import Scene, SceneBand

__all__ = ["Coefficients", "RasterImage", "Source", "SourceLike", "open_source", "read_image"]

logger = logging.getLogger(__name__)

Coefficients: TypeAlias = tuple[float, float, float, float, float, float]
SourceLike: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | RasterImage | Scene"
Masked: TypeAlias = np.ma.MaskedArray[Any, Any]


@dataclass(frozen=True, eq=False)
class RasterImage:
    """A raster with named bands.

    Attributes:
        pixels: Stored values, (bands, H, W); masked where the file says "no data" (its no-data
            values, mask or alpha band).
        bands: Names, in that order.
        transform: Affine coefficients a, b, c, d, e, f: x = a·column + b·row + c,
            y = d·column + e·row + f.
        crs: Coordinate reference system as WKT; None where the file has none.
    """

    pixels: Masked
    bands: tuple[str, ...]
    transform: Coefficients
    crs: str | None


class Source(Protocol):
    """Named bands on one grid, read window by window.

    Attributes:
        name: What messages and tags call it.
        bands: Names of the bands.
        height: Pixels.
        width: Pixels.
        transform: As in `RasterImage`.
        crs: As in `RasterImage`.
        date: When it was taken, ISO 8601; None if that is not known.
    """

    name: str
    bands: tuple[str, ...]
    height: int
    width: int
    transform: Coefficients
    crs: str | None
    date: str | None

    def read(self, bands: Sequence[str], top: int, left: int, height: int, width: int) -> Masked:
        """Stored values of a window.

        Args:
            bands: Names of the bands to read.
            top: First row.
            left: First column.
            height: Rows.
            width: Columns.

        Returns:
            (bands, height, width), masked where there is no data.
        """
        ...

    def identity(self) -> str:
        """What tells this source from another, or from itself before it was changed."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class FileSource:
    """A multiband file that GDAL reads.

    Args:
        path: The file.
        bands: Names in order; None to take them from its descriptions.

    Raises:
        BandError: There are no names, or not one for each band.
        RasterError: It cannot be read, or has pixels that are no numbers.
    """

    def __init__(self, path: str | os.PathLike[str], bands: Sequence[str] | None) -> None:
        self.rasterio = rasterio_module()
        self.path = path
        # Without an address's query, which may hold a signature.
        self.shown = shown(os.fspath(path))
        self.name = Path(self.shown).name
        self.date: str | None = None
        with warnings.catch_warnings():
            # Said below, in the same words as a missing CRS.
            warnings.simplefilter("ignore", self.rasterio.errors.NotGeoreferencedWarning)
            try:
                self.file = self.rasterio.open(path)
            except self.rasterio.errors.RasterioError as error:
                reason = str(error).replace(os.fspath(path), self.shown)
                raise RasterError(f"{self.shown} cannot be read as a raster: {reason}") from error
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._describe(bands)
            undo.pop_all()

    def _describe(self, bands: Sequence[str] | None) -> None:
        file = self.file
        self.height, self.width = file.height, file.width
        self.transform: Coefficients = tuple(file.transform)[:6]
        self.crs = file.crs.to_wkt() if file.crs else None
        if bands is None:
            if not all(file.descriptions):
                raise BandError(
                    f"{self.shown} has {file.count} bands without names; name them in order, for "
                    f"example bands=['B1', 'B2', ...] (on the command line: --bands B1,B2,...)"
                )
            bands = [str(name) for name in file.descriptions]
        if len(bands) != file.count:
            raise BandError(f"{self.shown} has {file.count} bands, {len(bands)} are named: {bands}")
        for dtype in file.dtypes:
            if dtype.startswith("complex"):
                raise RasterError(
                    f"{self.shown} has {dtype} pixels; integers or floats are needed. For radar, "
                    f"take the amplitude or the intensity first"
                )
        scaled = sorted({*zip(file.scales, file.offsets, strict=True)} - {(1.0, 0.0)})
        if scaled:
            warnings.warn(
                f"{self.shown} declares scales and offsets {scaled}, which are not applied: "
                f"its stored values are taken as they are. Say what they mean with units= and "
                f"offset=",
                stacklevel=5,
            )
        self.bands = tuple(bands)

    def read(self, bands: Sequence[str], top: int, left: int, height: int, width: int) -> Masked:
        """As `Source.read`."""
        window = self.rasterio.windows.Window(left, top, width, height)
        numbers = [self.bands.index(name) + 1 for name in bands]
        try:
            return self.file.read(numbers, window=window, masked=True)  # type: ignore[no-any-return]
        except self.rasterio.errors.RasterioError as error:
            reason = str(error).replace(os.fspath(self.path), self.shown)
            raise RasterError(
                f"{self.shown} cannot be read at rows {top} to {top + height}, columns {left} to "
                f"{left + width}: {reason}. Is the file complete? Fetch it again"
            ) from error

    def identity(self) -> str:
        """Name, size and time of the file: hashing it would take as long as reading it."""
        found = _size_and_time(os.fspath(self.path))
        if found is None:
            # Something that GDAL reads and that is no file, such as /vsicurl/...
            return f"{self.shown} {self.height}x{self.width}"
        return f"{self.name} {found[0]} bytes of {found[1]}"

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class ImageSource:
    """An image that is in memory already.

    Args:
        image: The image.
        bands: Names that replace its own; None to keep them.

    Raises:
        BandError: There is not one name for each band.
        RasterError: The pixels are no (bands, H, W) of numbers.
    """

    def __init__(self, image: RasterImage, bands: Sequence[str] | None) -> None:
        pixels = np.ma.asarray(image.pixels)
        if pixels.ndim != 3 or pixels.dtype.kind not in "iuf":
            raise RasterError(
                f"an image is (bands, rows, columns) of integers or floats, got {pixels.shape} of "
                f"{pixels.dtype}"
            )
        self.pixels = pixels
        self.bands = tuple(bands if bands is not None else image.bands)
        if len(self.bands) != len(pixels):
            raise BandError(f"the image has {len(pixels)} bands, {len(self.bands)} are named")
        self.name = "image in memory"
        self.height, self.width = pixels.shape[1:]
        self.transform, self.crs = image.transform, image.crs
        self.date: str | None = None

    def read(self, bands: Sequence[str], top: int, left: int, height: int, width: int) -> Masked:
        """As `Source.read`."""
        numbers = [self.bands.index(name) for name in bands]
        part: Masked = self.pixels[numbers, top : top + height, left : left + width]
        return part

    def identity(self) -> str:
        """Hash of the pixels."""
        digest = hashlib.sha256(str((self.pixels.shape, self.pixels.dtype)).encode())
        digest.update(np.ascontiguousarray(self.pixels.data).tobytes())
        digest.update(np.ascontiguousarray(np.ma.getmaskarray(self.pixels)).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is open."""


class SceneSource:
    """A scene of `geofm.scenes`: bands of several resolutions, on the grid of the finest.

    Args:
        scene: The scene.
        bands: Names of those to use; None for all.
        resampling: How coarser bands are brought to the finest grid.
        mask_classes: Classes of the scene's own classification that count as no data.

    Raises:
        BandError: The scene has no such band.
    """

    def __init__(
        self,
        scene: Scene,
        bands: Sequence[str] | None,
        resampling: str,
        mask_classes: Sequence[int],
    ) -> None:
        if bands is not None:
            chosen = {band.name: band for band in scene.select(bands)}
            scene = dataclasses.replace(scene, bands=chosen)
        self.scene = scene
        self.resampling, self.mask_classes = resampling, tuple(mask_classes)
        self.bands = tuple(scene.bands)
        self.name = Path(shown(scene.source)).name or "scene"
        self.height, self.width = scene.height, scene.width
        self.transform: Coefficients = tuple(scene.transform)[:6]
        self.crs = scene.crs.to_wkt() if scene.crs else None
        self.date = scene.date.isoformat() if scene.date else None
        self._reader = scene.reader()

    def read(self, bands: Sequence[str], top: int, left: int, height: int, width: int) -> Masked:
        """As `Source.read`."""
        window = rasterio_module().windows.Window(left, top, width, height)
        return self._reader.read(
            window, bands, resampling=self.resampling, mask_classes=self.mask_classes
        )

    def identity(self) -> str:
        """Hash of what is known of the scene, and of the sizes and times of its files."""
        scene = self.scene
        known = (scene.units, scene.level, scene.offset, scene.nodata, scene.sensor)
        parts: list[Any] = [self.name, known, self.resampling, self.mask_classes, self.transform]
        for band in self._layers():
            # An address signed anew is the same address.
            layer = dataclasses.replace(band, path=shown(band.path))
            parts.append((layer, _size_and_time(band.path)))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of what is read, without addresses."""
        return tuple(band.path for band in self._layers() if not is_remote(band.path))

    def _layers(self) -> list[SceneBand]:
        extra = [self.scene.classification] if self.scene.classification else []
        return [*self.scene.bands.values(), *extra]

    def close(self) -> None:
        """Close the scene's files."""
        self._reader.close()


def open_source(
    source: SourceLike,
    bands: Sequence[str] | None,
    *,
    resampling: str = "bilinear",
    mask_classes: Sequence[int] = (),
) -> Source:
    """Whatever pixels come from, behind one interface.

    Args:
        source: Path of a raster; of a product that `open_scene` reads (a folder, a pattern, a STAC
            item); a scene; or an image in memory.
        bands: As in `read_image`; of a scene, the names of those to use.
        resampling: Of a scene's coarser bands.
        mask_classes: Classes of a scene's classification that count as no data.

    Returns:
        The source.

    Raises:
        BandError: Bands are not named, or there is no such band.
        RasterError: It cannot be read, or lies nowhere.
        MissingExtraError: rasterio is not installed.
    """
    opened: Source
    if isinstance(source, RasterImage):
        opened = ImageSource(source, bands)
    elif not isinstance(source, str | os.PathLike | Mapping):
        opened = SceneSource(source, bands, resampling, mask_classes)
    elif isinstance(source, Mapping) or _is_product(source):
        from geofm.scenes import open_scene

        opened = SceneSource(open_scene(source), bands, resampling, mask_classes)
    else:
        if mask_classes:
            raise RasterError(
                f"{source} has no classification to mask by; open what has one with open_scene"
            )
        opened = FileSource(source, bands)
    _check_place(opened)
    return opened


def _is_product(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of more than one file, so that `open_scene` has to sort them out."""
    name = os.fspath(path)
    if Path(shown(name)).suffix.lower() in (".json", ".xml"):
        return True
    return not is_remote(name) and (any(mark in name for mark in "*?") or Path(name).is_dir())


def _size_and_time(path: str) -> tuple[int, int] | None:
    """Of a file; None of what is none, such as an address."""
    if is_remote(path) or not Path(path).exists():
        return None
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _check_place(source: Source) -> None:
    a, b, _, d, e, _ = source.transform
    if a * e - b * d == 0:
        raise RasterError(
            f"{source.name} has the geotransform {source.transform}, in which pixels have no area"
        )
    if source.crs is None:
        # Still useful: a picture, a drone image in its own coordinates. The output has none either.
        logger.warning("%s has no coordinate reference system; the output has none", source.name)
    elif (a, b, d, e) == (1.0, 0.0, 0.0, 1.0):
        logger.warning("%s has a CRS but no geotransform; the output lies at 0, 0", source.name)


def read_image(source: str | os.PathLike[str], bands: Sequence[str] | None = None) -> RasterImage:
    """Read a whole multiband raster and name its bands.

    Args:
        source: Path of a file GDAL reads.
        bands: Names in order; None to take them from the file's band descriptions.

    Returns:
        Pixels, names and georeference.

    Raises:
        BandError: There are no names, or not one for each band.
        RasterError: The file cannot be read.
        MissingExtraError: rasterio is not installed.
    """
    file = FileSource(source, bands)
    try:
        pixels = file.read(file.bands, 0, 0, file.height, file.width)
    finally:
        file.close()
    return RasterImage(pixels, file.bands, file.transform, file.crs)


def rasterio_module() -> Any:
    """rasterio, or an error that names the extra that brings it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import rasterio
        import rasterio.errors
        import rasterio.shutil
        import rasterio.windows
    except ImportError as error:
        raise MissingExtraError("rasters need rasterio: pip install 'geofm[raster]'") from error
    return rasterio
