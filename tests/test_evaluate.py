"""Accuracies against a slow reference and scikit-learn; few-shot fine-tuning learns."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

import geofm
from geofm.errors import ModelError
from geofm.evaluate import few_shot, sample_few_shot, zero_shot_accuracy
from geofm.predictions import Prediction
from geofm.taxonomy import TaxonError, builtin_taxa
from geofm.zeroshot import SpeciesClassifier

CLASSES = ("Rare", "Common", "Frequent")
TAXA = tuple(
    replace(taxon, category=CLASSES[i % 3]) for i, taxon in enumerate(builtin_taxa()[100:160])
)


def case(count=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, len(TAXA), (count,), generator=generator)
    logits = 2 * torch.randn(count, len(TAXA), generator=generator)
    logits[torch.arange(count), true] += 3
    return Prediction(logits.softmax(1), TAXA), true


def slow_accuracy(prediction, true, level, k, definition, category):
    right = []
    for row, t in zip(prediction.probabilities.tolist(), true.tolist(), strict=True):
        if category not in ("All", TAXA[t].category):
            continue
        wanted = getattr(TAXA[t], level)
        if definition == "published":
            best = sorted(range(len(TAXA)), key=lambda i: -row[i])[:k]
            right.append(any(getattr(TAXA[i], level) == wanted for i in best))
        else:
            sums = {}
            for i, p in enumerate(row):
                name = getattr(TAXA[i], level)
                sums[name] = sums.get(name, 0.0) + p
            right.append(wanted in sorted(sums, key=lambda name: -sums[name])[:k])
    return sum(right) / len(right)


def test_accuracy_equals_a_plain_loop():
    prediction, true = case()
    result = zero_shot_accuracy(prediction, TAXA, true)
    assert len(result.rows) == 4 * 3 * 2 * 2
    for row in result.rows:
        expected = slow_accuracy(prediction, true, row.level, row.k, row.definition, row.category)
        assert row.value == pytest.approx(expected), row
    values = {(row.level, row.k, row.definition): row.value for row in result.rows[:12]}
    assert any(
        values[level, 1, "sum"] != values[level, 1, "published"] for level in ("genus", "family")
    )


def test_species_accuracy_equals_scikit_learns():
    prediction, true = case()
    result = zero_shot_accuracy(prediction, None, true, ks=(1, 3, 5))
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(
            true, prediction.probabilities, k=k, labels=range(len(TAXA))
        )
        assert result.get("species", k) == result.get("species", k, definition="sum")
        assert result.get("species", k) == pytest.approx(expected)


def test_true_species_as_names_taxa_or_places():
    prediction, true = case()
    taxa = [TAXA[i] for i in true]
    expected = zero_shot_accuracy(prediction, TAXA, true)
    assert zero_shot_accuracy(prediction.probabilities, TAXA, taxa) == expected
    assert zero_shot_accuracy(prediction, None, [taxon.species for taxon in taxa]) == expected


def test_categories_given_go_before_those_of_the_taxa():
    prediction, true = case(6)
    result = zero_shot_accuracy(prediction, None, true, ["b", "a", "Rare", "b", "a", "b"])
    counts = {row.category: row.count for row in result.rows}
    assert counts == {"All": 6, "Rare": 1, "a": 2, "b": 3}
    plain = Prediction(prediction.probabilities, tuple(replace(t, category=None) for t in TAXA))
    assert {row.category for row in zero_shot_accuracy(plain, None, true).rows} == {"All"}


def test_results_as_a_table():
    prediction, true = case()
    result = zero_shot_accuracy(prediction, None, true)
    lines = result.table().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| All",
        "| Rare",
        "| Common",
        "| Frequent",
    ]
    assert f"{100 * result.get('species'):.2f}" in lines[2]
    with pytest.raises(KeyError, match="no accuracy for"):
        result.get("species", 7)


def test_what_does_not_go_together_is_an_error():
    prediction, true = case(4)
    with pytest.raises(TaxonError, match="3 true species for 4"):
        zero_shot_accuracy(prediction, None, true[:3])
    with pytest.raises(TaxonError, match="not among the 60 taxa"):
        zero_shot_accuracy(prediction, None, ["Xyz abc"] * 4)
    with pytest.raises(TaxonError, match="2 categories for 4"):
        zero_shot_accuracy(prediction, None, true, ["Rare", "Rare"])
    with pytest.raises(TaxonError, match="for other taxa"):
        zero_shot_accuracy(prediction, TAXA[::-1], true)
    with pytest.raises(TaxonError, match="give taxa"):
        zero_shot_accuracy(prediction.probabilities, None, true)
    with pytest.raises(TaxonError, match="from 0 to 59"):
        zero_shot_accuracy(prediction, None, true + 60)


# Few-shot


def test_sampling_takes_k_of_each_and_the_same_again():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1, 0])
    chosen = sample_few_shot(labels, 2, seed=3)
    assert labels[chosen].bincount().tolist() == [2, 2, 2]
    assert torch.equal(chosen, chosen.unique()) and torch.equal(
        chosen, sample_few_shot(labels, 2, 3)
    )
    drawn = {tuple(sample_few_shot(labels, 2, seed).tolist()) for seed in range(20)}
    assert len(drawn) > 5
    with pytest.raises(ValueError, match="2 species have fewer than 4 samples, such as 1"):
        sample_few_shot(labels, 4)
    with pytest.raises(ValueError, match="k must be positive"):
        sample_few_shot(labels, 0)


def tiny():
    torch.manual_seed(0)
    return geofm.create_model("geotreeclip_tiny")


def samples(per_species=3, species=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(species).repeat(per_species)
    brightness = 500 + 3000 * labels[:, None, None, None, None] / species
    images = brightness + 100 * torch.rand(len(labels), 12, 10, 5, 5, generator=generator)
    images[0, 4] = torch.nan
    auxiliary = torch.rand(len(labels), 27, generator=generator) * 60
    auxiliary[:, 5:] += 100
    return images, auxiliary, labels


@pytest.mark.parametrize("loss", ["info_nce", "cross_entropy"])
def test_few_shot_learns_its_samples(loss):
    model, (images, auxiliary, labels) = tiny(), samples()
    taxa = TAXA[::15]
    untrained = copy.deepcopy(model)
    out = few_shot(model, images, auxiliary, labels, taxa, epochs=12, lr=3e-4, loss=loss)
    assert out is model and not model.training
    scores = [
        zero_shot_accuracy(SpeciesClassifier(m, taxa).predict(images, auxiliary), None, labels)
        for m in (untrained, model)
    ]
    assert scores[1].get("species") > max(0.7, scores[0].get("species"))
    assert torch.equal(model.logit_scale, untrained.logit_scale)


def test_few_shot_is_reproducible_and_can_leave_the_text_tower():
    images, auxiliary, labels = samples()
    models = [
        few_shot(tiny(), images, auxiliary, labels, TAXA[:4], 1, epochs=2, train_text=False)
        for _ in range(2)
    ]
    before = tiny().state_dict()
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])
        if name.startswith("text."):
            assert torch.equal(value, before[name])
    assert not torch.equal(models[0].fusion[0].weight, before["fusion.0.weight"])


def test_few_shot_refuses_what_it_cannot_do():
    images, auxiliary, labels = samples()
    model = tiny()
    with pytest.raises(ModelError, match="'info_nce' or 'cross_entropy'"):
        few_shot(model, images, auxiliary, labels, TAXA[:4], loss="mse")
    with pytest.raises(TaxonError, match="0 to 2"):
        few_shot(model, images, auxiliary, labels, TAXA[:3])
    with pytest.raises(ModelError, match="11 labels for 12 samples"):
        few_shot(model, images, auxiliary, labels[1:], TAXA[:4])
    with pytest.raises(ModelError, match="at least one"):
        few_shot(model, images, auxiliary, labels[:0], TAXA[:4])
