"""Fine-tune an encoder on a folder of EuroSAT multispectral tiles, in plain PyTorch.

    python examples/finetune_eurosat.py EuroSAT_MS --model mpmae_atto --epochs 30
    python examples/finetune_eurosat.py EuroSAT_MS --weights none --frozen

The folder holds one subfolder a class with GeoTIFFs of 13 bands (L1C DN, B8A last), as the EuroSAT
authors publish it; `geofm sample eurosat FOLDER` writes a generated one. Every second tile of a
class, by the number in its name, is held out. The hyperparameters are those of the MMEarth paper's
fine-tuning (arXiv 2405.02771), but for the learning rate and the number of epochs.
"""

import argparse
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, TensorDataset

import geofm

EUROSAT_BANDS = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A".split()


def read_tiles(folder: Path) -> tuple[np.ndarray, torch.Tensor, np.ndarray, list[str]]:
    """Pixels (N, 13, H, W), labels, the number in each file's name, and the classes."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    tiles, labels, numbers = [], [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.tif")):
            with rasterio.open(path) as file:
                tiles.append(file.read())
            labels.append(label)
            numbers.append(int(path.stem.rsplit("_", 1)[-1]))
    if not tiles:
        raise SystemExit(f"no tiles in {folder}: expected {folder}/<class>/<class>_<number>.tif")
    return np.stack(tiles), torch.tensor(labels), np.array(numbers), classes


def augment(x: torch.Tensor) -> torch.Tensor:
    """Flips and quarter turns: a tile has no top."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    return torch.rot90(x, int(torch.randint(4, ())), (-2, -1))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, loader: DataLoader, device: str) -> float:
    model.eval()
    hits = [(model(x.to(device)).argmax(1).cpu() == y).float() for x, y in loader]
    return float(torch.cat(hits).mean())


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="mpmae_atto")
    parser.add_argument("--weights", default="default", help="tag, path, 'default' or 'none'")
    parser.add_argument("--frozen", action="store_true", help="train the head only")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tiles, labels, numbers, classes = read_tiles(args.folder)
    pretrained = {"none": False, "default": True}.get(args.weights, args.weights)
    model = geofm.create_model(
        args.model, pretrained=pretrained, num_classes=len(classes), drop_path_rate=0.1
    )
    # Bands by name, so that B8A's odd place in these files does not matter.
    prepare = geofm.create_transform(model, bands=EUROSAT_BANDS, units="dn", level="L1C")
    pixels = prepare(tiles)
    held_out = torch.from_numpy(numbers % 2 == 1)
    train = DataLoader(
        TensorDataset(pixels[~held_out], labels[~held_out]), args.batch, shuffle=True
    )
    test = DataLoader(TensorDataset(pixels[held_out], labels[held_out]), 64)

    model.to(device)
    if args.frozen:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    optimizer = create_optimizer_v2(
        model, "adamw", lr=args.lr, weight_decay=0.3, layer_decay=0.9, betas=(0.9, 0.999)
    )
    schedule = CosineLRScheduler(optimizer, args.epochs, warmup_t=args.epochs // 10)
    for epoch in range(args.epochs):
        schedule.step(epoch)
        model.train(not args.frozen)
        losses = []
        for x, y in train:
            logits = model(augment(x).to(device))
            loss = F.cross_entropy(logits, y.to(device), label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1:3d}  loss {np.mean(losses):.3f}")
    result = accuracy(model, test, device)
    print(
        f"held-out accuracy {result:.3f} on {int(held_out.sum())} tiles of {len(classes)} classes "
        f"(chance {1 / len(classes):.3f}), {args.model}, weights: {args.weights}"
    )
    return result


if __name__ == "__main__":
    main()
