"""The prepared folder: one process at a time, no other shards, room on the disk, what its manifest names."""

import os
from collections import namedtuple
from pathlib import Path

import pytest
import texts
from texts import bytes_of, make_documents, run, write_jsonl

from topogpt.errors import UserError
from topogpt.text import prepared


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    texts.small_units(monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", make_documents(100))


def test_too_little_disk_is_said_before_the_work(tmp_path, corpus, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1e9, 1e9, 1000))
    with pytest.raises(UserError, match=r"out_dir = .* GB free, and about .* GB are needed"):
        run(tmp_path / "out", "--source", corpus)
    assert not list((tmp_path / "out").glob(".parts/*.json"))


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, corpus):
    with prepared.locked(tmp_path / "out", 0):
        with pytest.raises(UserError, match="being prepared by another process"):
            run(tmp_path / "out", "--source", corpus)
    run(tmp_path / "out", "--source", corpus)


def test_a_folder_with_other_shards_is_refused_and_kept(tmp_path, corpus):
    run(tmp_path / "out", "--source", corpus)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(UserError, match="holds shards prepared with another val_fraction: 0.1"):
        run(tmp_path / "out", "--source", corpus, "--val_fraction", 0.2)
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="x.bin, which is in no manifest"):
        run(tmp_path / "foreign", "--source", corpus)
    after = {name: sha256 for name, sha256 in bytes_of(tmp_path / "out").items() if ".parts" not in name}
    assert after == before and (tmp_path / "foreign" / "train" / "x.bin").exists()


def test_a_file_whose_name_is_no_utf_8_is_prepared_and_named(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("one")
    for _ in range(2):  # the second finds the manifest as it was written
        manifest = run(tmp_path / "out", "--source", tmp_path / name)
    assert [file["name"] for file in manifest["source"]["files"]] == [name]
