"""k-NN and the linear probe, against scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from geofm import ModelError
from geofm.evaluate import knn_accuracy, knn_votes, linear_probe, stratified_folds

CLASSES, WIDTH = 5, 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny steps: threads that wait for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(count: int, seed: int, spread: float = 2.5) -> tuple[Tensor, Tensor]:
    """Classes that overlap, features of very different scales."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = spread * torch.randn(count, WIDTH, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-2, 2, WIDTH) + 3.0, labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (50, 0.5)])
def test_votes_are_those_of_scikit_learn_with_the_same_weights(k: int, temperature: float) -> None:
    bank, labels = blobs(300, 0)
    queries, _ = blobs(1500, 1)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1.0 - distance) / temperature)

    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    expected = reference.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double())
    votes = knn_votes(bank, labels, queries, k, temperature=temperature)
    np.testing.assert_allclose(votes, expected, atol=1e-4)


def test_a_low_temperature_does_not_overflow_and_leaves_the_nearest() -> None:
    bank, labels = blobs(50, 0)
    votes = knn_votes(bank, labels, bank, 10, temperature=1e-4)
    assert torch.isfinite(votes).all()
    assert torch.equal(votes.argmax(1), labels)


def test_knn_accuracy_counts_a_class_nobody_knows_as_missed() -> None:
    bank = torch.eye(3)
    labels = torch.tensor([0, 1, 1])
    assert knn_accuracy(bank, labels, bank, torch.tensor([0, 1, 7]), 1) == pytest.approx(2 / 3)


def test_the_probe_is_as_good_as_scikit_learns_logistic_regression() -> None:
    features, labels = blobs(600, 0)
    test, test_labels = blobs(2000, 2)
    probe = linear_probe(features[:500], labels[:500], features[500:], labels[500:], lr=1e-2)
    scaler = StandardScaler().fit(features[:500])
    reference = LogisticRegression(C=0.1).fit(scaler.transform(features[:500]), labels[:500])
    expected = reference.score(scaler.transform(test), test_labels)
    assert 0.4 < expected < 0.95  # neither trivial nor hopeless
    assert probe.accuracy(test, test_labels) == pytest.approx(expected, abs=0.02)


def test_the_probe_stops_early_and_keeps_the_best_epoch() -> None:
    features, labels = blobs(60, 0, spread=4.0)
    val, val_labels = blobs(60, 1, spread=4.0)
    probe = linear_probe(features, labels, val, val_labels, lr=1e-2, patience=20)
    assert probe.epochs < 200
    again = linear_probe(features, labels, val, val_labels, lr=1e-2, epochs=probe.epochs)
    longer = linear_probe(
        features, labels, val, val_labels, lr=1e-2, epochs=probe.epochs + 60, patience=60
    )
    assert torch.equal(probe.linear.weight, again.linear.weight)
    assert torch.equal(probe.linear.weight, longer.linear.weight)  # kept, though it went on


def test_the_seed_fixes_the_probe_whatever_the_global_generator() -> None:
    features, labels = blobs(600, 0)
    probes = []
    for state, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(state)
        probes.append(linear_probe(features, labels, features, labels, epochs=3, seed=seed))
    assert torch.equal(probes[0].linear.weight, probes[1].linear.weight)
    assert not torch.equal(probes[0].linear.weight, probes[2].linear.weight)


def test_a_constant_feature_does_not_spoil_the_probe() -> None:
    features, labels = blobs(200, 0)
    constant = torch.cat([features, torch.full((200, 1), 0.1)], 1)
    probe = linear_probe(constant, labels, constant, labels, epochs=50)
    same = linear_probe(features, labels, features, labels, epochs=50)
    assert probe.accuracy(constant, labels) == same.accuracy(features, labels)
    assert torch.isfinite(probe(constant)).all()


def test_folds_hold_each_class_equally() -> None:
    labels = torch.arange(100) // 10
    folds = stratified_folds(labels, 10, seed=3)
    for fold in range(10):
        assert sorted(labels[folds == fold].tolist()) == list(range(10))
    assert torch.equal(folds, stratified_folds(labels, 10, seed=3))
    assert not torch.equal(folds, stratified_folds(labels, 10, seed=4))
    uneven = stratified_folds(torch.tensor([0] * 7 + [1] * 6), 5)
    assert sorted(torch.bincount(uneven).tolist()) == [2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 51}, "50"),
        ({"temperature": 0.0}, "temperature"),
        ({"labels": torch.zeros(50)}, "int64"),
        ({"labels": torch.zeros(49, dtype=torch.int64)}, "50 int64"),
        ({"labels": torch.full((50,), -1)}, "-1"),
        ({"bank": torch.full((50, WIDTH), torch.nan)}, "NaN"),
        ({"queries": torch.zeros(3, WIDTH + 1)}, "features"),
    ],
)
def test_knn_refuses_what_does_not_fit(change: dict, message: str) -> None:
    bank, labels = blobs(50, 0)
    given = {"bank": bank, "labels": labels, "queries": bank, "k": 3} | change
    with pytest.raises(ModelError, match=message):
        knn_votes(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(50)}, "training.*int64"),
        ({"val_features": torch.full((50, WIDTH), torch.nan)}, "validation.*NaN"),
        ({"val_features": torch.zeros(50, 3)}, "validation features 3"),
        ({"val_labels": torch.zeros(9, dtype=torch.int64)}, "validation.*50"),
        ({"num_classes": 2}, "0 to 1"),
        ({"patience": 0}, "patience"),
    ],
)
def test_the_probe_refuses_what_does_not_fit(change: dict, message: str) -> None:
    features, labels = blobs(50, 0)
    given = {"features": features, "labels": labels, "val_features": features} | {
        "val_labels": labels
    }
    with pytest.raises(ModelError, match=message):
        linear_probe(**(given | change))


def test_folds_refuse_more_parts_than_samples() -> None:
    with pytest.raises(ModelError, match="5 folds of 3"):
        stratified_folds(torch.zeros(3), 5)
