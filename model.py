"""What a config costs: parameters, FLOPs, memory and bytes on disk, by arithmetic alone, in a moment.

    python model.py configs/topolm.yaml
    python model.py configs/topolm.yaml --model.n_layer 24 --per_device_batch_size 16 --device cpu

The GPT itself is where a reader looks for it, too: `from model import GPT`; it is in topogpt/model/gpt.py.
"""

from typing import TYPE_CHECKING, Any

from topogpt.config import parse
from topogpt.errors import run_main
from topogpt.model.cost import TOKENIZER_BYTES, Cost
from topogpt.settings import N_VOCAB, CostConfig
from topogpt.spatial.schedule import losses_in_words
from topogpt.terminal import cell, print_table, say

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT, GPTConfig, Output, sheet_names

__all__ = ["GPT", "GPTConfig", "Output", "sheet_names"]


def __getattr__(name: str) -> Any:
    """The names of __all__, which take torch, once they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from topogpt.model import gpt

    return getattr(gpt, name)


def main(argv: list[str]) -> None:
    cfg = parse(CostConfig, argv, prog="model.py")
    cost = Cost(cfg, "cpu" if cfg.device == "cpu" else "cuda")
    m = cfg.model
    say(f"a GPT of {m.n_layer} layers, {m.n_embd} wide, {m.n_head} heads, context {m.block_size:,}")
    for show in (show_parameters, show_flops, show_sheets, show_bytes, show_memory, show_files):
        say()
        show(cost)


def show_parameters(cost: Cost) -> None:
    rows = [[p.name, p.per_layer, p.parameters, share(p.parameters, cost.n_parameters)] for p in cost.parts]
    rows += [["total", None, cost.n_parameters, "100.0 %"]]
    rows += [["without what is only looked up", None, cost.n_multiplied, None]]
    print_table(["parameters", "per layer", "all layers", "share"], rows)


def show_flops(cost: Cost) -> None:
    """Per token: every matrix product, and the formula that MFU is taken from."""
    rows = [
        [p.name, mega(p.flops), mega(3 * p.flops), share(p.flops, cost.forward_flops)] for p in cost.parts
    ]
    rows = [["head" if "head" in row[0] else row[0], *row[1:]] for row in rows if row[1] != "0.00 M"]
    rows += [["total", mega(cost.forward_flops), mega(cost.training_flops), "100.0 %"]]
    extra = share(cost.spatial_flops, cost.training_flops)
    rows += [["spatial loss, besides", None, mega(cost.spatial_flops), extra]] if cost.spatial_flops else []
    print_table(["FLOPs per token", "forward", "training", "share"], rows)
    cfg = cost.cfg
    step = cfg.batch_size * cfg.model.block_size
    say(f"as MFU counts them: 6N + 12 L C T = {mega(cost.palm_flops)} (PaLM, app. B; N: what is multiplied)")
    say("(2 a multiplication with its addition; attention in full, though causal masking leaves half of it)")
    say(
        f"a step of {step:,} tokens: {step * cost.training_flops:.2e} FLOPs; {cfg.max_steps:,} steps, "
        f"if none stops early: {cfg.max_steps * step * cost.training_flops:.2e}"
    )


def show_sheets(cost: Cost) -> None:
    t, (h, w) = cost.cfg.topo, cost.cfg.sheet_shape
    say(f"sheets: {cost.n_sheets} of {h}x{w} units, {cost.n_sheets * h * w:,} units in all")
    k, units = cost.chosen
    side, n = 2 * t.radius - 1, cost.n_neighbourhoods
    looked_at = f", {k} of them a micro-step" if "topolm" in t.objectives else ""
    say(
        f"spatial loss: {losses_in_words(vars(t))}; neighbourhoods: {n} of {units} units ({side}x{side}) a "
        f"sheet{looked_at}"
    )


def show_bytes(cost: Cost) -> None:
    cfg = cost.cfg
    step = cfg.batch_size * cfg.model.block_size
    rows = [
        ["read as text: a uint16 of a shard", "2 B"],
        [f"kept for the backward pass ({cost.dtype})", size(cost.kept_per_token)],
        ["fp32 weights, for each token generated", size(4 * cost.n_parameters)],
        ["keys and values, once it is generated", size(cost.cache_per_token)],
        ["AdamW: 16 B read, 12 B written a parameter", size(28 * cost.n_parameters / step)],
    ]
    print_table(["bytes per token", ""], rows)
    say(f"(AdamW's on one device, where each optimiser step is {step:,} tokens; on n devices n times that)")


def show_memory(cost: Cost) -> None:
    """Of batches 1, 2, 4, ... and the config's own."""
    own = cost.cfg.per_device_batch_size
    batches = [2**i for i in range(own.bit_length()) if 2**i < own] + [own]
    rows = [[batch, *map(size, [*(m := cost.memory(batch)), m.total])] for batch in batches]
    head = ["per_device_batch_size", "weights, moments", "casts", "activations", "losses", "memory of a step"]
    print_table(head, rows)
    say(
        f"(an estimate, in {cost.dtype} on {'a GPU' if cost.device == 'cuda' else 'the CPU'}, not compiled; "
        "what CUDA and its allocator hold comes on top.\n"
        "weights, moments: 16 B a parameter, its gradient too; casts: weights in bfloat16;\n"
        "losses: a chunk of logits and its gradient, and what the sheets show)"
    )


def show_files(cost: Cost) -> None:
    checkpoint = cost.checkpoint_files
    rows = [[f"checkpoints/step-N/{name}", size(n)] for name, n in checkpoint.items()]
    kept = cost.cfg.keep_last + 1
    rows += [[f"{kept} checkpoints: keep_last and the best", size(kept * sum(checkpoint.values()))]]
    words = TOKENIZER_BYTES if cost.cfg.model.vocab_size >= N_VOCAB else 0
    for dtype in ("float32", "bfloat16"):
        rows += [[f"hf/, exported in {dtype}", size(sum(cost.export_files(dtype).values()) + words)]]
    print_table(["on disk", ""], rows)


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def mega(n: float) -> str:
    return f"{n / 1e6:,.2f} M"


def size(n: float) -> str:
    """Bytes in powers of 1000."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= power:
            return f"{n / power:.1f} {unit}"
    return f"{cell(round(n))} B"


if __name__ == "__main__":
    run_main(main)
