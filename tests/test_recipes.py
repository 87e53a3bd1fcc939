"""Recipes are read strictly, and those of the package are whole."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import toy_pretraining as toy

from geofm.cli import main
from geofm.datasets.mmearth_samples import write_mmearth
from geofm.errors import GeofmError
from geofm.pretrain import MODALITIES
from geofm.pretrain.devices import check_devices
from geofm.pretrain.dry_run import describe
from geofm.pretrain.export import build_method
from geofm.pretrain.feed import open_data
from geofm.pretrain.loop import setup
from geofm.pretrain.plan import learning_rate, plan_for
from geofm.pretrain.recipe import (
    RecipeError,
    differences,
    fingerprint,
    load_recipe,
    read_recipe,
    recipe_names,
    to_yaml,
)

NAMES = (
    "geotreeclip_ggt6m moco_resnet50_ssl4eco moco_vit_small_ssl4eco mpmae_atto_mmearth128 "
    "mpmae_atto_mmearth64 mpmae_atto_starter mpmae_tiny_mmearth64 seco_resnet50_ssl4eco"
).split()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_package_has_the_published_recipes() -> None:
    assert set(NAMES) <= set(recipe_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_being_written_and_read_again(name: str, tmp_path: Path) -> None:
    for quick in (False, True):
        recipe = load_recipe(name, quick=quick)
        path = write(tmp_path / f"{name}.yaml", to_yaml(recipe))
        assert load_recipe(path) == recipe


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("starter")])
def test_the_published_batch_divides_among_one_two_and_four_processes(name: str) -> None:
    worlds = (1, 2, 3) if name.startswith("geotree") else (1, 2, 4)
    for world in worlds:
        # Contrast with a queue takes one batch a step, so more processes take smaller ones.
        smaller = [f"train.batch={256 // world}"] if name.startswith(("seco", "moco")) else []
        recipe = load_recipe(name, smaller)
        assert plan_for(recipe, world).samples_per_step == recipe.train.effective_batch


def test_published_numbers_of_mpmae() -> None:
    recipe = load_recipe("mpmae_atto_mmearth64")
    assert plan_for(recipe, 1).lr == pytest.approx(1.5e-4 * 16)
    assert recipe.optimizer.betas == [0.9, 0.95]
    assert (recipe.train.epochs, recipe.schedule.warmup_epochs) == (200, 40)


def test_an_unknown_key_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown key train\.epoch; did you mean epochs"):
        load_recipe("mpmae_atto_mmearth64", ["train.epoch=3"])
    with pytest.raises(RecipeError, match=r"mpmae_ato_mmearth64.*did you mean mpmae_atto"):
        load_recipe("mpmae_ato_mmearth64")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.batch=many", "train.batch must be a whole number, got 'many'"),
        ("train.batch=2.5", "train.batch must be a whole number, got 2.5"),
        ("train.batch=true", "train.batch must be a whole number, got True"),
        ("train.batch=0", "train.batch must be positive"),
        ("train.precision=fp8", "train.precision must be '32-true' or"),
        ("train.steps=5", "give either epochs or steps"),
        ("train.accumulate=2", "give either accumulate or effective_batch"),
        ("optimizer.lr=0.1", "give either lr or base_lr"),
        ("optimizer.betas=[0.9, b]", "optimizer.betas must be a list of numbers"),
        ("train=5", "train must be a mapping"),
        ("card.tag=a.b", "card.tag is a word"),
        ("train.seed=-1", "train.seed"),
        ("data.path", "an override is key=value"),
        ("train.batch=[1", "not valid YAML"),
    ],
)
def test_a_value_that_cannot_be_is_refused(override: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem.replace("[", r"\[")):
        load_recipe("mpmae_atto_mmearth64", [override])


def test_overrides_are_yaml_and_apply_after_quick() -> None:
    recipe = load_recipe(
        "mpmae_atto_mmearth64",
        ["optimizer.base_lr=1e-3", "model.modalities=[sentinel2, era5]", "train.epochs=7"],
        quick=True,
    )
    assert recipe.optimizer.base_lr == 1e-3
    assert recipe.model["modalities"] == ["sentinel2", "era5"]
    assert recipe.train.epochs == 7
    # A mapping stands for itself and is not mixed with what was there.
    replaced = load_recipe("seco_resnet50_ssl4eco", ["data.options={seasons: 4}"], quick=True)
    assert replaced.data.options == {"seasons": 4}


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "method: mpmae\ndata: {kind: tiles}\nmethod: seco\n")
    with pytest.raises(RecipeError, match="method is given twice"):
        load_recipe(path)


def test_yaml_builds_nothing_but_plain_values(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "method: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)


def test_the_momentum_encoder_cannot_be_divided() -> None:
    with pytest.raises(RecipeError, match="fsdp"):
        load_recipe("seco_resnet50_ssl4eco", ["train.strategy=fsdp"])


def test_where_the_data_lies_makes_no_other_run() -> None:
    one = load_recipe("mpmae_atto_mmearth64", ["data.path=/a", "train.batch=64"])
    other = load_recipe("mpmae_atto_mmearth64", ["data.path=/b", "data.workers=1", "card.tag=x"])
    assert differences(one, other) == []
    assert fingerprint(one) == fingerprint(other)
    changed = load_recipe("mpmae_atto_mmearth64", ["model.mask_ratio=0.5", "train.seed=3"])
    assert differences(one, changed) == ["model.mask_ratio: 0.6 and 0.5", "train.seed: 0 and 3"]
    assert fingerprint(one) != fingerprint(changed)


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    content = toy.content() | {"schedule": {"warmup_steps": 4, "min_lr": 0.1}}
    recipe = read_recipe(content)
    rates = [learning_rate(step, 20, 4, recipe) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(20, 20, 4, recipe) == pytest.approx(0.1)


def test_an_effective_batch_that_does_not_divide_is_an_error() -> None:
    recipe = load_recipe("mpmae_atto_mmearth64", ["train.batch=500"])
    with pytest.raises(RecipeError, match="effective_batch=4096 is no multiple"):
        plan_for(recipe, 2)


def test_a_dry_run_tells_steps_and_memory_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = describe(read_recipe(toy.content()))
    assert "# steps: 40, of which 10 are warm-up; 10 an epoch" in text
    assert "activations" in text and "not known" not in text
    # Without data, what was published counts.
    assert main(["pretrain", "mpmae_atto_mmearth64", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# steps: 58,400, of which 11,680 are warm-up; 292 an epoch" in printed
    assert "activations not known without data" in printed
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_generated_so_are_an_error(tmp_path: Path) -> None:
    recipe = load_recipe("mpmae_atto_mmearth64", ["data.generate={number: 3}"], quick=True)
    with pytest.raises(
        RecipeError, match=r"unknown key data\.generate\.number.*data\.generate\.n,"
    ):
        open_data(recipe.data, tmp_path)
    recipe = load_recipe("mpmae_atto_mmearth64", ["data.generate={n: many}"], quick=True)
    with pytest.raises(RecipeError, match=r"data\.generate .* does not suit mmearth"):
        open_data(recipe.data, tmp_path)
    with pytest.raises(RecipeError, match="no writer of samples of toy_pretraining:ToyData"):
        open_data(replace(recipe.data, kind="toy_pretraining:ToyData"), tmp_path)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.patchsize=8", "unknown key model.patchsize; did you mean patch_size"),
        ("data.options.splitt=val", "unknown key data.options.splitt; did you mean split"),
        ("model.modalities=sentinel2", "modalities must be a list of names, got the string"),
        ("model.bands=B2", "bands must be a list of names, got the string 'B2'"),
        ("data.options.modalities=sentinel2", "modalities must be a list of names"),
        ("data.options.bands=B2", "bands must be a list of names, got the string 'B2'"),
        ("model.modalities=[{name: a, kind: pixel, channels: 2}]", "kind of modality 'a' must be"),
        ("model.modalities=[{name: a, knid: pixels}]", "unknown field knid; did you mean kind"),
        ("model.modalities=[{name: a, kind: pixels}]", "lacks channels"),
        ("data.options.modalities=[sentinel2]", "lacks the modality"),
        ("model.size=72", r"64×64 px are smaller than the crop of 72 px"),
        ("data.options.bands=[B2, B3, B4]", r"sentinel2 has 3 bands, expected 12.*input_bands="),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_written(
    override: str, problem: str, tmp_path: Path, made: Path
) -> None:
    pytest.importorskip("lightning_fabric")
    words = [f"data.path={made}", "data.generate=null", override]
    recipe = load_recipe("mpmae_atto_mmearth64", words, quick=True)
    with pytest.raises(GeofmError, match=problem):
        describe(recipe)
    with pytest.raises(GeofmError, match=problem):
        setup(recipe, tmp_path / "run", "auto", "test")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    return write_mmearth(tmp_path_factory.mktemp("made"), n=48)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.strategy=fsdp", "train.strategy=fsdp needs GPUs"),
        ("train.accelerator=cuda", "train.accelerator=cuda needs a GPU"),
        ("train.precision=16-mixed", "train.precision=16-mixed needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one_and_told_by_a_dry_run(
    override: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning_fabric")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe("mpmae_atto_mmearth64", [override], quick=True)
    with pytest.raises(RecipeError, match=problem):
        setup(recipe, tmp_path / "run", "auto", "test")
    assert not (tmp_path / "run").exists()
    elsewhere = load_recipe("mpmae_atto_mmearth64", [override])
    assert f"# this machine cannot run it: {problem}" in describe(elsewhere)


def test_fewer_gpus_than_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_devices(load_recipe("mpmae_atto_mmearth64", ["train.devices=2"]))
    check_devices(load_recipe("mpmae_atto_mmearth64", ["train.precision=16-mixed"]))
    with pytest.raises(RecipeError, match="4 processes on this machine need as many GPUs"):
        check_devices(load_recipe("mpmae_atto_mmearth64", ["train.devices=4"]))
    words = ["train.accelerator=cpu", "train.strategy=fsdp"]
    recipe = load_recipe("mpmae_atto_mmearth64", words)
    with pytest.raises(RecipeError, match=r"with train\.accelerator=cpu"):
        check_devices(recipe)


def test_mmearth_recipes_read_what_they_train_on_and_no_more() -> None:
    for name in NAMES:
        if "mmearth" in name:
            assert set(load_recipe(name).data.options["modalities"]) == set(MODALITIES)


def test_without_data_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "mpmae_atto_mmearth64", "-o", str(tmp_path / "run")]) == 2
    assert "data.path=<file or folder of mmearth>" in capsys.readouterr().err


def test_the_command_lists_recipes_and_takes_overrides_after_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrain"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    words = ["pretrain", "--dry-run", "mpmae_atto_mmearth64", "train.batch=64"]
    assert main([*words, "--resume", "none", "train.seed=5"]) == 0
    assert "seed: 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pretrain", "mpmae_atto_mmearth64", "--no-such-option"])


def test_a_wheel_holds_the_recipes(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"geofm/pretrain/recipes/{name}.yaml" for name in NAMES} <= set(names)


def test_generated_samples_of_the_recipes_are_stated_as_such() -> None:
    for name in NAMES:
        assert asdict(load_recipe(name))["data"]["generate"] is None
        assert load_recipe(name, quick=True).data.generate


def test_a_checkpoint_is_read_without_the_files_a_run_began_with() -> None:
    words = ["model.projection=8", "model.queue=8", "model.arguments.pretrained=/no/such/file"]
    recipe = load_recipe("moco_resnet50_ssl4eco", words)
    with pytest.raises(GeofmError, match="/no/such/file"):
        build_method(recipe)
    assert build_method(recipe, start=False).queue.shape[-1] == 8
