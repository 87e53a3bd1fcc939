"""How much faster the MP-MAE encoder is than its published form, in one run on this machine.

    python benchmarks/encoder_speed.py

The published form is written out here from the papers' formulas: GRN as four passes over the widest
activation, channels-first LayerNorm from mean and variance. Both run the same weights; the largest
difference of their outputs is printed with the ratio of their times (median of alternating runs).
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import geofm
from geofm.models.mpmae import Block


class PlainBlock(nn.Module):
    """The block with the same parameters, formula by formula (arXiv 2301.00808, section 3.3)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        y = b.dwconv(x).permute(0, 2, 3, 1)
        y = F.gelu(b.pwconv1(b.norm(y)))
        gx = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + b.grn_eps)
        y = b.pwconv2(b.grn.gamma * (y * nx) + b.grn.beta + y)
        return x + y.permute(0, 3, 1, 2)


class PlainNorm(nn.Module):
    """LayerNorm over channels of (N, C, H, W), from mean and variance."""

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.norm.eps)
        return self.norm.weight[:, None, None] * x + self.norm.bias[:, None, None]


def published_form(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Block):
                setattr(parent, name, PlainBlock(child))
            elif isinstance(child, LayerNorm2d):
                setattr(parent, name, PlainNorm(child))
    return model


def seconds(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mpmae_atto", "mpmae_tiny"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{where}, {args.threads} threads, torch {torch.__version__}, float32")
    print(f"batch {args.batch} of {args.side} x {args.side}")
    print(
        "| model | published form, tiles/s | geofm, tiles/s | times faster | largest difference |"
    )
    print("|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        model = geofm.create_model(name).eval().to(device)
        for parameter in model.parameters():
            if parameter.ndim == 4 and parameter.shape[:3] == (1, 1, 1):
                nn.init.normal_(parameter, std=0.3)  # a GRN that starts at zero would test nothing
        plain = published_form(model)
        x = torch.randn(args.batch, 12, args.side, args.side, device=device)
        difference = float((model(x) - plain(x)).abs().max())
        times = [(seconds(plain, x), seconds(model, x)) for _ in range(args.runs)]
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {name} | {args.batch / before:.0f} | {args.batch / after:.0f} | "
            f"{before / after:.2f} | {difference:.1e} |"
        )


if __name__ == "__main__":
    main()
