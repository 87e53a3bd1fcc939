"""What the commands ``geofm similar``, ``segment``, ``export`` and ``picture`` do.

Each takes the parsed options and gives the text to print.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geofm.embeddings.classes import segment
from geofm.embeddings.files import export_embeddings, refuse_overwriting
from geofm.embeddings.ranking import similar
from geofm.errors import RasterError
from geofm.maps.layers import Layer, class_layer, ramp_layer
from geofm.maps.sources import open_layer, true_colour_layer, write_picture

__all__ = ["run_export", "run_picture", "run_segment", "run_similar"]

_PICTURES = (".png", ".html")


def run_similar(options: argparse.Namespace) -> str:
    """Rank places.

    Args:
        options: ``embeddings``, ``at`` ("lon,lat"), ``top``, ``output`` (.tif, .png, .html or
            None), and for pictures ``image``, ``bands``, ``sensor``, ``attribution``.

    Returns:
        The table.

    Raises:
        GeofmError: As `geofm.embeddings.similar`.
    """
    output = options.output
    picture = _draws(options, options.embeddings, (".tif", ".tiff", *_PICTURES))
    base = _base(options) if picture else None
    found = similar(
        options.embeddings,
        _place(options.at),
        options.top,
        output=None if picture else output,
        with_map=picture,
    )
    if picture and found.map is not None:
        assert found.cell is not None
        x, y = found.grid.xy(np.array(found.cell[:1]), np.array(found.cell[1:]))
        layer = ramp_layer(
            found.map,
            found.grid,
            title="cosine similarity",
            mark=(float(x[0]), float(y[0])),
            note=f"To the ringed place at {options.at} (longitude, latitude).",
        )
        write_picture(output, layer, base, attribution=options.attribution or "")
    return found.table()


def run_segment(options: argparse.Namespace) -> str:
    """Group cells into classes.

    Args:
        options: ``embeddings``, ``output`` (as in `run_similar`, or None), ``classes``, ``seed``,
            and for pictures as in `run_similar`.

    Returns:
        The table of classes.

    Raises:
        GeofmError: As `geofm.embeddings.segment`.
    """
    output = options.output
    picture = _draws(options, options.embeddings, (".tif", ".tiff", *_PICTURES))
    base = _base(options) if picture else None
    found = segment(
        options.embeddings,
        None if picture else output,
        classes=options.classes,
        seed=options.seed,
    )
    if picture:
        layer = class_layer(
            found.classes, found.grid, title="classes (k-means)", most=options.classes
        )
        write_picture(output, layer, base, attribution=options.attribution or "")
    return found.table()


def run_export(options: argparse.Namespace) -> str:
    """Write a table or arrays.

    Args:
        options: ``embeddings``, ``output``, ``geometry``, ``date``, ``dtype``.

    Returns:
        What was written.

    Raises:
        GeofmError: As `geofm.embeddings.export_embeddings`.
    """
    path = export_embeddings(
        options.embeddings,
        options.output,
        geometry=options.geometry,
        date=options.date,
        dtype=options.dtype,
    )
    return f"wrote {path}"


def run_picture(options: argparse.Namespace) -> str:
    """Draw an embedding, a class map or a map of values.

    Args:
        options: ``input``, ``output`` (.png or .html), ``image``, ``bands``, ``sensor``,
            ``title``, ``attribution``.

    Returns:
        What was written.

    Raises:
        GeofmError: As `open_layer` and `write_picture`.
    """
    _draws(options, options.input, _PICTURES)
    base = _base(options)
    layer = open_layer(options.input)
    path = write_picture(
        options.output,
        layer,
        base,
        title=options.title,
        attribution=options.attribution or "",
    )
    return f"wrote {path}"


def _base(options: argparse.Namespace) -> Layer | None:
    if options.image is None:
        if options.output.suffix == ".html":
            raise RasterError(
                "a page compares two images; give the image that was embedded with --image"
            )
        return None
    bands = [name.strip() for name in options.bands.split(",")] if options.bands else None
    return true_colour_layer(options.image, bands, sensor=options.sensor or "sentinel2")


def _draws(options: argparse.Namespace, source: Path, kinds: Sequence[str]) -> bool:
    """Whether the output is a picture; what cannot be is told before anything is computed."""
    output: Path | None = options.output
    if output is not None:
        if output.suffix not in kinds:
            raise RasterError(f"the output is one of {', '.join(kinds)}; got {output.name}")
        refuse_overwriting(output, source, options.image)
    picture = output is not None and output.suffix in _PICTURES
    if not picture:
        given = _given(options, "image", "bands", "sensor", "attribution")
        if given:
            found = "no -o" if output is None else f"-o {output.name}"
            raise RasterError(
                f"{given}: only for pictures (-o with {' or '.join(_PICTURES)}); got {found}"
            )
    elif options.image is None:
        given = _given(options, "bands", "sensor")
        if given:
            raise RasterError(f"{given}: of the image that was embedded; name it with --image")
    return picture


def _given(options: argparse.Namespace, *names: str) -> str:
    """Those of some options that were given."""
    return ", ".join(f"--{name}" for name in names if getattr(options, name) is not None)


def _place(text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        lon, lat = (float(part) for part in parts)
    except ValueError as error:
        raise RasterError(
            f"a place is longitude,latitude in degrees, like 9.81,47.25; got {text!r}"
        ) from error
    return lon, lat
