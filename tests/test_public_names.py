"""`import topogpt`: its names, their types and what importing it costs. pytest tests/test_public_names.py"""

import ast
import subprocess
import sys

import pytest
import tiny

import topogpt


def python(code: str, cwd=tiny.ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_takes_nothing_but_the_standard_library():
    code = "import sys; before = set(sys.modules); import topogpt; topogpt.__version__, dir(topogpt)\n"
    code += "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    assert python(code) == "topogpt\n"


def test_geometry_and_maps_take_no_torch():
    names = "topogpt.grid_shape, topogpt.positions, topogpt.morans_i, topogpt.smooth, topogpt.load_topography"
    assert python(f"import sys, topogpt; {names}; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("name", topogpt.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(topogpt, name) is getattr(topogpt, name)
    assert name in dir(topogpt)
    assert name == "__version__" or (getattr(topogpt, name).__doc__ or "").strip()


def test_the_names_of_type_checkers_are_those_of_python():
    tree = ast.parse((tiny.ROOT / "topogpt" / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    typed = {(node.module, alias.name) for node in imports for alias in node.names}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # shown to others
    lazy = {(f"topogpt.{home}", name) for home, names in topogpt.HOME.items() for name in names.split()}
    assert typed == lazy
    assert sorted({name for _, name in lazy} | {"__version__"}) == sorted(topogpt.__all__)


def test_an_unknown_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'topogpt' has no attribute 'moran'"):
        topogpt.moran  # noqa: B018


def test_what_a_user_writes_has_types():
    """tests/typed_user.py through mypy, where it is installed; make check does the same."""
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
