"""SeCo and MoCo: losses, queue and key side, alone and over processes."""

from __future__ import annotations

import copy
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import PARITY, _fill
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import geofm
from geofm.errors import ModelError, PixelError
from geofm.pretrain import MomentumContrast, SeasonContrast

BOTH = pytest.mark.parametrize("method", [SeasonContrast, MomentumContrast])


class Tiny(nn.Module):
    """An encoder of 6 features with batch normalization."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu().mean((2, 3))


def learner(method: type = SeasonContrast, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    made = method(Tiny(), **{"projection": 4, "hidden": 5, "queue": 12, "size": 16, **options})
    # Else the keys' side would be the query's, and no test would tell one from the other.
    with torch.no_grad():
        for parameter in [*made.encoder_k.parameters(), *made.heads_k.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def rows(count: int = 4, seed: int = 1, views: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Features of a query and its keys."""
    random = torch.Generator().manual_seed(seed)
    query, *keys = torch.randn(views + 1, count, 6, generator=random)
    return query, keys


def tiles(count: int = 4, seed: int = 2) -> Tensor:
    """Three seasons of each place."""
    return torch.rand(count, 3, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 3000


# Losses ------------------------------------------------------------------------------------------


def test_a_step_matches_the_published_one() -> None:
    if not (PARITY / "seco_step.json").exists():
        pytest.skip("fixture seco_step is not beside the checkout")
    spec, fill = json.loads((PARITY / "seco_step.json").read_text()), _fill()
    tag, shape = spec["tag"], (spec["batch"], spec["features"])
    made = SeasonContrast(
        nn.Identity(),
        features=spec["features"],
        projection=spec["projection"],
        queue=spec["queue"],
        temperature=spec["temperature"],
        momentum=spec["momentum"],
    )
    state = made.state_dict()
    for name, value in state.items():
        if name.startswith("heads"):
            state[name] = torch.from_numpy(fill.values(name, tuple(value.shape), spec["salt"]))
    noise = torch.from_numpy(fill.inputs(f"{tag}:queue", tuple(made.queue.shape)))
    made.load_state_dict({**state, "queue": nn.functional.normalize(noise, dim=1)})
    keys = [torch.from_numpy(fill.inputs(f"{tag}:key{i}", shape)) for i in range(3)]
    losses = made.step(torch.from_numpy(fill.inputs(f"{tag}:query", shape)), keys)
    for i, expected in enumerate(spec["losses"]):
        assert losses[f"subspace{i}"].item() == pytest.approx(expected, rel=1e-5)
        assert losses[f"top1_{i}"].item() == spec["top1"][i]
    assert losses["total"].item() == pytest.approx(spec["total"], rel=1e-5)
    assert made.queue_ptr.flatten().tolist() == [spec["queue_pointer_after"]] * 3
    sums = made.queue[:, :, : spec["batch"]].sum((1, 2))
    assert sums.tolist() == pytest.approx(spec["queue_head_sum"], abs=1e-5)


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(sum(v.item() ** 2 for v in vector))


def _plain_losses(made: Any, query: Tensor, keys: list[Tensor]) -> list[float]:
    """The losses sample by sample, from the definition."""
    losses = []
    for i in range(made.spaces):
        total = 0.0
        for n in range(len(query)):
            z = _unit(made.heads_q[i](query[n]))
            others = [j for j in range(made.spaces) if j != i] if i > 0 else []
            negatives = [made.queue[i, :, k] for k in range(made.queue.shape[2])]
            negatives += [
                _unit(made.heads_k[i](keys[j][m])) for j in others for m in range(len(query))
            ]
            own = math.exp((z @ _unit(made.heads_k[i](keys[i][n]))).item() / made.temperature)
            rest = sum(math.exp((z @ other).item() / made.temperature) for other in negatives)
            total -= math.log(own / (own + rest))
        losses.append(total / len(query))
    return losses


@BOTH
def test_losses_are_those_of_their_definition_step_after_step(method: type) -> None:
    made = learner(method, momentum=0.9)
    for step in range(4):
        query, keys = rows(seed=step, views=made.spaces)
        # Momentum comes first, so the definition is asked of the keys' side after it.
        after = copy.deepcopy(made)
        after._follow()
        expected = _plain_losses(after, query, keys)
        losses = made.step(query, keys)
        found = [losses[f"subspace{i}"].item() for i in range(made.spaces)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert losses["total"].item() == pytest.approx(sum(expected), rel=1e-5)


@BOTH
def test_a_step_on_images_is_that_on_their_features(method: type) -> None:
    made = learner(method, momentum=1.0)
    query, *keys = (tiles(seed=i)[:, 0] / 255 for i in range(made.spaces + 1))
    other = copy.deepcopy(made)
    with torch.no_grad():
        features = other.encoder_q(query), [other.encoder_k(key) for key in keys]
    losses, expected = made.step(query, keys), other.step(*features)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
    torch.testing.assert_close(made.queue, other.queue)


def test_one_key_may_come_as_a_tensor() -> None:
    query, keys = rows(views=1)
    alone, listed = learner(MomentumContrast), learner(MomentumContrast)
    assert torch.equal(alone.step(query, keys[0])["total"], listed.step(query, (keys[0],))["total"])


def test_top1_is_the_share_of_queries_that_find_their_key() -> None:
    made = MomentumContrast(nn.Identity(), features=6, projection=4, queue=4, momentum=0.0)
    query, _ = rows()
    assert made.step(query, query.clone())["top1_0"].item() == 1.0
    # The keys of the last step are the queue now: three queries meet their very key in it.
    assert made.step(query, torch.cat([query[:1], -query[1:]]))["top1_0"].item() <= 0.25


@BOTH
def test_half_precision_leaves_lengths_and_losses_in_float32(method: type) -> None:
    made, other = learner(method), learner(method)
    batch = {"image": tiles(), "draw": torch.arange(4)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = made(batch)
    expected = other(batch)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses["total"].item() == pytest.approx(expected["total"].item(), rel=0.02)
    lengths = made.queue.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=0)
    losses["total"].backward()


# Queue and keys' side ----------------------------------------------------------------------------


def test_keys_replace_the_oldest_and_the_queue_wraps() -> None:
    made = learner(queue=12)
    entered = []
    for step in range(4):
        query, keys = rows(seed=step)
        before = made.queue.clone()
        made.step(query, keys)
        with torch.no_grad():
            unit = [nn.functional.normalize(made.heads_k[i](keys[i]), dim=1).T for i in range(3)]
        entered.append(torch.stack(unit))
        place = slice(step * 4 % 12, step * 4 % 12 + 4)
        torch.testing.assert_close(made.queue[:, :, place], entered[-1])
        before[:, :, place] = made.queue[:, :, place]
        assert torch.equal(made.queue, before)
        assert made.queue_ptr.tolist() == [[(step + 1) * 4 % 12]] * 3
    torch.testing.assert_close(made.queue, torch.cat([entered[3], entered[1], entered[2]], dim=2))


@BOTH
def test_the_keys_side_follows_by_the_momentum(method: type) -> None:
    made = learner(method, momentum=0.75)
    before = {name: value.clone() for name, value in made.named_parameters()}
    made({"image": tiles(), "draw": torch.arange(4)})
    for name, value in made.named_parameters():
        expected = before[name]
        if "_k." in name:
            expected = 0.75 * before[name] + 0.25 * before[name.replace("_k.", "_q.")]
        torch.testing.assert_close(value, expected)


@BOTH
def test_gradients_reach_the_querys_side_only(method: type) -> None:
    made = learner(method)
    made({"image": tiles()})["total"].backward()
    for name, parameter in made.named_parameters():
        if "_q." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
    trained = {id(p) for group in made.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for name, p in made.named_parameters() if "_q." in name}


@BOTH
def test_evaluation_changes_nothing(method: type) -> None:
    made = learner(method).eval()
    before = copy.deepcopy(made.state_dict())
    made({"image": tiles()})
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_queue_is_alike_in_every_process_and_leaves_the_generator_alone() -> None:
    first, second = learner(seed=1), learner(seed=2)
    assert torch.equal(first.queue, second.queue)
    assert not torch.equal(first.queue[0], first.queue[1])
    torch.testing.assert_close(first.queue.norm(dim=1), torch.ones(3, 12))


@BOTH
def test_a_few_places_are_learned_by_heart(method: type) -> None:
    made = learner(method, queue=16, momentum=0.9, hidden=32, projection=16)
    optimizer = torch.optim.AdamW(made.parameter_groups(0.0), lr=0.02)
    query, _ = rows(16)
    found = []
    for step in range(40):
        noise = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(step))
        keys = [query + 0.1 * part for part in noise][: made.spaces]
        loss = made.step(query, keys)["subspace0"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    # The first step meets noise, the others the keys of the step before, a query's own among them:
    # less than log(2) cannot be expected.
    assert found[1] > 1.6
    assert found[-1] < 1.0


def test_a_state_dict_resumes_bit_by_bit() -> None:
    def train(made: Any, steps: range, state: dict[str, Any] | None = None) -> tuple[Any, list]:
        optimizer = torch.optim.SGD(made.parameter_groups(1e-4), lr=0.03, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        totals = []
        for step in steps:
            loss = made({"image": tiles(seed=step), "draw": torch.arange(4) + 4 * step})["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.append(loss.item())
        return optimizer.state_dict(), totals

    through = learner()
    _, expected = train(through, range(5))
    half = learner()
    state, _ = train(half, range(3))
    resumed = learner(seed=9)
    resumed.load_state_dict(half.state_dict())
    _, found = train(resumed, range(3, 5), state)
    assert found == expected[3:]
    for name, value in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# Views -------------------------------------------------------------------------------------------


def flat(count: int) -> Tensor:
    """Seasons of one value each, 1000, 2000 and 3000, which crops do not change."""
    return torch.tensor([1000.0, 2000, 3000]).view(1, 3, 1, 1, 1).expand(count, 3, 3, 24, 24)


def test_season_contrast_views_are_the_published_ones() -> None:
    made = learner()
    query, keys = made.views(flat(32), range(32))
    assert [view.shape for view in (query, *keys)] == [(32, 3, 16, 16)] * 4
    torch.testing.assert_close(query, torch.full_like(query, 1000 / 255))
    torch.testing.assert_close(keys[1], torch.full_like(keys[1], 3000 / 255))
    for key, season in ((keys[0], 2000 / 255), (keys[2], 1000 / 255)):
        factors = key.mean((1, 2, 3)) / season
        assert 0.6 <= factors.min() < 0.8 and 1.2 < factors.max() <= 1.4
    # Each view is cut elsewhere.
    query, keys = made.views(tiles(1).expand(1, 3, 3, 24, 24)[:, [0, 0, 0]], [5])
    assert not torch.allclose(query, keys[1])


def test_momentum_contrast_augments_both_seasons() -> None:
    query, keys = learner(MomentumContrast).views(flat(32), range(32))
    for view, season in ((query, 1000 / 255), (keys[0], 2000 / 255)):
        factors = view.mean((1, 2, 3)) / season
        assert 0.6 <= factors.min() < 0.8 and 1.2 < factors.max() <= 1.4


@BOTH
def test_views_follow_from_the_draw_whatever_the_batch(method: type) -> None:
    made, images = learner(method), tiles(5)
    query, keys = made.views(images, [7, 8, 9, 10, 11])
    torch.manual_seed(99)
    again, other = made.views(images[[3, 1]], [10, 8])
    for whole, part in zip((query, *keys), (again, *other), strict=True):
        torch.testing.assert_close(part, whole[[3, 1]], rtol=1e-6, atol=1e-4)


def test_integers_of_a_file_give_the_views_of_their_floats() -> None:
    made, images = learner(), tiles().round()
    query, _ = made.views(images.to(torch.int16), range(4))
    assert torch.equal(query, made.views(images, range(4))[0])


# What is left to users ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ssl4eco_resnet18", {"bands": ["B2", "B3", "B4"]}, {"in_chans": 3}),
        ("ssl4eco_vit_tiny_patch16", {"img_size": 32}, {"in_chans": 9, "img_size": 32}),
    ],
)
def test_the_exported_encoder_is_create_models(
    name: str, arguments: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    made = SeasonContrast(name, arguments=arguments, projection=8, hidden=16, queue=4, size=32)
    exported = made.export()
    assert (exported.model, exported.arguments) == (name, expected)
    save_file(exported.state, tmp_path / "encoder.safetensors")
    bands = arguments.get("bands")
    model = geofm.create_model(name, tmp_path / "encoder.safetensors", trained_bands=bands).eval()
    view = torch.randn(2, expected["in_chans"], 32, 32)
    made.eval()
    with torch.no_grad():
        assert torch.equal(model(view), made.encoder_q(view))
        made.step(view, [view, view, view])


def test_create_model_reads_a_resnet_out_of_the_learners_state(tmp_path: Path) -> None:
    made = MomentumContrast("ssl4eco_resnet18", projection=4, hidden=4, queue=2)
    torch.save({"state_dict": made.state_dict()}, tmp_path / "run.pth")
    model = geofm.create_model("ssl4eco_resnet18", tmp_path / "run.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, made.encoder_q.state_dict()[name]), name


def test_positions_and_tokens_of_a_transformer_do_not_decay() -> None:
    made = MomentumContrast(
        "ssl4eco_vit_tiny_patch16", arguments={"depth": 1}, projection=4, hidden=4, queue=2
    )
    assert {"encoder_q.pos_embed", "encoder_q.cls_token"} <= made.no_weight_decay()


# Errors ------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    query, keys = rows()
    with pytest.raises(ModelError, match=r"takes 3 view\(s\) as keys, got 2"):
        learner().step(query, keys[:2])
    with pytest.raises(ModelError, match="of one shape"):
        learner().step(query, [key[:2] for key in keys])
    with pytest.raises(ModelError, match="expected 6 features of a sample, got 5"):
        learner().step(query[:, :5], [key[:, :5] for key in keys])
    with pytest.raises(ModelError, match="a queue of 12 is no multiple of the batch"):
        learner().step(*rows(count=5))
    with pytest.raises(ModelError, match="say features="):
        SeasonContrast(nn.Identity())
    with pytest.raises(ModelError, match="it must pool and have no head"):
        learner(features=7).step(*(lambda x: (x, [x, x, x]))(tiles()[:, 0]))
    with pytest.raises(ModelError, match="without a registered name"):
        learner().export()
    with pytest.raises(ModelError, match="is built already"):
        learner(arguments={"bands": ["B2"]})
    with pytest.raises(ModelError, match="num_classes: contrastive learning needs"):
        SeasonContrast("ssl4eco_resnet18", arguments={"num_classes": 3})
    named = SeasonContrast("ssl4eco_resnet18", queue=4, projection=4)
    with pytest.raises(ModelError, match="ssl4eco_resnet18 takes 9 bands, the images have 3"):
        named.step(*(lambda x: (x, [x, x, x]))(tiles()[:, 0]))
    with pytest.raises(ModelError, match=r"takes 9 bands.*data\.options\.bands"):
        named.check_batch({"image": tiles(1)})
    with pytest.raises(PixelError, match="one or more samples"):
        learner()({"image": tiles()[:0]})
    with pytest.raises(PixelError, match="at least 3 seasons"):
        learner()({"image": tiles()[:, :2]})
    with pytest.raises(PixelError, match="lacks a tensor 'image'; it has id"):
        learner()({"id": ["a"]})


def test_a_refused_step_changes_nothing() -> None:
    made = learner()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ModelError):
        made.step(*rows(count=5))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"momentum": 1.5}, {"queue": 0}, {"scale": -1.0}, {"projection": 0}],
)
def test_impossible_arguments_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(options))} must be"):
        learner(**options)


# Ranks -------------------------------------------------------------------------------------------


def _two_steps(made: Any, part: slice, parallel: bool) -> list[dict[str, Tensor]]:
    """Two steps with gradient on the same part of the whole batch."""
    model = DistributedDataParallel(made) if parallel else made
    optimizer = torch.optim.SGD(made.parameter_groups(0.0), lr=0.1)
    found = []
    for step in range(2):
        batch = {"image": tiles(6, seed=step)[part], "draw": torch.arange(6)[part] + 6 * step}
        losses = model(batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        found.append({name: value.detach() for name, value in losses.items()})
    return found


def _steady(method: type) -> Any:
    """A learner whose batch normalization does not depend on the batch."""
    made = learner(method, momentum=0.5)
    made.encoder_q.bn.eval()
    made.encoder_k.bn.eval()
    return made


def _rank(rank: int, folder: str) -> dict[str, Any]:
    """What a process is left with after training with and without batch statistics."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        part = slice(3 * rank, 3 * rank + 3)
        found: dict[str, Any] = {}
        for method in (SeasonContrast, MomentumContrast):
            made = _steady(method)
            losses = _two_steps(made, part, parallel=True)
            for step in losses:
                for value in step.values():
                    dist.all_reduce(value)
            found[f"{method.__name__} losses"] = [
                {name: value / 2 for name, value in step.items()} for step in losses
            ]
            found[f"{method.__name__} state"] = made.state_dict()
        usual = learner(seed=rank)
        _two_steps(usual, part, parallel=True)
        found["queue"], found["pointer"] = usual.queue, usual.queue_ptr
        found["keys"] = [p.detach() for p in usual.heads_k.parameters()]
        return found
    finally:
        dist.destroy_process_group()


def _other_rank(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(_rank(1, folder), f"{folder}/other.pt")


def test_two_processes_share_one_queue_and_train_as_one_with_the_whole_batch(
    tmp_path: Path,
) -> None:
    other = mp.start_processes(_other_rank, (str(tmp_path),), join=False, start_method="spawn")
    found = _rank(0, str(tmp_path))
    while not other.join(timeout=60):
        pass
    seen = torch.load(tmp_path / "other.pt", weights_only=True)
    # With batch statistics and shuffled keys, from weights that differed before.
    assert torch.equal(found["queue"], seen["queue"])
    assert torch.equal(found["pointer"], seen["pointer"])
    assert found["pointer"].flatten().tolist() == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(found["keys"], seen["keys"], strict=True))
    # Without: the keys come back in their order, and losses and weights are those of one process.
    for method in (SeasonContrast, MomentumContrast):
        alone = _steady(method)
        expected = _two_steps(alone, slice(None), parallel=False)
        for step, reference in zip(found[f"{method.__name__} losses"], expected, strict=True):
            for name in reference:
                torch.testing.assert_close(step[name], reference[name], rtol=1e-5, atol=1e-6)
        for name, value in alone.state_dict().items():
            state = found[f"{method.__name__} state"][name]
            torch.testing.assert_close(state, value, rtol=1e-4, atol=1e-5)
            assert torch.equal(state, seen[f"{method.__name__} state"][name]), name


def test_a_compiled_step_is_not_compiled_anew_for_every_batch() -> None:
    counter = CompileCounter()
    method = learner()
    step = torch.compile(method, backend=counter)
    for number in range(3):
        step({"image": tiles(), "draw": torch.arange(4) + 4 * number})
    assert counter.frame_count == 1
