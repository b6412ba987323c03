"""Write topoloss.json: what the package topoloss, the released TopoNets loss, says about some layers.

    python -m venv .venv-topoloss && .venv-topoloss/bin/pip install torch numpy einops "typeguard<3"
    .venv-topoloss/bin/pip install --no-deps topoloss==0.0.2 torchtyping
    PYTHONPATH=. .venv-topoloss/bin/python tests/spatial/parity/make_topoloss.py

tests/spatial/test_topoloss.py holds ours against the file; it builds the same layers from here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from topogpt import rng

# name -> kind of loss, layer, factors, interpolation
Case = tuple[str, nn.Module, tuple[float, float], str]
WEIGHTS, INPUTS, BIAS = "LaplacianPyramid", "LaplacianPyramidOnInput", "LaplacianPyramidOnBias"


def cases() -> dict[str, Case]:
    """Layers with weights from rng.py, so that every version of torch has the same ones."""
    layers = {
        "Linear 12 -> 48, 6x8": nn.Linear(12, 48),
        "Linear 9 -> 35, 5x7": nn.Linear(9, 35),
        "Linear 5 -> 13, 1x13": nn.Linear(5, 13),
        "Linear 48 -> 3072, 48x64": nn.Linear(48, 3072),
        "Conv2d 3 -> 64, 5x3": nn.Conv2d(3, 64, (5, 3)),
        "Conv2d 8 -> 15, grouped": nn.Conv2d(9, 15, 3, groups=3),
    }
    found: dict[str, Case] = {}
    for name, layer in layers.items():
        fill(name, layer)
        n_in, n_out = layer.weight.shape[1], layer.weight.shape[0]
        for factors in ((1.0, 1.0), (1.0, 3.0), (2.0, 2.0), (3.0, 3.0), (2.5, 1.7), (4.0, 3.0), (8.0, 8.0)):
            kinds = [(WEIGHTS, n_out)]
            if isinstance(layer, nn.Linear):
                kinds += [(BIAS, n_out), (INPUTS, n_in)]
            for kind, n_units in kinds:
                if fits(n_units, factors, depth=n_in if kind == WEIGHTS else n_out):
                    found[f"{kind} {name} {factors}"] = (kind, layer, factors, "bilinear")
    layer = layers["Linear 12 -> 48, 6x8"]
    found["nearest"] = (WEIGHTS, layer, (2.0, 3.0), "nearest")
    return found


def fits(n_units: int, factors: tuple[float, float], depth: int) -> bool:
    """Whether both take the factors: the package compares them with depth and height besides (its bug)."""
    h = next(h for h in range(int(n_units**0.5), 0, -1) if n_units % h == 0)
    return factors[0] <= min(h, depth) and factors[1] <= min(n_units // h, h)


def fill(name: str, layer: nn.Module) -> None:
    """Noise on a slope, so that losses lie between 0 and 1."""
    for key, parameter in layer.named_parameters():
        noise = rng.raw(parameter.numel(), "weights", name, key) / 2**64 - 0.4
        values = noise.reshape(parameter.shape) + np.linspace(-0.3, 0.3, len(parameter)).reshape(
            -1, *[1] * (parameter.dim() - 1)
        )
        parameter.data = torch.from_numpy(values.astype(np.float32))


def main() -> None:
    import topoloss

    found: dict[str, Any] = {}
    for name, (kind, layer, (factor_h, factor_w), interpolation) in cases().items():
        model = nn.ModuleDict({"layer": layer})
        loss = getattr(topoloss, kind)("layer", factor_h, factor_w, interpolation)
        model.zero_grad()
        value = topoloss.TopoLoss([loss]).compute(model=model)
        value.backward()
        grad = (layer.bias if kind == BIAS else layer.weight).grad.flatten()
        found[name] = {"loss": value.item(), "grad": grad[:: max(1, len(grad) // 5)].tolist()}
    path = Path(__file__).with_name("topoloss.json")
    path.write_text(json.dumps({"topoloss": "0.0.2", "values": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
