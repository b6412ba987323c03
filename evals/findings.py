"""What the report says of each analysis: its tables, how to read them, and the captions of its figures.

    python -m evals.report out/topolm --control out/control         # writes the page they are on

Every function takes the JSON of the model, then of its control if there is one, and the folder of figures.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evals.contrasts import SMOOTHED
from evals.page import Html, folded, join, models_head, number, paragraph, picture, swatch, table, tag

Contents = Sequence[dict[str, Any]]
MORAN = (
    "Moran's I is the correlation of a map with itself one cell further, over the eight neighbours of "
    "every unit: 0 for no order, 1 for a perfectly smooth map. Smoothing raises it by itself, so it is "
    "read against its floor, the mean of white noise smoothed in the same way on the same grid."
)
MAPS = "One cell is one unit; a column is a layer, its rows are the outputs of attention and MLP."
BAND = "The grey band is the floor, white noise smoothed in the same way, \u00b1 2 standard deviations."


def labels(contents: Contents) -> list[str]:
    return [c["model"]["label"] for c in contents]


def mean_of(contents: Contents, *keys: str) -> list[Any]:
    """A measure's mean over sheets, of each model."""
    found = []
    for content in contents:
        value = content["results"]
        for key in keys:
            value = (value or {}).get(key)
        found.append(number((value or {}).get("mean")))
    return found


def smoothing(fwhm: str) -> str:
    return "raw" if float(fwhm) == 0 else f"{float(fwhm):g} mm"


# ---- topography ----------------------------------------------------------------------------------


MEASURES = {
    "spatial_loss": (
        "spatial loss per sheet",
        "How badly correlation falls off with distance, over all neighbourhoods: (1 - r) / 2 between the "
        "units' correlations and their inverse distances. 0.5: independent units; 0: a perfect map.",
    ),
    "smoothness_correlation": (
        "smoothness, correlation",
        "Largest minus smallest mean correlation of pairs of units over their distance (TopoNets' measure, "
        "as we infer it). 0: distance says nothing.",
    ),
    "smoothness_tdann": (
        "smoothness, TDANN",
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


def topography(contents: Contents, folder: Path) -> Html:
    first = contents[0]["results"]
    rows = [
        [
            f"Moran's I of single-token maps, {smoothing(fwhm)}",
            *mean_of(contents, "moran", fwhm),
            number(moran["floor"]),
            MORAN
            if i == 0
            else "The same after a Gaussian readout of this width (FWHM), as a voxel samples neurons.",
        ]
        for i, (fwhm, moran) in enumerate(first["moran"].items())
    ]
    rows += [
        [name, *mean_of(contents, key), number(first[key].get("floor")), what]
        for key, (name, what) in MEASURES.items()
        if key in first
    ]
    head = [
        "mean over sheets",
        *models_head(labels(contents)),
        "floor: no map",
        "what it is, and how to read it",
    ]
    return join(
        [
            paragraph(
                "Is a sheet a map? Measured on ",
                f"{first['n_tokens']:,} tokens of held-out text."
                if "n_tokens" in first
                else "held-out text.",
            ),
            table(head, rows, "explained"),
            figures(pictures(folder, "topography").values()),
            folded("Every sheet", by_sheet(contents)),
        ]
    )


def by_sheet(contents: Contents) -> Html:
    widths = list(contents[0]["results"]["moran"])
    shown = [*((f"I, {smoothing(w)}", ("moran", w)) for w in widths), ("spatial loss", ("spatial_loss",))]
    shown += [("wiring length", ("wiring_length",))]
    names = labels(contents)
    rows = []
    for sheet in contents[0]["model"]["sheets"]:
        row: list[Any] = [sheet]
        for content in contents:
            for _, keys in shown:
                found = content["results"][keys[0]]
                value = (found[keys[1]] if keys[1:] else found)["by_sheet"].get(sheet)
                row.append(number(value["value"] if isinstance(value, dict) else value))
        rows.append(row)
    head = ["sheet", *(f"{label}: {name}" for label in names for name, _ in shown)]
    return table(head, rows)


# ---- contrasts -----------------------------------------------------------------------------------


def contrasts(contents: Contents, folder: Path) -> Html:
    rows: list[list[Any]] = []
    for name, first in contents[0]["results"]["contrasts"].items():
        both = [c["results"]["contrasts"].get(name) for c in contents]
        rows.append([f"{first['what']} ({first['n'][0]} and {first['n'][1]} items)"])
        for fwhm, moran in first["moran"].items():
            published = first["published"] or {}
            rows.append(
                [
                    smoothing(fwhm),
                    *(number(c and c["moran"][fwhm]["mean"]) for c in both),
                    number(moran["floor"]),
                    *(number(published.get(f"{who}_{SMOOTHED.get(fwhm)}")) for who in ("topo", "control")),
                    *(number(c and c["significant_percent"][fwhm], 1, " %") for c in both),
                ]
            )
    names = models_head(labels(contents))
    head = ["readout (FWHM)", *(join([n, ": I"]) for n in names), "floor", "TopoLM", "its control"]
    head += [join([n, ": significant"]) for n in names]
    parts = [
        paragraph(
            "Which units answer more to one kind of item than to another, and do they lie together? Of "
            "every unit a Welch t-test, the first kind minus the second; then Moran's I of the map of "
            "t-values (mean over sheets), to be read against the floor of white noise that was smoothed in "
            "the same way. Significant: share of units whose p survives the false discovery rate over all "
            "units of all sheets. TopoLM and its control: from its released files (Rathi et al. 2025), "
            "whose values without smoothing are most likely of a readout of 1 mm."
        ),
        table(head, rows),
    ]
    analysis = contents[0]["analysis"]
    drawn = pictures(folder, analysis)
    maps = {name: drawn.pop(f"{analysis}-{name}-maps", None) for name in contents[0]["results"]["contrasts"]}
    parts.append(figures(drawn.values()))
    for i, (name, path) in enumerate(maps.items()):
        if path is not None:
            title = f"Maps: {contents[0]['results']['contrasts'][name]['what']}"
            parts.append(folded(title, figures([path]), opened=i == 0))
    return join(parts)


# ---- localiser -----------------------------------------------------------------------------------


N_CLUSTERS = 12  # largest ones in the table
CONDITIONS = {"S": "sentences", "W": "word lists", "J": "jabberwocky", "N": "nonword lists"}


def localize(contents: Contents, folder: Path) -> Html:
    found = [c["results"] for c in contents]
    held_out = {
        "significant_again_percent": ("chosen on half of the items, significant on the other half", 1, " %"),
        "same_sign_percent": ("chosen on one half, sentences win on the other", 1, " %"),
        "effect_size": ("effect size on the other half (Cohen's d)", 3, ""),
        "effect_size_outside": ("effect size there of units outside the network", 3, ""),
        "correlation_of_t": ("correlation of t between the halves", 3, ""),
    }
    rows = [
        ["units in the network", *(number(r["n_network"]) for r in found)],
        ["share of all units", *(number(r["network_percent"], 1, " %") for r in found)],
        ["units that prefer nonwords", *(number(r["n_reversed"]) for r in found)],
        ["Held-out items"],
        *(
            [name, *(number(r["held_out"].get(key), digits, unit) for r in found)]
            for key, (name, digits, unit) in held_out.items()
        ),
        ["Moran's I of t-maps"],
        *(
            [
                join([smoothing(fwhm), " (floor ", number(moran["floor"]), ")"]),
                *mean_of(contents, "moran", fwhm),
            ]
            for fwhm, moran in found[0]["moran"].items()
        ),
    ]
    names = labels(contents)
    return join(
        [
            paragraph(
                "The language network: units that answer more to sentences than to strings of nonwords "
                "(localiser of Fedorenko et al. 2010; Welch t-test, false discovery rate over all units). "
                "A selection looks selective on the items that chose it, so the middle rows choose on a "
                "random half of the items and look at the other half."
            ),
            table(["", *models_head(names)], rows),
            paragraph(
                "What else the network answers to: mean |activation| of its units on other items, \u00b1 the "
                "standard error over items. Human language areas: sentences > word lists and jabberwocky > "
                "nonwords."
            ),
            profiles(found, names),
            figures(pictures(folder, "localize").values()),
            *(clusters(r, name, i) for i, (r, name) in enumerate(zip(found, names, strict=True))),
        ]
    )


def profiles(found: Sequence[dict[str, Any]], names: Sequence[str]) -> Html:
    def one(results: dict[str, Any], condition: str) -> Any:
        value = ((results["profiles"] or {}).get("network") or {}).get(condition)
        if value is None:
            return number(None)
        spread = "" if value["sem"] is None else f" &plusmn; {value['sem']:.4f}"
        return number(value["mean"], 4, spread)

    rows = [[f"{name} ({key})", *(one(r, key) for r in found)] for key, name in CONDITIONS.items()]
    return table(["mean |activation| of the network", *models_head(names)], rows)


def clusters(results: dict[str, Any], name: str, model: int) -> Html:
    found = results["clusters"]
    if not found:
        return tag("p", f"{name}: no cluster of the network is large enough to be listed.", cls="note")
    rows = [
        [
            str(k),
            c["sheet"],
            number(c["size"]),
            number(c["peak_t"], 1),
            f"{c['row']}, {c['column']}",
            *(number(c["response"].get(condition), 4) for condition in CONDITIONS),
        ]
        for k, c in enumerate(found[:N_CLUSTERS], start=1)
    ]
    head = ["", "sheet", "units", "peak t", "row, column of the peak", *CONDITIONS]
    title = f"Clusters of {name}: touching units of the network, {len(rows)} largest of {len(found)}"
    return folded(title, table(head, rows))


# ---- ablation ------------------------------------------------------------------------------------


def ablate(contents: Contents, folder: Path) -> Html:
    rows: list[list[Any]] = []
    for i, content in enumerate(contents):
        found = content["results"]
        none = found["no_lesion"]["cross_entropy"]
        rows.append(
            [join([swatch(i), f"{content['model']['label']}: {none:.3f} nats per token without a lesion"])]
        )
        rows += [lesion_row(found, lesion) for lesion in found["lesions"]]
    first, second = contents[0]["results"]["what"].split(" - ")
    head = ["lesion", "units", "text, +nats", "random units", f"items {first}", f"items {second}"]
    head += ["significant units left"]
    return join(
        [
            paragraph(
                "What is lost with units that add nothing to the residual stream any more? Increase of "
                "cross-entropy (nats per token) on held-out text, beside as many random units (\u00b1 "
                "standard deviation over draws), and on the items of either condition. Units that matter "
                "for more than their number cost more than random ones. Last: share of the remaining units "
                "in which the contrast is still significant."
            ),
            table(head, rows),
            figures(pictures(folder, "ablate").values()),
        ]
    )


def lesion_row(found: dict[str, Any], lesion: dict[str, Any]) -> list[Any]:
    none, random = found["no_lesion"], lesion["random"]
    spread = random["cross_entropy_sd"]
    return [
        lesion["name"],
        number(lesion["k"]),
        number(lesion["cross_entropy"] - none["cross_entropy"]),
        number(
            random["cross_entropy_mean"] - none["cross_entropy"],
            3,
            "" if spread is None else f" &plusmn; {spread:.3f}",
        ),
        *(number(lesion["conditions"][c] - none["conditions"][c]) for c in found["conditions"]),
        number(lesion["contrast"]["significant_percent"], 1, " %"),
    ]


# ---- figures -------------------------------------------------------------------------------------


CAPTIONS = {  # pattern of the file's name -> what it shows
    "topography-maps": (
        "Activation of every unit at one held-out token, in standard deviations of its sheet "
        f"(dimensionless), cut at \u00b1 2.5. {MAPS}"
    ),
    "topography-moran": (
        "Moran's I of single-token maps, mean over tokens, sheet by sheet (dimensionless), raw and after "
        f"Gaussian readouts. {BAND}"
    ),
    "topography-distance": (
        "Pearson correlation of the activations of two units over all held-out tokens against their "
        "distance on the sheet (in units of the grid), mean over pairs. Thin lines are sheets, thick ones "
        "their mean; a map starts high and falls, independent units stay at 0."
    ),
    "contrasts-*-maps": (
        "t-value of every unit for the contrast in the title (Welch, dimensionless; its first kind of item "
        "is positive), raw and with the widest readout. Outlined: significant at the false discovery rate "
        f"over all units of all sheets. {MAPS}"
    ),
    "contrasts*-moran": (
        "Moran's I of the t-maps of every contrast (dimensionless), by readout: a line is a sheet, a dot the "
        f"mean over sheets, an open diamond a published mean. {BAND}"
    ),
    "localize-maps": (
        "t-value of every unit, sentences minus nonwords (Welch, dimensionless). Outlined: the language "
        f"network. {MAPS}"
    ),
    "localize-moran": f"Moran's I of the localiser's t-maps, sheet by sheet (dimensionless). {BAND}",
    "localize-profiles": (
        "Mean |activation| of the network (in the model's own units) on items that did not choose it; bars "
        "are two standard errors over items."
    ),
    "ablate": (
        "Increase of cross-entropy on held-out text (nats per token) against the number of lesioned units: "
        "the most selective ones, and dotted as many random ones (mean and standard deviation over draws)."
    ),
}


def pictures(folder: Path, analysis: str) -> dict[str, Path]:
    """The figures of an analysis that are as new as its results, by name, maps first."""
    written = (folder / f"{analysis}.json").stat().st_mtime
    others = tuple(f"{path.stem}-" for path in folder.glob(f"{analysis}-*.json"))  # of the user's own stimuli
    paths = [path for path in folder.glob(f"{analysis}*.png") if path.stat().st_mtime >= written]
    paths = [path for path in paths if not path.stem.startswith(others)]
    return {p.stem: p for p in sorted(paths, key=lambda path: (not path.stem.endswith("-maps"), path.stem))}


def figures(paths: Iterable[Path]) -> Html:
    """Pictures beside each other as far as there is room, each with its caption."""
    drawn = [picture(path, caption_of(path.stem)) for path in paths]
    return tag("div", *drawn, cls="figures") if drawn else Html("")


def caption_of(name: str) -> str:
    found = [text for pattern, text in CAPTIONS.items() if fnmatch(name, pattern)]
    return found[0] if found else f"{name}.png, as evals/figures.py drew it."


FINDINGS: dict[str, tuple[str, Callable[[Contents, Path], Html]]] = {
    "topography": ("Topography", topography),
    "contrasts": ("Contrasts", contrasts),
    "localize": ("Language network", localize),
    "ablate": ("Ablation", ablate),
}
