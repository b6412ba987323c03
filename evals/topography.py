"""Topography: is the sheet a map? Measures of every sheet on held-out text, each beside its floor.

    python -m evals.topography out/topolm --control out/control

Moran's I of single-token maps, raw and smoothed; correlation against distance, and the smoothness that
follows from it; size of clusters; wiring length; and the spatial loss over all neighbourhoods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np

from topogpt import drawing, topo
from topogpt.analysis import heldout, measures, plots
from topogpt.analysis.covariance import correlations_of
from topogpt.analysis.measures import smoothing, width
from topogpt.analysis.nulls import moran_of_sheets
from topogpt.analysis.reading import collect
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels, need
from topogpt.analysis.subject import MoranConfig, Subject, protocol_of
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.terminal import progress

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


def analyse(cfg: TopographyConfig, subject: Subject) -> Outcome:
    need("scipy")
    h, w = subject.grid
    text = heldout.read(subject, cfg.text, cfg.n_tokens, cfg.vocab_dir)
    found = collect(subject, text.tokens, cfg.n_maps)
    correlation = {sheet: correlations_of(c) for sheet, c in found.covariance.items()}
    curves = {sheet: measures.curve(r, h, w) for sheet, r in correlation.items()}
    distance = next(iter(curves.values())).distance
    by_sheet = dict(zip(subject.sheets, found.maps, strict=True))
    noise = np.random.default_rng(cfg.seed).standard_normal((cfg.permutations, h, w))
    moran = {}
    for fwhm in progress(cfg.fwhm_mm, f"{subject.label}: Moran's I"):
        smoothed = measures.smooth(found.maps, fwhm, cfg.unit_distance_mm)
        moran[str(fwhm)] = moran_of_sheets(cfg, subject.sheets, smoothed, fwhm)
    largest, mean = (partial(cluster_size, kind=kind) for kind in ("largest", "mean"))
    value = {sheet: c.value for sheet, c in curves.items()}
    results: dict[str, Any] = {
        "text": text.source,
        "n_tokens": text.tokens.size,
        "tokens": heldout.words_of(found.tokens, subject.model.cfg.vocab_size, cfg.vocab_dir, apart=True),
        "moran": moran,
        "spatial_loss": averaged(float, spatial_losses(subject, found.covariance), 0.5),
        "smoothness_correlation": averaged(measures.smoothness_correlation, curves),
        "smoothness_tdann": averaged(mean_smoothness, by_sheet, mean_smoothness(noise)),
        "wiring_length": averaged(lambda r: measures.wiring_length(r, h, w), correlation, 1.0),
        "largest_cluster": averaged(largest, by_sheet, largest(noise)),
        "mean_cluster": averaged(mean, by_sheet, mean(noise)),
        "correlation_by_distance": {"distance": distance, "mean": np.mean(list(value.values()), axis=0)}
        | {"by_sheet": value},
    }
    summary = {f"Moran's I, {width(k)}": m["mean"] for k, m in results["moran"].items()}
    summary |= {f"its floor, {width(k)}": m["floor"] for k, m in results["moran"].items()}
    summary |= {name: results[key]["mean"] for key, (name, _) in MEASURES.items()}
    data, arrays = {text.source: text.sha256}, {"maps": found.maps}
    return Outcome(protocol_of(cfg) | PROTOCOL, data, results, arrays, summary)


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


def averaged(
    measure: Callable[[Any], float], of: Mapping[str, Any], floor: float | None = None
) -> dict[str, Any]:
    """A measure of what there is of each sheet, and its mean."""
    by_sheet = {sheet: measure(x) for sheet, x in of.items()}
    mean = float(np.mean(list(by_sheet.values())))
    return {"mean": mean, **({} if floor is None else {"floor": floor}), "by_sheet": by_sheet}


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
    found = {}
    for sheet, c in covariance.items():
        near = torch.from_numpy(c[cells[:, :, None], cells[:, None, :]])
        found[sheet] = float(correlation_loss(near, target)[0].mean())
    return found


def mean_smoothness(grids: np.ndarray) -> float:
    chosen = np.linspace(0, len(grids) - 1, min(N_TDANN, len(grids))).round().astype(int)
    return float(np.mean([measures.smoothness_tdann(grids[i]) for i in chosen]))


def cluster_size(grids: np.ndarray, kind: Literal["largest", "mean"]) -> float:
    centred = grids - grids.mean(axis=(-2, -1), keepdims=True)
    sizes = measures.cluster_sizes(centred > grids.std(axis=(-2, -1), keepdims=True))
    return float(getattr(sizes, kind).mean())


# ---- what is shown -------------------------------------------------------------------------------

MORAN = (
    "Moran's I is the correlation of a map with itself one cell further, over the eight neighbours of "
    "every unit: 0 for no order, 1 for a perfectly smooth map. Smoothing raises it by itself, so it is "
    "read against its floor, the mean of white noise smoothed in the same way on the same grid."
)
SMOOTHED = "The same after a Gaussian readout of this width (FWHM), as a voxel samples neurons."
MEASURES = {  # name, and how to read it
    "spatial_loss": (
        "spatial loss per sheet",
        "How badly correlation falls off with distance, over all neighbourhoods: (1 - r) / 2 between the "
        "units' correlations and their inverse distances. 0.5: independent units; 0: a perfect map.",
    ),
    "smoothness_correlation": (
        "smoothness (correlation)",
        "Largest minus smallest mean correlation of pairs of units over their distance (TopoNets' measure, "
        "as we infer it). 0: distance says nothing.",
    ),
    "smoothness_tdann": (
        "smoothness (TDANN)",
        "How much more alike neighbours answer to a token than units far apart, (max - first) / max of the "
        "curve of differences over distance. 1: neighbours are alike; compare with the floor.",
    ),
    "wiring_length": (
        "wiring length",
        "Mean distance of a unit to the 20 it is most correlated with, over that of all pairs. 1: no map; "
        "the shorter, the more local.",
    ),
    "largest_cluster": (
        "largest cluster (units)",
        "Touching units more than one standard deviation above their sheet's mean, the largest such patch "
        "of a token's map. Compare with the floor.",
    ),
    "mean_cluster": ("mean cluster (units)", "The same, the mean over a map's patches."),
}


def section(found: Sequence[Result]) -> Section:
    first = found[0].results
    rows = [
        [f"Moran's I, {smoothing(k)}", *(r.results["moran"][k]["mean"] for r in found), moran["floor"]]
        for k, moran in first["moran"].items()
    ]
    rows += [
        [name, *(r.results[key]["mean"] for r in found), first[key].get("floor")]
        for key, (name, _) in MEASURES.items()
    ]
    said = [MORAN, *[SMOOTHED] * (len(first["moran"]) - 1), *(what for _, what in MEASURES.values())]
    title = f"On {first['n_tokens']:,} tokens of {first['text']}"
    table = Table(["mean over sheets", *labels(found), "floor: no map"], rows, title, said)
    question = (
        f"Is a sheet a map? Measured on {first['n_tokens']:,} tokens of held-out text, Moran's I and "
        "clusters on the maps of single tokens."
    )
    return Section("Topography", [question, table, by_sheet(found)], cards=cards(found))


def by_sheet(found: Sequence[Result]) -> Table:
    shown = {f"I, {smoothing(k)}": ("moran", k, "by_sheet") for k in found[0].results["moran"]}
    shown |= {"spatial loss": ("spatial_loss", "by_sheet"), "wiring length": ("wiring_length", "by_sheet")}
    head, rows = ["sheet"], [[sheet] for sheet in found[0].sheets]
    for name, keys in shown.items():
        for label, result in zip(labels(found, f": {name}"), found, strict=True):
            head.append(label)
            values = result.results
            for key in keys:
                values = values[key]
            for row in rows:
                value = values.get(row[0])
                row.append(Number(value["value"] if isinstance(value, dict) else value))
    return Table(head, rows, "Every sheet", folded=True)


def cards(found: Sequence[Result]) -> list[Card]:
    """Moran's I, raw and with the widest readout, and the spatial loss."""
    made, first = [], found[0].results["moran"]
    for fwhm in dict.fromkeys([next(iter(first)), list(first)[-1]]):
        values = [r.results["moran"][fwhm]["mean"] for r in found]
        what = f"single-token maps, {smoothing(fwhm)}"
        # maps of one text are not independent: as if each sheet had one
        reach = first[fwhm]["floor"] + 2 * first[fwhm]["floor_sd"] * found[0].arrays["maps"].shape[1] ** 0.5
        grey = "" if values[0] > reach else "White noise reaches it: no map."
        made.append(Card("Moran's I", what, values, {"no map": first[fwhm]["floor"]}, grey=grey))
    values = [r.results["spatial_loss"]["mean"] for r in found]
    return [*made, Card("Spatial loss", "per sheet, all neighbourhoods", values, {"independent": 0.5})]


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    middle = found[0].arrays["maps"].shape[1] // 2
    token = found[0].results["tokens"][middle]
    maps = [plots.maps_of(r, r.label, drawing.standardised(r.arrays["maps"][:, middle])) for r in found]
    title, unit = f"One token, {token!r}, on every sheet", "activation (sd of its sheet)"
    yield Drawing(
        "topography-maps",
        drawing.draw_sheets(maps, title, unit, drawing.LIMIT),
        "Activation of every unit at one held-out token, in standard deviations of its sheet "
        f"(dimensionless), cut at \u00b1 2.5. {plots.MAPS}",
    )
    yield Drawing(
        "topography-moran",
        plots.draw_moran(found, "Moran's I of single-token maps"),
        "Moran's I of single-token maps, mean over tokens, sheet by sheet (dimensionless), raw and after "
        f"Gaussian readouts. {plots.BAND}",
    )
    figure = drawing.new_figure(4.6, 2.8)
    axis = figure.subplots()
    for r, colour in zip(found, plots.COLOURS, strict=False):
        curve = r.results["correlation_by_distance"]
        for values in curve["by_sheet"].values():
            axis.plot(curve["distance"], values, color=colour, lw=0.5, alpha=0.3)
        axis.plot(curve["distance"], curve["mean"], color=colour, lw=2, label=r.label)
    axis.axhline(0, color=plots.FLOOR, lw=0.8)
    axis.set(xlabel="distance on the sheet (units)", ylabel="correlation of activations")
    axis.set_title("Do units that lie close fire together? Thin: one sheet; thick: mean")
    axis.legend()
    yield Drawing(
        "topography-distance",
        figure,
        "Pearson correlation of the activations of two units over all held-out tokens against their "
        "distance on the sheet (in units of the grid), mean over pairs. Thin lines are sheets, thick ones "
        "their mean; a map starts high and falls, independent units stay at 0.",
    )


ANALYSIS = Analysis(TopographyConfig, analyse, section, draw, order=10)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
