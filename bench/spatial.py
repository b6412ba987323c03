"""The spatial loss of all sheets, forward and backward, against the usual loop over neighbourhoods.

    python -m bench.spatial                                       # 24 sheets of 784 units, 4096 tokens
    python -m bench.spatial --device cuda --tokens 49152 --dtype bfloat16 float32

The loop takes a boolean mask, torch.corrcoef and distances 1 / (1 + l2) for each of the 120 neighbourhoods.
First, ours is compared with the loop in float64, losses and gradients, on fewer tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench.common import Report, device_label, interleaved, matmul_precision, start
from topogpt import topo
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.settings import TopoConfig

# |out - ref| / |ref| of losses and gradients, without TF32: the rounding of the dtype
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2}
CHECK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """Time the spatial loss against the usual loop over neighbourhoods."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: tuple[Literal["float32", "bfloat16", "float64"], ...] = ("float32",)  # of activations; one or more
    tokens: int = 4096  # of a micro-batch
    sheets: int = 24  # two for each layer
    n_embd: int = 784  # units of a sheet
    radius: int = 5  # of a neighbourhood
    neighbourhoods: int = 5  # of a sheet
    repeats: int = 7  # of each, in turns
    threads: int | None = None  # of the CPU; None: torch's choice
    json: bool = False  # one JSON object a line on stdout

    def __post_init__(self) -> None:
        for name in ("tokens", "sheets", "n_embd", "neighbourhoods", "repeats", "threads"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 2 if name == "tokens" else 1)
        if not self.dtype:
            raise UserError("dtype is empty; give one or more of float32, bfloat16, float64")


def main(argv: list[str]) -> None:
    cfg = parse(SpatialConfig, argv, prog="python -m bench.spatial")
    import torch

    from bench.variants import LoopLoss, draw_activations, gradients, spatial_errors
    from topogpt.spatial.topolm import TopoLMLoss

    device = start(cfg.device, cfg.threads)
    report = Report(as_json=cfg.json, device=device_label(device))
    topo_cfg = TopoConfig(radius=cfg.radius, neighbourhoods=cfg.neighbourhoods)
    names = [f"sheet.{i}" for i in range(cfg.sheets)]
    positions = {name: topo.positions("permuted", cfg.n_embd, 0, name) for name in names}
    ours, loop = TopoLMLoss(topo_cfg, positions).to(device), LoopLoss(topo_cfg, positions).to(device)
    report.say(
        f"spatial loss, forward + backward: {cfg.sheets} sheets x {cfg.tokens} tokens x {cfg.n_embd} units, "
        f"{cfg.neighbourhoods} neighbourhoods of radius {cfg.radius} each; {report.device}"
    )
    rows = []
    for dtype in cfg.dtype:
        leaves = draw_activations(
            cfg.sheets, cfg.tokens, cfg.n_embd, dtype=getattr(torch, dtype), device=device
        )
        chosen = ours.choose(0, 0, 0)
        few = [x[:, :CHECK_TOKENS].detach().requires_grad_() for x in leaves]
        with matmul_precision("highest"):
            error = max(spatial_errors({"ours": ours}, loop, few, chosen)["ours"])
        check = report.check(f"spatial loss, {dtype}", error, TOLERANCE[dtype])
        with matmul_precision("high"):  # as train.py
            calls = {"ours": ours, "loop": loop}
            calls = {name: partial(gradients, loss, leaves, chosen) for name, loss in calls.items()}
            t, t_loop = interleaved(calls, device, repeats=cfg.repeats).values()
        detail = {"dtype": dtype, "tokens": cfg.tokens, "sheets": cfg.sheets, "error": check}
        ratio = report.record(f"spatial loss, {dtype}", t.median, t_loop.median, "ms", **detail)
        row = [dtype]
        for x in (t, t_loop):
            row += [f"{x.median:.1f}", f"{x.low:.1f}-{x.high:.1f}"]
        rows.append([*row, f"{ratio:.2f}", check])
    head = ["dtype", "ours, ms", "range", "loop, ms", "range", "times faster", "error (loop, float64)"]
    report.table(head, rows)
    report.finish()


if __name__ == "__main__":
    run_main(main)
