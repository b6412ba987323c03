"""The outer loop: generations, resuming, mistakes. Run: pytest tests/training/test_itp.py"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

import train_itp
from topogpt.config import to_yaml
from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.model import connectome
from topogpt.settings import ItpConfig
from topogpt.training.interrupt import StopSignals

FEW = {"max_steps": 6, "generations": 3, "save_every": 2, "eval_every": 3}


def itp(folder, name: str, **settings) -> ItpConfig:
    own = {k: settings.pop(k) for k in ("generations", "prune", "per", "exempt", "inherit") if k in settings}
    cfg = tiny.config(folder, name, **settings)
    return ItpConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)} | own)


def run(cfg: ItpConfig) -> None:
    path = Path(cfg.out_dir).parent / f"{cfg.run_name}.yaml"
    path.write_text(to_yaml(dataclasses.replace(cfg, resume=False)))
    train_itp.main([str(path), *(["--resume"] if cfg.resume else [])])


@pytest.fixture(scope="module")
def whole(folder):
    run(cfg := itp(folder, "whole", **FEW))
    return tiny.folder_of(cfg)


def test_three_generations_leave_half(whole, folder):
    rows = json.loads((whole / "itp.json").read_text())["generations"]
    assert [round(r["kept"], 2) for r in rows] == [0.8, 0.64, 0.51]
    final, last = (load_file(p / connectome.FILE) for p in (whole, whole / "generation-2" / "pruned"))
    assert all((final[name] == wired).all() for name, wired in last.items())
    before = load_file(whole / "generation-2" / connectome.FILE)  # what it was trained under
    assert all(not ((final[n] != 0) & (before[n] == 0)).any() for n in final)
    weights = load_file(whole / "generation-2" / "last" / "model.safetensors")
    for name, wired in final.items():
        assert (weights[name].sign()[wired != 0] == wired[wired != 0]).all(), name
        assert not weights[name][before[name] == 0].any()
    for row, number in zip(rows[:2], (1, 2), strict=True):  # what the next one starts from
        first = tiny.records(whole / f"generation-{number}", "val")[0]
        assert first["cross_entropy"] == pytest.approx(row["cross_entropy"]["inherited"], rel=1e-6)
    assert tiny.records(whole / "generation-0", "val")[-1]["cross_entropy"] == pytest.approx(
        rows[0]["cross_entropy"]["before"], rel=1e-6
    )


def kill_at(number: int, step: int, how: int) -> None:
    from topogpt.training.log import RunLog

    record = RunLog.record

    def wrapped(self, values) -> None:
        record(self, values)
        if self.run.name == f"generation-{number}" and (values["split"], values["step"]) == ("train", step):
            os.kill(os.getpid(), how)

    RunLog.record = wrapped


def interrupted(cfg: ItpConfig, how: int, number: int = 1, step: int = 5) -> None:
    tiny.no_pictures()
    kill_at(number, step, how)
    run(cfg)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_loop_ends_with_the_same_file(whole, folder, how):
    cfg = itp(folder, f"cut{int(how)}", **FEW)
    output = folder / f"cut{int(how)}.txt"
    codes = tiny.run_in_child(interrupted, cfg, how, output=output)
    assert codes == [-9 if how == signal.SIGKILL else 0], output.read_text()
    root = tiny.folder_of(cfg)
    assert not (root / connectome.FILE).exists() and not (root / "generation-2").exists()
    log = root / "generation-0" / "log.txt"
    before = log.read_text()
    run(dataclasses.replace(cfg, resume=True))
    assert (root / connectome.FILE).read_bytes() == (whole / connectome.FILE).read_bytes()
    assert log.read_text() == before  # it was not trained again
    assert tiny.records(root / "generation-1")[-1] == tiny.records(whole / "generation-1")[-1]
    run(dataclasses.replace(cfg, resume=True))
    assert (root / connectome.FILE).read_bytes() == (whole / connectome.FILE).read_bytes()


def test_a_signal_in_the_last_step_of_a_generation_starts_no_other(folder):
    cfg, output = itp(folder, "last_step", **FEW), folder / "last_step.txt"
    assert tiny.run_in_child(interrupted, cfg, signal.SIGTERM, 0, FEW["max_steps"], output=output) == [0]
    root = tiny.folder_of(cfg)
    assert (root / "generation-0" / "last").resolve().name == "step-000006"
    assert not (root / "generation-0" / "pruned").exists() and not (root / "generation-1").exists()
    assert output.read_text().count("saving a checkpoint") == 1
    assert "stopped by a signal at generation 0; the same command with --resume" in output.read_text()


def test_rewinding_starts_each_generation_as_the_first(folder):
    run(cfg := itp(folder, "rewound", inherit="rewind", **FEW | {"generations": 2, "keep_last": 9}))
    root = tiny.folder_of(cfg)
    first, second = (
        load_file(root / f"generation-{i}" / "checkpoints" / "step-000000" / "model.safetensors")
        for i in (0, 1)
    )
    wiring = connectome.read(root / "generation-1", cfg.model).wiring
    for name, wired in wiring.items():
        assert (second[name] == first[name] * (wired != 0)).all(), name


def test_two_ranks_grow_what_one_does(whole, folder):
    cfg = itp(folder, "two", **FEW)
    output = folder / "two.txt"
    assert tiny.run_in_child(of_two, cfg, world=2, output=output) == [0, 0], output.read_text()
    ours, theirs = (load_file(root / connectome.FILE) for root in (whole, tiny.folder_of(cfg)))
    same = sum(int((ours[n] == theirs[n]).sum()) for n in ours) / sum(w.numel() for w in ours.values())
    assert same > 0.98  # sums of gradients are rounded otherwise


def of_two(cfg: ItpConfig) -> None:
    tiny.no_pictures()
    from topogpt import distributed
    from train_itp import check, grow

    corpora = check(cfg)
    with distributed.start(cfg.device) as ranks, StopSignals() as signals:
        assert isinstance(ranks, Ranks)
        grow(cfg, ranks, corpora, signals)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"generations": 0}, "generations = 0 must be"),
        ({"prune": 1.0}, "prune = 1.0 must be above 0 and below 1"),
        ({"connectome": "x"}, "connectome has no place here"),
        ({"resume": True, "run_name": "whole", "checkpoint": "last"}, "checkpoint has no place here"),
        ({"exempt": ("x",)}, "exempt = x matches no matrix"),
        ({"exempt": ("*",)}, r"exempt = \* leaves no matrix"),
        ({"resume": True, "run_name": "whole", "prune": 0.3}, "resume: prune = 0.3, but .* with 0.2"),
        ({"resume": True, "run_name": "whole", "max_steps": 7}, "resume: max_steps = 7"),
        ({"run_name": "whole"}, "whole exists; continue it with --resume"),
    ],
)
def test_mistakes_are_one_line(whole, folder, change, said):
    with pytest.raises(UserError, match=said) as error:
        train_itp.check(dataclasses.replace(itp(folder, "new", **FEW), **change))
    assert "\n" not in str(error.value)
    assert not (folder / "out" / "new").exists()
