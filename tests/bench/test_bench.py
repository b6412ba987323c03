"""The measurements run, tiny: their records are complete and their checks pass. No speed is tested.

pytest tests/bench/test_bench.py
"""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny
import torch

import bench.gpu
import bench.loader
import bench.spatial
import bench.step
from bench.common import Report, interleaved
from bench.training import SETUPS, Setup, Trainer
from bench.variants import CANDIDATES, CandidateLoss, LoopLoss, draw_activations, spatial_errors
from topogpt import topo
from topogpt.errors import UserError
from topogpt.settings import GPTConfig, TopoConfig, TrainConfig
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.text.loader import MicroBatch

KEYS = {"name", "ours", "reference", "ratio", "unit", "device", "detail"}
STEP = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16"),
    *("--model.vocab_size", "64", "--topo.radius", "2", "--batch_size", "4", "--per_device_batch_size", "2"),
    *("--device", "cpu", "--steps", "2", "--warmup", "1"),
]


def records(printed: str) -> dict[str, dict]:
    """What --json printed, by name; every line is checked."""
    found = {}
    for line in printed.splitlines():
        record = json.loads(line)
        assert set(record) == KEYS
        assert isinstance(record["ours"], int | float) and math.isfinite(record["ours"])
        assert (record["ratio"] is None) == (record["reference"] is None)
        found[record["name"]] = record
    assert found
    return found


@pytest.fixture(autouse=True)
def settings_of_dynamo():
    """Undo what measuring many variants in one process needs."""
    names = ("recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


def test_spatial(capsys):
    argv = "--device cpu --tokens 64 --sheets 2 --n_embd 36 --radius 3 --neighbourhoods 3 --repeats 1 --json"
    bench.spatial.main([*argv.split(), "--dtype", "float32", "bfloat16", "float64"])
    printed = capsys.readouterr()
    found = records(printed.out)
    assert set(found) == {f"spatial loss, {dtype}" for dtype in ("float32", "bfloat16", "float64")}
    assert all(r["detail"]["error"].endswith("ok") and r["ratio"] > 0 for r in found.values())
    assert "times faster" in printed.err


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_equal_the_usual_loop(name, dtype):
    cfg = TopoConfig(radius=3, neighbourhoods=4, distance="l1")
    positions = {name: topo.positions("permuted", 48, 0, name) for name in "abc"}
    product, loop = TopoLMLoss(cfg, positions), LoopLoss(cfg, positions)
    leaves = draw_activations(3, 40, 48, dtype=dtype)
    losses = {"it": CandidateLoss(product, CANDIDATES[name])}
    value, gradient = spatial_errors(losses, loop, leaves, product.choose(0, 0, 0))["it"]
    assert value < 1e-5 and gradient < (1e-5 if dtype == torch.float32 else 1e-2)


def test_step(capsys, shards):
    bench.step.main([*STEP, "--no-memory", "--json", "--train_data_dir", str(shards / "train")])
    found = records(capsys.readouterr().out)
    assert set(found) == {
        "step against control", "step against usual eager loop", "spatial loss over control"
    }  # fmt: skip
    parts = found["step against usual eager loop"]["detail"]
    assert set(parts["ours_by_part"]) == {"data", "forward", "spatial", "backward", "optimiser"}


def test_step_measures_the_memory_of_a_process(capsys):
    bench.step.main([*STEP, "--memory_of", "topographic"])
    assert float(capsys.readouterr().out) > 1e7


def test_all_setups_of_the_step_have_the_same_losses():
    """Ours, its control and the usual loop start from the same weights and see the same data."""
    cfg = TrainConfig(
        run_name="x",
        model=GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64),
        topo=TopoConfig(radius=2),
        batch_size=2,
        per_device_batch_size=2,
        device="cpu",
    )
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], 0)
    setups = SETUPS | {"padded heads": Setup(head_width=16)}
    losses = {name: Trainer(cfg, setup, torch.device("cpu")).losses(batch) for name, setup in setups.items()}
    ce, spatial = losses["topographic"]
    for name, (other_ce, other_spatial) in losses.items():
        torch.testing.assert_close(other_ce, ce)
        torch.testing.assert_close(other_spatial, torch.zeros(2) if name == "control" else spatial)


def test_loader(capsys, monkeypatch):
    argv = (
        "--device cpu --random_tokens 5000 --block_size 16 --batch_size 4 --per_device_batch_size 2 --steps 3"
    )
    bench.loader.main([*argv.split(), "--tokens_per_s", "64000", "--json"])
    found = records(capsys.readouterr().out)
    assert set(found) == {"data wait, cold", "data wait, warm"}
    assert all(0 <= r["detail"]["share_of_step"] for r in found.values())


def test_prepare(tmp_path):
    """In a process: it forks."""
    lines = [json.dumps({"id": str(i), "text": f"Document {i}. " * 20}) for i in range(50)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "bench.prepare", "--source", str(tmp_path / "some.jsonl"), "--json"]
    done = subprocess.run(
        [*command, "--num_proc", "2", "--repeats", "1", "--no-usual"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = records(done.stdout)
    assert set(found) == {"preparation against encoder alone", "preparation against encoder alone, CPU"}
    assert "the usual script is left out" in done.stderr


def test_gpu_sections_run_on_a_cpu(capsys, monkeypatch):
    """All sections, tiny; one that fails ends with code 1, and so would a wrong result."""
    bench.gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--json"])
    printed = capsys.readouterr()
    found = records(printed.out)
    assert "WRONG" not in printed.err and "failed" not in printed.err and "left out" not in printed.err
    for name in (
        "copy, bytes read and written", "step against control", "step against usual eager loop",
        "graph breaks", "flash attention kernels", "kernels of a step", "spatial: product", "AdamW: fused",
        "cross-entropy: product", "compile: reduce-overhead", "step: heads of 24",
        *(f"spatial: {name}" for name in CANDIDATES),
    ):  # fmt: skip
        assert name in found
    assert found["graph breaks"]["ours"] == 0


def test_a_failing_section_stops_no_other(capsys, monkeypatch):
    import bench.gpu_kernels

    def broken(it: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench.gpu_kernels, "ceiling", broken)
    with pytest.raises(SystemExit) as stop:
        bench.gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--sections", "ceiling", "optimizer"])
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert "ceiling: RuntimeError: no such kernel" in printed and "AdamW: fused" in printed


def test_the_time_limit_ends_a_section(monkeypatch):
    with pytest.raises(bench.gpu.OutOfTime), bench.gpu.time_limit(0.05):
        while True:
            pass


def test_gpu_sh_is_a_script():
    path = tiny.ROOT / "bench" / "gpu.sh"
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    usage = subprocess.run([str(path)], capture_output=True, text=True)
    assert usage.returncode and "usage: bench/gpu.sh OUT.txt" in usage.stderr


def test_checks_can_fail():
    report = Report(as_json=False, device="")
    assert report.check("right", 1e-6, 1e-3).endswith("ok")
    assert report.check("wrong", math.inf, 1e-3).endswith("WRONG")
    with pytest.raises(SystemExit):
        report.finish()


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, torch.device("cpu"), repeats=3, warmup=1)
    assert order == list("ababbaab")
    assert all(t.low <= t.median <= t.high for t in times.values())


@pytest.mark.parametrize("name", ["spatial", "step", "loader", "prepare", "gpu"])
def test_help_and_mistakes_import_no_torch(name):
    code = f"import sys, bench.{name}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (bench.spatial.main, ["--tokens", "1"], "tokens = 1 "),
        (bench.step.main, ["--steps", "0"], "steps = 0 "),
        (bench.step.main, ["--batch_size", "5", "--per_device_batch_size", "2"], "batch_size = 5 "),
        (bench.loader.main, ["--tokens_per_s", "0"], "tokens_per_s = 0.0 "),
        (bench.gpu.main, ["--repeats", "0"], "repeats = 0 "),
    ],
)  # fmt: skip
def test_mistakes_are_told(main, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
