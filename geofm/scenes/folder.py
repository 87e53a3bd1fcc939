"""A folder with one file a band."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from geofm.errors import BandError, DataNotFoundError, RasterError
from geofm.scenes.files import Layer, layers_of
from geofm.scenes.grids import Request, assemble
from geofm.scenes.names import facts_of_name
from geofm.scenes.scene import SCL, Scene
from geofm.spectral import Sensor

__all__ = ["open_folder", "open_pattern"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".tif", ".tiff", ".jp2")
_BREAK = re.compile(r"[_\-. ]+")
_RESOLUTION = re.compile(r"(\d+)m$", re.IGNORECASE)
_CLASSES = ("scl", "cloud_mask", "cloudmask")


def open_folder(folder: Path, request: Request) -> Scene:
    """Open a folder with one file a band, named by band: ``B02.tif``, ``..._B8A_20m.jp2``.

    Args:
        folder: The folder.
        request: What the caller says.

    Returns:
        The scene.

    Raises:
        BandError: No file, or more than one, is named as a band.
        RasterError: There are several scenes.
        GeofmError: As of `geofm.scenes.grids.assemble`.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        inner = sorted(p.name for p in folder.iterdir() if p.is_dir())
        hint = f" Open one of the folders in it: {_few(inner)}" if inner else ""
        raise DataNotFoundError(f"{folder} has no .tif or .jp2 files.{hint}")
    return _open_files(files, folder, request)


def open_pattern(pattern: Path, request: Request) -> Scene:
    """Open the files of a folder that match a pattern, one a band.

    Args:
        pattern: A path whose last part has ``*`` or ``?``.
        request: What the caller says.

    Returns:
        The scene.

    Raises:
        DataNotFoundError: No file matches.
        GeofmError: As of `open_folder`.
    """
    folder = pattern.parent
    if not folder.is_dir():
        raise DataNotFoundError(f"there is no folder {folder}")
    files = sorted(
        path
        for path in folder.iterdir()
        if fnmatch.fnmatchcase(path.name, pattern.name)
        and path.suffix.lower() in _SUFFIXES
        and path.is_file()
    )
    if not files:
        raise DataNotFoundError(f"no .tif or .jp2 file matches {pattern}")
    return _open_files(files, folder, request)


def _open_files(files: Sequence[Path], folder: Path, request: Request) -> Scene:
    scenes: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    classes: dict[str, Path] = {}
    others = []
    for path in files:
        name, rest = _band_in(path.stem, request.sensor)
        if name:
            scenes[rest][name].append(path)
        elif rest:
            classes[path.stem.lower()] = path
        else:
            others.append(path.name)
    if not scenes:
        raise BandError(
            f"no file of {folder} is named as a band of {request.sensor.name} (B02.tif, "
            f"..._B8A_20m.jp2); there are {_few(others)}. Give a stacked file by its own path"
        )
    if len(scenes) > 1:
        first = min(scenes)
        raise RasterError(
            f"{folder} has the files of {len(scenes)} scenes: {_few(sorted(scenes))}. Open one "
            f"by a pattern: {str(folder / (first or 'B')) + '*'!r}"
        )
    if others:
        logger.info("%s: not named as bands and left out: %s", folder, _few(others))
    (key, found), *_ = scenes.items()
    facts = facts_of_name(key).filled(facts_of_name(folder.name))
    wanted = None
    if request.bands is not None:
        wanted = {band.name for band in request.sensor.select(request.bands)}
    layers = {}
    for name, paths in found.items():
        if wanted is None or name in wanted:
            layers[name] = _single(_finest(name, paths))
    # Sentinel-2's own classification rather than another's.
    chosen = min(classes.items(), key=lambda each: "scl" not in each[0], default=None)
    if chosen is None:
        return assemble(layers, facts, request, str(folder))
    kind = SCL if "scl" in chosen[0] else "cloud_mask"
    return assemble(layers, facts, request, str(folder), _single(chosen[1]), kind)


def _band_in(stem: str, sensor: Sensor) -> tuple[str, str]:
    """The band a file is named after, and the rest of its name; or "" and what it is instead."""
    parts = _BREAK.split(stem)
    # Numbered names only: "red" or "nir" may be a word of a title.
    found = [
        (i, band.name)
        for i, part in enumerate(parts)
        if re.fullmatch(r"(?:SR_)?B\d{1,2}A?", part.upper()) and (band := sensor.find(part))
    ]
    if len(found) == 1:
        position, name = found[0]
        rest = [p for i, p in enumerate(parts) if i != position and not _RESOLUTION.match(p)]
        return name, "_".join(rest)
    if not found and (parts[-1].lower() in _CLASSES or _is_classes(stem)):
        return "", "classes"
    return "", ""


def _is_classes(stem: str) -> bool:
    stem = re.sub(r"_\d+m$", "", stem.lower())
    return any(stem == name or stem.endswith(f"_{name}") for name in _CLASSES)


def _finest(name: str, paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0]
    metres = {}
    for path in paths:
        match = _RESOLUTION.search(path.stem)
        metres[path] = int(match[1]) if match else None
    finest = min(paths, key=lambda path: metres[path] or 0)
    if None in metres.values() or [*metres.values()].count(metres[finest]) > 1:
        raise BandError(
            f"{name} is in {_few([path.name for path in paths])}, and nothing in their names says "
            f"which is finer; remove one, or open a pattern ('folder/*.tif')"
        )
    return finest


def _single(path: Path) -> Layer:
    layers = layers_of(str(path))
    if len(layers) != 1:
        raise RasterError(f"{path} is named after one band and has {len(layers)}")
    return layers[0]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(repr(name) for name in names[:6]) + more
