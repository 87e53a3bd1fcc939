"""A recipe: everything that decides a pretraining run, read strictly from YAML.

A recipe names a method and its arguments, data, an optimizer and a schedule. Its ``quick`` section
holds the few values that make it a trial on generated samples. Values can be overridden by dotted
path: ``train.batch=64``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from geofm.pretrain._strict import RecipeError, build, merged, near, parse_yaml, yaml_module

__all__ = [
    "Card",
    "Data",
    "Optimizer",
    "Output",
    "Recipe",
    "RecipeError",
    "Schedule",
    "Train",
    "differences",
    "fingerprint",
    "load_recipe",
    "read_recipe",
    "recipe_names",
    "to_yaml",
]

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        kind: ``"mmearth"``, ``"ssl4eco"``, ``"tiles"``, ``"globalgeotree"``, or
            ``"package.module:Class"`` for a class of one's own.
        path: File or folder of the data.
        options: Further arguments of the dataset.
        samples: Samples in an epoch of a stream; of other data, how many were published, from which
            a dry run without data counts steps.
        workers: Processes that read, for each training process; 0 reads in the process itself.
        generate: Without a path: arguments of the writer of generated samples.
    """

    kind: str
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    workers: int = 4
    generate: dict[str, Any] | None = None


@dataclass(frozen=True)
class Train:
    """How long, in what portions and on what.

    Attributes:
        epochs: Passes over the data.
        steps: Steps of the optimizer; instead of `epochs`.
        batch: Samples that one process handles at a time.
        accumulate: Batches of a process whose gradients make one step; 1 where neither this nor
            `effective_batch` is given.
        effective_batch: Samples of a step over all processes; decides `accumulate`.
        clip: Largest norm of the gradient; None: not limited.
        seed: Of everything left to chance, 0 to 4194303.
        precision: Lightning Fabric's.
        strategy: ``"auto"`` and ``"ddp"`` copy the model to all devices, ``"fsdp"`` divides it.
        accelerator: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        devices: Processes on this machine, or ``"auto"``. torchrun decides it by itself.
        nodes: Machines.
        compile: Whether torch.compile works on the method.
    """

    epochs: float | None = None
    steps: int | None = None
    batch: int = 64
    accumulate: int | None = None
    effective_batch: int | None = None
    clip: float | None = None
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    compile: bool = False


@dataclass(frozen=True)
class Optimizer:
    """The optimizer.

    Attributes:
        name: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate after warm-up.
        base_lr: Instead of `lr`: learning rate for 256 samples a step; it grows with the samples.
        weight_decay: Of matrices and kernels.
        betas: Of AdamW.
        momentum: Of SGD.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    base_lr: float | None = None
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    momentum: float = 0.9


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps: linear warm-up, then half a cosine.

    Attributes:
        shape: ``"cosine"`` or ``"constant"`` after the warm-up.
        warmup_epochs: Length of the warm-up.
        warmup_steps: The same in steps; instead of `warmup_epochs`.
        min_lr: Where the cosine ends, as a part of the learning rate.
    """

    shape: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True)
class Output:
    """What is written while training.

    Attributes:
        save_every: Steps between checkpoints.
        keep: How many of the latest checkpoints stay; the best stays besides.
        log_every: Steps between rows of the log.
        tensorboard: Whether TensorBoard's events are written too.
        half: Whether the exported weights are float16.
    """

    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = True
    half: bool = False


@dataclass(frozen=True)
class Card:
    """What the weight card of the result says that nothing else knows.

    Attributes:
        tag: The checkpoint is called ``<architecture>.<tag>``.
        title: One line for a table.
        data: The training data in words.
        data_licence: Its licence.
        weights_licence: Licence of the result.
        note: Anything a user should know.
        citation: BibTeX; by default that of the architecture's published card.
    """

    tag: str = "own"
    title: str = ""
    data: str = "not stated"
    data_licence: str = "not stated"
    weights_licence: str = "not stated"
    note: str = ""
    citation: str = ""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
        name: What to call it.
        method: ``"mpmae"``, ``"seco"``, ``"moco"``, ``"clip"``, or ``"package.module:Class"`` for a
            subclass of `geofm.pretrain.Method`.
        model: Arguments of the method's class.
        data: What is trained on.
        train: How long and in what portions.
        optimizer: The optimizer.
        schedule: The learning rate.
        output: What is written.
        card: What the result's card says.
    """

    name: str
    method: str
    data: Data
    model: dict[str, Any] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    output: Output = field(default_factory=Output)
    card: Card = field(default_factory=Card)


def recipe_names() -> list[str]:
    """Recipes that come with the package.

    Returns:
        Their names, sorted.
    """
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = (), quick: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        source: Name of one that comes with the package, or a YAML file.
        overrides: ``key=value`` with dotted keys and YAML values, such as ``train.batch=64``.
        quick: Whether the values of its ``quick`` section apply (before the overrides).

    Returns:
        The recipe.

    Raises:
        RecipeError: There is no such recipe, or it is not as it should be; the message names the
            key, and near ones for an unknown key.
        MissingExtraError: PyYAML is not installed.
    """
    path = _find(source)
    content = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(content, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping, this is {type(content).__name__}")
    trial = content.pop("quick", None)
    if quick:
        if not isinstance(trial, dict):
            raise RecipeError(f"{path.name} has no section 'quick', so there is no quick run of it")
        content = merged(content, trial)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"{override!r}: an override is key=value, such as train.batch=64")
        nested: Any = parse_yaml(value, override)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        # A mapping given as a value stands for itself; only the way to it is merged.
        content = merged(content, nested, depth=key.count(".") + 1)
    return read_recipe({"name": path.stem, **content}, path.name)


def read_recipe(content: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe's content.

    Args:
        content: As in the YAML file, without ``quick``.
        origin: What to call it in messages.

    Returns:
        The recipe.

    Raises:
        RecipeError: As in `load_recipe`.
    """
    recipe: Recipe = build(Recipe, content, origin, "")
    _check(recipe, origin)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that `load_recipe` reads.

    Args:
        recipe: The recipe.

    Returns:
        The text.
    """
    text: str = yaml_module().safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
    return text


# --- what makes two runs the same ---------------------------------------------------------------

# Where the data lies, who reads it and what is written does not change what is learnt. Nor does how
# the samples of a step are divided: their number is compared instead.
_IDLE = (
    "name",
    "data.path",
    "data.workers",
    "output",
    "card",
    "train.accelerator",
    "train.devices",
    "train.nodes",
    "train.strategy",
    "train.compile",
    "train.batch",
    "train.accumulate",
    "train.effective_batch",
)


def essentials(recipe: Recipe) -> dict[str, Any]:
    """What decides the course of a run, apart from the number of samples in a step.

    Args:
        recipe: The recipe.

    Returns:
        Values by dotted key.
    """
    flat = _flat(asdict(recipe))
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{i}.") for i in _IDLE)}


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Where two recipes differ in what decides the course of a run.

    Args:
        one: A recipe.
        other: Another.

    Returns:
        ``"key: value in one, value in the other"`` for each key.
    """
    a, b = essentials(one), essentials(other)
    missing = "(none)"
    return [
        f"{key}: {a.get(key, missing)} and {b.get(key, missing)}"
        for key in sorted(a | b)
        if a.get(key, missing) != b.get(key, missing)
    ]


def fingerprint(recipe: Recipe) -> str:
    """A short hash of what decides the course of a run.

    Args:
        recipe: The recipe.

    Returns:
        12 hexadecimal digits.
    """
    text = json.dumps(essentials(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


# --- finding and checking -----------------------------------------------------------------------


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"there is no recipe {path}")
    if str(source) in recipe_names():
        return RECIPES / f"{source}.yaml"
    raise RecipeError(
        f"there is no recipe {str(source)!r}{near(str(source), recipe_names())}; there are "
        f"{', '.join(recipe_names())}, or give the path of a .yaml file"
    )


def _check(recipe: Recipe, origin: str) -> None:
    train, optimizer, schedule, output = (
        recipe.train,
        recipe.optimizer,
        recipe.schedule,
        recipe.output,
    )
    rules = (
        (
            (train.epochs is None) != (train.steps is None),
            "train: give either epochs or steps; to use steps, set train.epochs=null",
        ),
        (train.epochs is None or train.epochs > 0, "train.epochs must be positive"),
        (train.steps is None or train.steps > 0, "train.steps must be positive"),
        (train.batch > 0, "train.batch must be positive"),
        (
            train.accumulate is None or train.effective_batch is None,
            "train: give either accumulate or effective_batch; the other follows (set it to null)",
        ),
        (train.accumulate is None or train.accumulate > 0, "train.accumulate must be positive"),
        (
            train.effective_batch is None or train.effective_batch > 0,
            "train.effective_batch must be positive",
        ),
        (train.clip is None or train.clip > 0, "train.clip must be positive, or null"),
        (0 <= train.seed < 2**22, "train.seed must be from 0 to 4194303"),
        (train.devices == "auto" or train.devices > 0, "train.devices must be positive"),
        (train.nodes > 0, "train.nodes must be positive"),
        (
            train.strategy != "fsdp" or recipe.method not in ("seco", "moco"),
            "train.strategy fsdp cannot hold the momentum encoder of seco and moco; take ddp",
        ),
        (
            (optimizer.lr is None) != (optimizer.base_lr is None),
            "optimizer: give either lr or base_lr (for 256 samples); set the other to null",
        ),
        ((optimizer.lr or optimizer.base_lr or 0) > 0, "optimizer: lr or base_lr must be positive"),
        (optimizer.weight_decay >= 0, "optimizer.weight_decay must not be negative"),
        (
            len(optimizer.betas) == 2 and all(0 <= b < 1 for b in optimizer.betas),
            "optimizer.betas are two numbers from 0 to below 1",
        ),
        (0 <= optimizer.momentum < 1, "optimizer.momentum must be from 0 to below 1"),
        (schedule.warmup_epochs >= 0, "schedule.warmup_epochs must not be negative"),
        ((schedule.warmup_steps or 0) >= 0, "schedule.warmup_steps must not be negative"),
        (0 <= schedule.min_lr <= 1, "schedule.min_lr is a part of the learning rate, 0 to 1"),
        (output.save_every > 0, "output.save_every must be positive"),
        (output.keep > 0, "output.keep must be positive"),
        (output.log_every > 0, "output.log_every must be positive"),
        (recipe.data.workers >= 0, "data.workers must not be negative"),
        ((recipe.data.samples or 1) > 0, "data.samples must be positive"),
        (
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", recipe.card.tag) is not None,
            "card.tag is a word of letters, digits, '_' and '-'",
        ),
    )
    for holds, problem in rules:
        if not holds:
            raise RecipeError(f"{origin}: {problem}")
