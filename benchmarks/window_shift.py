"""How much an embedding depends on where its windows happen to lie.

    python benchmarks/window_shift.py                          # a generated scene
    python benchmarks/window_shift.py scene.tif --level L2A

A raster and the same raster without its first 24 rows and columns are embedded; the same ground
then lies elsewhere in the windows. Printed for each choice of window and overlap: root mean square
difference of cells at least 64 px from the edge, relative to their standard deviation there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

import geofm
from geofm.datasets.samples import landscape, write_scene

SHIFT = 24
EDGE = 8  # cells
CHOICES = ((56, 0), (56, 24), (112, 56), (224, 56), (224, 112))


def cut(source: Path, target: Path, shift: int) -> None:
    """The raster without its first rows and columns, in whole cells."""
    with rasterio.open(source) as file:
        side = (min(file.width, file.height) - SHIFT) // 8 * 8
        window = Window(shift, shift, side + SHIFT - shift, side + SHIFT - shift)
        profile = file.profile | {"width": window.width, "height": window.height, "tiled": False}
        profile.pop("blockxsize", None)
        profile.pop("blockysize", None)
        profile["transform"] = file.window_transform(window)
        with rasterio.open(target, "w", **profile) as out:
            out.write(file.read(window=window))
            out.descriptions = file.descriptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", nargs="?", type=Path)
    parser.add_argument("--weights", default="starter")
    parser.add_argument("--level", default="L2A")
    parser.add_argument("--bands", help="B1,B2,... where the file does not describe them")
    args = parser.parse_args()

    model = geofm.create_model("mpmae_atto", pretrained=args.weights, stem_padding="aligned")
    bands = args.bands.split(",") if args.bands else None
    with tempfile.TemporaryDirectory() as folder:
        scene = args.scene
        if scene is None:
            scene = write_scene(Path(folder) / "scene.tif", landscape((384, 384)))
        whole, part = Path(folder) / "whole.tif", Path(folder) / "part.tif"
        cut(scene, whole, 0)
        cut(scene, part, SHIFT)
        print("| window, shared (px) | change, relative to the cells' spread |\n|---|---|")
        for window, overlap in CHOICES:
            first, second = (
                geofm.embed_raster(
                    model.eval(),
                    path,
                    bands=bands,
                    level=args.level,
                    window=window,
                    overlap=overlap,
                ).values
                for path in (whole, part)
            )
            inside = (slice(None), slice(EDGE, -EDGE), slice(EDGE, -EDGE))
            first, second = first[:, SHIFT // 8 :, SHIFT // 8 :][inside], second[inside]
            known = np.isfinite(first).all(0) & np.isfinite(second).all(0)
            spread = first[:, known].std(1).mean()
            change = np.sqrt(np.mean((first - second)[:, known] ** 2))
            print(f"| {window}, {overlap} | {change / spread:.1%} |")


if __name__ == "__main__":
    main()
