"""A scene: bands by name, what is known of them, and windows of them on one grid."""

from __future__ import annotations

import datetime
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geofm.errors import BandError, PixelError, RasterError
from geofm.scenes.blocks import BlockCheck
from geofm.scenes.files import reading
from geofm.scenes.resample import RESAMPLINGS, Axis, axis_of, interpolate
from geofm.spectral import sensor as sensor_of

if TYPE_CHECKING:
    from geofm.preprocess import Preprocess

__all__ = [
    "CLOUDY",
    "SCL",
    "SCL_CLASSES",
    "Scene",
    "SceneBand",
    "SceneReader",
    "check_classes",
    "check_resampling",
]

SCL_CLASSES: Mapping[int, str] = {
    0: "no data",
    1: "saturated or defective",
    2: "dark area or cast shadow",
    3: "cloud shadow",
    4: "vegetation",
    5: "not vegetated",
    6: "water",
    7: "unclassified",
    8: "cloud, medium probability",
    9: "cloud, high probability",
    10: "thin cirrus",
    11: "snow or ice",
}
# Classes of SCL to mask: shadow, cloud and cirrus.
CLOUDY: tuple[int, ...] = (3, 8, 9, 10)
# What a `SceneBand` with these classes is called.
SCL = "SCL"


@dataclass(frozen=True)
class SceneBand:
    """Where a band is.

    Attributes:
        name: The sensor's own name of it.
        path: File or http(s) address.
        index: Band in the file, from 1.
        resolution: Width of a pixel in units of the CRS (metres in UTM).
        ratio: Pixels of the scene's grid in one of the band's: along columns, along rows.
        shift: Where the band begins, in pixels of the scene's grid: column, row.
        driver: GDAL's name of the format that its header was read as; None for any. It is read as
            no other, whatever lies there by then.
    """

    name: str
    path: str
    index: int = 1
    resolution: float = 10.0
    ratio: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    driver: str | None = None

    @property
    def on_grid(self) -> bool:
        """Whether its pixels are those of the scene's grid."""
        return self.ratio == (1.0, 1.0) and all(each.is_integer() for each in self.shift)


@dataclass(frozen=True, eq=False)
class Scene:
    """One acquisition: bands, and what is known of them. From [`open_scene`][geofm.open_scene].

    Attributes:
        bands: By the sensor's own names (B1 ... B8, B8A, B9 ... B12), in its order.
        units: ``"dn"`` (reflectance × 10000), ``"reflectance"``, ``"uint8"``; None: not known.
        level: ``"L1C"`` or ``"L2A"``; None: not known.
        offset: Added to DN: -1000 from processing baseline 04.00 on, 0 before; None: not known.
        date: Day of sensing; None: not known.
        crs: rasterio's CRS.
        transform: Affine of the grid, which is that of the finest bands.
        width: Columns of the grid.
        height: Rows of the grid.
        dtype: numpy's name of the type that `read` returns: one that holds all bands' values.
        nodata: Stored values that mean "no data".
        classification: Scene classification, named ``"SCL"``, or a cloud mask of another kind.
        sensor: Whose names the bands have.
        source: What was opened.
    """

    bands: Mapping[str, SceneBand]
    units: str | None
    level: str | None
    offset: float | None
    date: datetime.date | None
    crs: Any
    transform: Any
    width: int
    height: int
    dtype: str = "uint16"
    nodata: tuple[float, ...] = ()
    classification: SceneBand | None = None
    sensor: str = "sentinel2"
    source: str = ""

    def select(self, bands: Sequence[str] | None = None) -> tuple[SceneBand, ...]:
        """Bands by name.

        Args:
            bands: Names or aliases; None for all.

        Returns:
            The bands, in that order.

        Raises:
            BandError: The scene has no such band.
        """
        if bands is None:
            return tuple(self.bands.values())
        if isinstance(bands, str):
            raise BandError(f"bands must be a list of names, got the string {bands!r}")
        known = sensor_of(self.sensor)
        out = []
        for name in bands:
            band = known.find(name)
            own = name if band is None else band.name
            if own not in self.bands:
                raise BandError(f"the scene has no band {name!r}; it has {', '.join(self.bands)}")
            out.append(self.bands[own])
        return tuple(out)

    def reader(self) -> SceneReader:
        """The scene with its files kept open, for reading many windows (by one thread).

        Returns:
            A context manager with a `read` like the scene's.
        """
        return SceneReader(self)

    def read(
        self,
        window: Any = None,
        bands: Sequence[str] | None = None,
        *,
        resampling: str = "bilinear",
        mask_classes: Sequence[int] = (),
    ) -> np.ma.MaskedArray[Any, Any]:
        """Read a window of the scene's grid.

        Coarser bands are brought to the grid. A pixel is masked where the band's own pixel at its
        centre is missing (no-data, the file's mask, NaN), where it is outside the scene, and where
        it is more than half a band's pixel outside the band. Missing pixels are never mixed into
        others; at the edge of a band its outermost values go on. Reading by windows equals reading
        whole.

        Args:
            window: A rasterio ``Window`` in whole pixels; it may reach beyond the scene. None for
                all.
            bands: Names; None for all.
            resampling: ``"nearest"``, ``"bilinear"`` or ``"cubic"``, for coarser bands. Integers
                are rounded, and never to a no-data value.
            mask_classes: Values of the classification to mask in all bands, such as
                `geofm.scenes.CLOUDY`.

        Returns:
            (bands, rows, columns) of type `dtype`.

        Raises:
            BandError: The scene has no such band.
            DataNotFoundError: A file is gone.
            RasterError: A file cannot be read, the window is none, or classes are to be masked and
                the scene has no classification.
        """
        with self.reader() as reader:
            return reader.read(window, bands, resampling=resampling, mask_classes=mask_classes)

    def transform_for(self, model: Any, **options: Any) -> Preprocess:
        """The preprocessing of this scene's pixels, as `read` returns them, for a model.

        Args:
            model: As in `create_transform`.
            **options: As in `create_transform`, besides what the scene knows.

        Returns:
            The preprocessing.

        Raises:
            BandError: The model needs other bands.
            PixelError: Something that the model needs is not known of the scene.
        """
        from geofm.factory import create_transform, input_spec_of

        clash = sorted({"bands", "units", "level", "sensor"} & set(options))
        if clash:
            raise PixelError(
                f"{', '.join(clash)}: the scene's own are used; give them to open_scene"
            )
        units = self._known("units", "'dn' (reflectance × 10000) or 'reflectance'")
        spec = input_spec_of(model)
        if spec.level_matters:
            self._known("level", "'L1C' (top of atmosphere) or 'L2A' (surface)")
        if units == "dn" and not {"offset", "baseline"} & set(options):
            what = "-1000 (processing baseline 04.00 and later) or 0 (before, or already removed)"
            options["offset"] = self._known("offset", what)
        options.setdefault("nodata", self.nodata or None)
        return create_transform(
            model, list(self.bands), units, self.level, sensor=self.sensor, **options
        )

    def _known(self, name: str, choices: str) -> Any:
        value = getattr(self, name)
        if value is None:
            raise PixelError(
                f"the {name} of {self.source or 'the scene'} cannot be known from its names and "
                f"metadata; say {name}=, as in open_scene(..., {name}=...) (on the command line: "
                f"--{name}): {choices}"
            )
        return value


class SceneReader:
    """A scene whose files stay open; from `Scene.reader`. One thread at a time may use it.

    Args:
        scene: The scene.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._files: dict[str, tuple[Any, BlockCheck]] = {}

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def read(
        self,
        window: Any = None,
        bands: Sequence[str] | None = None,
        *,
        resampling: str = "bilinear",
        mask_classes: Sequence[int] = (),
    ) -> np.ma.MaskedArray[Any, Any]:
        """Read a window: see [`Scene.read`][geofm.scenes.scene.Scene.read].

        Args:
            window: As there.
            bands: As there.
            resampling: As there.
            mask_classes: As there.

        Returns:
            As there.

        Raises:
            GeofmError: As there.
        """
        scene = self.scene
        chosen = scene.select(bands)
        check_resampling(resampling)
        classes = check_classes(mask_classes, scene.classification)
        top, left, height, width = _whole(window, scene)
        rows = max(top, 0), min(top + height, scene.height)
        columns = max(left, 0), min(left + width, scene.width)
        values = np.zeros((len(chosen), height, width), scene.dtype)
        missing = np.ones(values.shape, dtype=bool)
        if rows[0] < rows[1] and columns[0] < columns[1]:
            place = (
                slice(rows[0] - top, rows[1] - top),
                slice(columns[0] - left, columns[1] - left),
            )
            for i, band in enumerate(chosen):
                values[i][place], missing[i][place] = self._band(band, rows, columns, resampling)
            if classes and scene.classification is not None:
                found, _ = self._band(scene.classification, rows, columns, "nearest", ())
                missing[:, place[0], place[1]] |= np.isin(found, classes)
        return np.ma.MaskedArray(values, missing, fill_value=0)

    def _band(
        self,
        band: SceneBand,
        rows: tuple[int, int],
        columns: tuple[int, int],
        method: str,
        nodata: tuple[float, ...] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        file, _ = self._file(band)
        if band.on_grid:
            method = "nearest"
        down = axis_of(*rows, band.ratio[1], band.shift[1], file.height, method)
        across = axis_of(*columns, band.ratio[0], band.shift[0], file.width, method)
        values, missing = self._pixels(band, down, across)
        refused = self.scene.nodata if nodata is None else nodata
        for value in refused:
            missing |= values == value
        out, gone = interpolate(values, missing, down, across, method)
        if method != "nearest" and out.dtype.kind in "iu":
            # Rounding must not make a value that means something else.
            highest = np.iinfo(out.dtype).max
            for value in refused:
                out[(out == value) & ~gone] += -1 if value == highest else 1
        return out, gone

    def _pixels(
        self, band: SceneBand, rows: Axis, columns: Axis
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        file, blocks = self._file(band)
        where = f" (band {band.index}, rows {rows.low} to {rows.high - 1})"
        with reading(band.path, where) as rasterio:
            window = rasterio.windows.Window.from_slices(
                (rows.low, rows.high), (columns.low, columns.high)
            )
            blocks.check([band.index], window)
            read = file.read(band.index, window=window, masked=True)
        missing = np.ma.getmaskarray(read).copy()
        if read.dtype.kind == "f":
            missing |= ~np.isfinite(read.data)
        return read.data, missing

    def _file(self, band: SceneBand) -> tuple[Any, BlockCheck]:
        path = band.path
        if path not in self._files:
            with reading(path) as rasterio:
                file = rasterio.open(path, driver=band.driver)
                self._files[path] = (file, BlockCheck(file))
        return self._files[path]


def check_resampling(method: str) -> None:
    """Refuse an unknown way to bring coarser bands to a grid.

    Args:
        method: What the caller said.

    Raises:
        RasterError: It is none of ``"nearest"``, ``"bilinear"`` and ``"cubic"``.
    """
    if method not in RESAMPLINGS:
        raise RasterError(f"resampling is {method!r}; expected one of {', '.join(RESAMPLINGS)}")


def check_classes(mask_classes: Sequence[int], classification: SceneBand | None) -> tuple[int, ...]:
    """Classes to mask, if there can be such.

    Args:
        mask_classes: What the caller said.
        classification: What holds classes; None where nothing does.

    Returns:
        The classes.

    Raises:
        RasterError: They are no numbers of classes, or nothing holds classes.
    """
    known = "numbers of classes, such as geofm.scenes.CLOUDY, which is (3, 8, 9, 10)"
    try:
        # Letters of a word are no numbers.
        classes = tuple(operator.index(each) for each in mask_classes)
    except TypeError as error:
        raise RasterError(f"mask_classes is {mask_classes!r}; expected {known}") from error
    if classes and classification is None:
        raise RasterError(
            f"mask_classes is {list(classes)}, but there is no classification to mask by; SAFE "
            f"folders of Level-2A and items have one, and open_scene finds one beside or among "
            f"the bands if it is named SCL"
        )
    strange = [each for each in classes if each not in SCL_CLASSES]
    if strange and classification is not None and classification.name == SCL:
        listed = ", ".join(f"{number} {name}" for number, name in SCL_CLASSES.items())
        raise RasterError(
            f"mask_classes has {', '.join(map(str, strange))}, and the scene classification goes "
            f"from 0 to 11 ({listed}); geofm.scenes.CLOUDY is (3, 8, 9, 10)"
        )
    return classes


def _whole(window: Any, scene: Scene) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window."""
    if window is None:
        return 0, 0, scene.height, scene.width
    names = ("row_off", "col_off", "height", "width")
    if not all(hasattr(window, name) for name in names):
        raise RasterError(f"window is a rasterio Window(column, row, width, height), got {window}")
    parts: list[float] = [getattr(window, name) for name in names]
    if any(float(part) != int(part) for part in parts) or min(parts[2:]) < 1:
        raise RasterError(f"a window has whole pixels, at least one; got {window}")
    top, left, height, width = (int(part) for part in parts)
    return top, left, height, width
