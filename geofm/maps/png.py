"""One picture with title, legend, scale and origin, as PNG."""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace
from typing import Any

import numpy as np

from geofm.embeddings.files import refuse_overwriting
from geofm.errors import MissingExtraError
from geofm.maps.layers import Layer
from geofm.maps.place import extent_text, origin_text, scale_bar, untrained
from geofm.raster.cog import reported, written

__all__ = ["write_png"]

# All in inches.
_PANEL, _MARGIN, _TITLE, _LINE = 5.0, 0.2, 0.25, 0.19
_DPI = 150
# What a letter of the legend's size takes, and what stands before it.
_LETTER, _SWATCH = 0.085, 0.45


def write_png(
    path: str | os.PathLike[str],
    layer: Layer,
    base: Layer | None = None,
    *,
    title: str | None = None,
    attribution: str = "",
) -> None:
    """Write a picture, complete or not at all.

    Args:
        path: PNG to write; an existing one is replaced.
        layer: What to show.
        base: What to show on its left, on the same ground; None for nothing.
        title: Above the picture; None for the layer's.
        attribution: Whose data it is, for the last line.

    Raises:
        RasterError: It cannot be written, is what is shown, or the two do not overlap.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'geofm[raster]'") from error
    shown = layer if base is None else base
    refuse_overwriting(path, *layer.files, *shown.files)
    panels = [layer] if base is None else [replace(base, mark=layer.mark), layer.onto(base.grid)]
    rows, columns = panels[-1].pixels.shape[:2]
    # A long strip becomes neither a line nor a tower.
    high = min(max(_PANEL * rows / columns, 0.5), 2 * _PANEL)
    width = _MARGIN + len(panels) * (_PANEL + _MARGIN)
    drawn = min(_PANEL, high * columns / rows)
    legend = _legend_size(layer, width - 2 * _MARGIN)
    letters = int((width - 2 * _MARGIN) / 0.067)
    words = [extent_text(shown.ground), layer.note, origin_text(layer.grid), attribution]
    foot = [line for text in words if text for line in textwrap.wrap(text, letters)]
    height = _TITLE + high + 2 * _MARGIN + 0.35 + legend[1] + _LINE * len(foot) + 0.1
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def box(left: float, top: float, wide: float, tall: float) -> Any:
        bottom = (height - top - tall) / height
        axes = figure.add_axes((left / width, bottom, wide / width, tall / height))
        axes.set_axis_off()
        return axes

    for number, panel in enumerate(panels):
        left = _MARGIN + number * (_PANEL + _MARGIN)
        axes = box(left, _MARGIN + _TITLE, drawn, high)
        _draw_panel(axes, panel)
        name = title if title is not None and panel is panels[-1] else panel.title
        colour = "black"
        if untrained(panel.grid):
            name, colour = f"UNTRAINED WEIGHTS: {name}", "red"
        place = (left, _MARGIN + 0.08)
        _text(figure, place, _short(name, 58), (width, height), 11, colour)
    top = _MARGIN + _TITLE + high + 0.12
    _draw_scale(box(_MARGIN, top, drawn, 0.3), panels[-1])
    top += 0.35
    if layer.ramp is not None:
        _draw_ramp(box(_MARGIN, top, _PANEL, legend[1]), layer)
    elif layer.entries:
        _draw_entries(box(_MARGIN, top, width - 2 * _MARGIN, legend[1] - 0.15), layer, legend[0])
    top += legend[1]
    for number, text in enumerate(foot):
        _text(figure, (_MARGIN, top + _LINE * (number + 0.8)), text, (width, height), 8.5)
    with reported(path), written(path) as temporary:
        # Without the date and the version of matplotlib: the same data, the same file.
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


def _on_grey(panel: Layer) -> Any:
    """Cells without data in light grey."""
    out = panel.pixels[..., :3].copy()
    out[panel.pixels[..., 3] == 0] = 0xDD
    return out


def _text(
    figure: Any,
    place: tuple[float, float],
    text: str,
    size_of: tuple[float, float],
    size: float,
    colour: str = "black",
) -> None:
    left, down = place
    width, height = size_of
    # Text is no formula: a name may hold a dollar sign.
    figure.text(
        left / width,
        1 - down / height,
        text,
        fontsize=size,
        color=colour,
        va="center",
        ha="left",
        parse_math=False,
    )


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _labels(layer: Layer) -> list[str]:
    return [
        _short(e.label, 48) + (f" ({100 * e.share:.1f} %)" if e.share is not None else "")
        for e in layer.entries
    ]


def _legend_size(layer: Layer, width: float) -> tuple[int, float]:
    """Columns and height."""
    if layer.ramp is not None:
        return 1, 0.6
    if not layer.entries:
        return 1, 0.0
    longest = max(len(label) for label in _labels(layer))
    columns = max(1, min(len(layer.entries), int(width / (_SWATCH + _LETTER * longest))))
    return columns, _LINE * 1.15 * -(-len(layer.entries) // columns) + 0.15


def _draw_panel(axes: Any, panel: Layer) -> None:
    rows, columns = panel.pixels.shape[:2]
    axes.imshow(_on_grey(panel), interpolation="nearest", aspect="equal")
    axes.set_anchor("NW")
    where = panel.mark_place()
    if where is not None:
        spot = (where[0] * columns - 0.5, where[1] * rows - 0.5)
        for colour, line in (("black", 4.0), ("white", 1.6)):
            axes.plot(*spot, "o", mfc="none", mec=colour, mew=line, ms=12)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)


def _draw_scale(axes: Any, layer: Layer) -> None:
    bar = scale_bar(layer.grid)
    if bar is None:
        return
    share, text = bar
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.plot([0, share], [0.5, 0.5], color="black", linewidth=2.5, solid_capstyle="butt")
    axes.text(share + 0.02, 0.5, text, va="center", fontsize=9)


def _draw_ramp(axes: Any, layer: Layer) -> None:
    ramp = layer.ramp
    assert ramp is not None
    low, high = ramp.ends
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.imshow(ramp.colours[np.newaxis], extent=(0, 1, 0.6, 0.9), aspect="auto")
    axes.text(0, 0.48, low, va="top", ha="left", fontsize=9)
    axes.text(1, 0.48, high, va="top", ha="right", fontsize=9)
    axes.text(
        0.5, 0.48, _short(ramp.label, 60), va="top", ha="center", fontsize=9, parse_math=False
    )


def _draw_entries(axes: Any, layer: Layer, columns: int) -> None:
    axes.set_xlim(0, columns)
    rows = -(-len(layer.entries) // columns)
    axes.set_ylim(rows, 0)
    wide = axes.get_position().width * axes.figure.get_figwidth() / columns
    for number, (entry, label) in enumerate(zip(layer.entries, _labels(layer), strict=True)):
        column, row = divmod(number, rows)
        colour = tuple(v / 255 for v in entry.colour)
        axes.add_patch(_patch((column, row + 0.22), 0.22 / wide, 0.56, colour))
        axes.text(column + 0.3 / wide, row + 0.5, label, va="center", fontsize=9, parse_math=False)


def _patch(corner: tuple[float, float], wide: float, tall: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, wide, tall, facecolor=colour, edgecolor="black", linewidth=0.4)
