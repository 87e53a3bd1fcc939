"""Zero-shot species, then the same after fine-tuning on a few samples of each.

    geofm sample globalgeotree shards --n 120
    python examples/few_shot_species.py shards --model geotreeclip_tiny --weights none --lr 1e-3

Samples of every species are split: k to learn from, the rest to be named. The published setting is
k = 1 or 3, 10 epochs, learning rate 1e-5, from the published checkpoint (arXiv 2505.12513).
"""

import argparse
from pathlib import Path

import torch

import geofm
from geofm.datasets import collate, read_shards
from geofm.evaluate import few_shot, sample_few_shot, zero_shot_accuracy


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--model", default="geotreeclip")
    parser.add_argument("--weights", default="default", help="tag, path, 'default' or 'none'")
    parser.add_argument("--k", type=int, default=3, help="samples of each species to learn from")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()
    torch.manual_seed(0)

    pretrained = {"none": False, "default": True}.get(args.weights, args.weights)
    model = geofm.create_model(args.model, pretrained=pretrained).eval()
    names = [variable.name for variable in model.variables]
    bands = model.input_spec.bands
    data = collate(list(read_shards(args.shards, bands=bands)), names)
    found = [geofm.Taxon(*fields) for fields in data["taxa"]]
    # Species with a sample left to be named after k are taken to learn from.
    taxa = [t for t in dict.fromkeys(found) if found.count(t) > args.k]
    labels = torch.tensor([taxa.index(t) if t in taxa else -1 for t in found])
    known = (labels >= 0).nonzero().flatten()
    learn = known[sample_few_shot(labels[known], args.k)]
    test = known[~torch.isin(known, learn)]

    def top1() -> float:
        classifier = geofm.SpeciesClassifier(model, taxa)
        prediction = classifier.predict(data["images"][test], data["auxiliary"][test])
        result = zero_shot_accuracy(prediction, taxa, [taxa[i] for i in labels[test].tolist()])
        print(result.table())
        return result.get("species", 1)

    print(f"{len(taxa)} species, {len(learn)} samples to learn from, {len(test)} to name")
    print(f"before fine-tuning (chance {1 / len(taxa):.3f})")
    top1()
    few_shot(
        model,
        data["images"][learn],
        data["auxiliary"][learn],
        labels[learn],
        taxa,
        epochs=args.epochs,
        lr=args.lr,
    )
    print("after")
    after = top1()
    print(f"top-1 after few-shot: {after:.3f}, weights: {args.weights}")
    return after


if __name__ == "__main__":
    main()
