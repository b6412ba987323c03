"""Write a checkpoint as a folder that stock transformers loads, and prove that it does.

    export("out/topolm")            # -> out/topolm/hf, with its proof or a UserError

The folder is a GPT2LMHeadModel, or an ArceeForCausalLM if positions are rotary (no remote code), with its
tokenizer, the positions of its units and a model card. Before it gets its name it is loaded with
transformers, and its logits, its greedy text and its tokens are compared with ours.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topogpt import topo, topography
from topogpt.errors import UserError
from topogpt.files import fsync, permit, write_json
from topogpt.settings import N_VOCAB
from topogpt.sharing import sparse as masks

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT
    from topogpt.runs.checkpoint import LoadedRun


def export(
    run: str | Path,
    which: str = "best",
    out: str | Path | None = None,
    dtype: str = "float32",
    *,
    repo_id: str | None = None,
    vocab_dir: str | None = None,
    sparse: bool = False,
    say: Any = print,
) -> Path:
    """Export a checkpoint (best, last, step-N) of a run, and return the folder; raises UserError.

    repo_id is the repository that the model card names; sparse adds masks and values (sparse.py). The folder
    appears, or replaces an older export, only once it has passed `prove`.
    """
    from topogpt.runs.checkpoint import load_run

    run = Path(run)
    target = Path(out) if out else run / "hf"
    check_replaceable(target)
    if sparse:
        masks.check(run)
    about = {"repo_id": repo_id, "vocab_dir": vocab_dir, "sparse": sparse, "say": say}
    return write_folder(target, run, load_run(run, which), dtype, **about)


def write_folder(
    target: Path,
    run: Path,
    loaded: "LoadedRun",
    dtype: str = "float32",
    *,
    repo_id: str | None = None,
    vocab_dir: str | None = None,
    sparse: bool = False,
    say: Any = print,
) -> Path:
    """Export what was loaded from a run, or made from that: its model is on the CPU."""
    from safetensors import SafetensorError

    from topogpt.sharing import proof, stock
    from topogpt.sharing.tokenizer_files import write_tokenizer
    from topogpt.text import tokenizer

    check_replaceable(target)
    stock.of_model(loaded.model.cfg)  # or it is refused
    words = tokenizer.load(vocab_dir) if loaded.model.cfg.vocab_size >= N_VOCAB else None
    part = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write_weights(part, loaded.model, dtype)
        if sparse:
            say(masks.write(part, run, loaded.model.cfg))
        write_config(part, loaded, dtype)
        write_topography(part, loaded)
        eot = words.eot if words else None
        generation = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
        write_json(part / "generation_config.json", generation, indent=2)
        if words is not None:
            write_tokenizer(part, words, loaded.model.cfg.block_size)
        write_record(part, run, loaded, repo_id, dtype)
        say(proof.prove(part, loaded.model, words))
        put_in_place(part, target)
    except (OSError, SafetensorError) as error:  # a full disk, among others
        where, why = getattr(error, "filename", None) or target, getattr(error, "strerror", None) or error
        raise UserError(f"{where}: {why}; nothing was exported") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"exported step {loaded.state['train_state']['step']:,} of {run}: {target}")
    return target


def check_replaceable(target: Path) -> None:
    if target.exists() and not (target / "topography.json").is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise UserError(f"out = {target} is there and is no export of ours; choose another --out")


def put_in_place(part: Path, target: Path) -> None:
    """Give the finished folder its name, in place of an older export."""
    for path in part.iterdir():
        path.chmod((part / "config.json").stat().st_mode)  # safetensors' files are for their owner alone
        fsync(path)
    fsync(part)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# ---- the files -----------------------------------------------------------------------------------


def write_weights(folder: Path, model: "GPT", dtype: str) -> None:
    """model.safetensors as the stock class has it, and the padding rows beside it; rounds `model`, too."""
    from safetensors.torch import save_file

    from topogpt.sharing.load import PADDING_FILE
    from topogpt.sharing.stock import to_stock

    tensors, padding = to_stock(model, dtype)
    files = {"model.safetensors": tensors} | ({PADDING_FILE: padding} if padding else {})
    for name, content in files.items():
        save_file(content, folder / name, metadata={"format": "pt"})
        permit(folder / name)


def write_config(folder: Path, loaded: "LoadedRun", dtype: str) -> None:
    """config.json, with what is said of the sheets under a key of its own."""
    from topogpt.sharing.stock import to_config

    said, sheets = to_config(loaded.model.cfg, dtype), loaded.state["config"]["topo"]
    grid = topo.grid_of(next(iter(loaded.positions.values())))
    facts = {
        "format": topography.FORMAT, "file": "topography.safetensors",
        "grid": list(grid), "unit_distance_mm": 1.0, "positions": sheets["positions"],
        "seed": sheets["seed"], "loss": sheets["loss"],
        "weight": sheets["weight"] if "topolm" in sheets["loss"] else 0.0, **said["topography"],
        "step": loaded.state["train_state"]["step"],
    }  # fmt: skip
    write_json(folder / "config.json", said | {"topography": facts}, indent=2)


def write_topography(folder: Path, loaded: "LoadedRun") -> None:
    from topogpt.sharing.stock import of_model

    sheets = loaded.state["config"]["topo"]
    cfg = loaded.model.cfg
    shown = of_model(cfg).PLACES.shown_by(cfg, loaded.positions)
    facts = {"shown_by": shown, "step": loaded.state["train_state"]["step"]}
    place = {"kind": sheets["positions"], "seed": sheets["seed"]}
    topography.save_topography(folder, loaded.positions, **place, **facts)


def write_record(folder: Path, run: Path, loaded: "LoadedRun", repo_id: str | None, dtype: str) -> None:
    """The resolved training config, the metrics, the picture of the sheets and the model card."""
    import yaml

    from topogpt.sharing import card as modelcard

    config = yaml.safe_dump(loaded.state["config"], sort_keys=False)  # JSON's lists and dicts
    (folder / "training_config.yaml").write_text(config, encoding="utf-8")
    as_trained = "compressed" not in loaded.state  # else the run's record is of another model
    if as_trained and (run / "metrics.jsonl").is_file():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    picture = modelcard.picture_of(run, loaded.state["train_state"]["step"]) if as_trained else None
    if picture:
        shutil.copyfile(picture, folder / "sheets.png")
    card = modelcard.write(run, loaded, repo_id, dtype, bool(picture))
    (folder / "README.md").write_text(card, encoding="utf-8")
