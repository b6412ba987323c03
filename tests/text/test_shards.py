"""Shards: their format, how they are found and checked, and what is remembered of them."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from texts import open_quietly, write_shard

from topogpt.errors import UserError
from topogpt.text import shards


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def digested(monkeypatch):
    """Names of the files that were read in full."""
    names, digest = [], shards.digest
    monkeypatch.setattr(shards, "digest", lambda shard: names.append(shard.path.name) or digest(shard))
    return names


def write_manifest(folder: Path, *paths: Path, **changes) -> Path:
    entries = [
        {
            "path": str(path.relative_to(folder)),
            "split": "train",
            "tokens": (path.stat().st_size - 1024) // 2,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        | changes
        for path in paths
    ]
    (folder / "manifest.json").write_text(json.dumps({"shards": entries}))
    return folder / "manifest.json"


# ---- format ----------------------------------------------------------------------------------------


def test_a_shard_is_256_little_endian_int32_then_uint16():
    expected = struct.pack("<3i", 20240520, 1, 3) + bytes(253 * 4)
    assert shards.header(3) == expected and len(expected) == shards.HEADER_BYTES == 1024


def test_a_shard_written_as_llm_c_writes_it_is_read(tmp_path):
    words = np.zeros(256, dtype=np.int32)
    words[0], words[1], words[2] = 20240520, 1, 4
    with open(tmp_path / "edu_fineweb_train_000001.bin", "wb") as file:
        file.write(words.tobytes())
        file.write(np.array([50256, 1, 2, 3], dtype=np.uint16).tobytes())
    corpus = open_quietly(tmp_path)
    assert corpus.window(0, 4).tolist() == [50256, 1, 2, 3]
    content = (tmp_path / "edu_fineweb_train_000001.bin").read_bytes()
    assert corpus.shards[0].sha256 == hashlib.sha256(content).hexdigest()
    assert (corpus.shards[0].tokens, corpus.shards[0].offset_bytes) == (4, 1024)


def test_a_file_without_header_is_read_as_nanogpt_s_and_said_in_one_line(tmp_path):
    (tmp_path / "train.bin").write_bytes(np.arange(3000, dtype="<u2").tobytes())
    lines = []
    corpus = open_quietly(tmp_path, log=lines.append)
    assert corpus.window(0, 3000).tolist() == list(range(3000)) and corpus.shards[0].offset_bytes == 0
    assert len(lines) == 1 and "without a header" in lines[0] and "train.bin" in lines[0]
    open_quietly(tmp_path, log=lines.append, verify=False)
    assert len(lines) == 1  # not by every rank


# ---- bad input: content of a.bin, what the message says --------------------------------------------


def words(*first: int, then: bytes = b"") -> bytes:
    return np.array([*first, *[0] * (256 - len(first))], dtype="<i4").tobytes() + then


BAD = {
    "empty": (b"", ["is empty"]),
    "shorter than a header": (shards.header(5)[:500], ["truncated", "500"]),
    "truncated": (shards.header(5) + bytes(8), ["truncated", "1032 bytes", "1034", "5 tokens"]),
    "too long": (shards.header(5) + bytes(12), ["too long", "1036 bytes", "1034", "5 tokens"]),
    "no tokens": (shards.header(0), ["holds 0 tokens"]),
    "negative count": (words(20240520, 1, -1), ["holds -1 tokens"]),
    "other version": (words(20240520, 7, 2, then=bytes(4)), ["wrong version", "version 7", "20240520"]),
    "other magic": (words(123, 1, 2, then=bytes(4)), ["wrong magic", "magic 123", "20240520"]),
    "llama": (words(20240801, 7, 1, then=bytes(4)), ["20240801", "version 7", "Llama 3", "uint32"]),
    "odd": (b"\x01\x02" * 700 + b"\x03", ["truncated", "1401 bytes"]),
    "text": (b"To be, or not to be, that is the question.\n" * 90, ["is text"]),
    "beyond": (
        shards.header(4) + struct.pack("<4H", 1, 2, 50304, 60000),
        ["token 50304", "offset 2", "60001"],
    ),
    "bytes": (b"\x01\xff\x05\xfe" * 400, ["token 65281", "offset 0", "may not be a token file"]),
}


@pytest.mark.parametrize("content, says", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line_naming_key_and_file(tmp_path, content, says):
    write_shard(tmp_path / "0.bin", [1, 2, 3])
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_quietly(tmp_path)
    message = str(error.value)
    for part in ["train_data_dir: ", str(tmp_path / "a.bin"), "; ", *says]:
        assert part in message
    assert "\n" not in message


def test_a_token_beyond_the_vocabulary_is_found_far_into_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 16)
    write_shard(tmp_path / "a.bin", [*range(100), 777, 0, 888])
    with pytest.raises(UserError, match="a.bin holds token 777 at offset 100, beyond vocab_size = 500"):
        open_quietly(tmp_path, vocab_size=500)
    assert open_quietly(tmp_path, vocab_size=889).n_tokens == 103


# ---- finding shards --------------------------------------------------------------------------------


def test_folder_glob_paths_and_repeats_give_the_same_sorted_shards(tmp_path):
    for name in ("b", "a", "c"):
        write_shard(tmp_path / f"{name}.bin", [ord(name)] * 9)
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    (tmp_path / "notes.txt").write_text("not a shard")
    (tmp_path / "._a.bin").write_text("what macOS leaves behind")
    write_manifest(tmp_path)
    a, b, c = (tmp_path / f"{name}.bin" for name in "abc")
    for patterns in ([tmp_path], [tmp_path / "*.bin"], [c, a, b, a], [b, tmp_path]):
        assert [shard.path for shard in open_quietly(*patterns).shards] == [a, b, c]


def test_a_manifest_caught_by_the_shell_s_glob_is_not_a_shard(tmp_path):
    shard = write_shard(tmp_path / "a.bin", range(9))
    assert len(open_quietly(shard, write_manifest(tmp_path, shard)).shards) == 1
    assert len(open_quietly(tmp_path / "[a-m]*").shards) == 1


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("missing", "missing matches no shard; make shards with `python prepare_fineweb.py`"),
        ("none/*.bin", "none/*.bin matches no shard; make shards with `python prepare_fineweb.py`"),
        ("empty", "empty holds no .bin file; make shards with `python prepare_fineweb.py`"),
        (".", "did you mean {}/train or {}/val?"),
    ],
)
def test_a_pattern_without_shards_is_refused_with_a_remedy(tmp_path, pattern, says):
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "train" / "a.bin", range(9))
    write_shard(tmp_path / "val" / "a.bin", range(9))
    with pytest.raises(UserError) as error:
        open_quietly(tmp_path / "train", tmp_path / pattern)
    assert str(error.value).startswith("train_data_dir: ")
    assert says.replace("{}", str(tmp_path)) in str(error.value)


def test_no_pattern_at_all_is_refused():
    with pytest.raises(UserError, match="val_data_dir: nothing given"):
        open_quietly(key="val_data_dir")


def test_train_and_val_in_one_set_are_refused_by_name_and_by_manifest(tmp_path):
    write_shard(tmp_path / "mixed" / "fineweb_train_000001.bin", range(9))
    write_shard(tmp_path / "mixed" / "fineweb_val_000000.bin", range(9))
    with pytest.raises(UserError, match="mixes train .*_train_000001.bin.* and val|mixes val .* and train"):
        open_quietly(tmp_path / "mixed")
    assert open_quietly(tmp_path / "mixed" / "*train*").n_tokens == 9
    shards = [write_shard(tmp_path / "listed" / name / "0.bin", range(9)) for name in ("a", "b")]
    manifest = write_manifest(tmp_path / "listed", *shards)
    assert open_quietly(*shards).n_tokens == 18
    entries = json.loads(manifest.read_text())["shards"]
    entries[1]["split"] = "val"
    manifest.write_text(json.dumps({"shards": entries}))
    with pytest.raises(UserError, match="mixes train .* and val"):
        open_quietly(*shards)


# ---- manifest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
def test_a_shard_that_disagrees_with_its_manifest_is_refused(tmp_path, beside):
    shard = write_shard(tmp_path / "train" / "a.bin", range(9))
    place = shard.parent if beside else tmp_path
    write_manifest(place, shard)
    assert open_quietly(shard.parent).n_tokens == 9
    write_manifest(place, shard, tokens=8)
    with pytest.raises(UserError, match="a.bin has tokens 9, but .*manifest.json says 8; delete it"):
        open_quietly(shard.parent)
    write_manifest(place, shard, sha256="0" * 64)
    with pytest.raises(
        UserError, match="a.bin has SHA-256 [0-9a-f]{64}, but .*manifest.json says 0{64}; delete it"
    ):
        open_quietly(shard.parent)


def test_a_shard_missing_from_a_whole_folder_is_refused_but_not_from_a_list(tmp_path):
    shards = [write_shard(tmp_path / "train" / f"{i}.bin", range(9)) for i in range(3)]
    write_manifest(tmp_path, *shards)
    shards[1].unlink()
    with pytest.raises(UserError, match="manifest.json lists .*1.bin, which is missing"):
        open_quietly(tmp_path / "train")
    assert len(open_quietly(shards[0], shards[2]).shards) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 3}', '{"shards": [{"path": "a.bin"}]}', "\xff"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    write_shard(tmp_path / "a.bin", range(9))
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="train_data_dir: .*manifest.json is broken"):
        open_quietly(tmp_path)


def test_another_program_s_manifest_is_ignored(tmp_path):
    write_shard(tmp_path / "a.bin", range(9))
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    assert open_quietly(tmp_path).n_tokens == 9


# ---- fingerprint and cache -------------------------------------------------------------------------


def test_the_fingerprint_depends_on_content_and_order_only(tmp_path):
    def fingerprint(folder, **shards):
        for name, tokens in shards.items():
            write_shard(tmp_path / folder / f"{name}.bin", tokens)
        return open_quietly(tmp_path / folder).fingerprint

    one = fingerprint("one", a=[1, 2], b=[3])
    assert len(one) == 64
    assert fingerprint("two", x=[1, 2], y=[3]) == one
    others = [
        fingerprint("3", a=[3], b=[1, 2]),
        fingerprint("4", a=[1, 2, 3]),
        fingerprint("5", a=[1, 2], b=[4]),
    ]
    assert len({one, *others}) == 4


def test_a_second_opening_reads_only_what_changed(tmp_path, digested):
    for name in "abc":
        write_shard(tmp_path / f"{name}.bin", range(9))
    first = open_quietly(tmp_path).fingerprint
    assert digested == ["a.bin", "b.bin", "c.bin"]
    assert open_quietly(tmp_path / "*.bin").fingerprint == first
    assert len(digested) == 3
    write_shard(tmp_path / "b.bin", range(1, 10))  # same size, other content
    os.utime(tmp_path / "b.bin", ns=(1, 1))
    assert open_quietly(tmp_path).fingerprint != first
    assert digested[3:] == ["b.bin"]


def test_a_token_beyond_the_vocabulary_is_refused_from_the_cache_too(tmp_path, digested):
    write_shard(tmp_path / "a.bin", [0, 0, 9])
    open_quietly(tmp_path)
    with pytest.raises(UserError, match="token 9 at offset 2"):
        open_quietly(tmp_path, vocab_size=9)
    assert digested == ["a.bin"]


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"%s": [1, 2]}', '{"%s": {"sha256": 3}}', "\xff"])
def test_a_corrupt_cache_is_computed_again(tmp_path, cache_folder, digested, content):
    shard = write_shard(tmp_path / "a.bin", range(9))
    path = cache_folder / "topogpt" / "shards.json"
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("%s", str(shard)), encoding="latin-1")
    first = open_quietly(shard).fingerprint
    assert open_quietly(shard).fingerprint == first
    assert digested == ["a.bin"]
    assert list(path.parent.iterdir()) == [path]


def test_an_unwritable_cache_is_no_error(tmp_path, cache_folder, digested):
    cache_folder.write_text("a file where the folder should be")
    shard = write_shard(tmp_path / "a.bin", range(9))
    assert open_quietly(shard).fingerprint == open_quietly(shard).fingerprint != ""
    assert digested == ["a.bin", "a.bin"]


def test_the_cache_keeps_what_other_processes_wrote_and_what_was_done_before_an_error(tmp_path, digested):
    write_shard(tmp_path / "one" / "a.bin", range(9))
    write_shard(tmp_path / "two" / "a.bin", range(9))
    bad = write_shard(tmp_path / "two" / "b.bin", [60000])
    open_quietly(tmp_path / "one")
    with pytest.raises(UserError):
        open_quietly(tmp_path / "two")
    bad.unlink()
    open_quietly(tmp_path / "one", tmp_path / "two")
    assert digested == ["a.bin", "a.bin", "b.bin"]


def test_without_verification_nothing_is_read_in_full_but_what_is_known_is_used(tmp_path, digested):
    shard = write_shard(tmp_path / "a.bin", range(9))
    assert open_quietly(shard, verify=False).fingerprint == ""
    manifest = write_manifest(tmp_path, shard)
    from_manifest = open_quietly(shard, verify=False).fingerprint
    assert digested == []
    assert from_manifest == open_quietly(shard).fingerprint != ""
    manifest.unlink()
    assert open_quietly(shard, verify=False).fingerprint == from_manifest
    assert digested == ["a.bin"]


def test_only_a_large_first_reading_is_announced(tmp_path, monkeypatch):
    shard, lines = write_shard(tmp_path / "a.bin", range(9)), []
    monkeypatch.setattr(shards, "LARGE_BYTES", 1000)
    open_quietly(shard, log=lines.append, verify=False)
    assert not lines
    open_quietly(shard, log=lines.append)
    assert len(lines) == 1 and lines[0].startswith("train_data_dir: reading 0.0 GB once")
    open_quietly(shard, log=lines.append)
    assert len(lines) == 1
