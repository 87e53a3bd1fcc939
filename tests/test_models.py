"""The encoders keep timm's interface and do what their options say."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import geofm
from geofm.models import grn
from geofm.models.gelu import GELU
from geofm.models.grn import grn_linear
from geofm.models.mpmae import MPMAE, Block, grid_size

SMALL = ["mpmae_atto", "mpmae_femto", "ssl4eco_resnet18", "ssl4eco_vit_tiny_patch16"]
ALL = [
    *(f"mpmae_{size}" for size in "atto femto pico nano tiny base large huge".split()),
    *(f"ssl4eco_resnet{depth}" for depth in (18, 34, 50, 101)),
    *(f"ssl4eco_vit_{size}_patch16" for size in "tiny small base".split()),
]


def tile(model: nn.Module, n: int = 2, side: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, model.pretrained_cfg["input_size"][0], side, side)


def plain_grn_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The block as the ConvNeXt V2 paper writes it, with the GRN in four passes."""
    y = block.dwconv(x).permute(0, 2, 3, 1)
    y = F.gelu(
        block.pwconv1(F.layer_norm(y, y.shape[-1:], block.norm.weight, block.norm.bias, 1e-6))
    )
    gx = y.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
    nx = gx / (gx.mean(dim=-1, keepdim=True) + block.grn_eps)
    y = block.grn.gamma * (y * nx) + block.grn.beta + y
    return x + block.pwconv2(y).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("dim", "side"), [(8, 12), (40, 5)])
def test_folded_grn_equals_the_formula_and_its_gradients(dim: int, side: int) -> None:
    # The two sizes take the two ways of folding: into the weights, and into the sites.
    torch.manual_seed(0)
    block = Block(dim).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, dim, side, side, dtype=torch.double)
    torch.testing.assert_close(block(x), plain_grn_block(block, x), rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    theirs = torch.autograd.grad(plain_grn_block(block, x).square().sum(), list(block.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [2, 8])
def test_derivatives_of_the_folded_grn_are_those_of_finite_differences(outputs: int) -> None:
    # Nine sites: few beside 8 outputs, many beside 2.
    torch.manual_seed(0)
    shapes = [(2, 3, 3, 6), (6,), (6,), (outputs, 6), (outputs,)]
    inputs = [torch.randn(shape, dtype=torch.double).requires_grad_() for shape in shapes]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return grn_linear(*tensors, eps=1e-6)  # type: ignore[misc]

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_the_gradient_of_a_silent_channel_is_finite() -> None:
    hidden = torch.randn(1, 2, 2, 6)
    hidden[..., 3] = 0
    hidden.requires_grad_()
    ones = torch.ones(6)
    grn_linear(hidden, ones, ones, torch.ones(3, 6), torch.ones(3), 1e-6).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_gradient_of_a_nearly_silent_channel_stays_within_float16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 28, 28, 6)
    hidden[..., 3] = 1e-5
    gamma, ones = torch.ones(6), torch.ones(6)
    weight = torch.randn(3, 6)
    grads = []
    for dtype in (torch.float32, torch.float16):
        x = hidden.to(dtype).requires_grad_()
        out = grn_linear(x, gamma, ones, weight.to(dtype), torch.ones(3).to(dtype), 1e-6)
        grads.append(torch.autograd.grad(out, x, torch.full_like(out, 100.0))[0].float())
    assert grads[1].isfinite().all()
    torch.testing.assert_close(
        grads[1], grads[0], rtol=0.05, atol=0.05 * float(grads[0].abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_near_the_full_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Block(16)
    nn.init.normal_(block.grn.gamma)
    x = torch.randn(2, 16, 28, 28)
    parameters = list(block.parameters())
    full = torch.autograd.grad(block(x).square().mean(), parameters)
    with torch.autocast("cpu", dtype):
        loss = block(x).float().square().mean()
    half = torch.autograd.grad(loss, parameters)
    for (name, _), a, b in zip(block.named_parameters(), full, half, strict=True):
        assert a.dtype == b.dtype
        # The norm's bias, whose gradient is a difference of large numbers, is left out.
        if name not in ("norm.weight", "norm.bias"):
            assert (a - b).norm() < 0.05 * a.norm(), name


def _plain_grn_linear(
    hidden: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    response = hidden.square().sum((1, 2), keepdim=True).sqrt()
    scaled = hidden * response / (response.mean(-1, keepdim=True) + 1e-6)
    return F.linear(gamma * scaled + beta + hidden, weight, bias)


@pytest.mark.parametrize("outputs", [2, 8])
def test_torch_func_takes_the_folded_grn_apart(outputs: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 3, 6), (6,), (6,), (outputs, 6), (outputs,)]
    inputs = tuple(torch.randn(shape, dtype=torch.double) for shape in shapes)

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return grn_linear(*tensors, eps=1e-6).square().sum()  # type: ignore[misc]

    def theirs(*tensors: torch.Tensor) -> torch.Tensor:
        return _plain_grn_linear(*tensors).square().sum()

    def of_each(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        return vmap(grad(lambda hidden: function(hidden[None], *inputs[1:])))(inputs[0])

    torch.testing.assert_close(of_each(ours), of_each(theirs))
    for number in range(5):
        torch.testing.assert_close(hessian(ours, number)(*inputs), hessian(theirs, number)(*inputs))
    tangents = tuple(torch.randn_like(value) for value in inputs)
    torch.testing.assert_close(jvp(ours, inputs, tangents), jvp(theirs, inputs, tangents))


def test_gradients_of_single_samples_add_up_to_those_of_the_batch() -> None:
    torch.manual_seed(0)
    model = MPMAE(in_chans=2, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)).eval().double()
    for name, parameter in model.named_parameters():
        if "grn" in name:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 2, 56, 56, dtype=torch.double)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-6, atol=1e-8)
    features = model(x)
    torch.testing.assert_close(vmap(lambda sample: model(sample[None])[0])(x), features)
    found, moved = jvp(model, (x,), (x,))
    torch.testing.assert_close(found, features)
    step = 1e-6
    expected = (model(x + step * x) - model(x - step * x)) / (2 * step)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_a_silent_channel_are_finite() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 3, 6, dtype=torch.double)
    hidden[..., 3], hidden[1] = 0, 0
    others = [torch.randn(shape, dtype=torch.double) for shape in [(6,), (6,), (8, 6), (8,)]]

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return grn_linear(hidden, *others, eps=1e-4).square().sum()  # type: ignore[misc]

    hidden.requires_grad_()
    (first,) = torch.autograd.grad(loss(hidden), hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), hidden)
    assert second.isfinite().all()
    assert hessian(loss)(hidden.detach()).isfinite().all()


def test_torchscript_and_traces_match() -> None:
    torch.manual_seed(0)
    model = geofm.create_model("mpmae_atto").eval()
    for name, parameter in model.named_parameters():
        if "grn" in name:
            nn.init.normal_(parameter)
    x = tile(model, side=56)
    with torch.no_grad():
        expected = model(x)
    for other in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = geofm.create_model("mpmae_atto").eval()
    with torch.inference_mode():
        batch = tile(model, 5)
        torch.testing.assert_close(model(batch)[2:3], model(batch[2:3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_architecture_has_the_published_shape(name: str) -> None:
    with torch.device("meta"):
        model = geofm.create_model(name)
    features = {
        "mpmae_atto": 320,
        "mpmae_femto": 384,
        "mpmae_pico": 512,
        "mpmae_nano": 640,
        "mpmae_tiny": 768,
        "mpmae_base": 1024,
        "mpmae_large": 1536,
        "mpmae_huge": 2816,
        "ssl4eco_resnet18": 512,
        "ssl4eco_resnet34": 512,
        "ssl4eco_resnet50": 2048,
        "ssl4eco_resnet101": 2048,
        "ssl4eco_vit_tiny_patch16": 192,
        "ssl4eco_vit_small_patch16": 384,
        "ssl4eco_vit_base_patch16": 768,
    }
    assert model.num_features == features[name]
    assert model.num_classes == 0


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("mpmae_atto", "convnextv2_atto"),
        ("mpmae_tiny", "convnextv2_tiny"),
        ("mpmae_base", "convnextv2_base"),
        ("mpmae_large", "convnextv2_large"),
        ("mpmae_huge", "convnextv2_huge"),
        ("mpmae_nano", "convnextv2_nano"),
    ],
)
def test_stages_have_as_many_parameters_as_timms_convnextv2(name: str, timm_name: str) -> None:
    with torch.device("meta"):
        ours = geofm.create_model(name)
        theirs = timm.create_model(timm_name, num_classes=0)
    stages = sum(p.numel() for p in ours.stages.parameters())
    stages += sum(p.numel() for p in ours.downsample_layers.parameters())
    assert stages == sum(p.numel() for p in theirs.stages.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_timm_builds_the_same_model(name: str) -> None:
    ours = geofm.create_model(name)
    theirs = timm.create_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert timm.is_model(name)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = geofm.create_model(name, num_classes=7)
    out = model(tile(model))
    assert out.shape == (2, 7)
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", SMALL)
def test_features_head_and_forward_agree(name: str) -> None:
    model = geofm.create_model(name, num_classes=5).eval()
    x = tile(model)
    with torch.inference_mode():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model(x), model.forward_head(features))
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(pooled), model(x))
        model.reset_classifier(0)
        assert model.num_classes == 0
        torch.testing.assert_close(model(x), pooled)


def test_without_pooling_the_map_stays() -> None:
    model = geofm.create_model("mpmae_atto", global_pool="", num_classes=4).eval()
    assert model(tile(model)).shape == (2, 4, 7, 7)
    model.reset_classifier(0, "avg")
    assert model(tile(model)).shape == (2, 320)


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_have_the_channels_and_strides_of_feature_info(name: str) -> None:
    model = geofm.create_model(name).eval()
    info = FeatureInfo(copy.deepcopy(model.feature_info), len(model.feature_info))
    x = tile(model, 1)
    with torch.inference_mode():
        last, maps = model.forward_intermediates(x)
        only = model.forward_intermediates(x, intermediates_only=True)
        early = model.forward_intermediates(
            x, indices=[0], stop_early=True, intermediates_only=True
        )
    assert len(maps) == len(only) == len(model.feature_info)
    torch.testing.assert_close(early[0], maps[0])
    torch.testing.assert_close(model.forward_features(x), last)
    for feature, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert feature.shape[1] == channels
        assert abs(feature.shape[2] - 64 / stride) <= 2


@pytest.mark.parametrize("name", SMALL)
def test_features_only_returns_a_pyramid_and_drops_the_head(name: str) -> None:
    model = geofm.create_model(name, features_only=True)
    maps = model(tile(model))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert not [n for n, _ in model.named_parameters() if ".head." in n or ".fc." in n]
    first = geofm.create_model(name, features_only=True, out_indices=(0,))
    assert len(first(tile(first))) == 1


def test_features_only_with_a_level_too_many_says_how_many_there_are() -> None:
    with pytest.raises(geofm.ModelError, match="4 levels, 0 to 3, with strides"):
        geofm.create_model("mpmae_atto", features_only=True, out_indices=(0, 4))


def test_layer_decay_orders_layers_from_stem_to_head() -> None:
    model = geofm.create_model("mpmae_atto", num_classes=3)
    layer = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    order = [
        "initial_conv.0.weight",
        "stages.0.0.dwconv.weight",
        "stages.0.1.dwconv.weight",
        "downsample_layers.0.1.weight",
        "stages.1.0.dwconv.weight",
        "downsample_layers.2.1.weight",
        "stages.3.1.dwconv.weight",
        "head.weight",
    ]
    assert sorted(order, key=lambda name: layer[name]) == order
    assert len({layer[name] for name in order}) == len(order)
    groups = param_groups_layer_decay(model, weight_decay=0.3, layer_decay=0.9)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    scales = {g["lr_scale"] for g in groups}
    assert max(scales) == 1.0
    assert min(scales) < 0.3


def test_grn_biases_and_norms_have_no_weight_decay() -> None:
    model = geofm.create_model("mpmae_atto", num_classes=3)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.3)
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            plain = parameter.ndim <= 1 or ".grn." in name
            assert (group["weight_decay"] == 0) == plain, name


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_nothing_but_memory(name: str) -> None:
    model = geofm.create_model(name).eval()
    x = tile(model)
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    model(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_is_active_in_training_only() -> None:
    model = geofm.create_model("mpmae_atto", drop_path_rate=0.5)
    x = tile(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(("height", "width"), [(56, 56), (49, 71), (112, 50), (48, 48)])
@pytest.mark.parametrize("patch_size", [8, 16, 24])
@pytest.mark.parametrize("stem_padding", ["classification", "aligned"])
def test_any_input_size_runs_and_has_the_stated_grid(
    height: int, width: int, patch_size: int, stem_padding: str
) -> None:
    model = MPMAE(
        dims=(4, 8, 8, 8), depths=(1, 1, 1, 1), patch_size=patch_size, stem_padding=stem_padding
    )
    out = model.eval().forward_features(torch.randn(1, 12, height, width))
    assert out.shape[2:] == (
        grid_size(height, patch_size, stem_padding),
        grid_size(width, patch_size, stem_padding),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mpmae_atto", {"stem_padding": "aligned"}),
        ("mpmae_atto", {}),
        ("mpmae_atto", {"patch_size": 16}),
        ("ssl4eco_resnet18", {}),
    ],
)
def test_cell_offset_is_the_centre_of_what_a_cell_sees(name: str, options: dict) -> None:
    # The gradient of one cell with respect to the image, with all weights made equal, is
    # symmetric about the centre of the cell's receptive field.
    model = geofm.create_model(name, **options).eval().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.fill_(1.0 / module.weight[0].numel())
    for module in model.modules():
        # Norms and activations that depend on other sites would blur the field.
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.forward = lambda x: x
        if isinstance(module, nn.GELU | nn.ReLU):
            module.forward = lambda x: x
        if isinstance(module, Block):
            module.forward = lambda x: x
        if isinstance(module, nn.MaxPool2d):
            module.forward = lambda x: F.avg_pool2d(x, 3, 2, 1)
    stride = model.feature_info[-1]["reduction"]
    side = 16 * stride
    x = torch.zeros(1, model.pretrained_cfg["input_size"][0], side, side, dtype=torch.double)
    x.requires_grad_()
    out = model.forward_features(x)
    row = 8
    out[0, :, row, row].sum().backward()
    seen = x.grad[0].sum(0)
    seen = seen / seen.sum()
    centre = float((seen.sum(1) * (torch.arange(side) + 0.5)).sum())
    assert centre == pytest.approx(model.cell_offset + stride * (row + 0.5), abs=1e-6)


def test_segmentation_models_pytorch_decodes_the_encoder() -> None:
    net = smp.Unet(
        "tu-mpmae_atto",
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(32, 16, 8),
        in_channels=12,
        classes=4,
    )
    x = torch.randn(2, 12, 64, 64)
    out = net(x)
    assert out.shape == (2, 4, 64, 64)
    out.mean().backward()
    resnet = smp.Unet("tu-ssl4eco_resnet18", encoder_weights=None, in_channels=9, classes=4)
    assert resnet(torch.randn(2, 9, 64, 64)).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (65, 71), (40, 96)])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_unet_labels_every_pixel_at_any_size(size: tuple[int, int], patch_size: int) -> None:
    model = geofm.create_model("mpmae_unet_atto", num_classes=3, patch_size=patch_size)
    out = model(torch.randn(1, 12, *size))
    assert out.shape == (1, 3, *size)
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_unet_reads_a_published_file_with_its_unused_norm() -> None:
    model = geofm.create_model("mpmae_unet_atto", num_classes=3)
    state = dict(model.state_dict())
    state["norm.weight"], state["norm.bias"] = torch.ones(320), torch.zeros(320)
    model.load_state_dict(state, strict=True)
    assert "norm.weight" not in model.state_dict()


def test_unet_refuses_what_makes_no_sense() -> None:
    with pytest.raises(geofm.ModelError, match="cannot pool"):
        geofm.create_model("mpmae_unet_atto", global_pool="max")
    with pytest.raises(geofm.ModelError, match="features_only"):
        geofm.create_model("mpmae_unet_atto", features_only=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 12}, "multiple of 8"),
        ({"stem_padding": "same"}, "'classification'.*'aligned'"),
    ],
)
def test_impossible_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(geofm.ModelError, match=words):
        geofm.create_model("mpmae_atto", **options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="not_an_option"):
        geofm.create_model("mpmae_atto", not_an_option=1)


@pytest.mark.parametrize("name", ["mpmae_atto", "mpmae_unet_atto", "ssl4eco_resnet18"])
def test_torch_export_matches_for_any_batch(name: str) -> None:
    model = geofm.create_model(name).eval()
    x = tile(model, 2)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = tile(model, 3)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mpmae_atto", "ssl4eco_resnet18"])
def test_onnxruntime_agrees(name: str, tmp_path) -> None:
    import onnxruntime

    model = geofm.create_model(name).eval()
    x = tile(model, 2)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(out - model(x).detach().numpy()).max() < 1e-4


def test_half_precision_stays_finite_where_a_sum_of_squares_would_not() -> None:
    model = geofm.create_model("mpmae_atto", stem_padding="aligned").eval().half()
    with torch.inference_mode():
        assert torch.isfinite(model(100 * tile(model, 1).half())).all()


def test_factory_device_and_dtype_reach_every_parameter() -> None:
    model = timm.create_model("mpmae_atto", device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


def test_without_gradients_memory_is_taken_over_and_values_stay() -> None:
    torch.manual_seed(0)
    model = MPMAE(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), stem_padding="aligned").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "grn" in name:
                parameter.normal_(0, 0.5)
    pixels = torch.randn(3, 12, 64, 72)
    kept = pixels.clone()
    expected = model(pixels)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            found = model(pixels)
        assert torch.equal(pixels, kept)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        each = torch.func.vmap(lambda x: model(x[None])[0])(pixels)
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)
        hidden = torch.randn(2, 5, 5, 8)
        assert GELU()(hidden).data_ptr() == hidden.data_ptr()
    hidden = torch.randn(2, 5, 5, 8)
    before = hidden.clone()
    GELU()(hidden)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("part", [1, 100, 2**19])
def test_squares_are_summed_in_parts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grn, "_PART", part)
    sites = torch.randn(3, 35, 7)
    with torch.no_grad():
        found = grn._squares(sites)
    torch.testing.assert_close(found, sites.square().sum(1), atol=0, rtol=1e-5)
