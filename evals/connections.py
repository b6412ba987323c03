"""Connections: where the surviving connections of a connectome are on the sheets, and how long they are.

    python -m evals.connections out/itp/generation-5            # what its pruning has left
    python -m evals.connections out/child --control out/random-child      # what runs were trained under
    python -m evals.connections out/child --connectome out/itp

Read off wirings (topogpt/model/connectome.py), never off weights, beside two nulls: random wirings with as
many connections in every matrix, and the same wiring with the units of its sheet shuffled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt import drawing, topo
from topogpt.analysis import measures
from topogpt.analysis.kinds import by_kind
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels
from topogpt.analysis.subject import EvalConfig, Subject, protocol_of
from topogpt.errors import UserError, check_at_least, run_main


@dataclass(frozen=True, kw_only=True)
class ConnectionsConfig(EvalConfig):
    """Map the surviving connections of a connectome: python -m evals.connections RUN [--control RUN]."""

    connectome: str | None = None  # None: what the run's pruning has left, else what it was trained under
    n_random: int = 20  # random wirings of equal sparsity
    n_shuffles: int = 500  # of the units of every sheet
    seed: int = 0  # of both

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("n_random", self.n_random, 2)
        check_at_least("n_shuffles", self.n_shuffles, 2)
        if self.control and self.connectome:
            raise UserError("connectome has no effect with control, as each run has its own; leave one out")


# ---- what is measured ----------------------------------------------------------------------------

MEASURES = {  # key -> what it is called, how it is read, and whether more or less of it is a map
    "shared": (
        "connections shared with neighbours",
        "Cosine of the connections of two units that are neighbours (8 of each), 1 if they are the same, "
        "mean over pairs. In a random wiring it is the share of connections that is left.",
        1,
    ),
    "moran": (
        "Moran's I of connections a unit",
        "Whether units with many connections lie together: 0 for no order, 1 for a smooth map.",
        1,
    ),
    "length": (
        "length of a connection",
        "Distance between the places of the two units it connects, sheets laid over each other and scaled to "
        "the unit square, mean over connections. Only where both ends have a place.",
        -1,
    ),
}


class Places(NamedTuple):
    """Where the units lie that a matrix connects: (n_units, 2), row and column."""

    outputs: np.ndarray
    inputs: np.ndarray | None  # None: heads of attention, which have no sheet


def places_of(subject: Subject) -> dict[str, Places]:
    """Of every matrix whose outputs are one sheet; what has no sheet of its own lies row by row.

    attn.c_attn puts out queries, keys and values, three sheets and not one: it is left out.
    """
    cfg, found = subject.model.cfg, {}
    own = dict(subject.positions)
    if topo.ONE_SHEET in own:  # a branch has rows of its own on it
        branches = own.pop(topo.ONE_SHEET).reshape(2 * cfg.n_layer, cfg.n_embd, 2)
        rows = branches - branches.min(axis=1, keepdims=True)
        own = dict(zip(topo.sheet_names(cfg.n_layer), rows, strict=True))

    def lie(sheet: str, n_units: int) -> np.ndarray:
        return own[sheet] if sheet in own else topo.positions("identity", n_units, 0, sheet)

    for i in range(cfg.n_layer):
        block, hidden = f"transformer.h.{i}", lie(f"layer.{i}.fc", cfg.n_hidden)
        found[f"{block}.attn.c_proj.weight"] = Places(lie(f"layer.{i}.attn", cfg.n_embd), None)
        found[f"{block}.mlp.c_fc.weight"] = Places(hidden, lie("stream", cfg.n_embd))
        found[f"{block}.mlp.c_proj.weight"] = Places(lie(f"layer.{i}.mlp", cfg.n_embd), hidden)
    return found


class Sheet:
    """Where a matrix connects: what is the same for every wiring of it."""

    def __init__(self, places: Places) -> None:
        self.grid = topo.grid_of(places.outputs)
        self.units = topo.units_by_cell(places.outputs)
        self.near = measures.edges(*self.grid, "queen")
        self.distances = None  # (inputs, cells)
        if places.inputs is not None:
            cells = topo.unit_square(places.outputs)[self.units]
            apart = np.linalg.norm(cells[:, None] - topo.unit_square(places.inputs), axis=-1)
            self.distances = apart.astype(np.float32).T


class Wired:
    """A wiring of one matrix: what is the same however its units lie is computed once."""

    def __init__(self, there: np.ndarray, sheet: Sheet) -> None:
        m = there.astype(np.float32)  # (out, in)
        self.sheet, self.degrees = sheet, m.sum(axis=1)
        scale = np.divide(1, np.sqrt(self.degrees), out=np.zeros_like(self.degrees), where=self.degrees > 0)
        unit = m * scale[:, None]
        self.cosines = unit @ unit.T
        # (units, cells): summed length of a unit's connections if it lay in a cell
        self.lengths = None if sheet.distances is None else m @ sheet.distances

    def map(self, units: np.ndarray | None = None) -> np.ndarray:
        """Connections of each unit, (h, w), with these units in the cells, row by row; None: as they lie."""
        return self.degrees[self.sheet.units if units is None else units].reshape(self.sheet.grid)

    def measure(self, units: np.ndarray | None = None) -> dict[str, float]:
        """MEASURES with these units in the cells, row by row; None: as they lie."""
        units = self.sheet.units if units is None else units
        near, moran = self.sheet.near, topo.morans_i(self.map(units))
        shared = self.cosines[units[near.i], units[near.j]].mean()
        found = {"shared": float(shared), "moran": float(np.nan_to_num(moran))}
        if self.lengths is not None:
            total = self.lengths[units, np.arange(len(units))].sum(dtype=float)
            found["length"] = float(total / max(self.degrees.sum(dtype=float), 1))
        return found


def analyse(cfg: ConnectionsConfig, subject: Subject) -> Outcome:
    from topogpt.model import connectome

    folder = wiring_folder(cfg, subject)
    grown = connectome.read(folder, subject.model.cfg)
    sheets = {name: Sheet(p) for name, p in places_of(subject).items() if name in grown.wiring}
    if not sheets:
        raise UserError(f"connectome = {folder} wires no matrix between sheets; grow one that exempts less")
    wiring = {name: grown.wiring[name] for name in sheets}
    wired = {name: Wired(wiring[name].numpy() != 0, sheet) for name, sheet in sheets.items()}
    values = {name: matrix.measure() for name, matrix in wired.items()}
    draws: dict[str, list[dict[str, dict[str, float]]]] = {"shuffled": [], "random": []}
    rng = np.random.default_rng(cfg.seed)
    for _ in range(cfg.n_shuffles):
        draws["shuffled"].append({n: w.measure(rng.permutation(w.sheet.units)) for n, w in wired.items()})
    for k in range(cfg.n_random):
        random = connectome.random_wiring(wiring, cfg.seed + k)
        draws["random"].append({n: Wired(random[n].numpy() != 0, s).measure() for n, s in sheets.items()})
    kinds = {kind: summed(names, values, draws) for kind, names in by_kind(sheets).items()}
    results = {
        "connectome": str(folder),
        "kept": connectome.Connectome(wiring).kept,
        "kinds": {short(kind): found for kind, found in kinds.items()},
        "by_matrix": {name: summed([name], values, draws) for name in sheets},
    }
    summary = {}
    for kind, found in results["kinds"].items():
        for key, (said, _, _) in MEASURES.items():
            if key in found:
                summary[f"{said}, {kind}"] = found[key]["value"]
                summary[f"the same, random wiring, {kind}"] = found[key]["random"]
    maps = {name: matrix.map() for name, matrix in wired.items()}
    data = {str(folder / connectome.FILE): grown.about["sha256"]}
    return Outcome(protocol_of(cfg) | PROTOCOL, data, results, maps, summary)


PROTOCOL = {
    "shared": "cosine of the connections (there or not) of units that are neighbours, mean over pairs",
    "length": "Euclidean, on sheets scaled to the unit square, mean over connections",
    "random": "random wirings with as many connections in every matrix",
    "shuffled": "the same wiring with the units of every sheet shuffled over it; p is one-sided",
}


def summed(
    names: Sequence[str], values: Mapping[str, dict[str, float]], draws: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, float]]:
    """Every measure, mean over matrices, beside the same mean of each null."""
    found = {}
    for key, sign in ((key, sign) for key, (_, _, sign) in MEASURES.items() if key in values[names[0]]):
        value = float(np.mean([values[name][key] for name in names]))
        found[key] = {"value": value}
        for null, each in draws.items():
            means = np.array([np.mean([draw[name][key] for name in names]) for draw in each])
            found[key] |= {null: float(means.mean()), f"{null}_sd": float(means.std())}
            found[key][f"p_{null}"] = float((1 + (sign * means >= sign * value).sum()) / (1 + len(means)))
    return found


def short(name: str) -> str:
    """mlp.c_fc of transformer.h.*.mlp.c_fc.weight, and h.3.mlp.c_fc of that of a layer."""
    return name.removeprefix("transformer.").removeprefix("h.*.").removesuffix(".weight")


def wiring_folder(cfg: ConnectionsConfig, subject: Subject) -> Path:
    from topogpt.model import connectome

    if cfg.connectome is not None:
        return Path(cfg.connectome)
    run = subject.checkpoint.resolve().parent.parent
    for folder in (run / "pruned", run):
        if (folder / connectome.RECORD).is_file():
            return folder
    raise UserError(
        f"{subject.label} was trained under no connectome and was not pruned; give --connectome out/NAME"
    )


# ---- what is shown -------------------------------------------------------------------------------


def section(found: Sequence[Result]) -> Section:
    first = found[0].results
    head, rows = ["matrix", "measure"], []
    for i, label in enumerate(labels(found)):
        head += [
            label,
            *(labels(found, about)[i] for about in (": random wiring", ": units shuffled", ": p")),
        ]
    for kind, of_kind in first["kinds"].items():
        for key in of_kind:
            rows.append([kind, MEASURES[key][0]])
            for r in found:
                one = r.results["kinds"].get(kind, {}).get(key, {})
                rows[-1] += [Number(one.get("value")), Number(one.get("random"), spread=one.get("random_sd"))]
                rows[-1] += [Number(one.get("shuffled"), spread=one.get("shuffled_sd"))]
                rows[-1].append(Number(one.get("p_shuffled")))
    said = [MEASURES[key][1] for of_kind in first["kinds"].values() for key in of_kind]
    left = ", ".join(f"{r.label} has {r.results['kept']:.1%} of them" for r in found)
    about = (
        "Which connections does pruning leave, seen on the sheets? Of the matrices whose outputs lie on a "
        f"sheet {left}. Each measure is a mean over layers, beside random wirings with as many connections "
        "in every matrix and beside the same wiring with the units of each sheet shuffled, to which p "
        "belongs. What differs from the first and not from the second is no map: some units merely have more "
        "connections."
    )
    table = Table(head, rows, "Surviving connections, mean over layers", said)
    return Section("Connections", [about, table, every_matrix(found)], cards=cards(found))


def every_matrix(found: Sequence[Result]) -> Table:
    head = ["matrix"]
    for said, _, _ in MEASURES.values():
        head += [label for about in ("", ", units shuffled") for label in labels(found, f": {said}{about}")]
    rows = []
    for name in found[0].results["by_matrix"]:
        rows.append([short(name)])
        for key in MEASURES:
            for part in ("value", "shuffled"):
                for r in found:
                    one = r.results["by_matrix"].get(name, {}).get(key, {})
                    rows[-1].append(Number(one.get(part)))
    return Table(head, rows, "Every matrix", folded=True)


def cards(found: Sequence[Result]) -> list[Card]:
    """Of the kind that was named second: c_fc, on which the losses on weights act, if it is there."""
    kinds = list(found[0].results["kinds"])
    kind = kinds[min(1, len(kinds) - 1)]
    shared = found[0].results["kinds"][kind]["shared"]
    values = [r.results["kinds"].get(kind, {}).get("shared", {}).get("value") for r in found]
    beside = {"random wiring": shared["random"], "units shuffled": shared["shuffled"]}
    return [Card("Connections shared with neighbours", f"{kind}, mean over layers", values, beside)]


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    kinds = by_kind(found[0].results["by_matrix"])
    columns = max(map(len, kinds.values()))
    figure = drawing.new_figure(1.25 * columns + 1.2, 1.35 * len(kinds) * len(found) + 0.4)
    axes = figure.subplots(len(kinds) * len(found), columns, squeeze=False)
    for row, (r, kind) in enumerate((r, kind) for r in found for kind in kinds):
        names = kinds[kind]
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, name in zip(axes[row], names, strict=False):
            grid = r.arrays[name] / max(r.arrays[name].mean(), 1)
            image = axis.imshow(grid, cmap=drawing.colours(), vmin=0.5, vmax=1.5, interpolation="nearest")
            if row == 0:
                axis.set_title(f"layer {names.index(name)}")
        axes[row][0].set_ylabel(f"{r.label}\n{short(kind)}" if len(found) > 1 else short(kind))
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.6, pad=0.01)
    bar.set_label("connections of a unit, over their mean")
    figure.suptitle("Where the surviving connections are", fontsize=9)
    yield Drawing(
        "connections",
        figure,
        "Number of surviving connections of every unit, divided by the mean of its sheet (dimensionless). "
        "One cell is one unit: an output of the matrix at the left.",
    )


ANALYSIS = Analysis(ConnectionsConfig, analyse, section, draw, order=37, by_hand=True)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
