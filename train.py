"""Pretrain a GPT whose units lie on a sheet.

    python train.py configs/debug.yaml --run_name my_experiment                      # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=4 train.py configs/topolm.yaml --run_name topolm --wandb
    python train.py configs/topolm.yaml --run_name topolm --resume                   # continue, bit for bit

All settings are in settings.py and in --help; what lies in the folder of a run, out/RUN, is in runfolder.py.
"""

import sys

from topogpt.config import parse, to_yaml
from topogpt.errors import UserError, user_errors
from topogpt.files import write_text
from topogpt.settings import TrainConfig
from topogpt.training import preflight

if __name__ == "__main__":  # answer --help and mistakes at once: importing torch takes seconds
    with user_errors():
        cfg = parse(TrainConfig, sys.argv[1:], prog="train.py")
        preflight.check(cfg)

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topogpt import distributed, rng
from topogpt.distributed import Ranks
from topogpt.model.gpt import GPT, sheet_names
from topogpt.runs import checkpoint, provenance
from topogpt.runs import folder as runfolder
from topogpt.runs.folder import TrainState
from topogpt.sharing import export
from topogpt.sharing import load as hf_import
from topogpt.sharing import push as hub
from topogpt.spatial.topolm import TopoLMLoss, sheet_positions, weight_at
from topogpt.text.loader import TokenLoader
from topogpt.training.interrupt import StopSignals
from topogpt.training.log import RunLog
from topogpt.training.objective import Objective
from topogpt.training.optim import build_optimizer, lr_at
from topogpt.training.progress import Clock, introduce, log_step, say_goodbye
from topogpt.training.validation import evaluate, report


def train(cfg: TrainConfig) -> TrainState:
    """Run the training that cfg describes, from the start or from a checkpoint; return where it ended."""
    corpora = preflight.check(cfg)
    with distributed.start(cfg.device) as ranks, explain_out_of_memory(cfg), StopSignals() as signals:
        # a call of its own, so that DDP is gone before the process group is
        return run_loop(cfg, ranks, corpora, signals)


def run_loop(cfg: TrainConfig, ranks: Ranks, corpora: preflight.Checked, signals: StopSignals) -> TrainState:
    model, objective, optimizer, state = build(cfg, ranks, corpora.resume_from)
    compiled, parallel = wrap(cfg, ranks, objective)
    run = open_run_folder(cfg, ranks, corpora, state)
    with (
        RunLog(run, ranks.is_main, state.step if corpora.resume_from else -1, cfg.max_steps) as log,
        token_loader(cfg, ranks, corpora) as loader,
    ):
        if cfg.wandb:
            state.wandb_id = log.start_wandb(cfg, state.wandb_id)
        introduce(cfg, ranks, corpora, model, describe(objective, compiled), run, state, log)

        steps = loader.steps(state.step)
        per_rank = cfg.batch_size // (cfg.per_device_batch_size * ranks.world)  # micro-batches of a step
        skipped_in_a_row = torch.tensor(float(state.skipped_in_a_row), device=ranks.device)
        with_spatial = cfg.topo.loss != "none"
        no_sync = parallel.no_sync if ranks.world > 1 else contextlib.nullcontext
        clock = Clock(cfg, model, ranks, state.step)
        stopped_early = told_to_stop = False
        for step in range(state.step, cfg.max_steps + 1):
            state.step, finished = step, step == cfg.max_steps

            # ---- once in a while: evaluate, every rank its share of the same tokens
            best = False
            if (step % cfg.eval_every == 0 or finished) and state.evaluated_at != step:
                values = evaluate(cfg, compiled, objective.spatial, corpora.val, ranks)
                best = state.update(values.cross_entropy)
                report(cfg, values, model, objective.spatial, corpora.val, run, state, log)
            stopped_early = 0 < cfg.patience <= state.increases
            told_to_stop = ranks.any(signals.received)
            stop = finished or stopped_early or told_to_stop

            # ---- once in a while: save
            if best or stop or step % cfg.save_every == 0:
                state.skipped_in_a_row = int(skipped_in_a_row)
                if ranks.is_main:
                    record = saved_record(cfg, corpora)
                    checkpoint.save(run, model, objective.spatial.positions, optimizer, state, record)
                    runfolder.prune(run, cfg.keep_last)
                clock.restart(step)
            if cfg.push_every and step and step % (cfg.push_every * cfg.eval_every) == 0 and not stop:
                publish(run, cfg, log)
                clock.restart(step)
            if stop:
                break

            # ---- one optimiser step
            lr, weight = lr_at(cfg.optim, step, cfg.max_steps), weight_at(cfg.topo, step, cfg.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = torch.zeros(2, device=ranks.device)  # cross-entropy, spatial loss per sheet
            for i, batch in enumerate(next(steps)):
                chosen = objective.spatial.choose(cfg.seed, step, batch.index) if with_spatial else None
                torch.manual_seed(rng.seed(cfg.seed, "dropout", step, batch.index))  # no random state to save
                with contextlib.nullcontext() if i == per_rank - 1 else no_sync():
                    ce, spatial = parallel(batch.tokens, batch.targets, chosen)
                    ((ce + weight * spatial.sum()) / per_rank).backward()
                losses += torch.stack([ce, spatial.mean()]).detach() / per_rank
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip or torch.inf)
            skip = (~grad_norm.isfinite()).float()
            optimizer.found_inf = skip  # the fused kernel leaves everything as it is where this is 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            skipped_in_a_row = (skipped_in_a_row + skip) * skip

            # ---- once in a while: log this step; the one place where the host waits for the device
            if (step + 1) % cfg.log_every == 0:
                means = ranks.mean(torch.stack([*losses, grad_norm, skipped_in_a_row])).tolist()
                log_step(cfg, step + 1, means, lr, weight, clock.read(step + 1), log)
        say_goodbye(run, state, log, early=stopped_early, told=told_to_stop)
        if cfg.push_to_hf and not told_to_stop:
            publish(run, cfg, log)
        return state


class Built(NamedTuple):
    model: GPT
    objective: Objective
    optimizer: torch.optim.Optimizer
    state: TrainState


def build(cfg: TrainConfig, ranks: Ranks, resume_from: Path | None) -> Built:
    """Model, objective and optimiser on this rank's device, fresh or as a checkpoint left them."""
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(rng.seed(cfg.seed, "initialisation"))
    model, state = GPT(cfg.model), TrainState()
    positions = sheet_positions(cfg.topo, sheet_names(cfg.model.n_layer), cfg.model.n_embd)
    if cfg.init_from and not resume_from:
        imported = hf_import.initial(cfg.model, cfg.init_from)
        checkpoint.load_weights(model, imported.weights)
        positions = imported.positions or positions
    if resume_from:
        weights, positions = checkpoint.load_tensors(resume_from)
        checkpoint.load_weights(model, weights)
        state = TrainState(**runfolder.read_state(resume_from)["train_state"])
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and ranks.device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    objective = Objective(model, TopoLMLoss(cfg.topo, positions), dtype, flash=bfloat16 and ranks.has_flash)
    objective.to(ranks.device)
    optimizer = build_optimizer(model, cfg.optim)
    if resume_from:
        checkpoint.load_optimizer(optimizer, resume_from, ranks.device)
    return Built(model, objective, optimizer, state)


def wrap(cfg: TrainConfig, ranks: Ranks, objective: Objective) -> tuple[nn.Module, nn.Module]:
    """The objective as evaluation calls it (compiled), and as training does (in parallel over ranks)."""
    on = cfg.compile == "on" or (cfg.compile == "auto" and ranks.device.type == "cuda")
    compiled = torch.compile(objective, dynamic=False) if on else objective
    if ranks.world == 1:
        return compiled, compiled
    accepted = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.13
    name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    return compiled, DistributedDataParallel(compiled, gradient_as_bucket_view=True, **{name: False})


def describe(objective: Objective, compiled: nn.Module) -> str:
    dtype = str(objective.dtype).removeprefix("torch.")
    attention = "flash attention only" if objective.flash else "any attention kernel"
    return f"{dtype}, {'compiled' if compiled is not objective else 'not compiled'}, {attention}"


def open_run_folder(cfg: TrainConfig, ranks: Ranks, corpora: preflight.Checked, state: TrainState) -> Path:
    """Make out/RUN with config.yaml and provenance.json; a resumed run adds its start to the latter."""
    run = Path(cfg.out_dir) / cfg.run_name
    if ranks.is_main:
        if cfg.overwrite and run.exists():
            shutil.rmtree(run)
        (run / "maps").mkdir(parents=True, exist_ok=True)
        if corpora.resume_from:
            runfolder.restore_links(run, state)
        write_text(run / "config.yaml", to_yaml(dataclasses.replace(cfg, resume=False, overwrite=False)))
        path = run / "provenance.json"
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        starts.append(provenance.collect(ranks.device, ranks.world, saved_record(cfg, corpora)["data"]))
        write_text(path, json.dumps(starts, indent=1))
    ranks.barrier()
    return run


def saved_record(cfg: TrainConfig, corpora: preflight.Checked) -> dict:
    """What a checkpoint keeps besides tensors and train_state; preflight.py compares it on resuming."""
    data = {"train_data_dir": corpora.train.fingerprint, "val_data_dir": corpora.val.fingerprint}
    return {"config": dataclasses.asdict(cfg), "data": data}


def token_loader(cfg: TrainConfig, ranks: Ranks, corpora: preflight.Checked) -> TokenLoader:
    return TokenLoader(
        corpora.train,
        block_size=cfg.model.block_size,
        batch_size=cfg.batch_size,
        per_device_batch_size=cfg.per_device_batch_size,
        seed=cfg.seed,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )


def publish(run: Path, cfg: TrainConfig, log: RunLog) -> None:
    """Export the best checkpoint and push it to the Hub; a failure is said and harms nothing."""
    if not log.is_main:
        return
    try:
        folder = export.export(run, "best", say=log.say)
        log.say(f"pushed: {hub.push(folder, hub.full_name(cfg.run_name, log.say), say=log.say)}")
    except UserError as error:
        log.say(f"not pushed: {error}; later: python export.py {run} --push_to_hf")


@contextlib.contextmanager
def explain_out_of_memory(cfg: TrainConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        half = max(1, cfg.per_device_batch_size // 2)
        raise UserError(
            f"per_device_batch_size = {cfg.per_device_batch_size} does not fit the memory of the device; try "
            f"--per_device_batch_size {half}"
        ) from None


if __name__ == "__main__":
    with user_errors():
        train(cfg)
