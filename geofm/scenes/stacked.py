"""One file with all bands on one grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from geofm.errors import BandError, PixelError
from geofm.scenes.files import Layer, layers_of, reading, shown
from geofm.scenes.grids import Request, assemble
from geofm.scenes.names import Facts, date_of, facts_of_name
from geofm.scenes.scene import SCL, Scene

__all__ = ["facts_of_stack", "open_stacked", "scaling"]

_REFLECTANCE_OF_DN = 1e-4


def open_stacked(path: str, request: Request) -> Scene:
    """Open a raster whose bands are described, or named by the caller.

    Args:
        path: Path or http(s) address of anything GDAL reads.
        request: What the caller says; its bands name the file's, in order.

    Returns:
        The scene.

    Raises:
        BandError: The bands have no names, or not one each, or are not the sensor's.
        GeofmError: As of `geofm.scenes.grids.assemble`.
    """
    layers = layers_of(path, any_driver=True)
    names = _names(path, layers, request)
    known = {}
    classes, kind = None, SCL
    strange = []
    for name, layer in zip(names, layers, strict=True):
        band = request.sensor.find(name)
        if band is not None:
            if band.name in known:
                raise BandError(f"{path} has {band.name} twice; name its bands with bands=[...]")
            known[band.name] = layer
        elif name.lower() in ("scl", "cloud_mask"):
            classes, kind = layer, SCL if name.lower() == "scl" else "cloud_mask"
        else:
            strange.append(name)
    if strange and request.strict:
        raise BandError(
            f"{path} has bands that are not of {request.sensor.name}: {', '.join(strange)}; say "
            f"strict=False to leave them out, or give sensor="
        )
    scales = {(layer.scale, layer.offset) for layer in known.values()}
    if len(scales) > 1:
        raise PixelError(f"the bands declare different scales and offsets: {sorted(scales)}")
    with reading(path) as rasterio, rasterio.open(path) as file:
        facts = facts_of_stack(path, file.tags(), scales)
    # The caller's names are the file's; there is nothing to choose.
    return assemble(known, facts, replace(request, bands=None), path, classes, kind)


def facts_of_stack(
    path: str, tags: Mapping[str, str], scales: Iterable[tuple[float, float]]
) -> Facts:
    """What a file with all bands says of its pixels: its tags, its scales, and its name.

    Args:
        path: Path or address.
        tags: The file's; ``LEVEL`` and ``DATE`` are as `geofm.datasets.samples.write_scene` writes
            them.
        scales: Declared scale and offset of each band; where they differ, they say nothing.

    Returns:
        Level, date, units and offset, as far as they are known.
    """
    pairs = set(scales)
    scale, offset = pairs.pop() if len(pairs) == 1 else (None, None)
    # An offset of 0 is also what a file without one has.
    declared = scaling(scale, offset or None)
    return _tagged(tags).filled(declared).filled(facts_of_name(Path(shown(path)).name))


def scaling(scale: float | None, offset: float | None) -> Facts:
    """What a declared scale and offset say: reflectance = stored * scale + offset.

    Args:
        scale: None where none is declared.
        offset: None where none is declared.

    Returns:
        Units and offset in DN, where they are Sentinel-2's.
    """
    if scale is None or abs(scale / _REFLECTANCE_OF_DN - 1) > 1e-6:
        return Facts()
    return Facts(units="dn", offset=None if offset is None else round(offset / scale, 3))


def _names(path: str, layers: tuple[Layer, ...], request: Request) -> list[str]:
    described = [layer.description or "" for layer in layers]
    bands = request.bands
    if bands is None:
        if not all(described):
            raise BandError(
                f"{path} has {len(layers)} bands without names; name them in order: "
                f"bands=['B1', 'B2', ...]"
            )
        return described
    if len(bands) != len(layers):
        raise BandError(f"{path} has {len(layers)} bands, {len(bands)} are named: {list(bands)}")
    for said, own in zip(bands, described, strict=True):
        band, described_band = request.sensor.find(said), request.sensor.find(own)
        if request.strict and described_band and band != described_band:
            raise BandError(
                f"{path} calls a band {own!r} that bands= calls {said!r}: bands= names a stacked "
                f"file's bands in order, it does not select (read(bands=...) does). Leave it out, "
                f"or say strict=False if the file is wrong"
            )
    return list(bands)


def _tagged(tags: Mapping[str, str]) -> Facts:
    level = tags.get("LEVEL")
    if level not in ("L1C", "L2A"):
        return Facts()
    try:
        date = date_of(tags.get("DATE"))
    except PixelError:
        date = None
    return Facts(level=level, date=date)
