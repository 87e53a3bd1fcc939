"""Weight cards: everything geofm knows about a checkpoint, one TOML file each under ``weights/``.

A card is the single place for a checkpoint's facts: architecture arguments, ordered bands, units,
statistics per product level, input size, where the file lives and its hash, layout, licence,
citation and published scores. Code reads them; it never repeats them.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from geofm.auxiliary import Variable
from geofm.errors import CardError
from geofm.spectral import SENSORS, NormalizedDifference, Sensor

__all__ = [
    "InputSpec",
    "Licence",
    "Score",
    "Source",
    "Statistics",
    "WeightCard",
    "cards_in",
    "published_cards",
    "read_card",
    "weights_dir",
]

LEVELS = ("L1C", "L2A")
FITS = ("any", "crop_or_resize")
NORMALIZATIONS = ("zscore", "divide", "range")
SOURCES = ("huggingface", "url", "bundled")


@dataclass(frozen=True)
class Statistics:
    """Per-band statistics of the data a checkpoint was trained on, in DN, in band order.

    Attributes:
        mean: Mean of each band.
        std: Standard deviation of each band.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class InputSpec:
    """What a checkpoint's first layer expects.

    Attributes:
        sensor: Sensor whose band names are used.
        bands: Band names in channel order.
        levels: Product levels in the training data, of ``"L1C"`` and ``"L2A"``.
        normalization: ``"zscore"`` ((DN − mean) / std, see `statistics`), ``"divide"`` (DN /
            `divisor`) or ``"range"`` (the model itself brings DN from `low` and `high` to −1 and
            1, and takes NaN for missing pixels).
        size: Side of the tiles in training, in px.
        fit: What happens to tiles of another size: ``"any"`` (nothing) or
            ``"crop_or_resize"`` (centre crop if large enough, else bicubic resize).
        nodata: Stored values that mean "no data" in DN.
        statistics: By product level; ``"any"`` where one set serves all.
        divisor: Of the ``"divide"`` normalization.
        low: Lowest DN of each band, of the ``"range"`` normalization.
        high: Highest DN of each band.
        derived: Bands that can be computed where an image lacks them.
    """

    sensor: str
    bands: tuple[str, ...]
    levels: tuple[str, ...]
    normalization: str
    size: int
    fit: str
    nodata: tuple[float, ...] = ()
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    divisor: float | None = None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    derived: Mapping[str, NormalizedDifference] = field(default_factory=dict)

    @property
    def level_matters(self) -> bool:
        """Whether the statistics differ by product level, so that it has to be known."""
        return len(self.statistics) > 1

    def shift_and_scale(self, level: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-band numbers with which ``(DN - shift) / scale`` normalizes.

        Args:
            level: Product level; may be None where it does not matter.

        Returns:
            Shift and scale of each band, in DN.

        Raises:
            CardError: There are no statistics for the level.
        """
        if self.normalization == "range":
            return (0.0,) * len(self.bands), (1.0,) * len(self.bands)
        if self.normalization == "divide":
            assert self.divisor is not None
            return (0.0,) * len(self.bands), (self.divisor,) * len(self.bands)
        if len(self.statistics) == 1:
            (chosen,) = self.statistics.values()
        elif level is not None and level in self.statistics:
            chosen = self.statistics[level]
        else:
            raise CardError(f"no statistics for level {level!r}: {', '.join(self.statistics)}")
        return chosen.mean, chosen.std


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's file lives.

    Attributes:
        kind: ``"huggingface"``, ``"url"`` or ``"bundled"``.
        url: Address of the file (``"url"``).
        repo: Hugging Face repository (``"huggingface"``).
        repo_type: ``"model"`` or ``"dataset"``.
        revision: Commit of the repository.
        filename: File in the repository, or beside the card (``"bundled"``).
        sha256: Published hash of the file, whole or its beginning; None where none is published.
    """

    kind: str
    url: str | None = None
    repo: str | None = None
    repo_type: str = "model"
    revision: str | None = None
    filename: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        if self.kind == "huggingface":
            kind = "datasets/" if self.repo_type == "dataset" else ""
            return f"Hugging Face {kind}{self.repo}@{(self.revision or '')[:8]}/{self.filename}"
        return str(self.url if self.kind == "url" else self.filename)


@dataclass(frozen=True)
class Licence:
    """Licences as found; "not stated" where the authors state none.

    Attributes:
        weights: Of the checkpoint file.
        code: Of the published code.
        data: Of the training data.
        note: Anything a user should know.
    """

    weights: str
    code: str = "not stated"
    data: str = "not stated"
    note: str = ""


@dataclass(frozen=True)
class Score:
    """One published result.

    Attributes:
        task: Data set or task.
        metric: Name of the metric.
        value: In the unit the authors print.
        protocol: For example ``"linear probe"``.
        source: Table or file it was read from.
    """

    task: str
    metric: str
    value: float
    protocol: str
    source: str


@dataclass(frozen=True)
class WeightCard:
    """All facts about one checkpoint.

    Attributes:
        name: ``model.tag``, for example ``"mpmae_atto.mmearth64"``.
        title: One line for a table.
        default: Whether it is what ``pretrained=True`` means for its model.
        layout: How the file is written: a name in `geofm.layouts.LAYOUTS`.
        arguments: Arguments of the architecture.
        input: What the first layer expects.
        source: Where the file lives.
        licence: Licences as found.
        citation: BibTeX.
        training: What it was trained on and how, by keyword.
        scores: Published results.
        auxiliary: Environmental variables the model takes besides images, in order.
        path: The card's own file.
        sha256: Of that file, with line ends as on Unix: what ``sha256sum`` says of a card in the
            repository. It changes with any fact the card states. The checkpoint's is in `source`.
    """

    name: str
    title: str
    default: bool
    layout: str
    arguments: Mapping[str, Any]
    input: InputSpec
    source: Source
    licence: Licence
    citation: str
    training: Mapping[str, Any]
    scores: tuple[Score, ...]
    auxiliary: tuple[Variable, ...]
    path: Path
    sha256: str

    @property
    def model(self) -> str:
        """Name of the architecture."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Name of the checkpoint within the architecture."""
        return self.name.partition(".")[2]

    @property
    def bundled(self) -> bool:
        """Whether the file comes with the package."""
        return self.source.kind == "bundled"


def weights_dir() -> Path:
    """The folder of cards and bundled checkpoints.

    Inside the package where it was installed from a wheel, beside it in a checkout.

    Returns:
        Its path.
    """
    package = Path(__file__).resolve().parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


@cache
def published_cards() -> Mapping[str, WeightCard]:
    """All cards that come with the package, by name.

    Returns:
        A read-only mapping, sorted by name.

    Raises:
        CardError: A card is malformed, or two are the default of one model.
    """
    return cards_in(weights_dir())


def cards_in(folder: Path) -> Mapping[str, WeightCard]:
    """All cards of a folder, by name.

    Args:
        folder: Where the TOML files are.

    Returns:
        The cards, sorted by name.

    Raises:
        CardError: A card is malformed, or two are the default of one model.
    """
    cards: dict[str, WeightCard] = {}
    defaults: dict[str, str] = {}
    for path in sorted(folder.glob("*.toml")):
        card = read_card(path)
        if path.stem != card.name:
            raise CardError(f"card {path.name}: name is {card.name!r}, the file's name must match")
        if card.default:
            other = defaults.setdefault(card.model, card.name)
            if other != card.name:
                raise CardError(f"card {path.name}: default: {other} already is the default")
        cards[card.name] = card
    return MappingProxyType(cards)


def read_card(path: Path) -> WeightCard:
    """Read and validate one card.

    Args:
        path: The TOML file.

    Returns:
        The card.

    Raises:
        CardError: Not TOML, an unknown or missing key, a wrong type, or values that contradict each
            other; the message names the card and the field.
        FileNotFoundError: There is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"card {path.name}: not valid TOML: {error}") from error
    top = _Section(path.name, "", content)
    name = top.text("name")
    model, _, tag = name.partition(".")
    if not model or not tag or "." in tag:
        raise top.error("name", f"must be model.tag, got {name!r}")
    card = WeightCard(
        name=name,
        title=top.text("title"),
        default=top.take("default", bool, False),
        layout=top.text("layout"),
        arguments=dict(top.take("arguments", dict)),
        input=_read_input(top.section("input")),
        source=_read_source(top.section("source")),
        licence=_read_licence(top.section("licence")),
        citation=top.text("citation"),
        training=dict(top.take("training", dict, {})),
        scores=_read_scores(top),
        auxiliary=_read_auxiliary(top),
        path=path,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    top.finish()
    channels = card.arguments.get("in_chans")
    if channels != len(card.input.bands):
        raise top.error(
            "arguments.in_chans",
            f"is {channels}, but input.bands lists {len(card.input.bands)} bands",
        )
    return card


def _read_input(section: _Section) -> InputSpec:
    sensor = section.text("sensor", choices=tuple(SENSORS))
    bands = section.texts("bands")
    normalization = section.text("normalization", choices=NORMALIZATIONS)
    levels = section.texts("levels", choices=LEVELS)
    statistics = {}
    divisor = None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    if normalization == "zscore":
        table = section.section("statistics")
        for level in list(table.content):
            if level not in (*LEVELS, "any"):
                raise table.error(level, f"must be one of {', '.join(LEVELS)}, any")
            entry = table.section(level)
            statistics[level] = Statistics(
                entry.numbers("mean", len(bands)), entry.numbers("std", len(bands), positive=True)
            )
            entry.finish()
        if set(statistics) != set(levels) and set(statistics) != {"any"}:
            raise table.error("", f"has {sorted(statistics)}, levels are {list(levels)}")
        table.finish()
    elif normalization == "range":
        table = section.section("range")
        low, high = table.numbers("low", len(bands)), table.numbers("high", len(bands))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise table.error("", "every low must be below its high")
        table.finish()
    else:
        divisor = float(section.take("divisor", (int, float)))
        if not divisor > 0:
            raise section.error("divisor", f"must be positive, got {divisor}")
    derived = _read_derived(section, bands, SENSORS[sensor])
    unknown = [b for b in bands if b not in derived and SENSORS[sensor].find(b) is None]
    if unknown:
        raise section.error("bands", f"{sensor} has no {', '.join(unknown)}, nor are they derived")
    if len(set(bands)) != len(bands):
        raise section.error("bands", "lists a band twice")
    size = section.take("size", int)
    if size <= 0:
        raise section.error("size", f"must be positive, got {size}")
    spec = InputSpec(
        sensor=sensor,
        bands=bands,
        levels=levels,
        normalization=normalization,
        size=size,
        fit=section.text("fit", choices=FITS),
        nodata=section.numbers("nodata", None, ()),
        statistics=statistics,
        divisor=divisor,
        low=low,
        high=high,
        derived=derived,
    )
    section.finish()
    return spec


def _read_derived(
    section: _Section, bands: Sequence[str], sensor: Sensor
) -> dict[str, NormalizedDifference]:
    derived = {}
    table = section.section("derived", optional=True)
    for name in list(table.content):
        entry = table.section(name)
        parts = entry.texts("bands")
        if len(set(parts)) != 2 or len(parts) != 2 or any(sensor.find(p) is None for p in parts):
            raise entry.error(
                "bands", f"must be two different bands of {sensor.name}, got {list(parts)}"
            )
        derived[name] = NormalizedDifference(
            name=name,
            bands=(parts[0], parts[1]),
            scale=float(entry.take("scale", (int, float), 1.0)),
            minimum=entry.take("minimum", (int, float), None),
            eps=float(entry.take("eps", (int, float), 0.0)),
        )
        if name not in bands:
            raise entry.error("", "is not one of the bands")
        entry.finish()
    return derived


def _read_source(section: _Section) -> Source:
    kind = section.text("kind", choices=SOURCES)
    needs = {
        "huggingface": ("repo", "revision", "filename"),
        "url": ("url",),
        "bundled": ("filename", "sha256"),
    }[kind]
    fields = {key: section.text(key) for key in needs}
    if kind == "huggingface":
        fields["repo_type"] = section.text("repo_type", "model", choices=("model", "dataset"))
    if kind == "url" and not fields["url"].startswith(("https://", "http://")):
        raise section.error("url", f"must be an http or https address, got {fields['url']!r}")
    digest = fields.pop("sha256", None) or section.text("sha256", "")
    if digest and (not 8 <= len(digest) <= 64 or set(digest) - set("0123456789abcdef")):
        raise section.error("sha256", "must be 8 to 64 lower-case hexadecimal digits")
    if "filename" in fields and _leaves_folder(fields["filename"]):
        raise section.error("filename", f"must stay in its folder, got {fields['filename']!r}")
    section.finish()
    return Source(kind=kind, sha256=digest or None, **fields)


def _leaves_folder(filename: str) -> bool:
    path = Path(filename)
    return path.is_absolute() or ".." in path.parts or "\\" in filename or not path.name


def _read_licence(section: _Section) -> Licence:
    licence = Licence(
        weights=section.text("weights"),
        code=section.text("code", "not stated"),
        data=section.text("data", "not stated"),
        note=section.text("note", ""),
    )
    section.finish()
    return licence


def _read_scores(top: _Section) -> tuple[Score, ...]:
    scores = []
    for number, content in enumerate(top.take("scores", list, [])):
        if not isinstance(content, dict):
            raise top.error(f"scores[{number}]", "must be a table")
        entry = _Section(top.card, f"scores[{number}]", content)
        scores.append(
            Score(
                task=entry.text("task"),
                metric=entry.text("metric"),
                value=float(entry.take("value", (int, float))),
                protocol=entry.text("protocol"),
                source=entry.text("source"),
            )
        )
        entry.finish()
    return tuple(scores)


def _read_auxiliary(top: _Section) -> tuple[Variable, ...]:
    variables = []
    for number, content in enumerate(top.take("auxiliary", list, [])):
        if not isinstance(content, dict):
            raise top.error(f"auxiliary[{number}]", "must be a table")
        entry = _Section(top.card, f"auxiliary[{number}]", content)
        low, high = entry.numbers("range", 2)
        minimum, maximum = entry.numbers("limits", 2)
        if not minimum <= low < high <= maximum:
            raise entry.error("range", f"must be ascending and within limits, got {low}, {high}")
        variables.append(
            Variable(
                name=entry.text("name"),
                unit=entry.text("unit"),
                group=entry.text("group"),
                low=low,
                high=high,
                minimum=minimum,
                maximum=maximum,
                about=entry.text("about", ""),
            )
        )
        entry.finish()
    if len({variable.name for variable in variables}) != len(variables):
        raise top.error("auxiliary", "names a variable twice")
    return tuple(variables)


_REQUIRED: Any = object()


class _Section:
    """One table of a card; reads its keys and refuses those nobody asked for."""

    def __init__(self, card: str, prefix: str, content: dict[str, Any]) -> None:
        self.card = card
        self.prefix = prefix
        self.content = content
        self.read: set[str] = set()

    def error(self, key: str, problem: str) -> CardError:
        return CardError(
            f"card {self.card}: {'.'.join(p for p in (self.prefix, key) if p)}: {problem}"
        )

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        self.read.add(key)
        if key not in self.content:
            if default is _REQUIRED:
                raise self.error(key, "is missing")
            return default
        value = self.content[key]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or wrong_bool:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(k.__name__ for k in kinds)
            raise self.error(key, f"must be {wanted}, got {value!r}")
        return value

    def text(self, key: str, default: Any = _REQUIRED, choices: tuple[str, ...] = ()) -> str:
        value: str = self.take(key, str, default)
        if choices and value not in choices:
            raise self.error(key, f"must be one of {', '.join(choices)}; got {value!r}")
        if default is _REQUIRED and not value.strip():
            raise self.error(key, "is empty")
        return value.strip()

    def texts(self, key: str, choices: tuple[str, ...] = ()) -> tuple[str, ...]:
        values = self.take(key, list)
        if not values or not all(isinstance(v, str) for v in values):
            raise self.error(key, f"must be a list of names, got {values!r}")
        for value in values:
            if choices and value not in choices:
                raise self.error(key, f"must be of {', '.join(choices)}; got {value!r}")
        return tuple(values)

    def numbers(
        self, key: str, length: int | None, default: Any = _REQUIRED, positive: bool = False
    ) -> tuple[float, ...]:
        values = self.take(key, list, default)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise self.error(key, f"must be a list of numbers, got {values!r}")
        if length is not None and len(values) != length:
            raise self.error(key, f"has {len(values)} values for {length} bands")
        if not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
            raise self.error(key, "has a value that is not finite or not positive")
        return tuple(float(v) for v in values)

    def section(self, key: str, optional: bool = False) -> _Section:
        content = self.take(key, dict, {} if optional else _REQUIRED)
        return _Section(self.card, f"{self.prefix}.{key}".strip("."), content)

    def finish(self) -> None:
        unknown = [key for key in self.content if key not in self.read]
        if unknown:
            known = ", ".join(sorted(self.read))
            raise self.error(unknown[0], f"is not a known field; known are {known}")
