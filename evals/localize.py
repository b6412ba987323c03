"""The language network: units that answer more to sentences than to nonword strings, and what else to.

    python -m evals.localize out/topolm --control out/control
    python -m evals.localize out/topolm --top_percent 1 --pooling last --magnitude   # AlKhamissi et al. 2025

The localiser of Fedorenko et al. (2010) on TopoLM's protocol: a Welch t-test of each unit on 240 sentences
against 240 nonword strings, false discovery rate over all units of all sheets. The network is the units for
which sentences win; those for which nonwords win, which TopoLM's released mask holds too, are counted apart.
Its selectivity is checked on items that did not choose it, and its answers are measured on other sentences
(S), word lists (W), jabberwocky (J) and nonword lists (N).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import activations
from evals.common import Analysis, MapConfig, Subject, moran_of_sheets, need, protocol_of, run_analyses
from evals.contrasts import TMaps, t_maps
from topogpt import rng
from topogpt.analysis import measures, stimuli
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.terminal import print_table

PROFILE = "SWJN"


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig(MapConfig):
    """Find the language network and its answers: python -m evals.localize RUN [--control RUN]."""

    localizer: str | None = None  # folder of the localiser's CSV files, or a CSV with item, condition (S, N)
    profiles: str | None = None  # CSV with sentence, condition (S, W, J, N); None for both: in stimuli_dir
    top_percent: float | None = None  # take this share of units, the most selective, whatever their p
    magnitude: bool = False  # test |activation| instead of activation
    smallest_cluster: int = 10  # units; smaller ones are left out

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("smallest_cluster", self.smallest_cluster, 1)
        if self.top_percent is not None and not 0 < self.top_percent <= 100:
            raise UserError(f"top_percent = {self.top_percent} must be above 0 and at most 100")


def analyse(cfg: LocalizeConfig, subject: Subject) -> Analysis:
    need("scipy")
    folder = Path(cfg.stimuli_dir)
    where = Path(cfg.localizer or folder / "fedorenko2010_localizer")
    items = stimuli.localizer(where) if cfg.localizer is None or where.is_dir() else stimuli.read(where)
    others = stimuli.profiles(Path(cfg.profiles or folder / "fedorenko_profiles.csv"))
    sentences, nonwords = items.where("S"), items.where("N")
    stimuli.check_groups(items, sentences, nonwords, "S - N")
    for condition in PROFILE:
        if not others.where(condition).any():
            raise UserError(f"{others.source} has no items of {condition}; it has {stimuli.counted(others)}")

    patterns = subject.on_grid(activations.of_stimuli(cfg, subject, items))  # (S, n_items, h, w)
    patterns = np.abs(patterns) if cfg.magnitude else patterns
    a, b = patterns[:, sentences], patterns[:, nonwords]
    found = t_maps(cfg, a, b, 0.0)
    network = chosen(cfg, found)
    responses = np.abs(subject.on_grid(activations.of_stimuli(cfg, subject, others)))
    regions = clusters_of(cfg, subject, network, found.t)
    results: dict[str, Any] = {
        "n_units": network.size,
        "n_network": int(network.sum()),
        "network_percent": 100 * float(network.mean()),
        "n_reversed": int((found.significant & (found.t < 0)).sum()),
        "n_items": [a.shape[1], b.shape[1]],
        "by_sheet": {sheet: int(n) for sheet, n in zip(subject.sheets, network.sum((1, 2)), strict=True)},
        "held_out": held_out(cfg, a, b),
        "moran": {
            str(fwhm): moran_of_sheets(cfg, subject, (t_maps(cfg, a, b, fwhm) if fwhm else found).t, fwhm)
            for fwhm in cfg.fwhm_mm
        },
        "smoothness_tdann": {
            sheet: measures.smoothness_tdann(t) for sheet, t in zip(subject.sheets, found.t, strict=True)
        },
        "profiles": {"network": profile(responses.swapaxes(0, 1)[:, network], others)}
        if network.any()
        else None,
        "clusters": [],
    }
    labels = np.zeros(network.shape, np.int16)
    for k, (s, mask) in enumerate(regions, start=1):
        labels[s][mask] = k
        peak = np.unravel_index(np.where(mask, found.t[s], -np.inf).argmax(), mask.shape)
        answers = profile(responses[s][:, mask], others)
        results["clusters"].append(
            {
                "sheet": subject.sheets[s],
                "size": int(mask.sum()),
                "peak_t": float(found.t[s][peak]),
                "row": int(peak[0]),
                "column": int(peak[1]),
                "response": {condition: answers[condition]["mean"] for condition in PROFILE},
            }
        )
    arrays = {"t": found.t.astype(np.float32), "network": network.astype(np.uint8), "clusters": labels}
    data = {items.source: items.sha256, others.source: others.sha256}
    summary = {"units in the language network (%)": results["network_percent"]}
    summary |= {f"Moran's I of t, FWHM {float(k):g} mm": m["mean"] for k, m in results["moran"].items()}
    protocol = protocol_of(cfg) | {"test": "Welch t, sentences - nonwords"}
    return Analysis(protocol, data, results, arrays, summary)


def chosen(cfg: LocalizeConfig, found: TMaps) -> np.ndarray:
    """The network, (S, h, w) bool: significant units for which sentences win, or the top share of all."""
    if cfg.top_percent is None:
        return found.significant & (found.t > 0)
    return measures.most_selective(found.t, max(1, round(found.t.size * cfg.top_percent / 100)))


def held_out(cfg: LocalizeConfig, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Choose the network on a random half of the items, and look at it on the other half."""
    halves = []
    for name, x in (("S", a), ("N", b)):
        order = rng.permutation(x.shape[1], cfg.seed, "split", name)
        halves.append((x[:, order[: len(order) // 2]], x[:, order[len(order) // 2 :]]))
    (a1, a2), (b1, b2) = halves
    if min(x.shape[1] for x in (a1, a2, b1, b2)) < 2:
        return {"n_network": None}  # too few items to split
    here, there = t_maps(cfg, a1, b1, 0.0), t_maps(cfg, a2, b2, 0.0)
    network = chosen(cfg, here)
    if not network.any():
        return {"n_network": 0}
    spread = np.sqrt((a2.var(1, ddof=1) + b2.var(1, ddof=1)) / 2)
    difference = a2.mean(1) - b2.mean(1)
    d = np.divide(difference, spread, out=np.zeros_like(difference), where=spread > 0)
    return {
        "n_network": int(network.sum()),
        "same_sign_percent": 100 * float((there.t[network] > 0).mean()),
        "significant_again_percent": 100 * float((there.significant & (there.t > 0))[network].mean()),
        "effect_size": float(d[network].mean()),  # Cohen's d
        "effect_size_outside": float(d[~network].mean()) if not network.all() else None,
        "correlation_of_t": float(np.corrcoef(here.t.ravel(), there.t.ravel())[0, 1]),
    }


def profile(responses: np.ndarray, others: stimuli.Stimuli) -> dict[str, dict[str, float]]:
    """Mean |activation| of units (n_items, n_units) in each condition, and its standard error over items."""
    each = responses.mean(1, dtype=float)
    found = {}
    for condition in PROFILE:
        values = each[others.where(condition)]
        sem = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        found[condition] = {"mean": float(values.mean()), "sem": sem, "n": len(values)}
    return found


def clusters_of(
    cfg: LocalizeConfig, subject: Subject, network: np.ndarray, t: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    """Clusters of the network, sheet by sheet, as (index of the sheet, mask); largest first."""
    found = [
        (s, mask)
        for s in range(len(subject.sheets))
        for mask in measures.clusters(network[s], cfg.smallest_cluster)
    ]
    return sorted(found, key=lambda pair: -int(pair[1].sum()))


def table(contents: list[dict[str, Any]]) -> None:
    found = [c["results"] for c in contents]
    rows = [
        ["units in the network", *(f"{r['n_network']:,} of {r['n_units']:,}" for r in found)],
        ["  share", *(f"{r['network_percent']:.1f} %" for r in found)],
        ["units for nonwords", *(r["n_reversed"] for r in found)],
        ["still significant on held-out items", *(percent(r, "significant_again_percent") for r in found)],
        ["effect size on held-out items (d)", *(r["held_out"].get("effect_size") for r in found)],
        ["clusters", *(len(r["clusters"]) for r in found)],
        ["  units in the largest", *(max((k["size"] for k in r["clusters"]), default=0) for r in found)],
    ]
    for condition in PROFILE:
        means = [r["profiles"] and r["profiles"]["network"][condition]["mean"] for r in found]
        rows.append([f"mean |activation| to {condition}", *means])
    for fwhm, moran in found[0]["moran"].items():
        values = [f"{r['moran'][fwhm]['mean']:.3f}" for r in found]
        rows.append([f"Moran's I of t, FWHM {float(fwhm):g} mm (floor {moran['floor']:.3f})", *values])
    print_table(["language network (S > N)", *(c["model"]["label"] for c in contents)], rows)


def percent(results: dict[str, Any], key: str) -> str | None:
    value = results["held_out"].get(key)
    return None if value is None else f"{value:.1f} %"


def main(argv: list[str]) -> None:
    run_analyses("localize", LocalizeConfig, argv, analyse, table)


if __name__ == "__main__":
    run_main(main)
