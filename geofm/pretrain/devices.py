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
from geofm.pretrain.recipe import Recipe

__all__ = ["make_fabric", "make_optimizer"]


def make_fabric(recipe: Recipe) -> Any:
    """Lightning Fabric for a recipe's devices, strategy and precision.

    Args:
        recipe: The recipe. Under torchrun, that decides how many processes there are.

    Returns:
        A Fabric, not launched yet.

    Raises:
        MissingExtraError: It is not installed.
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
    train = recipe.train
    devices, nodes = train.devices, train.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
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
