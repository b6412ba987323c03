"""Figures of the analyses, PNG and SVG, drawn from their JSON and array files alone: so they can be redrawn.

python -m evals.figures out/topolm [--control out/control]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals.common import need, read, read_arrays, results_folder
from evals.contrasts import SMOOTHED
from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.terminal import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, CONTROL, FLOOR = "#0072B2", "#D55E00", "0.55"  # Okabe and Ito's blue and vermilion: seen by everyone
MAP_COLOURS = "RdBu_r"
OUTLINE = "#1a1a1a"
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "topogpt",
}


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """Draw the figures of all analyses of a run again: python -m evals.figures RUN [--control RUN]."""

    run: str  # a run, an exported folder, or a name on the Hub that was analysed here
    control: str | None = None  # its control, drawn beside it
    results_dir: str | None = None  # folder of the results; None: evals/ inside the run or folder


class Result(NamedTuple):
    """What an analysis left of one model."""

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def label(self) -> str:
        return self.content["model"]["label"]

    @property
    def sheets(self) -> list[str]:
        return self.content["model"]["sheets"]

    @property
    def results(self) -> dict[str, Any]:
        return self.content["results"]


def load(folder: Path, name: str) -> Result:
    return Result(read(folder, name), read_arrays(folder, name))


def draw(name: str, folder: Path, control: Path | None = None) -> list[Path]:
    """Draw the figures of one analysis into its folder; beside the control's, if that is given."""
    if kind_of(name) not in DRAWN:
        return []
    need("matplotlib")
    import matplotlib

    results = [load(f, name) for f in (folder, control) if f is not None]
    paths = []
    with matplotlib.rc_context(STYLE):
        for stem, figure in DRAWN[kind_of(name)](results):
            figure.draw_without_rendering()  # finds the layout, once for both files
            figure.set_layout_engine("none")
            for kind in ("png", "svg"):
                paths.append(folder / f"{stem}.{kind}")
                figure.savefig(paths[-1], dpi=160, metadata={"Date": None} if kind == "svg" else {})
    return paths


def kind_of(name: str) -> str:
    """contrasts for contrasts-mine, which are those of mine.csv."""
    return name.partition("-")[0]


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- maps of all sheets --------------------------------------------------------------------------


class Maps(NamedTuple):
    """A map of every sheet of one model."""

    label: str
    sheets: list[str]
    values: np.ndarray  # (S, h, w)
    outlined: np.ndarray | None = None  # (S, h, w) bool


def draw_maps(rows: Sequence[Maps], title: str, unit: str, limit: float | None = None) -> "Figure":
    """Every sheet in one figure, on one symmetric scale: a column a layer, two rows (attn, mlp) each Maps."""
    h, w = rows[0].values.shape[1:]
    if limit is None:
        limit = float(np.quantile(np.abs(np.concatenate([m.values.ravel() for m in rows])), 0.995)) or 1.0
    branches = list(dict.fromkeys(sheet.rpartition(".")[2] for sheet in rows[0].sheets))
    n_layers = max(len(m.sheets) for m in rows) // len(branches)
    gap = max(1, round(h / 10))
    groups = [(m, b) for m in range(len(rows)) for b in range(len(branches))]
    tops = {(m, b): (m * len(branches) + b) * (h + gap) + m * 2 * gap for m, b in groups}
    mosaic = np.full((tops[groups[-1]] + h, n_layers * (w + gap) - gap), np.nan)
    scale = (0.9 if n_layers > 6 else 1.3) / w  # inches a unit
    figure = new_figure(scale * mosaic.shape[1] + 1.6, scale * mosaic.shape[0] + 0.6)
    axis = figure.subplots()
    axis.set_axis_off()
    for m, maps in enumerate(rows):
        for s, sheet in enumerate(maps.sheets):
            layer, branch = divmod(s, len(branches))
            top, left = tops[m, branch], layer * (w + gap)
            mosaic[top : top + h, left : left + w] = maps.values[s]
            if maps.outlined is not None:
                axis.plot(*outline(maps.outlined[s], top, left), color=OUTLINE, lw=0.5)
            if layer == 0:
                name = sheet.rpartition(".")[2]
                axis.text(-1.5, top + h / 2, name, rotation=90, ha="right", va="center")
            if m == branch == 0:
                axis.text(left + w / 2, -1.5, f"layer {layer}", ha="center", va="bottom")
        if len(rows) > 1:
            middle = (tops[m, 0] + tops[m, len(branches) - 1] + h) / 2
            axis.text(-1.5 - 0.2 / scale, middle, maps.label, rotation=90, ha="right", va="center")
    image = axis.imshow(mosaic, cmap=MAP_COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(xlim=(-1, mosaic.shape[1]), ylim=(mosaic.shape[0], -1))
    figure.suptitle(title, fontsize=9)
    bar = figure.colorbar(
        image, ax=axis, shrink=min(1.0, 1.6 / (scale * mosaic.shape[0])), extend="both", pad=0.01
    )
    bar.set_label(unit)
    return figure


def outline(mask: np.ndarray, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of lines around the cells of a mask (h, w) whose first cell lies at row top, column left."""
    padded = np.pad(mask.astype(bool), 1)
    below = np.argwhere(padded[:-1] != padded[1:])  # a line along the lower side of each of these cells
    right = np.argwhere(padded[:, :-1] != padded[:, 1:])
    starts = np.concatenate([below + (-0.5, -1.5), right + (-1.5, -0.5)])
    ends = np.concatenate([below + (-0.5, -0.5), right + (-0.5, -0.5)])
    rows, columns = (
        np.stack([starts[:, k], ends[:, k], np.full(len(starts), np.nan)], axis=1).ravel() + offset
        for k, offset in ((0, top), (1, left))
    )
    return columns, rows


# ---- curves and dots -----------------------------------------------------------------------------


def draw_moran(found: Sequence[Result], title: str) -> "Figure":
    """Moran's I of every sheet, by smoothing."""
    widths = list(found[0].results["moran"])
    figure = new_figure(2.4 * len(widths) + 0.8, 2.5)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, fwhm in zip(axes, widths, strict=True):
        for r, colour, marker in zip(found, (MODEL, CONTROL), "os", strict=False):
            values = [m["value"] for m in r.results["moran"][fwhm]["by_sheet"].values()]
            axis.plot(np.arange(len(values)), values, marker, ms=3.5, color=colour, label=r.label)
        band(axis.axhspan, next(iter(found[0].results["moran"][fwhm]["by_sheet"].values())))
        axis.set(title=smoothing(fwhm), xlabel="sheet (attn, mlp of each layer)", ylim=(-0.15, 1))
    axes[0].set_ylabel("Moran's I")
    legend(figure, axes)
    figure.suptitle(title, fontsize=9)
    return figure


def band(span: Callable[..., Any], moran: dict[str, float]) -> None:
    """The floor: what maps of white noise, smoothed in the same way, reach; +- 2 standard deviations."""
    low, high = (moran["floor"] + k * moran["floor_sd"] for k in (-2, 2))
    span(low, high, color=FLOOR, alpha=0.35, lw=0, label="no map: white noise")


def legend(figure: "Figure", axes: Sequence[Any]) -> None:
    """One legend for all axes, each label once."""
    found = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    figure.legend(found.values(), found, loc="outside right upper")


def draw_topography(found: Sequence[Result]) -> list[tuple[str, "Figure"]]:
    middle = found[0].arrays["maps"].shape[1] // 2
    token = found[0].results["tokens"][middle]
    maps = [Maps(r.label, r.sheets, standardised(r.arrays["maps"][:, middle])) for r in found]
    figure = new_figure(4.6, 2.8)
    axis = figure.subplots()
    for r, colour in zip(found, (MODEL, CONTROL), strict=False):
        curve = r.results["correlation_by_distance"]
        for values in curve["by_sheet"].values():
            axis.plot(curve["distance"], values, color=colour, lw=0.5, alpha=0.3)
        axis.plot(curve["distance"], curve["mean"], color=colour, lw=2, label=r.label)
    axis.axhline(0, color=FLOOR, lw=0.8)
    axis.set(xlabel="distance on the sheet (units)", ylabel="correlation of activations")
    axis.set_title("Do units that lie close fire together? Thin: one sheet; thick: mean")
    axis.legend()
    return [
        (
            "topography-maps",
            draw_maps(maps, f"One token, {token!r}, on every sheet", "activation (sd of its sheet)", 2.5),
        ),
        ("topography-moran", draw_moran(found, "Moran's I of single-token maps")),
        ("topography-distance", figure),
    ]


def standardised(maps: np.ndarray) -> np.ndarray:
    """Deviations from each map's mean in its standard deviations; a constant map is 0."""
    centred = maps - maps.mean(axis=(-2, -1), keepdims=True)
    sd = maps.std(axis=(-2, -1), keepdims=True)
    return np.divide(centred, sd, out=np.zeros_like(centred), where=sd > 0)


def draw_contrasts(found: Sequence[Result]) -> list[tuple[str, "Figure"]]:
    """Of each contrast the maps, raw and most smoothed; of all of them Moran's I."""
    figures, prefix = [], found[0].content["analysis"]
    for name, first in found[0].results["contrasts"].items():
        widths = sorted(first["moran"], key=float)
        rows = [
            Maps(
                f"{r.label}\n{smoothing(fwhm)}",
                r.sheets,
                r.arrays[f"t.{name}.{fwhm}"],
                r.arrays[f"significant.{name}.{fwhm}"] > 0,
            )
            for fwhm in dict.fromkeys([widths[0], widths[-1]])
            for r in found
        ]
        title = f"{first['what']}; outlined: significant (FDR over all units)"
        figures.append((f"{prefix}-{name}-maps", draw_maps(rows, title, "t (Welch)")))
    return [*figures, (f"{prefix}-moran", draw_moran_of_contrasts(found))]


def draw_moran_of_contrasts(found: Sequence[Result]) -> "Figure":
    """Moran's I of every sheet and contrast, model beside control, with floor and published means."""
    names = list(found[0].results["contrasts"])
    widths = list(found[0].results["contrasts"][names[0]]["moran"])
    figure = new_figure(2.6 * len(widths) + 1.6, 0.45 * len(names) + 1.3)
    axes = figure.subplots(1, len(widths), sharey=True, sharex=True, squeeze=False)[0]
    for axis, fwhm in zip(axes, widths, strict=True):
        for i, (r, colour) in enumerate(zip(found, (MODEL, CONTROL), strict=False)):
            for k, name in enumerate(names):
                values = [
                    m["value"] for m in r.results["contrasts"][name]["moran"][fwhm]["by_sheet"].values()
                ]
                height = k + 0.2 * (2 * i - len(found) + 1)
                axis.plot(values, [height] * len(values), "|", ms=6, color=colour, alpha=0.6)
                axis.plot(np.mean(values), height, "os"[i], ms=4, color=colour, label=r.label)
                published = r.results["contrasts"][name]["published"] or {}
                value = published.get(f"{('topo', 'control')[i]}_{SMOOTHED.get(fwhm)}")
                if value is not None:
                    label = ("TopoLM, published", "its control, published")[i]
                    axis.plot(value, height, "D", ms=5, mfc="none", color=colour, label=label)
        band(
            axis.axvspan,
            next(iter(found[0].results["contrasts"][names[0]]["moran"][fwhm]["by_sheet"].values())),
        )
        axis.set(title=smoothing(fwhm), xlabel="Moran's I", xlim=(-0.15, 1))
    what = [found[0].results["contrasts"][name]["what"] for name in names]
    axes[0].set_yticks(range(len(names)), what)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    legend(figure, axes)
    figure.suptitle("Moran's I of t-maps; a line: a sheet, the dot: their mean", fontsize=9)
    return figure


def smoothing(fwhm: str) -> str:
    return "raw" if float(fwhm) == 0 else f"FWHM {float(fwhm):g} mm"


def draw_localize(found: Sequence[Result]) -> list[tuple[str, "Figure"]]:
    maps = [Maps(r.label, r.sheets, r.arrays["t"], r.arrays["network"] > 0) for r in found]
    figures = [
        (
            "localize-maps",
            draw_maps(maps, "Sentences - nonwords; outlined: the language network", "t (Welch)"),
        ),
        ("localize-moran", draw_moran(found, "Moran's I of t-maps: sentences - nonwords")),
    ]
    if all(r.results["profiles"] for r in found):
        figure = new_figure(1.1 + 1.9 * len(found), 2.4)
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axis, r, colour in zip(axes, found, (MODEL, CONTROL), strict=False):
            values = r.results["profiles"]["network"]
            errors = [2 * (v["sem"] or 0) for v in values.values()]
            axis.bar(list(values), [v["mean"] for v in values.values()], yerr=errors, color=colour, capsize=2)
            axis.set_title(r.label)
        axes[0].set_ylabel("mean |activation| of the network")
        figure.suptitle("S sentences, W words, J jabberwocky, N nonwords (+- 2 SE over items)", fontsize=8)
        figures.append(("localize-profiles", figure))
    return figures


def draw_ablate(found: Sequence[Result]) -> list[tuple[str, "Figure"]]:
    """What lesions cost on held-out text, beside as many random units."""
    figure = new_figure(4.6, 2.8)
    axis = figure.subplots()
    for r, colour, marker in zip(found, (MODEL, CONTROL), "os", strict=False):
        none, lesions = r.results["no_lesion"]["cross_entropy"], r.results["lesions"]
        k = [lesion["k"] for lesion in lesions]
        axis.plot(
            k, [x["cross_entropy"] - none for x in lesions], marker, ls="-", color=colour, label=r.label
        )
        mean = [x["random"]["cross_entropy_mean"] - none for x in lesions]
        sd = [x["random"]["cross_entropy_sd"] or 0 for x in lesions]
        axis.errorbar(k, mean, sd, color=colour, ls=":", capsize=2, label=f"{r.label}, random units")
    axis.set(xscale="log", xlabel="lesioned units", ylabel="increase of cross-entropy (nats per token)")
    axis.axhline(0, color=FLOOR, lw=0.8)
    axis.set_title(f"Lesions of the units most selective for {found[0].results['what']}")
    if found[0].content["protocol"]["disc"]:
        axis.set_title(found[0].results["lesions"][0]["name"])
    axis.legend()
    return [("ablate", figure)]


DRAWN: dict[str, Callable[[Sequence[Result]], list[tuple[str, "Figure"]]]] = {
    "topography": draw_topography,
    "contrasts": draw_contrasts,
    "localize": draw_localize,
    "ablate": draw_ablate,
}


def main(argv: list[str]) -> None:
    cfg = parse(FiguresConfig, argv, prog="python -m evals.figures")
    folder = Path(cfg.results_dir) if cfg.results_dir else results_folder(cfg.run)
    control = results_folder(cfg.control) if cfg.control else None
    there = [path.stem for path in sorted(folder.glob("*.json")) if kind_of(path.stem) in DRAWN]
    if not there:
        raise UserError(
            f"{folder} holds no results to draw; make some, such as `python -m evals.topography {cfg.run}`"
        )
    for name in there:
        beside = control if control and (control / f"{name}.json").is_file() else None
        for path in draw(name, folder, beside):
            say(str(path))


if __name__ == "__main__":
    run_main(main)
