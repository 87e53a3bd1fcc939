"""Made-up tiles in MMEarth's format, for demonstrations and tests.

Nothing here is an observation. Tiles are cut from generated landscapes; radar, land cover, canopy
and climate follow from the land cover, the relief and the latitude by simple rules, so that a
model can learn one from the other, and no more. Some of every kind of missing value is put in.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from geofm.datasets._hdf5 import import_h5py
from geofm.datasets.samples import landscape
from geofm.errors import PixelError

__all__ = ["write_mmearth"]

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

_STORED: Final = "B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12".split()
_MIN_SIDE: Final = 32
_BIOMES: Final = 14
_ECO_REGIONS: Final = 846
_METRES: Final = 10.0

# By class in the order of samples.LAND_COVER: water, evergreen and deciduous forest, crop, grass,
# bare soil, built-up.
_DYNAMIC_WORLD: Final = np.array([1, 2, 2, 5, 3, 8, 7], np.uint8)  # 0 is no data
_WORLD_COVER: Final = np.array([80, 10, 10, 40, 30, 60, 50], np.uint8)
_SCENE_CLASS: Final = np.array([6, 4, 4, 4, 4, 5, 5], np.uint8)  # Sen2Cor's SCL
_HEIGHT: Final = np.array([0.0, 22.0, 18.0, 0.5, 0.3, 0.0, 1.0])  # m
_BACKSCATTER: Final = np.array(  # dB: VV, VH, HH, HV
    [
        [-20.0, -10.0, -9.5, -11.0, -12.0, -14.0, -5.0],
        [-28.0, -15.5, -15.0, -18.0, -19.5, -22.0, -13.0],
        [-18.0, -9.5, -9.0, -10.5, -11.5, -13.5, -4.5],
        [-27.0, -15.0, -14.5, -17.5, -19.0, -21.5, -12.5],
    ]
)
_MISSING: Final[dict[str, float]] = {
    "sentinel2": 0,
    "sentinel1": -math.inf,
    "canopy_height_eth": 255,
    "sentinel2_cloudmask": 65535,
    "sentinel2_cloudprod": 65535,
}


@dataclass(frozen=True, slots=True)
class _Tile:
    """One tile before it is written."""

    arrays: Arrays
    info: dict[str, Any]


def write_mmearth(
    folder: str | os.PathLike[str],
    n: int = 64,
    size: int = 64,
    seed: int = 0,
    name: str = "sample",
) -> Path:
    """Write made-up tiles as MMEarth is published: an HDF5 file and three JSON files beside it.

    Half of the landscapes are Level-1C, half Level-2A. Of eight tiles, one has a stripe without
    Sentinel-2 data, one no descending Sentinel-1 pass, one HH and HV instead of VV and VH, one
    unknown canopy heights, one unknown land cover, and one an unknown precipitation.

    Args:
        folder: Where to write; created if need be.
        n: Number of tiles.
        size: Side of a tile in px of 10 m, at least 32; the published sets have 64 and 128.
        seed: Which tiles; the same numbers give the same arrays.
        name: Of the set: ``<name>.h5``, ``<name>_splits.json`` and so on.

    Returns:
        The HDF5 file.

    Raises:
        PixelError: `n`, `size` or `seed` is out of its range, or `name` is no plain file name.
        MissingExtraError: h5py is not installed.
    """
    if n < 1 or size < _MIN_SIDE or seed < 0:
        raise PixelError(
            f"{n} tiles of {size} px with seed {seed}: expected at least 1 tile of at least "
            f"{_MIN_SIDE} px and a seed of at least 0"
        )
    if Path(name).name != name or name in ("", ".", ".."):
        raise PixelError(f"name is {name!r}; expected a file name without folder and ending")
    h5py = import_h5py()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiles = _tiles(n, size, seed)
    arrays = {key: np.stack([tile.arrays[key] for tile in tiles]) for key in tiles[0].arrays}
    ids = [f"{seed}_{index:06d}" for index in range(n)]
    levels = np.array([tile.info["S2_type"] for tile in tiles])
    path = folder / f"{name}.h5"
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            _store(file, key, values)
        kinds = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
        _store(file, "metadata", np.array(list(zip(ids, levels, strict=True)), kinds))
    contents = {
        "splits": _splits(n, seed),
        "band_stats": _statistics(arrays, levels),
        "tile_info": {key: tile.info for key, tile in zip(ids, tiles, strict=True)},
    }
    for suffix, content in contents.items():
        (folder / f"{name}_{suffix}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def _store(file: Any, key: str, values: NDArray[Any]) -> None:
    """Write an array as the published files hold it: a compressed chunk for each tile."""
    chunk = (1, *values.shape[1:])
    file.create_dataset(key, data=values, chunks=chunk, compression="gzip")


def _tiles(n: int, size: int, seed: int) -> list[_Tile]:
    """Tiles cut from landscapes of up to 4 x 4 tiles, each of its own place, level and date."""
    side = min(max(math.ceil(math.sqrt(n / 4)), 1), 4)
    made: list[_Tile] = []
    for sheet in range(math.ceil(n / side**2)):
        rng = np.random.default_rng([seed, 11, sheet])
        made += _sheet(rng, "L1C" if sheet % 2 else "L2A", side, size, len(made))
    return made[:n]


def _sheet(rng: np.random.Generator, level: str, side: int, size: int, first: int) -> list[_Tile]:
    day = int(rng.integers(90, 290))
    shape = (side * size, side * size)
    scene = landscape(shape, int(rng.integers(2**31)), day, level)
    elevation, slope = _relief(rng, shape)
    cover = scene.land_cover
    pixels = np.zeros((len(_STORED), *shape), np.uint16)
    for channel, band in enumerate(scene.bands):
        pixels[_STORED.index(band)] = scene.pixels[channel]
    height = _HEIGHT[cover] * (0.8 + 0.4 * rng.random(shape))
    l2a = level == "L2A"
    cloud = np.where(rng.random(shape) < 0.02, rng.integers(1, 60, shape), 0)
    maps: Arrays = {
        "sentinel2": pixels,
        "sentinel2_cloudmask": np.where(cloud > 50, 1024, 0)[None].astype(np.uint16),
        "sentinel2_cloudprod": (cloud if l2a else np.full(shape, 65535))[None].astype(np.uint16),
        "sentinel2_scl": (_SCENE_CLASS[cover] if l2a else np.full(shape, 255))[None].astype("u1"),
        "sentinel1": _radar(rng, cover),
        "aster": np.round(np.stack([elevation, slope])).astype(np.int16),
        "dynamic_world": _DYNAMIC_WORLD[cover][None],
        "canopy_height_eth": np.round(np.stack([height, 1.0 + 0.2 * height])).astype(np.uint8),
        "esa_worldcover": _WORLD_COVER[cover][None],
    }
    tiles = []
    for number in range(side * side):
        top, left = (size * k for k in divmod(number, side))
        cut = {key: a[:, top : top + size, left : left + size].copy() for key, a in maps.items()}
        point, info = _place(rng, scene.date, level, float(cut["aster"][0].mean()))
        tile = _Tile({**cut, **point}, info)
        _leave_out(tile, (first + number) % 8, rng)
        tiles.append(tile)
    return tiles


def _relief(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """Elevation in metres and slope in degrees: a few long waves."""
    y, x = np.mgrid[: shape[0], : shape[1]] * _METRES
    elevation = np.full(shape, rng.uniform(50.0, 900.0))
    for length in (4000.0, 1500.0, 600.0):
        angle, phase = rng.uniform(0.0, 2 * math.pi, 2)
        along = x * math.cos(angle) + y * math.sin(angle)
        elevation += 0.02 * length * np.sin(2 * math.pi * along / length + phase)
    down, right = np.gradient(elevation, _METRES)
    return elevation, np.degrees(np.arctan(np.hypot(down, right)))


def _radar(rng: np.random.Generator, cover: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Backscatter in dB of the ascending and the descending pass, with speckle of five looks."""
    shape = (8, *cover.shape)
    speckle = 10.0 * np.log10(rng.standard_gamma(5.0, shape, np.float32) / np.float32(5.0))
    backscatter: Floats = np.tile(_BACKSCATTER, (2, 1))[:, cover] + speckle
    return backscatter.astype(np.float32)


def _place(
    rng: np.random.Generator, date: datetime.date, level: str, elevation: float
) -> tuple[Arrays, dict[str, Any]]:
    """What is one value a tile, as arrays and as entries of the tile's information."""
    latitude, longitude = float(rng.uniform(-55.0, 70.0)), float(rng.uniform(-180.0, 180.0))
    biome, eco_region = int(rng.integers(_BIOMES)), int(rng.integers(_ECO_REGIONS))
    era5 = _climate(rng, latitude, date.month, elevation)
    year = 2 * math.pi * date.month / 12
    arrays: Arrays = {
        "era5": np.array(era5, np.float32),
        "lat": _circle(math.radians(latitude)),
        "lon": _circle(math.radians(longitude)),
        "month": _circle(year),
        "biome": np.eye(1, _BIOMES, biome, np.uint8)[0],
        "eco_region": np.eye(1, _ECO_REGIONS, eco_region, np.uint16)[0],
    }
    masks = ["MSK_CLDPRB", "SCL"] if level == "L2A" else []
    absent = "B10" if level == "L2A" else ""
    info = {
        "S2_type": level.lower(),
        "S2_DATE": date.isoformat(),
        "lat": latitude,
        "lon": longitude,
        "CRS": "EPSG:32632",
        "biome": biome,
        "eco_region": eco_region,
        "era5": {"month1": era5[:4], "month2": era5[4:8], "year": era5[8:]},
        "BANDS": {
            "sentinel2": [*(band for band in _STORED if band != absent), "QA60", *masks],
            "sentinel1_asc": ["VV", "VH"],
            "sentinel1_desc": ["VV", "VH"],
            "aster": ["elevation", "slope"],
            "dynamic_world": ["label"],
            "canopy_height_eth": ["height", "std"],
            "esa_worldcover": ["Map"],
        },
        "source": "generated by geofm.datasets.mmearth_samples, not an observation",
    }
    return arrays, info


def _circle(angle: float) -> NDArray[np.float32]:
    return np.array([math.sin(angle), math.cos(angle)], np.float32)


def _climate(
    rng: np.random.Generator, latitude: float, month: int, elevation: float
) -> list[float]:
    """ERA5's twelve values: K and m, for the month before, the month and the year."""
    mean = 301.0 - 0.5 * abs(latitude) - 0.0065 * elevation + rng.normal(0.0, 1.0)
    swing = 0.35 * latitude
    rain = float(rng.gamma(2.0, 0.03))
    values: list[float] = []
    for step in (month - 1, month):
        now = mean - swing * math.cos(2 * math.pi * (step - 1) / 12)
        values += [now, now - 8.0, now + 9.0, rain * float(rng.uniform(0.5, 1.5))]
    return [*values, mean, mean - abs(swing) - 12.0, mean + abs(swing) + 12.0, 12 * rain]


def _leave_out(tile: _Tile, kind: int, rng: np.random.Generator) -> None:
    """Take away what a tile of this kind lacks, as real ones do."""
    arrays, bands = tile.arrays, tile.info["BANDS"]
    size = arrays["sentinel2"].shape[-1]
    # Only tiles at high latitudes have HH and HV.
    polar = kind == 3
    absent = [0, 1, 4, 5] if polar else [2, 3, 6, 7]
    arrays["sentinel1"][absent] = -np.inf
    if polar:
        bands["sentinel1_asc"] = bands["sentinel1_desc"] = ["HH", "HV"]
    start = int(rng.integers(size - 8))
    stripe = np.s_[:, :, start : start + 8]
    if kind == 1:
        arrays["sentinel2"][stripe] = 0
    elif kind == 2:
        arrays["sentinel1"][4:] = -np.inf
        bands["sentinel1_desc"] = None
    elif kind == 4:
        arrays["canopy_height_eth"][stripe] = 255
    elif kind == 5:
        arrays["dynamic_world"][stripe] = 0
        arrays["esa_worldcover"][stripe] = 0
    elif kind == 6:
        arrays["era5"][3] = np.nan
        tile.info["era5"]["month1"][3] = None


def _splits(n: int, seed: int) -> dict[str, list[int]]:
    order = np.random.default_rng([seed, 12]).permutation(n).tolist()
    held_out = max(round(0.1 * n), 1) if n > 2 else 0
    kept = n - 2 * held_out
    return {
        "train": order[:kept],
        "val": order[kept : kept + held_out],
        "test": order[kept + held_out :],
    }


def _statistics(arrays: Mapping[str, NDArray[Any]], levels: NDArray[Any]) -> dict[str, Any]:
    """Mean, deviation and range of every channel, as the published file lists them."""
    content = {}
    for key in ("aster", "canopy_height_eth", "era5", "lat", "lon", "month", "sentinel1"):
        content[key] = _describe(arrays[key], _MISSING.get(key))
    for key in ("sentinel2", "sentinel2_cloudmask", "sentinel2_cloudprod"):
        for level in ("l2a", "l1c"):
            content[f"{key}_{level}"] = _describe(arrays[key][levels == level], _MISSING[key])
    return content


def _describe(values: NDArray[Any], missing: float | None) -> dict[str, list[float]]:
    """A channel without values has NaN and infinities, as in the published files."""
    content: dict[str, list[float]] = {"mean": [], "std": [], "min": [], "max": []}
    for channel in range(values.shape[1]):
        valid = values[:, channel].astype(np.float64).ravel()
        valid = valid[np.isfinite(valid) & (valid != missing)]
        # A deviation of 0 could not be divided by; it takes sets of a single tile.
        std = float(valid.std()) or 1.0 if valid.size else math.nan
        content["mean"].append(float(valid.mean()) if valid.size else math.nan)
        content["std"].append(std)
        content["min"].append(float(valid.min(initial=math.inf)))
        content["max"].append(float(valid.max(initial=-math.inf)))
    return content
