"""Checkpoints: weights, positions and optimiser of a step, saved whole or not at all, and loaded.

A checkpoint is written under a temporary name, fsynced and renamed, so one that has its final name is
complete; whether it still is what was written, the hashes in its state.json tell (seal.py). That of a model
with adapters holds the merged weights in model.safetensors, so it is read like any other, and the adapters
beside them; the weights they were added to are in the run's folder, once.
"""

import dataclasses
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from topogpt import topo
from topogpt.errors import UserError
from topogpt.files import fsync, permit, sha256, whole, write_text
from topogpt.model import lora
from topogpt.model.cost import weight_shapes
from topogpt.model.gpt import GPT
from topogpt.runs import seal
from topogpt.runs.folder import complete, find_checkpoint, point, set_aside, step_folder
from topogpt.runs.state import TrainState
from topogpt.settings import GPTConfig
from topogpt.terminal import say
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
    content = {**record, "train_state": dataclasses.asdict(state)}
    try:
        if final.exists():
            renew_state(final, content)
        else:
            if lora.is_adapted(model) and not complete(run):
                with whole(run / BASE_FILE) as part:
                    save_weights(lora.split_weights(model)[0], part)
            write(final, model, positions, optimizer, content)
        point(run / "last", final)
        if state.best_step == state.step:
            point(run / "best", final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
        found = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = " ".join(str(found).split())[:150]
        raise UserError(
            f"checkpoint {final} cannot be written: {reason}; those before it are kept: make room, then "
            "--resume"
        ) from None
    return final


def write(
    final: Path,
    model: GPT,
    positions: dict[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    content: dict[str, Any],
) -> None:
    """Write the files of a checkpoint under a temporary name, sync and hash them, and rename.

    A file is hashed and synced while the next one is written.
    """
    part = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    base, adapters = lora.split_weights(model)
    sheets = {PREFIX + sheet: torch.from_numpy(p.astype(np.int16)) for sheet, p in positions.items()}
    try:
        with ThreadPoolExecutor() as pool:
            hashes, synced = {}, []

            def finish(name: str) -> None:
                hashes[name] = pool.submit(sha256, part / name)
                synced.append(pool.submit(fsync, part / name))

            save_weights(lora.merge(model, base, adapters) | sheets, part / "model.safetensors")
            finish("model.safetensors")
            if adapters:
                save_weights(adapters, part / ADAPTER_FILE)
                finish(ADAPTER_FILE)
            with (part / "optimizer.pt").open("wb") as file:  # whose errors name their cause
                torch.save(optimizer.state_dict(), file)
            finish("optimizer.pt")
            found = {name: job.result() for name, job in hashes.items()}
            for job in synced:
                job.result()
        (part / "state.json").write_text(seal.state_text(content, found), encoding="utf-8")
        for path in (part / "state.json", part):
            fsync(path)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # half of it would fill the disk
        raise
    fsync(final.parent)


def renew_state(folder: Path, content: dict[str, Any]) -> None:
    """state.json anew where the step was saved before its evaluation (a signal came) and is evaluated now."""
    saved = seal.read_state(folder)
    if saved["train_state"] != content["train_state"]:
        hashes = saved.get("sha256") or {name: sha256(folder / name) for name in seal.FILES}
        others = {name: value for name, value in hashes.items() if name != "state.json"}
        write_text(folder / "state.json", seal.state_text(content, others))


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    permit(path)


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Weights by name, without the tied head, and positions by sheet, in forward order, of a checkpoint.

    Raises UserError where they are not those of its settings.
    """
    compare_tensors(folder, seal.read_state(folder)["config"])
    tensors = read_tensors(folder / "model.safetensors")
    positions = {
        name.removeprefix(PREFIX): t.numpy().astype(np.int64)
        for name, t in tensors.items()
        if name.startswith(PREFIX)
    }
    positions = dict(sorted(positions.items(), key=lambda item: topo.sheet_order(item[0])))  # 2 before 10
    return {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}, positions


def compare_tensors(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError where names, types or shapes in model.safetensors are not those of these settings."""
    try:
        model, layout = GPTConfig(**config["model"]), config.get("topo", {}).get("layout", "per_branch")
        units = math.prod(topo.sheet_shape(layout, model.n_layer, model.n_embd, model.n_hidden))
        expected = {name: ("F32", shape) for name, shape in weight_shapes(model).items()}
        sheets = topo.sheet_names(model.n_layer, layout)
        expected |= {PREFIX + sheet: ("I16", (units, 2)) for sheet in sheets}
        with safe_open(folder / "model.safetensors", "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise damaged(folder, "model.safetensors", error) from None
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        there, wanted = (said.get(wrong[0], "missing") for said in (found, expected))
        wanted = "nothing of the name" if wanted == "missing" else wanted
        raise damaged(folder, "model.safetensors", f"{wrong[0]} is {there}, not {wanted}")


def damaged(folder: Path, name: str, reason: object) -> UserError:
    said = " ".join(str(reason).split())[:150]
    return UserError(f"checkpoint {folder} is damaged: {name}: {said}; {seal.REMEDY}")


def last_whole(run: Path, chosen: Path | None = None) -> Path:
    """The newest checkpoint of a run that is whole; newer ones, damaged, are said and lose their names.

    Args:
        chosen: by hand: it must be whole; newer ones lose their names, too.
    """
    newer: list[tuple[Path, str]] = []  # and what is wrong with it
    for folder in complete(run)[::-1]:
        if chosen in (None, folder):
            try:
                compare_tensors(folder, seal.check(folder)["config"])
            except UserError as error:
                if chosen:
                    raise
                newer.append((folder, str(error).removesuffix(f"; {seal.REMEDY}")))
                continue
            for other, problem in newer:
                put_away(run, other, problem, folder.name)
            return folder
        newer.append((folder, ""))
    raise UserError(f"no checkpoint of {run} is whole: {newer[0][1]}; start anew with another --run_name")


def put_away(run: Path, folder: Path, problem: str, used: str) -> None:
    """A damaged checkpoint, or one that is later than the one chosen by hand, which keeps its records."""
    if problem:
        return say(f"WARNING: {problem}; going on from {used} (kept as {set_aside(folder, 'damaged').name})")
    if (run / "metrics.jsonl").is_file():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    say(f"{folder.name} is later than {used} (kept as {set_aside(folder, 'later').name}, with metrics.jsonl)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path.parent, path.name, error) from None


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
        saved = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)["state"]
        several = hasattr(optimizer, "parts")
        parts = zip(optimizer.parts, saved, strict=True) if several else [(optimizer, saved)]
        for part, state in parts:
            compare_moments(part, state)
        groups = optimizer.state_dict()["param_groups"]
    except (RuntimeError, EOFError, OSError, UnpicklingError, ValueError, LookupError, TypeError) as error:
        raise damaged(folder, "optimizer.pt", error) from None
    optimizer.load_state_dict({"state": saved, "param_groups": groups})


def compare_moments(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Tensor]]) -> None:
    """Raise ValueError where moments are not of the shape and type of what they are moments of."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if saved and set(saved) != set(range(len(trained))):
        raise ValueError(f"it has moments of {len(saved)} weights, not of {len(trained)}")
    for i, moments in saved.items():
        for name, t in dict(moments).items():
            shape = () if name == "step" else trained[i].shape
            if t.shape != shape or t.dtype != torch.float32:
                raise ValueError(f"{name} of weight {i} is {t.dtype} {tuple(t.shape)}, not {tuple(shape)}")


class LoadedRun(NamedTuple):
    model: GPT  # in eval mode
    positions: dict[str, np.ndarray]  # sheet -> (n_units, 2)
    state: dict[str, Any]  # state.json
    folder: Path  # of the checkpoint


def load_run(run: str | Path, which: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """Load a run's model, whose weights must be what was written; `which` is best, last or step-N."""
    folder = find_checkpoint(Path(run), which).resolve()  # the link may lead elsewhere while this reads
    state = seal.check(folder, seal.WEIGHTS)
    weights, positions = load_tensors(folder)
    model = GPT(GPTConfig(**state["config"]["model"]))
    load_weights(model, weights)
    return LoadedRun(model.to(device).eval(), positions, state, folder)
