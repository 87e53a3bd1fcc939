"""From a checkpoint of a run to weights that anyone can use: safetensors and a weight card."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from geofm import __version__, registry
from geofm.adapt import spec_for_bands
from geofm.auxiliary import Variable
from geofm.cards import InputSpec, WeightCard, published_cards, read_card
from geofm.errors import CardError, ModelError
from geofm.hub import sha256_of
from geofm.pretrain._strict import check_names
from geofm.pretrain.checkpoint import CheckpointError, checkpoints_in, is_sound, read_state
from geofm.pretrain.feed import class_of
from geofm.pretrain.method import Method
from geofm.pretrain.recipe import Recipe, RecipeError, fingerprint, read_recipe

__all__ = ["build_method", "card_facts", "export_run", "method_class", "toml"]

logger = logging.getLogger(__name__)

_METHODS = {
    "mpmae": ("geofm.pretrain.mpmae", "MaskedAutoencoder"),
    "seco": ("geofm.pretrain.contrast", "SeasonContrast"),
    "moco": ("geofm.pretrain.contrast", "MomentumContrast"),
    "clip": ("geofm.pretrain.clip", "ContrastiveLanguageImage"),
}


def method_class(recipe: Recipe) -> type[Method]:
    """The class of a recipe's method.

    Args:
        recipe: The recipe.

    Returns:
        A subclass of `Method`.

    Raises:
        RecipeError: There is none of that name.
    """
    kind = class_of(recipe.method, _METHODS, "method")
    if not isinstance(kind, type) or not issubclass(kind, Method):
        raise RecipeError(f"method={recipe.method!r} is no subclass of geofm.pretrain.Method")
    return kind


def build_method(recipe: Recipe, start: bool = True) -> Method:
    """The pretraining method of a recipe, as a run begins with it.

    Args:
        recipe: The recipe.
        start: False where a checkpoint follows: files of weights to begin with are not asked for.

    Returns:
        The method.

    Raises:
        RecipeError: There is no such method, or it does not take the arguments.
    """
    kind, arguments = method_class(recipe), recipe.model
    check_names(kind, arguments, "model")
    for name in () if start else kind.starting_points:
        arguments = _without(arguments, name.split("."))
    try:
        return kind(**arguments)
    except TypeError as error:
        raise RecipeError(f"model {recipe.model} does not suit {recipe.method}: {error}") from error


def _without(content: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {key: value for key, value in content.items() if key != first}
    inner = content.get(first)
    return {**content, first: _without(inner, rest)} if isinstance(inner, Mapping) else {**content}


def card_facts(recipe: Recipe, dataset: Any, method: Method, command: str) -> dict[str, Any]:
    """What the weight card says about the input; kept in every checkpoint.

    Args:
        recipe: The recipe.
        dataset: What is trained on.
        method: The method, in any state.
        command: What was called.

    Returns:
        Plain values: ``command``, the section ``input``, and ``auxiliary`` where the model takes
        such variables.

    Raises:
        ModelError: The dataset does not say what a model trained on it expects.
    """
    exported = method.export()
    architecture = registry.architecture(exported.model)
    published = published_cards()[architecture.input_card]
    dual = architecture.kind == "dual"
    if hasattr(dataset, "input_spec"):
        spec = dataset.input_spec()
    elif dual:
        # GeoTreeCLIP normalizes by itself, with the ranges of its card, whatever it is trained on.
        spec = published.input
    else:
        raise ModelError(
            f"{type(dataset).__name__} has no input_spec(), so the weight card could not say what "
            f"the trained model expects"
        )
    bands = getattr(method, "bands", spec.bands)
    if tuple(bands) != spec.bands:
        # A method may use some of the dataset's bands, or in another order.
        spec = spec_for_bands(spec, bands)
    size = exported.arguments.get("img_size") or recipe.model.get("size") or spec.size
    variables = getattr(dataset, "variables", published.auxiliary) if dual else ()
    facts: dict[str, Any] = {
        "command": command,
        "input": _input_table(replace(spec, size=int(size))),
    }
    if variables:
        facts["auxiliary"] = [_variable_table(variable) for variable in variables]
    if recipe.data.path is None and recipe.data.generate is not None:
        facts["generated"] = True
    return facts


def export_run(folder: str | Path, which: str = "last", half: bool | None = None) -> WeightCard:
    """Write a run's weights and their card into its folder.

    ``geofm.create_model(architecture, pretrained=folder)`` loads them then.

    Args:
        folder: Of the run.
        which: ``"last"``: the latest checkpoint; ``"best"``: that with the lowest smoothed loss.
        half: Whether as float16; None: as the recipe says.

    Returns:
        The card.

    Raises:
        CheckpointError: There is no sound checkpoint.
        ModelError: The checkpoint's weights are not those of its recipe's method.
        CardError: The card would not be valid.
    """
    folder = Path(folder)
    state = read_state(_chosen(folder, which))
    recipe = read_recipe(state["recipe"], "the checkpoint's recipe")
    method = build_method(recipe, start=False)
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise ModelError(f"the checkpoint does not hold {recipe.method}: {error}") from error
    exported = method.export()
    half = recipe.output.half if half is None else half
    weights = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous().clone()
        for name, value in exported.state.items()
    }
    spoilt = [n for n, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if spoilt:
        hint = "; they do not fit into float16, use output.half=false" if half else ""
        raise ModelError(f"weights are not finite: {', '.join(spoilt[:4])}{hint}")
    name = f"{exported.model}.{recipe.card.tag}"
    file = folder / f"{name}.safetensors"
    part = file.with_name(f".{file.name}.part")
    # Safetensors' files are their owner's alone; those of a run are as the umask decides.
    part.touch()
    mode = part.stat().st_mode
    save_file(weights, part, {"format": "pt"})
    part.chmod(mode)
    part.replace(file)
    arguments = {"in_chans": len(state["card"]["input"]["bands"]), **exported.arguments}
    content = _card(recipe, name, arguments, state, file)
    path = folder / f"{name}.toml"
    part = path.with_name(f".{path.name}.part")
    part.write_text(toml(content), encoding="utf-8")
    card = read_card(part)
    for other in folder.glob(f"{exported.model}.*.toml"):
        # A folder of weights has one card; the run's tag may have changed. Others' cards stay.
        if _recipe_hash(other) == card.training["recipe_hash"]:
            other.unlink()
    part.replace(path)
    logger.info("wrote %s (%d tensors)", file, len(weights))
    return replace(card, path=path)


def _recipe_hash(path: Path) -> Any:
    try:
        return read_card(path).training.get("recipe_hash")
    except CardError:
        return None


def _chosen(folder: Path, which: str) -> Path:
    sound = {step: path for step, path in checkpoints_in(folder).items() if is_sound(path)}
    if not sound:
        raise CheckpointError(f"{folder} holds no sound checkpoint, so there is nothing to export")
    last = sound[max(sound)]
    if which == "last":
        return last
    best = (read_state(last)["progress"].get("best") or {}).get("step")
    if best not in sound:
        raise CheckpointError(f"the best checkpoint of {folder} is not there; export the last")
    return sound[best]


def _card(
    recipe: Recipe,
    name: str,
    arguments: Mapping[str, Any],
    state: Mapping[str, Any],
    file: Path,
) -> dict[str, Any]:
    facts, progress, words = state["card"], state["progress"], recipe.card
    generated = bool(facts.get("generated"))
    data = "generated samples, not observations: a trial" if generated else words.data
    published = published_cards()[registry.architecture(name.partition(".")[0]).input_card]
    training = {
        "method": recipe.method,
        "recipe": recipe.name,
        "recipe_hash": fingerprint(recipe),
        "data": data,
        "command": facts["command"],
        "steps": progress["step"],
        "samples": progress["samples"],
        "samples_per_step": progress["samples_per_step"],
        "hours": round(progress["seconds"] / 3600, 3),
        "device": progress["device"],
        "final_loss": progress["smoothed"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "geofm": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    content: dict[str, Any] = {
        "name": name,
        "title": words.title or f"{name}, trained by {recipe.name}",
        "default": False,
        "layout": "native",
        "citation": words.citation or published.citation,
        "arguments": dict(arguments),
        "input": facts["input"],
        "source": {"kind": "bundled", "filename": file.name, "sha256": sha256_of(file)},
        "licence": {
            "weights": words.weights_licence,
            "code": "Apache-2.0",
            "data": "none: generated" if generated else words.data_licence,
            "note": words.note,
        },
        "training": training,
    }
    if "auxiliary" in facts:
        content["auxiliary"] = facts["auxiliary"]
    return content


def _input_table(spec: InputSpec) -> dict[str, Any]:
    table: dict[str, Any] = {
        "sensor": spec.sensor,
        "bands": list(spec.bands),
        "levels": list(spec.levels),
        "normalization": spec.normalization,
        "size": spec.size,
        "fit": spec.fit,
        "nodata": list(spec.nodata),
    }
    if spec.divisor is not None:
        table["divisor"] = spec.divisor
    if spec.low:
        table["range"] = {"low": list(spec.low), "high": list(spec.high)}
    if spec.statistics:
        table["statistics"] = {
            level: {"mean": list(map(float, s.mean)), "std": list(map(float, s.std))}
            for level, s in spec.statistics.items()
        }
    if spec.derived:
        table["derived"] = {
            name: {"bands": list(rule.bands), "scale": rule.scale, "eps": rule.eps}
            | ({} if rule.minimum is None else {"minimum": rule.minimum})
            for name, rule in spec.derived.items()
        }
    return table


def _variable_table(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "unit": variable.unit,
        "group": variable.group,
        "range": [variable.low, variable.high],
        "limits": [variable.minimum, variable.maximum],
        "about": variable.about,
    }


def toml(content: Mapping[str, Any], prefix: str = "") -> str:
    """Plain values as TOML: text, numbers, lists of them, tables and lists of tables.

    Args:
        content: The values.
        prefix: Dotted name of the table they are in.

    Returns:
        The text.
    """
    lines, tables = [], []
    for key, value in content.items():
        name = key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            tables.append(f"\n[{path}]\n{toml(value, path)}")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            tables += [f"\n[[{path}]]\n{toml(item, path)}" for item in value]
        else:
            lines.append(f"{name} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # A basic string is JSON's, but for characters outside the plane that JSON would split.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(item) for item in value)}]"
    return repr(value)
