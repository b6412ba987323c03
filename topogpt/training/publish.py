"""A run's best checkpoint on the Hub, while it trains or at its end."""

from pathlib import Path

from topogpt.errors import UserError
from topogpt.settings import TrainConfig
from topogpt.sharing import push
from topogpt.sharing.export import export
from topogpt.training.log import RunLog


def publish(run: Path, cfg: TrainConfig, log: RunLog) -> None:
    """Export the best checkpoint and push it to the Hub; a failure is said and harms nothing."""
    if not log.is_main:
        return
    try:
        exported = export(run, "best", say=log.say)
        log.say(f"pushed: {push.push(exported, push.full_name(cfg.run_name, log.say), say=log.say)}")
    except UserError as error:
        log.say(f"not pushed: {error}; later: python export.py {run} --push_to_hf")
