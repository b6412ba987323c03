"""What a person sees on a terminal: lines, tables, bars, spans of time."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any


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


def duration(seconds: float) -> str:
    """1h05m, 3m20s or 12s."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
