"""The language network: units whose signed activation is higher to sentences than to nonword strings.

    python -m evals.localize out/topolm --control out/control
    python -m evals.localize out/topolm --top_percent 1 --pooling last --magnitude   # AlKhamissi et al. 2025

The localiser of Fedorenko et al. (2010) on TopoLM's protocol: a Welch t-test of each unit on 240 sentences
against 240 nonword strings, false discovery rate over all units of all sheets. The network is the units for
which sentences win; those for which nonwords win, which TopoLM's released mask holds too, are counted apart.
Its selectivity is checked on items that did not choose it, and its answers, mean |activation|, are measured
on other sentences (S), word lists (W), jabberwocky (J) and nonword lists (N). Strings of nonwords have twice
the tokens of sentences; --match_length reads as many first tokens of every item as the shortest has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt.analysis import contrast, measures, own_stimuli, plots, stimuli
from topogpt.analysis.activations import of_tokens, token_lists
from topogpt.analysis.contrast import chosen, clusters_of, t_maps
from topogpt.analysis.measures import smoothing
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels, need
from topogpt.analysis.shuffles import half_of
from topogpt.analysis.subject import MapConfig, Subject, protocol_of
from topogpt.drawing import draw_sheets, new_figure
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.terminal import progress

N_CLUSTERS = 12  # largest ones that are listed
WHAT = "sentences - nonwords"
PROFILE = {"S": "sentences", "W": "word lists", "J": "jabberwocky", "N": "nonword lists"}


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig(MapConfig):
    """Find the language network and its answers: python -m evals.localize RUN [--control RUN]."""

    localizer: str | None = None  # folder of the localiser's CSV files, or a CSV with item, condition (S, N)
    profiles: str | None = None  # CSV with sentence, condition (S, W, J, N); None for both: in stimuli_dir
    top_percent: float | None = None  # take this share of units, the most selective, whatever their p
    magnitude: bool = False  # test |activation| instead of activation
    match_length: bool = False  # pool over as many first tokens of every item as the shortest one has
    smallest_cluster: int = 10  # units; smaller ones are left out

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("smallest_cluster", self.smallest_cluster, 1)
        if self.top_percent is not None and not 0 < self.top_percent <= 100:
            raise UserError(f"top_percent = {self.top_percent} must be above 0 and at most 100")


def analyse(cfg: LocalizeConfig, subject: Subject) -> Outcome:
    need("scipy")
    items, others = stimuli_of(cfg)
    read, patterns, responses = patterns_of(cfg, subject, items, others)
    sides = [items.where(condition) for condition in "SN"]
    contrasted = contrast.items_of(items, patterns, *sides)
    a, b = contrasted.sides
    found = t_maps(cfg, a, b, 0.0)
    network = chosen(found, cfg.top_percent)
    regions, labels_of_units = clusters_of(network, cfg.smallest_cluster), np.zeros(network.shape, np.int16)
    for k, (s, mask) in enumerate(regions, start=1):
        labels_of_units[s][mask] = k
    answers = responses.swapaxes(0, 1)  # (n_items, S, h, w)
    widths = progress(cfg.fwhm_mm, f"{subject.label}: Moran's I")
    moran = {str(fwhm): contrast.mapped(cfg, subject.sheets, contrasted, fwhm).moran for fwhm in widths}
    apart = contrast.told_apart(items, read, sides)
    reversed_units = found.significant & (found.t < 0)
    results: dict[str, Any] = {
        "n_units": network.size,
        "n_network": int(network.sum()),
        "network_percent": 100 * float(network.mean()),
        "n_reversed": int(reversed_units.sum()),
        "significant_percent": 100 * float(found.significant.mean()),
        "n_items": apart["n"],
        "apart": apart,
        "by_sheet": {sheet: int(n) for sheet, n in zip(subject.sheets, network.sum((1, 2)), strict=True)},
        "held_out": held_out(cfg, contrasted),
        "again": contrast.again(cfg, contrasted),
        "moran": moran,
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
    percent = dict.fromkeys(moran, results["significant_percent"])
    summary = contrast.summary_of(stimuli.named(WHAT, data), apart["n"], moran, percent)
    if summary:
        said = {"value": results["network_percent"], "higher to nonwords": 100 * float(reversed_units.mean())}
        summary[stimuli.named("units of higher activation to sentences (%)", data)] = said
    protocol = protocol_of(cfg) | {"test": f"Welch t, {WHAT}"}
    return Outcome(protocol, data, results, arrays, summary)


class Read(NamedTuple):
    lengths: list[int]  # tokens of each item of the localiser that were read
    patterns: np.ndarray  # (S, n_items, h, w), what is tested
    responses: np.ndarray  # (S, n_others, h, w), |activation| to the other items


def patterns_of(cfg: LocalizeConfig, subject: Subject, *both: stimuli.Stimuli) -> Read:
    """Activations on the localiser's items and on others."""
    items, others = (token_lists(cfg, subject, found) for found in both)
    if cfg.match_length:
        shortest = min(map(len, items + others))
        items, others = ([tokens[:shortest] for tokens in lists] for lists in (items, others))
    on_items, on_others = (
        subject.on_grid(of_tokens(subject.model, lists, cfg.pooling, subject.sheets))
        for lists in (items, others)
    )
    patterns = np.abs(on_items) if cfg.magnitude else on_items
    return Read([len(tokens) for tokens in items], patterns, np.abs(on_others))


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


def held_out(cfg: LocalizeConfig, items: contrast.Items) -> dict[str, Any]:
    """Choose the network on a random half of the items, and look at it on the other half."""
    half = half_of(items.first, items.pairs, cfg.seed)
    groups = [items.patterns[:, side & of] for of in (half, ~half) for side in (items.first, ~items.first)]
    a1, b1, a2, b2 = groups
    if min(x.shape[1] for x in groups) < 2:
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
}


ABOUT = (
    "The language network: units whose signed activation is higher to sentences than to strings of "
    "nonwords (localiser of Fedorenko et al. 2010; Welch t-test, false discovery rate over all units). It "
    "says no more than that: a unit's sign is arbitrary in a language model, so about as many are higher "
    "to nonwords. A selection looks selective on the items that chose it, so the lower rows choose on a "
    "random half of the items and look at the other half."
)
ABOUT_NULLS = (
    "Is the map about sentences and nonwords? The same items with shuffled labels (mean \u00b1 standard "
    "deviation; p: share of shuffles that reach the value) show what the sheet does whatever the contrast,"
    " white noise what a sheet without a map does. Effect: of the tenth of all units with the largest |t| "
    "on half of the items; place: whether the t-values of all units repeat."
)
ABOUT_PROFILES = (
    "What else the network answers to: mean |activation| (not the signed one that chose it) of its units "
    "on other items, \u00b1 the standard error over items. Human language areas: sentences > word lists "
    "and jabberwocky > nonwords."
)
ITEMS = "What else tells the items apart"


def section(found: Sequence[Result]) -> Section:
    each = [r.results for r in found]
    rows = [
        ["units in the network (higher to sentences)", *(r["n_network"] for r in each)],
        ["share of all units", *(Number(r["network_percent"], 1, " %") for r in each)],
        ["units that are higher to nonwords", *(r["n_reversed"] for r in each)],
        ["share of all units", *(Number(100 * r["n_reversed"] / r["n_units"], 1, " %") for r in each)],
        ["clusters", *(len(r["clusters"]) for r in each)],
        ["units in the largest", *(max((k["size"] for k in r["clusters"]), default=0) for r in each)],
        ["Held-out items"],
    ]
    for key, (name, digits, unit) in HELD_OUT.items():
        rows.append([name, *(Number(r["held_out"].get(key), digits, unit) for r in each)])
    n = found[0].content["protocol"]["shuffles"]
    head = [name for r in labels(found) for name in (r, "labels shuffled", "p")]
    nulls = [
        [f"Moran's I of t, {smoothing(fwhm)}", *beside(each, fwhm), moran["floor"]]
        for fwhm, moran in each[0]["moran"].items()
    ]
    nulls += [[*row, None] for row in contrast.rows_of_again([r["again"] for r in each])]
    name = stimuli.named("language network (S > N)", found[0].content["data_sha256"])
    items = Table(contrast.APART_HEAD, [contrast.apart_row(WHAT, each[0]["apart"])], ITEMS)
    return Section(
        "Language network",
        [
            ABOUT,
            Table([name, *labels(found)], rows),
            ABOUT_NULLS,
            Table(["", *head, "white noise"], nulls, f"Beside {n} shuffles of the item labels"),
            items,
            ABOUT_PROFILES,
            profiles(found),
            *(clusters(r) for r in found if r.results["clusters"]),
        ],
        list(warnings_of(found)),
        cards(found),
    )


def beside(each: Sequence[dict[str, Any]], fwhm: str) -> list[Number]:
    """Moran's I of each model's t-map beside shuffled labels."""
    return [cell for r in each for cell in contrast.beside_cells(r["moran"].get(fwhm, {}).get("labels"))]


def warnings_of(found: Sequence[Result]) -> Iterator[str]:
    yield from contrast.warnings_of(WHAT, apart := found[0].results["apart"])
    if max(apart["tokens"]) > contrast.LONGER * min(apart["tokens"]):
        yield "--match_length reads as many tokens of each."
    for r in found:
        if not r.results["clusters"]:
            yield f"{r.label}: no cluster of the network is large enough to be listed."


def cards(found: Sequence[Result]) -> list[Card]:
    """Moran's I of the t-maps with the widest readout beside its shuffled labels, and the network's size."""
    first = found[0].results
    fwhm = max(first["moran"], key=float)
    morans = [r.results["moran"][fwhm] for r in found if fwhm in r.results["moran"]]
    made = contrast.card(morans, first["n_items"], first["significant_percent"])
    if made is None:
        return []
    shares = [r.results["network_percent"] for r in found]
    beside = {"higher to nonwords": 100 * first["n_reversed"] / first["n_units"]}
    what = stimuli.named("share of units higher to sentences", found[0].content["data_sha256"])
    network = Card("Language network", what, shares, beside, 1, " %")
    grey = "" if first["n_network"] else "No unit is significant."
    what = stimuli.named(WHAT, found[0].content["data_sha256"])
    return [made._replace(what=f"{what}, {smoothing(fwhm)}"), network._replace(grey=grey)]


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
