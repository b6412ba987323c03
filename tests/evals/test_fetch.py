"""Public stimuli are fetched once, checked, and kept; whatever goes wrong is said in one line.

pytest tests/evals/test_fetch.py
"""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

from evals import fetch
from topogpt import retry
from topogpt.analysis import stimuli
from topogpt.errors import UserError, user_errors

REAL = tiny.ROOT.parent / "shared" / "data" / "stimuli"
FILES = {"words.csv": b"item,condition\na,x\n", "folder/more.csv": b"item,condition\nb,y\n" * 500}


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives FILES, after the troubles that are listed for them."""

    def do_GET(self):
        name = self.path[1:]
        self.server.asked.append(name)
        trouble = self.server.troubles.get(name, [])
        now = trouble.pop(0) if trouble else 200
        body = b"<html>log in first</html>" if now == "another" else FILES.get(name, b"")
        self.send_response(now if isinstance(now, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if now == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif now == "slow":
            self.server.done.wait(60)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of FILES on this machine, in the place of the true ones; it waits for nobody."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.troubles, server.done = [], {}, threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/"
        sources = {n: fetch.Source(address + n, hashlib.sha256(d).hexdigest(), "") for n, d in FILES.items()}
        monkeypatch.setattr(fetch, "TABLE", sources)
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def no_socket(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opens a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def there(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ends(argv: list[str], capsys) -> str:
    """The one line that a mistake ends with."""
    with pytest.raises(SystemExit) as stop, user_errors():
        fetch.main(argv)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# ---- what works -------------------------------------------------------------------------------------


def test_all_files_come_into_the_folder(server, tmp_path, capsys):
    fetch.main(["--stimuli_dir", str(tmp_path / "new" / "folder")])
    assert there(tmp_path / "new" / "folder") == FILES
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in said[:2]] == ["fetched", "fetched"]
    assert said[-1] == f"the stimuli lie in {tmp_path / 'new' / 'folder'}"
    modes = {p.stat().st_mode for p in (tmp_path / "new").rglob("*.csv")}
    (tmp_path / "mine").touch()
    assert modes == {(tmp_path / "mine").stat().st_mode}  # who may read what I write may read these


def test_what_is_there_is_kept_without_a_socket(server, tmp_path, capsys, no_socket):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    fetch.main(["--stimuli_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("there already") == 2 and server.asked == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_damaged_file_is_said_and_fetched_again(server, tmp_path, capsys):
    (tmp_path / "words.csv").write_bytes(FILES["words.csv"][:-1])
    fetch.main(["--stimuli_dir", str(tmp_path)])
    assert f"{tmp_path / 'words.csv'} is damaged" in capsys.readouterr().out
    assert there(tmp_path) == FILES


@pytest.mark.parametrize("trouble", [503, 429, "cut"])
def test_what_may_pass_is_tried_again(server, tmp_path, capsys, trouble):
    server.troubles["folder/more.csv"] = [trouble, trouble]
    fetch.main(["--stimuli_dir", str(tmp_path)])
    assert there(tmp_path) == FILES and server.asked.count("folder/more.csv") == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "more.csv: " in line]
    assert len(said) == 2 and said[1].endswith("try 3 of 4 in 0 s")


def test_the_wait_between_tries_doubles(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    server.troubles["words.csv"] = [503, 503, 503]
    fetch.main(["--stimuli_dir", str(tmp_path)])
    assert waits == [1, 2, 4]


# ---- what does not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble, tries, reason",
    [
        ([404], 1, "status 404"),
        ([503] * 4, 4, "status 503"),
        (["cut"] * 4, 4, "IncompleteRead"),
        (["another"], 1, "what came has SHA-256"),
        (["slow"] * 4, 4, "timed out"),
    ],
)
def test_a_failure_names_address_reason_and_remedy(
    server, tmp_path, capsys, monkeypatch, trouble, tries, reason
):
    monkeypatch.setattr(fetch, "READ_SECONDS", 0.2)
    server.troubles["folder/more.csv"] = trouble
    line = ends(["--stimuli_dir", str(tmp_path)], capsys)
    assert fetch.TABLE["folder/more.csv"].address in line and reason in line
    assert f"into {tmp_path} by hand" in line and "--list" in line
    assert server.asked.count("folder/more.csv") == tries
    assert there(tmp_path) == {"words.csv": FILES["words.csv"]}  # and no half or temporary file


def test_a_damaged_file_stays_where_nothing_better_comes(server, tmp_path, capsys):
    (tmp_path / "words.csv").write_bytes(b"mine")
    server.troubles["words.csv"] = [404]
    ends(["--stimuli_dir", str(tmp_path)], capsys)
    assert there(tmp_path) == {"words.csv": b"mine"}


def test_without_a_network_the_reason_is_said(server, tmp_path, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        source = fetch.Source(f"http://127.0.0.1:{closed.getsockname()[1]}/words.csv", "0" * 64, "")
        monkeypatch.setattr(fetch, "TABLE", {"words.csv": source})
        line = ends(["--stimuli_dir", str(tmp_path)], capsys)
    assert source.address in line and "refused" in line and line.count("words.csv") == 1


def test_a_folder_that_cannot_be_made_or_written(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    line = ends(["--stimuli_dir", str(tmp_path / "file" / "stimuli")], capsys)
    assert f"{tmp_path / 'file' / 'stimuli' / 'words.csv'} cannot be" in line and "--stimuli_dir" in line
    (tmp_path / "words.csv").mkdir()
    line = ends(["--stimuli_dir", str(tmp_path)], capsys)
    assert "words.csv cannot be read: Is a directory" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(server, tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        line = ends(["--stimuli_dir", str(tmp_path)], capsys)
    finally:
        tmp_path.chmod(0o700)
    assert "words.csv cannot be written: Permission denied; choose another --stimuli_dir" in line


def test_a_full_disk_leaves_nothing_half_written(server, tmp_path, monkeypatch):
    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="words.csv cannot be written: No space left on device"):
        fetch.fetch(tmp_path)
    assert there(tmp_path) == {}


# ---- the table --------------------------------------------------------------------------------------


def test_the_list_is_all_there_is_to_know(capsys, no_socket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fetch.TABLE) == 13
    for line, (name, source) in zip(lines, fetch.TABLE.items(), strict=True):
        assert line.split("  ")[:3] == [name, source.address, source.sha256] and "20" in source.paper
        assert source.address.startswith("https://") and len(source.sha256) == 64
    assert there(tmp_path) == {}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the public stimuli in {REAL}")
def test_the_table_is_of_the_files_that_the_analyses_read(capsys, no_socket):
    fetch.fetch(REAL)
    assert capsys.readouterr().out.count("there already") == 13
    known = {p.relative_to(REAL).as_posix() for p in REAL.rglob("*.csv")}
    assert known == set(fetch.TABLE)
    assert len(stimuli.localizer(REAL / "fedorenko2010_localizer").items) == 480


def test_help_answers_at_once_and_a_wrong_flag_in_one_line():
    command = [sys.executable, "-m", "evals.fetch"]
    done = subprocess.run([*command, "--help"], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--stimuli_dir" in done.stdout
    done = subprocess.run([*command, "--stimuli", "x"], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--stimuli_dir" not in done.stdout
    code = "import sys, evals.fetch; print([m for m in ('torch', 'requests', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
