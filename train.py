"""Pretrain a GPT whose units lie on a sheet.

    python train.py configs/debug.yaml --run_name my_experiment                      # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=4 train.py configs/topolm.yaml --run_name topolm --wandb
    python train.py configs/topolm.yaml --run_name topolm --resume                   # continue, bit for bit

Every setting is in topogpt/settings.py and in --help; one step is in topogpt/training/step.py; what a run
leaves in its folder, out/RUN, in topogpt/runs/folder.py.
"""

import sys

from topogpt.config import parse
from topogpt.errors import user_errors
from topogpt.settings import TrainConfig
from topogpt.training import preflight

if __name__ == "__main__":  # answer --help and mistakes at once: importing torch takes seconds
    with user_errors():
        cfg = preflight.find_data(parse(TrainConfig, sys.argv[1:], prog="train.py"))
        preflight.check(cfg)

import torch

from topogpt import distributed
from topogpt.distributed import Ranks
from topogpt.runs.state import TrainState
from topogpt.training import progress, setup
from topogpt.training.interrupt import StopSignals
from topogpt.training.log import RunLog
from topogpt.training.publish import Publisher
from topogpt.training.step import optimizer_step
from topogpt.training.validation import evaluate, report


def train(cfg: TrainConfig) -> TrainState:
    """Run the training that cfg describes, from the start or from a checkpoint; return where it ended."""
    with (
        preflight.locked(cfg) as corpora,
        distributed.start(cfg.device) as ranks,
        setup.explain_out_of_memory(cfg),
        StopSignals() as signals,
    ):
        # a call of its own, so that DDP is gone before the process group is
        return run_loop(cfg, ranks, corpora, signals)


def run_loop(cfg: TrainConfig, ranks: Ranks, corpora: preflight.Checked, signals: StopSignals) -> TrainState:
    t = setup.build(cfg, ranks, corpora.resume_from)
    state, run = t.state, setup.open_run_folder(t, corpora)
    start = state.step if corpora.resume_from else -1
    log = RunLog(run, ranks.is_main, start, cfg.max_steps, state.evaluated_at)
    with log, setup.token_loader(t, corpora) as loader:
        if cfg.wandb:
            state.wandb_id = log.start_wandb(cfg, state.wandb_id)
        progress.introduce(t, corpora, run, log)
        publisher = Publisher(run, cfg, log)

        steps = loader.steps(state.step)
        skipped_in_a_row = torch.tensor(float(state.skipped_in_a_row), device=ranks.device)
        most_skipped = torch.zeros_like(skipped_in_a_row)  # of these, since the last logged step
        clock = progress.Clock(t)
        stopped_early = told_to_stop = False

        def told() -> bool:
            return ranks.any(signals.received or log.trouble is not None)

        for step in range(state.step, cfg.max_steps + 1):
            state.step, finished = step, step == cfg.max_steps

            # ---- once in a while: evaluate, every rank its share of the same tokens
            best, told_to_stop = False, told()
            if (step % cfg.eval_every == 0 or finished) and state.evaluated_at != step and not told_to_stop:
                values = evaluate(t, corpora.val)
                best = state.update(values.cross_entropy)
                report(t, values, corpora.val, run, log)
                told_to_stop = told()
            stopped_early = 0 < cfg.patience <= state.increases
            stop = finished or stopped_early or told_to_stop

            # ---- once in a while: save, publish
            if best or stop or step % cfg.save_every == 0:
                state.skipped_in_a_row = int(skipped_in_a_row)
                setup.save(t, run, corpora, log)
                clock.restart(step)
            if cfg.push_every and step and step % (cfg.push_every * cfg.eval_every) == 0 and not stop:
                publisher.begin()
                clock.restart(step)
            publisher.report()
            if stop:
                break

            # ---- one optimiser step
            done = optimizer_step(t, step, next(steps))
            skipped_in_a_row = (skipped_in_a_row + done.skip) * done.skip
            most_skipped = torch.maximum(most_skipped, skipped_in_a_row)

            # ---- once in a while: log this step; the one place where the host waits for the device
            if (step + 1) % cfg.log_every == 0:
                found = torch.stack([*done.losses, done.grad_norm, skipped_in_a_row, most_skipped])
                progress.log_step(t, step + 1, ranks.mean(found).tolist(), clock.read(step + 1), log)
                most_skipped = torch.zeros_like(skipped_in_a_row)
        progress.say_goodbye(t, run, log, early=stopped_early, told=told_to_stop)
        publisher.wait(ranks, signals)
        if cfg.push_to_hf and not told():
            publisher.begin()
            publisher.wait(ranks, signals)
        return state


if __name__ == "__main__":
    with user_errors():
        train(cfg)
