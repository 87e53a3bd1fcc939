"""The numbers of a run: portions of a step, steps, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geofm.pretrain.recipe import Recipe, RecipeError

__all__ = ["Plan", "learning_rate", "lengths", "plan_for"]


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from a recipe, the data and the number of processes.

    Attributes:
        seed: Of everything left to chance.
        batch: Samples that one process handles at a time.
        accumulate: Batches of a process in a step.
        rank: Number of this process.
        world: Number of processes.
        samples_per_step: Over all processes.
        lr: Learning rate after the warm-up.
    """

    seed: int
    batch: int
    accumulate: int
    rank: int
    world: int
    samples_per_step: int
    lr: float


def plan_for(recipe: Recipe, world: int, rank: int = 0) -> Plan:
    """How the samples of a step are divided, and the learning rate for their number.

    Args:
        recipe: The recipe.
        world: Number of processes.
        rank: Number of this process.

    Returns:
        The plan.

    Raises:
        RecipeError: The effective batch cannot be divided among the processes.
    """
    train, optimizer = recipe.train, recipe.optimizer
    together = train.batch * world
    accumulate = train.accumulate or 1
    if train.effective_batch is not None:
        accumulate, rest = divmod(train.effective_batch, together)
        if rest or not accumulate:
            raise RecipeError(
                f"train.effective_batch={train.effective_batch} is no multiple of train.batch="
                f"{train.batch} times {world} process{'es' if world > 1 else ''}; change "
                f"train.batch, or set train.effective_batch=null"
            )
    samples = together * accumulate
    lr = optimizer.lr if optimizer.lr is not None else (optimizer.base_lr or 0.0) * samples / 256
    return Plan(train.seed, train.batch, accumulate, rank, world, samples, lr)


def learning_rate(step: int, steps: int, warmup: int, recipe: Recipe) -> float:
    """The learning rate of a step, as a part of the full one.

    Args:
        step: From 0.
        steps: Of the whole run.
        warmup: Of the linear warm-up.
        recipe: For the shape of the rest.

    Returns:
        A factor, 0 to 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule.shape == "constant":
        return 1.0
    low = recipe.schedule.min_lr
    share = (step - warmup) / max(1, steps - warmup)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))


def lengths(recipe: Recipe, per_epoch: int) -> tuple[int, int]:
    """How long a run is.

    Args:
        recipe: The recipe.
        per_epoch: Steps in an epoch.

    Returns:
        Steps of the run and of its warm-up.
    """
    train, schedule = recipe.train, recipe.schedule
    steps = train.steps or max(1, round((train.epochs or 0) * per_epoch))
    warmup = schedule.warmup_steps
    return steps, round(schedule.warmup_epochs * per_epoch) if warmup is None else warmup
