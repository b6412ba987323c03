"""Sections of bench.gpu that measure a piece at a time: ceilings, spatial loss, head, attention, AdamW."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import variants
from bench.common import interleaved, matmul_precision, relative_error
from bench.gpu_bench import Bench
from topogpt.distributed import Ranks
from topogpt.model import cross_entropy as ours
from topogpt.model.gpt import GPT, Attention
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.training.optim import build_optimizer

# |out - ref| / |ref| against fp32 or wider: operands rounded to bf16; sums of many of them
BF16, BF16_SUMS, FP32 = 1e-2, 2e-2, 1e-4


def ceiling(bench: Bench) -> None:
    """The most this device does: a large matrix product and a large copy, on random data."""
    n = 256 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << (20 if bench.tiny else 29), device=bench.device)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    with torch.no_grad():
        times = interleaved(calls, bench.device, repeats=3 * bench.repeats, ahead=True)
    flops = 2 * n**3 / times["matmul"].median * 1e3
    bandwidth = 2 * source.numel() * source.element_size() / times["copy"].median * 1e3
    peak = Ranks(0, 1, bench.device).peak_flops
    sheet, title = peak / 1e12 if peak else None, f"matmul {n}^3 bf16, against the data sheet"
    bench.report.record(title, flops / 1e12, sheet, "TFLOP/s", more_is_better=True)
    bench.report.record("copy, bytes read and written", bandwidth / 1e12, None, "TB/s", more_is_better=True)
    bench.report.say(f"matmul {n}^3 bf16: {flops / 1e12:.1f} TFLOP/s; copy: {bandwidth / 1e12:.2f} TB/s")


def spatial(bench: Bench) -> None:
    """Forward and backward of the spatial loss alone: the product, every candidate, the usual loop."""
    cfg, model = bench.train.topo, bench.train.model
    positions = sheet_positions(cfg, model)
    product = TopoLMLoss(cfg, positions).to(bench.device)
    losses: dict[str, nn.Module] = {"product": product}
    losses |= {name: variants.CandidateLoss(product, how) for name, how in variants.CANDIDATES.items()}
    loop = variants.LoopLoss(cfg, positions).to(bench.device)
    chosen = product.choose(0, 0, 0)

    def draw(n_tokens: int) -> list[Tensor]:
        return variants.draw_activations(
            2 * model.n_layer, n_tokens, model.n_embd, dtype=torch.bfloat16, device=bench.device
        )

    few = draw(64 if bench.tiny else 2048)
    checks = {}
    with matmul_precision("high"):  # as train.py: TF32 products are part of what is checked
        for name, errors in variants.spatial_errors(losses, loop, few, chosen).items():
            checks[name] = bench.report.check(f"spatial, {name}", max(errors), BF16)
        leaves = draw(bench.n_tokens)
        losses["usual loop"] = loop
        calls = {name: partial(variants.gradients, loss, leaves, chosen) for name, loss in losses.items()}
        times = interleaved(calls, bench.device, repeats=bench.repeats, ahead=True, seconds=60)
    bench.report.compare("spatial", times, "usual loop", checks)


def cross_entropy(bench: Bench) -> None:
    """Head and cross-entropy, forward and backward: chunked by several sizes, stored logits, torch's own."""
    c, v = bench.train.model.n_embd, bench.train.model.vocab_size
    x = torch.randn(bench.n_tokens, c, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(v, c, device=bench.device) * 0.02).requires_grad_()
    targets = torch.randint(0, v, (bench.n_tokens,), device=bench.device)

    def stored(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.to(x.dtype).T).float(), targets)

    losses: dict[str, Callable] = {"stored logits": stored, "product": ours.linear_cross_entropy}
    powers = (8, 10) if bench.tiny else (26, 27, 28, 29, 30)
    losses |= {f"chunks of 2^{p} logits": partial(in_chunks, 1 << p) for p in powers}
    losses["stored logits, compiled"] = torch.compile(stored, backend=bench.backend, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy"] = lambda x, w, targets: F.linear_cross_entropy(
            x, w.to(x.dtype), targets, options=options
        )

    def run(loss: Callable, x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        value = loss(x, w, targets)
        return value.detach(), *torch.autograd.grad(value, (x, w))

    few = slice(0, min(4096, bench.n_tokens))
    wide = x[few].detach().float().requires_grad_(), w, targets[few]
    with matmul_precision("highest"):
        expected = run(stored, *wide)
    checks, memory = {}, {}
    for name, loss in dict(losses).items():
        try:
            got = run(loss, x[few].detach().requires_grad_(), w, targets[few])
            errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
            checks[name] = bench.report.check(f"cross-entropy, {name}", max(errors), BF16_SUMS)
            memory[name] = peak_of(bench, lambda loss=loss: run(loss, x, w, targets))
        except Exception as error:  # one that this torch or this memory does not allow
            bench.report.say(f"{name} left out: {type(error).__name__}: {str(error)[:200]}")
            del losses[name]
    calls = {name: partial(run, loss, x, w, targets) for name, loss in losses.items()}
    times = interleaved(calls, bench.device, repeats=bench.repeats, ahead=True, seconds=40)
    bench.report.compare("cross-entropy", times, "stored logits", checks)
    if bench.cuda:
        bench.report.table(["peak memory", "GB"], [[k, f"{v / 1e9:.2f}"] for k, v in memory.items()])


def in_chunks(n_logits: int, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The product's loss with another chunk size."""
    sizes, device = ours.CHUNK_ELEMENTS, x.device.type
    before = sizes.get(device)
    sizes[device] = n_logits
    try:
        return ours.linear_cross_entropy(x, w, targets)
    finally:
        sizes[device] = before


def attention(bench: Bench) -> None:
    """One attention layer, forward and backward: heads as they are, or padded with zeros."""
    cfg = bench.train.model
    d = cfg.n_embd // cfg.n_head
    torch.manual_seed(0)
    layer = Attention(cfg).to(bench.device)
    x = torch.randn(bench.train.per_device_batch_size, cfg.block_size, cfg.n_embd, device=bench.device)
    x.requires_grad_()
    layers: dict[str, Callable] = {f"heads of {d}": layer}
    for width in head_widths(bench):
        layers[f"padded to {width} in each pass"] = padded = variants.PaddedAttention(layer, width)
        qkv, proj = (p.detach().requires_grad_() for p in padded.padded_weights())
        layers[f"stored with {width}"] = partial(variants.attend, qkv=qkv, proj=proj, n_head=cfg.n_head)
    for name in list(layers):
        layers[f"{name}, compiled"] = torch.compile(layers[name], backend=bench.backend, dynamic=False)

    def run(layer: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(bench.device.type, torch.bfloat16):
            y = layer(x)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]

    few = x[:2].detach().requires_grad_()
    with matmul_precision("highest"):
        y = layer(few)
        expected = y.detach(), torch.autograd.grad(y.square().sum(), few)[0]
    checks = {}
    for name, call in layers.items():
        if not name.endswith("compiled"):
            errors = [relative_error(a, b) for a, b in zip(run(call, few), expected, strict=True)]
            checks[name] = bench.report.check(f"attention, {name}", max(errors), BF16_SUMS)
    calls = {name: partial(run, call, x) for name, call in layers.items()}
    times = interleaved(calls, bench.device, repeats=bench.repeats, ahead=True, seconds=40)
    bench.report.compare("attention", times, f"heads of {d}", checks)


def head_widths(bench: Bench) -> list[int]:
    """What heads may be padded to: multiples of 8 and of 64."""
    d = bench.train.model.n_embd // bench.train.model.n_head
    return sorted({-(-d // 8) * 8, -(-d // 64) * 64})


def optimizer(bench: Bench) -> None:
    """AdamW's step alone: fused, foreach and one parameter at a time."""
    torch.manual_seed(0)
    model = GPT(bench.train.model).to(bench.device)
    optimizers, copies = {}, {}
    for name, how in (("fused", "fused"), ("foreach", "foreach"), ("loop", "")):
        copies[name] = copy.deepcopy(model)
        optimizers[name] = optim = build_optimizer(copies[name], bench.train.optim)
        for group in optim.param_groups:
            group["fused"], group["foreach"] = how == "fused", how == "foreach"
    for name, model in copies.items():
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers[name].step()
    flat = {name: torch.cat([p.detach().flatten() for p in m.parameters()]) for name, m in copies.items()}
    checks = {
        name: bench.report.check(f"optimizer, {name}", relative_error(values, flat["loop"]), FP32)
        for name, values in flat.items()
    }
    calls = {name: optim.step for name, optim in optimizers.items()}
    times = interleaved(calls, bench.device, repeats=bench.repeats, ahead=True, seconds=20)
    bench.report.compare("AdamW", times, "foreach", checks)


def peak_of(bench: Bench, call: Callable[[], object]) -> float:
    """Bytes that a call needs at most beyond what was there; 0 where it cannot be known."""
    if not bench.cuda:
        call()
        return 0.0
    torch.cuda.synchronize(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    call()
    torch.cuda.synchronize(bench.device)
    return torch.cuda.max_memory_allocated(bench.device) - before
