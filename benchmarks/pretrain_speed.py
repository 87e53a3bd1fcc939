"""Images per second of an MP-MAE pretraining step, beside a plain dense one.

    python benchmarks/pretrain_speed.py                                     # CPU
    python benchmarks/pretrain_speed.py --device cuda --batch 1024 --amp --compile

One step is forward and backward of all twelve modalities. The plain dense step stands for the
published code where its sparse convolutions are not to be had: the encoder on all sites, its blocks
and norms formula by formula (as in encoder_speed.py), and the decoder's block and all patches'
predictions computed once for each modality. Both run in turns in one process; the figure to trust
is their ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from encoder_speed import published_form
from torch import Tensor, nn

from geofm.pretrain import MODALITIES, MaskedAutoencoder


class Dense(nn.Module):
    """The same parameters, without any of the savings."""

    def __init__(self, method: MaskedAutoencoder, published: bool) -> None:
        super().__init__()
        self.method = method
        self.encoder, self.decoder = method.encoder, method.decoder
        if published:
            self.encoder = published_form(method.encoder)
            self.decoder = published_form(method.decoder)

    def forward(self, batch: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        method = self.method
        pixels = batch["sentinel2"]
        count, grid = len(pixels), pixels.shape[-1] // method.patch_size
        hide = mask.view(count, 1, grid, grid).to(pixels.dtype)
        sites = hide.repeat_interleave(method.patch_size, 2).repeat_interleave(method.patch_size, 3)
        x = self.encoder.forward_features(pixels * (1 - sites))
        x = method.proj(x)
        x = x * (1 - hide) + method.mask_token * hide
        losses = {}
        for m in method.modalities:
            decoded = self.decoder(x)
            head = method.pred_dict[m.name]
            if not m.per_pixel:
                decoded = method.layer_norm_tmp(decoded.permute(0, 2, 3, 1)).mean((1, 2))
                losses[m.name] = self._tile(m.kind, head(decoded), batch[m.name])
                continue
            predicted = head(decoded).flatten(2).transpose(1, 2)
            predicted = predicted.unflatten(2, (method.patch_size**2, m.channels))
            losses[m.name] = self._pixels(m, predicted, batch[m.name], mask)
        values = torch.stack(list(losses.values()))
        return {**losses, "total": method.loss_fn(values)}

    @staticmethod
    def _tile(kind: str, predicted: Tensor, target: Tensor) -> Tensor:
        if kind == "category":
            return nn.functional.cross_entropy(predicted, target.argmax(1))
        return (predicted - target).square().mean()

    def _pixels(self, m, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        patch, grid = self.method.patch_size, target.shape[-1] // self.method.patch_size
        target = target.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
        target = target.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        if m.kind == "classes":
            error = nn.functional.cross_entropy(
                predicted.permute(0, 3, 1, 2), target[..., 0], ignore_index=-1, reduction="none"
            )
            known = (target[..., 0] != -1) * mask[..., None]
            return (error * known).sum() / known.sum()
        if m.patch_norm:
            flat = target.flatten(2)
            flat = flat - flat.mean(-1, keepdim=True)
            target = (flat / (flat.var(-1, keepdim=True) + 1e-6).sqrt()).view_as(target)
        error = (predicted - target).square().mean((2, 3)) * mask
        return error.sum() / (error != 0).sum()


def random_batch(count: int, side: int, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch = {}
    for m in MODALITIES.values():
        if m.kind == "pixels":
            batch[m.name] = torch.randn(count, m.channels, side, side)
        elif m.kind == "classes":
            batch[m.name] = torch.randint(-1, m.channels, (count, 1, side, side))
        elif m.kind == "vector":
            batch[m.name] = torch.randn(count, m.channels)
        else:
            classes = torch.randint(m.channels, (count,))
            batch[m.name] = nn.functional.one_hot(classes, m.channels).float()
    return {name: value.to(device) for name, value in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="mpmae_atto")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of geofm's step")
    parser.add_argument("--grn", choices=("sample", "batch"), default="sample")
    parser.add_argument(
        "--baseline",
        choices=("published", "own"),
        default="published",
        help="blocks of the dense step: formula by formula, or geofm's own faster ones",
    )
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    method = MaskedAutoencoder(
        options.encoder, patch_size=options.patch_size, grn_scope=options.grn
    ).to(device)
    dense = Dense(method, options.baseline == "published").to(device)
    batch = random_batch(options.batch, method.size, device)
    mask = method.random_mask({}, options.batch, 7).to(device)
    ours: Callable = torch.compile(method) if options.compile else method

    def step(run: Callable) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        method.zero_grad(set_to_none=True)
        dense.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            losses = run(batch, mask)
        losses["total"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in (ours, dense):
        step(run)
    times: dict[str, list[float]] = {"geofm": [], "dense": []}
    for _ in range(options.rounds):
        times["geofm"].append(step(ours))
        times["dense"].append(step(dense))
    rate = {name: options.batch / statistics.median(values) for name, values in times.items()}
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        device_name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    report = {
        **vars(options),
        "geofm_images_per_s": round(rate["geofm"], 1),
        "dense_images_per_s": round(rate["dense"], 1),
        "ratio": round(rate["geofm"] / rate["dense"], 2),
        "peak_gib": peak,
        "device": device_name,
        "torch": torch.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
