"""How a run is watched: losses on fixed validation tokens, Moran's I, and a picture of the sheets."""

from pathlib import Path
from typing import NamedTuple

import torch

from topogpt import topo
from topogpt.terminal import progress
from topogpt.text.loader import Corpus, fixed_batches
from topogpt.training import maps
from topogpt.training.log import RunLog
from topogpt.training.progress import total_loss
from topogpt.training.setup import Training

# takes the place of the step where neighbourhoods are chosen: the same ones at every evaluation
VALIDATION = -1


class Values(NamedTuple):
    cross_entropy: float  # nats per token
    spatial_loss: float  # mean over sheets; measured for the control too


@torch.no_grad()
def evaluate(t: Training, corpus: Corpus) -> Values:
    """Means over the fixed validation tokens; every rank evaluates its share and receives the same result."""
    cfg, ranks, spatial = t.cfg, t.ranks, t.objective.spatial
    t.compiled.eval()
    sums = [torch.zeros(3, device=ranks.device)]
    batches = fixed_batches(
        corpus,
        n_tokens=cfg.val_tokens,
        block_size=cfg.model.block_size,
        per_device_batch_size=cfg.per_device_batch_size,
        ranks=ranks,
    )
    for batch in progress(batches, "validation, micro-batches") if ranks.is_main else batches:
        ce, each = t.compiled(batch.tokens, batch.targets, spatial.choose(cfg.seed, VALIDATION, batch.index))
        sums.append(torch.stack([ce, each.mean(), torch.ones_like(ce)]) * len(batch.tokens))
    t.compiled.train()
    ce, each, n = ranks.sum(torch.stack(sums).cpu().double().sum(0)).tolist()
    return Values(ce / n, each / n)


def report(t: Training, values: Values, corpus: Corpus, run: Path, log: RunLog) -> None:
    """Log an evaluation with the mean Moran's I of each sheet's single-token maps, and draw the sheets."""
    if not log.is_main:
        return
    cfg, state = t.cfg, t.state
    text = corpus.window(0, min(cfg.model.block_size, corpus.n_tokens)).astype("int64")
    grids = maps.token_maps(t.model, torch.from_numpy(text), t.objective.positions, topo.N_MAPS)
    by_sheet = topo.mean_morans_i(grids)
    moran = sum(by_sheet.values()) / len(by_sheet)
    with torch.no_grad():
        of_weights = {name: t.objective.loss_of_weights(name).item() for name in t.objective.of_weights}
    loss = total_loss(t, state.step, values.cross_entropy, values.spatial_loss, of_weights)
    log.record(
        {
            "step": state.step,
            "split": "val",
            "cross_entropy": values.cross_entropy,
            "spatial_loss": values.spatial_loss,
            **of_weights,
            "loss": loss,
            "moran": moran,
            "moran_by_sheet": by_sheet,
            "tokens": state.step * cfg.batch_size * cfg.model.block_size,
        }
    )
    verdict = "best so far" if state.best_step == state.step else f"{state.increases} increases in a row"
    log.say(
        f"step {state.step:,}/{cfg.max_steps:,}  validation: cross-entropy {values.cross_entropy:.4f}  "
        f"spatial {values.spatial_loss:.4f}  Moran's I {moran:.3f}  ({verdict})"
    )
    picture = run / "maps" / f"step-{state.step:06d}.png"
    try:
        with log.writing(picture.parent):
            maps.save_arrays(picture.with_suffix(".npz"), grids)
            maps.draw(
                picture, [("", grids)], f"{cfg.run_name}, step {state.step:,}: one token on every sheet"
            )
        log.picture("val/sheets", picture, state.step)
    except ModuleNotFoundError as error:
        log.say_once(f"no pictures of the sheets: {error.name} is not installed (pip install matplotlib)")
