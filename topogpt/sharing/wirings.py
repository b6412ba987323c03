"""A connectome as a folder that can be pushed to the Hub: its files, how it came to be, and a card."""

from pathlib import Path
from typing import Any

from topogpt.errors import UserError
from topogpt.files import copy, read_json, write_text
from topogpt.model import connectome
from topogpt.settings import GPTConfig

STORY = ("itp.json", "itp.png")  # of train_itp.py


def is_connectome(folder: Path) -> bool:
    """What train_itp.py has made, and no run or exported model."""
    return (folder / connectome.RECORD).is_file() and not (folder / "checkpoints").is_dir()


def check(folder: Path) -> dict[str, Any]:
    """The record of a connectome that is whole."""
    shape = read_json(folder / connectome.RECORD).get("model")
    if not isinstance(shape, dict):
        raise UserError(f"{folder} is damaged: {connectome.RECORD} names no model; make it anew")
    return connectome.check(folder, GPTConfig(**shape), "run")


def export(source: Path, out: str | Path | None = None, repo_id: str | None = None) -> Path:
    """Write the folder, out/NAME/hf unless told otherwise, and return it; repo_id: named by the card."""
    record, target = check(source), Path(out) if out else source / "hf"
    if target.exists() and not (target / connectome.RECORD).is_file():
        raise UserError(f"out = {target} is there and holds no connectome; choose another --out")
    names = [connectome.FILE, connectome.REWIND_FILE, *STORY, connectome.RECORD]  # the record last
    target.mkdir(parents=True, exist_ok=True)
    (target / connectome.RECORD).unlink(missing_ok=True)
    grown = read_json(source / STORY[0]) if (source / STORY[0]).is_file() else {}
    write_text(target / "README.md", card(repo_id or "USER/NAME", record, grown.get("generations", [])))
    for name in names:
        if (source / name).is_file():
            copy(source / name, target / name)
    return target


def card(repo_id: str, record: dict[str, Any], generations: list[dict[str, Any]]) -> str:
    """README.md: what it is, how to train from it, how it was grown."""
    cfg = GPTConfig(**record["model"])
    switches = {"norm": cfg.norm, "position": cfg.position, "tied": cfg.tied, "bias": cfg.bias}
    switches |= {"scale_attention": cfg.scale_attention}
    rows = [
        f"| {row['generation']} | {100 * (1 - row['kept']):.1f} | {loss['before']:.3f} "
        f"| {loss['pruned']:.3f} | {loss['inherited']:.3f} | {loss['random']:.3f} |"
        for row in generations
        for loss in [row["cross_entropy"]]
    ]
    lines = [
        "---\nlibrary_name: topogpt\nlicense: unknown\ntags:\n- connectome\n- pruning\n---",
        f"\n# {repo_id.rpartition('/')[2]}\n",
        f"A connectome for a GPT of {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.n_head} heads, after Model "
        f"Connectomes (Kotar & Tuckute 2025, arXiv 2504.21047): which of its weights there are, "
        f"{record['kept']:.1%} of those of its matrices, and their signs. It holds no weights.\n",
        f"```\npython train.py CONFIG --run_name child --connectome {repo_id}\n```\n",
        f"The model must have the same shape: {', '.join(f'{k} {v}' for k, v in switches.items())}.",
        f"`{connectome.FILE}` is int8 by weight name: 1 or -1 a connection and its sign, 0 none.",
    ]
    if rows:
        lines += [
            "\n## How it was grown\n",
            f"Each generation was trained, and then lost {record['fraction']:.0%} of its remaining weights, "
            "the smallest. Losses are validation cross-entropies (nats per token); a random wiring is as "
            "sparse.\n",
            "| generation | pruned after it (%) | trained | pruned | as inherited | random wiring |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    return "\n".join(lines) + "\n"
