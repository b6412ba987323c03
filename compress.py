"""Make a trained model's MLPs smaller, several ways, and say what is lost.

    python compress.py out/toponet                               # four methods, at 80, 50 and 20 %
    python compress.py out/toponet --control out/control --keep 0.5 --method downsample units
    python compress.py out/toponet --method units --keep 0.5 --out out/narrow    # a stock model, half as wide

A table, and RUN/compress.json and compress.png. downsample: TopoNets' resized sheets; every_nth: equally
spaced units; units: a narrower model fitted anew, the only one that is faster; l1: the largest weights. The
methods are in topogpt/model/compress.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.settings import CompressConfig
from topogpt.sharing.export import check_replaceable, write_folder
from topogpt.terminal import print_table, say

if TYPE_CHECKING:
    from topogpt.analysis.compression import Measured


def main(argv: list[str]) -> None:
    cfg = parse(CompressConfig, argv, prog="compress.py")
    for run in filter(None, (cfg.run, cfg.control)):
        if not Path(run).is_dir():
            raise UserError(f"run {run} does not exist; give the folder of a run, such as out/NAME")
    if cfg.out:
        check_replaceable(Path(cfg.out))
    from topogpt.analysis import compression  # with torch, which takes seconds

    measured = compression.measure(cfg)
    show(cfg, measured)
    if cfg.out:  # before the record, so that nothing is written if the model cannot be
        narrow = compression.narrower_run(cfg, measured.models[0])
        write_folder(Path(cfg.out), Path(cfg.run), narrow, vocab_dir=cfg.vocab_dir, say=say)
    for path in compression.save(cfg, measured):
        say(f"written: {path}")


def show(cfg: CompressConfig, measured: "Measured") -> None:
    """One table, the control's columns beside the run's."""
    from topogpt.analysis.compression import ENCODING, blind

    head, several = ["method", "kept", "parameters", "MB on disk"], len(measured.models) > 1
    for found in measured.models:
        prefix = f"{found.label}: " if several else ""
        head += [f"{prefix}loss", "increase", "tokens/s"]
    rows = []
    for each in zip(*(found.rows for found in measured.models), strict=True):
        row = each[0]
        name = "as trained" if row.method == "none" else row.method
        rows.append([name, f"{100 * row.keep:g} %", row.n_parameters, f"{row.n_bytes / 1e6:.1f}"])
        for r in each:
            speed = None if r.tokens_per_s is None else round(r.tokens_per_s)
            rows[-1] += [r.loss, None if r.method == "none" else f"{r.increase:+.3f}", speed]
    guess = blind(measured.models[0])
    rows.append(["a blind guess", *[None] * 3, *[guess, None, None] * len(measured.models)])
    print_table(head, rows)
    say(f"(loss: nats per token on up to {cfg.n_tokens:,} validation tokens; MB: {ENCODING})")


if __name__ == "__main__":
    run_main(main)
