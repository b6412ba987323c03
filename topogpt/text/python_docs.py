"""The documentation inside Python itself: real English on every machine, without a network."""

import ast
import inspect
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from topogpt.files import write_text
from topogpt.text.sources import Files

# folders of Python's library that hold other people's modules, or text that is no documentation
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class PythonDocs(Files):
    """Written into one file of JSON lines, which is read like any other."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        rows = (json.dumps({"id": name, "text": text}) + "\n" for name, text in python_documents())
        write_text(folder / "pydoc.jsonl", "".join(rows))
        super().__init__([str(folder / "pydoc.jsonl")], "text")
        self.description = {"python_documentation": sys.version.split()[0]} | self.description


def python_documents() -> Iterator[tuple[str, str]]:
    """The language reference's topics, and the docstrings of each standard module (parsed, not run)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic/{name}", topics[name].strip()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(stdlib).as_posix() for path in modules_below(stdlib)):
        text = "\n\n\n".join(docstrings(stdlib / name))
        if len(text) >= 100:
            yield f"module/{name}", f"{name.removesuffix('.py').replace('/', '.')}\n\n{text}"


def modules_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = set(folders) - SKIPPED  # not walked into: thousands of files may be installed there
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, under their names, in order."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # of backslashes in strings
            tree = ast.parse(file.read())
    except (SyntaxError, ValueError, OSError):  # templates, and files in Python 2
        return
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, named):
                doc = ast.get_docstring(child)
                if doc and len(doc) >= 40:
                    what = "class" if isinstance(child, ast.ClassDef) else "function"
                    yield f"{what} {prefix}{child.name}\n\n{inspect.cleandoc(doc)}"
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, prefix)

    if doc := ast.get_docstring(tree):
        yield doc
    yield from walk(tree, "")
