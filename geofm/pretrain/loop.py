"""The loop that runs every pretraining method: ``setup``, ``fit``, ``train_step``, ``save``.

All that changes during a run is in `Run`; all of it goes into a checkpoint.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofm.errors import GeofmError, ModelError
from geofm.pretrain.checkpoint import (
    CheckpointError,
    find_checkpoint,
    path_of,
    prune,
    random_states,
    read_state,
    restore_random_states,
    write_state,
)
from geofm.pretrain.devices import make_fabric, make_optimizer
from geofm.pretrain.export import build_method, card_facts, export_run
from geofm.pretrain.feed import Batch, Feed, check_fit, open_data, open_feed
from geofm.pretrain.journal import Journal
from geofm.pretrain.plan import Plan, learning_rate, lengths, plan_for
from geofm.pretrain.recipe import Recipe, RecipeError, differences, read_recipe, to_yaml

__all__ = [
    "NonFiniteLossError",
    "Progress",
    "Run",
    "fit",
    "pretrain",
    "save",
    "setup",
    "train_step",
]

logger = logging.getLogger(__name__)

# Of the running mean of the loss by which the best checkpoint is chosen.
_SMOOTHING = 0.99
# By this line a run knows its own file from one that somebody wrote.
_RECIPE_HEAD = "# Written by geofm pretrain: the resolved recipe of the run in this folder.\n"


class NonFiniteLossError(GeofmError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; the message names the samples."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        smoothed: Running mean of the total loss; None before the first step.
        best: Step and smoothed loss of the best checkpoint.
        seconds: Time spent training.
    """

    step: int = 0
    smoothed: float | None = None
    best: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass
class Run:
    """A run: what does not change, and what `save` writes.

    `skipped` is what the dataset had left out before training, alike on all processes.
    """

    recipe: Recipe
    folder: Path
    plan: Plan
    steps: int
    warmup: int
    fabric: Any
    method: Any
    optimizer: Any
    feed: Feed
    journal: Journal | None
    facts: dict[str, Any]
    progress: Progress
    skipped: Counter[str] = field(default_factory=Counter)
    loss_names: tuple[str, ...] = ()
    signalled: bool = False
    stopping: bool = False


def pretrain(
    recipe: Recipe, folder: str | Path, resume: str = "auto", command: str = "geofm.pretrain"
) -> Run:
    """Train by a recipe, and export the weights with their card at the end.

    Args:
        recipe: The recipe.
        folder: Of the run: ``recipe.yaml``, ``log.csv``, ``tensorboard/``, ``checkpoints/``, and
            at the end ``<architecture>.<tag>.safetensors`` and ``.toml``.
        resume: ``"auto"``: go on from the latest sound checkpoint in `folder`, if any; ``"none"``:
            begin anew; else the path of a checkpoint.
        command: What was called, for the card.

    Returns:
        The run; ``run.progress.step`` is less than ``run.steps`` if SIGTERM ended it early.

    Raises:
        RecipeError: The recipe contradicts itself, the data or the number of processes.
        CheckpointError: The checkpoint is damaged, or of a run with another recipe.
        NonFiniteLossError: The loss or the gradient became NaN or infinite.
        MissingExtraError: Lightning Fabric is not installed.
    """
    run = setup(recipe, Path(folder), resume, command)
    with _asked_to_stop(run):
        fit(run)
    if run.progress.step < run.steps:
        logger.warning(
            "stopped by SIGTERM after step %d of %d; the same command goes on from there",
            run.progress.step,
            run.steps,
        )
    elif run.fabric.is_global_zero:
        export_run(run.folder)
    _tell_what_was_skipped(run)
    run.fabric.barrier()
    return run


def setup(recipe: Recipe, folder: Path, resume: str, command: str) -> Run:
    """Build everything, and bring it to the state of the checkpoint if there is one.

    Args:
        recipe: The recipe.
        folder: Of the run.
        resume: As in `pretrain`.
        command: What was called.

    Returns:
        The run, ready for `fit`.
    """
    fabric = make_fabric(recipe)
    fabric.launch()
    fabric.seed_everything(recipe.train.seed, verbose=False)
    plan = plan_for(recipe, fabric.world_size, fabric.global_rank)
    with fabric.rank_zero_first():
        dataset = open_data(recipe.data, folder, plan.seed)
    feed = open_feed(dataset, plan, recipe.data, pin=fabric.device.type == "cuda")
    steps, warmup = lengths(recipe, feed.steps_per_epoch)
    if warmup > steps and fabric.is_global_zero:
        logger.warning(
            "the warm-up (%d steps) is longer than the run (%d), so the learning rate ends at %.2g "
            "of the stated one: lower schedule.warmup_epochs",
            warmup,
            steps,
            learning_rate(steps - 1, steps, warmup, recipe),
        )
    found = find_checkpoint(folder, resume)
    method = build_method(recipe, start=found is None)
    check_fit(method, feed)
    skipped = Counter(getattr(getattr(dataset, "report", None), "counts", {}))
    folder.mkdir(parents=True, exist_ok=True)
    facts = card_facts(recipe, dataset, method, command)
    optimizer = make_optimizer(recipe, plan, method)
    working = torch.compile(method) if recipe.train.compile else method
    module, optimizer = fabric.setup(working, optimizer)
    # From here on processes may differ in what they leave to chance.
    fabric.seed_everything(recipe.train.seed + fabric.global_rank, verbose=False)

    progress = Progress()
    if found is not None:
        progress = _restore(fabric, found, recipe, plan, module, optimizer, feed)
        logger.warning("going on from %s after step %d", found, progress.step)
    else:
        _spare_foreign_recipe(folder / "recipe.yaml")
    fabric.barrier()
    journal = None
    if fabric.is_global_zero:
        (folder / "recipe.yaml").write_text(_RECIPE_HEAD + to_yaml(recipe), encoding="utf-8")
        journal = Journal(folder, progress.step, recipe.output.tensorboard)
    module.train()
    return Run(
        recipe, folder, plan, steps, warmup, fabric, module, optimizer, feed, journal, facts,
        progress, skipped,
    )  # fmt: skip


def fit(run: Run) -> None:
    """Train from where the run stands to its last step, or until SIGTERM.

    Args:
        run: The run.
    """
    progress, output = run.progress, run.recipe.output
    with (
        closing(run.journal) if run.journal else nullcontext(),
        closing(_bar(run)) as bar,
        closing(run.feed.batches(progress.step, run.steps)) as batches,
    ):
        since, last_logged = time.perf_counter(), progress.step
        while progress.step < run.steps and not run.stopping:
            began = time.perf_counter()
            row = train_step(run, batches)
            progress.seconds += time.perf_counter() - began
            if progress.step % output.log_every == 0 or progress.step in (1, run.steps):
                elapsed = time.perf_counter() - since
                done = (progress.step - last_logged) * run.plan.samples_per_step
                row |= {"samples_per_second": done / elapsed, "memory_mb": _memory(run) / 1e6}
                since, last_logged = time.perf_counter(), progress.step
                if run.journal:
                    run.journal.write(progress.step, row)
                bar.set_postfix(loss=f"{row['total']:.4g}", refresh=False)
            bar.update()
            due = progress.step % output.save_every == 0 or progress.step == run.steps
            if due or run.stopping:
                save(run)


def train_step(run: Run, batches: Iterator[Batch]) -> dict[str, float]:
    """One step of the optimizer.

    Args:
        run: The run.
        batches: This process's batches; ``accumulate`` of them are taken.

    Returns:
        What the log says of it: the losses (means over all processes), ``lr``, ``grad_norm``.

    Raises:
        NonFiniteLossError: The loss or the gradient is NaN or infinite; nothing was updated.
    """
    fabric, method, optimizer, plan = run.fabric, run.method, run.optimizer, run.plan
    used: list[Batch] = []
    parts: list[Tensor] = []
    for part in range(plan.accumulate):
        batch = next(batches)
        run.feed.used(batch)
        used.append({key: batch[key] for key in ("id", "draw") if key in batch})
        with fabric.no_backward_sync(method, enabled=part < plan.accumulate - 1):
            losses = method(fabric.to_device(batch))
            fabric.backward(losses["total"] / plan.accumulate)
        parts.append(_stacked(run, losses))
    own = torch.stack(parts).mean(0)
    asked = own.new_tensor([float(run.signalled)])
    *values, stop = fabric.all_reduce(torch.cat([own, asked]), reduce_op="mean").tolist()
    norm = fabric.clip_gradients(
        method,
        optimizer,
        max_norm=run.recipe.train.clip or math.inf,
        error_if_nonfinite=False,
    )
    row = dict(zip(run.loss_names, values, strict=True)) | {"grad_norm": float(norm)}
    # With a gradient scaler, infinite gradients are its business: it skips the step.
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    checked = values if scaled else [*values, row["grad_norm"]]
    if not all(map(math.isfinite, checked)):
        raise _non_finite(run, row, own, used)
    rate = learning_rate(run.progress.step, run.steps, run.warmup, run.recipe) * plan.lr
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad()

    progress = run.progress
    progress.step += 1
    total, before = row["total"], progress.smoothed
    progress.smoothed = total if before is None else before + (1 - _SMOOTHING) * (total - before)
    # All processes stop after the same step, whichever of them was told to.
    run.stopping = stop > 0
    return {**row, "lr": rate, "epoch": progress.step / run.feed.steps_per_epoch}


def save(run: Run) -> None:
    """Write a checkpoint; to be called by all processes.

    Args:
        run: The run.
    """
    fabric, progress = run.fabric, run.progress
    best = progress.best
    if best is None or (progress.smoothed or 0.0) < best["smoothed"]:
        progress.best = {"step": progress.step, "smoothed": progress.smoothed}
    if run.journal:
        run.journal.to_disk()
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "CPU"
    state = {
        "method": run.method,
        "optimizer": run.optimizer,
        "scaler": fabric.strategy.precision.state_dict(),
        "random": _of_all(run, random_states()),
        "position": _of_all(run, run.feed.position()),
        "progress": {
            **asdict(progress),
            "samples": progress.step * run.plan.samples_per_step,
            "samples_per_step": run.plan.samples_per_step,
            "device": f"{run.plan.world} x {device}",
        },
        "recipe": asdict(run.recipe),
        "card": run.facts,
    }
    write_state(fabric, path_of(run.folder, progress.step), state)
    if fabric.is_global_zero:
        best_step = (progress.best or {}).get("step")
        prune(run.folder, progress.step, run.recipe.output.keep, best_step)


# --- the parts of setup -------------------------------------------------------------------------


def _spare_foreign_recipe(path: Path) -> None:
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_RECIPE_HEAD):
        raise RecipeError(
            f"{path} was not written by a run, and a run in this folder would write over it: "
            f"choose another folder (-o), or give the file another name"
        )


def _restore(
    fabric: Any, path: Path, recipe: Recipe, plan: Plan, method: Any, optimizer: Any, feed: Feed
) -> Progress:
    content = read_state(path)
    before = read_recipe(content["recipe"], f"the recipe in {path.name}")
    differing = differences(before, recipe)
    then = content["progress"]["samples_per_step"]
    if then != plan.samples_per_step:
        differing.append(
            f"samples per step (train.batch x train.accumulate x processes): {then} and "
            f"{plan.samples_per_step}"
        )
    if differing:
        raise CheckpointError(
            f"{path} is of a run with another recipe (there and here): {'; '.join(differing)}. "
            f"Give the same values, or another folder (-o)"
        )
    fabric.load(path, {"method": method, "optimizer": optimizer}, weights_only=True)
    if content["scaler"]:
        fabric.strategy.precision.load_state_dict(content["scaler"])
    if len(content["random"]) == plan.world:
        restore_random_states(content["random"][plan.rank])
        feed.resume(content["position"][plan.rank])
    elif any(content["position"]):
        raise CheckpointError(
            f"{path} is of {len(content['random'])} processes, here are {plan.world}: a stream of "
            f"data can only be resumed by as many"
        )
    else:
        logger.warning(
            "%s is of %d processes, here are %d: the course will not be exactly the same",
            path.name,
            len(content["random"]),
            plan.world,
        )
    known = {name: content["progress"][name] for name in ("step", "smoothed", "best", "seconds")}
    return Progress(**known)


# --- the parts of fit ---------------------------------------------------------------------------


def _stacked(run: Run, losses: dict[str, Tensor]) -> Tensor:
    if not run.loss_names:
        run.loss_names = tuple(losses)
    if set(losses) != set(run.loss_names):
        raise ModelError(
            f"the method gave losses {sorted(losses)}, before {sorted(run.loss_names)}; each batch "
            f"must give the same"
        )
    return torch.stack([losses[name].detach().float() for name in run.loss_names])


def _non_finite(
    run: Run, row: dict[str, float], own: Tensor, used: list[Batch]
) -> NonFiniteLossError:
    plan, step = run.plan, run.progress.step + 1
    ids = [str(name) for batch in used for name in batch.get("id", [])]
    draws = [int(draw) for batch in used for draw in batch.get("draw", [])]
    report = {
        "step": step,
        "rank": plan.rank,
        "ids": ids,
        "draws": draws,
        "losses": dict(zip(run.loss_names, map(repr, own.tolist()), strict=True)),
        "over_all_processes": {name: repr(value) for name, value in row.items()},
    }
    path = run.folder / f"non_finite.rank{plan.rank}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    shown = ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
    return NonFiniteLossError(
        f"step {step}: {', '.join(bad)} not finite; nothing was updated and the checkpoints are "
        f"from before. Samples of process {plan.rank}: {shown}. All of them are in {path}"
    )


def _of_all(run: Run, value: Any) -> list[Any]:
    """A value of each process, in the order of their numbers."""
    if run.plan.world == 1:
        return [value]
    out: list[Any] = [None] * run.plan.world
    torch.distributed.all_gather_object(out, value)
    return out


def _tell_what_was_skipped(run: Run) -> None:
    """Log what was missing, damaged or left out, where the dataset counts it; for all processes."""
    report = getattr(run.feed.dataset, "report", None)
    if report is None:
        return
    logger.info("data read by process %d: %s", run.plan.rank, report)
    if not hasattr(report, "counts"):
        return
    own = Counter(report.counts) - run.skipped
    total, examples = Counter(run.skipped), dict(report.examples)
    for counts, theirs in _of_all(run, (own, examples)):
        total += counts
        examples = theirs | examples
    if total and run.fabric.is_global_zero:
        words = (
            f"{count} x {reason}" + (f", for example: {shown[0]}" if shown else "")
            for reason, count in total.most_common()
            for shown in [examples.get(reason, ())]
        )
        logger.warning("data left out, replaced or missing: %s", "; ".join(words))


def _memory(run: Run) -> float:
    """The most memory used so far: the device's, or this process's."""
    if run.fabric.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(run.fabric.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _bar(run: Run) -> Any:
    tqdm = importlib.import_module("tqdm").tqdm
    return tqdm(
        total=run.steps,
        initial=run.progress.step,
        disable=not run.fabric.is_global_zero,
        # A log file needs no picture of each second.
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        desc=run.recipe.name,
        unit="step",
    )


@contextmanager
def _asked_to_stop(run: Run) -> Iterator[None]:
    """Let SIGTERM end the run after the current step, with a checkpoint."""

    def ask(*_: Any) -> None:
        run.signalled = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:
        # Only the main thread may handle signals; elsewhere SIGTERM does what it did.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
