"""STAC items: bands in assets, each with its own address."""

from __future__ import annotations

import json
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

from geofm.errors import BandError, DownloadError, PixelError, RasterError
from geofm.scenes.files import Layer, is_remote, layers_of, shown
from geofm.scenes.grids import Request, assemble
from geofm.scenes.names import Facts, date_of, facts_of_name, offset_or_none
from geofm.scenes.scene import Scene
from geofm.scenes.stacked import scaling

__all__ = ["open_item", "read_item"]

logger = logging.getLogger(__name__)

_MAX_JSON = 20_000_000
_TIMEOUT_S = 30.0
# Pictures and previews list the bands they were made from.
_NOT_DATA = {"visual", "overview", "thumbnail", "metadata"}


@dataclass(frozen=True)
class _Candidate:
    """A band in an asset."""

    key: str
    href: str
    index: int
    metres: float
    asset: Mapping[str, Any]
    described: Mapping[str, Any]


def read_item(source: str) -> dict[str, Any]:
    """Read an item.

    Args:
        source: Path or http(s) address of a JSON file.

    Returns:
        The item.

    Raises:
        DownloadError: It cannot be fetched.
        RasterError: It is no JSON object, or far larger than an item.
    """
    try:
        if is_remote(source):
            with urllib.request.urlopen(source, timeout=_TIMEOUT_S) as response:
                content = response.read(_MAX_JSON + 1)
        else:
            with Path(source).open("rb") as file:
                content = file.read(_MAX_JSON + 1)
    except (urllib.error.URLError, HTTPException, TimeoutError) as error:
        raise DownloadError(f"{shown(source)} cannot be fetched: {error}") from error
    except OSError as error:
        raise RasterError(f"{shown(source)} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_JSON:
        raise RasterError(f"{shown(source)} is too large for a STAC item")
    try:
        item = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RasterError(f"{shown(source)} is not JSON: {error}") from error
    if not isinstance(item, dict):
        raise RasterError(f"{shown(source)} is not a STAC item but a JSON {type(item).__name__}")
    return item


def open_item(item: Mapping[str, Any], base: str | None, request: Request) -> Scene:
    """Open a STAC item.

    Args:
        item: The item.
        base: Path or address it came from, which relative hrefs start at; None for a dict, whose
            ``self`` link is used.
        request: What the caller says.

    Returns:
        The scene.

    Raises:
        RasterError: It is no item, or an asset is out of reach.
        BandError: No asset, or more than one, has a band.
        GeofmError: As of `geofm.scenes.grids.assemble`.
    """
    if not isinstance(item.get("assets"), Mapping):
        raise RasterError(
            f"{shown(base or 'the dict')} is no STAC item: it has no assets"
            + (" (an item collection? open one of its features)" if "features" in item else "")
        )
    base = base or _self_link(item)
    properties = _mapping(item.get("properties"))
    _check_platform(properties, request)
    wanted = None
    if request.bands is not None:
        wanted = {band.name for band in request.sensor.select(request.bands)}
    layers: dict[str, Layer] = {}
    says: list[Facts] = []
    for name, candidates in _bands(item["assets"], request, base).items():
        if wanted is None or name in wanted:
            best = _best(name, candidates, request.strict, base)
            layers[name] = _layer(best, base)
            says.append(_band_facts(best))
    source = str(item.get("id") or base or "the item")
    if not layers:
        raise BandError(
            f"no asset of {source} is {'one of the bands' if wanted else 'a band'} of "
            f"{request.sensor.name}; its assets are {', '.join(map(str, item['assets']))}"
        )
    facts = _facts(item, properties, says)
    return assemble(layers, facts, request, source, _classes(item["assets"], base))


# --- assets -------------------------------------------------------------------------------------


def _bands(
    assets: Mapping[str, Any], request: Request, base: str | None
) -> dict[str, list[_Candidate]]:
    """Candidates for each band."""
    found: dict[str, list[_Candidate]] = {}
    for key, value in assets.items():
        asset = _mapping(value)
        roles = asset.get("roles") or []
        href = _href(asset, base)
        if href is None or _NOT_DATA & set(map(str, roles)):
            continue
        described = _list(asset.get("bands")) or _list(asset.get("eo:bands"))
        several = len(described) > 1
        for i, band in enumerate(described or [{}]):
            names = [band.get("name"), band.get("eo:common_name") or band.get("common_name")]
            # The key of an asset is a name only where it has no other: "B04_10m", "red-jp2".
            names += [] if several else [key, re.split(r"[_\-]", key)[0]]
            known = (request.sensor.find(str(name)) for name in names if name)
            match = next((each for each in known if each is not None), None)
            if match is not None:
                raster = _list(asset.get("raster:bands"))
                more = {**asset, **(raster[i] if i < len(raster) else {}), **band}
                metres = more.get("gsd") or more.get("spatial_resolution") or 0.0
                metres = metres if isinstance(metres, int | float) else 0.0
                candidate = _Candidate(key, href, i + 1, float(metres), asset, more)
                found.setdefault(match.name, []).append(candidate)
    return found


def _href(asset: Mapping[str, Any], base: str | None) -> str | None:
    """Where an asset is; another address that it gives, where that one is out of reach."""
    href = asset.get("href")
    if not isinstance(href, str):
        return None
    others = [_mapping(each).get("href") for each in _mapping(asset.get("alternate")).values()]
    hrefs = [href, *(each for each in others if isinstance(each, str))]
    return next((each for each in hrefs if _in_reach(each, base)), href)


def _in_reach(href: str, base: str | None) -> bool:
    """Whether geofm reads such an address: http(s), and files unless the item came from afar."""
    scheme = urllib.parse.urlsplit(href).scheme.lower()
    # One letter is a drive.
    if len(scheme) < 2 or scheme in ("http", "https"):
        return True
    return scheme == "file" and not (base is not None and is_remote(base))


def _best(name: str, candidates: list[_Candidate], strict: bool, base: str | None) -> _Candidate:
    """The finest candidate that can be read."""

    def rank(candidate: _Candidate) -> tuple[bool, bool, float]:
        pixels = _resolution(candidate)
        return not _in_reach(candidate.href, base), pixels == 0, pixels

    ordered = sorted(candidates, key=rank)
    if len(ordered) > 1 and strict and rank(ordered[0]) == rank(ordered[1]):
        keys = ", ".join(repr(candidate.key) for candidate in ordered)
        raise BandError(
            f"{name} is in several assets ({keys}) and nothing says which is finer; remove all but "
            f"one from the item, or say strict=False to take the first"
        )
    return ordered[0]


def _resolution(candidate: _Candidate) -> float:
    """Metres of a pixel, as far as the item says; 0 where it does not."""
    # gsd is the sensor's, and the same in all copies of a band; proj:transform is the file's.
    transform = candidate.asset.get("proj:transform")
    if isinstance(transform, list) and transform and isinstance(transform[0], int | float):
        return abs(float(transform[0]))
    spaced = candidate.described.get("spatial_resolution")
    if isinstance(spaced, int | float):
        return float(spaced)
    suffix = re.search(r"_(\d+)m$", candidate.key)
    return float(suffix[1]) if suffix else candidate.metres


def _layer(candidate: _Candidate, base: str | None) -> Layer:
    path = _locate(candidate.href, base)
    layers = layers_of(path)
    if candidate.index > len(layers):
        raise RasterError(
            f"asset {candidate.key!r} says it has band {candidate.index}, but {shown(path)} has "
            f"{len(layers)}"
        )
    layer = layers[candidate.index - 1]
    nodata = candidate.described.get("nodata")
    if layer.nodata is None and isinstance(nodata, int | float) and not isinstance(nodata, bool):
        return replace(layer, nodata=float(nodata))
    return layer


def _locate(href: str, base: str | None) -> str:
    """Where an asset is: a file, or an http(s) address."""
    scheme = urllib.parse.urlsplit(href).scheme.lower()
    remote = base is not None and is_remote(base)
    if scheme in ("http", "https"):
        return href
    if scheme == "file" and not remote:
        return urllib.request.url2pathname(urllib.parse.urlsplit(href).path)
    if not _in_reach(href, base):
        raise RasterError(
            f"the asset {shown(href)} is at {scheme}://, and geofm reads files (of a remote item: "
            f"none of this machine) and http(s) only; the item gives no other address that it "
            f"reads (alternate). Take the item from a catalogue with https addresses, or fetch "
            f"the files and open their folder"
        )
    if remote:
        joined = urllib.parse.urljoin(str(base), href)
        if not is_remote(joined):
            raise RasterError(f"the asset {href} of a remote item is not at an http(s) address")
        return joined
    # GDAL would follow a path such as /vsicurl/...: only files are taken, see `layers_of`.
    path = Path(href)
    if path.is_absolute():
        return str(path)
    if base is None:
        raise RasterError(
            f"the asset {href} is relative to the item, which was given as a dict without a self "
            f"link; give the item's file or address instead"
        )
    return str(Path(base).parent / path)


def _classes(assets: Mapping[str, Any], base: str | None) -> Layer | None:
    for key, value in assets.items():
        href = _href(_mapping(value), base)
        if re.split(r"[_\-]", str(key).lower())[0] != "scl" or href is None:
            continue
        if _in_reach(href, base):
            return layers_of(_locate(href, base))[0]
    return None


# --- what the item says -------------------------------------------------------------------------


def _facts(item: Mapping[str, Any], properties: Mapping[str, Any], says: list[Facts]) -> Facts:
    names = [properties.get("s2:product_uri"), item.get("id"), item.get("collection")]
    named = Facts()
    for name in names:
        if isinstance(name, str):
            named = named.filled(facts_of_name(name))
    platform = f"{properties.get('constellation')} {properties.get('platform')}".lower()
    stated = properties.get("datetime") or properties.get("start_datetime")
    return Facts(
        units=_common(says, "units"),
        level=_level(properties, item) or named.level,
        offset=_offset(properties, says, named),
        date=date_of(stated) if isinstance(stated, str) else named.date,
        product=named.product or "sentinel-2" in platform,
    )


def _band_facts(candidate: _Candidate) -> Facts:
    more = candidate.described
    scale = more.get("raster:scale", more.get("scale"))
    offset = more.get("raster:offset", more.get("offset"))
    numbers = [float(each) if isinstance(each, int | float) else None for each in (scale, offset)]
    return scaling(*numbers)


def _offset(properties: Mapping[str, Any], says: list[Facts], named: Facts) -> float | None:
    applied = properties.get(
        "earthsearch:boa_offset_applied", properties.get("sentinel:boa_offset_applied")
    )
    if applied is True:
        # Its assets still declare the offset that was taken away from their pixels.
        return 0.0
    declared: float | None = _common(says, "offset")
    if declared is None:
        for key in ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version"):
            baseline = properties.get(key)
            if isinstance(baseline, str) and offset_or_none(baseline) is not None:
                declared = offset_or_none(baseline)
                break
        else:
            declared = named.offset
    if applied is False and declared:
        logger.warning(
            "the item says its offset of %g is still in the pixels (boa_offset_applied: false). "
            "Earth Search is known to say so of some files whose offset was removed: if dark "
            "pixels are below 1000, say open_scene(..., offset=0, strict=False), or on the command "
            "line --offset 0 --no-strict",
            declared,
        )
    return declared


def _level(properties: Mapping[str, Any], item: Mapping[str, Any]) -> str | None:
    stated = (
        properties.get("processing:level"),
        properties.get("s2:product_type"),
        properties.get("product:type"),
        item.get("collection"),
    )
    for text in stated:
        match = re.search(r"(?:^|[^A-Z0-9])(?:L|LEVEL-|S2MSI)(1C|2A)", str(text or "").upper())
        if match:
            return f"L{match[1]}"
    return None


def _common(says: list[Facts], name: str) -> Any:
    values = {getattr(each, name) for each in says}
    if len(values) > 1:
        raise PixelError(
            f"the item's assets differ in {name}: {sorted(map(str, values))}. Open the bands that "
            f"agree (bands=[...])"
        )
    return values.pop() if values else None


def _check_platform(properties: Mapping[str, Any], request: Request) -> None:
    platform = " ".join(
        str(properties[key]) for key in ("constellation", "platform") if properties.get(key)
    ).lower()
    other = platform and "sentinel-2" not in platform and "sentinel2" not in platform
    if other and request.sensor.name.startswith("sentinel2"):
        raise RasterError(
            f"the item is of {platform}, not of Sentinel-2; say whose bands these are: sensor="
        )


def _self_link(item: Mapping[str, Any]) -> str | None:
    for link in _list(item.get("links")):
        if link.get("rel") == "self" and isinstance(link.get("href"), str):
            return str(link["href"])
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
