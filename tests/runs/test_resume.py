"""A run that was killed, stopped or finished goes on as if nothing had happened.

pytest tests/runs/test_resume.py
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from topogpt.model.gpt import sheet_names
from topogpt.runs.checkpoint import load_run
from train import train

N = 18  # steps; checkpoints at 0, 5, 10, 15, 18 and after every best evaluation (each 4 steps)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run of N steps that nothing interrupts, with dropout and sampled neighbourhoods."""
    cfg = tiny.config(folder, "whole", max_steps=N)
    assert cfg.model.dropout > 0 and cfg.topo.neighbourhoods < 4  # of the 4 there are: chance matters
    assert train(cfg).step == N
    return tiny.folder_of(cfg)


def signal_at(step: int, *signals: int) -> None:
    """Send this process signals as soon as training step `step` is recorded."""
    from topogpt.training.log import RunLog

    record = RunLog.record

    def wrapped(self, values) -> None:
        record(self, values)
        if (values["split"], values["step"]) == ("train", step):
            for number in signals:
                os.kill(os.getpid(), number)

    RunLog.record = wrapped


def test_a_run_killed_from_outside_goes_on_bit_for_bit(folder, whole, tmp_path):
    cfg = tiny.config(folder, "killed_from_outside", max_steps=N)
    slow = (  # the script itself, with a pause after every record, so that there is time to kill it
        "import runpy, sys, time; from topogpt.training import log; sys.argv[0] = 'train.py'; "
        "record = log.RunLog.record; "
        "log.RunLog.record = lambda self, values: (record(self, values), time.sleep(0.1)); "
        "import tiny; tiny.no_pictures(); runpy.run_path('train.py', run_name='__main__')"
    )
    with (tmp_path / "output").open("wb") as output:
        command = [sys.executable, "-c", slow, *tiny.arguments(cfg)]
        process = subprocess.Popen(command, cwd=tiny.ROOT, stdout=output, stderr=subprocess.STDOUT)
    metrics = tiny.folder_of(cfg) / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or metrics.exists() and '"step": 12, ' in metrics.read_text():
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    reached = max(r["step"] for r in tiny.records(tiny.folder_of(cfg)))
    saved = json.loads((tiny.folder_of(cfg) / "last" / "state.json").read_text())["train_state"]["step"]
    assert 0 < saved < reached < N

    assert train(replace(cfg, resume=True)).step == N
    tiny.assert_same_run(tiny.folder_of(cfg), whole)


def test_a_record_cut_off_by_a_kill_is_dropped(folder, whole, tmp_path):
    cfg = tiny.config(folder, "cut_off", max_steps=N)
    accident = functools.partial(signal_at, 14, signal.SIGKILL)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, output=tmp_path / "output")
    assert codes == [-signal.SIGKILL], (tmp_path / "output").read_text()
    with (tiny.folder_of(cfg) / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 15, "split": "tra')
    train(replace(cfg, resume=True))
    tiny.assert_same_run(tiny.folder_of(cfg), whole)


def test_sigterm_saves_and_ends_with_exit_code_0_and_resuming_is_exact(folder, whole, tmp_path):
    cfg = tiny.config(folder, "terminated", max_steps=N)
    accident = functools.partial(signal_at, 7, signal.SIGTERM)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, output=tmp_path / "output")
    output = (tmp_path / "output").read_text()
    assert codes == [0], output
    assert "signal at step 7" in output and "--resume" in output
    assert (tiny.folder_of(cfg) / "last").resolve().name == "step-000007"
    train(replace(cfg, resume=True))
    tiny.assert_same_run(tiny.folder_of(cfg), whole)


def test_a_second_signal_ends_at_once(folder, tmp_path):
    cfg = tiny.config(folder, "impatient")
    accident = functools.partial(signal_at, 7, signal.SIGTERM, signal.SIGTERM)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, output=tmp_path / "output")
    assert codes == [-signal.SIGTERM], (tmp_path / "output").read_text()
    assert (tiny.folder_of(cfg) / "last").resolve().name == "step-000005"


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(folder, whole):
    cfg = tiny.config(folder, "longer", max_steps=7)
    train(cfg)
    train(replace(cfg, max_steps=N, resume=True))
    tiny.assert_same_tensors(tiny.folder_of(cfg) / "last", whole / "last")
    assert tiny.records(tiny.folder_of(cfg), "train") == tiny.records(whole, "train")


def test_the_sheets_of_more_than_ten_layers_keep_their_order(folder):
    """By name, layer.10 would come before layer.2, and draw its neighbourhoods."""
    runs = []
    for name, first in (("deep", 4), ("deep_at_once", 2)):
        cfg = tiny.config(
            folder, name, model={"n_layer": 11}, max_steps=first, eval_every=100, save_every=100
        )
        train(cfg)
        train(replace(cfg, max_steps=4, resume=True))
        runs.append(tiny.folder_of(cfg))
    tiny.assert_same_tensors(runs[0] / "last", runs[1] / "last")
    assert list(load_run(runs[0]).positions) == sheet_names(11)


@pytest.mark.parametrize("max_steps", [N, 10])  # as many as are done; fewer
def test_resuming_a_finished_run_changes_nothing_and_says_so(folder, whole, capsys, max_steps):
    run = tiny.folder_of(tiny.config(folder, f"again_{max_steps}"))
    shutil.copytree(whole, run, symlinks=True)
    state = train(tiny.config(folder, run.name, max_steps=max_steps, resume=True))
    assert state.step == N
    assert "nothing is left to train" in capsys.readouterr().out
    tiny.assert_same_run(run, whole)


# ---- killed while files are written ------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle_of_a_file() -> None:
    """The second optimizer.pt is half there."""
    save, calls = torch.save, []

    def half(content, file):
        calls.append(file)
        save(content, file)
        if len(calls) == 2:
            file.truncate(file.tell() // 2)
            kill()

    torch.save = half


def kill_before_the_renaming() -> None:
    """All files of the second checkpoint are there, but it does not have its name yet."""
    rename, calls = Path.rename, []

    def wrapped(self, target):
        if Path(target).name.startswith("step-"):
            calls.append(target)
        if len(calls) == 2:
            kill()
        return rename(self, target)

    Path.rename = wrapped


def kill_at_link(n: int) -> None:
    """The second checkpoint has its name; kill at the n-th link."""
    symlink, calls = Path.symlink_to, []

    def wrapped(self, *args):
        calls.append(self)
        if len(calls) == n:
            kill()
        symlink(self, *args)

    Path.symlink_to = wrapped


def kill_in_the_middle_of_deleting() -> None:
    """The first old checkpoint to go has lost a file, but not all."""
    rmtree = shutil.rmtree

    def wrapped(path, *args, **kwargs):
        if Path(path).is_dir() and "step-" in Path(path).name:
            (Path(path) / "optimizer.pt").unlink()
            kill()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = wrapped


def kill_at_the_first_evaluation() -> None:
    """Nothing is saved yet, but the evaluation before the first step is recorded."""
    from topogpt.runs import checkpoint

    checkpoint.save = lambda *args: kill()


ACCIDENTS = {
    "in_the_middle_of_a_file": (kill_in_the_middle_of_a_file, "step-000000"),
    "before_the_renaming": (kill_before_the_renaming, "step-000000"),
    "before_last_is_set": (functools.partial(kill_at_link, 3), "step-000004"),
    "before_best_is_set": (functools.partial(kill_at_link, 4), "step-000004"),
    "while_an_old_one_is_deleted": (kill_in_the_middle_of_deleting, None),
    "at_the_first_evaluation": (kill_at_the_first_evaluation, None),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_a_kill_while_saving_leaves_a_whole_checkpoint_in_force(folder, whole, tmp_path, capsys, name):
    accident, expected = ACCIDENTS[name]
    cfg = tiny.config(folder, f"killed_{name}", max_steps=N)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, output=tmp_path / "output")
    assert codes == [-signal.SIGKILL], (tmp_path / "output").read_text()
    if expected:
        checkpoints = tiny.folder_of(cfg) / "checkpoints"
        assert max(p.name for p in checkpoints.glob("step-*")) == expected
        half = list(checkpoints.glob(".*.tmp"))
        assert bool(half) == (expected == "step-000000")  # what was being written lies under a temporary name

    train(replace(cfg, resume=True))
    start = int(expected[5:]) if expected else 0
    output = capsys.readouterr().out
    if expected:
        assert (f"resuming at step {start}" if start else "starting") in output
    tiny.assert_same_run(tiny.folder_of(cfg), whole)


def test_best_is_right_as_soon_as_a_run_is_resumed(folder, tmp_path):
    """Killed between the renaming and the link: `best` must not stay behind until the next save."""
    cfg = tiny.config(folder, "stale_best", max_steps=4, save_every=100)  # the best one is the last one
    codes = tiny.run_in_child(
        tiny.train_after, functools.partial(kill_at_link, 4), cfg, output=tmp_path / "output"
    )
    assert codes == [-signal.SIGKILL]
    assert (tiny.folder_of(cfg) / "best").resolve().name == "step-000000"
    longer = replace(cfg, max_steps=6, eval_every=5, resume=True, optim=replace(cfg.optim, lr=1.0))  # worsens
    state = train(longer)
    assert state.best_step == 4
    assert (tiny.folder_of(cfg) / "best").resolve().name == "step-000004"
