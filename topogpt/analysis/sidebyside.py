"""What is shown of runs side by side: one table, its markdown, CSV and JSON, and gap against Moran's I."""

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from topogpt import drawing
from topogpt.analysis import plots
from topogpt.analysis.comparison import Comparison, Member, Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, seen by everyone; black is the first, the control's
COLOURS = ["#000000", *"#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #56B4E9 #F0E442".split()]
MARKERS = "os^D"
LAYOUTS = {"per_branch": "branch", "c_fc": "c_fc", "one_sheet": "one"}  # names in columns
SHEETS = {
    "I branch": "outputs of the branches",
    "I c_fc": "outputs of mlp.c_fc",
    "I one": "one for all branches",
}
# What the first word of a column says of its null, in the order of the table.
NULLS = {"I": "white noise", "smooth": "at random", "dim": "units shuffled", "loss": "whole model"}


class Value(NamedTuple):
    value: float
    null: float | None  # what it is read against


Numbers = dict[str, Value]  # by column


# ---- numbers ---------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Of values over seeds."""

    n: int
    mean: float | None  # None of no values
    sd: float | None  # with n - 1; None of fewer than two
    half_width: float | None  # of the 95 % t interval of the mean; None of fewer than three


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and t interval; two values allow no interval worth showing."""
    n = len(values)
    if n == 0:
        return Spread(0, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(1, mean, None, None)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    if n == 2:
        return Spread(2, mean, sd, None)
    from scipy import special

    return Spread(n, mean, sd, float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n))


# ---- the table -------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """All there is to show."""

    comparison: Comparison
    numbers: dict[str, Numbers]  # source of a run -> its numbers
    columns: list[str]  # of them, in the order of the table
    protocol: dict[str, Any]  # how they were measured
    origins: dict[str, dict[str, Any]]  # source of a run -> hash of its weights, code that measured it


def beside(found: Found, m: Member, column: str) -> Value | None:
    """A number of a run and what the table shows beside it: of dimensionality, the control's."""
    at = found.numbers[m.source].get(column)
    if at is None or not column.startswith("dim "):
        return at
    control = found.comparison.controls.get(m.source)
    of_control = found.numbers[control.source].get(column) if control else None
    return Value(at.value, of_control.value if of_control else None)


def gap(found: Found, m: Member) -> float | None:
    """Validation loss above the control's, nats."""
    control = found.comparison.controls.get(m.source)
    return m.cross_entropy - control.cross_entropy if control else None


def paired(found: Found, members: Sequence[Member], column: str) -> Spread:
    """Differences of a number to that of each run's own control."""
    values = []
    for m in members:
        control = found.comparison.controls.get(m.source)
        both = [found.numbers[x.source].get(column) for x in (m, control) if x]
        if control and None not in both:
            values.append(both[0].value - both[1].value)
    return spread(values)


def in_order(columns: Sequence[str]) -> list[str]:
    """Columns of a table: I, smooth, dim, loss; each as it was measured."""
    return sorted(columns, key=lambda column: list(NULLS).index(column.split()[0]))


def head_of(found: Found) -> list[str]:
    """The table's head; dim c_fc of dim transformer.h.*.mlp.c_fc."""
    short = [f"dim {c.rpartition('.')[2]}" if c.startswith("dim ") else c for c in found.columns]
    return ["", "loss", "gap", *short]


def rows_of(found: Found) -> list[list[str]]:
    """A heading for every objective, and below it its seeds, mean, spread and differences to the control."""
    rows = []
    for label, members in found.comparison.objectives:
        rows.append([label])
        for m in members:
            cells = [shown(beside(found, m, c), digits(c)) for c in found.columns]
            rows.append([f"  seed {m.seed}", f"{m.cross_entropy:.4f}", signed(gap(found, m), 4), *cells])
        if len(members) > 1:
            rows += over_seeds(found, members)
        rows += over_pairs(found, members)
    return rows


def over_seeds(found: Found, members: Sequence[Member]) -> list[list[str]]:
    """Mean and standard deviation of every column."""
    losses, gaps = spread([m.cross_entropy for m in members]), gaps_of(found, members)
    mean = ["  mean", fixed(losses.mean, 4), signed(gaps.mean, 4)]
    sd = ["  sd", fixed(losses.sd, 4), fixed(gaps.sd, 4)]
    for column in found.columns:
        values = [v for m in members if (v := beside(found, m, column)) is not None]
        of, null = spread([v.value for v in values]), [v.null for v in values if v.null is not None]
        both = None if of.mean is None else Value(of.mean, spread(null).mean)
        mean.append(shown(both, digits(column)))
        sd.append(fixed(of.sd, digits(column)))
    return [mean, sd]


def over_pairs(found: Found, members: Sequence[Member]) -> list[list[str]]:
    """Differences to the control of the same seed: their mean, and from two seeds on their spread."""
    gaps = gaps_of(found, members)
    if not gaps.n:
        return []
    differences = [paired(found, members, column) for column in found.columns]
    rows = []
    for name, key in (("  - control", "mean"), ("    sd", "sd"), ("    +- 95 %", "half_width")):
        show = signed if key == "mean" else fixed
        cells = [show(getattr(d, key), digits(c)) for d, c in zip(differences, found.columns, strict=True)]
        rows.append([name, show(getattr(gaps, key), 4), "", *cells])
    return rows[: min(gaps.n, 3)]


def gaps_of(found: Found, members: Sequence[Member]) -> Spread:
    return spread([g for m in members if (g := gap(found, m)) is not None])


def digits(column: str) -> int:
    return 1 if column.startswith("dim ") else 3


def fixed(value: float | None, places: int) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{round(value, places) + 0.0:.{places}f}"


def signed(value: float | None, places: int) -> str:
    return f"{round(value, places) + 0.0:+.{places}f}" if value is not None and np.isfinite(value) else "-"


def shown(value: Value | None, places: int) -> str:
    """0.412 (0.150): a number, and in brackets what it is read against."""
    if value is None:
        return "-"
    return fixed(value.value, places) + ("" if value.null is None else f" ({fixed(value.null, places)})")


def notes(found: Found) -> list[str]:
    """How to read the table."""
    tokens = found.comparison.objectives[0].members[0].val_tokens
    rest = found.protocol["n_tokens"]
    return [
        f"loss: nats per token on {tokens:,} validation tokens; what is right of gap: on the first {rest:,}.",
        "gap, - control: against the control of the same seed, in pairs; sd: over seeds; +- 95 %: t interval",
        "In brackets, of I: white noise on that grid; of smooth: the same units laid at random; of dim: the "
        "control; of the loss with a share of c_fc's units kept: the whole model on the same tokens.",
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as markdown; an objective is a bold line."""
    empty = [""] * (len(head) - 1)
    lines = [head, ["---", *["---:"] * len(empty)]]
    lines += [[row[0].strip(), *row[1:]] if len(row) > 1 else [f"**{row[0]}**", *empty] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- files -----------------------------------------------------------------------------------------------


def content_of(found: Found) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "protocol": found.protocol,
        "runs": [run | found.origins[run["run"]] for run in records_of(found)],
        "objectives": [summary_of(found, o.label, o.members) for o in found.comparison.objectives],
        "warnings": found.comparison.warnings,
    }


def csv_of(found: Found) -> str:
    """A line for each run."""
    lines, file = records_of(found), io.StringIO()
    keys = dict.fromkeys(key for line in lines for key in line)
    sheet = csv.DictWriter(file, list(keys), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(lines)
    return file.getvalue()


def records_of(found: Found) -> list[dict[str, Any]]:
    return [record_of(found, o.label, m) for o in found.comparison.objectives for m in o.members]


def record_of(found: Found, objective: str, m: Member) -> dict[str, Any]:
    """A run as a line of the CSV."""
    control = found.comparison.controls.get(m.source)
    record = {"run": m.source, "objective": objective, "seed": m.seed, "step": m.step}
    record |= {"control": control.source if control else None, "loss": m.cross_entropy, "gap": gap(found, m)}
    for column, v in found.numbers[m.source].items():
        record |= {column: v.value, f"{column}: {NULLS[column.split()[0]]}": v.null}
    return record


def summary_of(found: Found, label: str, members: Sequence[Member]) -> dict[str, Any]:
    """An objective's numbers over its seeds, and their differences to the controls."""
    losses = spread([m.cross_entropy for m in members])
    columns = {"loss": {"over_seeds": losses, "minus_control": gaps_of(found, members)}}
    for column in found.columns:
        values = [found.numbers[m.source][column].value for m in members if column in found.numbers[m.source]]
        columns[column] = {"over_seeds": spread(values), "minus_control": paired(found, members, column)}
    said = {c: {key: s._asdict() for key, s in both.items()} for c, both in columns.items()}
    return {"objective": label, "seeds": [m.seed for m in members], "columns": said}


def draw(found: Found) -> "Figure":
    """Gap against Moran's I, a panel for each kind of sheets: a point a seed, a colour an objective."""
    import matplotlib

    columns = [c for c in found.columns if c.startswith("I ")]
    with matplotlib.rc_context(plots.STYLE):
        figure = drawing.new_figure(2.6 * len(columns) + 2.0, 2.8)
        axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axis, column in zip(axes, columns, strict=True):
            for i, objective in enumerate(found.comparison.objectives):
                points = points_of(found, objective, column)
                if points:
                    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
                    axis.plot(*zip(*points, strict=True), marker, color=colour, ms=5, label=objective.label)
            null = next(n[column].null for n in found.numbers.values() if column in n)
            axis.axvline(null, color=plots.FLOOR, lw=0.8, ls="--", label="no map: white noise")
            axis.axhline(0, color=plots.FLOOR, lw=0.8)
            axis.set(title=f"sheets: {SHEETS[column]}", xlabel="Moran's I, mean over sheets", xlim=(-0.15, 1))
        axes[0].set_ylabel("validation loss - control's\n(nats per token)")
        plots.legend(figure, axes)
    return figure


def points_of(found: Found, objective: Objective, column: str) -> list[tuple[float, float]]:
    """Moran's I and gap of each seed that has both; a control's gap is 0."""
    points = []
    for m in objective.members:
        value, above = found.numbers[m.source].get(column), 0.0 if m.is_control else gap(found, m)
        if value is not None and above is not None:
            points.append((value.value, above))
    return points
