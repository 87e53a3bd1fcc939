"""Zero-shot calls: names encoded once and fast, rankings, roll-ups, restriction, calibration."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import build_zero_shot_classifier
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss
from torch import nn

import geofm
from geofm import text_features
from geofm.errors import PixelError
from geofm.predictions import Prediction, top_k
from geofm.taxonomy import Taxon, TaxonError, builtin_taxa
from geofm.text_features import encode_prompts, text_key
from geofm.zeroshot import SpeciesClassifier, fit_temperature, zero_shot

TAXA = builtin_taxa()[::7]
PROMPTS = [taxon.prompt for taxon in TAXA]


def tiny(seed=0):
    torch.manual_seed(seed)
    return geofm.create_model("geotreeclip_tiny").eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def classifier(model):
    return SpeciesClassifier(model, TAXA)


def observations(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 12, 10, 5, 5, generator=generator) * 4000
    auxiliary = torch.rand(count, 27, generator=generator) * 60
    # Soil moisture in thousandths, temperatures in tenths of a degree.
    auxiliary[:, 5:] += 100
    return images, auxiliary


def padded_features(model, prompts):
    """Every prompt with all of its 77 tokens, as published."""
    with torch.inference_mode():
        return F.normalize(model.text(model.tokenize(prompts)), dim=-1)


# Names


def test_shared_beginnings_change_no_feature(model):
    features = encode_prompts(model, PROMPTS)
    assert features.shape == (len(TAXA), model.embed_dim) and features.dtype == torch.float32
    torch.testing.assert_close(features, padded_features(model, PROMPTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pack", [16, 40, 1000])
@pytest.mark.parametrize("batch_size", [1, 37, 4096])
def test_features_do_not_depend_on_packing(model, monkeypatch, pack, batch_size):
    monkeypatch.setattr(text_features, "_PACK", pack)
    features = encode_prompts(model, PROMPTS, batch_size)
    torch.testing.assert_close(features, padded_features(model, PROMPTS), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["oak", "fagus", "x", "/", "sylvatica"]), max_size=90)),
    st.sampled_from([4, 20, 128]),
)
def test_any_prompts_are_encoded_as_if_alone(prompts, pack):
    texts = [" ".join(words) for words in prompts] + ["oak"]
    model = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_features, "_PACK", pack)
        features = encode_prompts(model, texts)
    torch.testing.assert_close(features, padded_features(model, texts), atol=1e-5, rtol=0)


class OtherTower(nn.Module):
    """A model whose text tower is of another kind."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.lengths = []

    def tokenize(self, prompts):
        return self.inner.tokenize(prompts)

    def encode_text(self, tokens, normalize=False):
        self.lengths.append((tokens.argmax(-1) + 1).tolist())
        return self.inner.encode_text(tokens, normalize)


def test_other_towers_get_batches_of_similar_length(model):
    other = OtherTower(model)
    features = encode_prompts(other, PROMPTS, 10)
    torch.testing.assert_close(features, padded_features(model, PROMPTS), atol=1e-5, rtol=0)
    lengths = [length for batch in other.lengths for length in batch]
    assert lengths == sorted(lengths) and max(map(len, other.lengths)) == 10


def test_open_clips_zero_shot_classifier_agrees(model, classifier):
    theirs = build_zero_shot_classifier(model, model.tokenize, PROMPTS, ["{}"])
    torch.testing.assert_close(classifier.text_features, theirs.T, atol=1e-5, rtol=0)
    by_taxon = build_zero_shot_classifier(model, model.tokenize, TAXA, [lambda t: t.prompt])
    torch.testing.assert_close(by_taxon, theirs)


def test_training_mode_is_left_as_it_was():
    model = tiny()
    model.train()
    model.series.eval()
    SpeciesClassifier(model, TAXA[:3]).predict(*observations(1))
    assert model.training and model.text.training and not model.series.training


def test_no_names_and_repeated_names(model):
    assert encode_prompts(model, []).shape == (0, model.embed_dim)
    features = encode_prompts(model, [PROMPTS[3], PROMPTS[0], PROMPTS[3]])
    assert torch.equal(features[0], features[2])


# Cache


def count_encodings(monkeypatch):
    calls = []
    encode = text_features._encode
    monkeypatch.setattr(text_features, "_encode", lambda *a: calls.append(1) or encode(*a))
    return calls


def test_cached_names_are_not_encoded_again(tmp_path, monkeypatch, classifier):
    calls = count_encodings(monkeypatch)
    first = SpeciesClassifier(tiny(), TAXA, cache=tmp_path / "new")
    again = SpeciesClassifier(tiny(), TAXA, cache=tmp_path / "new")
    assert len(calls) == 1
    assert torch.equal(first.text_features, again.text_features)
    torch.testing.assert_close(again.text_features, classifier.text_features, atol=1e-6, rtol=0)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_cache_is_not_used_for_other_weights_or_names(tmp_path, monkeypatch):
    calls = count_encodings(monkeypatch)
    model = tiny()
    before = SpeciesClassifier(model, TAXA, cache=tmp_path).text_features
    with torch.no_grad():
        model.text.ln_final.bias += 0.5
    after = SpeciesClassifier(model, TAXA, cache=tmp_path).text_features
    SpeciesClassifier(model, TAXA[:-1], cache=tmp_path)
    SpeciesClassifier(model, TAXA[::-1], cache=tmp_path)
    assert len(calls) == 4 and not torch.allclose(before, after, atol=1e-3)


def test_key_tells_heads_apart_that_no_shape_tells(model):
    other = tiny()
    other.text.transformer.resblocks[0].attn.num_heads = 6
    assert text_key(other, PROMPTS) != text_key(model, PROMPTS) == text_key(tiny(), PROMPTS)


@pytest.mark.parametrize("damage", ["truncated", "renamed", "short"])
def test_a_bad_cache_file_is_warned_of_and_replaced(tmp_path, model, classifier, damage):
    key = text_key(model, PROMPTS)
    path = tmp_path / f"{key}.safetensors"
    if damage == "short":
        text_features._write(path, key, classifier.text_features[:5])
    else:
        text_features._write(path, "other", classifier.text_features + 1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="encoded anew"):
        features = SpeciesClassifier(model, TAXA, cache=tmp_path).text_features
    torch.testing.assert_close(features, classifier.text_features)
    assert torch.equal(SpeciesClassifier(model, TAXA, cache=tmp_path).text_features, features)


# Prediction


def test_prediction_is_the_softmax_of_scaled_cosines(model, classifier):
    images, auxiliary = observations(5)
    prediction = classifier.predict(images, auxiliary)
    with torch.no_grad():
        out = model(images, auxiliary, list(TAXA))
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    torch.testing.assert_close(classifier.logits(images, auxiliary), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(prediction.probabilities, logits.softmax(1), atol=1e-5, rtol=0)
    warm = SpeciesClassifier(model, TAXA, temperature=4.0).predict(images, auxiliary)
    torch.testing.assert_close(warm.probabilities, (logits / 4).softmax(1), atol=1e-5, rtol=0)
    assert not prediction.probabilities.requires_grad


def test_a_batch_of_one_equals_a_batch_of_64(classifier):
    images, auxiliary = observations(64)
    images[5, 3] = torch.nan
    whole = classifier.predict(images, auxiliary, batch_size=64).probabilities
    for i in (0, 5, 63):
        alone = classifier.predict(images[i], auxiliary[i]).probabilities
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=0)
    by_one = classifier.predict(images[:8], auxiliary[:8], batch_size=1).probabilities
    torch.testing.assert_close(by_one, whole[:8], atol=1e-5, rtol=0)


def test_a_missing_month_touches_only_its_sample(classifier):
    images, auxiliary = observations(6)
    before = classifier.predict(images, auxiliary).probabilities
    images[2, 7] = torch.nan
    after = classifier.predict(images, auxiliary).probabilities
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(after[others], before[others], atol=1e-5, rtol=0)
    assert torch.isfinite(after).all() and not torch.equal(after[2], before[2])
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[2, 7] = False
    masked = classifier.predict(observations(6)[0], auxiliary, mask).probabilities
    torch.testing.assert_close(masked, after, atol=1e-5, rtol=0)


def test_auxiliary_in_every_form(model, classifier):
    images, auxiliary = observations(5)
    names = [variable.name for variable in model.variables]
    columns = dict(zip(names, auxiliary.T, strict=True))
    rows = [dict(zip(names, row, strict=True)) for row in auxiliary.tolist()]
    lists = {name: column.tolist() for name, column in columns.items()}
    expected = classifier.predict(images, auxiliary, batch_size=2).probabilities
    for form in (columns, rows, lists, auxiliary.numpy()):
        got = classifier.predict(images, form, batch_size=2).probabilities
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    known = torch.ones(5, 27, dtype=torch.bool)
    known[:, 2] = False
    without = classifier.predict(images, auxiliary, None, known).probabilities
    assert not torch.allclose(without, expected)


def test_arguments_of_different_lengths_are_an_error(classifier):
    images, auxiliary = observations(4)
    with pytest.raises(PixelError, match="auxiliary has 3 rows for 4 observations"):
        classifier.predict(images, auxiliary[:3])
    with pytest.raises(PixelError, match="auxiliary bio01 has 2 rows for 4"):
        classifier.predict(images, {"bio01": [100, 120]})
    with pytest.raises(PixelError, match="image_mask has 1 rows for 4"):
        classifier.predict(images, auxiliary, torch.ones(12))
    with pytest.raises(ValueError, match="batch_size"):
        classifier.predict(images, auxiliary, batch_size=0)


# Ranking


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 40), st.integers(0, 10_000))
def test_equal_scores_rank_by_place(rows, columns, k, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, columns), generator=generator) / 4
    best = top_k(scores, k)
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best.values, order.values[:, :k])
    assert torch.equal(best.indices, order.indices[:, :k])


def prediction_of(probabilities, taxa=TAXA):
    return Prediction(torch.as_tensor(probabilities), tuple(taxa))


def random_prediction(count, taxa=TAXA, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return prediction_of((3 * torch.randn(count, len(taxa), generator=generator)).softmax(1), taxa)


def test_table_and_csv(tmp_path):
    prediction = random_prediction(3)
    rows = prediction.table(4, samples=["a", "b", "c"])
    assert [(row["sample"], row["rank"]) for row in rows[:5]] == [
        *(("a", rank) for rank in (1, 2, 3, 4)),
        ("b", 1),
    ]
    values, indices = prediction.top(4)
    for row, i, value in zip(rows, indices.flatten(), values.flatten(), strict=True):
        taxon = TAXA[i]
        assert (row["species"], row["genus"], row["family"], row["leaf_type"]) == (
            taxon.species,
            taxon.genus,
            taxon.family,
            taxon.leaf_type,
        )
        assert row["probability"] == float(value)
    prediction.to_csv(tmp_path / "a.csv", 4)
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(Prediction.COLUMNS) and len(read) == 12
    assert [float(row["probability"]) for row in read] == [row["probability"] for row in rows]
    with pytest.raises(TaxonError, match="2 sample names for 3"):
        prediction.table(samples=["a", "b"])
    with pytest.raises(ValueError, match="k must be positive"):
        prediction.top(0)


def test_roll_up_table(tmp_path):
    families = random_prediction(2).roll_up("family")
    rows = families.table(3)
    assert len(rows) == 6 and tuple(rows[0]) == families.columns
    assert rows[0]["family"] == families.names[int(families.probabilities[0].argmax())]
    own = [taxon for taxon in TAXA if taxon.family == rows[0]["family"]]
    assert rows[0]["species_count"] == len(own)
    families.to_csv(tmp_path / "a.csv", 3)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 7


# Roll-up


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=25),
    st.sampled_from(["genus", "family", "leaf_type", "species"]),
    st.integers(1, 60),
    st.integers(0, 10_000),
)
def test_roll_up_equals_a_plain_loop(count, places, level, chunk, seed):
    taxa = [
        Taxon("Evergreen Broadleaf", f"F{f}aceae", f"G{g}", f"G{g} s{i}")
        for i, (f, g) in enumerate(places)
    ]
    prediction = random_prediction(count, taxa, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geofm.predictions._CHUNK", chunk)
        sums, tops = (prediction.roll_up(level, method) for method in ("sum", "top"))
    names = list(dict.fromkeys(getattr(taxon, level) for taxon in taxa))
    assert list(sums.names) == list(tops.names) == names
    for n in range(count):
        for g, name in enumerate(names):
            own = [
                float(prediction.probabilities[n, i])
                for i, taxon in enumerate(taxa)
                if getattr(taxon, level) == name
            ]
            assert math.isclose(float(sums.probabilities[n, g]), sum(own), abs_tol=1e-6)
            assert float(tops.probabilities[n, g]) == max(own)
        best = taxa[int(prediction.top(1).indices[n, 0])]
        assert tops.names[int(tops.top(1).indices[n, 0])] == getattr(best, level)


def test_roll_up_goes_by_the_lists_genus_even_if_the_name_says_otherwise():
    taxa = [
        Taxon("Deciduous Broadleaf", "Rosaceae", "Malus", "Malus sylvestris"),
        Taxon("Deciduous Broadleaf", "Rosaceae", "Malus", "Docynia delavayi"),
    ]
    assert prediction_of([[0.3, 0.7]], taxa).roll_up("genus").names == ("Malus",)


def test_the_two_roll_ups_differ_where_many_species_share_a_probability():
    taxa = [
        Taxon("Deciduous Broadleaf", "Fagaceae", "Fagus", "Fagus sylvatica"),
        *(Taxon("Deciduous Broadleaf", "Salicaceae", "Salix", f"Salix a{c}") for c in "bcd"),
    ]
    prediction = prediction_of([[0.4, 0.2, 0.2, 0.2]], taxa)
    best = {m: prediction.roll_up("genus", m).table(1)[0]["genus"] for m in ("sum", "top")}
    assert best == {"sum": "Salix", "top": "Fagus"}


def test_roll_up_of_half_precision_is_summed_in_single():
    prediction = random_prediction(2)
    half = prediction_of(prediction.probabilities.bfloat16())
    sums = half.roll_up("leaf_type").probabilities
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(1), half.probabilities.float().sum(1))


def test_what_cannot_be_rolled_up_says_so():
    prediction = random_prediction(1)
    with pytest.raises(TaxonError, match="level must be one of species, genus"):
        prediction.roll_up("order")
    with pytest.raises(TaxonError, match="'sum' or 'top'"):
        prediction.roll_up("genus", "mean")
    with pytest.raises(TaxonError, match=r"must be \(N, 2\)"):
        Prediction(torch.ones(1, 3), TAXA[:2])


# Restriction


def test_restricting_equals_choosing_among_these_from_the_start(model, classifier, monkeypatch):
    images, auxiliary = observations(4)
    calls = count_encodings(monkeypatch)
    few = classifier.restrict(family="Pinaceae")
    assert not calls and {taxon.family for taxon in few.taxa} == {"Pinaceae"}
    prediction = few.predict(images, auxiliary)
    own = [taxon for taxon in TAXA if taxon.family == "Pinaceae"]
    alone = SpeciesClassifier(model, own).predict(images, auxiliary)
    torch.testing.assert_close(prediction.probabilities, alone.probabilities, atol=1e-5, rtol=0)
    later = classifier.predict(images, auxiliary).restrict(family="Pinaceae")
    assert later.taxa == prediction.taxa == tuple(own)
    torch.testing.assert_close(prediction.probabilities, later.probabilities, atol=1e-4, rtol=0)


def test_restricting_to_a_flora(classifier):
    flora = [TAXA[4].species, TAXA[1]]
    assert classifier.restrict(flora).taxa == (TAXA[1], TAXA[4])
    with pytest.raises(TaxonError, match="not among the"):
        classifier.restrict(["Xyz abc"])
    with pytest.warns(UserWarning, match="1 of 3 species"):
        assert len(classifier.restrict([*flora, "Xyz abc"], ignore_missing=True)) == 2


def test_nothing_is_made_of_probabilities_of_zero():
    prediction = prediction_of([[1.0, 0.0, 0.0]], TAXA[:3])
    with pytest.raises(TaxonError, match="restrict the classifier"):
        prediction.restrict(list(TAXA[1:3]))


# Calibration


def sharp_logits(count=400, classes=7, seed=0, factor=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    shifted = np.exp(logits)
    labels = [rng.choice(classes, p=row / row.sum()) for row in shifted]
    return torch.tensor(logits * factor), torch.tensor(labels)


@pytest.mark.parametrize("factor", [0.05, 1.0, 30.0])
def test_fitted_temperature_is_the_likeliest(factor):
    logits, labels = sharp_logits(factor=factor)

    def loss(log_t):
        return log_loss(labels, (logits / math.exp(log_t)).softmax(1), labels=range(7))

    best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    fitted = fit_temperature(logits, labels)
    assert math.isclose(fitted, math.exp(best.x), rel_tol=1e-4)
    assert abs(fitted / factor - 1) < 0.2


def test_calibrating_with_a_prediction_takes_its_temperature_into_account():
    logits, labels = sharp_logits()
    expected = fit_temperature(logits, labels)
    made = Prediction((logits / 5).softmax(1), TAXA[:7], 5.0)
    assert math.isclose(fit_temperature(made, labels), expected, rel_tol=1e-6)


def test_calibrate_sets_the_classifiers_temperature(model):
    classifier = SpeciesClassifier(model, TAXA[:7])
    images, auxiliary = observations(60)
    logits = classifier.logits(images, auxiliary)
    # Better than guessing, worse than the logits pretend.
    labels = torch.where(torch.arange(60) % 3 > 0, logits.argmax(1), torch.arange(60) % 7)
    before = F.cross_entropy(logits, labels)
    fitted = classifier.calibrate(logits, labels)
    prediction = classifier.predict(images, auxiliary)
    assert classifier.temperature == prediction.temperature == fitted
    after = F.nll_loss(prediction.probabilities.log(), labels)
    assert after < before
    assert classifier.restrict(list(TAXA[:3])).temperature == fitted
    again = classifier.calibrate(prediction, labels)
    assert math.isclose(again, fitted, rel_tol=1e-3)


def test_labels_that_fit_ever_better_are_warned_of():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.warns(UserWarning, match="no maximum"):
        assert fit_temperature(logits, [0, 1]) == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="no maximum"):
        assert fit_temperature(logits, [1, 0]) == pytest.approx(1e3)


def test_labels_that_cannot_be_are_an_error(classifier):
    logits = torch.zeros(2, 3)
    for labels in ([0], [0, 3], [0, -1], torch.tensor([0.0, 1.0])):
        with pytest.raises(TaxonError, match="labels must be"):
            fit_temperature(logits, labels)
    with pytest.raises(TaxonError, match="some probabilities are 0"):
        fit_temperature(prediction_of([[1.0, 0.0]], TAXA[:2]), [0])
    with pytest.raises(TaxonError, match="not for the classifier"):
        classifier.calibrate(logits, [0, 1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        SpeciesClassifier(classifier.model, TAXA[:2], temperature=0)


# All in one


def test_zero_shot_gives_a_table_for_each_observation(model, tmp_path):
    images, auxiliary = observations(3)
    names = ["Fagus sylvatica", "Quercus robur", "Picea abies"]
    tables = zero_shot(model, images, auxiliary, names, top_k=2)
    assert [[row["rank"] for row in table] for table in tables] == [[1, 2]] * 3
    assert [table[0]["sample"] for table in tables] == [0, 1, 2]
    path = tmp_path / "list.csv"
    path.write_text("species\n" + "\n".join(names))
    assert zero_shot(model, images, auxiliary, path, top_k=2, batch_size=3) == tables
    whole = zero_shot(model, images, auxiliary, names, top_k=50)
    assert all(len(table) == 3 for table in whole)
    assert sum(row["probability"] for row in whole[0]) == pytest.approx(1)


def test_zero_shot_warns_of_odd_names_and_keeps_them(model):
    images, auxiliary = observations(1)
    animal = Taxon("Evergreen Broadleaf", "Picidae", "Dryocopus", "Dryocopus martius")
    with pytest.warns(UserWarning, match="does not end in -aceae") as seen:
        (table,) = zero_shot(model, images, auxiliary, [animal, "Fagus sylvatica"])
    assert len(seen) == 1 and {row["family"] for row in table} == {"Picidae", "Fagaceae"}
