"""Files are there whole or not at all, of several writers one wins, and a killed one's rest is found."""

import subprocess
import sys

import pytest
import tiny

from topogpt import files


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "one")
    with pytest.raises(RuntimeError, match="half-way"), files.whole(path) as part:
        part.write_text("tw")
        raise RuntimeError("half-way")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    files.write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_where_the_first_decides_a_file_that_is_there_stays(tmp_path):
    for content in ({"a": 1}, {"a": 2}):
        files.write_json(tmp_path / "a.json", content, first=True)
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_text_of_any_kind_comes_back_from_json(tmp_path):
    content = {"caf\u00e9 \u6f22": "lone \udce9"}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    assert "caf\u00e9" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_what_a_killed_process_left_of_a_file_is_found(tmp_path):
    code = (
        "import os, sys, pathlib; from topogpt import files\n"
        "with files.whole(pathlib.Path(sys.argv[1])) as part: part.write_text('x'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "[a].bin")], cwd=tiny.ROOT)
    (tmp_path / ".a.bin.other.tmp").write_text("of another file")
    (left,) = files.leftovers(tmp_path / "[a].bin")
    assert left.read_text() == "x" and not (tmp_path / "[a].bin").exists()


@pytest.mark.parametrize("name", ["a.bin", "train/a.bin", "caf\u00e9/..a"])
def test_a_name_read_from_a_file_stays_below_its_folder(tmp_path, name):
    assert files.inside(tmp_path, name) == tmp_path / name


WRONG = ["", ".", "..", "../a", "a/../../b", "/a", "a//b", "a/", "./a", "a\\b", "C:a", "a\0", "a\n", 3, None]


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no file below"):
        files.inside(tmp_path, name)
