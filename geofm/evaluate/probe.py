"""A linear classifier on frozen features, as SSL4Eco's evaluation trains it (arXiv 2504.18256)."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geofm.errors import ModelError

__all__ = ["LinearProbe", "linear_probe", "stratified_folds"]

logger = logging.getLogger(__name__)

# Features that vary less than this are constant; dividing by it would only amplify rounding.
_CONSTANT = 1e-6


class LinearProbe(nn.Module):
    """Standardisation by the training features, then one linear layer.

    Args:
        features: (N, D), training features, which fix the mean and the deviation of each.
        num_classes: Number of outputs.

    Attributes:
        epochs: Passes over the data until the weights that were kept; 0 before training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor, num_classes: int) -> None:
        super().__init__()
        deviation = features.std(0, correction=0)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("scale", deviation.masked_fill(deviation < _CONSTANT, 1.0))
        self.linear = nn.Linear(features.shape[1], num_classes, device=features.device)
        # The loss is convex, so zero is as good a start as any and needs no random numbers.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.epochs = 0

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features.

        Args:
            features: (N, D), as the encoder gives them.

        Returns:
            (N, num_classes).
        """
        out: Tensor = self.linear((features - self.mean) / self.scale)
        return out

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of samples whose class has the largest logit.

        Args:
            features: (N, D), N at least 1.
            labels: (N,), true classes.

        Returns:
            From 0 to 1.
        """
        found = self(features.float().to(self.mean.device)).argmax(1)
        return float((found == labels.to(found.device)).float().mean())


def linear_probe(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    batch_size: int = 256,
    epochs: int = 1000,
    patience: int = 20,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier on frozen features.

    As published: AdamW, learning rate 1e-3, batches of 256, at most 1000 epochs, early stopping on
    the validation loss. The publication states neither weight decay nor patience: here PyTorch's
    default and 20 epochs.

    Args:
        features: (N, D), float; what to train on.
        labels: (N,), classes, int64 from 0.
        val_features: (V, D); decide when to stop, and nothing else.
        val_labels: (V,).
        num_classes: Number of outputs; None for one more than the largest label of both parts.
        lr: Learning rate, constant.
        weight_decay: Of the weights and the bias.
        batch_size: Samples a step.
        epochs: Most passes over the data.
        patience: Stop after so many epochs without a lower validation loss.
        seed: Of the order of samples, the only thing left to chance.

    Returns:
        The probe of the epoch with the lowest validation loss, in evaluation mode.

    Raises:
        ModelError: Shapes or labels do not fit together, features are not finite, or a number is
            not positive.
    """
    if min(batch_size, epochs, patience) < 1:
        raise ModelError(
            f"batch_size, epochs and patience must be at least 1, got {batch_size}, {epochs} and "
            f"{patience}"
        )
    _check(features, labels, "training", num_classes)
    _check(val_features, val_labels, "validation", num_classes)
    if features.shape[1] != val_features.shape[1]:
        raise ModelError(
            f"training features have {features.shape[1]} numbers, validation features "
            f"{val_features.shape[1]}"
        )
    # Features come from a GPU as often as labels come from the CPU.
    device = features.device
    labels, val_labels = labels.to(device), val_labels.to(device)
    features, val_features = features.detach().float(), val_features.detach().float().to(device)
    if num_classes is None:
        num_classes = int(torch.cat([labels, val_labels]).max()) + 1
    probe = LinearProbe(features, num_classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    best, kept = float("inf"), probe.state_dict()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in torch.split(order, batch_size):
            loss = F.cross_entropy(probe(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            value = float(F.cross_entropy(probe(val_features), val_labels))
        if value < best:
            best, probe.epochs = value, epoch
            kept = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
        elif epoch - probe.epochs >= patience:
            break
    probe.load_state_dict(kept)
    logger.info("linear probe: validation loss %.4f after %d epochs", best, probe.epochs)
    return probe.eval()


def stratified_folds(labels: Tensor, folds: int = 10, seed: int = 0) -> Tensor:
    """Divide samples into parts that hold as many of each class as can be.

    Args:
        labels: (N,), classes.
        folds: Number of parts, at least 2.
        seed: The same seed makes the same parts.

    Returns:
        (N,), the part of each sample, 0 to ``folds - 1``.

    Raises:
        ModelError: There are fewer samples than parts, or fewer than two parts.
    """
    if not 2 <= folds <= len(labels):
        raise ModelError(
            f"{folds} folds of {len(labels)} samples: expected 2 to as many as samples"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]
    parts = torch.empty(len(labels), dtype=torch.int64)
    # Dealt out class after class without a new start, so that the parts stay equally large.
    parts[order] = torch.arange(len(labels)) % folds
    return parts.to(labels.device)


def _check(features: Tensor, labels: Tensor, part: str, num_classes: int | None) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ModelError(
            f"{part}: expected (N, D) features and (N,) labels, N at least 1; got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ModelError(f"{part}: labels must be int64 classes, got {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        upper = "" if num_classes is None else f" to {num_classes - 1}"
        raise ModelError(f"{part}: labels are {low} to {high}; expected them from 0{upper}")
    if not torch.isfinite(features).all():
        raise ModelError(f"{part}: features have NaN or infinities; look for missing pixels")
