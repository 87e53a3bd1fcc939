"""`embed_raster` and `predict_raster`: a raster of any size in, a georeferenced grid out."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geofm.colours import NO_DATA, colour_of
from geofm.errors import GeofmError, ModelError, PixelError, RasterError
from geofm.factory import create_transform, input_spec_of
from geofm.preprocess import Preprocess, offset_of_baseline
from geofm.raster.codecs import DTYPES, Codec, fit_projection, fit_quantisation
from geofm.raster.cog import CACHE_BYTES, COMPRESSIONS, Layout, raw_to_cog
from geofm.raster.grids import Embedding, grid_transform
from geofm.raster.jobs import Tiling, make_job, workers_for
from geofm.raster.networks import (
    Network,
    classes_of,
    features_of,
    running,
    weights_hash,
    weights_tags,
)
from geofm.raster.runs import Job, run, sample
from geofm.raster.sources import (
    Said,
    SceneSource,
    Source,
    SourceLike,
    open_source,
    rasterio_module,
)
from geofm.raster.stores import MemoryStore, PartialStore
from geofm.raster.windows import Axis

__all__ = ["embed_raster", "predict_raster"]

# What a result without a file may take.
_MAX_RESULT_BYTES = 10e9


def embed_raster(
    model: nn.Module,
    source: SourceLike,
    output: str | os.PathLike[str] | None = None,
    bands: Sequence[str] | None = None,
    *,
    units: str | None = None,
    level: str | None = None,
    picture: str | os.PathLike[str] | None = None,
    nodata: float | Sequence[float] | None = None,
    stride: int | None = None,
    pooled: bool = False,
    window: int | str | None = None,
    overlap: int | None = None,
    blend: str = "smooth",
    min_valid: float = 0.5,
    pca: int | None = None,
    dtype: str = "float32",
    compress: str = "deflate",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    resume: bool = True,
    resampling: str = "bilinear",
    mask_classes: Sequence[int] = (),
    align: str | None = None,
    date: str | datetime.date | None = None,
    strict: bool = True,
    **options: Any,
) -> Embedding:
    """Embed every cell of a raster of any size, in bounded memory.

    The raster is read, computed and written window by window. A cell is a function of the windows
    around it, not of the raster's size: see `Tiling` for what a window is and how windows are
    joined. A run that is interrupted continues where it was, with the same result to the bit.

    Args:
        model: An encoder from `create_model`. With MP-MAE, ``stem_padding="aligned"`` makes cells
            tile the image; other paddings are georeferenced by their own offset.
        source: A multiband raster that GDAL reads; a product that `open_scene` reads (a folder, a
            pattern, a STAC item); a `Scene`; or a `RasterImage`.
        output: Cloud-optimised GeoTIFF to write; None to keep the grid in memory. Until it is
            complete, ``<output>.partial`` holds what is finished.
        bands: Names of a file's bands, in order, None to take them from its descriptions; of a
            scene, those to use.
        units: As in `create_transform`; None for what the source says (`open_scene` tells how), or
            for a file or image that does not, ``"dn"``.
        level: As in `create_transform`; None for what the source says.
        picture: PNG to write once the raster is complete: true colour beside the first three
            principal components, with scale and extent, as `geofm.maps.write_png` draws them.
        nodata: Stored values that mean "no data", besides the file's own; None for the card's, or
            for a product as in `open_scene`.
        stride: Pixels per cell, one of the encoder's; None for its last: one cell a patch.
        pooled: One vector a window instead, pooled and normalized as the model does it; cells are
            then as wide as the step from window to window.
        window: As in `Tiling`.
        overlap: As in `Tiling`.
        blend: As in `Tiling`.
        min_valid: As in `Tiling`: cells with less are NaN. Pixels beyond the raster do not count,
            but with `pooled`, where they count as missing.
        pca: Store this many principal components, fitted to windows all over the raster.
        dtype: ``"float32"``, ``"float16"``, or ``"int8"`` with a scale and a zero-point for each
            band (as GDAL's scale and offset, and in the tags).
        compress: ``"deflate"``, ``"zstd"``, ``"lzw"`` or ``"none"``.
        batch_size: As in `Tiling`.
        device: Where to run the model; None for where it is.
        progress: Show a bar; None: if this is a terminal.
        resume: Continue what an interrupted run of the same left; False: start over.
        resampling: Of a scene's coarser bands: ``"nearest"``, ``"bilinear"`` or ``"cubic"``.
        mask_classes: Classes of a scene's classification that count as no data.
        align: As in `open_scene`, for a product whose bands' grids do not nest.
        date: Day of sensing, for the tags; None for what the source says.
        strict: Whether it is an error that `units`, `level`, ``offset``, ``baseline`` or `date`
            contradict what the source says; else they are right. As in `open_scene`.
        **options: More options of `create_transform`, but for its size rule. An ``offset`` or
            ``baseline`` is needed only where the source does not say it: a product is then asked
            for it, and of a file or image it is 0. A `Scene` takes none of these: it was told by
            `open_scene`.

    Returns:
        The grid; its values are read from the output when first asked for.

    Raises:
        BandError: The file does not name its bands and none were given, or the model needs others.
        DataNotFoundError: There is no such file or folder.
        PixelError: The pixels are not in the stated units, or something that is said contradicts
            what the source says.
        RasterError: The source cannot be read, the output cannot be written, or it is the beginning
            of another run.
        ModelError: The model has no such map, or its bands are not known.
        MissingExtraError: rasterio is not installed.
    """
    tiling = Tiling(window, overlap, blend, min_valid, batch_size)
    if dtype not in DTYPES:
        raise RasterError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if pca is not None and pca < 1:
        raise RasterError(f"pca must be 1 component or more, got {pca}")
    network = features_of(model, stride, pooled)
    return _run(
        model,
        source,
        output,
        bands,
        tiling,
        network,
        _Stored(dtype, pca, compress, "pc" if pca else "embedding"),
        _pixels(
            options,
            resampling,
            mask_classes,
            units=units,
            level=level,
            nodata=nodata,
            align=align,
            date=date,
            strict=strict,
        ),
        picture=picture,
        device=device,
        progress=progress,
        resume=resume,
    )


def predict_raster(
    model: nn.Module,
    source: SourceLike,
    output: str | os.PathLike[str] | None = None,
    bands: Sequence[str] | None = None,
    *,
    units: str | None = None,
    level: str | None = None,
    nodata: float | Sequence[float] | None = None,
    kind: str = "probabilities",
    classes: Sequence[str] | None = None,
    window: int | str | None = None,
    overlap: int | None = None,
    blend: str = "smooth",
    min_valid: float = 0.5,
    dtype: str = "float32",
    compress: str = "deflate",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    resume: bool = True,
    resampling: str = "bilinear",
    mask_classes: Sequence[int] = (),
    align: str | None = None,
    date: str | datetime.date | None = None,
    strict: bool = True,
    **options: Any,
) -> Embedding:
    """Classify a raster of any size, in bounded memory: as `embed_raster`, with a trained head.

    Args:
        model: A segmenter (``mpmae_unet_*``): every pixel; a classifier made with
            ``global_pool=""``: every cell; any other classifier: every window.
        source: As in `embed_raster`.
        output: As in `embed_raster`.
        bands: As in `embed_raster`.
        units: As in `embed_raster`.
        level: As in `embed_raster`.
        nodata: As in `embed_raster`.
        kind: ``"probabilities"`` (softmax over the classes, one band a class), ``"logits"`` (scores
            before the softmax), or ``"classes"`` (number of the most probable class, 255 for no
            data, with a colour for each). Windows are blended before the class is chosen.
        classes: Names of the classes, in the head's order, for the bands, or for the tag
            ``GEOFM_CLASSES``, from which `geofm.maps.open_layer` makes the legend.
        window: As in `Tiling`.
        overlap: As in `Tiling`.
        blend: As in `Tiling`.
        min_valid: As in `embed_raster`.
        dtype: Of probabilities and logits, as in `embed_raster`.
        compress: As in `embed_raster`.
        batch_size: As in `Tiling`.
        device: As in `embed_raster`.
        progress: As in `embed_raster`.
        resume: As in `embed_raster`.
        resampling: As in `embed_raster`.
        mask_classes: As in `embed_raster`.
        align: As in `embed_raster`.
        date: As in `embed_raster`.
        strict: As in `embed_raster`.
        **options: As in `embed_raster`.

    Returns:
        The grid.

    Raises:
        BandError: As in `embed_raster`.
        DataNotFoundError: As in `embed_raster`.
        PixelError: As in `embed_raster`.
        RasterError: As in `embed_raster`.
        ModelError: The model has no head, or `classes` do not fit it.
        MissingExtraError: rasterio is not installed.
    """
    tiling = Tiling(window, overlap, blend, min_valid, batch_size)
    if kind not in ("probabilities", "logits", "classes"):
        raise RasterError(f"kind is 'probabilities', 'logits' or 'classes', got {kind!r}")
    if dtype not in DTYPES:
        raise RasterError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    count = int(getattr(model, "num_classes", 0) or 0)
    if classes is not None and len(classes) != count:
        raise ModelError(f"the head has {count} classes, but {len(classes)} are named")
    if kind == "classes" and count > 255:
        raise ModelError(f"{count} classes do not fit into 8 bits; use kind='probabilities'")
    names = tuple(classes) if classes is not None else tuple(f"class_{i}" for i in range(count))
    return _run(
        model,
        source,
        output,
        bands,
        tiling,
        classes_of(model, kind != "logits"),
        _Stored("uint8" if kind == "classes" else dtype, None, compress, names),
        _pixels(
            options,
            resampling,
            mask_classes,
            units=units,
            level=level,
            nodata=nodata,
            align=align,
            date=date,
            strict=strict,
        ),
        picture=None,
        device=device,
        progress=progress,
        resume=resume,
    )


# --- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """How values are stored; `names` is of each band, or what comes before its number."""

    dtype: str
    pca: int | None
    compress: str
    names: str | tuple[str, ...]


@dataclass(frozen=True)
class _Pixels:
    """What is said of the pixels; `options` is what the source has no part in."""

    said: Said
    resampling: str
    mask_classes: Sequence[int]
    options: Mapping[str, Any]


def _pixels(
    options: Mapping[str, Any], resampling: str, mask_classes: Sequence[int], **said: Any
) -> _Pixels:
    """Sort what the caller says: of the source, and of how to prepare its pixels."""
    rest = dict(options)
    if "fit" in rest or "size" in rest:
        raise RasterError("a map has the size of its image; fit= and size= are for tiles")
    offset, baseline = rest.pop("offset", None), rest.pop("baseline", None)
    if baseline is not None:
        if offset is not None:
            raise PixelError(
                "give offset or baseline, not both: the offset follows from the baseline"
            )
        offset = offset_of_baseline(baseline)
    of_source = Said(**said, offset=offset, sensor=rest.pop("sensor", None))
    return _Pixels(of_source, resampling, mask_classes, rest)


def _run(
    model: nn.Module,
    source: SourceLike,
    output: str | os.PathLike[str] | None,
    bands: Sequence[str] | None,
    tiling: Tiling,
    network: Network,
    stored: _Stored,
    pixels: _Pixels,
    *,
    picture: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    progress: bool | None,
    resume: bool,
) -> Embedding:
    tiling.check()
    if stored.compress not in COMPRESSIONS:
        raise RasterError(f"compress is {', '.join(COMPRESSIONS)}; got {stored.compress!r}")
    _check_targets(source, output, picture)
    opened = open_source(
        source,
        bands,
        resampling=pixels.resampling,
        mask_classes=pixels.mask_classes,
        said=pixels.said,
    )
    rasterio = rasterio_module()
    try:
        _check_kept(opened, output, picture)
        with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), running(model, device) as place:
            prepare = _prepare(model, opened, pixels)
            job = make_job(model, opened, prepare, network, tiling, place)
            grid = _computed(
                job, model, output, tiling, stored, place, progress=progress, resume=resume
            )
            if picture is not None:
                _draw(picture, opened, grid, _sensor(model, opened, pixels))
    finally:
        opened.close()
    return grid


def _prepare(model: nn.Module, source: Source, pixels: _Pixels) -> Preprocess:
    """The preprocessing of those of the source's bands that the model needs."""
    options = {**pixels.options, "fit": "any"}
    facts, said = source.facts, pixels.said
    if isinstance(source, SceneSource):
        # Asks for what the scene does not know.
        known = source.scene.transform_for(model, **options)
        units, level, offset = known.units, known.level, facts.offset
        options |= {"sensor": source.scene.sensor, "nodata": facts.nodata or None}
    else:
        units, level, offset = facts.units or "dn", facts.level, facts.offset
        options |= {"sensor": said.sensor, "nodata": said.nodata}
    # An offset that is only known belongs to DN; one that is said is refused elsewhere.
    options["offset"] = offset if units == "dn" else said.offset
    prepare = create_transform(model, source.bands, units, level, **options)
    used = sorted({channel for each in prepare.sources for channel in each.channels})
    # Bands that the model does not take need not be read.
    return create_transform(model, [source.bands[c] for c in used], units, level, **options)


def _draw(picture: str | os.PathLike[str], source: Source, grid: Embedding, sensor: str) -> None:
    # Here, because pictures are made of rasters, which need none.
    from geofm.maps.sources import draw_embedding

    try:
        draw_embedding(picture, source, grid, sensor)
    except (GeofmError, OSError) as error:
        kept = f". The raster is complete: {grid.path}" if grid.path is not None else ""
        raise RasterError(f"there is no picture {picture}: {error}{kept}") from error


def _sensor(model: nn.Module, source: Source, pixels: _Pixels) -> Any:
    """Whose names the source's bands have."""
    if isinstance(source, SceneSource):
        return source.scene.sensor
    return pixels.said.sensor or input_spec_of(model).sensor


def _computed(
    job: Job,
    model: nn.Module,
    output: str | os.PathLike[str] | None,
    tiling: Tiling,
    stored: _Stored,
    device: torch.device,
    *,
    progress: bool | None,
    resume: bool,
) -> Embedding:
    transform = grid_transform(
        job.source.transform,
        job.columns.spacing,
        job.columns.offset,
        job.rows.offset,
        job.rows.spacing,
    )
    tags = _tags(job, model, stored)
    place = (transform, job.source.crs, job.columns.spacing, job.columns.offset)
    if output is None:
        codec = _fitted(job, stored, device)
        shape = (codec.channels(job.channels), job.rows.total, job.columns.total)
        if 4 * math.prod(shape) > _MAX_RESULT_BYTES:
            raise RasterError(
                f"the grid of {shape} has {4 * math.prod(shape) / 1e9:.0f} GB; give an output file"
            )
        memory = MemoryStore(codec, shape)
        run(job, memory, device, workers_for(model, job), progress)
        return Embedding(codec.decode(memory.cells), *place, tags | _codec_tags(codec))
    target = Path(output)
    store = PartialStore(target, _plan(job, model, tiling, stored, device), resume=resume)
    complete = False
    try:
        saved = store.load_fit(stored.dtype)
        codec = saved or _fitted(job, stored, device)
        if saved is None and (codec.projection is not None or codec.scale is not None):
            store.save_fit(codec)
        shape = (codec.channels(job.channels), job.rows.total, job.columns.total)
        store.prepare(codec, shape)
        run(job, store, device, workers_for(model, job), progress)
        tags |= _codec_tags(codec)
        try:
            raw_to_cog(store.cells, target, _layout(shape, codec, stored, place, tags))
        except RasterError as error:
            raise RasterError(
                f"{error}. All values are kept in {store.folder}; run the same again to go on "
                f"from them"
            ) from error
        complete = True
    finally:
        store.close(remove=complete or store.worthless)
    return Embedding(None, *place, tags, target, shape)


def _fitted(job: Job, stored: _Stored, device: torch.device) -> Codec:
    if stored.dtype == "uint8" or (stored.pca is None and stored.dtype != "int8"):
        return Codec(stored.dtype)
    cells = sample(job, device)
    projection = None
    if stored.pca is not None:
        projection = fit_projection(cells, stored.pca)
        cells = projection(cells.T[:, :, None])[:, :, 0].T
    if stored.dtype != "int8":
        return Codec(stored.dtype, projection)
    return Codec(stored.dtype, projection, *fit_quantisation(cells))


def _layout(
    shape: tuple[int, int, int],
    codec: Codec,
    stored: _Stored,
    place: tuple[Any, ...],
    tags: Mapping[str, str],
) -> Layout:
    if stored.dtype == "uint8":
        names: Sequence[str] = ["class"]
    elif isinstance(stored.names, str):
        names = [f"{stored.names}_{i}" for i in range(shape[0])]
    else:
        names = stored.names
    return Layout(
        shape=shape,
        dtype=codec.stored.name,
        transform=place[0],
        crs=place[1],
        nodata=codec.nodata,
        names=names,
        tags=tags,
        scale=None if codec.scale is None else codec.scale.tolist(),
        zero=None if codec.zero is None else codec.zero.tolist(),
        half=codec.dtype == "float16",
        compress=stored.compress,
        colours=_colours(len(stored.names)) if stored.dtype == "uint8" else None,
    )


def _colours(classes: int) -> dict[int, tuple[int, int, int]]:
    """Of a map of classes; 255 is no data."""
    return {number: colour_of(number) for number in range(classes)} | {255: NO_DATA}


def _tags(job: Job, model: nn.Module, stored: _Stored) -> dict[str, str]:
    rows, columns = job.rows, job.columns
    windows = (
        f"{rows.size} x {columns.size} px, every {_step(rows)} x {_step(columns)} px, {job.blend}"
    )
    tags = {
        **weights_tags(model),
        "GEOFM_PREPARE": repr(job.prepare),
        "GEOFM_SOURCE": job.source.name,
        "GEOFM_VALUES": job.network.label,
        "GEOFM_WINDOWS": windows,
    }
    if job.source.date:
        tags["GEOFM_DATE"] = job.source.date
    if not isinstance(stored.names, str):
        tags["GEOFM_CLASSES"] = json.dumps(list(stored.names), ensure_ascii=False)
    return tags


def _step(axis: Axis) -> int:
    return axis.starts[1] - axis.starts[0] if len(axis.starts) > 1 else axis.size


def _codec_tags(codec: Codec) -> dict[str, str]:
    tags = {}
    if codec.projection is not None:
        tags["GEOFM_PCA_EXPLAINED"] = ",".join(f"{v:.4g}" for v in codec.projection.explained)
    if codec.scale is not None and codec.zero is not None:
        tags["GEOFM_SCALE"] = ",".join(repr(v) for v in codec.scale.tolist())
        tags["GEOFM_ZERO"] = ",".join(repr(v) for v in codec.zero.tolist())
    return tags


def _plan(
    job: Job, model: nn.Module, tiling: Tiling, stored: _Stored, device: torch.device
) -> dict[str, Any]:
    """All that the result depends on, by name, so that another run is told from this one."""
    from geofm import __version__

    return {
        "geofm": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "source": job.source.identity(),
        "bands": list(job.source.bands),
        "size": [job.source.height, job.source.width],
        "weights": weights_hash(model),
        "preprocessing": repr(job.prepare)
        + repr((job.prepare.shift, job.prepare.scale, job.prepare.factor)),
        "values": job.network.label,
        "windows": [job.rows.size, job.columns.size, job.rows.starts[:3], job.columns.starts[:3]],
        "batch": job.batch,
        "panels": [dataclasses.astuple(panel) for panel in job.panels],
        "blend": job.blend,
        "min_valid": tiling.min_valid,
        "stored": [stored.dtype, stored.pca],
    }


def _check_targets(
    source: SourceLike,
    output: str | os.PathLike[str] | None,
    picture: str | os.PathLike[str] | None,
) -> None:
    """Refuse to overwrite the input or one output with the other, before anything is computed."""
    taken = {}
    if isinstance(source, str | os.PathLike):
        taken[Path(source).resolve()] = "the input"
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


def _check_kept(
    source: Source,
    output: str | os.PathLike[str] | None,
    picture: str | os.PathLike[str] | None,
) -> None:
    """Refuse to overwrite one of a scene's files."""
    if not isinstance(source, SceneSource):
        return
    files = {Path(path).resolve() for path in source.files}
    for target in (output, picture):
        if target is not None and Path(target).resolve() in files:
            raise RasterError(f"{target} is a file of the scene that is read; name another output")
