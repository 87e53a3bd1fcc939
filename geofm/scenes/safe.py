"""Sentinel-2 products in ESA's SAFE format, unpacked."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from geofm.errors import DataNotFoundError, RasterError
from geofm.scenes.files import layers_of
from geofm.scenes.grids import Request, assemble
from geofm.scenes.names import Facts, date_of, offset_or_none
from geofm.scenes.scene import Scene
from geofm.spectral.sensors import SENTINEL2

__all__ = ["METADATA", "find_metadata", "open_safe"]

METADATA = {"MTD_MSIL1C.xml": "L1C", "MTD_MSIL2A.xml": "L2A"}
_MAX_XML = 20_000_000
_QUANTIFICATION = 10_000.0
# T32UNU_20210629T101031_B8A_20m.jp2, and without the resolution in L1C.
_IMAGE = re.compile(r"_(B\d{2}|B8A|SCL)(?:_(\d{2})m)?$")


class _NoDoctype(ElementTree.TreeBuilder):
    """Metadata have no document type; entities it could declare would be expanded or fetched."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise RasterError(f"the XML declares a document type ({name}), which no SAFE product does")


def find_metadata(folder: Path) -> Path | None:
    """The product's metadata file in a folder.

    Args:
        folder: The folder.

    Returns:
        The file, or None if the folder is no product.

    Raises:
        RasterError: It has the metadata of two.
    """
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise RasterError(f"{folder} has metadata of both levels; a product has one of them")
    return found[0] if found else None


def open_safe(folder: Path, request: Request) -> Scene:
    """Open an unpacked SAFE folder.

    Args:
        folder: The folder with MTD_MSIL1C.xml or MTD_MSIL2A.xml.
        request: What the caller says.

    Returns:
        The scene.

    Raises:
        DataNotFoundError: The metadata or the images are missing.
        RasterError: The metadata cannot be read or say something unforeseen.
        GeofmError: As of `geofm.scenes.grids.assemble`.
    """
    metadata = find_metadata(folder)
    if metadata is None:
        raise DataNotFoundError(f"{folder} has neither {' nor '.join(METADATA)}; is it complete?")
    images = _images(folder)
    root = _parse(metadata)
    wanted = None
    if request.bands is not None:
        wanted = {band.name for band in request.sensor.select(request.bands)}
    layers = {}
    for name, path in images.items():
        if name != "SCL" and (wanted is None or name in wanted):
            layers[name] = layers_of(str(path))[0]
    facts = _facts(root, METADATA[metadata.name], list(layers), metadata)
    classes = layers_of(str(images["SCL"]))[0] if "SCL" in images else None
    return assemble(layers, facts, request, str(folder), classes)


def _images(folder: Path) -> dict[str, Path]:
    """The finest image of each band, and the scene classification."""
    granules = sorted(path for path in folder.glob("GRANULE/*") if path.is_dir())
    if len(granules) != 1:
        raise DataNotFoundError(
            f"{folder} has {len(granules)} granules (folders in GRANULE); one is expected. "
            f"Products from before December 2016 hold several: open the IMG_DATA folder of one"
        )
    inside = folder.resolve()
    finest: dict[str, tuple[int, Path]] = {}
    for path in sorted((granules[0] / "IMG_DATA").rglob("*")):
        match = _IMAGE.search(path.stem)
        if not match or path.suffix.lower() not in (".jp2", ".tif", ".tiff"):
            continue
        if not path.resolve().is_relative_to(inside):
            raise RasterError(f"{path} leads out of the product to {path.resolve()}")
        known = SENTINEL2.find(match[1])
        name = "SCL" if known is None else known.name
        metres = int(match[2] or 0)
        if name not in finest or metres < finest[name][0]:
            finest[name] = metres, path
    return {name: path for name, (_, path) in finest.items()}


def _parse(path: Path) -> ElementTree.Element:
    if path.stat().st_size > _MAX_XML:
        raise RasterError(f"{path} has {path.stat().st_size} bytes; no product's metadata have")
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(path.read_bytes())
        root = parser.close()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise RasterError(f"{path} is not the metadata of a product: {error}") from error
    if not isinstance(root, ElementTree.Element):
        raise RasterError(f"{path} is not the metadata of a product: it is empty")
    return root


def _facts(root: ElementTree.Element, level: str, bands: list[str], path: Path) -> Facts:
    # Element names were the same since 2016, but for the prefix that early Sen2Cor gave some.
    prefix = "BOA_" if level == "L2A" else ""
    for text in _texts(root, f"{prefix}QUANTIFICATION_VALUE"):
        if _number(text, path) != _QUANTIFICATION:
            raise RasterError(
                f"{path} says {prefix}QUANTIFICATION_VALUE {text}; only 10000 is known"
            )
    dates = _texts(root, "DATATAKE_SENSING_START") + _texts(root, "PRODUCT_START_TIME")
    nodata = [
        _number(_child(value, "SPECIAL_VALUE_INDEX"), path)
        for value in root.iter("Special_Values")
        if _child(value, "SPECIAL_VALUE_TEXT").upper() == "NODATA"
    ]
    return Facts(
        units="dn",
        level=level,
        offset=_offset(root, level, bands, path),
        date=date_of(dates[0]) if dates else None,
        nodata=tuple(nodata) or (0.0,),
        product=True,
    )


def _offset(root: ElementTree.Element, level: str, bands: list[str], path: Path) -> float | None:
    tag = "BOA_ADD_OFFSET" if level == "L2A" else "RADIO_ADD_OFFSET"
    ids = {
        each.get("bandId"): SENTINEL2.find(each.get("physicalBand") or "")
        for each in root.iter("Spectral_Information")
    } or {str(i): band for i, band in enumerate(SENTINEL2)}
    offsets = {}
    for element in root.iter(tag):
        band = ids.get(element.get("band_id"))
        if band is not None:
            offsets[band.name] = _number(element.text or "", path)
    if offsets:
        missing = [name for name in bands if name not in offsets]
        values = {offsets[name] for name in bands if name in offsets}
        if missing or len(values) > 1:
            raise RasterError(
                f"{path} gives the bands different offsets, or some none: {offsets}. One offset "
                f"for all is supported: open the bands that share one (bands=[...])"
            )
        return values.pop() if values else None
    baselines = _texts(root, "PROCESSING_BASELINE")
    # From 04.00 on the offsets are in the metadata: where they are not, nothing is known.
    return 0.0 if baselines and offset_or_none(baselines[0]) == 0 else None


def _texts(root: ElementTree.Element, tag: str) -> list[str]:
    return [each.text.strip() for each in root.iter(tag) if each.text and each.text.strip()]


def _child(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RasterError(f"{path} has {text!r} where a number is expected") from error
