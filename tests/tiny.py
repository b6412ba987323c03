"""A run that takes a second: its shards, its settings, and how to start it in other processes."""

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from topogpt.config import parse
from topogpt.errors import user_errors
from topogpt.settings import GPTConfig, OptimConfig, TopoConfig, TrainConfig

ROOT = Path(__file__).parent.parent
VOCAB = 64
TIMING = {"tokens_per_s", "memory_gb", "eta_s", "mfu"}  # fields of a record that no two runs share


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, dtype="<i4")  # llm.c's
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


def write_shards(folder: Path, used: int = VOCAB) -> Path:
    """Random tokens, 250 windows to train on, 37 to validate on, so that the last micro-batch is not full."""
    draw = np.random.default_rng(0)
    write_shard(folder / "train" / "one.bin", draw.integers(0, used, 3000))
    write_shard(folder / "train" / "two.bin", draw.integers(0, used, 1001))
    write_shard(folder / "val" / "one.bin", draw.integers(0, used, 600))
    return folder


def config(folder: Path, run_name: str = "run", **settings: Any) -> TrainConfig:
    """Settings of a run in folder/out on the shards in folder; sections are given as dicts."""
    sections = {
        "model": GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=VOCAB, dropout=0.1),
        "topo": TopoConfig(radius=2, neighbourhoods=2),
        "optim": OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=4, decay_steps=18),
    }
    for name, section in sections.items():
        sections[name] = replace(section, **settings.pop(name, {}))
    defaults = {
        "out_dir": str(folder / "out"),
        "train_data_dir": (str(folder / "train"),),
        "val_data_dir": (str(folder / "val"),),
        "per_device_batch_size": 2,
        "batch_size": 8,
        "max_steps": 18,
        "eval_every": 4,
        "val_tokens": 592,
        "log_every": 1,
        "save_every": 5,
        "patience": 0,
        "device": "cpu",
    }
    return TrainConfig(run_name=run_name, **(defaults | settings | sections))


def folder_of(cfg: TrainConfig) -> Path:
    return Path(cfg.out_dir) / cfg.run_name


def arguments(cfg: TrainConfig) -> list[str]:
    """The command line that says what cfg says."""
    given = []

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, bool):
                given.append(f"--{prefix}{'' if value else 'no_'}{key}")
            else:
                given.extend([f"--{prefix}{key}", *map(str, value if isinstance(value, tuple) else [value])])

    add("", asdict(cfg))
    assert parse(TrainConfig, given) == cfg
    return given


def records(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in TIMING}
        for line in lines
        if split is None or line["split"] == split
    ]


def assert_same_tensors(a: Path, b: Path) -> None:
    """Weights, positions and optimiser of two checkpoints, bit for bit."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    ours, theirs = (torch.load(x / "optimizer.pt", weights_only=True) for x in (a, b))
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["state"]) == len(theirs["state"]) > 0
    for i, state in ours["state"].items():
        assert {"exp_avg", "exp_avg_sq", "step"} <= state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, theirs["state"][i][name]), (i, name)


def assert_same_run(ours: Path, whole: Path) -> None:
    """Everything that a run leaves behind, but for the clock and its own name."""
    assert records(ours) == records(whole)
    for link in ("best", "last"):
        assert (ours / link).resolve().name == (whole / link).resolve().name, link
        assert_same_tensors(ours / link, whole / link)
    states = [json.loads((run / "last" / "state.json").read_text())["train_state"] for run in (ours, whole)]
    assert states[0] == states[1]
    pictures = [sorted(p.name for p in (run / "maps").iterdir()) for run in (ours, whole)]
    assert pictures[0] == pictures[1]
    assert not list(ours.glob("**/.*.tmp"))


def no_pictures() -> None:
    """Leave out the pictures of the sheets, which take longer than the run."""
    from topogpt.training import maps

    maps.draw = lambda *args, **kwargs: None


def losses_of_steps(model: Any, tokens: Any) -> list[float]:
    """Losses of transformers' model at three steps of SGD on what is trained of it."""
    import torch

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def random_run(
    out: Path,
    name: str = "run",
    *,
    step: int = 8,
    seed: int = 0,
    topo: dict[str, Any] | None = None,
    change: Callable[[Any], None] = lambda net: None,
    **model,
) -> Path:
    """A run with one checkpoint, of a model whose logits are large enough to be wrong; change: it at last."""
    import torch

    from topogpt.model.gpt import GPT
    from topogpt.runs import checkpoint
    from topogpt.runs.state import TrainState
    from topogpt.spatial.layout import sheet_positions
    from topogpt.training.optim import build_optimizer

    shape = {"vocab_size": GPTConfig().vocab_size, "n_layer": 2, "n_embd": 16, "block_size": 48}
    cfg = config(out, name, out_dir=str(out), model=shape | model, topo=topo or {})
    torch.manual_seed(seed)
    net = GPT(cfg.model)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(12 if parameter.dim() == 2 else 1).add_(0.05 * torch.randn_like(parameter))
    change(net)
    positions = sheet_positions(cfg.topo, cfg.model)
    run = out / name
    run.mkdir(parents=True, exist_ok=True)
    value = {
        "step": step,
        "split": "val",
        "cross_entropy": 3.5,
        "spatial_loss": 0.25,
        "loss": 4.0,
        "moran": 0.5,
    }
    (run / "metrics.jsonl").write_text(json.dumps(value) + "\n")
    state = TrainState(step=step, best_step=step, best_cross_entropy=3.5)
    record = {"config": asdict(cfg), "data": {"train_data_dir": "", "val_data_dir": ""}}
    checkpoint.save(run, net, positions, build_optimizer(net, cfg.optim), state, record)
    return run


def seal(checkpoint: Path, **more: Any) -> None:
    """Make a checkpoint whole again after its files were changed, and its state by `more`."""
    from topogpt.files import sha256
    from topogpt.runs import seal

    state = json.loads((checkpoint / "state.json").read_text()) | more
    hashes = {name: sha256(checkpoint / name) for name in seal.FILES if name != "state.json"}
    state.pop("sha256", None)
    (checkpoint / "state.json").write_text(seal.state_text(state, hashes))


# ---- other processes ---------------------------------------------------------------------------------------


def run_in_child(target: Callable, *args: Any, world: int = 1, output: Path) -> list[int]:
    """Call target(*args) in `world` processes joined as torchrun would; return exit codes (-9: SIGKILL)."""
    # A fork server imports once what takes long; the processes are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "train", "yaml", "pytest", "tiny"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        env = {k: str(v) for k, v in env.items()} | {"MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
        processes.append(context.Process(target=call, args=(target, args, env, output)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def call(target: Callable, args: tuple, env: dict[str, str], output: Path) -> None:
    os.environ.update(env)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    faulthandler.dump_traceback_later(60, exit=True)  # where it hangs, if it does
    with user_errors():
        target(*args)


def train_after(prepare: Callable[[], None], cfg: TrainConfig) -> None:
    """For run_in_child: train where `prepare` has prepared an accident."""
    import train

    no_pictures()
    prepare()
    train.train(cfg)


def nothing() -> None:
    pass
