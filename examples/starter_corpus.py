"""Turn small public pieces of Sentinel-2 data into one training set in MMEarth's format.

    python examples/starter_corpus.py DATA OUT [--report]

DATA holds the pieces with a MANIFEST.json that gives each file's licence and sha256. OUT receives
``starter.h5`` with its splits, band statistics and tile information as MMEarth publishes them, and
``starter_sources.json``, the table that is also printed. ``--report`` adds each source's mean per
band, to be compared with the statistics.

What is done to the pixels, and no more: bands are put in MMEarth's order by name; bands of 20 m and
60 m are brought to the 10 m grid by nearest neighbour, which is what Earth Engine did for MMEarth;
scenes are cut into tiles of 64 x 64 px, one about every 32 px. L2A has no B10: it is stored as 0,
no data. Months and places come from dates and georeferences where the files have them, else NaN.
The statistics are MMEarth's own, so that a model takes the same input scale as published ones.

EuroSAT tiles of odd number are the test set of the starter weights: they are never opened here.
Share-alike files are refused.
"""

import argparse
import datetime
import fnmatch
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import rasterio
from rasterio import Affine
from rasterio.transform import xy
from rasterio.warp import transform as to_crs

STORED = "B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12".split()
L2A = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split()
L1C = "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12".split()
EUROSAT = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A".split()
# Without B10, which no encoder takes.
FEWEST_BANDS = 10
SIDE, STRIDE = 64, 32
# Products processed after this day may carry 1000 DN on top.
OFFSET_SINCE = datetime.date(2022, 1, 25)
OFFSET_DN = 1000

LEFT_OUT = {
    "major_tom": "CC-BY-SA-4.0: share-alike",
    "worldcereal": "9 of 12 bands (no B1, B8A, B9); the Parquet tables are points",
    "s1s2era5_series": "17 x 17 px, less than a tile; one of the two also CC-BY-SA-4.0",
    "treesatai_ts": "6 x 6 px, less than a tile; the aerial images are no Sentinel-2",
    "eurosat_rgb": "3 bands, 8 bit, and holds the tiles of the test set",
    "dea_crop_mask": "points",
    "presto_evals": "points",
    "globalgeotree": "coordinates only",
}

# How often each of EuroSAT's tiles is listed for training.
EUROSAT_TIMES = 4


@dataclass
class Archive:
    """Files of DATA, each checked for its licence and hash before it is read."""

    folder: Path
    entries: dict[str, dict[str, Any]] = field(init=False)
    used: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = json.loads((self.folder / "MANIFEST.json").read_text())
        self.entries = {row["file"]: row for row in rows}

    def files(self, pattern: str) -> list[Path]:
        """Files of the manifest that match (* also spans folders), sorted; none is an error."""
        names = fnmatch.filter(self.entries, pattern)
        found = [self.folder / name for name in sorted(names)]
        if not found:
            raise SystemExit(f"{self.folder} has no {pattern}")
        return found

    def use(self, path: Path) -> Path:
        name = path.relative_to(self.folder).as_posix()
        entry = self.entries[name]
        if re.search(r"\bSA\b|share.?alike", entry["licence"], re.IGNORECASE):
            raise SystemExit(f"{name} is {entry['licence']}: share-alike files are left out")
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise SystemExit(f"{name} is not the file of the manifest: its sha256 differs")
        self.used[name] = entry
        return path

    def raster(self, path: Path) -> tuple[np.ndarray, Affine, Any]:
        """Pixels (bands, H, W), transform and coordinate reference system."""
        with rasterio.open(self.use(path)) as file:
            return file.read(), file.transform, file.crs


@dataclass
class Scene:
    """One image in MMEarth's bands and what is known about it.

    Attributes:
        name: Beginning of its tiles' ids.
        level: ``"l1c"`` or ``"l2a"``.
        pixels: (13, H, W) DN, uint16, in the order of `STORED`; 0 where there is no data.
        bands: Those that the source has.
        transform: From pixels to `crs`; None where the place is not known.
        sentinel1: (8, H, W) dB, float32; -inf where there is no data.
        terrain: (2, H, W) elevation in metres and slope in degrees, float32.
    """

    name: str
    level: str
    pixels: np.ndarray
    bands: list[str]
    transform: Affine | None = None
    crs: Any = None
    date: datetime.date | None = None
    sentinel1: np.ndarray | None = None
    terrain: np.ndarray | None = None


@dataclass
class Tile:
    """A piece of a scene."""

    id: str
    source: str
    scene: Scene
    rows: slice
    columns: slice

    def cut(self, layer: np.ndarray) -> np.ndarray:
        return layer[:, self.rows, self.columns]

    def place(self) -> tuple[float, float] | None:
        """Latitude and longitude of the centre, degrees."""
        if self.scene.transform is None:
            return None
        row, column = self.rows.start + SIDE / 2, self.columns.start + SIDE / 2
        x, y = xy(self.scene.transform, [row], [column], offset="ul")
        longitude, latitude = to_crs(self.scene.crs, "EPSG:4326", x, y)
        return latitude[0], longitude[0]


def in_stored_order(named: Mapping[str, np.ndarray], where: str) -> tuple[np.ndarray, list[str]]:
    """Bands by name, each (H, W) DN, to (13, H, W) uint16 and the names that are there."""
    present = [band for band in STORED if band in named]
    if len([band for band in present if band != "B10"]) < FEWEST_BANDS:
        raise SystemExit(f"{where} has only {', '.join(present)}: {FEWEST_BANDS} bands are needed")
    out = np.zeros((len(STORED), *named[present[0]].shape), np.uint16)
    for band in present:
        layer = np.rint(named[band])
        # So that NaN is refused too.
        if not (layer.min() >= 0 and layer.max() <= np.iinfo(np.uint16).max):
            raise SystemExit(f"{where}, {band}: {layer.min()} to {layer.max()} are no DN")
        out[STORED.index(band)] = layer
    return out, present


def nearest(source: Affine, length: int, target: Affine, count: int, axis: int) -> np.ndarray:
    """For each of `count` target pixels along an axis (0 rows, 1 columns) the nearest source pixel.

    A number outside 0 … length - 1 means that the source does not reach there.
    """
    step, start = ("e", "f") if axis == 0 else ("a", "c")
    position = getattr(target, start) + (np.arange(count) + 0.5) * getattr(target, step)
    return np.floor((position - getattr(source, start)) / getattr(source, step)).astype(int)


def resample(
    layer: np.ndarray, source: Affine, target: Affine, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A layer (H, W) on another grid by nearest neighbour.

    Returns:
        The layer, and which rows and which columns the source reaches.
    """
    rows = nearest(source, layer.shape[0], target, shape[0], 0)
    columns = nearest(source, layer.shape[1], target, shape[1], 1)
    inside_rows = (rows >= 0) & (rows < layer.shape[0])
    inside_columns = (columns >= 0) & (columns < layer.shape[1])
    rows, columns = rows.clip(0, layer.shape[0] - 1), columns.clip(0, layer.shape[1] - 1)
    return layer[np.ix_(rows, columns)], inside_rows, inside_columns


def band_files(archive: Archive, files: Mapping[str, Path], **known: Any) -> Scene:
    """A scene with one file a band, at 10, 20 or 60 m; cut to where all bands are."""
    images = {band: archive.raster(path) for band, path in files.items()}
    (_, height, width), transform, crs = images["B2"][0].shape, images["B2"][1], images["B2"][2]
    named, in_rows, in_columns = {}, np.ones(height, bool), np.ones(width, bool)
    for band, (pixels, own, own_crs) in images.items():
        if own_crs != crs:
            raise SystemExit(f"{files[band]} is in {own_crs}, its B2 in {crs}")
        named[band], rows, columns = resample(pixels[0], own, transform, (height, width))
        in_rows &= rows
        in_columns &= columns
    pixels, present = in_stored_order(named, known["name"])
    top, left = int(in_rows.argmax()), int(in_columns.argmax())
    pixels = pixels[:, in_rows][:, :, in_columns]
    a, b, c, d, e, f = transform[:6]
    moved = Affine(a, b, c + left * a, d, e, f + top * e)
    return Scene(pixels=pixels, bands=present, transform=moved, crs=crs, **known)


def stack_file(archive: Archive, path: Path, bands: list[str], **known: Any) -> Scene:
    """A scene with all bands in one file."""
    stack, transform, crs = archive.raster(path)
    named = dict(zip(bands, stack, strict=True))
    pixels, present = in_stored_order(named, path.name)
    return Scene(pixels=pixels, bands=present, transform=transform, crs=crs, **known)


def day(text: str) -> datetime.date:
    """The first date in a name, as 2020-01-13 or 20200113."""
    found = re.search(r"(20\d\d)-?(\d\d)-?(\d\d)", text)
    if found is None:
        raise SystemExit(f"{text} has no date")
    return datetime.date(*map(int, found.groups()))


# ---------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------


def patches(archive: Archive) -> Iterator[Scene]:
    for path in archive.files("s2_l2a_patches/*.npz"):
        with np.load(archive.use(path), allow_pickle=False) as file:
            for name, image in zip(file["names"], file["images"], strict=True):
                pixels, present = in_stored_order(dict(zip(L2A, image, strict=True)), str(name))
                yield Scene(f"patch_{name}", "l2a", pixels, present)


def is_held_out(path: Path) -> bool:
    """Whether an EuroSAT tile is of the test set: its number is odd."""
    return int(path.stem.rsplit("_", 1)[1]) % 2 == 1


def eurosat(archive: Archive) -> Iterator[Scene]:
    for path in archive.files("eurosat_ms_200/*.tif"):
        if not is_held_out(path):
            yield stack_file(archive, path, EUROSAT, name=f"eurosat_{path.stem}", level="l1c")


def eotdl(archive: Archive) -> Iterator[Scene]:
    for path in archive.files("s2_scenes/eotdl_*"):
        date = None if "roads" in path.stem else day(path.stem)
        yield stack_file(archive, path, L2A, name=path.stem, level="l2a", date=date)


def copernicus_fm(archive: Archive) -> Iterator[Scene]:
    for path in archive.files("s2_scenes/copernicusfm_*_L1C.tif"):
        name = path.stem
        yield stack_file(archive, path, L1C, name=name, level="l1c", date=day(name))


def radar(archive: Archive, scene: Scene) -> np.ndarray:
    """Sentinel-1 of the pass nearest in time on the scene's grid, (8, H, W) dB.

    Satellites that pass at six in the evening, local time, fly north.
    """
    passes = {path.parent for path in archive.files("ssl4eo_s12/s1/*.tif")}
    nearest_pass = min(sorted(passes), key=lambda path: abs(day(path.name) - scene.date))
    found = re.search(r"\dT(\d\d)(\d\d)\d\d_", nearest_pass.name)
    hour = int(found[1]) + int(found[2]) / 60 + scene.transform.c / 15
    first = 0 if hour % 24 >= 12 else 4  # ascending before descending
    out = np.full((8, *scene.pixels.shape[1:]), -np.inf, np.float32)
    for number, name in enumerate(("VV", "VH")):
        pixels, transform, crs = archive.raster(nearest_pass / f"{name}.tif")
        if crs != scene.crs:
            raise SystemExit(f"{nearest_pass} is in {crs}, Sentinel-2 in {scene.crs}")
        layer, rows, columns = resample(pixels[0], transform, scene.transform, out.shape[1:])
        known = rows[:, None] & columns & np.isfinite(layer)
        out[first + number] = np.where(known, layer, -np.inf)
    return out


def ssl4eo(archive: Archive) -> Iterator[Scene]:
    for product, level in (("s2c", "l1c"), ("s2a", "l2a")):
        paths = archive.files(f"ssl4eo_s12/{product}/*.tif")
        for folder in sorted({path.parent for path in paths}):
            files = {path.stem: path for path in paths if path.parent == folder}
            name = f"ssl4eo_{folder.parent.name}_{level}_{folder.name[:8]}"
            scene = band_files(archive, files, name=name, level=level, date=day(folder.name))
            scene.sentinel1 = radar(archive, scene)
            yield scene


def bigearthnet(archive: Archive) -> Iterator[Scene]:
    paths = archive.files("bigearthnet/*.tif")
    for name in sorted({path.stem.rsplit("_", 1)[0] for path in paths}):
        files = {
            # B02 is B2 here, B8A is itself.
            path.stem.rsplit("_", 1)[1].replace("B0", "B"): path
            for path in paths
            if path.stem.rsplit("_", 1)[0] == name
        }
        yield band_files(archive, files, name=f"bigearthnet_{name}", level="l2a", date=day(name))


def eo_learn(archive: Archive) -> Iterator[Scene]:
    folder = archive.folder / "eolearn_testpatch"

    def load(name: str) -> np.ndarray:
        return np.load(archive.use(folder / name), allow_pickle=False)

    scenes = load("REFERENCE_SCENES.npy").transpose(0, 3, 1, 2)  # reflectance
    box = json.loads(archive.use(folder / "bbox.geojson").read_text())
    (left, bottom), (right, top) = (
        np.min(box["coordinates"], 1)[0],
        np.max(box["coordinates"], 1)[0],
    )
    height, width = scenes.shape[2:]
    transform = rasterio.transform.from_bounds(left, bottom, right, top, width, height)
    crs = rasterio.crs.CRS.from_user_input(box["crs"]["properties"]["name"])
    elevation = load("data_timeless/DEM.npy")[..., 0]
    rise = np.gradient(elevation, -transform.e, transform.a)
    terrain = np.stack([elevation, np.degrees(np.arctan(np.hypot(*rise)))]).astype(np.float32)
    # The scenes have no dates, but the NDVI of all dates tells which they are.
    days = json.loads(archive.use(folder / "timestamps.json").read_text())
    index = load("data/NDVI.npy")[..., 0]
    for image in scenes:
        named = dict(zip(L1C, image, strict=True))
        ndvi = (named["B8"] - named["B4"]) / (named["B8"] + named["B4"])
        difference = np.abs(index - ndvi).mean((1, 2))
        if difference.min() > 1e-4:
            raise SystemExit("no date of eolearn_testpatch has a reference scene's NDVI")
        date = day(days[int(difference.argmin())])
        dn = {band: layer * 10_000 for band, layer in named.items()}
        pixels, present = in_stored_order(dn, "eolearn_testpatch")
        known = {"date": date, "terrain": terrain, "transform": transform, "crs": crs}
        yield Scene(f"eolearn_{date}", "l1c", pixels, present, **known)


# Name, how its files begin, and what reads it.
SOURCES: dict[str, tuple[str, Callable[[Archive], Iterator[Scene]]]] = {
    "s2_l2a_patches": ("s2_l2a_patches/", patches),
    "eurosat_ms (even numbers)": ("eurosat_ms_200/", eurosat),
    "eotdl": ("s2_scenes/eotdl_", eotdl),
    "copernicus_fm": ("s2_scenes/copernicusfm_", copernicus_fm),
    "ssl4eo_s12": ("ssl4eo_s12/", ssl4eo),
    "bigearthnet": ("bigearthnet/", bigearthnet),
    "eolearn_testpatch": ("eolearn_testpatch/", eo_learn),
}

# ---------------------------------------------------------------------------------------------
# Tiles, table and files
# ---------------------------------------------------------------------------------------------


def starts(length: int) -> list[int]:
    """Where tiles begin so that they cover a side, about `STRIDE` apart."""
    steps = round((length - SIDE) / STRIDE)
    return np.linspace(0, length - SIDE, steps + 1).round().astype(int).tolist()


def check_offset(scene: Scene) -> None:
    """Refuse a scene that may carry the offset of baseline 04.00: no pixel is below it."""
    dated = scene.date is not None and scene.date < OFFSET_SINCE
    darkest = scene.pixels[scene.pixels > 0].min()
    if not dated and darkest >= OFFSET_DN:
        raise SystemExit(f"{scene.name}: nothing darker than {darkest} DN; is the offset still in?")


def read_tiles(archive: Archive) -> list[Tile]:
    tiles = []
    for source, (_, read) in SOURCES.items():
        for scene in read(archive):
            check_offset(scene)
            _, height, width = scene.pixels.shape
            places = [(top, left) for top in starts(height) for left in starts(width)]
            for top, left in places:
                name = scene.name if len(places) == 1 else f"{scene.name}_{top}_{left}"
                tiles.append(
                    Tile(name, source, scene, slice(top, top + SIDE), slice(left, left + SIDE))
                )
    assert len({tile.id for tile in tiles}) == len(tiles), "two tiles have one id"
    opened = [Path(name) for name in archive.used if name.startswith("eurosat_ms_200/")]
    assert opened and not any(map(is_held_out, opened)), "a tile of the test set was opened"
    return tiles


def circle(degrees: float | None) -> tuple[float, float]:
    """Sine and cosine of an angle; NaN if it is not known."""
    angle = math.nan if degrees is None else math.radians(degrees)
    return math.sin(angle), math.cos(angle)


def tile_info(tile: Tile) -> dict[str, Any]:
    place, scene = tile.place(), tile.scene
    bands: dict[str, list[str] | None] = {"sentinel2": scene.bands}
    if scene.sentinel1 is not None:
        for first, orbit in ((0, "asc"), (4, "desc")):
            known = np.isfinite(scene.sentinel1[first]).any()
            bands[f"sentinel1_{orbit}"] = ["VV", "VH"] if known else None
    if scene.terrain is not None:
        bands["aster"] = ["elevation", "slope"]
    return {
        "S2_type": scene.level,
        "S2_DATE": None if scene.date is None else scene.date.isoformat(),
        "lat": None if place is None else place[0],
        "lon": None if place is None else place[1],
        "BANDS": bands,
        "source": tile.source,
    }


def write(tiles: list[Tile], out: Path, statistics: Path) -> None:
    """The four files of a set in MMEarth's format."""
    count, square = len(tiles), (SIDE, SIDE)
    infos = {tile.id: tile_info(tile) for tile in tiles}
    with h5py.File(out / "starter.h5", "w") as file:

        def array(name: str, bands: int, dtype: str, missing: float) -> Any:
            # Neither compressed nor in chunks: the set is small, and this is read fastest.
            return file.create_dataset(name, (count, bands, *square), dtype, fillvalue=missing)

        sentinel2 = array("sentinel2", 13, "uint16", 0)
        sentinel1 = array("sentinel1", 8, "float32", -np.inf)
        # The lowest int16 stands for -inf, which an integer cannot be.
        aster = array("aster", 2, "int16", np.iinfo(np.int16).min)
        vectors = {name: np.empty((count, 2), np.float32) for name in ("lat", "lon", "month")}
        for row, tile in enumerate(tiles):
            scene, info = tile.scene, infos[tile.id]
            sentinel2[row] = tile.cut(scene.pixels)
            if scene.sentinel1 is not None:
                sentinel1[row] = tile.cut(scene.sentinel1)
            if scene.terrain is not None:
                aster[row] = np.rint(tile.cut(scene.terrain))
            vectors["lat"][row] = circle(info["lat"])
            vectors["lon"][row] = circle(info["lon"])
            vectors["month"][row] = circle(None if scene.date is None else scene.date.month * 30.0)
        for name, values in vectors.items():
            file[name] = values
        kind = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
        rows = [(tile.id.encode(), tile.scene.level.encode()) for tile in tiles]
        file["metadata"] = np.array(rows, kind)
    save(out / "starter_splits.json", splits(tiles))
    save(out / "starter_tile_info.json", infos)
    shutil.copyfile(statistics, out / "starter_band_stats.json")


def splits(tiles: list[Tile]) -> dict[str, list[int]]:
    """Every twentieth patch is for watching the loss: patches do not overlap as cut tiles do.

    EuroSAT's tiles are listed `EUROSAT_TIMES` times: each shows another place, while those cut from
    one scene repeat it.
    """
    alone = [row for row, tile in enumerate(tiles) if tile.source == "s2_l2a_patches"]
    val = alone[::20]
    train = sorted(set(range(len(tiles))) - set(val))
    times = [EUROSAT_TIMES if tiles[row].source.startswith("eurosat") else 1 for row in train]
    return {
        "train": [row for row, n in zip(train, times, strict=True) for _ in range(n)],
        "val": val,
    }


def save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def table(tiles: list[Tile], archive: Archive) -> list[dict[str, Any]]:
    """A row for each source: what it gives, and under which licence."""
    rows = []
    for source, (begins, _) in SOURCES.items():
        own = [tile for tile in tiles if tile.source == source]
        scenes = {tile.scene.name: tile.scene for tile in own}.values()
        used = {name: entry for name, entry in archive.used.items() if name.startswith(begins)}
        rows.append(
            {
                "source": source,
                "tiles": len(own),
                "images": len(scenes),
                "level": "+".join(sorted({scene.level for scene in scenes})),
                "bands": "+".join(sorted({str(len(scene.bands)) for scene in scenes})),
                "sentinel1": sum(tile.scene.sentinel1 is not None for tile in own),
                "elevation": sum(tile.scene.terrain is not None for tile in own),
                "month": sum(tile.scene.date is not None for tile in own),
                "place": sum(tile.scene.transform is not None for tile in own),
                "licence": "; ".join(sorted({entry["licence"] for entry in used.values()})),
                "files": {name: entry["sha256"] for name, entry in used.items()},
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], tiles: list[Tile]) -> None:
    names = [name for name in rows[0] if name != "files"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in names)} |")
    levels = {level: sum(t.scene.level == level for t in tiles) for level in ("l1c", "l2a")}
    print(f"\n{len(tiles)} tiles, {levels['l1c']} L1C and {levels['l2a']} L2A. Left out:")
    for folder, reason in LEFT_OUT.items():
        print(f"* {folder}: {reason}")


def report(tiles: list[Tile], out: Path) -> None:
    """Means per band of each source; a wrong unit or order shows in the distance in brackets."""
    statistics = json.loads((out / "starter_band_stats.json").read_text())
    print("\nMean DN per band, and in brackets by how many standard deviations it is off")
    for source, level in itertools.product(SOURCES, ("l1c", "l2a")):
        own = [tile for tile in tiles if (tile.source, tile.scene.level) == (source, level)]
        if not own:
            continue
        pixels = np.stack([tile.cut(tile.scene.pixels) for tile in own]).swapaxes(0, 1)
        numbers = statistics[f"sentinel2_{level}"]
        words = []
        for band, layer, mean, std in zip(
            STORED, pixels, numbers["mean"], numbers["std"], strict=True
        ):
            if layer.any():
                value = layer[layer > 0].mean()
                words.append(f"{band} {value:.0f} ({(value - mean) / std:+.1f})")
        print(f"* {source}, {level}, {len(own)} tiles: {', '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with MANIFEST.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", action="store_true", help="mean DN of each source")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    archive = Archive(args.data)
    tiles = read_tiles(archive)
    [statistics] = archive.files("mmearth_band_stats/data_1M_v001_64_band_stats.json")
    write(tiles, args.out, archive.use(statistics))
    rows = table(tiles, archive)
    save(args.out / "starter_sources.json", {"sources": rows, "left_out": LEFT_OUT})
    print_table(rows, tiles)
    if args.report:
        report(tiles, args.out)


if __name__ == "__main__":
    main()
