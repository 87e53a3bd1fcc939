"""Where and with what a run computes: Lightning Fabric and the optimizer, from a recipe."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from geofm.errors import MissingExtraError
from geofm.pretrain.export import method_class
from geofm.pretrain.method import Method
from geofm.pretrain.plan import Plan
from geofm.pretrain.recipe import Recipe, RecipeError

__all__ = ["check_devices", "make_fabric", "make_optimizer"]


def check_devices(recipe: Recipe) -> None:
    """Refuse what this machine has not got.

    Args:
        recipe: The recipe.

    Raises:
        RecipeError: Its accelerator, devices, strategy or precision need a GPU that is not here.
    """
    train = recipe.train
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if train.accelerator == "cuda" and not gpus:
        raise RecipeError(
            "train.accelerator=cuda needs a GPU, and PyTorch finds none here: take "
            "train.accelerator=auto or cpu"
        )
    if train.accelerator == "cpu" or not gpus:
        where = "with train.accelerator=cpu" if gpus else "and PyTorch finds none here"
        if train.strategy == "fsdp":
            raise RecipeError(
                f"train.strategy=fsdp needs GPUs, {where}: take train.strategy=auto or ddp"
            )
        if train.precision == "16-mixed":
            raise RecipeError(
                f"train.precision=16-mixed needs a GPU, {where}: take train.precision=bf16-mixed "
                f"or 32-true"
            )
        return
    wanted = _of_torchrun("LOCAL_WORLD_SIZE") or train.devices
    if wanted != "auto" and wanted > gpus:
        raise RecipeError(
            f"{wanted} processes on this machine need as many GPUs, PyTorch finds {gpus}: lower "
            f"train.devices (under torchrun --nproc-per-node), or take train.accelerator=cpu"
        )


def _of_torchrun(variable: str) -> int | None:
    return int(os.environ[variable]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def make_fabric(recipe: Recipe) -> Any:
    """Lightning Fabric for a recipe's devices, strategy and precision.

    Args:
        recipe: The recipe. Under torchrun, that decides how many processes there are.

    Returns:
        A Fabric, not launched yet.

    Raises:
        MissingExtraError: It is not installed.
        RecipeError: As `check_devices`.
    """
    try:
        lightning = importlib.import_module("lightning_fabric")
        strategies = importlib.import_module("lightning_fabric.strategies")
    except ImportError as error:
        raise MissingExtraError(
            "pretraining needs Lightning Fabric, which is not installed: pip install 'geofm[train]'"
        ) from error
    # Fabric announces each process and each seed.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    check_devices(recipe)
    train = recipe.train
    devices = _of_torchrun("LOCAL_WORLD_SIZE") or train.devices
    world = _of_torchrun("WORLD_SIZE")
    nodes = train.nodes if world is None else world // int(devices)
    accelerator = train.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1
    strategy: Any = "auto"
    if train.strategy == "fsdp":
        strategy = strategies.FSDPStrategy(state_dict_type="full")
    elif train.strategy == "ddp" or devices * nodes > 1:
        known = inspect.signature(DistributedDataParallel).parameters
        strategy = strategies.DDPStrategy(
            # Queues and running statistics are each process's own; methods keep equal what must be.
            # The argument's first name is deprecated in newer PyTorch.
            **{next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known): False},
            find_unused_parameters=getattr(method_class(recipe), "find_unused_parameters", False),
        )
    return lightning.Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=train.precision,
    )


def make_optimizer(recipe: Recipe, plan: Plan, method: Method) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the groups of parameters that the method makes.

    Args:
        recipe: The recipe.
        plan: For the learning rate.
        method: The method, before it is wrapped.

    Returns:
        The optimizer.
    """
    options = recipe.optimizer
    groups = method.parameter_groups(options.weight_decay)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(options.betas[0], options.betas[1]))
