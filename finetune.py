"""Train a finished model on other text: all of its weights, or low-rank adapters (LoRA) in frozen ones.

    python finetune.py out/toponet --data mine.jsonl                                # every weight
    python finetune.py out/toponet --data mine.jsonl --lora_rank 8                  # adapters, by peft
    python finetune.py USER/NAME --data data/mine --lora_rank 8 --keep_topography   # its spatial loss, too
    python finetune.py out/toponet --data mine.jsonl --lora_rank 8 --resume         # continue, bit for bit

The run that this makes, out/toponet-lora8, is a run like any other: train.py's loop has trained it, its
checkpoints hold merged weights and the model's map, and every command reads it. Text is prepared once, as
prepare_fineweb.py does. The adapters are in topogpt/model/lora.py.
"""

import hashlib
import json
import sys
import time
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from prepare_fineweb import prepare
from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.files import read_json
from topogpt.runs import folder
from topogpt.settings import (
    N_VOCAB,
    FinetuneConfig,
    GPTConfig,
    LoopConfig,
    OptimConfig,
    PrepareConfig,
    TopoConfig,
    TrainConfig,
)
from topogpt.text import prepared, sources
from topogpt.text.loader import open_corpus
from topogpt.topo import grid_shape
from topogpt.training import preflight


def main(argv: list[str]) -> None:
    cfg = parse(FinetuneConfig, argv, prog="finetune.py")
    given = {a.partition("=")[0].replace("-", "_")[7:] for a in argv if a.startswith("--topo.")}
    settings = settings_of(cfg, given)
    check_enough(settings)
    preflight.check(settings)
    from train import train  # with torch, which takes seconds

    train(settings)


def settings_of(cfg: FinetuneConfig, given: Collection[str] = ()) -> TrainConfig:
    """The settings of train.py that finetune as cfg says; prepares text that is not prepared yet.

    given: names of cfg.topo whose values win over those that the model was trained with.
    """
    name = cfg.run_name or name_of(cfg)
    source = source_of(cfg, folder.newest(Path(cfg.out_dir) / name) if cfg.resume else None)
    lr = (1e-3 if cfg.lora_rank else 1e-4) if cfg.lr is None else cfg.lr
    size = source.model.block_size if cfg.block_size is None else cfg.block_size
    if size > source.model.block_size:
        raise UserError(
            f"block_size = {size} is more than the model has; give {source.model.block_size} or less"
        )
    schedule = {"warmup_steps": cfg.warmup_steps, "decay_steps": None}
    shared = {f.name: getattr(cfg, f.name) for f in fields(LoopConfig)}
    folders = data_folders(cfg, source.model)
    return TrainConfig(
        **shared | {"run_name": name},
        train_data_dir=tuple(str(path / "train") for path in folders),
        val_data_dir=tuple(str(path / "val") for path in folders),
        init_from=cfg.run,
        model=replace(source.model, block_size=size),
        topo=replace(source.topo, **{key: getattr(cfg.topo, key) for key in given}),
        optim=OptimConfig(lr=lr, min_lr=lr / 10, weight_decay=cfg.weight_decay, **schedule),
    )


def name_of(cfg: FinetuneConfig) -> str:
    """toponet-lora8 of out/toponet, of out/toponet/hf and of USER/toponet."""
    path = Path(cfg.run)
    path = path.resolve() if path.is_dir() else path
    path = path.parent if path.name == "hf" else path
    return f"{path.name}-lora{cfg.lora_rank}" if cfg.lora_rank else f"{path.name}-full"


# ---- the model -----------------------------------------------------------------------------------


class Source(NamedTuple):
    """Shape of a model, and the sheets to train it with."""

    model: GPTConfig
    topo: TopoConfig


def source_of(cfg: FinetuneConfig, checkpoint: Path | None) -> Source:
    """Of the checkpoint that is continued; else of the model to start from, its losses only if asked for."""
    path = Path(cfg.run)
    if checkpoint:
        said = folder.read_state(checkpoint)["config"]
        if said["init_from"] is None or Path(said["init_from"]).resolve() != path.resolve():
            raise UserError(
                f"resume: run = {cfg.run}, but {checkpoint.parents[1]} was started from {said['init_from']}; "
                "give that, or another --run_name"
            )
        return Source(GPTConfig(**said["model"]), topo_of(said["topo"]))
    if (path / "checkpoints").is_dir():
        said = folder.read_state(path / "best")["config"]
        model, topo = GPTConfig(**said["model"]), topo_of(said["topo"])
    else:
        model, topo = exported_source(path)
    if cfg.keep_topography and topo is None:
        raise UserError(f"keep_topography: {path} does not say what spatial loss it had; give --topo.loss")
    if topo is None:
        topo = TopoConfig(radius=min(TopoConfig.radius, (min(grid_shape(model.n_embd)) + 1) // 2))
    loss = topo.loss if cfg.keep_topography else "none"
    return Source(model, replace(topo, loss=loss, weight_schedule="constant", weight_warmup_steps=0))


def exported_source(path: Path) -> tuple[GPTConfig, TopoConfig | None]:
    """Of an exported folder or a repository of the Hub; None where it records no sheets."""
    import yaml

    from topogpt.sharing.load import find_folder, load_folder

    exported = find_folder(path)
    model, record = load_folder(exported).cfg, exported / "training_config.yaml"
    if not record.is_file():
        return model, None
    try:
        return model, topo_of(yaml.safe_load(record.read_text(encoding="utf-8"))["topo"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{record} is damaged: {reason}; export the model again") from None


def topo_of(said: dict[str, Any]) -> TopoConfig:
    """As JSON and YAML have it."""
    return TopoConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in said.items()})


# ---- the text ------------------------------------------------------------------------------------


def data_folders(cfg: FinetuneConfig, model: GPTConfig) -> list[Path]:
    """Folders with train/ and val/: those among --data, and what is made of the rest."""
    is_ready = {p: Path(p, "train").is_dir() and Path(p, "val").is_dir() for p in cfg.data}
    text = tuple(p for p, ready in is_ready.items() if not ready)
    if text and model.vocab_size < N_VOCAB:
        raise UserError(
            f"{cfg.run} has a vocabulary of {model.vocab_size} tokens, not GPT-2's {N_VOCAB}, in which "
            f"data = {text[0]} would be written; give a folder with train/ and val/, shards of its own tokens"
        )
    files = tuple(p for p in text if p != "pydoc")
    folders = [Path(p) for p in cfg.data if is_ready[p]]
    folders += [prepare_once(cfg, ("pydoc",))] if files != text else []
    return [*folders, prepare_once(cfg, files)] if files else folders


def prepare_once(cfg: FinetuneConfig, text: tuple[str, ...]) -> Path:
    """The folder of this text and split; its name holds a hash of both, so other text has another folder."""
    how = {"source": text, "text_column": cfg.text_column, "val_fraction": cfg.val_fraction}
    settings = PrepareConfig(**how, vocab_dir=cfg.vocab_dir)
    if text == ("pydoc",):
        name, what = "pydoc", {"pydoc": sys.version, "val_fraction": cfg.val_fraction}
    else:
        source = sources.Files(text, cfg.text_column, key="data")
        name, what = source.name, prepared.describe(settings, source, cfg.val_fraction)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    out = Path(cfg.data_dir) / f"{name}-{digest}"
    manifest = out / "manifest.json"
    if not manifest.is_file() and not prepare(replace(settings, out_dir=str(out))):
        while not manifest.is_file():  # the first of several ranks makes it; if that fails, all are ended
            time.sleep(0.2)
    documents = read_json(manifest).get("documents", {})
    for split in ("train", "val"):
        if not documents.get(split):
            others = sum(documents.get(s, 0) for s in ("train", "val"))
            raise UserError(
                f"data = {' '.join(text)}: none of its {others} documents fell into {split} at "
                f"val_fraction = {cfg.val_fraction}; give more (a .txt file is one) or another --val_fraction"
            )
    return out


def check_enough(cfg: TrainConfig) -> None:
    """Refuse text that is too little to fill a batch, or to validate on."""
    size = cfg.model.block_size
    for key, wanted, remedy in (
        ("train_data_dir", cfg.batch_size, "a smaller --batch_size"),
        ("val_data_dir", 1, "a larger --val_fraction"),
    ):
        corpus = open_corpus(getattr(cfg, key), key=key, vocab_size=cfg.model.vocab_size, verify=False)
        n_windows = (corpus.n_tokens - 1) // size
        if n_windows < wanted:
            raise UserError(
                f"data: {corpus.n_tokens:,} tokens in {' '.join(getattr(cfg, key))} are {n_windows} windows "
                f"of block_size {size}, and {wanted} are needed; give more text, a smaller --block_size or "
                f"{remedy}"
            )


if __name__ == "__main__":
    run_main(main)
