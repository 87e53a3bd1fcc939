"""Maps as pictures: principal components, similarities and classes, as PNG and as a page.

* `layers`: what is shown: colours of every pixel, and their meaning;
* `sources`: layers of files; `place`: scale and extent;
* `png`: one picture with its legend; `page`: a self-contained HTML with a slider.
"""

from geofm.maps.layers import (
    Entry,
    Layer,
    Ramp,
    class_layer,
    components_layer,
    ramp_layer,
)
from geofm.maps.page import write_page
from geofm.maps.png import write_png
from geofm.maps.sources import open_layer, true_colour_layer, write_picture

__all__ = [
    "Entry",
    "Layer",
    "Ramp",
    "class_layer",
    "components_layer",
    "open_layer",
    "ramp_layer",
    "true_colour_layer",
    "write_page",
    "write_picture",
    "write_png",
]
