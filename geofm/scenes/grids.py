"""From layers of files to a scene on one grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from geofm.errors import BandError, RasterError
from geofm.scenes.files import Layer, rasterio_module, shown
from geofm.scenes.names import Facts
from geofm.scenes.scene import SCL, Scene, SceneBand
from geofm.spectral import Sensor

__all__ = ["Request", "assemble"]

# Of a pixel of the finest grid: georeferences are written with few digits.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Request:
    """What the caller of `open_scene` said.

    Attributes:
        sensor: Whose names the bands have.
        bands: The bands to take, or the names of a stacked file's bands.
        facts: Units, level, offset, date and no-data values, where given.
        align: ``"georeference"``, ``"corner"`` or None.
        strict: Whether contradictions and oddities are errors.
    """

    sensor: Sensor
    bands: tuple[str, ...] | None
    facts: Facts
    align: str | None
    strict: bool


def assemble(
    layers: Mapping[str, Layer],
    facts: Facts,
    request: Request,
    source: str,
    classification: Layer | None = None,
    kind: str = SCL,
) -> Scene:
    """Put layers on one grid.

    Args:
        layers: By the sensor's names of the bands.
        facts: What the source says.
        request: What the caller says.
        source: What is opened.
        classification: Scene classification or cloud mask.
        kind: Which of them, ``"SCL"`` or another's name.

    Returns:
        The scene.

    Raises:
        BandError: A band that was asked for is missing, or there is none.
        PixelError: The caller contradicts the metadata.
        RasterError: The bands lie in different systems or on grids that do not go together.
    """
    layers = _in_order(layers, request, source)
    finest = min(layers.values(), key=lambda layer: layer.area)
    facts = facts.of_pixels(layer.dtype for layer in layers.values())
    declared = {float(v.nodata) for v in layers.values() if v.nodata is not None}
    nodata = request.facts.nodata or facts.nodata or tuple(sorted(v for v in declared if v == v))
    facts = facts.corrected(request.facts, request.strict)
    if not nodata and facts.units == "dn" and request.sensor.name.startswith("sentinel2"):
        # DN 0 is Sentinel-2's no-data value by the products' definition.
        nodata = (0.0,)
    rasterio = rasterio_module()
    return Scene(
        bands={name: _place(name, layer, finest, request) for name, layer in layers.items()},
        units=facts.units,
        level=facts.level,
        offset=facts.offset,
        date=facts.date,
        crs=finest.crs,
        transform=rasterio.Affine(*finest.transform),
        width=finest.width,
        height=finest.height,
        dtype=np.result_type(*(layer.dtype for layer in layers.values())).name,
        nodata=nodata,
        classification=None
        if classification is None
        else _place(kind, classification, finest, request),
        sensor=request.sensor.name,
        source=shown(source),
    )


def _in_order(layers: Mapping[str, Layer], request: Request, source: str) -> dict[str, Layer]:
    if request.bands is not None:
        wanted = [band.name for band in request.sensor.select(request.bands)]
        missing = [name for name in wanted if name not in layers]
        if missing:
            raise BandError(
                f"{shown(source)} has no {', '.join(missing)}; it has {', '.join(layers)}"
            )
        layers = {name: layers[name] for name in wanted}
    if not layers:
        raise BandError(f"{shown(source)} has no band of {request.sensor.name}")
    return {name: layers[name] for name in request.sensor.names if name in layers}


def _place(name: str, layer: Layer, finest: Layer, request: Request) -> SceneBand:
    """Where a layer lies on the finest grid."""
    if layer.crs != finest.crs:
        raise RasterError(
            f"{name} ({shown(layer.path)}) is in {_crs(layer)}, but {shown(finest.path)} is in "
            f"{_crs(finest)}: warp them to one system first (gdalwarp -t_srs), or leave {name} out "
            f"(bands=[...])"
        )
    a, _, c, _, e, f = layer.transform
    a0, _, c0, _, e0, f0 = finest.transform
    ratio = _snap(a / a0, layer.width), _snap(e / e0, layer.height)
    shift = _snap((c - c0) / a0), _snap((f - f0) / e0)
    sizes = (layer.width, finest.width), (layer.height, finest.height)
    align = request.align
    if align == "corner":
        if any(
            abs(r * own - size) > _TOLERANCE for r, (own, size) in zip(ratio, sizes, strict=True)
        ):
            raise RasterError(
                f"align='corner' is for bands that cover the same ground, but {name} has "
                f"{layer.width} x {layer.height} pixels of {ratio[0]:g} x {ratio[1]:g} of the "
                f"finest grid, which has {finest.width} x {finest.height}"
            )
        shift = 0.0, 0.0
    elif align is None and request.strict:
        _check_nesting(name, layer, finest, ratio, shift)
    return SceneBand(name, layer.path, layer.index, a, ratio, shift, layer.driver)


def _check_nesting(
    name: str,
    layer: Layer,
    finest: Layer,
    ratio: tuple[float, float],
    shift: tuple[float, float],
) -> None:
    same_size = (layer.width * ratio[0], layer.height * ratio[1]) == (finest.width, finest.height)
    found = (
        f"{name} ({shown(layer.path)}) begins {shift[0]:g}, {shift[1]:g} pixels from the corner of "
        f"{shown(finest.path)}, the finest grid, and its pixels measure {ratio[0]:g} x "
        f"{ratio[1]:g} of its"
    )
    if not all(each.is_integer() for each in (*ratio, *shift)):
        corner = (
            " It has the same extent, so perhaps only its corner is wrong (some exports let the "
            "centres of the first pixels coincide): align='corner' puts it on the same corner."
            if same_size
            else ""
        )
        raise RasterError(
            f"the grids do not nest: {found}.{corner} align='georeference' takes every file as "
            f"georeferenced, and interpolates. (On the command line: --align.) Or warp them to one "
            f"grid (gdalwarp -tr -te)"
        )
    sizes = (layer.width, finest.width), (layer.height, finest.height)
    for r, s, (own, size) in zip(ratio, shift, sizes, strict=True):
        if s > r or s + r * own < size - r:
            raise RasterError(
                f"the extents differ: {found}; it has {layer.width} x {layer.height} pixels and "
                f"does not cover the {finest.width} x {finest.height} of that. Say "
                f"align='georeference' (on the command line: --align georeference) to have pixels "
                f"missing there, or leave {name} out"
            )


def _snap(value: float, times: int = 1) -> float:
    """The whole or half number that a rounded georeference means."""
    near = round(2 * value) / 2
    return near if abs(value - near) * times < _TOLERANCE else value


def _crs(layer: Layer) -> str:
    return str(layer.crs.to_string())[:60]
