"""A push ends complete, byte for byte, whatever happens on the way, and what was pushed can be loaded.

pytest tests/sharing/test_push.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import huggingface_hub
import pytest
import tiny
import torch
from fake_hub import TOKEN, FakeHub, Repo
from huggingface_hub import constants

import export as export_script
from topogpt import retry, topography
from topogpt.errors import UserError
from topogpt.sharing import export
from topogpt.sharing import load as hf_import
from topogpt.sharing import push as hub

# The client uploads in a way that its own HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

STEPS = [  # every request of a push: method, part of the path
    ("GET", "/api/whoami-v2"),
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/alice/run"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/objects/"),
    ("POST", "/commit/"),
    ("GET", "/refs"),
    ("POST", "/tag/"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tiny.random_run(tmp_path_factory.mktemp("out"), vocab_size=tiny.VOCAB)


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return export.export(run)


server = pytest.fixture(fake_hub.serve)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pushed(server: FakeHub, name: str = "alice/run") -> dict[str, bytes]:
    return {path: data for path, data in server.repos[name].files.items() if path != ".gitattributes"}


def secrets_in(text: str) -> list[str]:
    return [secret for secret in (TOKEN, "secret-signature") if secret in text]


# ---- pushing --------------------------------------------------------------------------------------


def test_a_push_is_complete_and_tagged(server, folder, capfd):
    assert hub.push(folder, "alice/run") == f"{server.url}/alice/run"
    assert pushed(server) == contents(folder)
    repo = server.repos["alice/run"]
    assert repo.tags == {"step-8": repo.commits[-1][0]} and not repo.private
    assert not [request for request in server.unknown if "agent" not in request]
    assert secrets_in("".join(capfd.readouterr())) == []


def test_pushing_again_changes_nothing(server, folder):
    hub.push(folder, "alice/run")
    commits = list(server.repos["alice/run"].commits)
    hub.push(folder, "alice/run")
    assert server.repos["alice/run"].commits == commits


def test_a_step_that_is_pushed_anew_moves_its_tag_and_others_stay(server, run, folder, tmp_path):
    hub.push(folder, "alice/run")
    repo = server.repos["alice/run"]
    first = repo.commits[-1][0]
    later = export.export(run, out=tmp_path / "hf", dtype="bfloat16")
    hub.push(later, "alice/run", step=9)
    assert repo.tags == {"step-8": first, "step-9": repo.commits[-1][0]}
    hub.push(later, "alice/run")
    assert repo.tags == {"step-8": repo.commits[-1][0], "step-9": repo.commits[-1][0]}
    assert pushed(server) == contents(later)


@pytest.mark.parametrize("kind", [429, 500, 503, "hang", "cut", "late"])
def test_every_request_may_fail_once(server, folder, kind, capfd):
    """A status, no answer in time, a cut connection, and a request carried out whose answer is lost."""
    server.accidents = [(method, path, kind) for method, path in STEPS]
    lines = []
    name = hub.full_name("run", lines.append)
    hub.push(folder, name, say=lines.append)
    skipped = set() if kind == "late" else {"/api/validate-yaml"}  # the client itself passes over its failure
    assert [a for a in server.accidents if a[1] not in skipped] == []
    assert pushed(server) == contents(folder)
    assert server.repos[name].tags == {"step-8": server.repos[name].commits[-1][0]}
    assert len(lines) >= 6 and all(line.startswith("push: ") and "\n" not in line for line in lines)
    assert any("; try " in line for line in lines)
    if kind == 429:
        assert {wait for wait in server.waits if wait <= 2} and max(server.waits) <= retry.FIRST_WAIT_SECONDS
    assert secrets_in("".join(lines) + "".join(capfd.readouterr())) == []


@pytest.mark.parametrize("method, path", [("POST", "/commit/"), ("PUT", "/objects/"), ("POST", "/tag/")])
def test_a_push_that_fails_for_good_is_completed_later(server, folder, method, path):
    before, lines = contents(folder), []
    server.accidents = [(method, path, 500)] * 200
    with pytest.raises(hub.PushFailed) as error:
        hub.push(folder, "alice/run", True, say=lines.append)
    message = str(error.value)
    assert "failed: 500 an accident" in message and "\n" not in message
    assert message.endswith(f"push it later with: python export.py {folder} --push_to_hf alice/run --private")
    assert secrets_in(message + "".join(lines)) == [] and contents(folder) == before
    server.accidents = []
    export_script.main([str(folder), "--push_to_hf", "alice/run", "--private"])
    assert pushed(server) == before and "step-8" in server.repos["alice/run"].tags
    assert server.repos["alice/run"].private


def test_the_hub_says_how_long_to_wait(server, folder):
    server.accidents = [("POST", "/tag/", 429)]
    hub.push(folder, "alice/run", say=lambda line: None)
    assert server.waits == [1.0]


# ---- what cannot be pushed -------------------------------------------------------------------------


def refusal(*args, **more) -> str:
    with pytest.raises(UserError) as error:
        hub.push(*args, say=lambda line: None, **more)
    assert "\n" not in str(error.value) and secrets_in(str(error.value)) == []
    return str(error.value)


def test_without_a_token(server, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert not hub.has_token()
    said = refusal(folder, "alice/run")
    assert (
        "no token of the Hub was found" in said
        and f"python export.py {folder} --push_to_hf alice/run" in said
    )
    with pytest.raises(hub.PushFailed, match="has no user, and none is logged in; give USER/NAME"):
        hub.full_name("run")
    assert server.requests == []


def test_a_login_is_a_token_too(server, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert hub.full_name("run") == "alice/run"


def test_what_is_not_ours(server, folder):
    server.repos["bob/run"] = Repo()
    assert "bob/run is not yours, or the token may not write to it (403)" in refusal(folder, "bob/run")
    assert "(403)" in refusal(folder, "carol/new")
    assert server.repos["bob/run"].tags == {} and len(server.repos["bob/run"].commits) == 1


def test_a_wrong_token(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token (401)" in refusal(folder, "alice/run")


def test_a_repository_with_something_else_is_left_alone(server, folder):
    hub.push(folder, "alice/run")
    repo = server.repos["alice/run"]
    repo.commits = repo.commits[:1]
    repo.commit({"thesis.safetensors": b"years of work"}, "mine")
    assert "repository with other files (thesis.safetensors)" in refusal(folder, "alice/run")


def test_what_should_be_private_is_not_published(server, folder):
    hub.push(folder, "alice/run")
    assert "is public, but --private was asked for" in refusal(folder, "alice/run", private=True)


def test_without_a_network(server, folder, monkeypatch):
    server.shutdown()
    server.server_close()
    said = refusal(folder, "alice/run")
    assert "creating the repository failed: ConnectError" in said and "push it later" in said
    assert len(server.waits) == hub.TRIES - 1


def test_where_the_hub_is_switched_off(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "switched off here (HF_HUB_OFFLINE)" in refusal(folder, "alice/run")
    assert server.waits == []


@pytest.mark.parametrize("name", ["a b", "https://huggingface.co/alice/run", "a/b/c", ""])
def test_a_name_that_is_none(name):
    with pytest.raises(UserError, match="is no name of a repository; give USER/NAME"):
        hub.full_name(name)


def test_a_folder_that_is_no_export(server, folder, tmp_path):
    assert "has no config.json" in refusal(tmp_path, "alice/run")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    assert "has 1 words in vocab.json but vocab_size = 64 in config.json" in refusal(tmp_path, "alice/run")
    (tmp_path / "topography.json").write_text("{}")
    assert "is damaged (KeyError: 'step')" in refusal(tmp_path, "alice/run")
    assert server.requests == []


def test_the_client_is_left_as_it_was(server, folder):
    hub.push(folder, "alice/run")
    assert huggingface_hub.get_session().timeout.read is None


# ---- loading ---------------------------------------------------------------------------------------


def test_what_was_pushed_is_loaded_by_its_name(server, folder, run, tmp_path):
    hub.push(folder, "alice/run")
    half = export.export(run, out=tmp_path / "hf", dtype="bfloat16")
    hub.push(half, "alice/run", step=9)
    there, here = hf_import.load_model("alice/run", "step-8"), hf_import.load_model(folder)
    assert torch.equal(there.model.lm_head.weight, here.model.lm_head.weight)
    newest = hf_import.load_model("alice/run").model.lm_head.weight
    assert torch.equal(newest, here.model.lm_head.weight.bfloat16().float())
    assert not torch.equal(newest, here.model.lm_head.weight)
    assert topography.load_topography("alice/run").positions.keys() == here.positions.keys()


def test_a_name_that_the_hub_does_not_know(server):
    with pytest.raises(UserError, match="nobody/nothing is no folder here and could not be fetched") as error:
        hf_import.load_model("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="could not be read from the Hub"):
        topography.load_topography("nobody/nothing")
    with pytest.raises(UserError, match="neither a folder nor the name of a repository"):
        hf_import.load_model("no/such/folder")


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_pushes_the_real_thing(run, tmp_path):
    """export.py in a process of its own, with nothing replaced: only the address of the Hub is ours."""
    with FakeHub() as server:
        server.accidents = [("PUT", "/objects/", 429), ("POST", "/tag/", "cut")]
        env = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HOME": str(tmp_path / "home")}
        out = tmp_path / "hf"
        done = subprocess.run(
            [sys.executable, "export.py", str(run), "--out", str(out), "--push_to_hf", "--private"],
            cwd=tiny.ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"pushed: {server.url}/alice/run\n")
        assert "; try 2 of 4 in 2 s" in done.stdout and "429" in done.stdout
        assert pushed(server) == contents(out) and server.repos["alice/run"].private
        assert secrets_in(done.stdout + done.stderr) == []
        assert 'snapshot_download("alice/run")' in (out / "README.md").read_text()
        server.shutdown()


def test_the_command_keeps_the_folder_where_it_cannot_push(server, run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "hf"
    for name, later in (("--push_to_hf", "USER/NAME"), ("--push_to_hf=alice/run", "alice/run")):
        with pytest.raises(hub.PushFailed, match=f"python export.py {out} --push_to_hf {later}"):
            export_script.main([str(run), "--out", str(out), name])
        assert json.loads((out / "topography.json").read_text())["step"] == 8


def test_an_exported_folder_is_pushed_by_the_same_command(server, folder, capsys):
    export_script.main([str(folder), "--push_to_hf", "alice/run", "--private"])
    assert capsys.readouterr().out.endswith(f"pushed: {server.url}/alice/run\n")
    assert pushed(server) == contents(folder)
    for arguments, said in (
        ([], "is exported already; push it with --push_to_hf USER/NAME"),
        (["--push_to_hf"], "is exported already"),
        (["--push_to_hf", "alice/run", "--dtype", "float16"], "dtype = float16 has no effect"),
        (["--push_to_hf", "alice/run", "--checkpoint", "last"], "checkpoint = last has no effect"),
    ):
        with pytest.raises(UserError, match=said):
            export_script.main([str(folder), *arguments])
