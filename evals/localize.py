"""The language network: units that answer more to sentences than to nonword strings, and what else to.

    python -m evals.localize out/topolm --control out/control
    python -m evals.localize out/topolm --top_percent 1 --pooling last --magnitude   # AlKhamissi et al. 2025

The localiser of Fedorenko et al. (2010) on TopoLM's protocol: a Welch t-test of each unit on 240 sentences
against 240 nonword strings, false discovery rate over all units of all sheets. The network is the units for
which sentences win; those for which nonwords win, which TopoLM's released mask holds too, are counted apart.
Its selectivity is checked on items that did not choose it, and its answers are measured on other sentences
(S), word lists (W), jabberwocky (J) and nonword lists (N).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topogpt import rng
from topogpt.analysis import measures, own_stimuli, plots, stimuli
from topogpt.analysis.activations import of_stimuli
from topogpt.analysis.contrast import chosen, clusters_of, t_maps
from topogpt.analysis.measures import smoothing, width
from topogpt.analysis.nulls import moran_of_sheets
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels, need
from topogpt.analysis.subject import MapConfig, Subject, protocol_of
from topogpt.drawing import draw_sheets, new_figure
from topogpt.errors import UserError, check_at_least, run_main

N_CLUSTERS = 12  # largest ones that are listed
PROFILE = {"S": "sentences", "W": "word lists", "J": "jabberwocky", "N": "nonword lists"}


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


def analyse(cfg: LocalizeConfig, subject: Subject) -> Outcome:
    need("scipy")
    items, others = stimuli_of(cfg)
    patterns = subject.on_grid(of_stimuli(cfg, subject, items))  # (S, n_items, h, w)
    patterns = np.abs(patterns) if cfg.magnitude else patterns
    a, b = patterns[:, items.where("S")], patterns[:, items.where("N")]
    found = t_maps(cfg, a, b, 0.0)
    network = chosen(found, cfg.top_percent)
    responses = np.abs(subject.on_grid(of_stimuli(cfg, subject, others)))
    regions, labels_of_units = clusters_of(network, cfg.smallest_cluster), np.zeros(network.shape, np.int16)
    for k, (s, mask) in enumerate(regions, start=1):
        labels_of_units[s][mask] = k
    answers = responses.swapaxes(0, 1)  # (n_items, S, h, w)

    def moran(fwhm: float) -> dict[str, Any]:
        return moran_of_sheets(cfg, subject.sheets, (t_maps(cfg, a, b, fwhm) if fwhm else found).t, fwhm)

    results: dict[str, Any] = {
        "n_units": network.size,
        "n_network": int(network.sum()),
        "network_percent": 100 * float(network.mean()),
        "n_reversed": int((found.significant & (found.t < 0)).sum()),
        "n_items": [a.shape[1], b.shape[1]],
        "by_sheet": {sheet: int(n) for sheet, n in zip(subject.sheets, network.sum((1, 2)), strict=True)},
        "held_out": held_out(cfg, a, b),
        "moran": {str(fwhm): moran(fwhm) for fwhm in cfg.fwhm_mm},
        "smoothness_tdann": dict(zip(subject.sheets, map(measures.smoothness_tdann, found.t), strict=True)),
        "profiles": {"network": profile(answers[:, network], others)} if network.any() else None,
        "clusters": [
            {"sheet": subject.sheets[s]} | described(mask, found.t[s], responses[s], others)
            for s, mask in regions
        ],
    }
    arrays = {"t": found.t.astype(np.float32), "network": network.astype(np.uint8)}
    arrays |= {"clusters": labels_of_units}
    data = {items.source: items.sha256, others.source: others.sha256}
    summary = {"units in the language network (%)": results["network_percent"]}
    summary |= {f"Moran's I of t, {width(k)}": m["mean"] for k, m in results["moran"].items()}
    summary = {stimuli.named(name, data): value for name, value in summary.items()}
    protocol = protocol_of(cfg) | {"test": "Welch t, sentences - nonwords"}
    return Outcome(protocol, data, results, arrays, summary)


def stimuli_of(cfg: LocalizeConfig) -> tuple[stimuli.Stimuli, stimuli.Stimuli]:
    """The localiser's items, and others."""
    folder, own = Path(cfg.stimuli_dir), own_stimuli.stand_in(cfg.stimuli_dir)
    where = Path(cfg.localizer or folder / "fedorenko2010_localizer")
    if own and cfg.localizer is None:
        items = own_stimuli.localizer()
    else:
        items = stimuli.localizer(where) if cfg.localizer is None or where.is_dir() else stimuli.read(where)
    path = Path(cfg.profiles or folder / "fedorenko_profiles.csv")
    others = own_stimuli.profiles() if own and cfg.profiles is None else stimuli.profiles(path)
    stimuli.check_groups(items, items.where("S"), items.where("N"), "S - N")
    for condition in PROFILE:
        if not others.where(condition).any():
            raise UserError(f"{others.source} has no items of {condition}; it has {stimuli.counted(others)}")
    return items, others


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
    network = chosen(here, cfg.top_percent)
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


def described(
    mask: np.ndarray, t: np.ndarray, responses: np.ndarray, others: stimuli.Stimuli
) -> dict[str, Any]:
    """Size, peak and answers of a cluster on a sheet of t-values (h, w)."""
    peak = np.unravel_index(np.where(mask, t, -np.inf).argmax(), mask.shape)
    answers = profile(responses[:, mask], others)
    found = {"size": int(mask.sum()), "peak_t": float(t[peak]), "row": int(peak[0]), "column": int(peak[1])}
    return found | {"response": {condition: answers[condition]["mean"] for condition in PROFILE}}


# ---- what is shown -------------------------------------------------------------------------------

HELD_OUT = {
    "significant_again_percent": ("chosen on half of the items, significant on the other half", 1, " %"),
    "same_sign_percent": ("chosen on one half, sentences win on the other", 1, " %"),
    "effect_size": ("effect size on the other half (Cohen's d)", 3, ""),
    "effect_size_outside": ("effect size there of units outside the network", 3, ""),
    "correlation_of_t": ("correlation of t between the halves", 3, ""),
}


def section(found: Sequence[Result]) -> Section:
    each = [r.results for r in found]
    rows = [
        ["units in the network", *(r["n_network"] for r in each)],
        ["share of all units", *(Number(r["network_percent"], 1, " %") for r in each)],
        ["units that prefer nonwords", *(r["n_reversed"] for r in each)],
        ["clusters", *(len(r["clusters"]) for r in each)],
        ["units in the largest", *(max((k["size"] for k in r["clusters"]), default=0) for r in each)],
        ["Held-out items"],
    ]
    for key, (name, digits, unit) in HELD_OUT.items():
        rows.append([name, *(Number(r["held_out"].get(key), digits, unit) for r in each)])
    rows.append(["Moran's I of t-maps"])
    for fwhm, moran in each[0]["moran"].items():
        values = [Number((r["moran"].get(fwhm) or {}).get("mean")) for r in each]
        rows.append([f"{smoothing(fwhm)} (floor {moran['floor']:.3f})", *values])
    beside = {"units": each[0]["n_network"], "of": each[0]["n_units"]}
    shares, data = [r["network_percent"] for r in each], found[0].content["data_sha256"]
    return Section(
        "Language network",
        [
            "The language network: units that answer more to sentences than to strings of nonwords "
            "(localiser of Fedorenko et al. 2010; Welch t-test, false discovery rate over all units). "
            "A selection looks selective on the items that chose it, so the middle rows choose on a "
            "random half of the items and look at the other half.",
            Table([stimuli.named("language network (S > N)", data), *labels(found)], rows),
            "What else the network answers to: mean |activation| of its units on other items, \u00b1 the "
            "standard error over items. Human language areas: sentences > word lists and jabberwocky > "
            "nonwords.",
            profiles(found),
            *(clusters(r) for r in found if r.results["clusters"]),
        ],
        [
            f"{r.label}: no cluster of the network is large enough to be listed."
            for r in found
            if not r.results["clusters"]
        ],
        [Card("Language network", stimuli.named("share of all units", data), shares, beside, 1, " %")],
    )


def profiles(found: Sequence[Result]) -> Table:
    def one(result: Result, condition: str) -> Number:
        value = ((result.results["profiles"] or {}).get("network") or {}).get(condition)
        return Number(None) if value is None else Number(value["mean"], 4, "", value["sem"])

    rows = [[f"{name} ({key})", *(one(r, key) for r in found)] for key, name in PROFILE.items()]
    return Table(["mean |activation| of the network", *labels(found)], rows)


def clusters(result: Result) -> Table:
    found = result.results["clusters"]
    rows: list[list[Any]] = []
    for k, c in enumerate(found[:N_CLUSTERS], start=1):
        answers = [Number(c["response"].get(condition), 4) for condition in PROFILE]
        place = f"{c['row']}, {c['column']}"
        rows.append([str(k), c["sheet"], c["size"], Number(c["peak_t"], 1), place, *answers])
    head = ["", "sheet", "units", "peak t", "row, column of the peak", *PROFILE]
    title = f"Clusters of {result.label}: touching units of the network, {len(rows)} largest of {len(found)}"
    return Table(head, rows, title, folded=True)


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    maps = [plots.maps_of(r, r.label, r.arrays["t"], r.arrays["network"] > 0) for r in found]
    title = stimuli.named("Sentences - nonwords", found[0].content["data_sha256"])
    yield Drawing(
        "localize-maps",
        draw_sheets(maps, f"{title}; outlined: the language network", "t (Welch)", least=plots.LEAST_T),
        "t-value of every unit, sentences minus nonwords (Welch, dimensionless). Outlined: the language "
        f"network. {plots.MAPS} {plots.OUTLINED}",
    )
    yield Drawing(
        "localize-moran",
        plots.draw_moran(found, f"Moran's I of t-maps: {title}"),
        f"Moran's I of the localiser's t-maps, sheet by sheet (dimensionless). {plots.BAND}",
    )
    if not all(r.results["profiles"] for r in found):
        return
    figure = new_figure(1.1 + 1.9 * len(found), 2.4)
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, r, colour in zip(axes, found, plots.COLOURS, strict=False):
        values = r.results["profiles"]["network"]
        errors = [2 * (v["sem"] or 0) for v in values.values()]
        axis.bar(list(values), [v["mean"] for v in values.values()], yerr=errors, color=colour, capsize=2)
        axis.set_title(r.label)
    axes[0].set_ylabel("mean |activation| of the network")
    figure.suptitle("S sentences, W words, J jabberwocky, N nonwords (+- 2 SE over items)", fontsize=8)
    yield Drawing(
        "localize-profiles",
        figure,
        "Mean |activation| of the network (in the model's own units) on items that did not choose it; bars "
        "are two standard errors over items.",
    )


ANALYSIS = Analysis(LocalizeConfig, analyse, section, draw, order=30)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
