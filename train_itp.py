"""Grow a connectome by iterative pruning: train, cut the smallest weights, inherit, and again.

    python train_itp.py configs/debug.yaml --run_name itp                     # six generations: 26.2 % left
    python train_itp.py configs/debug.yaml --run_name itp --resume            # continue, bit for bit
    python train.py configs/debug.yaml --run_name child --connectome out/itp  # born with it

out/NAME/generation-0, generation-1, ... are runs like any other; what is cut after each lies in its pruned/;
out/NAME itself is the connectome after the last (topogpt/model/connectome.py), with itp.json and itp.png.
"""

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topogpt.config import parse, to_yaml
from topogpt.errors import run_main
from topogpt.files import copy, read_json, write_json, write_text
from topogpt.model import connectome
from topogpt.model.cost import weight_shapes
from topogpt.runs import folder, lock
from topogpt.settings import ItpConfig, TrainConfig
from topogpt.terminal import print_table, say
from topogpt.training import preflight
from topogpt.training.interrupt import StopSignals

if TYPE_CHECKING:
    from topogpt.distributed import Ranks

FIXED = "max_steps prune per exempt inherit patience".split()  # besides what train.py --resume compares


def main(argv: list[str]) -> None:
    cfg = parse(ItpConfig, argv, prog="train_itp.py")
    os.environ.setdefault("WANDB_RUN_GROUP", cfg.run_name)
    with lock.held(Path(cfg.out_dir) / cfg.run_name, make=not cfg.resume):
        corpora = check(cfg)
        from topogpt import distributed  # with torch, which takes seconds

        with distributed.start(cfg.device) as ranks, StopSignals() as signals:
            grow(cfg, ranks, corpora, signals)


def check(cfg: ItpConfig) -> preflight.Checked:
    """Raise UserError for what would stop it later on."""
    corpora, root = preflight.check(cfg), Path(cfg.out_dir) / cfg.run_name
    connectome.wired_names(weight_shapes(cfg.model), cfg.exempt)
    saved = read_json(root / "itp.json")
    if cfg.resume and saved:
        preflight.check_same_run(cfg, saved, corpora.train.fingerprint, corpora.val.fingerprint)
        preflight.check_same_section(cfg.optim, "optim", saved["config"]["optim"])
        for key in FIXED:
            preflight.check_same_section(cfg, "", saved["config"], key)
    return corpora


def grow(cfg: ItpConfig, ranks: "Ranks", corpora: preflight.Checked, signals: StopSignals) -> None:
    """All generations, those that are done already left as they are; a signal ends it between two steps."""
    from train import train

    root, rows = Path(cfg.out_dir) / cfg.run_name, []
    if ranks.is_main:
        if cfg.overwrite and root.exists():
            folder.clear(root)
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / "config.yaml", to_yaml(dataclasses.replace(cfg, resume=False, overwrite=False)))
    ranks.barrier()
    for number in range(cfg.generations):
        if ranks.any(signals.received):
            return stopped(number, ranks)
        settings = generation(cfg, number)
        pruned = root / settings.run_name / "pruned"
        if not (pruned / connectome.RECORD).is_file():
            if ranks.is_main:
                say(f"---- generation {number} of {cfg.generations}")
                keep(cfg, corpora, rows)
            train(settings)
            if ranks.any(signals.received):
                return stopped(number, ranks)
            cut(cfg, settings, number, ranks, corpora)
        rows.append(connectome.check(pruned, cfg.model, "pruned"))
        if ranks.is_main:
            keep(cfg, corpora, rows)
    if ranks.is_main:
        for name in (connectome.FILE, connectome.REWIND_FILE, connectome.RECORD):  # the record last
            if (pruned / name).is_file():
                copy(pruned / name, root / name)
        show(cfg, root, rows)
    ranks.barrier()


def stopped(number: int, ranks: "Ranks") -> None:
    if ranks.is_main:
        say(f"stopped by a signal at generation {number}; the same command with --resume continues")


def generation(cfg: ItpConfig, number: int) -> TrainConfig:
    """Settings of train.py for a generation; all but the first inherit from the one before."""
    root = Path(cfg.out_dir) / cfg.run_name
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    given = {name: getattr(cfg, name) for name in names}
    given |= {"run_name": f"generation-{number}", "out_dir": str(root), "overwrite": False}
    given |= {"resume": (root / f"generation-{number}").is_dir() and not cfg.overwrite, "inherit": "signs"}
    if number:
        before = str(root / f"generation-{number - 1}" / "pruned")
        given |= {"connectome": before, "inherit": cfg.inherit, "init_from": None}
    return TrainConfig(**given)


def cut(
    cfg: ItpConfig, settings: TrainConfig, number: int, ranks: "Ranks", corpora: preflight.Checked
) -> None:
    """Prune the last checkpoint of a generation, and measure what pruning and inheriting do to the loss."""
    from topogpt.runs import checkpoint
    from topogpt.training import setup
    from topogpt.training.validation import evaluate

    run = Path(settings.out_dir) / settings.run_name
    t = setup.build(dataclasses.replace(settings, compile="off"), ranks, folder.newest(run))
    weights = {name: p.detach().cpu().clone() for name, p in t.model.named_parameters()}
    masks = None
    if t.connectome:
        masks = {name: wired != 0 for name, wired in t.connectome.wiring.items()}
    masks = connectome.prune(weights, masks, cfg.prune, cfg.per, cfg.exempt)
    found = connectome.Connectome(connectome.signs(weights, masks))
    # the start of a run is a function of its settings, so is what the next one has beside its wiring
    first = generation(cfg, 0)
    first = first if cfg.inherit == "rewind" else dataclasses.replace(first, init_from=None)
    start = starting_weights(first, ranks)
    loss = {"before": evaluate(t, corpora.val).cross_entropy}
    connectome.Masks(t.model, found).of_weights()
    loss["pruned"] = evaluate(t, corpora.val).cross_entropy
    for how in (cfg.inherit, "random"):
        checkpoint.load_weights(t.model, start)
        connectome.inherit(t.model, found, how, cfg.seed, start)
        loss["inherited" if how == cfg.inherit else "random"] = evaluate(t, corpora.val).cross_entropy
    found.about = {"generation": number, "fraction": cfg.prune, "per": cfg.per, "exempt": list(cfg.exempt)}
    found.about |= {"trained_under": t.connectome.kept if t.connectome else 1.0, "cross_entropy": loss}
    if ranks.is_main:
        (run / "pruned").mkdir(exist_ok=True)
        if cfg.inherit == "rewind":
            checkpoint.save_weights(start, run / "pruned" / connectome.REWIND_FILE)
        connectome.write(run / "pruned", found, cfg.model)
    ranks.barrier()


def starting_weights(settings: TrainConfig, ranks: "Ranks") -> dict[str, Any]:
    from topogpt.training import setup

    t = setup.build(dataclasses.replace(settings, resume=False, compile="off"), ranks)
    return {name: p.detach().cpu().clone() for name, p in t.model.named_parameters()}


def keep(cfg: ItpConfig, corpora: preflight.Checked, rows: list[dict[str, Any]]) -> None:
    """itp.json: settings and data, and what came of each generation."""
    content = {**corpora.record(cfg), "blind_guess": math.log(cfg.model.n_vocab), "generations": rows}
    write_json(Path(cfg.out_dir) / cfg.run_name / "itp.json", content)


def show(cfg: ItpConfig, root: Path, rows: list[dict[str, Any]]) -> None:
    """The table, and itp.png where matplotlib is there."""
    head = ["generation", "trained %", "loss", "left %", "loss pruned", f"by {cfg.inherit}", "random wiring"]
    lines = []
    for row in rows:
        loss = row["cross_entropy"]
        line = [str(row["generation"]), f"{100 * row['trained_under']:.1f}", loss["before"]]
        lines.append([*line, f"{100 * row['kept']:.1f}", loss["pruned"], loss["inherited"], loss["random"]])
    guess = math.log(cfg.model.n_vocab)
    print_table(head, [*lines, ["blind guess", None, guess, None, guess, guess, guess]])
    say(f"(loss: nats per token on {cfg.val_tokens:,} validation tokens; random wiring: as sparse)")
    pictures = [root / "itp.png"] if find_spec("matplotlib") else []
    for path in pictures:
        draw(path, rows, guess)
    say("written: " + ", ".join(map(str, [root / connectome.FILE, root / "itp.json", *pictures])))
    say(f"next: python train.py CONFIG --run_name NAME --connectome {root}, and again with --inherit random")


def draw(path: Path, rows: list[dict[str, Any]], guess: float) -> None:
    """Sparsity and losses by generation."""
    from topogpt import drawing

    figure = drawing.new_figure(6.4, 2.8)
    left, right = figure.subplots(1, 2)
    numbers = [row["generation"] for row in rows]
    left.plot(numbers, [100 * (1 - row["kept"]) for row in rows], "ko-", ms=3.5, lw=1)
    left.set(xlabel="generation", ylabel="pruned after it (%)", ylim=(0, 100))
    names = {"before": "trained", "pruned": "pruned", "inherited": "as inherited", "random": "random wiring"}
    for (key, name), line in zip(names.items(), ("ko-", "o--", "s-", "^:"), strict=True):
        right.plot(numbers, [r["cross_entropy"][key] for r in rows], line, ms=3.5, lw=1, label=name)
    right.axhline(guess, color="0.6", lw=0.8, ls=":", label=f"a blind guess ({guess:.2f})")
    right.set(xlabel="generation", ylabel="validation loss (nats per token)")
    right.legend(fontsize=6.5, frameon=False)
    for axis in (left, right):
        axis.set_xticks(numbers)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.save(figure, path)


if __name__ == "__main__":
    run_main(main)
