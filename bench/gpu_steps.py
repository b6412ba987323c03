"""Sections of bench.gpu on the whole step: speed, checks, host synchronisations, profile, variants."""

import warnings
from dataclasses import replace
from functools import partial

import torch

from bench.common import interleaved, matmul_precision, milliseconds, relative_error, summary
from bench.gpu_bench import Bench
from bench.gpu_kernels import BF16, head_widths, peak_of
from bench.training import SETUPS, Setup, Trainer
from bench.variants import CANDIDATES
from topogpt.distributed import Ranks

STEPS = 5  # in a row, before the host waits for the device
GRADIENT = 1e-1  # relative error of a bf16 gradient of the whole network against fp32


def step(bench: Bench) -> None:
    """Tokens per second: topographic against its control and the usual eager loop; peak memory."""
    steps, times, memory = bench.steps(), {}, {}
    trainers = {name: bench.trainer(name) for name in SETUPS}
    trainers["stored logits"] = bench.new_trainer(Setup(stored_logits=True))
    for name, trainer in trainers.items():
        trainer.step(next(steps))
        memory[name] = peak_of(bench, lambda t=trainer: t.step(next(steps))) + persistent(trainer)
    del trainers["stored logits"]
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(1 + bench.repeats):
        for name, trainer in trainers.items():
            if name == "usual eager loop" and i > 3:
                continue  # slow, and steady enough
            n = 1 if bench.tiny or trainer.setup.usual else STEPS
            ms = milliseconds(lambda t=trainer, n=n: [t.step(next(steps)) for _ in range(n)], bench.device)
            if i:
                times[name].append(ms / n)
    peak = Ranks(0, 1, bench.device).peak_flops
    speed = {name: bench.n_tokens / summary(t).median * 1e3 for name, t in times.items()}
    rows = []
    for name, t in times.items():
        mfu = f"{speed[name] * trainers[name].model.flops_per_token() / peak:.1%}" if peak else "-"
        ms = summary(t)
        row = [name, f"{ms.median:.2f}", f"{ms.low:.2f}-{ms.high:.2f}", f"{speed[name]:,.0f}", mfu]
        rows.append([*row, f"{memory[name] / 1e9:.2f}" if bench.cuda else "-"])
        if name != "topographic":
            ours = speed["topographic"]
            bench.report.record(
                f"step against {name}", ours, speed[name], "tokens/s", more_is_better=True, mfu=mfu
            )
    bench.report.table(["step", "ms", "range", "tokens/s", "MFU", "peak GB"], rows)
    a, b = (summary(times[name]).median for name in ("topographic", "control"))
    bench.report.record("spatial loss in the step", a - b, None, "ms", share=(a - b) / a)
    bench.report.say(f"spatial loss: {a - b:.2f} ms = {(a - b) / a:.1%} of the step")
    if bench.cuda:
        mine, theirs = memory["topographic"] / 1e9, memory["stored logits"] / 1e9
        bench.report.record("peak memory against stored logits", mine, theirs, "GB")
        bench.report.say(
            f"peak memory: {mine:.2f} GB, with stored logits {theirs:.2f} GB: {1 - mine / theirs:.1%} less"
        )


def persistent(trainer: Trainer) -> float:
    """Bytes of parameters and optimiser state."""
    tensors = list(trainer.model.parameters())
    tensors += [t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def checks(bench: Bench) -> None:
    """bf16 against fp32, stored logits and the usual loop on few sequences; compiled against eager."""
    few = replace(bench.train, per_device_batch_size=2, batch_size=2)
    batch = next(bench.steps(few))[0]
    exact = bench.new_trainer(SETUPS["usual eager loop"], replace(few, dtype="float32"))
    with matmul_precision("highest"):
        expected = flat_gradient(exact, batch)
    setups = {"product": Setup(compile="eager")}
    setups |= {f"heads of {w}": Setup(compile="eager", head_width=w) for w in head_widths(bench)}
    setups |= {name: Setup(compile="eager", spatial=how) for name, how in CANDIDATES.items()}
    rows = []
    for name, setup in setups.items():
        got = flat_gradient(bench.new_trainer(setup, few), batch)
        rows.append([name, *compare(bench, f"step in bf16 against fp32, {name}", got, expected)])
    batch, trainer = next(bench.steps())[0], bench.trainer("topographic")
    eager, got = flat_gradient(trainer, batch, eager=True), flat_gradient(trainer, batch)
    rows.append(["compiled against eager", *compare(bench, "step, compiled against eager", got, eager)])
    bench.report.table(["step in bf16", "cross-entropy", "spatial loss", "gradient"], rows)


def flat_gradient(trainer: Trainer, batch, eager: bool = False) -> tuple[torch.Tensor, ...]:
    """Cross-entropy, spatial loss per sheet, and the gradient of their weighted sum as one vector."""
    ce, spatial = trainer.losses(batch, eager=eager)
    (ce + trainer.cfg.topo.weight * spatial.sum()).backward()
    gradient = torch.cat([p.grad.flatten().float() for p in trainer.model.parameters()])
    trainer.optimizer.zero_grad(set_to_none=True)
    return ce.detach(), spatial.detach(), gradient


def compare(bench: Bench, name: str, got: tuple, expected: tuple) -> list[str]:
    limits = {"cross-entropy": BF16, "spatial loss": BF16, "gradient": GRADIENT}
    parts = zip(limits.items(), got, expected, strict=True)
    return [bench.report.check(f"{name}: {k}", relative_error(a, b), limit) for (k, limit), a, b in parts]


def syncs(bench: Bench) -> None:
    """Host synchronisations in a step, graph breaks, and whether flash attention ran."""
    steps = bench.steps()
    if bench.cuda:
        counts = {}
        for name in ("topographic", "usual eager loop"):
            trainer = bench.trainer(name)
            trainer.step(next(steps))  # compiling waits, too
            counts[name] = count_syncs(trainer, steps)
        ours, usual = counts["topographic"], counts["usual eager loop"]
        bench.report.record("host synchronisations in 3 steps", ours, usual, "synchronisations")
        bench.report.say(f"host synchronisations in 3 steps: {ours}; usual eager loop: {usual}")
        if ours:
            bench.report.failed.append(f"host synchronisations: {ours}, not 0")
    else:
        bench.report.say("host synchronisations: none to count on a CPU")
    trainer, batch = bench.trainer("topographic"), next(steps)[0]
    trainer.step([batch])
    counters = torch._dynamo.utils.counters  # of all that was compiled so far; explain() would forget it
    reasons, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
    n_breaks = sum(reasons.values())
    bench.report.record("graph breaks", n_breaks, None, "breaks", graphs=graphs, reasons=reasons)
    bench.report.say(f"graphs compiled so far: {graphs}, breaks: {n_breaks}")
    if n_breaks:
        bench.report.failed.append(f"graph breaks: {n_breaks}, not 0: {reasons}")
    names = [event.key for event in kernels(bench, lambda: trainer.losses(batch)[0].backward())]
    trainer.optimizer.zero_grad(set_to_none=True)
    flash = sorted(name for name in names if "flash" in name.lower())
    bench.report.say("flash attention: " + ("; ".join(n[:100] for n in flash[:4]) or "did NOT run"))
    bench.report.record("flash attention kernels", len(flash), None, "kernels", names=flash[:4])
    if not flash:
        bench.report.failed.append("flash attention did not run")


def count_syncs(trainer: Trainer, steps) -> int:
    """Calls that made the host wait for the device, in three steps."""
    batches = [next(steps) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches:
                trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def profile(bench: Bench) -> None:
    """Kernels of one topographic step by time."""
    steps, trainer = bench.steps(), bench.trainer("topographic")
    trainer.step(next(steps))
    batches = next(steps)
    events = kernels(bench, lambda: trainer.step(batches))
    total = sum(time_of(bench, e) for e in events) or 1.0
    rows = []
    for e in events[:25]:
        ms = time_of(bench, e) / 1e3
        rows.append([e.key[:90], e.count, f"{ms:.3f}", f"{1e3 * ms / total:.1%}"])
    bench.report.table(["kernel", "calls", "ms", "share"], rows)
    bench.report.record("kernels of a step", total / 1e3, None, "ms", top=[[r[0], r[2]] for r in rows])


def kernels(bench: Bench, call) -> list:
    """Profiler events of a call, those that took longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        call()
        if bench.cuda:
            torch.cuda.synchronize()
    events = found.key_averages()
    if bench.cuda:
        events = [e for e in events if str(e.device_type).endswith("CUDA")]
    return sorted(events, key=lambda e: -time_of(bench, e))


def time_of(bench: Bench, event) -> float:
    """Microseconds of its own."""
    return event.self_device_time_total if bench.cuda else event.self_cpu_time_total


def step_variants(bench: Bench) -> None:
    """The whole step with each candidate in the product's place; each is compiled."""
    setups = {f"heads of {w}": Setup(head_width=w) for w in head_widths(bench)}
    setups |= {name: Setup(spatial=CANDIDATES[name]) for name in CANDIDATES if "bf16" in name}
    in_turns(bench, "step", setups, reserve=0 if bench.tiny else 100)


def compile_modes(bench: Bench) -> None:
    """Modes of torch.compile, the slowest to compile last."""
    modes = ("eager", "reduce-overhead", "max-autotune-no-cudagraphs")
    in_turns(bench, "compile", {mode: Setup(compile=mode) for mode in modes}, reserve=0)


def in_turns(bench: Bench, title: str, setups: dict[str, Setup], reserve: float) -> None:
    """Time steps of each setup in turns with the product's; print as each ends, leave `reserve` seconds."""
    steps, base = bench.steps(), bench.trainer("topographic")
    base.step(next(steps))
    n = 1 if bench.tiny else STEPS

    def several(trainer: Trainer) -> None:
        for _ in range(n):
            trainer.step(next(steps))

    for name, setup in setups.items():
        if bench.seconds_left() - reserve < 45 and not bench.tiny:
            bench.report.say(f"{name} left out: no time left")
            continue
        try:
            trainer = bench.new_trainer(setup)
            calls = {"product": partial(several, base), name: partial(several, trainer)}
            times = interleaved(calls, bench.device, repeats=bench.repeats, warmup=1, seconds=10)
            ours, other = (times[key].median / n for key in ("product", name))
            bench.report.record(f"{title}: {name}", other, ours, "ms", against="the product's step")
            bench.report.say(f"{title}: {name} {other:.2f} ms, product {ours:.2f} ms")
            del trainer, calls
        except Exception as error:  # the others may work
            bench.report.say(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if bench.tiny:
                raise
        bench.free()
