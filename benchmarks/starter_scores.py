"""How good an encoder's frozen features are on EuroSAT tiles that starter weights never saw.

    python benchmarks/starter_scores.py --data DATA --weights starter

The tiles are those of odd number in DATA/eurosat_ms_200 (Level-1C DN; 10 classes of 10 tiles),
whole tiles of 64 px unless the weights' card says otherwise. ``--tiles even`` takes the others,
which the encoder was trained on, without their labels: to choose a recipe by, never to report.

Ten stratified folds: k-NN compares the tiles of one fold with those of the nine others; the linear
probe trains on eight, stops by the ninth and is tested on the tenth. Beside the weights, by the
same procedure: encoders of random weights (several seeds), and the mean and deviation of each band
of a tile, without any encoder.
``--weights none`` leaves the weights out.

A fold has ten tiles, so one tile is 0.1 of its accuracy: mind the deviations.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch import Tensor

import geofm
from geofm.evaluate import knn_accuracy, linear_probe, stratified_folds

EUROSAT_BANDS = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A".split()
FOLDS = 10
# One result: the accuracy in each fold.
Scores = dict[str, list[float]]


def read_tiles(folder: Path, parity: int) -> tuple[np.ndarray, Tensor]:
    """Pixels (N, 13, 64, 64) and labels of the tiles whose number is even (0) or odd (1)."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    tiles, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.tif")):
            if int(path.stem.rsplit("_", 1)[1]) % 2 == parity:
                with rasterio.open(path) as file:
                    tiles.append(file.read())
                labels.append(label)
    if not tiles:
        raise SystemExit(f"no tiles in {folder}: expected {folder}/<class>/<class>_<number>.tif")
    return np.stack(tiles), torch.tensor(labels)


def prepared(model: torch.nn.Module, tiles: np.ndarray) -> Tensor:
    return geofm.create_transform(model, bands=EUROSAT_BANDS, units="dn", level="L1C")(tiles)


@torch.no_grad()
def encode(model: torch.nn.Module, tiles: np.ndarray) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in prepared(model, tiles).split(25)])


def evaluate(features: Tensor, labels: Tensor, folds: Tensor, k: int) -> Scores:
    scores: Scores = {"knn": [], "probe": []}
    for fold in range(FOLDS):
        test, val = folds == fold, folds == (fold + 1) % FOLDS
        rest, train = ~test, ~test & ~val
        scores["knn"].append(
            knn_accuracy(features[rest], labels[rest], features[test], labels[test], k)
        )
        probe = linear_probe(features[train], labels[train], features[val], labels[val])
        scores["probe"].append(probe.accuracy(features[test], labels[test]))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of eurosat_ms_200")
    parser.add_argument("--weights", default="starter", help="tag, path, 'default' or 'none'")
    parser.add_argument("--tiles", choices=("odd", "even"), default="odd", help="by file number")
    parser.add_argument("--model", default="mpmae_atto")
    parser.add_argument("--seeds", type=int, default=5, help="number of random encoders")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--fold-seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()

    tiles, labels = read_tiles(args.data / "eurosat_ms_200", int(args.tiles == "odd"))
    folds = stratified_folds(labels, FOLDS, args.fold_seed)

    def scores(model: torch.nn.Module) -> Scores:
        return evaluate(encode(model, tiles), labels, folds, args.k)

    results: dict[str, list[Scores]] = {}
    if args.weights != "none":
        weights = True if args.weights == "default" else args.weights
        model = geofm.create_model(args.model, pretrained=weights)
        results[f"weights: {model.weights_origin}"] = [scores(model)]
    random = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        random.append(geofm.create_model(args.model))
    results[f"random encoder, {args.seeds} seeds"] = [scores(model) for model in random]
    pixels = prepared(random[0], tiles)
    plain = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
    results["mean and std of each band"] = [evaluate(plain, labels, folds, args.k)]

    print(
        f"{len(labels)} {args.tiles} tiles, {FOLDS} folds; mean ± standard deviation over folds\n"
    )
    print(f"| features | {args.k}-NN | linear probe |\n|---|---|---|")
    summary = {name: {m: summarise(runs, m) for m in runs[0]} for name, runs in results.items()}
    for name, row in summary.items():
        cells = [f"{row[m]['mean']:.3f} ± {row[m]['std_folds']:.3f}" for m in ("knn", "probe")]
        if row["knn"]["std_seeds"] is not None:
            cells = [
                f"{cell} (seeds ± {row[m]['std_seeds']:.3f})"
                for cell, m in zip(cells, ("knn", "probe"), strict=True)
            ]
        print(f"| {name} | {' | '.join(cells)} |")
    margins = {}
    if args.weights != "none":
        ours, theirs = list(results.values())[:2]
        margins = {m: margin(ours, theirs, m) for m in ("knn", "probe")}
        for metric, value in margins.items():
            print(
                f"\n{metric}: {value['mean']:+.3f} ± {value['std_folds']:.3f} over random, fold by "
                f"fold: {value['in_stds']:.1f} standard deviations"
            )
    seconds = time.perf_counter() - start
    facts = {"tiles": len(labels), "k": args.k, "seconds": round(seconds, 1)}
    print(f"\n{json.dumps({**facts, 'scores': summary, 'margin over random': margins})}")


def summarise(runs: list[Scores], metric: str) -> dict[str, float | None]:
    """Over folds and runs; the deviation over folds is that of one run, averaged over runs."""
    table = np.array([run[metric] for run in runs])
    return {
        "mean": float(table.mean()),
        "std_folds": float(table.std(1, ddof=1).mean()),
        "std_seeds": float(table.mean(1).std(ddof=1)) if len(runs) > 1 else None,
    }


def margin(ours: list[Scores], theirs: list[Scores], metric: str) -> dict[str, float]:
    """Difference in each fold to the mean over the other's runs."""
    difference = np.array(ours[0][metric]) - np.mean([run[metric] for run in theirs], 0)
    mean, std = float(difference.mean()), float(difference.std(ddof=1))
    return {"mean": mean, "std_folds": std, "in_stds": mean / std if std else float("inf")}


if __name__ == "__main__":
    main()
