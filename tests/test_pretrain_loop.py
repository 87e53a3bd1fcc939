"""The loop: the same course whatever interrupts it, and outputs that can be used."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_pretraining as toy

import geofm
from geofm.cards import read_card
from geofm.pretrain import loop
from geofm.pretrain.checkpoint import (
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    is_sound,
    read_state,
)
from geofm.pretrain.export import export_run
from geofm.pretrain.feed import MapFeed, StreamFeed, order_of
from geofm.pretrain.journal import Journal
from geofm.pretrain.loop import NonFiniteLossError, pretrain
from geofm.pretrain.plan import Plan
from geofm.pretrain.recipe import Recipe, RecipeError, read_recipe

pytest.importorskip("lightning_fabric")

# What a row of the log says of the course, apart from time and memory.
COURSE = ("step", "total", "error", "grad_norm", "lr", "epoch")


def recipe(changes: dict[str, Any] | None = None, **data: Any) -> Recipe:
    content = toy.content(**data)
    for section, values in (changes or {}).items():
        content[section] = {**content.get(section, {}), **values}
    return read_recipe(content)


def course(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "log.csv").open() as file:
        return [tuple(row[name] for name in COURSE) for row in csv.DictReader(file)]


def weights(folder: Path, step: int = 40) -> dict[str, torch.Tensor]:
    state = read_state(checkpoints_in(folder)[step])
    adam = state["optimizer"]["state"]
    return state["method"] | {
        f"adam.{i}.{k}": v for i, part in adam.items() for k, v in part.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads in their last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stopped_after(step: int, folder: Path) -> None:
    """The first steps of the run, ended as SIGTERM would."""
    run = loop.setup(recipe(), folder, "auto", "test")
    batches = run.feed.batches(0, run.steps)
    while run.progress.step < step:
        row = loop.train_step(run, batches)
        run.journal.write(run.progress.step, row | {"samples_per_second": 0, "memory_mb": 0})
        if run.progress.step % 5 == 0:
            loop.save(run)
    run.journal.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(recipe(), folder)
    return folder


# --- the course ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Any:
    """Makes processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_pretraining", "geofm.pretrain.loop", "lightning_fabric"])
    return context


def killed_when(processes: Any, folder: Path, moment: Callable[[], bool]) -> None:
    child = processes.Process(target=toy.train, args=(toy.content(pause=0.01), str(folder)))
    child.start()
    deadline = time.monotonic() + 60
    while not moment():
        assert child.is_alive() and time.monotonic() < deadline, "it ended before the moment came"
        time.sleep(0.0005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_run_killed_at_any_time_goes_on_bit_by_bit(
    whole: Path, processes: Any, tmp_path: Path
) -> None:
    def rows(n: int) -> Callable[[], bool]:
        log = tmp_path / "log.csv"
        return lambda: log.exists() and log.read_text().count("\n") > n

    def writing() -> bool:
        return any((tmp_path / "checkpoints").glob(".step-*.part"))

    def saved() -> bool:
        return len(checkpoints_in(tmp_path)) > 0

    # Before the first checkpoint, after it, while one is written, and later; each goes on from the
    # one before.
    for moment in (rows(2), saved, writing, rows(23)):
        killed_when(processes, tmp_path, moment)
    assert max(checkpoints_in(tmp_path), default=0) < 40
    # pause is one of the data's options, so it belongs to the recipe.
    pretrain(recipe(pause=0.01), tmp_path)
    assert course(tmp_path) == course(whole)
    assert same(weights(tmp_path), weights(whole))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_resumed_run_repeats_no_row_of_the_log(whole: Path, tmp_path: Path) -> None:
    # Rows 11 to 13 come again: the last checkpoint is of step 10.
    stopped_after(13, tmp_path)
    assert len(course(tmp_path)) == 13 and max(checkpoints_in(tmp_path)) == 10
    pretrain(recipe(), tmp_path)
    assert course(tmp_path) == course(whole)


def test_accumulated_batches_give_the_step_of_the_large_batch(tmp_path: Path) -> None:
    changes = {"model": {"dropout": 0.0}, "train": {"epochs": None, "steps": 6}}
    one = recipe(changes | {"train": {**changes["train"], "batch": 8}})
    two = recipe(changes | {"train": {**changes["train"], "batch": 4, "accumulate": 2}})
    pretrain(one, tmp_path / "one")
    pretrain(two, tmp_path / "two")
    values = [
        np.array([[float(v) for v in row] for row in course(tmp_path / name)])
        for name in ("one", "two")
    ]
    assert len(values[0]) == 6
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    from geofm.datasets.mmearth_samples import write_mmearth
    from geofm.pretrain import MODALITIES

    write_mmearth(tmp_path / "data", n=40, size=64)
    common = [
        "mpmae_atto_mmearth64",
        f"data.path={tmp_path / 'data'}",
        "data.workers=0",
        "model.grn_scope=sample",
        "train.effective_batch=8",
        "train.epochs=null",
        "train.steps=4",
        "train.precision=32-true",
        "train.accelerator=cpu",
        "schedule.warmup_epochs=0",
        "optimizer.base_lr=null",
        "optimizer.lr=1e-3",
        "output.log_every=1",
        "output.tensorboard=false",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    single = [sys.executable, "-m", "geofm.pretrain"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    double = [*torchrun, "--nproc-per-node", "2", "-m", "geofm.pretrain"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command, batch, folder in ((single, 8, one), (double, 4, two)):
        words = [*command, *common, f"train.batch={batch}", "-o", str(folder)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    curves = []
    for folder in (one, two):
        with (folder / "log.csv").open() as file:
            names = (*MODALITIES, "total", "grad_norm")
            curves.append([[float(row[n]) for n in names] for row in csv.DictReader(file)])
    assert len(curves[0]) == 4
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_sigterm_saves_and_ends_the_run_with_a_message(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(json.dumps(toy.content(pause=0.02)))
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "geofm", "pretrain", str(file), "-o", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = folder / "log.csv"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    (step,) = set(checkpoints_in(folder)) - set(range(0, 40, 5)) or {max(checkpoints_in(folder))}
    assert f"stopped by SIGTERM after step {step} of 40" in said
    assert not list(folder.glob("*.toml"))
    pretrain(recipe(pause=0.02), folder)
    assert course(folder) == course(whole)


# --- checkpoints --------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_after(20, tmp_path)
    newest = checkpoints_in(tmp_path)[20]
    content = bytearray(newest.read_bytes())
    for damaged in (content[: len(content) // 2], _flipped(content), b""):
        newest.write_bytes(damaged)
        assert not is_sound(newest)
        caplog.clear()
        assert find_checkpoint(tmp_path, "auto") == checkpoints_in(tmp_path)[15]
        assert str(newest) in caplog.text and "damaged" in caplog.text
    pretrain(recipe(), tmp_path)
    assert course(tmp_path) == course(whole)
    with pytest.raises(CheckpointError, match="does not exist"):
        pretrain(recipe(), tmp_path / "new", resume=str(tmp_path / "no.ckpt"))


def _flipped(content: bytearray) -> bytes:
    out = bytearray(content)
    out[len(out) // 2] ^= 1
    return bytes(out)


def test_the_last_checkpoints_and_the_best_stay(whole: Path) -> None:
    kept = checkpoints_in(whole)
    best = read_state(kept[40])["progress"]["best"]
    assert set(kept) == {35, 40, best["step"]}
    smoothed = [read_state(path)["progress"]["smoothed"] for path in kept.values()]
    assert best["smoothed"] == min(smoothed)


def test_damaged_checkpoints_of_later_steps_do_not_crowd_out_new_ones(tmp_path: Path) -> None:
    stopped_after(20, tmp_path)
    for step in (15, 20):
        checkpoints_in(tmp_path)[step].write_bytes(b"")
    # Step 5 is left, as the best; the next checkpoint must outlive the two damaged ones.
    run = loop.setup(recipe({"output": {"keep": 1}}), tmp_path, "auto", "test")
    assert run.progress.step == 5
    run.progress.step = 7
    loop.save(run)
    assert is_sound(checkpoints_in(tmp_path)[7])


def test_a_recipe_that_somebody_wrote_is_not_written_over(tmp_path: Path) -> None:
    mine = tmp_path / "recipe.yaml"
    mine.write_text("# my notes\n" + json.dumps(toy.content()))
    with pytest.raises(RecipeError, match="not written by a run"):
        loop.setup(recipe(), tmp_path, "auto", "test")
    assert mine.read_text().startswith("# my notes")


def test_a_warm_up_longer_than_the_run_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop.setup(recipe({"schedule": {"warmup_epochs": 8}}), tmp_path, "auto", "test")
    assert "the warm-up (80 steps) is longer than the run (40)" in caplog.text


def test_a_checkpoint_is_read_without_executing_anything(whole: Path) -> None:
    state = torch.load(checkpoints_in(whole)[40], weights_only=True)
    assert {"method", "optimizer", "random", "position", "progress", "recipe"} <= set(state)


def test_another_recipe_is_refused_with_the_keys_that_differ(whole: Path, tmp_path: Path) -> None:
    changed = recipe({"optimizer": {"lr": 0.02}, "train": {"batch": 8}, "card": {"tag": "other"}})
    with pytest.raises(CheckpointError) as caught:
        pretrain(changed, tmp_path, resume=str(whole))
    assert "optimizer.lr: 0.01 and 0.02" in str(caught.value)
    assert "samples per step" in str(caught.value) and "4 and 8" in str(caught.value)
    assert "tag" not in str(caught.value)


def test_a_new_run_does_not_mix_with_one_that_is_there(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds a run of 40 steps"):
        pretrain(recipe(), whole, resume="none")


def test_a_named_checkpoint_starts_a_run_elsewhere(whole: Path, tmp_path: Path) -> None:
    pretrain(recipe(), tmp_path, resume=str(checkpoints_in(whole)[35]))
    assert course(tmp_path) == course(whole)[35:]
    assert same(weights(tmp_path), weights(whole))


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="tile-7") as caught:
        pretrain(recipe({"output": {"save_every": 1}}, nan=7), tmp_path)
    assert isinstance(caught.value, geofm.GeofmError | FloatingPointError)
    report = json.loads((tmp_path / "non_finite.rank0.json").read_text())
    order = order_of(0, 0, 40)
    step = int(np.flatnonzero(order == 7)[0]) // 4 + 1
    assert report["step"] == step
    assert report["ids"] == [f"tile-{i}" for i in order[4 * step - 4 : 4 * step]]
    assert report["losses"]["total"] == "nan"
    last = checkpoints_in(tmp_path)
    assert max(last, default=0) == step - 1
    assert all(v.isfinite().all() for v in weights(tmp_path, step - 1).values())


def test_data_smaller_than_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(geofm.DataNotFoundError, match="40 samples, a step takes 64"):
        pretrain(recipe({"train": {"batch": 64}}), tmp_path)


def test_what_is_no_method_is_refused(tmp_path: Path) -> None:
    content = toy.content() | {"method": "os:getcwd"}
    with pytest.raises(RecipeError, match="is no subclass"):
        pretrain(read_recipe(content), tmp_path)
    content = toy.content() | {"method": "mpmea"}
    with pytest.raises(RecipeError, match="none of mpmae, seco, moco, clip"):
        pretrain(read_recipe(content), tmp_path)


def test_a_reader_that_fails_ends_the_run_with_its_message_alone(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    # Samples are long, so that the other reader is at work when the first one fails.
    content = toy.content(pause=0.1, broken=23)
    content["data"]["workers"] = 2
    file.write_text(json.dumps(content))
    command = [sys.executable, "-m", "geofm", "pretrain", str(file), "-o", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    # Without an end of the readers it would wait for them for ever.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "geofm: error: tile-23 cannot be read: broken disk"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_end_with_the_batches(workers: int) -> None:
    feed = MapFeed(toy.ToyData(), plan(), workers, False)
    batches = feed.batches(0, 10)
    next(batches)
    assert len(multiprocessing.active_children()) >= workers
    before = multiprocessing.active_children()
    batches.close()
    assert not any(process.is_alive() for process in before if "DataLoader" in repr(process))
    assert not multiprocessing.active_children()


def test_a_gradient_that_is_not_finite_stops_the_run_where_no_scaler_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop.setup(recipe(), tmp_path, "auto", "test")
    forward = torch.nn.Linear.forward
    # A root of 0 is 0, its slope infinite; times 0, that is no number.
    monkeypatch.setattr(
        torch.nn.Linear,
        "forward",
        lambda self, x: forward(self, x) + (0 * self.weight.sum()).sqrt(),
    )
    # As a machine without a GPU makes of 16-mixed: what counts is the scaler.
    run.recipe = dataclasses.replace(
        run.recipe, train=dataclasses.replace(run.recipe.train, precision="16-mixed")
    )
    before = {name: value.detach().clone() for name, value in run.method.named_parameters()}
    batches = run.feed.batches(0, 1)
    with closing(batches), pytest.raises(NonFiniteLossError, match="grad"):
        loop.train_step(run, batches)
    for name, value in run.method.named_parameters():
        assert torch.equal(value, before[name])


def test_checkpoints_that_are_all_damaged_are_an_error_that_deletes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_after(10, tmp_path)
    for path in checkpoints_in(tmp_path).values():
        path.write_bytes(b"")
    log = (tmp_path / "log.csv").read_text()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* damaged.*another folder"):
        pretrain(recipe(), tmp_path)
    assert (tmp_path / "log.csv").read_text() == log
    assert "going on" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_skipped_is_told_at_the_end(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = toy.content(skipped=[3, 17])
    content["data"]["workers"] = workers
    content["train"]["epochs"] = 1
    pretrain(read_recipe(content), tmp_path)
    (told,) = [r.getMessage() for r in caplog.records if "data left out" in r.getMessage()]
    assert "2 x unreadable, for example: tile-" in told
    assert "1 x too few dates" in told
    assert caplog.records[-1].levelname == "WARNING"


# --- outputs ------------------------------------------------------------------------------------


def test_the_run_folder_loads_as_a_pretrained_model(whole: Path) -> None:
    model = geofm.create_model("mpmae_atto", pretrained=whole)
    assert model.card.name == "mpmae_atto.toy"
    assert model.input_spec.bands == ("B4", "B8")
    assert not any(parameter.any() for parameter in model.parameters())
    card = read_card(whole / "mpmae_atto.toy.toml")
    assert card.training["steps"] == 40
    assert card.training["samples"] == 160
    assert card.training["data"] == "made up"
    assert card.licence.weights == "CC0-1.0"
    assert card.input.statistics["L2A"].std == (3.0, 4.0)


def test_half_precision_and_the_best_checkpoint_can_be_exported(whole: Path) -> None:
    size = (whole / "mpmae_atto.toy.safetensors").stat().st_size
    card = export_run(whole, "best", half=True)
    assert (
        card.training["steps"] == read_state(checkpoints_in(whole)[40])["progress"]["best"]["step"]
    )
    assert (whole / "mpmae_atto.toy.safetensors").stat().st_size < 0.6 * size
    geofm.create_model("mpmae_atto", pretrained=whole)
    export_run(whole)


def test_an_export_deletes_no_card_but_its_own(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    own = (folder / "mpmae_atto.toy.toml").read_text()
    former, other, broken = (folder / f"mpmae_atto.{tag}.toml" for tag in ("old", "my", "odd"))
    former.write_text(own.replace("mpmae_atto.toy", "mpmae_atto.old"))
    other.write_text(re.sub('recipe_hash = ".*"', 'recipe_hash = "of another"', own))
    broken.write_text("not TOML")
    export_run(folder)
    assert other.exists() and broken.exists() and not former.exists()
    assert (folder / "mpmae_atto.toy.toml").exists()


def test_tensorboard_events_are_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    journal = Journal(tmp_path, 0, tensorboard=True)
    journal.write(1, {"total": math.pi})
    journal.close()
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"total" in events.read_bytes()


def test_a_row_cut_off_by_a_kill_is_removed(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,total\n1,0.5\n2,0.25\n3,0.1")
    Journal(tmp_path, 2, tensorboard=False).close()
    assert (tmp_path / "log.csv").read_text() == "step,total\n1,0.5\n2,0.25\n"


# --- what feeds the loop ------------------------------------------------------------------------


def plan(rank: int = 0, world: int = 1, batch: int = 4, accumulate: int = 1) -> Plan:
    return Plan(3, batch, accumulate, rank, world, batch * accumulate * world, 0.1)


def drawn(feed: MapFeed, start: int, stop: int) -> list[tuple[str, int]]:
    batches = feed.batches(start, stop)
    return [(i, int(d)) for b in batches for i, d in zip(b["id"], b["draw"], strict=True)]


def test_processes_together_see_what_one_would() -> None:
    data = toy.ToyData(n=41)
    one = drawn(MapFeed(data, plan(batch=8, accumulate=2), 0, False), 0, 5)
    parts = [
        drawn(MapFeed(data, plan(rank, 2, 4, accumulate=2), 0, False), 0, 5) for rank in (0, 1)
    ]
    together = [
        pair
        for start in range(0, len(parts[0]), 4)
        for part in parts
        for pair in part[start : start + 4]
    ]
    assert together == one
    # Two steps of 16 make an epoch; the last 9 samples of it are left out.
    assert len({name for name, _ in one[:32]}) == 32
    assert one[32:] != one[:32]
    assert len({draw for _, draw in one}) == len(one)
    assert [draw for _, draw in one] == [3 * 2**40 + i for i in range(80)]


def test_readers_in_other_processes_change_nothing() -> None:
    data = toy.ToyData()
    here = drawn(MapFeed(data, plan(), 0, False), 7, 13)
    assert drawn(MapFeed(data, plan(), 2, False), 7, 13) == here
    assert here == drawn(MapFeed(data, plan(), 0, False), 0, 13)[28:]


def test_weights_decide_how_often_a_sample_is_drawn() -> None:
    share = np.array([1.0, 0.25, 2.0])
    counts = np.bincount(order_of(1, 0, 30_000, np.tile(share, 10_000)) % 3) / 30_000
    np.testing.assert_allclose(counts, share / share.sum(), atol=0.01)


def test_a_dataset_may_draw_by_the_samples_own_numbers() -> None:
    class Drawing(toy.ToyData):
        def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
            return {"id": str(index), "x": rng.normal()}

    feed = MapFeed(Drawing(), plan(), 0, False)
    first, again = (torch.cat([b["x"] for b in feed.batches(0, 20)]) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) == 80


class Counting:
    """A stream that knows where it stands."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = self.start
        while True:
            yield {"id": str(number), "number": number}
            number += 1

    def state_after(self, batch: dict[str, Any]) -> dict[str, int]:
        return {"next": int(batch["number"][-1]) + 1}

    def load_state(self, state: dict[str, int]) -> None:
        self.start = state["next"]


class CountingStream(Counting, torch.utils.data.IterableDataset[dict[str, Any]]):
    pass


def test_a_stream_goes_on_after_the_last_batch_that_was_used() -> None:
    feed = StreamFeed(CountingStream(), plan(), 40, 0, False)
    batches = feed.batches(0, 10)
    for _ in range(3):
        feed.used(next(batches))
    next(batches)
    after = StreamFeed(CountingStream(), plan(), 40, 0, False)
    after.resume(feed.position())
    batch = next(after.batches(3, 10))
    assert batch["id"] == ["12", "13", "14", "15"]
    assert batch["draw"].tolist() == [3 * 2**40 + i for i in range(12, 16)]
    with pytest.raises(RecipeError, match=r"data\.samples"):
        StreamFeed(CountingStream(), plan(), None, 0, False)
