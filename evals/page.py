"""Pieces of the report's page: escaped text, tables, figures, line charts and cards, as HTML and inline SVG.

    python -m evals.report out/topolm               # the page they are for

Text becomes HTML in `shown` alone, which escapes everything but what these functions made themselves (Html).
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.figures import CONTROL, MODEL

COLOURS = (MODEL, CONTROL)
DASHES = ("", "7 3")  # of the model's lines and the control's
NARROWEST = 440  # pixels of the page for a figure and its caption
PAGE_PER_PIXEL = 0.6  # pixels of the page per pixel of a figure, which has 130 to 160 per inch
MAX_POINTS = 400  # of a line; more are averaged


class Html(str):
    """Text that is HTML already."""


class Number(Html):
    """A number as it is shown: in a table it stands on the right."""


def shown(value: Any) -> Html:
    if isinstance(value, Html):
        return value
    if value is None:
        return Number("&ndash;")
    if isinstance(value, float | int) and not isinstance(value, bool):
        return number(value)
    return Html(html.escape(str(value)))


def number(value: float | None, digits: int = 3, unit: str = "") -> Number:
    if value is None or not math.isfinite(value):
        return Number("&ndash;")
    text = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"
    return Number(text.replace("-", "&minus;") + unit)


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
    """An element; class is given as `cls`."""
    given = "".join(
        f' {"class" if key == "cls" else key}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(shown(part) for part in parts))


def paragraph(*inside: Any) -> Html:
    return tag("p", *inside)


def notes(lines: Sequence[str]) -> Html:
    """What was run, or what is missing, one line each."""
    return join(tag("p", line, cls="note") for line in lines)


def folded(title: str, *inside: Any, opened: bool = False) -> Html:
    return tag("details", tag("summary", title), *inside, **({"open": ""} if opened else {}))


def section(name: str, title: str, *inside: Any) -> Html:
    return tag("section", tag("h2", title), *inside, id=name)


# ---- tables and cards ----------------------------------------------------------------------------


def models_head(labels: Sequence[str]) -> list[Html]:
    """Column names of model and control, with the colour of their lines."""
    return [join([swatch(i), label]) for i, label in enumerate(labels)]


def swatch(i: int) -> Html:
    return tag("span", cls=f"swatch {('model', 'control')[i]}")


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], cls: str = "") -> Html:
    """Numbers to the right, with their heads; a row with a single cell is a heading of those below."""
    cells = [[shown(value) for value in row] for row in rows]
    to_right = [any(isinstance(row[i], Number) for row in cells if len(row) > 1) for i in range(len(head))]
    sides = ["n" if right else "t" for right in to_right]
    lines = [
        tag("tr", tag("th", row[0], colspan=len(head), scope="rowgroup"))
        if len(row) == 1
        else tag("tr", *(tag("td", cell, cls=side) for cell, side in zip(row, sides, strict=True)))
        for row in cells
    ]
    names = tag(
        "tr", *(tag("th", name, cls=side, scope="col") for name, side in zip(head, sides, strict=True))
    )
    inside = tag("table", tag("thead", names), tag("tbody", *lines), cls=cls)
    return tag("div", inside, cls="scroll")


class Card(NamedTuple):
    """A headline number."""

    name: str
    what: str  # of what, and in which unit
    value: Number
    beside: list[tuple[Any, Number]]  # what to compare it with


def cards(found: Sequence[Card]) -> Html:
    def one(card: Card) -> Html:
        lines = [tag("div", tag("span", name), tag("b", value), cls="beside") for name, value in card.beside]
        name = [tag("div", card.name, cls="name"), tag("div", card.what, cls="what")]
        return tag("div", *name, tag("div", card.value, cls="value"), *lines, cls="card")

    return tag("div", *map(one, found), cls="cards")


# ---- figures -------------------------------------------------------------------------------------


def picture(path: Path, caption: str) -> Html:
    """A PNG inside the page, no wider than the page; PNG's header tells its width in pixels."""
    content = path.read_bytes()
    width = round(PAGE_PER_PIXEL * int.from_bytes(content[16:20], "big"))
    data = base64.b64encode(content).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" width="{width}" alt="{html.escape(path.stem)}">')
    return tag("figure", image, tag("figcaption", caption), style=f"width: {max(width, NARROWEST)}px")


# ---- line charts ---------------------------------------------------------------------------------


class Line(NamedTuple):
    x: Sequence[float]
    y: Sequence[float]
    model: int  # 0: the model, 1: its control
    faint: bool = False


class Level(NamedTuple):
    """A horizontal line to compare with."""

    label: str
    y: float


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 270, 52, 14, 34, 44  # of a chart, in pixels


def line_chart(
    title: str, y_label: str, lines: Sequence[Line], level: Level | None = None, skip: float = 0.0
) -> Html:
    """Lines over tokens of training, as SVG.

    Args:
        skip: share of the x axis, from its start, that does not widen the y axis.
    """
    lines = [Line(*thinned(n.x, n.y), n.model, n.faint) for n in lines if len(n.x)]
    if not lines:
        return Html("")
    x_max = max(max(line.x) for line in lines) or 1.0
    y = [b for line in lines for a, b in zip(line.x, line.y, strict=True) if a >= skip * x_max]
    y += [level.y] if level else []
    y_ticks, x_ticks = ticks(min(y), max(y)), ticks(0.0, x_max)
    y_min, y_max = min(y_ticks[0], min(y)), max(y_ticks[-1], max(y))

    def at(a: float, b: float) -> tuple[float, float]:
        across = LEFT + a / x_max * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (b - y_min) / ((y_max - y_min) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [tag("text", title, x=LEFT, y=16, cls="title")]
    for value in y_ticks:
        _, down = at(0, value)
        parts.append(svg("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down, y2=down, cls="grid"))
        parts.append(tag("text", Html(tick_label(value)), x=LEFT - 7, y=down + 4, cls="tick right"))
    for value in (v for v in x_ticks if v <= x_max):
        across, _ = at(value, y_min)
        parts.append(
            svg("line", x1=across, x2=across, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, cls="axis")
        )
        parts.append(
            tag("text", Html(tick_label(value)), x=across, y=HEIGHT - BOTTOM + 17, cls="tick middle")
        )
    parts.append(svg("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, cls="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", "training tokens", x=middle, y=HEIGHT - 8, cls="label middle"))
    turned = f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    parts.append(tag("text", y_label, transform=turned, cls="label middle"))
    if level:
        _, down = at(0, level.y)
        parts.append(svg("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down, y2=down, cls="level"))
        parts.append(tag("text", level.label, x=WIDTH - RIGHT, y=down - 6, cls="tick right"))
    inside = Html(
        "".join(
            svg(
                "polyline",
                points=" ".join(
                    "{:.1f},{:.1f}".format(*at(a, b)) for a, b in zip(line.x, line.y, strict=True)
                ),
                stroke=COLOURS[line.model],
                cls="line faint" if line.faint else "line",
                **{"stroke-dasharray": DASHES[line.model]},
            )
            for line in sorted(lines, key=lambda line: not line.faint)
        )
    )
    box = f"0 0 {WIDTH} {HEIGHT}"
    frame = svg(
        "svg",
        x=LEFT,
        y=TOP - 6,
        width=WIDTH - LEFT - RIGHT,
        height=HEIGHT - TOP - BOTTOM + 6,
        viewBox=f"{LEFT} {TOP - 6} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM + 6}",
        inside=inside,
    )  # clips what lies above the y axis
    return tag("svg", *parts, frame, viewBox=box, role="img", cls="chart", **{"aria-label": title})


def svg(name: str, inside: str = "", **attributes: Any) -> Html:
    rounded = {k: f"{v:.1f}" if isinstance(v, float) else v for k, v in attributes.items()}
    return tag(name, Html(inside), **rounded)


def legend(labels: Sequence[str], level: str) -> Html:
    """What the lines of several charts are: validation of each model, training thin, a level to compare."""
    entries: list[tuple[str, dict[str, Any]]] = []
    for i, label in enumerate(labels):
        style = {"stroke": COLOURS[i], "stroke-dasharray": DASHES[i]}
        entries.append((label, {"cls": "line", **style}))
        entries.append((f"{label}, training steps", {"cls": "line faint", **style}))
    entries.append((level, {"cls": "level"}))
    samples = [
        tag(
            "span",
            svg("svg", svg("line", x1=0, x2=30, y1=6, y2=6, **style), width=30, height=12, cls="chart"),
            label,
        )
        for label, style in entries
    ]
    return tag("div", *samples, cls="legend")


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, each the mean of neighbouring ones."""
    n = min(len(x), MAX_POINTS)
    return tuple([float(part.mean()) for part in np.array_split(np.asarray(v, float), n)] for v in (x, y))


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round values that reach over low to high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def tick_label(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}".replace("-", "&minus;")
