"""Checkpoints: weights, positions and optimiser of a step, saved whole or not at all, and loaded.

A checkpoint is written under a temporary name, fsynced and renamed, so one that has its final name is
complete. That of a model with adapters holds the merged weights in model.safetensors, so it is read like any
other, and the adapters beside them; the weights they were added to are in the run's folder, once.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from topogpt import topo
from topogpt.errors import UserError
from topogpt.files import fsync, permit, whole
from topogpt.model import lora
from topogpt.model.gpt import GPT
from topogpt.runs.folder import complete, find_checkpoint, point, read_state, step_folder
from topogpt.runs.state import TrainState
from topogpt.settings import GPTConfig
from topogpt.topography import PREFIX

BASE_FILE = "base.safetensors"  # of a run: the weights that its adapters are added to
ADAPTER_FILE = "adapter.safetensors"  # of a checkpoint


def save(
    run: Path,
    model: GPT,
    positions: dict[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    record: dict[str, Any],
) -> Path:
    """Write the checkpoint of state.step, and point `last`, and `best` where it is the best, to it.

    `record` is kept in state.json beside train_state.
    """
    final = step_folder(run, state.step)
    if not final.exists():
        try:
            if lora.is_adapted(model) and not complete(run):
                with whole(run / BASE_FILE) as part:
                    save_weights(lora.split_weights(model)[0], part)
            write(final, model, positions, optimizer, {**record, "train_state": dataclasses.asdict(state)})
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            raise UserError(
                f"checkpoint {final} cannot be written: {error}; those before it are kept: make room, "
                "then --resume"
            ) from None
    point(run / "last", final)
    if state.best_step == state.step:
        point(run / "best", final)
    return final


def write(
    final: Path,
    model: GPT,
    positions: dict[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    content: dict[str, Any],
) -> None:
    """Write the files of a checkpoint under a temporary name, sync them, and rename."""
    part = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    base, adapters = lora.split_weights(model)
    sheets = {PREFIX + sheet: torch.from_numpy(p.astype(np.int16)) for sheet, p in positions.items()}
    save_weights(lora.merge(model, base, adapters) | sheets, part / "model.safetensors")
    if adapters:
        save_weights(adapters, part / ADAPTER_FILE)
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in (*part.iterdir(), part):
        fsync(path)
    part.rename(final)
    fsync(final.parent)


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    permit(path)


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Weights by name, without the tied head, and positions by sheet, in forward order, of a checkpoint."""
    tensors = read_tensors(folder / "model.safetensors")
    positions = {
        name.removeprefix(PREFIX): t.numpy().astype(np.int64)
        for name, t in tensors.items()
        if name.startswith(PREFIX)
    }
    positions = dict(sorted(positions.items(), key=lambda item: topo.sheet_order(item[0])))  # 2 before 10
    return {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}, positions


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path.parent} is damaged: {path.name}: {error}; use another checkpoint"
        ) from None


def load_adapters(model: GPT, folder: Path, merged: dict[str, Tensor]) -> None:
    """Adapters of a checkpoint into a model that has some; its other weights are those of the run's start.

    Raises UserError where both together are not `merged`, the weights of the checkpoint: one is damaged.
    """
    try:
        lora.load_adapters(model, read_tensors(folder / ADAPTER_FILE))
        for name, weight in lora.merge(model, *lora.split_weights(model)).items():
            # equal on one machine; another may round a sum of products otherwise
            if name in merged and not torch.allclose(weight, merged[name], rtol=1e-5, atol=1e-7):
                raise ValueError(f"{name} is not what model.safetensors holds")
    except ValueError as error:
        raise UserError(
            f"checkpoint {folder} is damaged: {ADAPTER_FILE} with {BASE_FILE}: {error}; delete it, and "
            "--resume goes on from the one before"
        ) from None


def load_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    """Weights by name, without a tied head."""
    head = {"lm_head.weight": weights["transformer.wte.weight"]} if model.cfg.tied else {}
    model.load_state_dict(weights | head)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, device: torch.device) -> None:
    """Moments and step counts from a checkpoint; learning rate, betas and decay stay as configured now."""
    try:
        saved = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise UserError(
            f"checkpoint {folder} is damaged: optimizer.pt: {error}; use another checkpoint"
        ) from None
    optimizer.load_state_dict(
        {"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    )


class LoadedRun(NamedTuple):
    model: GPT  # in eval mode
    positions: dict[str, np.ndarray]  # sheet -> (n_units, 2)
    state: dict[str, Any]  # state.json
    folder: Path  # of the checkpoint


def load_run(run: str | Path, which: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """Load a run's model; `which` is best, last or step-N."""
    folder = find_checkpoint(Path(run), which)
    state = read_state(folder)
    model = GPT(GPTConfig(**state["config"]["model"]))
    weights, positions = load_tensors(folder)
    load_weights(model, weights)
    return LoadedRun(model.to(device).eval(), positions, state, folder.resolve())
