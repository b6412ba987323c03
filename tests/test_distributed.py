"""Several processes compute what one does. Run: pytest tests/test_distributed.py"""

import functools
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.ranks import first_node, read_place, set_rendezvous
from topogpt.training import preflight
from topogpt.training.interrupt import StopSignals
from train import train

# A learning rate so large that validation gets worse and training stops early. Micro-batches are of two
# sequences with one rank as with two, so each holds the same sequences, neighbourhoods and dropout.
STORMY = {
    "max_steps": 40,
    "eval_every": 3,
    "patience": 2,
    "optim": {"lr": 0.1, "min_lr": 0.1},
    "topo": {"loss": "topolm+toponets+wiring", "factor_h": 4.0, "factor_w": 4.0},  # of both kinds
}


@pytest.fixture(scope="module")
def one_rank(folder) -> Path:
    cfg = tiny.config(folder, "one_rank", **STORMY)
    train(cfg)
    return tiny.folder_of(cfg)


@pytest.fixture(scope="module")
def two_ranks(folder) -> Path:
    """The same through torchrun and the script, as a user starts it; the output is beside the run."""
    cfg = tiny.config(folder, "two_ranks", **STORMY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with (folder / "two_ranks.txt").open("w") as output:
        done = subprocess.run(
            [*torchrun, "train.py", *tiny.arguments(cfg)],
            cwd=tiny.ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
    assert done.returncode == 0, (folder / "two_ranks.txt").read_text()
    return tiny.folder_of(cfg)


def assert_close_records(ours: list[dict], theirs: list[dict], rtol: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                assert value == pytest.approx(b[key], rel=rtol, abs=1e-6), (a["step"], a["split"], key)
            elif not isinstance(value, dict):
                assert value == b[key], (a["step"], a["split"], key)


def test_two_ranks_report_what_one_rank_with_twice_the_micro_steps_reports(one_rank, two_ranks):
    keys = {"cross_entropy", "spatial_loss", "toponets", "wiring", "loss", "lr", "grad_norm", "tokens"}
    assert keys <= tiny.records(one_rank, "train")[0].keys()
    for split in ("train", "val"):
        assert_close_records(tiny.records(two_ranks, split), tiny.records(one_rank, split))


def test_two_ranks_stop_early_at_the_step_at_which_one_does(one_rank, two_ranks):
    ours, theirs = (
        json.loads((run / "last" / "state.json").read_text())["train_state"] for run in (two_ranks, one_rank)
    )
    assert ours["step"] == theirs["step"] < STORMY["max_steps"]
    assert ours["increases"] == theirs["increases"] == STORMY["patience"]
    assert ours["best_step"] == theirs["best_step"]
    for run in (one_rank, two_ranks):
        assert "stopped early" in (run / "log.txt").read_text()


def test_two_ranks_end_with_the_weights_of_one(one_rank, two_ranks):
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in (two_ranks, one_rank))
    start = load_file(one_rank / "best" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=1e-4, atol=1e-5)
    assert not torch.equal(theirs["transformer.wte.weight"], start["transformer.wte.weight"])


def test_only_the_main_rank_writes_and_speaks(one_rank, two_ranks, folder):
    assert (two_ranks / "log.txt").read_text().count("2 x CPU") == 1
    output = (folder / "two_ranks.txt").read_text()
    assert output.count("2 x CPU") == output.count("stopped early") == 1
    assert "Warning" not in output, output
    assert len(json.loads((two_ranks / "provenance.json").read_text())) == 1
    assert len(tiny.records(two_ranks)) == len(tiny.records(one_rank))


# ---- gradients ---------------------------------------------------------------------------------------------


def keep_gradients(path: Path) -> None:
    """Save the gradients that the first step clips, on the main rank."""
    clip = torch.nn.utils.clip_grad_norm_

    def wrapped(parameters, *args, **kwargs):
        parameters = list(parameters)
        if not path.exists() and os.environ.get("RANK", "0") == "0":
            torch.save([p.grad.clone() for p in parameters], path)
        return clip(parameters, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = wrapped


@pytest.mark.parametrize("loss", ["topolm", "none"])
def test_two_ranks_compute_the_gradient_of_one(folder, tmp_path, loss):
    for world in (1, 2):
        cfg = tiny.config(folder, f"gradient_{loss}_{world}", max_steps=1, topo={"loss": loss})
        keep = functools.partial(keep_gradients, tmp_path / f"{world}.pt")
        codes = tiny.run_in_child(tiny.train_after, keep, cfg, world=world, output=tmp_path / "output")
        assert codes == [0] * world, (tmp_path / "output").read_text()
    ours, theirs = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (2, 1))
    assert len(ours) == len(theirs) > 5
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- another number of ranks; signals; mistakes ------------------------------------------------------------


def test_one_rank_resumes_what_two_began_with_the_same_data_order(folder, tmp_path):
    whole = tiny.config(folder, "whole")
    train(whole)
    cfg = tiny.config(folder, "begun_by_two", max_steps=8)
    codes = tiny.run_in_child(tiny.train_after, tiny.nothing, cfg, world=2, output=tmp_path / "output")
    assert codes == [0, 0], (tmp_path / "output").read_text()
    train(replace(cfg, max_steps=whole.max_steps, resume=True))
    ours, theirs = (tiny.records(tiny.folder_of(c), "train") for c in (cfg, whole))
    assert_close_records(ours, theirs, rtol=1e-4)
    starts = json.loads((tiny.folder_of(cfg) / "provenance.json").read_text())
    assert [start["world_size"] for start in starts] == [2, 1]


def to_rank_1(accident: Callable[[], None], step: int) -> None:
    """Have an accident in rank 1 when its loader is asked for a step."""
    from topogpt.text import loader as data

    steps = data.TokenLoader.steps

    def wrapped(self, start_step):
        for i, batches in enumerate(steps(self, start_step), start=start_step):
            if i == step and self.ranks.rank == 1:
                accident()
            yield batches

    data.TokenLoader.steps = wrapped


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def lose_parent() -> None:
    """As after SIGKILL to torchrun."""
    os.getppid = lambda: 1


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(folder, tmp_path):
    cfg = tiny.config(folder, "one_told", save_every=100)
    accident = functools.partial(to_rank_1, terminate, 6)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, world=2, output=tmp_path / "output")
    assert codes == [0, 0], (tmp_path / "output").read_text()
    assert (tiny.folder_of(cfg) / "last").resolve().name == "step-000007"
    assert tiny.records(tiny.folder_of(cfg))[-1]["step"] == 7


def test_ranks_whose_parent_is_gone_save_and_end(folder, tmp_path):
    cfg = tiny.config(folder, "orphans", save_every=100)
    accident = functools.partial(to_rank_1, lose_parent, 6)
    codes = tiny.run_in_child(tiny.train_after, accident, cfg, world=2, output=tmp_path / "output")
    assert codes == [0, 0], (tmp_path / "output").read_text()
    assert (tiny.folder_of(cfg) / "last").resolve().name == "step-000007"


def test_a_run_of_its_own_outlives_its_parent(monkeypatch):
    with StopSignals() as signals:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not signals.received


# ---- SLURM -------------------------------------------------------------------------------------------------


def by_srun() -> None:
    """Make what torchrun has said what srun says."""
    rank = os.environ.pop("RANK")
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    said = {"JOB_ID": os.getppid(), "STEP_ID": 0, "PROCID": rank, "LOCALID": rank, "STEP_NUM_TASKS": 2}
    said |= {"NTASKS": 4, "STEP_NODELIST": "localhost"}
    os.environ |= {f"SLURM_{name}": str(value) for name, value in said.items()}


def test_what_srun_starts_is_one_run(folder, tmp_path):
    cfg, output = tiny.config(folder, "srun", max_steps=2), tmp_path / "output"
    codes = tiny.run_in_child(tiny.train_after, by_srun, cfg, world=2, output=output)
    assert codes == [0, 0], output.read_text()
    assert output.read_text().count("2 x CPU") == 1
    starts = json.loads((tiny.folder_of(cfg) / "provenance.json").read_text())
    assert [start["world_size"] for start in starts] == [2]


@pytest.fixture
def environment(monkeypatch):
    """Set what is given, and nothing else of torchrun or SLURM."""

    def only(**values: object) -> None:
        for name in os.environ:
            if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    only()
    return only


STEP = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_NTASKS": 8}


@pytest.mark.parametrize(
    "values, place",
    [
        ({}, (0, 1, 1, 0)),
        (STEP | {"SLURM_NTASKS_PER_NODE": 4}, (5, 8, 4, 1)),
        (STEP | {"SLURM_GPUS_PER_TASK": 1}, (5, 8, 1, 0)),  # its own is the only one it sees
        # a step of one in a larger allocation, such as an interactive shell
        (STEP | {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 1}, (0, 1, 1, 0)),
        (STEP | {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}, (2, 4, 4, 2)),
        ({"RANK": 0}, (0, 1, 1, 0)),
    ],
)
def test_the_place_of_a_process(environment, values, place):
    environment(**values)
    assert read_place() == place


@pytest.mark.parametrize(
    "values, said",
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x' in the environment is no number; correct or unset it"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 must be below WORLD_SIZE = 2"),
        ({"RANK": "1\n2", "WORLD_SIZE": "2"}, "no number"),
        (STEP | {"SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS = '4\(x2\)'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not in the environment, so 2 processes"),
    ],
)
def test_a_wrong_environment_is_one_line(environment, values, said):
    environment(**values)
    with pytest.raises(UserError, match=said) as error:
        set_rendezvous(read_place().world)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node[007-009,012],login1", "node007"),
        ("a1,b[2-3]", "a1"),
        ("rack[2-3]n[01,04-05]-ib", "rack2n01-ib"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


def test_steps_of_slurm_side_by_side_meet_at_other_ports(environment):
    ports = []
    for step in (0, 1):
        environment(**STEP | {"SLURM_STEP_ID": step, "SLURM_STEP_NODELIST": "n[3-4]"})
        set_rendezvous(8)
        assert os.environ["MASTER_ADDR"] == "n3"
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] != ports[1] and all(20_000 <= port < 40_000 for port in ports)


def use_ranks(folder: Path) -> None:
    from topogpt import distributed

    with distributed.start("cpu") as ranks:
        x = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
        values = {
            "is_main": ranks.is_main,
            "world": ranks.world,
            "sum": ranks.sum(x).tolist(),
            "mean": ranks.mean(x).tolist(),
            "x": x.tolist(),
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        }
        ranks.barrier()
    (folder / f"{ranks.rank}.json").write_text(json.dumps(values))


def test_every_rank_receives_the_same_sums_and_decisions(tmp_path):
    codes = tiny.run_in_child(use_ranks, tmp_path, world=2, output=tmp_path / "output")
    assert codes == [0, 0], (tmp_path / "output").read_text()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "is_main": rank == 0,
            "world": 2,
            "sum": [3.0, 30.0],
            "mean": [1.5, 15.0],
            "x": [1.0 * (rank + 1), 10.0 * (rank + 1)],  # as it was
            "any": [True, False],
        }


def test_one_process_needs_no_process_group():
    ranks = Ranks(0, 1, torch.device("cpu"))
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(ranks.sum(x), x) and torch.equal(ranks.mean(x), x)
    assert ranks.any(True) and not ranks.any(False)
    assert ranks.peak_flops is None  # a CPU is not in the table: MFU is not shown


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_nearest_that_they_can(folder):
    cfg = tiny.config(folder, "unshared", batch_size=14, per_device_batch_size=2)
    preflight.check_batch_size(cfg, 7)
    with pytest.raises(UserError, match=r"batch_size = 14 .* 2 x 4 processes.*--batch_size 16"):
        preflight.check_batch_size(cfg, 4)


FAULTS = """
import resource
import sys
from topogpt.distributed import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    bytearray(b"x") * (1 << 27)  # 128 MB, freed at once
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_so_that_its_pages_are_not_mapped_again():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < 10_000 < faults("return")
