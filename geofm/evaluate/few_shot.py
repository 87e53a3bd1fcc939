"""Fine-tuning on a few samples of each species."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geofm.errors import ModelError
from geofm.taxonomy import Taxon, TaxonError
from geofm.zeroshot import Observations

__all__ = ["few_shot", "sample_few_shot"]

logger = logging.getLogger(__name__)

# Of the published training; its text tower learns ten times slower, gradients are clipped.
_TEMPERATURE = 0.07
_TEXT_RATE = 0.1
_WEIGHT_DECAY = 1e-4
_LARGEST_GRADIENT = 1.0


def sample_few_shot(labels: Tensor | Sequence[int], k: int, seed: int = 0) -> Tensor:
    """Choose k samples of each species.

    Args:
        labels: (N,), the species of each sample.
        k: Samples per species.
        seed: The same seed chooses the same samples.

    Returns:
        Indices of the chosen samples, rising; k for each species that occurs.

    Raises:
        ValueError: A species has fewer than k samples, or k is not positive.
    """
    labels = torch.as_tensor(labels)
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    species, counts = torch.unique(labels, return_counts=True)
    if few := species[counts < k].tolist():
        raise ValueError(f"{len(few)} species have fewer than {k} samples, such as {few[0]}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Species together, each in random order; then the first k of each.
    order = order[labels[order].argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    return order[(starts[:, None] + torch.arange(k)).flatten()].sort().values


def few_shot(
    model: Any,
    images: Tensor,
    auxiliary: Any,
    labels: Tensor | Sequence[int],
    taxa: Sequence[Taxon],
    k: int | None = None,
    *,
    image_mask: Tensor | None = None,
    auxiliary_mask: Tensor | None = None,
    epochs: int = 10,
    lr: float = 1e-5,
    batch_size: int = 32,
    loss: str = "info_nce",
    train_text: bool = True,
    seed: int = 0,
) -> Any:
    """Fine-tune on a few samples of each species, as published for 1 and 3.

    AdamW; the text tower learns ten times slower, weight decay 1e-4, gradients clipped to 1.

    Args:
        model: A `GeoTreeCLIP`. It is changed; copy it first to keep it as it was.
        images: (N, 12, bands, h, w), monthly median DN, NaN in missing months.
        auxiliary: Environmental variables: (N, variables), a dict of columns, or a list of dicts.
        labels: (N,), the place of each sample's species in `taxa`.
        taxa: The species.
        k: Samples per species to take out of these by `seed`; None takes all.
        image_mask: (N, 12), True where a month was observed; None: where it has no NaN.
        auxiliary_mask: (N, variables), True where a value is known; None: where it is finite.
        epochs: Passes over the samples.
        lr: Learning rate, constant.
        batch_size: Samples a step.
        loss: ``"info_nce"``: observations of a batch against its names and the other way round, at
            temperature 0.07; samples of one species all belong to its name. ``"cross_entropy"``:
            observations against the names of all taxa, encoded anew at every step: for some hundred
            taxa.
        train_text: Train the text tower too.
        seed: Of the sampling and of the order. The same seed on the same machine gives the same
            weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: An option is unknown, or there are no samples.
        TaxonError: A label is not a place in `taxa`.
        ValueError: A species has fewer than k samples.
    """
    labels = torch.as_tensor(labels)
    _check(labels, taxa, loss)
    inputs = Observations(images, auxiliary, image_mask, auxiliary_mask)
    if len(labels) != inputs.count:
        raise ModelError(f"{len(labels)} labels for {inputs.count} samples")
    chosen = torch.arange(len(labels)) if k is None else sample_few_shot(labels, k, seed)
    tokens = model.tokenize(taxa)
    optimizer = _optimizer(model, lr, train_text)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for batch in torch.split(order, batch_size):
            features = model.encode_image(*inputs[batch], normalize=True)
            value = _loss(model, features, labels[batch], tokens, loss, train_text)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]],
                _LARGEST_GRADIENT,
            )
            optimizer.step()
            total += float(value.detach()) * len(batch)
        logger.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, total / len(chosen))
    model.eval()
    return model


def _check(labels: Tensor, taxa: Sequence[Taxon], loss: str) -> None:
    if loss not in ("info_nce", "cross_entropy"):
        raise ModelError(f"loss must be 'info_nce' or 'cross_entropy', got {loss!r}")
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ModelError(f"labels must be (N,) integers, at least one; got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(taxa):
        raise TaxonError(f"labels must be places among the taxa, 0 to {len(taxa) - 1}")


def _optimizer(model: Any, lr: float, train_text: bool) -> torch.optim.AdamW:
    text = set(model.text.parameters())
    # The factor of the logits is for predicting; training has a temperature of its own.
    rest = [p for p in model.parameters() if p not in text and p is not model.logit_scale]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if train_text:
        groups.append({"params": list(model.text.parameters()), "lr": lr * _TEXT_RATE})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=_WEIGHT_DECAY)


def _loss(
    model: Any, features: Tensor, labels: Tensor, tokens: Tensor, loss: str, train_text: bool
) -> Tensor:
    with torch.set_grad_enabled(train_text):
        if loss == "cross_entropy":
            text = model.encode_text(tokens, normalize=True)
        else:
            names, which = torch.unique(labels, return_inverse=True)
            # Each name of the batch is computed once.
            text = model.encode_text(tokens[names], normalize=True)[which.to(features.device)]
    logits = features @ text.T / _TEMPERATURE
    labels = labels.to(logits.device)
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels)
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
