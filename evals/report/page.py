"""The report's page: page.html.jinja filled in, with style.css and reader.js inside; text is escaped."""

import base64
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from topogpt.analysis.section import Label, Number, Table

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
NARROWEST = 440  # pixels of the page for a figure and its caption
PER_PIXEL = 96 / 160  # pixels of the page per pixel of a figure, which has 160 an inch


class Image(NamedTuple):
    """A picture on the page, with what is said below it."""

    name: str
    png: bytes
    caption: str
    title: str = ""  # it is folded under this
    alt: str = ""  # what is seen on it


class Part(NamedTuple):
    """An analysis on the page."""

    name: str
    title: str
    notes: list[str]
    parts: list[str | Table]
    images: list[Image]


def render(**values: Any) -> str:
    """The page of these values, whose names are those of page.html.jinja."""
    return templates().get_template("page.html.jinja").render(values).lstrip()


def templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    pages = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, **options)
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    pages.globals["inline"] = lambda name: Markup((HERE / name).read_text(encoding="utf-8"))
    pages.globals["number"] = count(1).__next__  # of the next figure: in print the same as unfolded
    pages.tests["label"] = lambda value: isinstance(value, Label)
    pages.filters |= {"shown": shown, "sides": sides, "base64": lambda data: base64.b64encode(data).decode()}
    pages.filters |= {"pixels": pixels, "width": lambda image: max(pixels(image), NARROWEST)}
    return pages


def is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float | Number)


def shown(value: Any, digits: int = 3, unit: str = "") -> str:
    """A table's cell as text."""
    if not is_number(value):
        return str(value)
    number = value if isinstance(value, Number) else Number(value, digits, unit)
    text = str(number).replace("+-", "\u00b1")
    return "\u2013" if text == "-" else text.replace("-", "\u2212")


def sides(table: Table) -> list[str]:
    """n, to the right, for columns of numbers; t for text."""
    rows = [row for row in table.rows if len(row) > 1]
    return ["n" if any(is_number(row[i]) for row in rows) else "t" for i in range(len(table.head))]


def pixels(image: Image) -> int:
    """Width on the page; PNG's header tells the picture's own."""
    return round(PER_PIXEL * int.from_bytes(image.png[16:20], "big"))
