"""Taxa: read, completed, chosen, and looked at for oddities; nothing is dropped silently."""

from __future__ import annotations

import warnings

import pytest
from conftest import data

from geofm.errors import GeofmError
from geofm.taxonomy import (
    LEAF_TYPES,
    LEVELS,
    TaxaReport,
    Taxon,
    TaxonError,
    as_taxa,
    builtin_taxa,
    complete_taxa,
    read_taxa,
    select_taxa,
    taxa_indices,
    taxa_report,
)

OAK = Taxon("Deciduous Broadleaf", "Fagaceae", "Quercus", "Quercus robur")
HOLM = Taxon("Evergreen Broadleaf", "Fagaceae", "Quercus", "Quercus ilex")
PINE = Taxon("Evergreen Needleleaf", "Pinaceae", "Pinus", "Pinus sylvestris")
SETS = (90, 300, 900)


def evaluation_set(species: int):
    return data("globalgeotree", f"GlobalGeoTree-10kEval-{species}.csv")


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_prompt_is_what_the_text_tower_was_trained_on():
    assert OAK.prompt == "Deciduous Broadleaf / Fagaceae / Quercus / Quercus robur"


def test_a_taxon_does_not_depend_on_how_frequent_it_is():
    rare = Taxon(*(getattr(OAK, level) for level in reversed(LEVELS)), category="Rare")
    assert rare == OAK and hash(rare) == hash(OAK) and rare.category == "Rare"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (("Deciduous", "Fagaceae", "Quercus", "Quercus robur"), "unknown leaf type 'Deciduous'"),
        (("Deciduous Broadleaf", "", " ", "Quercus robur"), "no genus and no family"),
    ],
)
def test_an_impossible_taxon_says_what_is_wrong(parts, says):
    with pytest.raises(TaxonError, match=says) as error:
        Taxon(*parts)
    assert isinstance(error.value, GeofmError) and isinstance(error.value, ValueError)


def test_read_taxa_of_a_globalgeotree_list_keeps_order_and_category(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "sample_id,level0,level1_family,level2_genus,level3_species,Category\n"
        "1,Evergreen Needleleaf,Pinaceae,Pinus,Pinus sylvestris,Frequent\n"
        "2,Deciduous Broadleaf,Fagaceae,Quercus,Quercus robur,Rare\n"
        "3,Evergreen Needleleaf,Pinaceae,Pinus,Pinus sylvestris,Frequent\n",
    )
    taxa = read_taxa(path)
    assert taxa == [PINE, OAK]
    assert [taxon.category for taxon in taxa] == ["Frequent", "Rare"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_read_taxa_of_any_list_with_these_columns(tmp_path, separator):
    rows = [
        ("Species", "id", "GENUS", "Family", "Leaf_Type"),
        ("Quercus  robur", "7", "Quercus", "Fagaceae ", "deciduous broadleaf"),
        ("", "", "", "", ""),
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    assert read_taxa(write(tmp_path / "a.csv", text, "utf-8-sig")) == [OAK]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,family\nQuercus robur,Fagaceae\n", "no column 'species'.*it has name, family"),
        ("", "it has no columns"),
        ("species,family,genus\nQuercus robur,Fagaceae,Quercus\n", "no column leaf_type"),
        (
            "species,family,genus,leaf_type\nQuercus robur,Fagaceae,Quercus,leafy\n",
            "line 2: Quercus robur has the unknown leaf type 'leafy'",
        ),
        ("species,family,genus,leaf_type\nQuercus robur,Fagaceae\n", "line 2: .* no genus"),
    ],
)
def test_a_bad_list_is_an_error_that_names_the_line(tmp_path, text, says):
    with pytest.raises(TaxonError, match=says):
        read_taxa(write(tmp_path / "a.csv", text))


def test_contradicting_categories_are_warned_of(tmp_path):
    text = "species,family,genus,leaf_type,category\n" + "".join(
        f"Quercus robur,Fagaceae,Quercus,Deciduous Broadleaf,{c}\n" for c in ("Rare", "Common")
    )
    with pytest.warns(UserWarning, match="1 taxa such as Quercus robur have more than one"):
        taxa = read_taxa(write(tmp_path / "a.csv", text))
    assert taxa == [OAK] and taxa[0].category is None


@pytest.mark.parametrize("species", SETS)
def test_read_taxa_of_the_published_evaluation_sets(species):
    taxa = read_taxa(evaluation_set(species))
    assert len(taxa) == species
    for category in ("Rare", "Common", "Frequent"):
        assert sum(taxon.category == category for taxon in taxa) == species // 3


def test_builtin_table_is_consistent():
    taxa = builtin_taxa()
    assert len(taxa) >= 300
    assert {taxon.leaf_type for taxon in taxa} == set(LEAF_TYPES)
    assert taxa_report(taxa, warn=False).issues == ()
    families = {}
    for taxon in taxa:
        assert families.setdefault(taxon.genus, taxon.family) == taxon.family


def test_builtin_table_agrees_with_the_evaluation_sets():
    own = {taxon.species: taxon for taxon in builtin_taxa()}
    families = {taxon.genus: taxon.family for taxon in builtin_taxa()}
    shared = 0
    for species in SETS:
        for taxon in read_taxa(evaluation_set(species)):
            if taxon.species in own:
                assert own[taxon.species] == taxon
                shared += 1
            assert families.get(taxon.genus, taxon.family) == taxon.family
    assert shared > 200


def test_bare_names_are_completed_from_the_builtin_table():
    taxa = complete_taxa(["fagus_sylvatica", "Quercus robur", "Platanus × hispanica", PINE])
    assert [taxon.genus for taxon in taxa] == ["Fagus", "Quercus", "Platanus", "Pinus"]


def test_a_taxonomy_goes_before_the_builtin_table(tmp_path):
    other = Taxon("Evergreen Broadleaf", "Fagaceae", "Quercus", "Quercus robur")
    path = write(
        tmp_path / "a.csv",
        "species,genus,family,leaf_type\nQuercus robur,Quercus,Fagaceae,Evergreen Broadleaf\n",
    )
    for taxonomy in ([other], path, str(path)):
        assert complete_taxa(["Quercus robur", "Pinus sylvestris"], taxonomy) == [other, PINE]


def test_a_missing_name_is_an_error_with_near_matches():
    with pytest.raises(TaxonError, match=r"Fagus silvatica \(near: Fagus sylvatica.*\), Xyz are"):
        complete_taxa(["Quercus robur", "Fagus silvatica", "Xyz"])
    with pytest.raises(TaxonError, match="neither in the taxonomy given nor"):
        complete_taxa(["Xyz abc"], [OAK])
    with pytest.raises(TaxonError, match="and 3 more are"):
        complete_taxa([f"Xyz abc{i}" for i in range(8)])


def test_a_name_of_several_taxa_is_not_guessed():
    other = Taxon("Evergreen Broadleaf", "Fagaceae", "Quercus", "Quercus robur")
    with pytest.raises(TaxonError, match="several taxa"):
        complete_taxa(["Quercus robur"], [OAK, other])


def test_as_taxa_takes_what_a_user_has(tmp_path):
    names = write(tmp_path / "a.csv", "Species\nQuercus robur\nPinus sylvestris\nQuercus robur\n")
    assert as_taxa(names) == as_taxa(str(names)) == as_taxa(["Quercus robur", PINE]) == [OAK, PINE]
    with pytest.raises(TaxonError, match="for one species:"):
        as_taxa("Quercus robur")
    with pytest.raises(TaxonError, match="no species"):
        as_taxa([])
    with pytest.raises(FileNotFoundError):
        as_taxa("nowhere.csv")


def test_selecting_keeps_order_and_combines_conditions():
    taxa = [PINE, OAK, HOLM]
    assert select_taxa(taxa, ["Quercus ilex", PINE]) == [0, 2]
    assert select_taxa(taxa, family="Fagaceae") == [1, 2]
    assert select_taxa(taxa, genus=["Pinus", "Quercus"], leaf_type="Evergreen Broadleaf") == [2]
    assert taxa_indices(taxa, ["quercus ilex", OAK]) == [2, 1]


def test_selecting_what_is_not_there_is_an_error_or_a_warning():
    taxa = [PINE, OAK]
    with pytest.raises(TaxonError, match=r"Pinus silvestris \(near: Pinus sylvestris"):
        select_taxa(taxa, ["Pinus silvestris"])
    with pytest.raises(TaxonError, match="is no family of the 2 taxa"):
        select_taxa(taxa, family="Betulaceae")
    with pytest.raises(TaxonError, match="none of the taxa"):
        select_taxa(taxa, family="Pinaceae", genus="Quercus")
    flora = ["Pinus sylvestris", "Abies alba", HOLM]
    with pytest.warns(UserWarning, match="2 of 3 species are not among"):
        assert select_taxa(taxa, flora, ignore_missing=True) == [0]


def test_report_finds_each_oddity_and_keeps_everything():
    rows = [
        {"leaf_type": "Evergreen Broadleaf", "family": "Picidae", "genus": "Dryocopus"},
        {"leaf_type": "leafy", "family": "Rosaceae", "genus": "Malus"},
        {"leaf_type": "Evergreen Broadleaf", "family": "Fabaceae", "genus": "Hymenaea"},
        {"leaf_type": "Evergreen Broadleaf", "family": "Picidae", "genus": "Dryocopus"},
    ]
    names = ["Dryocopus martius", "Docynia delavayi", "Hymenaea", "dryocopus  martius"]
    for row, name in zip(rows, names, strict=True):
        row["species"] = name
    with pytest.warns(UserWarning, match="of 4 taxa, 2 are not binomials .* All are kept") as seen:
        report = taxa_report(rows)
    assert len(seen) == 1
    found = {kind: [issue.index for issue in report.of(kind)] for kind in report.KINDS}
    assert found == {
        "not_binomial": [2, 3],
        "family_not_aceae": [0, 3],
        "genus_not_first_word": [1, 3],
        "duplicate_name": [3],
        "unknown_leaf_type": [1],
    }
    with pytest.raises(KeyError, match="not_binomial"):
        report.of("odd")


@pytest.mark.parametrize(
    "name", ["Achyranthes spec", "Albizia sp", "Acer", "Acer rubrum drummondii"]
)
def test_names_that_are_not_binomials(name):
    taxon = Taxon("Deciduous Broadleaf", "Sapindaceae", name.split()[0], name)
    assert [issue.kind for issue in taxa_report([taxon], warn=False).issues] == ["not_binomial"]


@pytest.mark.parametrize(
    "name", ["Paliurus spina-christi", "Platanus × hispanica", "Platanus ×hispanica"]
)
def test_names_that_are_binomials(name):
    taxon = Taxon("Deciduous Broadleaf", "Sapindaceae", name.split()[0], name)
    assert taxa_report([taxon], warn=False).issues == ()


def test_nothing_odd_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taxa_report([OAK, PINE]) == TaxaReport(2, ())
    assert taxa_report([OAK]).summary() == "1 taxa, nothing odd"


def test_report_of_the_published_evaluation_sets():
    taxa = dict.fromkeys(t for species in SETS for t in read_taxa(evaluation_set(species)))
    report = taxa_report(taxa, warn=False)
    counts = {kind: len(report.of(kind)) for kind in report.KINDS}
    # Seven names end in "sp" or "spec", one is a genus alone.
    assert counts == {
        "not_binomial": 8,
        "family_not_aceae": 13,
        "genus_not_first_word": 7,
        "duplicate_name": 0,
        "unknown_leaf_type": 0,
    }
    with pytest.warns(UserWarning, match="of 900 taxa"):
        assert taxa_report(evaluation_set(900)).count == 900
