"""One process at a time writes into the folder of a run. Run: pytest tests/runs/test_lock.py"""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import yaml

import train_itp
from topogpt.errors import UserError
from topogpt.runs import lock, seal
from topogpt.settings import ItpConfig
from topogpt.training import preflight

HOLD = "import sys; from pathlib import Path; from topogpt.runs import lock\n"
HOLD += "with lock.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(folder):
    """Another process that writes into the run called held."""
    run = folder / "out" / "held"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tiny.ROOT
    )
    assert process.stdout.readline() == b"held\n"
    (run / "config.yaml").touch()
    yield process
    process.kill()
    process.communicate()
    (run / "config.yaml").unlink()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_another_process_writes_is_left_alone_and_its_holder_named(folder, holder, how):
    cfg = tiny.config(folder, "held", **how)
    named = rf"^run .*/held is being written by process {holder.pid} on {socket.gethostname()} \(started 20"
    for attempt in (lambda: preflight.check(cfg), lambda: preflight.locked(cfg).__enter__()):
        with pytest.raises(UserError, match=named) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in (folder / "out" / "held").iterdir()) == [".lock", "config.yaml"]


def test_a_connectome_that_grows_elsewhere_is_left_alone(folder, holder):
    given = {key: getattr(tiny.config(folder, "held"), key) for key in tiny.config(folder).__dict__}
    with pytest.raises(UserError, match=rf"written by process {holder.pid} "):
        train_itp.check(ItpConfig(**given | {"overwrite": True}))


def test_the_lock_is_gone_with_its_process(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.held(folder / "out" / "held"):
        assert f"process {os.getpid()} on" in (folder / "out" / "held" / ".lock").read_text()
    assert not (folder / "out" / "held" / ".lock").exists()


def pause() -> None:
    """Make a run last, so that the other one finds it at work."""
    from topogpt.training.log import RunLog

    record = RunLog.record
    RunLog.record = lambda self, values: (record(self, values), time.sleep(0.1))


def test_of_two_starts_at_once_one_runs(folder, tmp_path):
    cfgs = [tiny.config(folder, "twice", seed=seed, max_steps=6) for seed in (1, 2)]

    def start(cfg) -> int:
        return tiny.run_in_child(tiny.train_after, pause, cfg, output=tmp_path / f"{cfg.seed}")[0]

    with ThreadPoolExecutor() as pool:
        codes = dict(zip((1, 2), pool.map(start, cfgs), strict=True))
    output = {seed: (tmp_path / f"{seed}").read_text() for seed in codes}
    assert sorted(codes.values()) == [0, 2], output
    winner, loser = sorted(codes, key=codes.get)
    assert "is being written by process" in output[loser] or "twice exists" in output[loser]
    run = folder / "out" / "twice"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == winner
    assert seal.check(run / "last")["config"]["seed"] == winner
    assert [r["step"] for r in tiny.records(run, "train")] == list(range(1, 7))


def test_a_start_that_fails_leaves_no_folder(folder):
    cfg = tiny.config(folder, "fails", train_data_dir=("nowhere",))
    with pytest.raises(UserError, match="nowhere"), preflight.locked(cfg):
        pass
    new = tiny.config(folder, "fails", resume=True)
    with pytest.raises(UserError, match="there is no run"), preflight.locked(new):
        pass
    assert not tiny.folder_of(cfg).exists()


def test_a_folder_that_holds_a_lock_alone_is_free(folder):
    """What a start leaves that was killed before it wrote anything."""
    run = folder / "out" / "killed_at_once"
    run.mkdir(parents=True)
    (run / ".lock").write_text("process 1 on elsewhere\n")
    with preflight.locked(tiny.config(folder, run.name)) as found:
        assert found.resume_from is None


def test_other_ranks_do_not_lock(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with lock.held(folder / "out" / "of_rank_0"):
        assert not (folder / "out" / "of_rank_0").exists()


def test_a_file_system_without_locks_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.held(tmp_path / "run"):
        pass
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and said.count("\n") == 1 and "No locks available" in said


def test_a_lock_taken_away_between_opening_and_locking_is_made_anew(tmp_path, monkeypatch):
    """The holder before ends just then: what is locked must be the file that lies there."""
    run, flock, calls = tmp_path / "run", fcntl.flock, []

    def late(file, how) -> None:
        if not calls:
            Path(file.name).unlink()
        calls.append(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(run):
        assert len(calls) == 2 and f"process {os.getpid()}" in (run / ".lock").read_text()
