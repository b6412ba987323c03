"""Topography: is the sheet a map? Measures of every sheet on held-out text, each beside its floor.

    python -m evals.topography out/topolm --control out/control

Moran's I of single-token maps, raw and smoothed; correlation against distance, and the smoothness that
follows from it; size of clusters; wiring length; and the spatial loss over all neighbourhoods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np

from evals import heldout
from evals.activations import check_finite
from evals.common import Analysis, MoranConfig, Subject, moran_of_sheets, need, protocol_of, run_analyses
from topogpt import topo
from topogpt.analysis import measures
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.terminal import print_table, progress, say

TOKENS_PER_BATCH = 2048
N_TDANN = 16  # maps whose smoothness is averaged: each takes a curve over all pairs of units


@dataclass(frozen=True, kw_only=True)
class TopographyConfig(MoranConfig):
    """Measure how map-like each sheet is on held-out text: python -m evals.topography RUN [--control RUN]."""

    text: str | None = None  # held-out text: a .txt file or shards; None: the run's validation shards
    n_tokens: int = 8192  # of the text
    n_maps: int = 64  # tokens, evenly spaced over the text, whose maps are looked at

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("n_tokens", self.n_tokens, 2)
        check_at_least("n_maps", self.n_maps, 1)


class Statistics(NamedTuple):
    """What one pass over the text leaves of each sheet, units in the order of the grid."""

    covariance: dict[str, np.ndarray]  # sheet -> (h w, h w): sums of products of centred activations
    maps: np.ndarray  # (S, n_maps, h, w): single tokens
    tokens: list[int]  # of the maps


def collect(subject: Subject, windows: np.ndarray, n_maps: int) -> Statistics:
    """Read the text once. Sums are of deviations from the first batch's means, which keeps fp32 exact."""
    import torch

    n_windows, length = windows.shape
    at = np.linspace(0, windows.size - 1, min(n_maps, windows.size)).round().astype(int)
    per_batch = max(1, TOKENS_PER_BATCH // length)
    order = {sheet: torch.from_numpy(topo.units_by_cell(p)) for sheet, p in subject.positions.items()}
    shift: dict[str, torch.Tensor] = {}
    sums = {sheet: torch.zeros(len(o), dtype=torch.float64) for sheet, o in order.items()}
    products = {sheet: torch.zeros(len(o), len(o), dtype=torch.float64) for sheet, o in order.items()}
    maps: dict[str, list[np.ndarray]] = {sheet: [] for sheet in order}
    device = subject.model.device
    with torch.inference_mode():
        for start in progress(range(0, n_windows, per_batch), f"{subject.label}: reading text"):
            batch = torch.from_numpy(windows[start : start + per_batch]).to(device)
            named = subject.model(batch, activations=True, last_only=True).activations
            here = at[(at >= start * length) & (at < start * length + batch.numel())] - start * length
            for sheet, cells in order.items():
                x = named.pop(sheet).flatten(0, 1).float()[:, cells.to(device)]  # (N, h w)
                maps[sheet].append(x[here].cpu().numpy())
                x = x - shift.setdefault(sheet, x.mean(0))
                sums[sheet] += x.sum(0, dtype=torch.float64).cpu()
                products[sheet] += (x.T @ x).double().cpu()
    covariance = {
        sheet: (products[sheet] - torch.outer(sums[sheet], sums[sheet]) / windows.size).numpy()
        for sheet in order
    }
    check_finite(covariance)
    grids = np.stack([np.concatenate(found).reshape(-1, *subject.grid) for found in maps.values()])
    return Statistics(covariance, grids, windows.flatten()[at].tolist())


def analyse(cfg: TopographyConfig, subject: Subject) -> Analysis:
    need("scipy")
    h, w = subject.grid
    text = heldout.read(subject, cfg.text, cfg.n_tokens, cfg.vocab_dir)
    found = collect(subject, text.tokens, cfg.n_maps)
    correlation = {sheet: correlations_of(c) for sheet, c in found.covariance.items()}
    curves = {sheet: measures.curve(r, h, w) for sheet, r in correlation.items()}
    distance = next(iter(curves.values())).distance
    by_sheet = dict(zip(subject.sheets, found.maps, strict=True))
    noise = np.random.default_rng(cfg.seed).standard_normal((cfg.permutations, h, w))
    results: dict[str, Any] = {
        "text": text.source,
        "n_tokens": text.tokens.size,
        "tokens": words_of(subject, found.tokens, cfg.vocab_dir),
        "moran": {
            str(fwhm): moran_of_sheets(
                cfg, subject, measures.smooth(found.maps, fwhm, cfg.unit_distance_mm), fwhm
            )
            for fwhm in progress(cfg.fwhm_mm, f"{subject.label}: Moran's I")
        },
        "spatial_loss": averaged(spatial_losses(subject, found.covariance), 0.5),
        "smoothness_correlation": averaged(
            {sheet: measures.smoothness_correlation(c) for sheet, c in curves.items()}
        ),
        "smoothness_tdann": averaged(
            {sheet: mean_smoothness(grids) for sheet, grids in by_sheet.items()}, mean_smoothness(noise)
        ),
        "wiring_length": averaged(
            {sheet: measures.wiring_length(r, h, w) for sheet, r in correlation.items()}, 1.0
        ),
        **{
            f"{kind}_cluster": averaged(
                {sheet: cluster_size(grids, kind) for sheet, grids in by_sheet.items()},
                cluster_size(noise, kind),
            )
            for kind in ("largest", "mean")
        },
        "correlation_by_distance": {
            "distance": distance,
            "mean": np.mean([c.value for c in curves.values()], axis=0),
            "by_sheet": {sheet: c.value for sheet, c in curves.items()},
        },
    }
    summary = {f"Moran's I, FWHM {float(k):g} mm": m["mean"] for k, m in results["moran"].items()}
    summary |= {f"its floor, FWHM {float(k):g} mm": m["floor"] for k, m in results["moran"].items()}
    summary |= {name: results[key]["mean"] for key, name in MEASURES.items()}
    data, arrays = {text.source: text.sha256}, {"maps": found.maps}
    return Analysis(protocol_of(cfg) | PROTOCOL, data, results, arrays, summary)


PROTOCOL = {
    "maps": "activations of single tokens; Moran's I is the mean over them",
    "correlation": "between units, over all tokens; by distance up to the longer side of the sheet",
    "spatial_loss": "TopoLM's, over all neighbourhoods and all tokens of the text; 0.5: independent units",
    "smoothness_correlation": "largest - smallest value of correlation against distance (TopoNets, inferred)",
    "smoothness_tdann": f"TDANN's (max - first) / max, 20 bins; mean over {N_TDANN} single-token maps",
    "wiring_length": "mean distance to the 20 most correlated units / mean distance; 1: no map",
    "largest_cluster": "units in the largest cluster above one standard deviation, mean over maps",
    "mean_cluster": "the same for the mean size of its clusters",
}


def averaged(by_sheet: Mapping[str, float], floor: float | None = None) -> dict[str, Any]:
    mean = float(np.mean(list(by_sheet.values())))
    return {"mean": mean, **({} if floor is None else {"floor": floor}), "by_sheet": dict(by_sheet)}


def correlations_of(covariance: np.ndarray) -> np.ndarray:
    """Pearson correlations; a unit without variance correlates with nothing."""
    variance = covariance.diagonal()
    scale = np.where(variance > 1e-12, 1 / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
    return covariance * scale[:, None] * scale


def spatial_losses(subject: Subject, covariance: Mapping[str, np.ndarray]) -> dict[str, float]:
    """TopoLM's loss of each sheet over all its neighbourhoods, with the run's radius and distance."""
    import torch

    from topogpt.settings import TopoConfig
    from topogpt.spatial.topolm import correlation_loss, standardised_pairs

    said = (subject.settings or {}).get("topo", {})
    cfg = TopoConfig(**{f.name: said[f.name] for f in fields(TopoConfig) if f.name in said})
    h, w = subject.grid
    try:
        cells = topo.neighbourhood_cells(h, w, cfg.radius)
    except ValueError as error:
        raise UserError(f"{subject.label}: {error}") from None
    target = standardised_pairs(torch.from_numpy(topo.inverse_distances(cfg.radius, cfg.distance)))
    return {
        sheet: float(
            correlation_loss(torch.from_numpy(c[cells[:, :, None], cells[:, None, :]]), target)[0].mean()
        )
        for sheet, c in covariance.items()
    }


def mean_smoothness(grids: np.ndarray) -> float:
    chosen = np.linspace(0, len(grids) - 1, min(N_TDANN, len(grids))).round().astype(int)
    return float(np.mean([measures.smoothness_tdann(grids[i]) for i in chosen]))


def cluster_size(grids: np.ndarray, kind: Literal["largest", "mean"]) -> float:
    centred = grids - grids.mean(axis=(-2, -1), keepdims=True)
    sizes = measures.cluster_sizes(centred > grids.std(axis=(-2, -1), keepdims=True))
    return float(getattr(sizes, kind).mean())


def words_of(subject: Subject, tokens: list[int], vocab_dir: str | None) -> list[str]:
    """The tokens as text; as numbers where the model's tokens are not GPT-2's."""
    from topogpt.text import tokenizer

    if subject.model.cfg.vocab_size < tokenizer.N_VOCAB:
        return [str(token) for token in tokens]
    words = tokenizer.load(vocab_dir)
    return [words.decode([token]) if token < words.n_vocab else str(token) for token in tokens]


MEASURES = {
    "spatial_loss": "spatial loss per sheet",
    "smoothness_correlation": "smoothness (correlation)",
    "smoothness_tdann": "smoothness (TDANN)",
    "wiring_length": "wiring length",
    "largest_cluster": "largest cluster (units)",
    "mean_cluster": "mean cluster (units)",
}


def table(contents: list[dict[str, Any]]) -> None:
    first = contents[0]["results"]
    rows = [
        [
            f"Moran's I, FWHM {float(fwhm):g} mm",
            *(c["results"]["moran"][fwhm]["mean"] for c in contents),
            first["moran"][fwhm]["floor"],
        ]
        for fwhm in first["moran"]
    ]
    rows += [
        [name, *(c["results"][key]["mean"] for c in contents), first[key].get("floor")]
        for key, name in MEASURES.items()
    ]
    print_table(["mean over sheets", *(c["model"]["label"] for c in contents), "no map"], rows)
    say(f"on {first['n_tokens']:,} tokens of {first['text']}")


def main(argv: list[str]) -> None:
    run_analyses("topography", TopographyConfig, argv, analyse, table)


if __name__ == "__main__":
    run_main(main)
