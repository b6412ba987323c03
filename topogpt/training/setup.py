"""What a run trains with, and its folder: fresh, or as a checkpoint left them."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topogpt import rng
from topogpt.config import to_yaml
from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.files import write_json, write_text
from topogpt.model import connectome, lora
from topogpt.model.gpt import GPT
from topogpt.runs import checkpoint, folder, provenance, seal
from topogpt.runs.state import TrainState
from topogpt.settings import TrainConfig
from topogpt.sharing.load import initial
from topogpt.spatial.layout import sheet_positions
from topogpt.terminal import say
from topogpt.text.loader import TokenLoader
from topogpt.training.log import RunLog
from topogpt.training.objective import Objective
from topogpt.training.optim import build_optimizer
from topogpt.training.parallel import wrap
from topogpt.training.preflight import Checked


@dataclass
class Training:
    """What a run trains with, on one rank."""

    cfg: TrainConfig
    ranks: Ranks
    model: GPT
    objective: Objective
    compiled: nn.Module  # the objective as evaluation calls it
    parallel: nn.Module  # the objective as training calls it
    optimizer: torch.optim.Optimizer
    state: TrainState
    connectome: connectome.Connectome | None  # what the model is trained under
    masks: connectome.Masks


def build(cfg: TrainConfig, ranks: Ranks, resume_from: Path | None = None) -> Training:
    """Model, objective and optimiser on this rank's device, fresh or as a checkpoint left them."""
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(rng.seed(cfg.seed, "initialisation"))
    model, state = GPT(cfg.model), TrainState()
    positions = sheet_positions(cfg.topo, cfg.model)
    if cfg.init_from and not resume_from:
        imported = initial(cfg.model, cfg.init_from)
        checkpoint.load_weights(model, imported.weights)
        if imported.positions and imported.positions.keys() == positions.keys():  # sheets of the same layout
            positions = imported.positions
    if resume_from:
        resume_from = whole_checkpoint(cfg, ranks, resume_from)
    wired = connectome_of(cfg, model, resume_from) if cfg.connectome else None
    if resume_from:
        weights, positions = checkpoint.load_tensors(resume_from)
        base = resume_from.parents[1] / checkpoint.BASE_FILE
        checkpoint.load_weights(model, checkpoint.read_tensors(base) if cfg.lora_rank else weights)
        state = TrainState(**seal.read_state(resume_from)["train_state"])
    objective = Objective(model, cfg, positions, ranks)
    if cfg.lora_rank:
        add_adapters(objective, cfg)
        if resume_from:
            checkpoint.load_adapters(model, resume_from, weights)
    objective.to(ranks.device)
    optimizer = build_optimizer(model, cfg.optim)
    if resume_from:
        checkpoint.load_optimizer(optimizer, resume_from, ranks.device)
    masks = connectome.Masks(model, wired)
    return Training(
        cfg, ranks, model, objective, *wrap(cfg, ranks, objective), optimizer, state, wired, masks
    )


def whole_checkpoint(cfg: TrainConfig, ranks: Ranks, chosen: Path) -> Path:
    """The checkpoint to resume from, as rank 0 finds it: chosen by hand, or the newest that is whole."""
    step, run, problem = -1, chosen.parents[1], None
    if ranks.is_main:
        try:
            step = folder.step_of(checkpoint.last_whole(run, chosen if cfg.checkpoint else None))
        except UserError as error:
            problem = error
    step = int(ranks.sum(torch.tensor(step if ranks.is_main else 0)))
    if step < 0:
        raise problem or UserError(f"no checkpoint of {run} can be resumed from, as the first process says")
    return folder.step_folder(run, step)


def connectome_of(cfg: TrainConfig, model: GPT, resume_from: Path | None) -> connectome.Connectome | None:
    """Set the start that cfg.connectome gives the model, and return what it is trained under, if anything."""
    if cfg.inherit == "dense":
        return None
    if resume_from:  # its own copy: a random wiring is nowhere else
        return connectome.read(resume_from.parents[1], cfg.model)
    values = connectome.find(cfg.connectome) / connectome.REWIND_FILE
    rewind = checkpoint.read_tensors(values) if cfg.inherit == "rewind" else None
    found = connectome.read(cfg.connectome, cfg.model)
    return connectome.inherit(model, found, cfg.inherit, cfg.seed, rewind)


def add_adapters(objective: Objective, cfg: TrainConfig) -> None:
    """Freeze the model and give it adapters; each loss on weights must have one to act on."""
    torch.manual_seed(rng.seed(cfg.seed, "adapters"))
    lora.adapt(objective.model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_modules)
    adapted = lora.layers_to_adapt(cfg.model, cfg.lora_modules, cfg.lora_rank)
    for name, loss in objective.of_weights.items():
        if not adapted.keys() & set(loss.layers):
            raise UserError(
                f"topo.loss = {name} acts on topo.modules = {' '.join(cfg.topo.modules)}, of which "
                f"lora_modules = {' '.join(cfg.lora_modules)} adapts none; name them there, too"
            )


def open_run_folder(t: Training, corpora: Checked) -> Path:
    """Make out/RUN with config.yaml and provenance.json; a resumed run adds its start to the latter."""
    cfg, ranks = t.cfg, t.ranks
    run = Path(cfg.out_dir) / cfg.run_name
    if ranks.is_main:
        started = provenance.collect(ranks.device, ranks.world, corpora.fingerprints)
        try:
            if cfg.overwrite and run.exists():
                folder.clear(run)
            (run / "maps").mkdir(parents=True, exist_ok=True)
            for left in (*run.glob(".*.tmp"), *run.glob("maps/.*.tmp")):  # by a kill
                left.unlink()
            if corpora.resume_from:
                folder.restore_links(run, t.state)
            elif t.connectome:
                connectome.write(run, t.connectome, cfg.model)
            settings = dataclasses.replace(cfg, resume=False, overwrite=False, checkpoint=None)
            write_text(run / "config.yaml", to_yaml(settings))
            write_json(run / "provenance.json", [*earlier_starts(run / "provenance.json"), started])
        except OSError as error:
            raise UserError(
                f"{error.filename or run} cannot be written: {error.strerror}; make room"
            ) from None
    ranks.barrier()
    return run


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """What provenance.json holds; a damaged one is said and kept beside the new one."""
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_bytes())
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ValueError("it is no list of starts")
    except ValueError as error:
        aside = path.rename(path.with_name(f"provenance.damaged-{time.time_ns()}.json"))
        say(f"warning: {path} is damaged ({error}); it is now {aside.name}, and a new one is begun")
        return []
    return starts


def save(t: Training, run: Path, corpora: Checked, log: RunLog) -> None:
    """On the main rank a checkpoint, once the records that it counts on are on the disk; old ones go."""
    if t.ranks.is_main:
        log.sync()
        checkpoint.save(run, t.model, t.objective.positions, t.optimizer, t.state, corpora.record(t.cfg))
        folder.prune(run, t.cfg.keep_last)


def token_loader(t: Training, corpora: Checked) -> TokenLoader:
    cfg = t.cfg
    return TokenLoader(
        corpora.train,
        block_size=cfg.model.block_size,
        batch_size=cfg.batch_size,
        per_device_batch_size=cfg.per_device_batch_size,
        seed=cfg.seed,
        ranks=t.ranks,
    )


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
