"""What can be said of a run before torch is imported: is the data whole, is the folder free, does it divide.

`check` changes nothing on disk, but for making out_dir; `locked` makes the run's folder, too, and locks it.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from topogpt.config import flat
from topogpt.errors import UserError
from topogpt.model import connectome
from topogpt.model.lora import check_peft, layers_to_adapt
from topogpt.ranks import read_place
from topogpt.runs import lock
from topogpt.runs.folder import find_checkpoint, is_empty, newest
from topogpt.runs.seal import read_state
from topogpt.settings import TrainConfig
from topogpt.sharing import push
from topogpt.text.loader import Corpus, open_corpus

# settings that say where things lie and how a start goes, not how the run goes on
OF_A_START = (
    "run_name out_dir train_data_dir val_data_dir init_from connectome resume overwrite checkpoint".split()
)
MOST_EPOCHS = 100  # more is a mistake, or learning by heart


class Checked(NamedTuple):
    train: Corpus
    val: Corpus
    resume_from: Path | None  # checkpoint to continue from
    connectome: str | None  # SHA-256 of the one that is inherited
    changed: tuple[str, ...] = ()  # what --resume does with other settings than the run had, line by line

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 that stand for the tokens of each corpus."""
        return {"train_data_dir": self.train.fingerprint, "val_data_dir": self.val.fingerprint}

    def record(self, cfg: TrainConfig) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors and train_state; compared on resuming."""
        return {"config": dataclasses.asdict(cfg), "data": self.fingerprints, "connectome": self.connectome}


def check(cfg: TrainConfig) -> Checked:
    """Raise UserError for what would stop the run later on; open the data."""
    rank, world, *_ = read_place()
    check_batch_size(cfg, world)
    if cfg.lora_rank:
        layers_to_adapt(cfg.model, cfg.lora_modules, cfg.lora_rank)
        check_peft(cfg.lora_rank)
    train, val = (
        open_corpus(getattr(cfg, key), key=key, vocab_size=cfg.model.vocab_size, verify=rank == 0)
        for key in ("train_data_dir", "val_data_dir")
    )
    for corpus in (train, val):
        corpus.n_windows(cfg.model.block_size)  # raises where the corpus is shorter than one
    wiring = check_connectome(cfg) if cfg.connectome else None
    if rank == 0:
        check_services(cfg)
        check_run_folder(cfg)
    folder = checkpoint_to_resume(cfg)
    changed: tuple[str, ...] = ()
    if rank == 0 and folder is not None:
        saved = read_state(folder)
        check_same_run(cfg, saved, train.fingerprint, val.fingerprint)
        check_same_connectome(cfg, saved, wiring)
        changed = changed_settings(cfg, saved["config"])
    return Checked(train, val, folder, wiring, changed)


@contextlib.contextmanager
def locked(cfg: TrainConfig) -> Iterator[Checked]:
    """What `check` finds, with the run's folder held against other processes (rank 0 holds it for all)."""
    with lock.held(Path(cfg.out_dir) / cfg.run_name, make=not cfg.resume):
        yield check(cfg)


def checkpoint_to_resume(cfg: TrainConfig) -> Path | None:
    """The one that --checkpoint names, or the newest, as far as can be seen without reading all of it."""
    run = Path(cfg.out_dir) / cfg.run_name
    if cfg.checkpoint is None:
        return newest(run) if cfg.resume else None
    if not cfg.resume:
        raise UserError(
            f"checkpoint = {cfg.checkpoint} has no effect without --resume; add it, or leave it out"
        )
    chosen = read_state(find_checkpoint(run, cfg.checkpoint))["train_state"]
    return find_checkpoint(run, f"step-{chosen['step']}")


def check_services(cfg: TrainConfig) -> None:
    """Whether what the run is copied to can be reached at all: now, not after days of training."""
    if cfg.push_to_hf:
        push.check_login(cfg.run_name)
    if cfg.wandb and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise UserError("wandb = True, but wandb is not installed; pip install wandb, or leave --wandb out")


def find_data(cfg: TrainConfig) -> TrainConfig:
    """On the documentation inside Python, and said so, where the usual data are missing and it is enough."""
    pydoc, usual = Path("data/pydoc"), TrainConfig.train_data_dir
    if (cfg.train_data_dir, cfg.val_data_dir) != (usual, TrainConfig.val_data_dir) or Path(usual[0]).exists():
        return cfg
    n = sum((path.stat().st_size - 1024) // 2 for path in (pydoc / "train").glob("*.bin"))
    if cfg.max_steps * cfg.batch_size * cfg.model.block_size > MOST_EPOCHS * n:
        return cfg
    if read_place().rank == 0:
        print(f"{usual[0]} is not prepared: training on {pydoc}, the documentation inside Python")
    return dataclasses.replace(cfg, train_data_dir=(f"{pydoc}/train",), val_data_dir=(f"{pydoc}/val",))


def check_connectome(cfg: TrainConfig) -> str:
    """SHA-256 of the connectome that is inherited."""
    found = connectome.check(cfg.connectome, cfg.model)
    if cfg.inherit == "rewind" and not (connectome.find(cfg.connectome) / connectome.REWIND_FILE).is_file():
        raise UserError(
            f"inherit = rewind: {cfg.connectome} has no {connectome.REWIND_FILE}; train_itp.py --inherit "
            "rewind keeps one, or give --inherit signs"
        )
    inside = Path(cfg.connectome).resolve() == (Path(cfg.out_dir) / cfg.run_name).resolve()
    if cfg.overwrite and inside:
        raise UserError(f"overwrite: {cfg.connectome} is the connectome itself; choose another --run_name")
    return found["sha256"]


def check_same_connectome(cfg: TrainConfig, saved: dict[str, Any], now: str | None) -> None:
    was = saved.get("connectome")
    if was != now:
        names = [
            f"{path} (sha256 {(digest or '')[:12]})" if digest else "none"
            for path, digest in ((cfg.connectome, now), (saved["config"].get("connectome"), was))
        ]
        raise UserError(
            f"resume: connectome = {names[0]}, but the run was started with {names[1]}; give that one, or "
            "start a new run with another --run_name"
        )


def check_batch_size(cfg: TrainConfig, world: int) -> None:
    per_micro_step = cfg.per_device_batch_size * world
    if cfg.batch_size % per_micro_step:
        nearest = max(1, round(cfg.batch_size / per_micro_step)) * per_micro_step
        raise UserError(
            f"batch_size = {cfg.batch_size} is not a multiple of per_device_batch_size = "
            f"{cfg.per_device_batch_size} x {world} process{'es' if world > 1 else ''}; the nearest "
            f"that is: --batch_size {nearest}"
        )


def check_run_folder(cfg: TrainConfig) -> None:
    out, run = Path(cfg.out_dir), Path(cfg.out_dir) / cfg.run_name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run if run.is_dir() else out):
            pass
    except OSError as error:
        raise UserError(
            f"out_dir = {out} cannot be written: {error.strerror}; choose another --out_dir"
        ) from None
    lock.check(run)
    if cfg.resume and not run.is_dir():
        there = ", ".join(sorted(p.name for p in out.iterdir() if p.is_dir())) or "none"
        raise UserError(
            f"resume: there is no run {run} (runs there: {there}); leave out --resume to start it"
        )
    if cfg.overwrite and not is_empty(run) and not (run / "config.yaml").is_file():
        raise UserError(
            f"overwrite: {run} is not the folder of a run (it has no config.yaml), so it is not deleted; "
            "choose another --run_name"
        )
    if cfg.overwrite and cfg.init_from and Path(cfg.init_from).resolve().is_relative_to(run.resolve()):
        raise UserError(
            f"overwrite: {run} holds the weights of init_from = {cfg.init_from}; choose another --run_name"
        )
    if not cfg.resume and not cfg.overwrite and not is_empty(run):
        raise UserError(
            f"run_name = {cfg.run_name}: {run} exists; continue it with --resume, delete it with "
            "--overwrite, or choose another --run_name"
        )


def check_same_run(cfg: TrainConfig, saved: dict[str, Any], train: str, val: str) -> None:
    """Refuse to continue a run with another model, topography, data or order of the data."""
    for section in ("model", "topo"):
        check_same_section(getattr(cfg, section), section, saved["config"][section])
    for key in ("seed", "batch_size"):
        refuse_change(key, saved["config"][key], getattr(cfg, key))
    check_same_section(cfg, "", saved["config"], "lora_")
    check_same_section(cfg, "", saved["config"], "inherit")
    check_same_section(cfg.optim, "optim", saved["config"]["optim"], "name")
    for key, now in (("train_data_dir", train), ("val_data_dir", val)):
        if saved["data"][key] != now:
            raise UserError(
                f"resume: {key} holds other tokens than the run was started with (fingerprint "
                f"{now[:12]}, was {saved['data'][key][:12]}); give the old data, or start a new run with "
                "another --run_name"
            )


def changed_settings(cfg: TrainConfig, saved: dict[str, Any]) -> tuple[str, ...]:
    """A line for each setting that is not what it was; what was no setting then had its default."""
    now = flat(dataclasses.asdict(cfg))
    was = flat(dataclasses.asdict(TrainConfig(run_name=cfg.run_name))) | flat(saved)
    names = [key for key in now if key not in OF_A_START and now[key] != was.get(key)]
    return tuple(f"resume: {key} = {now[key]} (until now {was.get(key)})" for key in names)


def check_same_section(now: Any, section: str, saved: dict[str, Any], start: str = "") -> None:
    """A setting that was not there when the run was started had its default; start: of their names."""
    for f in dataclasses.fields(now):
        if f.name.startswith(start):
            was = saved.get(f.name, f.default)
            was = tuple(was) if isinstance(was, list) else was  # as JSON has them
            refuse_change(f"{section}.{f.name}".removeprefix("."), was, getattr(now, f.name))


def refuse_change(key: str, was: Any, now: Any) -> None:
    if was != now:
        raise UserError(
            f"resume: {key} = {now}, but the run was started with {was}; give the old value, or start a new "
            "run with another --run_name"
        )
