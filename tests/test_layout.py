"""The shape of the code: rooms whose imports go one way, torch imported late. pytest tests/test_layout.py"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny

# Each floor may import the floors before it; rooms of one floor do not import each other.
FLOORS = [
    {"topogpt"},  # the files that lie in topogpt itself
    {"topogpt.text", "topogpt.model", "topogpt.spatial"},
    {"topogpt.runs"},
    {"topogpt.sharing"},
    {"topogpt.training", "topogpt.analysis"},
    {"scripts", "evals", "bench"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
WITHOUT_TORCH = """model topo topogpt topogpt.model.cost topogpt.model.lora topogpt.model.connectome finetune
    train_itp topogpt.rng topogpt.topo topogpt.config topogpt.settings topogpt.runs.folder
    topogpt.text.shards topogpt.text.loader topogpt.training.preflight
    topogpt.sharing.push topogpt.sharing.card topogpt.sharing.export""".split()
FILES = sorted(
    path
    for pattern in ("*.py", "topogpt/**/*.py", "evals/**/*.py", "bench/**/*.py")
    for path in tiny.ROOT.glob(pattern)
    if path.name != "setup.py"  # read by pip alone
)
EVERY = [*FILES, *sorted((tiny.ROOT / "tests").rglob("*.py"))]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))


def module_of(path: Path) -> str:
    parts = path.relative_to(tiny.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    """topogpt.text of topogpt.text.parts, topogpt of topogpt.config, scripts of train."""
    parts = module.split(".")
    if parts[0] != "topogpt":
        return parts[0] if parts[0] in FLOOR else "scripts"
    return ".".join(parts[:2]) if (tiny.ROOT / Path(*parts[:2])).is_dir() else "topogpt"


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere in a file, each name of `from package import name` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules that importing the file imports: not in functions, nor for type checkers or scripts alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and re.search("TYPE_CHECKING|__main__", ast.unparse(node.test)):
            yield from imported_at_once(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from imported_at_once(getattr(node, field, []))


def ours(modules: Iterator[str], us: str = "") -> set[str]:
    """Those of our modules; a package's name alone stands for nothing where it is empty."""
    return {m for m in modules if m in MODULES and m != us and MODULES[m].stat().st_size}


@each_file
def test_imports_go_one_way(path):
    us = module_of(path)
    if us == "topogpt":  # the front door names what lies behind it, and imports nothing itself
        assert not ours(imported_at_once(parse(path).body), us)
        return
    for them in ours(imported(parse(path)), us):
        here, there = room_of(us), room_of(them)
        assert here == there or FLOOR[there] < FLOOR[here], f"{us} imports {them}"


def test_train_is_imported_by_scripts_that_train_otherwise_alone():
    importers = {m for m, p in MODULES.items() if "train" in ours(imported(parse(p)), m)}
    assert importers <= {"train_itp", "finetune"}


def test_the_house_is_as_large_as_it_was_planned():
    scripts = [m for m in MODULES if room_of(m) == "scripts"]
    ground = [m for m in MODULES if room_of(m) == "topogpt" and m != "topogpt"]
    rooms = {room_of(m) for m in MODULES if m.startswith("topogpt.")} - {"topogpt"}
    assert (len(scripts) <= 10, len(ground) <= 12, len(rooms) <= 8) == (True, True, True)
    assert rooms | {"topogpt", "scripts", "evals", "bench"} == FLOOR.keys()


def test_an_analysis_imports_no_other():
    files = {f"evals.{path.stem}": path for path in (tiny.ROOT / "evals").glob("*.py")}
    analyses = {m for m, path in files.items() if re.search("^ANALYSIS", path.read_text(), re.M)}
    assert len(analyses) >= 5
    for name in analyses:
        assert not ours(imported(parse(files[name])), name) & files.keys()


def test_no_file_imports_itself_by_way_of_others():
    names = MODULES.keys() - {"topogpt"}  # the front door
    below = {m: ours(imported(parse(MODULES[m])), m) & names for m in names}
    while below:  # take away what imports nothing that is left; a circle stays
        free = [m for m, imports in below.items() if not imports & below.keys()]
        assert free, f"these files import each other in a circle: {sorted(below)}"
        for m in free:
            del below[m]


@each_file
def test_no_setting_is_wrapped_for_help_loses_the_comment_of_one_that_is(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^    (\w+): [^=\n]*(?:= )?[(\[]$", text, re.M) == []


def test_what_is_looked_for_is_found():
    """Imports in functions, from-imports, dotted ones; and only those that run at once."""
    source = "from topogpt import topo\ndef f():\n    from train import train\n    import evals.report\n"
    assert {"topogpt.topo", "train", "evals.report"} <= set(imported(ast.parse(source)))
    source = "try:\n    import a\nexcept ImportError:\n    import b\n"
    source += "if TYPE_CHECKING:\n    import c\nclass D:\n    import d\n"
    assert set(imported_at_once(ast.parse(source).body)) == {"a", "b", "d"}
    assert (room_of("topogpt.text.parts"), room_of("topogpt.rng"), room_of("train")) == (
        "topogpt.text",
        "topogpt",
        "scripts",
    )


def closure(name: str) -> set[str]:
    """All modules that importing one of ours imports, through ours."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in MODULES:
                todo += imported_at_once(parse(MODULES[name]).body)
    return seen


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_checks_the_input_does_not_import_torch(name):
    assert name in MODULES
    assert "torch" not in closure(name)


def test_torch_is_seen_where_it_is_imported():
    assert "torch" in closure("train") and "torch" in closure("topogpt.runs.checkpoint")


def test_a_checked_start_imports_nothing_slow():
    """The same for packages of others: whatever preflight imports may not import torch either."""
    slow = ("torch", "wandb", "transformers")
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@each_file
def test_no_text_or_file_is_run_as_code(path):
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        forbidden = ("eval", "exec", "pickle.load", "pickle.loads", "os.system")
        assert called not in forbidden, f"line {node.lineno}"
        assert keywords.get("trust_remote_code", "False") == "False", f"line {node.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}"
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        if called.endswith("np.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@each_file
def test_files_are_short_ascii_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    longest = 480 if path.name == "settings.py" else 400  # the one list of all settings
    assert len(text.splitlines()) <= longest
    assert text.isascii() or path.stem == "config"  # which strips the lines that tyro draws around a message
    assert not text or ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_no_test_file_imports_another(path):
    assert [name for name in imported(parse(path)) if name.startswith("test_")] == []


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_no_comment_breaks_the_code_before_it(path):
    """What the formatter makes of a trailing comment that does not fit: put it above its line instead."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^ *[])}][^#\"'\n]*  # (?!fmt: skip|noqa).*$", text, re.M) == []


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_the_second_line_of_a_docstring_begins_at_the_margin_or_is_empty(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            lines = (ast.get_docstring(node) or "").split("\n")
            assert len(lines) < 2 or lines[1] == "" or not lines[1].startswith(" "), lines[:2]
