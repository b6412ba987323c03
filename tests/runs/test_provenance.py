"""What provenance.json keeps of the code's state. Run: pytest tests/runs/test_provenance.py"""

import subprocess

import pytest

from topogpt.errors import masked
from topogpt.runs import provenance

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A repository with a file that may be changed, and the code in it."""

    def git(*arguments: str) -> None:
        me = ["-c", "user.name=me", "-c", "user.email=me@here"]
        subprocess.run(["git", *me, *arguments], cwd=tmp_path, check=True)

    path = tmp_path / "file.txt"
    path.write_text("first\n")
    git("init", "--quiet")
    git("add", "file.txt")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code.py"))
    return path


def test_a_diff_of_any_bytes_is_kept(changed):
    assert provenance.git("diff", "HEAD") == "" and not provenance.code()["changed"]
    changed.write_bytes("caf\xe9\n".encode("latin-1"))
    assert "+caf\ufffd" in provenance.git("diff", "HEAD")
    assert provenance.code()["changed"] and len(provenance.code()["git_sha"]) == 40


def test_a_long_diff_is_cut(changed):
    changed.write_text("some words\n" * 500_000)
    diff = provenance.git("diff", "HEAD")
    assert 1_000_000 < len(diff) < 1_000_100 and diff.endswith("... cut here: more than 1,000,000 bytes")


def test_secrets_in_a_diff_are_masked(changed):
    changed.write_text(f"HF_TOKEN={TOKEN}\nname = 1\n")
    diff = provenance.git("diff", "HEAD")
    assert TOKEN not in diff and "+HF_TOKEN=***" in diff and "+name = 1" in diff


def test_no_repository_and_no_git_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code.py"))
    assert provenance.git("rev-parse", "HEAD") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git("rev-parse", "HEAD") is None


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"login({TOKEN!r})", "login('***')"),
        ("ghp_" + "a1" * 18 + " github_pat_" + "a1_" * 12, "*** ***"),
        ('WANDB_API_KEY: "' + "0a1b" * 10 + '"', 'WANDB_API_KEY: "***"'),
        ("password = hunter2hunter2hunter2", "password = ***"),
        ("https://me:secret@host/path", "https://***@host/path"),
        ("sk-proj-" + "aB3_" * 6, "***"),
        # what the code is full of is no secret
        ("tokens = words.encode_document(TEXT).tolist()", None),
        ("max_tokens=1_000_000, token = tokenizer.encode", None),
        ("hf_import_load_model(x); https://host/a:b@c", None),
        ("index 0497709..62c197a 100644", None),
    ],
)
def test_what_looks_like_a_secret(text, expected):
    assert masked(text) == (text if expected is None else expected)
