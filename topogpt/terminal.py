"""What a person sees on a terminal: lines, tables, bars, spans of time."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import pairwise, zip_longest
from typing import Any

HALF_BLOCK = "\u2580"  # its upper half in one colour, its lower in another: two cells
SHADES = " .:-=+*#%@"
# (value, red, green, blue) of maps here, in figures and on pages: blue, white, orange, seen by everyone
PALETTE = (
    (-1, 10, 42, 96), (-0.62, 43, 112, 184), (-0.28, 150, 194, 228), (0, 249, 249, 248),
    (0.28, 250, 196, 146), (0.62, 217, 106, 30), (1, 112, 38, 4),
)  # fmt: skip
EVERY = 10.0  # seconds between lines of progress where nobody watches a bar


def say(line: str = "") -> None:
    print(line, flush=True)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
    return in_lines(items, what, len(items) if total is None and isinstance(items, Sized) else total)


def in_lines(items: Iterable, what: str, total: int | None) -> Iterator:
    start = said = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - said >= EVERY:
            said, left = now, ""
            if total and done:
                left = f" of {total:,}, ETA {duration((now - start) / done * (total - done))}"
            print(f"{what}: {done:,}{left}", file=sys.stderr, flush=True)
        yield item


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
    """Lines that show a map of values from -1 (blue, light) to 1 (orange, dark).

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
    """Red, green and blue of PALETTE at a value."""
    value = clip(value)
    for (at, *first), (end, *second) in pairwise(PALETTE):
        if value <= end:
            part = (value - at) / (end - at)
            return ";".join(str(round(a + part * (b - a))) for a, b in zip(first, second, strict=True))
    raise AssertionError(value)


def clip(value: float) -> float:
    return min(1.0, max(-1.0, value))


def duration(seconds: float) -> str:
    """1h05m, 3m20s or 12s."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
