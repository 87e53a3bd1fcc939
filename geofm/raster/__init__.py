"""Rasters of any size in, georeferenced embeddings and classes out (extra ``raster``).

* `sources`: a file, a scene or an image, read part by part;
* `windows`, `strips`: where windows lie, and their pixels, each read once;
* `networks`: what is computed from a window;
* `jobs`: how many windows, and how many at a time; `workers`: a core for each;
* `runs`: the loop that joins windows; `stores`: where finished blocks go, for resuming;
* `codecs`, `cog`: components, fewer bits, and the cloud-optimised GeoTIFF;
* `embed`: `embed_raster` and `predict_raster`; their pictures are of `geofm.maps`.
"""

from geofm.raster.embed import embed_raster, predict_raster
from geofm.raster.grids import Embedding, write_embedding
from geofm.raster.jobs import Tiling
from geofm.raster.networks import embedding_map, weights_label
from geofm.raster.sources import RasterImage, read_image

__all__ = [
    "Embedding",
    "RasterImage",
    "Tiling",
    "embed_raster",
    "embedding_map",
    "predict_raster",
    "read_image",
    "weights_label",
    "write_embedding",
]
