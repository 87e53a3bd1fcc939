"""What pixels come from: a file, a scene, or an image in memory, read part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from geofm.errors import BandError, PixelError, RasterError
from geofm.scenes.blocks import BlockCheck
from geofm.scenes.files import (
    check_pixels,
    check_place,
    is_remote,
    open_raster,
    rasterio_module,
    reading,
    shown,
)
from geofm.scenes.names import Facts
from geofm.scenes.open import ITEMS, open_scene, request_of
from geofm.scenes.scene import check_classes, check_resampling
from geofm.scenes.stacked import facts_of_stack
from geofm.spectral import Sensor
from geofm.spectral import sensor as sensor_of

if TYPE_CHECKING:
    from geofm.scenes import Scene, SceneBand

__all__ = [
    "Coefficients",
    "RasterImage",
    "Said",
    "Source",
    "SourceLike",
    "crs_as_wkt",
    "open_source",
    "rasterio_module",
    "read_image",
]

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


@dataclass(frozen=True)
class Said:
    """What the caller says of a source. The attributes are arguments of `open_scene`."""

    units: str | None = None
    level: str | None = None
    offset: float | None = None
    date: str | datetime.date | None = None
    nodata: float | Sequence[float] | None = None
    sensor: str | Sensor | None = None
    align: str | None = None
    strict: bool = True

    def facts(self) -> Facts:
        """The same as facts.

        Raises:
            PixelError: An argument is out of its range.
        """
        return request_of(**vars(self)).facts

    def given(self) -> list[str]:
        """Names of what is said at all."""
        return [
            name for name, value in vars(self).items() if name != "strict" and value is not None
        ]


_NOTHING = Said()


class Source(Protocol):
    """Named bands on one grid, read window by window.

    Attributes:
        name: What messages and tags call it.
        bands: Names of the bands.
        height: Pixels.
        width: Pixels.
        transform: As in `RasterImage`.
        crs: As in `RasterImage`.
        facts: What is known of its pixels, by itself or from the caller.
        date: When it was taken, ISO 8601; None if that is not known.
    """

    name: str
    bands: tuple[str, ...]
    height: int
    width: int
    transform: Coefficients
    crs: str | None
    facts: Facts
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
        said: What the caller says of it.

    Attributes:
        scales: Scales and offsets that its bands declare, without (1, 0).
        understood: Whether these say the units, or there are none.

    Raises:
        BandError: There are no names, or not one for each band.
        DataNotFoundError: There is no such file.
        PixelError: The caller contradicts what the file says.
        RasterError: It cannot be read, has pixels that are no numbers, or its place is told by
            ground control points only.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        bands: Sequence[str] | None,
        said: Said = _NOTHING,
    ) -> None:
        errors = rasterio_module().errors
        self.path = path
        # Without an address's query, which may hold a signature.
        self.shown = shown(os.fspath(path))
        self.name = Path(self.shown).name
        with warnings.catch_warnings():
            # Said below, in the same words as a missing CRS.
            warnings.simplefilter("ignore", errors.NotGeoreferencedWarning)
            self.file = open_raster(os.fspath(path))
        self._blocks = BlockCheck(self.file)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._describe(bands)
            self._learn(said)
            undo.pop_all()

    def _describe(self, bands: Sequence[str] | None) -> None:
        file = self.file
        check_place(self.shown, file)
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
            check_pixels(self.shown, dtype)
        self.bands = tuple(bands)

    def _learn(self, said: Said) -> None:
        """What the file says of its pixels, completed by what the caller says."""
        file = self.file
        declared = list(zip(file.scales, file.offsets, strict=True))
        self.scales = sorted({*declared} - {(1.0, 0.0)})
        sensor = sensor_of(said.sensor or "sentinel2")
        # An elevation or a mask among the bands has a scale of its own.
        of_bands = {
            pair for name, pair in zip(self.bands, declared, strict=True) if sensor.find(name)
        }
        own = facts_of_stack(os.fspath(self.path), file.tags(), of_bands or declared)
        self.facts = own.of_pixels(file.dtypes).corrected(said.facts(), said.strict)
        self.understood = own.units is not None or not self.scales
        self.date = _iso(self.facts)

    def read(self, bands: Sequence[str], top: int, left: int, height: int, width: int) -> Masked:
        """As `Source.read`."""
        numbers = [self.bands.index(name) + 1 for name in bands]
        where = f" at rows {top} to {top + height - 1}, columns {left} to {left + width - 1}"
        with reading(os.fspath(self.path), where) as rasterio:
            window = rasterio.windows.Window(left, top, width, height)
            self._blocks.check(numbers, window)
            found: Masked = self.file.read(numbers, window=window, masked=True)
        return found

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
        said: What the caller says of it.

    Raises:
        BandError: There is not one name for each band.
        RasterError: The pixels are no (bands, H, W) of numbers, or nothing knows its reference
            system.
    """

    def __init__(
        self, image: RasterImage, bands: Sequence[str] | None, said: Said = _NOTHING
    ) -> None:
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
        self.transform = image.transform
        self.crs = None if image.crs is None else crs_as_wkt(image.crs)
        self.facts = said.facts()
        self.date = _iso(self.facts)

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
        RasterError: The resampling is unknown, or the classes are not the scene's.
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
        check_resampling(resampling)
        self.scene = scene
        self.resampling = resampling
        self.mask_classes = check_classes(mask_classes, scene.classification)
        self.bands = tuple(scene.bands)
        self.name = Path(shown(scene.source)).name or "scene"
        self.height, self.width = scene.height, scene.width
        self.transform: Coefficients = tuple(scene.transform)[:6]
        self.crs = scene.crs.to_wkt() if scene.crs else None
        self.facts = Facts(scene.units, scene.level, scene.offset, scene.date, scene.nodata)
        self.date = _iso(self.facts)
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
    said: Said = _NOTHING,
) -> Source:
    """Whatever pixels come from, behind one interface.

    Args:
        source: Path of a raster; of a product that `open_scene` reads (a folder, a pattern, a STAC
            item); a scene; or an image in memory.
        bands: As in `read_image`; of a scene, the names of those to use, of a product those to
            open.
        resampling: Of a scene's coarser bands.
        mask_classes: Classes of a scene's classification that count as no data.
        said: What the caller says besides; a scene knows its own.

    Returns:
        The source.

    Raises:
        BandError: Bands are not named, or there is no such band.
        DataNotFoundError: There is no such file or folder.
        PixelError: The caller contradicts what the source itself says.
        RasterError: It cannot be read, lies nowhere, or the resampling or the classes cannot be.
        MissingExtraError: rasterio is not installed.
    """
    opened: Source
    check_resampling(resampling)
    if isinstance(source, RasterImage):
        check_classes(mask_classes, None)
        opened = ImageSource(source, bands, said)
    elif not isinstance(source, str | os.PathLike | Mapping):
        if said.given():
            raise PixelError(
                f"{', '.join(said.given())}: a scene has its own; say others in open_scene"
            )
        opened = SceneSource(source, bands, resampling, mask_classes)
    elif isinstance(source, Mapping) or _is_product(source):
        scene = open_scene(source, bands=bands, **vars(said))
        opened = SceneSource(scene, None, resampling, mask_classes)
    else:
        check_classes(mask_classes, None)
        opened = FileSource(source, bands, said)
        if not opened.understood and said.units is None:
            warnings.warn(
                f"{opened.shown} declares scales and offsets {opened.scales}, which are not "
                f"applied: its stored values are taken as they are. Say what they mean with units= "
                f"and offset=",
                stacklevel=4,
            )
    try:
        _check_place(opened)
    except RasterError:
        opened.close()
        raise
    return opened


def _is_product(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of more than one file, so that `open_scene` has to sort them out."""
    name = os.fspath(path)
    if Path(shown(name)).suffix.lower() in (*ITEMS, ".xml"):
        return True
    return not is_remote(name) and (any(mark in name for mark in "*?") or Path(name).is_dir())


def _size_and_time(path: str) -> tuple[int, int] | None:
    """Of a file; None of what is none, such as an address."""
    if is_remote(path) or not Path(path).exists():
        return None
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _iso(facts: Facts) -> str | None:
    return facts.date.isoformat() if facts.date else None


def crs_as_wkt(crs: Any) -> str:
    """A coordinate reference system as WKT.

    Args:
        crs: WKT, ``"EPSG:32632"``, PROJ's form, a number of EPSG, or a CRS of rasterio.

    Raises:
        RasterError: It cannot be understood.
        MissingExtraError: rasterio is not installed.
    """
    rasterio = rasterio_module()
    try:
        # In an Env PROJ's own messages go to the log.
        with rasterio.Env():
            wkt: str = rasterio.crs.CRS.from_user_input(crs).to_wkt()
    except (rasterio.errors.CRSError, TypeError) as error:
        raise RasterError(
            f"{str(crs)[:80]!r} is no coordinate reference system: {error.__cause__ or error}"
        ) from error
    return wkt


def _check_place(source: Source) -> None:
    try:
        a, b, _, d, e, _ = source.transform
        finite = bool(np.isfinite(source.transform).all())
    except (TypeError, ValueError) as error:
        raise RasterError(
            f"{source.name} has the geotransform {source.transform!r}; expected the six numbers "
            f"a, b, c, d, e, f of x = a·column + b·row + c, y = d·column + e·row + f"
        ) from error
    if not finite or a * e - b * d == 0:
        raise RasterError(
            f"{source.name} has the geotransform {source.transform}, in which pixels have no area "
            f"or no place; six finite numbers are needed"
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
        DataNotFoundError: There is no such file.
        RasterError: The file cannot be read.
        MissingExtraError: rasterio is not installed.
    """
    file = FileSource(source, bands)
    if file.scales:
        warnings.warn(
            f"{file.shown} declares scales and offsets {file.scales}, which are not applied: its "
            f"stored values are taken as they are",
            stacklevel=2,
        )
    try:
        pixels = file.read(file.bands, 0, 0, file.height, file.width)
    finally:
        file.close()
    return RasterImage(pixels, file.bands, file.transform, file.crs)
