"""Embeddings as data: tables and arrays of cells, the places alike, and classes of them.

* `grids`: cells of an embedding, block by block, whatever file they are in;
* `files`: GeoTIFF, zarr and GeoParquet behind that one interface;
* `table`, `arrays`: GeoParquet and zarr; `geoparquet`: what such a file says of itself;
* `ranking`: places by cosine similarity; `classes`, `kmeans`: a map of classes;
* `rasters`: maps of one band, with colours and names.
"""

from geofm.embeddings.classes import Segmentation, segment
from geofm.embeddings.files import export_embeddings, read_embeddings
from geofm.embeddings.grids import Cells, Embeddings, Grid
from geofm.embeddings.kmeans import KMeans, fit_kmeans
from geofm.embeddings.ranking import Place, Similar, similar
from geofm.embeddings.rasters import write_band

__all__ = [
    "Cells",
    "Embeddings",
    "Grid",
    "KMeans",
    "Place",
    "Segmentation",
    "Similar",
    "export_embeddings",
    "fit_kmeans",
    "read_embeddings",
    "segment",
    "similar",
    "write_band",
]
