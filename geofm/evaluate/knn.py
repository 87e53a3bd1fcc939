"""Nearest neighbours in feature space: how well classes lie together, without any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geofm.errors import ModelError

__all__ = ["knn_accuracy", "knn_votes"]

# Queries compared at once, so that the similarities to a large bank fit into memory.
_CHUNK = 1024


def knn_votes(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int,
    *,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Classify by the k most similar samples of known class.

    Similarity is the cosine s; a neighbour's vote weighs exp(s / temperature), and the votes of a
    query are divided by their sum (arXiv 1805.01978, section 3.4; the protocol of SSL4Eco, arXiv
    2504.18256).

    Args:
        bank: (N, D), features of samples whose class is known.
        labels: (N,), their classes, integers from 0.
        queries: (M, D), features to classify.
        k: Number of neighbours, 1 to N.
        temperature: The smaller, the more the nearest one counts; above 0.
        num_classes: Columns of the result; None for one more than the largest label.

    Returns:
        (M, num_classes), votes that sum to 1 for each query.

    Raises:
        ModelError: Shapes, labels or numbers do not fit together.
    """
    _check(bank, labels, queries, k, temperature)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ModelError(
            f"labels are {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1}"
        )
    # Features come from a GPU as often as labels come from the CPU.
    labels, queries = labels.to(bank.device), queries.to(bank.device)
    bank = F.normalize(bank.float(), dim=1)
    votes = []
    for part in torch.split(F.normalize(queries.float(), dim=1), _CHUNK):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        # A softmax over the neighbours: the same shares as exp, but without overflow.
        weight = (similarity / temperature).softmax(1)
        votes.append(weight.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weight))
    return torch.cat(votes)


def knn_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    *,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class gets the most votes of the k nearest samples.

    Args:
        bank: (N, D), features of samples whose class is known.
        labels: (N,), their classes.
        queries: (M, D), features to classify; M at least 1.
        query_labels: (M,), their true classes. One that `labels` lacks is never hit.
        k: Number of neighbours.
        temperature: As in `knn_votes`.

    Returns:
        Accuracy from 0 to 1.

    Raises:
        ModelError: As `knn_votes`, or the queries and their labels differ in number.
    """
    if len(queries) != len(query_labels) or len(queries) == 0:
        raise ModelError(f"{len(queries)} queries and {len(query_labels)} labels of queries")
    votes = knn_votes(bank, labels, queries, k, temperature=temperature)
    return float((votes.argmax(1) == query_labels.to(votes.device)).float().mean())


def _check(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ModelError(
            f"expected (N, D) and (M, D) features, got {tuple(bank.shape)} and "
            f"{tuple(queries.shape)}"
        )
    if labels.shape != bank.shape[:1] or labels.dtype != torch.int64:
        raise ModelError(
            f"labels must be {len(bank)} int64 classes, got {tuple(labels.shape)} {labels.dtype}"
        )
    if not 1 <= k <= len(bank):
        raise ModelError(f"k is {k}; expected 1 to the number of labelled samples, {len(bank)}")
    if not temperature > 0:
        raise ModelError(f"temperature must be above 0, got {temperature}")
    if not (torch.isfinite(bank).all() and torch.isfinite(queries).all()):
        raise ModelError("features have NaN or infinities; look for missing pixels in the input")
