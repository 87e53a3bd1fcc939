"""GeoTreeCLIP's pretraining: loss, gradients over ranks, what is trained, CLIP's weights."""

from __future__ import annotations

import functools
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from geofm import create_model
from geofm.cards import published_cards
from geofm.datasets.globalgeotree_samples import TAXA
from geofm.errors import LayoutError, ModelError
from geofm.models import geotreeclip
from geofm.models.geotreeclip import GeoTreeCLIP
from geofm.pretrain import ContrastiveLanguageImage
from geofm.pretrain.clip import towers_from_clip

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_width": 32,
    "vision_depth": 2,
    "vision_heads": 2,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
}
KINDS = ("negatives", "ignore", "positives")
VARIANTS: list[dict[str, Any]] = [
    {"duplicates": "negatives"},
    {"duplicates": "ignore", "learn_temperature": True},
    {"duplicates": "positives", "learn_temperature": True},
]


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building one takes longer than most of these tests."""
    monkeypatch.setattr(geotreeclip, "SimpleTokenizer", functools.cache(SimpleTokenizer))


def method(**options: Any) -> ContrastiveLanguageImage:
    torch.manual_seed(0)
    return ContrastiveLanguageImage(arguments=SMALL, **options)


def batch(count: int = 6, species: int | None = None) -> dict[str, Any]:
    """Different places; `species` of them in turn."""
    generator = torch.Generator().manual_seed(1)
    image = 4000 * torch.rand(count, 12, 10, 5, 5, generator=generator)
    image[torch.rand(count, 12, generator=generator) < 0.2] = torch.nan
    variables = published_cards()["geotreeclip.ggt6m"].auxiliary
    low, high = torch.tensor([(v.low, v.high) for v in variables]).T
    auxiliary = low + (high - low) * torch.rand(count, 27, generator=generator)
    auxiliary[torch.rand(count, 27, generator=generator) < 0.1] = torch.nan
    prompts = [" / ".join(TAXA[k % (species or count)]) for k in range(count)]
    ids = [str(k) for k in range(count)]
    return {"id": ids, "image": image, "auxiliary": auxiliary, "prompt": prompts}


def features(trained: ContrastiveLanguageImage, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = trained.model(data["image"], data["auxiliary"], data["prompt"])
    return out["image_features"], out["text_features"]


# The loss ------------------------------------------------------------------------------------


def test_the_loss_is_the_published_one() -> None:
    trained, data = method(), batch(6, species=4)
    image, text = features(trained, data)
    logits = image @ text.T / 0.07
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    losses = trained(data)
    torch.testing.assert_close(losses["total"].detach(), expected)
    torch.testing.assert_close(losses["total"], (losses["image"] + losses["text"]) / 2)
    assert float(losses["temperature"]) == pytest.approx(0.07)


def test_a_second_observation_of_a_species_counts_as_chosen() -> None:
    data = batch(6, species=3)
    image, text = features(method(), data)
    logits = image @ text.T / 0.07
    same = torch.arange(6)[:, None] % 3 == torch.arange(6) % 3
    ignored, shared = [], []
    for rows in (logits, logits.T):
        for k, row in enumerate(rows):
            mine = row.exp()
            rest = mine[~same[k]].sum()
            ignored.append(-(mine[k] / (mine[k] + rest)).log())
            shared.append(-(mine / mine.sum()).log()[same[k]].mean())
    for name, expected in (("ignore", ignored), ("positives", shared)):
        total = method(duplicates=name)(data)["total"].detach()
        torch.testing.assert_close(total, torch.stack(expected).mean())
    distinct = batch(6)
    totals = [float(method(duplicates=name)(distinct)["total"].detach()) for name in KINDS]
    assert totals == pytest.approx([totals[0]] * 3)


def test_accuracy_counts_any_copy_of_the_right_name() -> None:
    # Of two species, one in five observations: a constant answer is right for one in five.
    data = batch(5)
    data["prompt"] = [data["prompt"][0]] * 4 + [data["prompt"][1]]
    data["image"][:] = 1000.0
    data["auxiliary"][:] = torch.nan
    assert float(method()(data)["accuracy"]) in (pytest.approx(0.8), pytest.approx(0.2))


def test_a_sample_is_prepared_by_itself_unless_asked_otherwise() -> None:
    data = batch(4)
    other = {**data, "image": data["image"].clone()}
    other["image"][1:] *= 2
    for normalization, alike in (("fixed", True), ("batch", False)):
        trained = ContrastiveLanguageImage(arguments={**SMALL, "normalization": normalization})
        seen = [
            trained._encode_observations(d["image"], d["auxiliary"])[0].detach()
            for d in (data, other)
        ]
        assert torch.equal(*seen) is alike


def test_preparation_is_that_of_prediction() -> None:
    trained, data = method(), batch(3)
    seen = trained._encode_observations(data["image"], data["auxiliary"])
    expected = trained.model.encode_image(data["image"], data["auxiliary"])
    assert torch.equal(seen, expected)
    wrong = {**data, "image": data["image"][:, :, :9]}
    with pytest.raises(ModelError, match="12, 10"):
        trained(wrong)
    with pytest.raises(ModelError, match="2 prompts"):
        trained({**data, "prompt": data["prompt"][:2]})


def test_the_loss_is_precise_in_mixed_precision() -> None:
    trained, data = method(), batch(4)
    whole = trained(data)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = trained(data)
    assert mixed["total"].dtype == torch.float32
    assert float(mixed["total"].detach()) == pytest.approx(float(whole["total"].detach()), abs=0.05)
    mixed["total"].backward()


# What is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
def test_every_trainable_parameter_has_a_gradient(learn: bool) -> None:
    trained = method(learn_temperature=learn)
    trained(batch())["total"].backward()
    silent = [
        name
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent
    fixed = [name for name, p in trained.named_parameters() if not p.requires_grad]
    assert fixed == ([] if learn else ["model.logit_scale"])


def test_training_changes_all_layers_and_finds_the_names() -> None:
    trained, data = method(text_lr_scale=1.0), batch(6)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.parameter_groups(1e-4), lr=2e-3)
    first = None
    for _ in range(12):
        losses = trained(data)
        first = first or float(losses["total"].detach())
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert float(losses["total"].detach()) < first / 2
    assert float(losses["accuracy"]) == 1
    after = trained.export().state
    same = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert same == ["logit_scale"]


def test_groups_hold_every_trainable_parameter_once_with_its_rates() -> None:
    trained = method(learn_temperature=True, text_lr_scale=0.25)
    groups = trained.parameter_groups(0.3)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups)
    assert set(of) == {id(p) for p in trained.parameters()}
    for name, parameter in trained.named_parameters():
        group = of[id(parameter)]
        assert group["lr_scale"] == (0.25 if name.startswith("model.text.") else 1.0)
        plain = parameter.ndim < 2 or "pos" in name or "cls_token" in name
        assert group["weight_decay"] == (0.0 if plain else 0.3), name


def test_a_learned_temperature_moves_and_stays_above_a_hundredth() -> None:
    trained, data = method(learn_temperature=True), batch(4)
    assert float(trained(data)["temperature"]) == pytest.approx(0.07)
    with torch.no_grad():
        trained.model.logit_scale.fill_(9.0)
    assert trained.export().state["logit_scale"].item() == pytest.approx(math.log(100))
    losses = trained(data)
    assert float(losses["temperature"]) == pytest.approx(0.01)
    losses["total"].backward()
    assert trained.model.logit_scale.grad != 0
    assert method().export().state["logit_scale"].item() == pytest.approx(math.log(100))


def test_the_export_builds_the_same_model() -> None:
    trained, data = method(), batch(3)
    exported = trained.export()
    model = create_model(exported.model, **exported.arguments)
    model.load_state_dict(exported.state)
    expected = trained.model.encode_image(data["image"], data["auxiliary"])
    assert torch.equal(model.encode_image(data["image"], data["auxiliary"]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.001}, "temperature"),
        ({"text_lr_scale": -1}, "text_lr_scale"),
        ({"duplicates": "none"}, "duplicates"),
        ({"model": "mpmae_atto", "arguments": {}}, "no GeoTreeCLIP"),
        ({"arguments": {"pretrained": True}}, "pretrained"),
    ],
)
def test_impossible_arguments_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ContrastiveLanguageImage(**{"arguments": SMALL, **options})


# Ranks ---------------------------------------------------------------------------------------


def _double(**options: Any) -> ContrastiveLanguageImage:
    return method(**options).double()


def _gradients_of_rank(rank: int, folder: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Mean loss and DistributedDataParallel's gradients, of each variant."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        data = torch.load(f"{folder}/batch.pt", weights_only=True)
        own = {key: value[rank * 3 : rank * 3 + 3] for key, value in data.items()}
        found = []
        for options in VARIANTS:
            trained = _double(**options)
            parallel = DistributedDataParallel(trained)
            losses = parallel(own)
            losses["total"].backward()
            total = losses["total"].detach().clone()
            dist.all_reduce(total)
            state = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
            found.append((total / 2, state))
        return found
    finally:
        dist.destroy_process_group()


def _other_rank(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    _gradients_of_rank(1, folder)


def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    # Species 0 and 1 occur twice, once on each rank.
    data = batch(6, species=4)
    torch.save(data, tmp_path / "batch.pt")
    other = mp.start_processes(_other_rank, (str(tmp_path),), join=False, start_method="spawn")
    found = _gradients_of_rank(0, str(tmp_path))
    while not other.join(timeout=60):
        pass
    for options, (total, gradients) in zip(VARIANTS, found, strict=True):
        alone = _double(**options)
        loss = alone(data)["total"]
        loss.backward()
        torch.testing.assert_close(total, loss.detach(), rtol=1e-9, atol=0)
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                difference = (gradients[name] - parameter.grad).abs().max()
                assert difference <= 1e-6 * parameter.grad.abs().max(), (options, name)


# CLIP's weights ------------------------------------------------------------------------------


def clip(image_size: int = 224, **text: Any) -> CLIP:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=image_size)
    names = CLIPTextCfg(**{"width": 32, "heads": 2, "layers": 2, **text})
    model: CLIP = CLIP(16, vision, names, quick_gelu=True).eval()
    with torch.no_grad():
        # Constant at first: nothing would tell a mistake from them.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", ["safetensors", "torch", "training", "half"])
def test_the_text_tower_is_that_of_clip(tmp_path: Path, form: str) -> None:
    source = clip()
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    path = tmp_path / "clip.pt"
    if form == "safetensors":
        save_file(state, path)
    elif form == "torch":
        torch.save({**state, "input_resolution": torch.tensor(224)}, path)
    elif form == "training":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save({name: value.half() for name, value in state.items()}, path)
        source.load_state_dict({name: value.half() for name, value in state.items()})
    trained = method(init=path)
    source.text_projection = None
    prompts = [" / ".join(taxon) for taxon in TAXA]
    with torch.no_grad():
        expected = source.encode_text(open_clip.tokenize(prompts))
        seen = trained.model.encode_text(prompts)
    assert (seen - expected).abs().max() <= 1e-5
    assert trained.model.logit_scale.item() == pytest.approx(math.log(100))


def test_a_grey_image_passes_the_trunk_as_it_passes_clip(tmp_path: Path) -> None:
    # An image of one patch, for which CLIP needs no other positions.
    source = clip(image_size=16)
    save_file({name: v.contiguous() for name, v in source.state_dict().items()}, tmp_path / "c")
    trunk = method(init=tmp_path / "c").model.series.trunk.eval()
    grey = torch.randn(3, 1, 16, 16)
    source.visual.ln_post = torch.nn.Identity()
    source.visual.proj = None
    with torch.no_grad():
        expected = source.visual(grey.expand(-1, 3, -1, -1))
        seen = trunk.forward_features(grey.expand(-1, 10, -1, -1))[:, 0]
    assert (seen - expected).abs().max() <= 1e-5


def test_the_patch_takes_the_mean_position(tmp_path: Path) -> None:
    source = clip()
    save_file({name: v.contiguous() for name, v in source.state_dict().items()}, tmp_path / "c")
    (pos,) = method(init=tmp_path / "c").model.series.trunk.pos_embed.detach()
    torch.testing.assert_close(pos[0], source.visual.positional_embedding[0].detach())
    torch.testing.assert_close(pos[1], source.visual.positional_embedding[1:].detach().mean(dim=0))


def test_files_that_are_no_fitting_clip_are_told(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    with pytest.raises(FileNotFoundError):
        method(init=path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(LayoutError, match=r"clip\.pt: no weights of a CLIP"):
        method(init=path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(LayoutError, match="no state dict"):
        method(init=path)
    torch.save(clip(layers=3).state_dict(), path)
    with pytest.raises(LayoutError, match=r"another size.* 12 unknown"):
        method(init=path)
    torch.save(clip(width=64).state_dict(), path)
    with pytest.raises(LayoutError, match=r"text\.positional_embedding is \(77, 64\)"):
        method(init=path)


def test_a_vit_b16_of_open_clip_fits_the_published_model() -> None:
    # On the meta device: only names and shapes matter.
    with torch.device("meta"):
        vision = CLIPVisionCfg(layers=12, width=768, patch_size=16, image_size=224)
        state = CLIP(512, vision, CLIPTextCfg(width=512, heads=8, layers=12)).state_dict()
        own = GeoTreeCLIP().state_dict()
    found = towers_from_clip(state, 10)
    wanted = {k: v for k, v in own.items() if k.startswith(("series.trunk.", "text."))}
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_anew_for_other_words() -> None:
    counter = CompileCounter()
    step = torch.compile(method(), backend=counter)
    counts = []
    for number in range(3):
        # As many tokens, other words.
        step({**batch(2), "prompt": [f"tree {number}", f"bush {number}"]})
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2]
