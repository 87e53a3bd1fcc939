"""The gradients that geofm writes out, beside autograd's, layer by layer on this machine.

    python benchmarks/gradient_speed.py

The layers are those of MP-MAE atto's stages for tiles of 112 px in patches of 16 with 19 of 49
patches visible, and of the decoder. Depthwise: the gradient, of which that of the input is oneDNN's
on both sides, and that of the weights on one side only. GRN and the linear layer behind it: forward
and backward, with the norm and its gradient left to torch and as `geofm.models.grn` has them. Both
sides take turns; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from geofm.models.grn import grn_linear
from geofm.pretrain.depthwise import depthwise
from geofm.pretrain.visible import Visible

# Name, channels, sites along a side of a patch; the decoder sees all patches.
LAYERS = (("stage 1", 40, 8), ("stage 2", 80, 4), ("stage 3", 160, 2), ("stage 4", 320, 1))
DECODER = ("decoder", 512, 1)
GRID, KEPT = 7, 19


def plain_grn(hidden: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The folded layer with everything left to autograd."""
    response = torch.linalg.vector_norm(hidden, dim=(1, 2))
    scale = 1 + gamma * response / (response.mean(-1, keepdim=True) + 1e-6)
    shift = F.linear(beta, weight, bias)
    sites = hidden.flatten(1, 2)
    if sites.shape[1] < 2 * len(weight):
        return F.linear(sites * scale[:, None], weight, shift)
    return torch.baddbmm(shift, sites, (weight * scale[:, None]).transpose(1, 2))


def medians(runs: int, *sides: Callable[[], object]) -> list[float]:
    """Milliseconds of each side."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs + 1):
        for side, spent in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            spent.append(1000 * (time.perf_counter() - start))
    return [statistics.median(spent[1:]) for spent in times]


def depthwise_times(count: int, channels: int, side: int, masked: bool, runs: int) -> list[float]:
    length = GRID * side
    x = torch.randn(count, channels, length, length).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(channels, 1, 7, 7, requires_grad=True)
    visible, used = None, torch.ones(1)
    if masked:
        hidden = torch.stack([torch.randperm(GRID**2) >= KEPT for _ in range(count)])
        visible = Visible.of(hidden, count, GRID)
        used = visible.pixel_mask(side, torch.float32)
    grad = (torch.randn_like(x) * used).contiguous(memory_format=torch.channels_last)
    theirs = F.conv2d(x, weight, padding=3, groups=channels)
    ours = depthwise(x, weight, visible, side)

    def gradient(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (weight, x), grad, retain_graph=True)

    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-4, atol=1e-3)
    return medians(runs, lambda: gradient(theirs), lambda: gradient(ours))


def grn_times(count: int, channels: int, sites: int, runs: int) -> list[float]:
    wide = 4 * channels
    shapes = [(count, sites, 1, wide), (wide,), (wide,), (channels, wide), (channels,)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grad = torch.randn(count, sites, channels)

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(plain_grn(*inputs), inputs, grad)

    def written() -> tuple[Tensor, ...]:
        return torch.autograd.grad(grn_linear(*inputs, 1e-6)[:, :, 0], inputs, grad)

    for a, b in zip(plain(), written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
    return medians(runs, plain, written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}")
    print("| layer | gradient | autograd, ms | geofm, ms | times |\n|---|---|---|---|---|")
    for name, channels, side in (*LAYERS, DECODER):
        masked = name != DECODER[0]
        sites = (KEPT if masked else GRID**2) * side**2
        for what, (theirs, ours) in (
            (
                "depthwise 7×7",
                depthwise_times(options.batch, channels, side, masked, options.runs),
            ),
            ("GRN, linear", grn_times(options.batch, channels, sites, options.runs)),
        ):
            print(f"| {name} | {what} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
