"""A self-contained HTML page: true colour and a result, with a slider between them.

Nothing is loaded from anywhere: images are inside, and the page's own policy forbids everything
else. Without JavaScript both images are shown, one beside or above the other. The slider begins at
``#position=0.3`` where the address says so.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.files import refuse_overwriting
from geofm.errors import MissingExtraError
from geofm.maps.layers import Layer
from geofm.maps.place import extent_text, origin_text, scale_bar
from geofm.raster.cog import reported, written

__all__ = ["write_page"]

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 1rem/1.45 system-ui, sans-serif;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 .75rem; }
figure { margin: 0; }
.image { position: relative; }
.mark { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.mark circle { fill: none; stroke: #000; stroke-width: 5; }
.mark circle + circle { stroke: #fff; stroke-width: 2; }
figcaption { font-size: .9rem; margin-bottom: .25rem; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; background: #ddd; }
#compare { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
#control { display: none; margin: .6rem 0 0; }
#control label { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem; }
#control input { width: 100%; margin: .35rem 0 0; min-height: 1.75rem; accent-color: #27b; }
.js #control { display: block; }
.js #compare { display: block; position: relative; touch-action: pan-y; cursor: ew-resize; }
.js #compare figcaption { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
.js #compare figure + figure { position: absolute; inset: 0;
  clip-path: inset(0 0 0 calc(var(--at, .5) * 100%)); }
.js #compare::after { content: ""; position: absolute; top: 0; bottom: 0; width: 3px;
  left: calc(var(--at, .5) * 100% - 1.5px); background: #fff; box-shadow: 0 0 0 1px #000;
  pointer-events: none; }
.bar { display: block; width: 100%; height: 1.6rem; margin-top: .6rem; overflow: visible; }
.bar text { font: .85rem system-ui, sans-serif; fill: CanvasText; }
.bar rect { fill: CanvasText; }
#legend { list-style: none; margin: .75rem 0 0; padding: 0; display: grid; gap: .2rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); font-size: .9rem; }
#legend li { display: flex; gap: .5rem; align-items: baseline; }
#legend svg { flex: none; width: 1rem; height: 1rem; align-self: flex-start;
  margin-top: .2rem; }
#legend .share { margin-left: auto; white-space: nowrap; font-variant-numeric: tabular-nums; }
#ramp { margin-top: .75rem; font-size: .9rem; }
#ramp img { height: 1rem; image-rendering: auto; }
#ramp div { display: flex; justify-content: space-between; gap: 1rem; }
#ramp .end { white-space: nowrap; }
footer { margin-top: .9rem; font-size: .8rem; }
footer p { margin: .2rem 0; }
"""

# A range input moves by the keyboard of itself; the address and the pointer are all there is to do.
_SCRIPT = """
"use strict";
const compare = document.getElementById("compare");
const slider = document.getElementById("position");
function show() {
  compare.style.setProperty("--at", slider.value / 1000);
  slider.setAttribute("aria-valuetext", Math.round(slider.value / 10) + " %");
}
function fromAddress() {
  const at = parseFloat((/(?:^#|&)position=([0-9.]+)/.exec(location.hash) || [])[1]);
  if (at >= 0 && at <= 1) { slider.value = Math.round(at * 1000); }
  show();
}
function drag(event) {
  if (event.type === "pointermove" && event.buttons === 0) { return; }
  const box = compare.getBoundingClientRect();
  slider.value = Math.round(1000 * (event.clientX - box.left) / box.width);
  show();
}
document.documentElement.classList.add("js");
slider.addEventListener("input", show);
addEventListener("hashchange", fromAddress);
compare.addEventListener("pointerdown", drag);
compare.addEventListener("pointermove", drag);
compare.addEventListener("dragstart", (event) => event.preventDefault());
fromAddress();
"""


def write_page(
    path: str | os.PathLike[str],
    layer: Layer,
    base: Layer,
    *,
    title: str | None = None,
    attribution: str = "",
) -> None:
    """Write a page, complete or not at all.

    Args:
        path: HTML to write; an existing one is replaced.
        layer: The result, on the right of the slider.
        base: What it is compared with, on the left: true colour.
        title: Heading; None for the layer's title.
        attribution: Whose data it is, for the last line. Text, not HTML, as all else.

    Raises:
        RasterError: It cannot be written, is what is shown, or the two do not overlap.
        MissingExtraError: Pillow is not installed.
    """
    refuse_overwriting(path, *layer.files, *base.files)
    layer = layer.onto(base.grid)
    base = replace(base, mark=layer.mark)
    text = page(layer, base, layer.title if title is None else title, attribution)
    with reported(path), written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(layer: Layer, base: Layer, title: str, attribution: str) -> str:
    """The page, as text.

    Args:
        layer: As in `write_page`, on the pixels of `base`.
        base: As in `write_page`.
        title: As in `write_page`.
        attribution: As in `write_page`.
    """
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(_STYLE)}'; "
        f"script-src '{_digest(_SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    words = [layer.note, extent_text(base.ground), origin_text(layer.grid), attribution]
    feet = "\n".join(f"<p>{_safe(text)}</p>" for text in words if text)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_safe(title)}</h1>
<div id="compare">
{_figure(base)}
{_figure(layer)}
</div>
<div id="control">
<label for="position"><span>Left: {_safe(base.title)}</span>
<span>Right: {_safe(layer.title)}</span></label>
<input type="range" id="position" min="0" max="1000" value="500" step="10"
 aria-label="Where {_safe(base.title)} ends and {_safe(layer.title)} begins">
</div>
{_bar(layer)}
{_legend(layer)}
</main>
<footer>
{feet}
</footer>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figure(layer: Layer) -> str:
    height, width = layer.pixels.shape[:2]
    return (
        f"<figure><figcaption>{_safe(layer.title)}</figcaption>"
        f'<div class="image"><img src="{_data_uri(_opaque(layer.pixels))}" '
        f'width="{width}" height="{height}" alt="{_safe(layer.title)}">'
        f"{_mark(layer)}</div></figure>"
    )


def _mark(layer: Layer) -> str:
    """A ring around the place that others are compared with."""
    where = layer.mark_place()
    if where is None:
        return ""
    ring = f'<circle cx="{100 * where[0]:.3f}%" cy="{100 * where[1]:.3f}%" r="9"/>'
    return f'<svg class="mark" role="img" aria-label="the place">{ring}{ring}</svg>'


def _opaque(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey where there is no data, so that what lies below does not show through."""
    out = pixels[..., :3].copy()
    out[pixels[..., 3] == 0] = 0xDD
    return out


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image: Any
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow: pip install 'geofm[raster]'") from error
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _bar(layer: Layer) -> str:
    found = scale_bar(layer.grid)
    if found is None:
        return ""
    share, text = found
    wide = f"{100 * share:.3f}%"
    # Swatches and bars are drawings: the policy allows no style of single elements.
    return (
        f'<svg class="bar" role="img" aria-label="Scale: the bar is {text}">'
        f'<rect x="0" y="2" width="{wide}" height="4"/><text x="0" y="22">{text}</text></svg>'
    )


def _legend(layer: Layer) -> str:
    if layer.ramp is not None:
        ramp = layer.ramp
        low, high = ramp.ends
        return (
            f'<div id="ramp"><img src="{_data_uri(ramp.colours[np.newaxis])}" alt="colour scale" '
            f'width="256" height="16"><div><span class="end">{low}</span>'
            f'<span>{_safe(ramp.label)}</span><span class="end">{high}</span></div></div>'
        )
    if not layer.entries:
        return ""
    items = []
    for entry in layer.entries:
        colour = "#{:02x}{:02x}{:02x}".format(*entry.colour)
        share = "" if entry.share is None else f"{100 * entry.share:.1f} %"
        items.append(
            f'<li><svg viewBox="0 0 16 16" aria-hidden="true"><rect x=".5" y=".5" width="15" '
            f'height="15" fill="{colour}" stroke="#555"/></svg><span>{_safe(entry.label)}</span>'
            f'<span class="share">{share}</span></li>'
        )
    return '<ul id="legend" aria-label="Legend">\n' + "\n".join(items) + "\n</ul>"
