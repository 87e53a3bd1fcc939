"""Time series of images: monthly composites, and maps of tree species.

* `composite`: dated images in, twelve months out, lazily (extra ``dask``);
* `cube`: where twelve months lie, and their pixels in parts;
* `sites`: the environment of each pixel;
* `species`: `species_map` and `species_points`;
* `points`: GeoParquet of places and their species.
"""

from geofm.series.composite import CLOUDS, monthly_composite
from geofm.series.species import SpeciesMap, species_map, species_points

__all__ = ["CLOUDS", "SpeciesMap", "monthly_composite", "species_map", "species_points"]
