"""A tiny product in ESA's SAFE format, for tests and docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from geofm.datasets.samples import landscape
from geofm.errors import PixelError, RasterError
from geofm.preprocess import offset_of_baseline
from geofm.scenes.files import rasterio_module
from geofm.spectral.sensors import SENTINEL2

__all__ = ["write_safe"]

_TILE = "T32UNU"
# What Level-2A leaves out of its coarser folders.
_NOT_MADE = {("B8", 20), ("B8", 60)}
_TAKEN = "T101031"
_PSD = "https://psd-15.sentinel2.eo.esa.int/PSD/User_Product_Level-"
# Class of each land cover of `geofm.datasets.samples.LAND_COVER`.
_SCL = (6, 4, 4, 4, 4, 5, 5)


def write_safe(
    folder: str | Path,
    size: int = 240,
    level: str = "L2A",
    baseline: str = "05.09",
    seed: int = 0,
) -> Path:
    """Write a generated landscape as an unpacked SAFE folder.

    It has the folders, file names, lossless JPEG 2000 images and the parts of the metadata that
    readers use: in L2A every band at its own resolution and the coarser ones (B8 at 10 m only, as
    B8A takes its place at the others), and SCL with a cloud; in L1C every band at its own. Stored
    DN hold the offset of the baseline.

    Args:
        folder: Where to put the product; created if needed.
        size: Side in pixels of 10 m, a multiple of 6, at least 36.
        level: ``"L1C"`` or ``"L2A"``.
        baseline: Processing baseline, for example ``"02.14"``.
        seed: Which place.

    Returns:
        The product's folder, ``S2A_MSI..._T32UNU_....SAFE`` in `folder`.

    Raises:
        PixelError: An argument is out of its range.
        RasterError: A file cannot be written.
        MissingExtraError: rasterio is not installed.
    """
    if size < 36 or size % 6:
        raise PixelError(f"size is {size}; expected a multiple of 6, at least 36")
    offset = offset_of_baseline(baseline)
    scene = landscape((size, size), seed=seed, level=level)
    day = scene.date.strftime("%Y%m%d")
    number = baseline.replace(".", "")
    name = f"S2A_MSI{level}_{day}{_TAKEN}_N{number}_R022_{_TILE}_{day}T140000.SAFE"
    product = Path(folder) / name
    images = product / "GRANULE" / f"{level}_{_TILE}_A031421_{day}{_TAKEN}" / "IMG_DATA"
    images.mkdir(parents=True, exist_ok=True)
    prefix = f"{_TILE}_{day}{_TAKEN}"
    for band, pixels in zip(scene.bands, scene.pixels, strict=True):
        metres = int(SENTINEL2[band].resolution or 10)
        label = band if band == "B8A" else f"B{int(band[1:]):02d}"
        # The offset was added before 0 was set aside for "no data".
        stored = np.maximum(pixels.astype(np.int32) - int(offset), 1).astype(np.uint16)
        for coarse in (10, 20, 60):
            if level == "L1C" and coarse == metres:
                path = images / f"{prefix}_{label}.jp2"
            elif level == "L2A" and coarse >= metres and (band, coarse) not in _NOT_MADE:
                path = images / f"R{coarse}m" / f"{prefix}_{label}_{coarse}m.jp2"
            else:
                continue
            _write(path, _coarser(stored, coarse // 10), scene.transform, scene.crs, coarse)
    if level == "L2A":
        classes = np.asarray(_SCL, np.uint8)[scene.land_cover][::2, ::2].copy()
        classes[: size // 8, : size // 8] = 9
        path = images / "R20m" / f"{prefix}_SCL_20m.jp2"
        _write(path, classes, scene.transform, scene.crs, 20)
    text = _metadata(level, baseline, offset, scene.date.isoformat(), name)
    (product / f"MTD_MSI{level}.xml").write_text(text, encoding="utf-8")
    return product


def _coarser(pixels: NDArray[np.uint16], factor: int) -> NDArray[np.uint16]:
    height, width = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(np.rint(blocks.mean(axis=(1, 3))), dtype=np.uint16)


def _write(
    path: Path, pixels: NDArray[Any], transform: tuple[float, ...], crs: str, metres: int
) -> None:
    rasterio = rasterio_module()
    path.parent.mkdir(exist_ok=True)
    _, _, west, _, _, north = transform
    height, width = pixels.shape
    try:
        with rasterio.open(
            path,
            "w",
            driver="JP2OpenJPEG",
            dtype=pixels.dtype.name,
            count=1,
            height=height,
            width=width,
            crs=crs,
            transform=rasterio.Affine(metres, 0, west, 0, -metres, north),
            quality=100,
            reversible="yes",
            # More levels than the image has doublings cannot be written.
            resolutions=max(1, min(6, int(np.log2(min(height, width))) - 2)),
        ) as file:
            file.write(pixels, 1)
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise RasterError(f"{path} cannot be written: {error}") from error


def _metadata(level: str, baseline: str, offset: float, date: str, name: str) -> str:
    """The part of MTD_MSIL1C.xml or MTD_MSIL2A.xml that says what the pixels mean."""
    kind = level[1:]
    surface = level == "L2A"
    tag = "BOA_ADD_OFFSET" if surface else "RADIO_ADD_OFFSET"
    outer = "BOA_ADD_OFFSET_VALUES_LIST" if surface else "Radiometric_Offset_List"
    offsets = "".join(f'<{tag} band_id="{i}">{offset:.0f}</{tag}>' for i in range(len(SENTINEL2)))
    listed = f"<{outer}>{offsets}</{outer}>" if offset else ""
    quantification = (
        "<QUANTIFICATION_VALUES_LIST>"
        '<BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>'
        '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE>'
        '<WVP_QUANTIFICATION_VALUE unit="cm">1000.0</WVP_QUANTIFICATION_VALUE>'
        "</QUANTIFICATION_VALUES_LIST>"
        if surface
        else '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>'
    )
    special = "".join(
        f"<Special_Values><SPECIAL_VALUE_TEXT>{text}</SPECIAL_VALUE_TEXT>"
        f"<SPECIAL_VALUE_INDEX>{value}</SPECIAL_VALUE_INDEX></Special_Values>"
        for text, value in (("NODATA", 0), ("SATURATED", 65535))
    )
    spectral = "".join(
        f'<Spectral_Information bandId="{i}" physicalBand="{band.name}">'
        f"<RESOLUTION>{band.resolution:.0f}</RESOLUTION></Spectral_Information>"
        for i, band in enumerate(SENTINEL2)
    )
    time = f"{date}T10:10:31.024Z"
    root = f"n1:Level-{kind}_User_Product"
    return (
        f'<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n'
        f'<{root} xmlns:n1="{_PSD}{kind}.xsd"><n1:General_Info><Product_Info>'
        f"<PRODUCT_START_TIME>{time}</PRODUCT_START_TIME>"
        f"<PRODUCT_URI>{escape(name)}</PRODUCT_URI>"
        f"<PROCESSING_LEVEL>Level-{kind}</PROCESSING_LEVEL>"
        f"<PROCESSING_BASELINE>{escape(baseline)}</PROCESSING_BASELINE>"
        f"<Datatake><SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME>"
        f"<DATATAKE_SENSING_START>{time}</DATATAKE_SENSING_START></Datatake></Product_Info>"
        f"<Product_Image_Characteristics>{special}{quantification}{listed}"
        f"<Spectral_Information_List>{spectral}</Spectral_Information_List>"
        f"</Product_Image_Characteristics></n1:General_Info></{root}>\n"
    )
