"""What encoding 21,000 species names takes, and rolling their probabilities up.

    python benchmarks/zeroshot_speed.py [--model geotreeclip] [--names 21000]

Three ways to encode the same names, in one run: every prompt padded to 77 tokens, as published;
sorted batches trimmed to their longest prompt; and geofm's, where shared beginnings are computed
once. The names are synthetic, in as many genera and families as GlobalGeoTree has (2,734 and 275);
``--unrelated`` gives each a genus of its own, where the least is shared.
"""

from __future__ import annotations

import argparse
import functools
import platform
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import geofm
from geofm.predictions import Prediction
from geofm.taxonomy import LEAF_TYPES, Taxon
from geofm.text_features import encode_prompts

# Syllables of botanical names.
_PARTS = (
    "quer pin fag ace bet sal pop til ulm frax euca mel acac ficu myr laur mag rho cras gla mac "
    "mic phyl lon oro den flor aur alb nig rub vir lat ang orb tri bul cor spi"
).split()
_ENDS = ("us", "a", "um", "is", "ensis", "ifolia", "oides", "ata", "osa", "iana")


def word(rng: random.Random, syllables: int, end: str) -> str:
    return "".join(rng.choice(_PARTS) for _ in range(syllables)) + end


def synthetic_taxa(count: int, unrelated: bool = False, seed: int = 0) -> list[Taxon]:
    rng = random.Random(seed)
    families = [word(rng, 2, "aceae").capitalize() for _ in range(max(1, count * 275 // 21001))]
    genera = [
        (word(rng, 3 if unrelated else 2, rng.choice(_ENDS[:4])).capitalize(), rng.choice(families))
        for _ in range(count if unrelated else max(1, count * 2734 // 21001))
    ]
    taxa: dict[str, Taxon] = {}
    for i in range(100 * count):
        genus, family = genera[i % count] if unrelated else rng.choice(genera)
        name = f"{genus} {word(rng, rng.choice((1, 2)), rng.choice(_ENDS))}"
        leaf_type = LEAF_TYPES[sum(family.encode()) % len(LEAF_TYPES)]
        taxa.setdefault(name, Taxon(leaf_type, family, genus, name))
        if len(taxa) == count:
            break
    return list(taxa.values())


def padded(model: torch.nn.Module, prompts: list[str], batch: int) -> Tensor:
    tokens = model.tokenize(prompts)
    return torch.cat([F.normalize(model.text(part), dim=-1).cpu() for part in tokens.split(batch)])


def trimmed(model: torch.nn.Module, prompts: list[str], batch: int) -> Tensor:
    tokens = model.tokenize(prompts)
    order = tokens.argmax(-1).argsort(stable=True)
    out = torch.empty(len(prompts), model.embed_dim)
    for rows in order.split(batch):
        out[rows] = model.encode_text(tokens[rows], normalize=True).cpu()
    return out


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def resident() -> int:
    """Bytes this process holds now."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The most memory the process held within a block, beyond what it held before, in bytes."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.watcher.join()
        self.extra = max(self.most, resident()) - self.before


@torch.inference_mode()
def names_table(args: argparse.Namespace, taxa: list[Taxon], device: str) -> None:
    torch.manual_seed(0)
    model = geofm.create_model(args.model).eval().to(device)
    prompts = sorted(taxon.prompt for taxon in taxa)
    # Word pieces are remembered by the tokenizer: all ways get to know them beforehand.
    length = float(model.tokenize(prompts).argmax(-1).float().mean()) + 1
    print(f"{args.model}, {len(prompts)} names, {length:.1f} tokens on average")
    ways = {
        "padded to 77 tokens": padded,
        "trimmed batches": trimmed,
        "shared beginnings (geofm)": encode_prompts,
    }
    # The ways take turns, a slice of the names each: other programs disturb them alike.
    step = -(-len(prompts) // args.slices)
    slices = [prompts[start : start + step] for start in range(0, len(prompts), step)]
    times: dict[str, list[float]] = {name: [] for name in ways}
    difference = dict.fromkeys(ways, 0.0)
    for part in slices:
        results = []
        for name, way in ways.items():
            took, features = seconds(functools.partial(way, model, part, args.batch))
            times[name].append(took)
            results.append(features)
            difference[name] = max(difference[name], float((features - results[0]).abs().max()))
    print("| names encoded | s | names/s | times faster | median slice | largest difference |")
    print("|---|---|---|---|---|---|")
    first = times["padded to 77 tokens"]
    for name, own in times.items():
        median = statistics.median(before / after for before, after in zip(first, own, strict=True))
        print(
            f"| {name} | {sum(own):.1f} | {len(prompts) / sum(own):.0f} | "
            f"{sum(first) / sum(own):.1f} | {median:.1f} | {difference[name]:.1e} |"
        )


def roll_up_table(samples: int, taxa: list[Taxon]) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(samples, len(taxa), generator=generator)
    probabilities /= probabilities.sum(1, keepdim=True)
    prediction = Prediction(probabilities, tuple(taxa))
    size = probabilities.numel() * probabilities.element_size() / 1e9
    print(f"\n{samples} x {len(taxa)} probabilities ({size:.2f} GB)")
    print("| roll-up | s | extra memory, GB |")
    print("|---|---|---|")
    jobs: dict[str, Callable[[], object]] = {
        f"genus and family, {method}": lambda method=method: [
            prediction.roll_up(level, method) for level in ("genus", "family")
        ]
        for method in ("sum", "top")
    }
    jobs["five best species"] = lambda: prediction.top(5)
    for name, work in jobs.items():
        with Peak() as peak:
            took, result = seconds(work)
        del result
        print(f"| {name} | {took:.1f} | {peak.extra / 1e9:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="geotreeclip_tiny")
    parser.add_argument("--names", type=int, default=21_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--unrelated", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{where}, {args.threads} threads, torch {torch.__version__}, float32")
    taxa = synthetic_taxa(args.names, args.unrelated)
    names_table(args, taxa, device)
    if args.samples:
        roll_up_table(args.samples, taxa)


if __name__ == "__main__":
    sys.exit(main())
