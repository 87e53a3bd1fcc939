"""GeoTIFF in, georeferenced embeddings out (extra ``raster``).

The image is read whole and embedded in one pass, so it has to fit into memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from geofm.errors import BandError, MissingExtraError, ModelError, RasterError
from geofm.factory import create_transform, input_spec_of
from geofm.spectral import match_bands

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Embedding",
    "RasterImage",
    "embed_raster",
    "embedding_map",
    "principal_components",
    "quicklook",
    "read_image",
    "weights_label",
    "write_embedding",
]

logger = logging.getLogger(__name__)

# What one pass may take; MP-MAE atto needs 2 KB a pixel.
_MAX_BYTES = 10e9


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

    pixels: np.ma.MaskedArray[Any, Any]
    bands: tuple[str, ...]
    transform: tuple[float, float, float, float, float, float]
    crs: str | None


@dataclass(frozen=True, eq=False)
class Embedding:
    """A grid of embeddings over an image.

    Attributes:
        values: (channels, rows, columns) float32; NaN where a cell has no data at all.
        transform: Affine coefficients of the grid, as in `RasterImage`.
        crs: As in `RasterImage`.
        stride: Pixels of the image per cell.
        offset: Where the first cell begins, in pixels from the image's left and top edges.
        tags: What made it: model, weights, preprocessing, version.
    """

    values: NDArray[np.float32]
    transform: tuple[float, float, float, float, float, float]
    crs: str | None
    stride: int
    offset: float
    tags: dict[str, str]


def embed_raster(
    model: nn.Module,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    bands: Sequence[str] | None = None,
    *,
    units: str = "dn",
    level: str | None = None,
    picture: str | os.PathLike[str] | None = None,
    nodata: float | Sequence[float] | None = None,
    **options: Any,
) -> Embedding:
    """Embed every cell of an image.

    Args:
        model: An encoder from `create_model`. With MP-MAE, ``stem_padding="aligned"`` makes cells
            tile the image; other paddings are georeferenced by their own offset.
        source: A multiband GeoTIFF (anything GDAL reads).
        output: GeoTIFF to write, float32, one band a channel; None to write none.
        bands: Names of the file's bands, in order; None to take them from its descriptions.
        units: As in `create_transform`.
        level: As in `create_transform`.
        picture: PNG to write: true colour beside the first three principal components.
        nodata: Stored values that mean "no data", besides the file's own; None for the card's.
        **options: More options of `create_transform`, but for its size rule.

    Returns:
        The grid of embeddings.

    Raises:
        BandError: The file does not name its bands and none were given, or the model needs others.
        PixelError: The pixels are not in the stated units.
        RasterError: The file cannot be read or written, or is too large for one pass.
        ModelError: The model has no feature map, or its bands are not known.
        MissingExtraError: rasterio is not installed.
    """
    _check_targets(source, output, picture)
    if "fit" in options or "size" in options:
        raise RasterError("a map has the size of its image; fit= and size= are for tiles")
    image = read_image(source, bands)
    spec = input_spec_of(model)
    prepare = create_transform(
        model, image.bands, units, level, nodata=nodata, fit="any", **options
    )
    _check_memory(model, image)
    prepared = prepare(image.pixels)
    values, stride, offset = embedding_map(model, prepared[None])
    grid = values[0].numpy()
    empty = _empty_cells(image.pixels, prepare.nodata, stride, offset, grid.shape[-2:])
    grid[:, empty] = np.nan
    embedding = Embedding(
        values=grid,
        transform=_grid_transform(image.transform, stride, offset),
        crs=image.crs,
        stride=stride,
        offset=offset,
        tags=_tags(model, repr(prepare), source),
    )
    if output is not None:
        write_embedding(output, embedding)
    if picture is not None:
        with _written(picture) as temporary:
            quicklook(image, embedding, options.get("sensor") or spec.sensor).save(
                temporary, format="PNG"
            )
    return embedding


def read_image(source: str | os.PathLike[str], bands: Sequence[str] | None = None) -> RasterImage:
    """Read a multiband raster and name its bands.

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
    rasterio = _rasterio()
    try:
        with rasterio.open(source) as file:
            pixels = file.read(masked=True)
            scaled = (*zip(file.scales, file.offsets, strict=True),)
            described = file.descriptions
            transform = tuple(file.transform)[:6]
            crs = file.crs.to_wkt() if file.crs else None
    except rasterio.errors.RasterioError as error:
        raise RasterError(f"{source} cannot be read as a raster: {error}") from error
    if bands is None:
        if not all(described):
            raise BandError(
                f"{source} has {len(described)} bands without names; name them in order, for "
                f"example bands=['B1', 'B2', ...] (on the command line: --bands B1,B2,...)"
            )
        bands = [str(name) for name in described]
    if len(bands) != pixels.shape[0]:
        raise BandError(f"{source} has {pixels.shape[0]} bands, {len(bands)} are named: {bands}")
    if pixels.dtype.kind not in "iuf":
        raise RasterError(f"{source} has {pixels.dtype} pixels; integers or floats are needed")
    if any(pair != (1.0, 0.0) for pair in scaled):
        warnings.warn(
            f"{source} declares scales and offsets {sorted(set(scaled))}, which are not applied: "
            f"its stored values are taken as they are. Say what they mean with units= and offset=",
            stacklevel=3,
        )
    return RasterImage(pixels, tuple(bands), transform, crs)


@torch.inference_mode()
def embedding_map(model: nn.Module, prepared: Tensor) -> tuple[Tensor, int, float]:
    """The finest-grained final embedding of a model: the map of its last stage.

    Args:
        model: An encoder; it is run in evaluation mode and left as it was.
        prepared: Prepared pixels, (N, bands, H, W). They are continued beyond the right and lower
            edges to whole cells.

    Returns:
        The map, (N, channels, rows, columns), on the CPU; pixels per cell; and where the first cell
        begins, in pixels from the left or top edge.

    Raises:
        ModelError: The model has no such map.
    """
    offset = getattr(model, "cell_offset", None)
    if (
        offset is None
        or not hasattr(model, "forward_intermediates")
        or hasattr(model, "upsample_layers")
    ):
        raise ModelError(
            "the model has no embedding map; use an encoder from create_model(..., "
            "features_only=False)"
        )
    stride = int(model.feature_info[-1]["reduction"])  # type: ignore[index]
    height, width = prepared.shape[-2:]
    if min(height, width) + (-min(height, width) % stride) < stride + 2 * abs(offset):
        raise ModelError(f"{height} x {width} pixels are less than one cell of {stride}")
    right, below = -width % stride, -height % stride
    if right or below:
        prepared = F.pad(prepared, (0, right, 0, below), mode="replicate")
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        maps = model.forward_intermediates(  # type: ignore[operator]
            prepared.to(device), indices=1, intermediates_only=True
        )
    finally:
        model.train(training)
    return maps[-1].float().cpu().contiguous(), stride, float(offset)


def principal_components(values: NDArray[np.float32], components: int = 3) -> NDArray[np.float32]:
    """Project a grid of embeddings on its first principal components.

    Args:
        values: (channels, rows, columns); cells with NaN are left out.
        components: How many.

    Returns:
        (components, rows, columns), NaN where the input is; each component's sign is such that its
        largest loading is positive.
    """
    channels, rows, columns = values.shape
    cells = torch.from_numpy(values.reshape(channels, -1).T.copy()).double()
    valid = torch.isfinite(cells).all(dim=1)
    out = torch.full((rows * columns, components), torch.nan, dtype=torch.float64)
    if int(valid.sum()) > 0:
        centred = cells[valid] - cells[valid].mean(dim=0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        loadings = vectors.flip(1)[:, :components]
        largest = loadings.abs().argmax(dim=0)
        loadings = loadings * torch.sign(loadings[largest, torch.arange(loadings.shape[1])])
        out[valid, : loadings.shape[1]] = centred @ loadings
    return out.T.reshape(components, rows, columns).float().numpy()


def quicklook(image: RasterImage, embedding: Embedding, sensor: str = "sentinel2") -> Image:
    """A picture of an image beside its embedding.

    Args:
        image: The image.
        embedding: Its embedding.
        sensor: Sensor whose names the image's bands are, for true colour.

    Returns:
        True colour on the left (the first band in grey where red, green or blue is missing), the
        first three principal components as red, green and blue on the right.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image as PILImage
        from PIL import ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow: pip install 'geofm[raster]'") from error

    height, width = image.pixels.shape[-2:]
    scale = max(1, round(480 / max(height, width)))
    size = (width * scale, height * scale)
    nearest = PILImage.Resampling.NEAREST
    left_title, colour = _true_colour(image, sensor)
    left = PILImage.fromarray(colour).resize(size, nearest)
    components = _stretch(principal_components(embedding.values))
    # Cells may reach beyond the image, and may begin before it: paste them where they are.
    cells = PILImage.fromarray(components)
    cell = embedding.stride * scale
    right = PILImage.new("RGB", size)
    begin = round(embedding.offset * scale)
    right.paste(cells.resize((cells.width * cell, cells.height * cell), nearest), (begin, begin))
    margin, bar = 8, 28
    canvas = PILImage.new("RGB", (2 * size[0] + 3 * margin, size[1] + bar + 2 * margin), "white")
    canvas.paste(left, (margin, bar + margin))
    canvas.paste(right, (size[0] + 2 * margin, bar + margin))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    draw.text((margin, margin), left_title, fill="black", font=font)
    weights = embedding.tags["GEOFM_WEIGHTS"]
    untrained = weights.startswith("untrained")
    draw.text(
        (size[0] + 2 * margin, margin),
        "UNTRAINED WEIGHTS, principal components 1-3"
        if untrained
        else f"{weights}, principal components 1-3",
        fill="red" if untrained else "black",
        font=font,
    )
    return canvas


def weights_label(model: nn.Module) -> str:
    """What an output says about the weights that made it.

    Args:
        model: A model from `create_model`.

    Returns:
        The card's name, the file's path, or "untrained (random initialisation)".
    """
    origin = getattr(model, "weights_origin", None)
    return str(origin) if origin else "untrained (random initialisation)"


def write_embedding(path: str | os.PathLike[str], embedding: Embedding) -> None:
    """Write a grid of embeddings as GeoTIFF, complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        embedding: The grid.

    Raises:
        RasterError: It cannot be written.
        MissingExtraError: rasterio is not installed.
    """
    rasterio = _rasterio()
    channels, rows, columns = embedding.values.shape
    profile = {
        "driver": "GTiff",
        "dtype": "float32",
        "count": channels,
        "height": rows,
        "width": columns,
        "crs": embedding.crs,
        "transform": rasterio.Affine(*embedding.transform),
        "nodata": float("nan"),
        "compress": "deflate",
        "predictor": 3,
        "interleave": "pixel",
        "BIGTIFF": "IF_SAFER",
    }
    try:
        with _written(path) as temporary, rasterio.open(temporary, "w", **profile) as file:
            file.write(embedding.values)
            file.update_tags(**embedding.tags)
            for channel in range(channels):
                file.set_band_description(channel + 1, f"embedding_{channel}")
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise RasterError(f"{path} cannot be written: {error}") from error


# --- parts --------------------------------------------------------------------------------------


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise MissingExtraError("rasters need rasterio: pip install 'geofm[raster]'") from error
    return rasterio


@contextlib.contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is complete."""
    target = Path(path)
    if not target.parent.is_dir():
        raise RasterError(f"cannot write {target}: there is no folder {target.parent}")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".geofm-", suffix=target.suffix)
    except OSError as error:
        raise RasterError(f"cannot write {target}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp files are private; what replaces them has the usual rights.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_targets(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    picture: str | os.PathLike[str] | None,
) -> None:
    """Refuse to overwrite the input or one output with the other, before anything is computed."""
    taken = {Path(source).resolve(): "the input"}
    for target, what in ((output, "the output"), (picture, "the picture")):
        if target is None:
            continue
        path = Path(target).resolve()
        if path in taken:
            raise RasterError(f"{what} would overwrite {taken[path]}: {target}")
        if path.is_dir():
            raise RasterError(f"{what} is a folder: {target}; name a file in it")
        if not path.parent.is_dir():
            raise RasterError(f"cannot write {target}: there is no folder {path.parent}")
        taken[path] = what


def _check_memory(model: nn.Module, image: RasterImage) -> None:
    info: Any = getattr(model, "feature_info", None)
    if not info:
        return
    height, width = image.pixels.shape[-2:]
    # The widest activation is four times the first level's channels, float32, three at a time.
    needed = height * width / info[0]["reduction"] ** 2 * info[0]["num_chs"] * 4 * 4 * 3
    if needed > _MAX_BYTES:
        raise RasterError(
            f"{height} x {width} pixels need about {needed / 1e9:.0f} GB in one pass, and at most "
            f"{_MAX_BYTES / 1e9:.0f} GB are taken. Cut the image up (gdal_translate -srcwin)"
        )


def _empty_cells(
    pixels: np.ma.MaskedArray[Any, Any],
    nodata: Sequence[float],
    stride: int,
    offset: float,
    shape: Sequence[int],
) -> NDArray[np.bool_]:
    """Cells without a single pixel of data, (rows, columns)."""
    missing = np.ma.getmaskarray(pixels).copy()
    for value in nodata:
        missing |= pixels.data == value
    if pixels.dtype.kind == "f":
        missing |= ~np.isfinite(pixels.data)
    has_data = ~missing.all(axis=0)
    cells = np.zeros(tuple(shape), dtype=bool)
    rows, columns = np.nonzero(has_data)
    row = np.floor((rows + 0.5 - offset) / stride).astype(int)
    column = np.floor((columns + 0.5 - offset) / stride).astype(int)
    inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    cells[row[inside], column[inside]] = True
    return ~cells


def _grid_transform(
    image: tuple[float, float, float, float, float, float], stride: int, offset: float
) -> tuple[float, float, float, float, float, float]:
    a, b, c, d, e, f = image
    return (
        a * stride,
        b * stride,
        c + (a + b) * offset,
        d * stride,
        e * stride,
        f + (d + e) * offset,
    )


def _tags(model: nn.Module, prepare: str, source: str | os.PathLike[str]) -> dict[str, str]:
    from geofm import __version__

    return {
        "GEOFM_VERSION": __version__,
        "GEOFM_MODEL": str(model.pretrained_cfg["architecture"]),  # type: ignore[index]
        "GEOFM_WEIGHTS": weights_label(model),
        "GEOFM_PREPARE": prepare,
        "GEOFM_SOURCE": Path(source).name,
    }


def _true_colour(image: RasterImage, sensor: str) -> tuple[str, NDArray[np.uint8]]:
    found = match_bands(
        ["red", "green", "blue"], image.bands, wanted_sensor=sensor, available_sensor=sensor
    )
    indices = [match.index for match in found if match.index is not None]
    if len(indices) == 3:
        return "true colour", _stretch(_filled(image.pixels[indices]))
    grey = _filled(image.pixels[:1])
    return f"band {image.bands[0]}", _stretch(np.repeat(grey, 3, axis=0))


def _filled(pixels: np.ma.MaskedArray[Any, Any]) -> NDArray[np.float32]:
    filled: NDArray[np.float32] = np.ma.filled(pixels.astype(np.float32), np.nan)
    return filled


def _stretch(layers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, H, W) to (H, W, 3) bytes, each layer from its 2nd to its 98th percentile; NaN is 0."""
    out = np.zeros((*layers.shape[1:], 3), dtype=np.uint8)
    for i, layer in enumerate(layers):
        valid = np.isfinite(layer)
        if not valid.any():
            continue
        low, high = np.percentile(layer[valid], (2, 98))
        unit = (np.where(valid, layer, low) - low) / max(high - low, 1e-12)
        out[..., i] = np.where(valid, np.clip(unit, 0, 1) * 255, 0).astype(np.uint8)
    return out
