"""Labelled arrays of any size in, lazy embeddings out (extra ``dask``).

* `grid`: where chunks and their windows lie, and the coordinates of cells;
* `encoder`: what a worker computes with, and how it runs it;
* `embed`: `embed_xarray`, the checks and the graph.
"""

from geofm.arrays.embed import embed_xarray

__all__ = ["embed_xarray"]
