"""What the loop asks of a pretraining method, and where a method's random numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

__all__ = ["Exported", "Method", "draws_of", "random_of"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What a method leaves to its users.

    Attributes:
        model: A registered architecture, as `geofm.create_model` takes it.
        arguments: Arguments of that architecture that differ from its defaults.
        state: Its weights, under the names of that model.
    """

    model: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]


class Method(nn.Module):
    """A pretraining method: a module that turns a batch into losses.

    A batch is a mapping of tensors (and lists of strings), the first axis counting samples.
    ``"id"`` holds the samples' names and ``"draw"`` one integer per sample that no other draw of
    the run shares. All that a method leaves to chance about a sample (crop, mask, augmentation)
    follows from that integer through `random_of`, so a sample is treated alike whatever the number
    of processes, and a resumed run goes on as if it had not stopped.

    Attributes:
        starting_points: Arguments (dotted where they lie in a dictionary) that only say which
            weights to begin with, so that a checkpoint can be read without them.
    """

    starting_points: ClassVar[tuple[str, ...]] = ()

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: Data of the samples, on the method's device.

        Returns:
            Scalars by name; the loop minimises ``"total"`` and logs them all.
        """
        raise NotImplementedError

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse data that cannot be trained on; called once, with one sample, before a run.

        Args:
            batch: As `forward` gets them, on the CPU.

        Raises:
            GeofmError: What is missing, or of another shape than expected.
        """

    def export(self) -> Exported:
        """The trained model, without what only pretraining needs.

        Returns:
            Its name, arguments and weights.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and vectors.

        Returns:
            Their names.
        """
        return set()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters as the optimizer takes them: timm's split into decayed and not.

        Args:
            weight_decay: Of matrices and kernels; biases and vectors have none.

        Returns:
            Groups; one may hold ``"lr_scale"``, a factor on the learning rate.
        """
        groups: list[dict[str, Any]] = param_groups_weight_decay(
            self, weight_decay, no_weight_decay_list=self.no_weight_decay()
        )
        return groups


def draws_of(batch: Mapping[str, Any], count: int) -> list[int]:
    """The integers that a batch's random numbers follow from.

    Args:
        batch: A batch; its ``"draw"`` is used where it has one.
        count: Number of samples.

    Returns:
        One per sample. Without ``"draw"`` they come from torch's global generator.
    """
    draws = batch.get("draw")
    if draws is None:
        draws = torch.randint(2**62, (count,))
    # One transfer from the GPU, not one for each.
    numbers: list[int] = torch.as_tensor(draws).tolist()
    return numbers


def random_of(draw: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one draw of one sample.

    Args:
        draw: From the batch's ``"draw"``; at least 0.
        stream: Independent numbers for independent purposes, such as 0 for the crop and 1 for the
            mask.

    Returns:
        A generator (counter-based: Philox) in its initial state.
    """
    return np.random.Generator(np.random.Philox(key=np.array([draw, stream], np.uint64)))
