"""A table of finetuned runs: loss on the new text before and after, by model and rank of the adapters.

python -m evals.finetuned out/tau1-lora2 out/tau1-lora4 out/baseline-lora2
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.model.lora import n_adapter_parameters
from topogpt.runs import folder
from topogpt.settings import GPTConfig
from topogpt.spatial.schedule import losses_in_words
from topogpt.terminal import print_table, say

HEAD = ["model", "its spatial loss", "kept", "rank", "trained", "before", "after", "change", "step"]


@dataclass(frozen=True, kw_only=True)
class FinetunedConfig:
    """Compare finetuned runs on the text they were finetuned on: python -m evals.finetuned RUN [RUN ...]."""

    runs: tuple[str, ...]  # folders of runs that finetune.py made


def main(argv: list[str]) -> None:
    cfg = parse(FinetunedConfig, argv, prog="python -m evals.finetuned")
    if not cfg.runs:
        raise UserError("runs is empty; give folders of runs that finetune.py made")
    found = [read(Path(run)) for run in cfg.runs]
    found.sort(key=lambda each: (each[0][0], each[0][3] or math.inf))  # full finetuning last
    print_table(HEAD, [row for row, _ in found])
    blind = {math.log(model.n_vocab) for _, (model, _) in found}
    say(f"(nats per token on validation text; a blind guess: {', '.join(f'{b:.3f}' for b in sorted(blind))};")
    say("after: the best evaluation, at that step; trained: parameters; kept: a spatial loss in finetuning)")
    if len({text for _, (_, text) in found}) > 1:
        say("note: these runs saw different tokens in training or validation, so their losses do not compare")


def read(run: Path) -> tuple[list[Any], tuple[GPTConfig, Any]]:
    """A row of the table; the model's shape, and what tells which tokens the losses are of."""
    if not (run / "last").is_dir():
        raise UserError(f"run {run} has no checkpoint; give folders of runs that finetune.py made")
    state = folder.read_state(run / "last")
    cfg, records = state["config"], folder.read_metrics(run, "val")
    if not cfg.get("init_from") or not records or records[0]["step"]:
        raise UserError(f"run {run} was not started from a model; give folders of runs that finetune.py made")
    model, rank, source = GPTConfig(**cfg["model"]), cfg.get("lora_rank", 0), Path(cfg["init_from"])
    n_trained = n_adapter_parameters(model, cfg["lora_modules"], rank) if rank else None
    best = min(records, key=lambda r: math.inf if math.isnan(r["cross_entropy"]) else r["cross_entropy"])
    before, after = (r["cross_entropy"] for r in (records[0], best))
    row = [source.name, losses_of(source), "yes" if cfg["topo"]["loss"] != "none" else "no", rank]
    row += [n_trained or "every one", before, after, f"{after - before:+.3f}", best["step"]]
    return row, (model, (tuple(state["data"].values()), cfg["val_tokens"], model.block_size))


def losses_of(source: Path) -> str | None:
    """In words, where the model is a run that is still there."""
    if not (source / "best").is_dir():
        return None
    return losses_in_words(folder.read_state(source / "best")["config"]["topo"])


if __name__ == "__main__":
    run_main(main)
