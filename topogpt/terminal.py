"""What a person sees on a terminal: lines, tables, bars, spans of time."""

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

HALF_BLOCK = "\u2580"  # its upper half in one colour, its lower in another: two cells
SHADES = " .:-=+*#%@"
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def say(line: str = "") -> None:
    print(line, flush=True)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


def print_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    say(table(head, rows))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Lines of columns as wide as they need to be, numbers to the right; a row of one cell is a heading."""
    shown = [[cell(value) for value in row] for row in [head, *rows]]
    whole = [row for row in shown if len(row) > 1 or len(head) == 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = []
    for first, *others in shown:
        parts = [first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=False))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """3 digits of a fraction, thousands of a whole number, - for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def has_colours() -> bool:
    """Whether a person sees 24-bit colours and half blocks here (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain and "utf" in (sys.stdout.encoding or "").lower()


def picture(values: Sequence[Sequence[float]], colours: bool) -> list[str]:
    """Lines that show a map of values from -1 (blue, light) to 1 (red, dark).

    In colours a cell is half a character high, else two characters wide: nothing is averaged.
    """
    if not colours:
        last = len(SHADES) - 1
        return ["".join(2 * SHADES[round((clip(v) + 1) / 2 * last)] for v in row) for row in values]
    lines = []
    for upper, lower in zip_longest(values[::2], values[1::2]):
        below = [f"\033[48;2;{colour(v)}m" for v in lower] if lower is not None else [""] * len(upper)
        cells = (f"\033[38;2;{colour(v)}m{b}{HALF_BLOCK}" for v, b in zip(upper, below, strict=True))
        lines.append("".join(cells) + "\033[0m")
    return lines


def colour(value: float) -> str:
    """Red, green and blue, of a blue below 0 and a red above."""
    value = clip(value)
    pairs = zip(WHITE, RED if value > 0 else BLUE, strict=True)
    return ";".join(str(round(w + abs(value) * (c - w))) for w, c in pairs)


def clip(value: float) -> float:
    return min(1.0, max(-1.0, value))


def duration(seconds: float) -> str:
    """1h05m, 3m20s or 12s."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
