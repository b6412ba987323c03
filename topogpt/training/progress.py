"""What a person reads while a run goes on: what is trained, a line per logged step, how it ended."""

import time
from pathlib import Path

from topogpt.errors import UserError
from topogpt.model import connectome, lora
from topogpt.settings import TrainConfig
from topogpt.spatial.schedule import weight_at
from topogpt.terminal import duration
from topogpt.training.log import RunLog
from topogpt.training.optim import lr_at
from topogpt.training.preflight import MOST_EPOCHS, Checked
from topogpt.training.setup import Training


def introduce(t: Training, corpora: Checked, run: Path, log: RunLog) -> None:
    """Say in a few lines what is about to be trained, on what, and where."""
    cfg, state = t.cfg, t.state
    for line in corpora.changed:
        log.say(line)
    h, w = cfg.sheet_shape
    log.say(
        f"model: {t.model.n_parameters():,} parameters, {cfg.model.n_layer} layers, "
        f"{len(t.objective.positions)} sheets of {h}x{w} units; spatial loss: {cfg.topo.loss}"
    )
    if cfg.init_from:
        log.say(f"starting from {cfg.init_from}; trained: {what_is_trained(cfg)}")
    if cfg.connectome:
        under = f"inherit = {cfg.inherit}; {connectome.describe(t.connectome)}" if t.connectome else "dense"
        log.say(f"connectome: {cfg.connectome}, {under}")
    if t.objective.of_weights and not t.objective.with_spatial and cfg.topo.layout != "c_fc":
        log.say(
            f"note: {cfg.topo.loss} acts on weights of {', '.join(cfg.topo.modules)}, not on these sheets; "
            "--topo.layout c_fc --topo.positions identity shows the sheets of c_fc"
        )
    tokens_per_step = cfg.batch_size * cfg.model.block_size
    epochs = cfg.max_steps * tokens_per_step / corpora.train.n_tokens
    log.say(
        f"data: {corpora.train.n_tokens:,} training tokens, {epochs:.2f} epochs in {cfg.max_steps:,} steps "
        f"of {tokens_per_step:,} tokens; {corpora.val.n_tokens:,} validation tokens"
    )
    if epochs > MOST_EPOCHS:
        log.say(
            f"warning: {epochs:,.0f} epochs of the same text, learnt by heart; prepare more, or train less"
        )
    known = {shard.sha256 for shard in corpora.train.shards if shard.sha256}
    shared = [shard.path for shard in corpora.val.shards if shard.sha256 in known]
    if shared:
        log.say(f"note: {len(shared)} of the validation shards are training data, too (first: {shared[0]})")
    how = t.objective.describe(compiled=t.compiled is not t.objective)
    log.say(f"device: {t.ranks.world} x {t.ranks.device_name}, {how}")
    log.say(f"{f'resuming at step {state.step:,}' if state.step else 'starting'}; run folder: {run}")
    if state.step >= cfg.max_steps:
        log.say(f"nothing is left to train: max_steps = {cfg.max_steps}; give a larger --max_steps to go on")


def what_is_trained(cfg: TrainConfig) -> str:
    """In words: every weight, or how many of adapters."""
    if not cfg.lora_rank:
        return "every weight"
    n = lora.n_adapter_parameters(cfg.model, cfg.lora_modules, cfg.lora_rank)
    n_layers = len(lora.layers_to_adapt(cfg.model, cfg.lora_modules, cfg.lora_rank))
    return f"{n:,} parameters of adapters, rank {cfg.lora_rank} in {n_layers} layers"


class Clock:
    """Tokens per second between two logged steps, evaluations and checkpoints left out."""

    def __init__(self, t: Training) -> None:
        self.tokens_per_step = t.cfg.batch_size * t.cfg.model.block_size
        self.flops_per_token = t.model.flops_per_token()
        self.ranks, self.peak_flops = t.ranks, t.ranks.peak_flops
        self.max_steps = t.cfg.max_steps
        self.restart(t.state.step)

    def restart(self, step: int) -> None:
        self.step, self.t0 = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Speed since the last reading; only after the host has waited for the device."""
        dt = time.perf_counter() - self.t0
        tokens_per_s = (step - self.step) * self.tokens_per_step / dt
        speed = {
            "tokens_per_s": tokens_per_s,
            "memory_gb": self.ranks.peak_memory() / 1e9,
            "eta_s": (self.max_steps - step) * self.tokens_per_step / tokens_per_s,
        }
        if self.peak_flops:
            speed["mfu"] = tokens_per_s * self.flops_per_token / self.peak_flops
        self.restart(step)
        return speed


def log_step(t: Training, step: int, means: list[float], speed: dict[str, float], log: RunLog) -> None:
    """Record the training step that was the step-th, and how fast it was.

    means: over ranks and micro-batches, as the loop stacks them: cross-entropy, spatial loss per sheet, each
        loss on weights, norm of the gradient, steps skipped in a row, and most of these since the last call.
    """
    cfg, (cross_entropy, spatial_loss, *of_weights, grad_norm, skipped, most) = t.cfg, means
    found = dict(zip(t.objective.of_weights, of_weights, strict=True))
    lr = lr_at(cfg.optim, step - 1, cfg.max_steps)
    loss = total_loss(t, step - 1, cross_entropy, spatial_loss, found)
    values = {"step": step, "split": "train", "cross_entropy": cross_entropy, "loss": loss}
    text = f"cross-entropy {cross_entropy:.4f}"
    if t.objective.with_spatial:
        values |= {"spatial_loss": spatial_loss}
        text += f"  spatial {spatial_loss:.4f}"
    values |= found
    text += "".join(f"  {name} {value:.4f}" for name, value in found.items())
    values |= {"lr": lr, "grad_norm": grad_norm, "skipped_in_a_row": int(skipped)}
    values |= {"tokens": step * cfg.batch_size * cfg.model.block_size, **speed}
    log.record(values)
    rate = f"{speed['tokens_per_s']:,.0f} tokens/s" + (f"  MFU {speed['mfu']:.0%}" if "mfu" in speed else "")
    eta = f"{speed['memory_gb']:.1f} GB  ETA {duration(speed['eta_s'])}"
    log.advance(
        step,
        f"step {step:,}/{cfg.max_steps:,}  {text}  lr {lr:.1e}  grad norm {grad_norm:.2f}  {rate}  {eta}",
    )
    if skipped:
        log.say(f"step {step:,}: the gradient is not finite; {int(skipped)} steps in a row are skipped")
    elif most:
        log.say(f"step {step:,}: the gradient was not finite; up to {int(most)} steps in a row were skipped")
    if most >= cfg.max_skipped:
        message = (
            f"max_skipped = {cfg.max_skipped} steps in a row had a non-finite gradient; the checkpoints in "
            f"{cfg.out_dir}/{cfg.run_name} are kept: lower --optim.lr, or --resume from the last one"
        )
        log.write(message)
        raise UserError(message)


def total_loss(
    t: Training, step: int, cross_entropy: float, spatial_loss: float, of_weights: dict[str, float]
) -> float:
    """What is minimised at a step: the cross-entropy and the spatial losses with their weights then."""
    weights = {name: weight_at(t.cfg.topo, step, t.cfg.max_steps, name) for name in of_weights}
    loss = cross_entropy
    if t.objective.with_spatial:
        n_sheets = len(t.objective.positions)
        loss += weight_at(t.cfg.topo, step, t.cfg.max_steps) * n_sheets * spatial_loss
    return loss + sum(weights[name] * value for name, value in of_weights.items())


def say_goodbye(t: Training, run: Path, log: RunLog, *, early: bool, told: bool) -> None:
    """Say why and where the run ended; raises UserError on every rank where a file could not be written."""
    state = t.state
    if told:
        why = "as a file cannot be written" if log.trouble else "by a signal"
        log.say(f"stopped {why} at step {state.step:,}; the checkpoint is saved, --resume continues")
    elif early:
        log.say(
            f"stopped early at step {state.step:,}: validation cross-entropy rose {state.increases} times "
            "in a row"
        )
    else:
        log.say(f"finished at step {state.step:,}")
    if state.best_step is not None:
        log.say(
            f"best validation cross-entropy {state.best_cross_entropy:.4f} at step {state.best_step:,}: "
            f"{run / 'best'}"
        )
    if t.ranks.any(log.trouble is not None):
        trouble = log.trouble or "the first process cannot write its files"
        raise UserError(
            f"{trouble}; the checkpoint of step {state.step:,} is saved: make room, then --resume"
        )
