"""The shape of the code: imports go one way, torch is imported late, files stay short.

pytest tests/test_layout.py
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

# A file may import files of lower levels; of its own level, only what SAME_LEVEL says. Place new files here.
LEVELS = [
    {"rng"},
    {"topo", "config"},
    {"settings"},
    {"runfolder", "shards", "cross_entropy", "interrupt"},
    {"sources", "hub_sources", "tokenizer", "distributed", "model", "data", "spatial", "connectome"},
    {"optim", "checkpoint", "parts", "maps", "runlog", "preflight", "provenance", "validation"},
    {"progress", "hf_import", "modelcard", "proof", "hub"},
    {"export", "objective", "prepare_fineweb"},
    {"sample", "summary", "compress", "evals", "bench"},
    {"train"},
    {"generations"},
]
SAME_LEVEL = {
    ("hub_sources", "sources"),
    ("validation", "maps"),
    ("validation", "runlog"),
    ("evals", "evals"),
    ("bench", "bench"),
}
NOT_OURS = {"setup"}  # read by pip alone
WITHOUT_TORCH = "rng topo config settings hub modelcard export runfolder shards data preflight".split()

LEVEL = {name: i for i, level in enumerate(LEVELS) for name in level}
FILES = sorted(
    p
    for p in [*tiny.ROOT.glob("*.py"), *tiny.ROOT.glob("evals/**/*.py"), *tiny.ROOT.glob("bench/**/*.py")]
    if p.stem not in NOT_OURS
)


def name_of(path: Path) -> str:
    """The name in LEVELS: a package counts as one."""
    first = path.relative_to(tiny.ROOT).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere in a file, the first part of their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.partition(".")[0]


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


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_file_has_a_level():
    assert [str(path.relative_to(tiny.ROOT)) for path in FILES if name_of(path) not in LEVEL] == []
    names = [name for level in LEVELS for name in level]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_imports_go_one_way(path):
    us = name_of(path)
    for them in set(imported(parse(path))) & LEVEL.keys():
        assert LEVEL[them] < LEVEL[us] or (us, them) in SAME_LEVEL, f"{us} imports {them}"


def test_some_files_know_less_than_their_level_allows():
    allowed = {
        "rng": set(),
        "topo": {"rng"},
        "config": set(),
        "model": {"settings", "cross_entropy"},  # neither sheets nor losses on them
    }
    for name, names in allowed.items():
        ours = set(imported(parse(tiny.ROOT / f"{name}.py"))) & LEVEL.keys()
        assert ours <= names, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_no_setting_is_wrapped_for_help_loses_the_comment_of_one_that_is(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^    (\w+): [^=\n]*(?:= )?[(\[]$", text, re.M) == []


def test_nothing_but_generations_imports_train():
    assert LEVEL["train"] > max(
        level for name, level in LEVEL.items() if name not in ("train", "generations")
    )


def test_the_levels_can_be_broken(tmp_path):
    """What the tests above look for is found: imports in functions, from-imports, dotted ones."""
    source = "import topo\ndef f():\n    from train import train\n    import evals.report\n"
    assert set(imported(ast.parse(source))) == {"topo", "train", "evals"}
    source = "try:\n    import a\nexcept ImportError:\n    import b\n"
    source += "if TYPE_CHECKING:\n    import c\nclass D:\n    import d\n"
    assert set(imported_at_once(ast.parse(source).body)) == {"a", "b", "d"}


def closure(name: str) -> set[str]:
    """All modules that importing one of ours imports, through ours."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            path = tiny.ROOT / f"{name}.py"
            if name in LEVEL and path.exists():
                todo += imported_at_once(parse(path).body)
    return seen


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_checks_the_input_does_not_import_torch(name):
    assert (tiny.ROOT / f"{name}.py").exists()
    assert "torch" not in closure(name)


def test_torch_is_seen_where_it_is_imported():
    assert "torch" in closure("train") and "torch" in closure("checkpoint")


def test_a_checked_start_imports_nothing_slow(tmp_path):
    """The same for packages of others: whatever preflight imports may not import torch either."""
    names = ", ".join(WITHOUT_TORCH)
    code = f"import sys, {names}; print([m for m in ('torch', 'wandb', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_no_text_or_file_is_run_as_code(path):
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), (
            f"line {node.lineno}"
        )
        assert keywords.get("trust_remote_code", "False") == "False", f"line {node.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}"
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        if called.endswith("np.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_files_are_short_ascii_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert text.isascii() or path.stem == "config"  # which strips the lines that tyro draws around a message
    assert path.name == "__init__.py" or ast.get_docstring(parse(path))
