"""What asks a run to save and end, and how Ctrl-C ends what has nothing to save.

pytest tests/training/test_interrupt.py
"""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from topogpt.training.interrupt import StopSignals
from train import train


def broken_pipe() -> int:
    """What stdout is once the tee that read it has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def broken_terminal() -> int:
    """What stdout is once its window is closed."""
    master, slave = os.openpty()
    os.close(master)
    return slave


def signals_at(step: int, *signals: int, broken: Callable[[], int] | None = None) -> None:
    """Send this process signals as soon as training step `step` is recorded, perhaps with a broken stdout."""
    from topogpt.training.log import RunLog

    record = RunLog.record

    def wrapped(self, values) -> None:
        record(self, values)
        if (values["split"], values["step"]) == ("train", step):
            if broken:
                stdout = broken()
                for stream in (1, 2, sys.stdout.fileno()):
                    os.dup2(stdout, stream)
            for number in signals:
                os.kill(os.getpid(), number)

    RunLog.record = wrapped


def test_ctrl_c_says_at_once_that_it_saves_and_twice_ends_without_a_traceback(folder, tmp_path):
    for name, signals, codes in (
        ("once", [signal.SIGINT], [0]),
        ("twice", [signal.SIGINT] * 2, [-signal.SIGINT]),
    ):
        cfg, output = tiny.config(folder, name), tmp_path / name
        accident = functools.partial(signals_at, 7, *signals)
        assert tiny.run_in_child(tiny.train_after, accident, cfg, output=output) == codes, output.read_text()
        said = output.read_text()
        assert said.count("SIGINT: saving a checkpoint, then ending; once more ends it now") == 1
        assert "Traceback" not in said and "step 8/" not in said
        assert ("stopped by a signal at step 7" in said) == (name == "once")
        assert (tiny.folder_of(cfg) / "last").resolve().name == f"step-{7 if name == 'once' else 5:06d}"


@pytest.mark.parametrize(
    "number, broken", [(signal.SIGHUP, broken_terminal), (signal.SIGINT, broken_pipe)], ids=["window", "tee"]
)
def test_a_run_saves_whose_output_nobody_reads_any_more(folder, tmp_path, number, broken):
    cfg = tiny.config(folder, broken.__name__)
    accident = functools.partial(signals_at, 7, number, broken=broken)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, output=tmp_path / "output")
    assert codes == [0], (tmp_path / "output").read_text()
    assert (tiny.folder_of(cfg) / "last").resolve().name == "step-000007"
    assert "stopped by a signal at step 7" in (tiny.folder_of(cfg) / "log.txt").read_text()


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_an_evaluation_saves_first_and_the_resumed_run_is_the_same(folder, tmp_path):
    whole, cut = (tiny.config(folder, name, max_steps=10) for name in ("whole", "cut"))
    train(whole)
    accident = functools.partial(signals_at, 8, signal.SIGUSR1)  # eval_every is 4
    codes = tiny.run_in_child(tiny.train_after, accident, cut, output=tmp_path / "output")
    assert codes == [0], (tmp_path / "output").read_text()
    assert tiny.records(tiny.folder_of(cut), "val")[-1]["step"] == 4
    state = json.loads((tiny.folder_of(cut) / "last" / "state.json").read_text())["train_state"]
    assert (state["step"], state["evaluated_at"]) == (8, 4)
    train(replace(cut, resume=True))
    runs = [tiny.folder_of(cfg) for cfg in (whole, cut)]
    assert tiny.records(runs[0]) == tiny.records(runs[1])
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_step_that_was_saved_before_its_evaluation_is_evaluated_once(folder, tmp_path):
    """It is evaluated after --resume: the checkpoint's state knows of it, and a kill repeats no record."""
    at_end, output = tiny.config(folder, "at_end", max_steps=8), tmp_path / "output"
    train(at_end)
    cut = replace(at_end, run_name="cut_at_end")
    accident = functools.partial(signals_at, 8, signal.SIGUSR1)
    assert tiny.run_in_child(tiny.train_after, accident, cut, output=output) == [0], output.read_text()
    train(replace(cut, resume=True))
    tiny.assert_same_run(tiny.folder_of(cut), tiny.folder_of(at_end))

    longer, killed = (tiny.config(folder, name, max_steps=10) for name in ("longer", "killed"))
    train(longer)
    for how, resume in (((8, signal.SIGUSR1), False), ((9, signal.SIGKILL), True)):
        accident = functools.partial(signals_at, *how)
        tiny.run_in_child(tiny.train_after, accident, replace(killed, resume=resume), output=output)
    assert [r["step"] for r in tiny.records(tiny.folder_of(killed), "val")] == [0, 4, 8]
    train(replace(killed, resume=True))
    tiny.assert_same_run(tiny.folder_of(killed), tiny.folder_of(longer))


def test_outer_signals_learn_what_inner_ones_were_told(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as outer:
        with StopSignals() as inner:
            assert not outer.received
        with StopSignals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.received
        assert outer.received and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


@pytest.mark.parametrize(
    "command, package, code, said",
    [
        (["train.py", "--run_name", "x"], "numpy", -signal.SIGINT, ""),
        (["-m", "evals.topography", "x"], "numpy", -signal.SIGINT, ""),
        (["-m", "bench.step"], "numpy", -signal.SIGINT, ""),
        (["-m", "evals.topography", "RUN"], "torch", 130, "\ninterrupted\n"),
        (["train.py", "TRAIN"], "torch", -signal.SIGINT, ""),
    ],
)
def test_ctrl_c_while_a_package_is_imported_leaves_no_traceback(
    folder, tmp_path, command, package, code, said
):
    """The package is one that is interrupted while it is imported."""
    module = tmp_path / "first" / package / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    given = {"TRAIN": tiny.arguments(tiny.config(folder, "new")), "RUN": [str(tmp_path / "run")]}
    command = [word for c in command for word in given.get(c, [c])]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tiny.ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "first")},
        capture_output=True,
        text=True,
        # a shell starts its background jobs with the signal ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (code, said), done.stderr
