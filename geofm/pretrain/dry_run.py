"""What a run would be: its recipe, steps, model size and memory, without running it."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofm.pretrain.devices import check_devices
from geofm.pretrain.export import build_method
from geofm.pretrain.feed import check_fit, open_data, open_feed
from geofm.pretrain.method import Method
from geofm.pretrain.plan import Plan, lengths, plan_for
from geofm.pretrain.recipe import Recipe, RecipeError, fingerprint, to_yaml

__all__ = ["describe"]

# Samples of the forward pass whose kept tensors are counted.
_TRIED = 4


def describe(recipe: Recipe, world: int = 1) -> str:
    """A dry run.

    What the backward pass keeps is counted in a forward pass of a few samples on the CPU in 32
    bits. Without data it is not known, and neither is the number of steps unless the recipe states
    the number of samples. Generated samples are written to a temporary folder.

    Args:
        recipe: The recipe.
        world: Number of processes.

    Returns:
        Text of several lines: YAML, and comments with the figures.

    Raises:
        RecipeError: The recipe contradicts itself, the method or the data. What this machine lacks
            is a line of the text.
    """
    plan = plan_for(recipe, world)
    # A run is often planned on another machine than the one that trains.
    elsewhere = []
    try:
        check_devices(recipe)
    except RecipeError as error:
        elsewhere = [f"# this machine cannot run it: {error}"]
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe)
    lines = [
        to_yaml(recipe),
        *elsewhere,
        f"# recipe hash: {fingerprint(recipe)}",
        *_parameters(method),
    ]
    known = recipe.data.path is not None or recipe.data.generate is not None
    if known or ":" in recipe.data.kind:
        with tempfile.TemporaryDirectory() as folder:
            dataset = open_data(recipe.data, Path(folder), plan.seed)
            feed = open_feed(dataset, plan, recipe.data, pin=False)
            lines += _steps(recipe, plan, feed.steps_per_epoch, _size(dataset, recipe))
            check_fit(method, feed)
            lines += _memory(recipe, method, _kept_bytes(recipe, method, dataset, plan))
    else:
        samples = recipe.data.samples
        if samples is None:
            lines.append("# steps: not known without data (data.path, or data.samples)")
        else:
            per_epoch = max(1, samples // plan.samples_per_step)
            lines += _steps(recipe, plan, per_epoch, f"{samples:,} (as published)")
        lines += _memory(recipe, method, None)
    return "\n".join(lines)


def _parameters(method: Method) -> list[str]:
    every = sum(p.numel() for p in method.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    exported = method.export()
    kept = sum(value.numel() for value in exported.state.values())
    return [
        f"# parameters: {every:,}, of which {trained:,} are trained; "
        f"{exported.model} with {kept:,} is exported"
    ]


def _size(dataset: Any, recipe: Recipe) -> str:
    if hasattr(dataset, "state_after"):
        return f"{recipe.data.samples:,} (a stream)"
    return f"{len(dataset):,}"


def _steps(recipe: Recipe, plan: Plan, per_epoch: int, samples: str) -> list[str]:
    steps, warmup = lengths(recipe, per_epoch)
    longer = " (longer than the run: lower schedule.warmup_epochs)" if warmup > steps else ""
    return [
        f"# samples: {samples}; a step takes {plan.samples_per_step:,} ({plan.world} x {plan.batch}"
        f" x {plan.accumulate} accumulated)",
        f"# steps: {steps:,}, of which {warmup:,} are warm-up{longer}; {per_epoch:,} an epoch",
        f"# learning rate after warm-up: {plan.lr:.4g}",
    ]


def _memory(recipe: Recipe, method: Method, kept: int | None) -> list[str]:
    weights = sum(p.numel() * p.element_size() for p in method.parameters())
    weights += sum(b.numel() * b.element_size() for b in method.buffers())
    gradients = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    optimizer = gradients * (2 if recipe.optimizer.name == "adamw" else 1)
    named = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    if kept is None:
        named_text = ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in named.items())
        return [f"# memory of a process, MB: {named_text}, activations not known without data"]
    named["activations"] = kept * recipe.train.batch
    text = ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in named.items())
    half = "" if recipe.train.precision == "32-true" else " (in 32 bits: about half in mixed)"
    return [f"# memory of a process, MB: {sum(named.values()) / 1e6:,.0f}: {text}{half}"]


def _kept_bytes(recipe: Recipe, method: Method, dataset: Any, plan: Plan) -> int:
    """Bytes a sample keeps for the backward pass."""
    few = Plan(plan.seed, min(plan.batch, _TRIED), 1, 0, 1, min(plan.batch, _TRIED), plan.lr)
    reader = replace(recipe.data, workers=0)
    feed = open_feed(dataset, few, reader, pin=False)
    with closing(feed.batches(0, 1)) as batches:
        batch = next(batches)
    own = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held until all are counted: a freed address would be given out again.
        losses = method.train()(batch)
    del losses
    return sum(seen.values()) // few.batch
