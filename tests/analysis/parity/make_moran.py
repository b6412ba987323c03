"""Write moran.json: what esda, the reference implementation of Moran's I, says about some maps.

    python -m venv .venv-esda && .venv-esda/bin/pip install esda libpysal
    PYTHONPATH=. .venv-esda/bin/python tests/analysis/parity/make_moran.py

tests/analysis/test_measures.py holds ours against the file; it draws the same maps from here.
"""

import json
from pathlib import Path

import numpy as np

from topogpt import rng

PERMUTATIONS = 999
SEED = 0  # of numpy's global generator, from which esda draws its permutations


def maps() -> dict[str, np.ndarray]:
    """Name -> (h, w); they come from rng.py, so every version of numpy draws the same ones."""
    row, column = np.indices((28, 28)).astype(float)
    return {
        "white noise": noise("white", 28, 28),
        "rare peaks": noise("rare", 28, 28) ** 12,
        "noise, slightly smoothed": blurred(noise("slight", 28, 28), own=4.0),
        "noise, smoothed": blurred(blurred(noise("smoothed", 28, 28))),
        "checkerboard": (row + column) % 2,
        "halves": (column >= 14).astype(float),
        "gradient": row + 0.1 * noise("gradient", 28, 28),
        "12x12": blurred(noise("12x12", 12, 12), own=4.0),
        "5x7, a rare peak": noise("5x7", 5, 7) ** 12,  # far from normal: the variance depends on the kurtosis
        "24x32": noise("24x32", 24, 32) + 0.05 * np.indices((24, 32))[1] / 32,
    }


def noise(name: str, h: int, w: int) -> np.ndarray:
    """Uniform on [0, 1)."""
    return (rng.raw(h * w, "map", name) / 2**64).reshape(h, w)


def blurred(grid: np.ndarray, own: float = 1.0) -> np.ndarray:
    """Sum of every cell, `own` times, and its four neighbours on the torus."""
    return own * grid + sum(np.roll(grid, step, axis) for step in (-1, 1) for axis in (0, 1))


def main() -> None:
    import esda
    import libpysal

    found = []
    for name, grid in maps().items():
        for contiguity in ("queen", "rook"):
            weights = libpysal.weights.lat2W(*grid.shape, rook=contiguity == "rook")
            np.random.seed(SEED)
            m = esda.Moran(grid, weights, transformation="r", permutations=PERMUTATIONS)
            numbers = {
                "I": m.I,
                "expectation": m.EI,
                "variance_norm": m.VI_norm,
                "variance_rand": m.VI_rand,
                "p_norm": m.p_norm,  # two-sided
                "p_rand": m.p_rand,  # two-sided
                "p_sim": m.p_sim,  # of the nearer side
                "sim_mean": m.sim.mean(),
                "sim_sd": m.sim.std(),
            }
            numbers = {key: float(f"{value:.12g}") for key, value in numbers.items()}
            found.append({"map": name, "contiguity": contiguity} | numbers)
    versions = {"esda": esda.__version__, "libpysal": libpysal.__version__, "numpy": np.__version__}
    rows = ",\n  ".join(json.dumps(row) for row in found)
    content = (
        f'{{"made_with": {json.dumps(versions)}, "permutations": {PERMUTATIONS}, "found": [\n  {rows}\n]}}\n'
    )
    Path(__file__).with_name("moran.json").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
