"""Sections as plain data, and how analyses are found. pytest tests/analysis/test_section.py"""

import sys
from types import ModuleType

import pytest

from topogpt.analysis.section import Card, Number, Section, Table, discover, need, show
from topogpt.errors import UserError


@pytest.mark.parametrize(
    "number, said",
    [
        (Number(0.12345), "0.123"),
        (Number(-1.0, 1, " %"), "-1.0 %"),
        (Number(0.5, 4, "", 0.01), "0.5000 +- 0.0100"),
        (Number(12345), "12,345"),
        (Number(None), "-"),
        (Number(float("nan"), 1, " %"), "-"),
    ],
)
def test_a_number_is_said_with_its_digits_unit_and_spread(number, said):
    assert str(number) == said


def test_the_terminal_shows_tables_titles_and_warnings_and_leaves_the_rest_to_the_page(capsys):
    rows = [["the first heading, a long one"], ["a", 1.0, Number(50.0, 1, " %")], ["bb", None, 2]]
    parts = ["A paragraph.", Table(["", "x", "y"], rows, "Numbers", ["why"] * 3)]
    parts.append(Table(["z"], [[1]], "Details", folded=True))
    show(Section("Title", parts, ["Beware."], [Card("card", "", [1.0], {})]))
    lines = ["Numbers:", "        x       y", rows[0][0], "a   1.000  50.0 %", "bb      -       2", "Beware."]
    assert capsys.readouterr().out.splitlines() == lines


def test_analyses_are_files_that_set_one_in_their_order(tmp_path, monkeypatch):
    for name, order in (("b", 10), ("c", 5), ("a", 10)):
        text = "from types import SimpleNamespace\n"
        (tmp_path / f"{name}.py").write_text(f"{text}ANALYSIS = SimpleNamespace(order={order})\n")
    (tmp_path / "other.py").write_text("raise RuntimeError('it is no analysis, so it is not imported')\n")
    (tmp_path / "folder").mkdir()
    package = ModuleType("some_analyses")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "some_analyses", package)
    assert list(discover(package)) == ["c", "a", "b"]
    for name in "abc":
        del sys.modules[f"some_analyses.{name}"]


def test_a_package_that_is_missing_is_named():
    need("numpy")
    with pytest.raises(UserError, match="no_such_package is not installed; pip install"):
        need("numpy", "no_such_package")
