"""A convolutional classifier whose filters lie on a sheet: TopoLoss on a model that is not ours, in a minute.

    pip install -e ".[evals]" && python docs/examples/digits.py             # writes out/digits.png

It trains on scikit-learn's 8x8 digits with and without the loss, says how well each classifies and how alike
neighbouring filters are, and draws the first layer's filters where they lie.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topogpt

N_TRAIN = 1200  # of 1797 images
FACTOR = 3.0
TAU = 1.0


class Result(NamedTuple):
    accuracy: float  # on the images not trained on
    smoothness: float  # mean cosine between filters side by side, of the first layer
    filters: np.ndarray  # (height of the sheet, its width, height of a filter, its width)


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) and what they show (1797,), in an order of chance that is always the same."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    return images - images.mean(), torch.tensor(data.target[order])


def train(tau: float, seed: int, epochs: int = 15) -> Result:
    """Train a classifier with TopoLoss on both of its hidden layers, times tau; tau 0: without."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 144, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(144, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4, 10),
    )  # fmt: skip
    topo_loss = topogpt.TopoLoss(
        [
            topogpt.LaplacianPyramid.from_layer(model, layer, FACTOR, FACTOR, scale=tau)
            for layer in (model[0], model[3])
        ]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(N_TRAIN).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if tau:
                loss = loss + topo_loss.compute(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = model(images[N_TRAIN:]).argmax(1) == labels[N_TRAIN:]
    filters = model[0].weight.detach().view(12, 12, 5, 5)
    return Result(right.float().mean().item(), smoothness(filters), filters.numpy())


def smoothness(filters: Tensor) -> float:
    """Mean cosine over pairs of 8-neighbours; 0 of a sheet without order."""
    f = F.normalize(filters.flatten(2), dim=-1)
    pairs = (f[1:], f[:-1]), (f[:, 1:], f[:, :-1]), (f[1:, 1:], f[:-1, :-1]), (f[1:, :-1], f[:-1, 1:])
    return torch.cat([(a * b).sum(-1).flatten() for a, b in pairs]).mean().item()


def draw(results: dict[str, Result], path: Path) -> None:
    """The filters of each model on its sheet, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, result) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        f = result.filters / np.abs(result.filters).max((2, 3), keepdims=True)
        h, w, kh, kw = f.shape
        gapped = np.pad(f, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
        axis.imshow(gapped.transpose(0, 2, 1, 3).reshape(h * (kh + 1), w * (kw + 1)), cmap="RdBu_r")
        axis.set_axis_off()
        axis.set_title(f"{name}: cosine {result.smoothness:.2f}, accuracy {result.accuracy:.3f}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tau", type=float, default=TAU, help="weight of TopoLoss")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="the picture, of seed 0")
    options = parser.parse_args()
    shown = {}
    for name, tau in (("without TopoLoss", 0.0), (f"TopoLoss, tau {options.tau:g}", options.tau)):
        results = [train(tau, seed) for seed in range(options.seeds)]
        for word in ("accuracy", "smoothness"):
            values = np.array([getattr(result, word) for result in results])
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"{name:24s} {word:11s} {values.mean():.3f} (seeds: {each})", flush=True)
        shown[name] = results[0]
    draw(shown, options.out)
    print(f"{options.out} shows the first layer's filters where they lie")


if __name__ == "__main__":
    main()
