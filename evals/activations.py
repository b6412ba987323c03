"""Activations: one pattern per item and sheet, for any list of texts.

    python -m evals.activations out/topolm --stimuli items.csv        # columns: item, condition
    python -m evals.activations openai-community/gpt2 --stimuli items.csv --positions identity

evals/activations.safetensors then holds, for every sheet, `layer.3.mlp` (items, units) and its units' places
on the grid, `positions.layer.3.mlp` (units, 2); activations.json lists items and conditions in their order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evals.common import Analysis, PoolingConfig, Subject, protocol_of, run_analyses
from topogpt.analysis import stimuli
from topogpt.analysis.stimuli import Stimuli
from topogpt.errors import UserError, run_main
from topogpt.terminal import print_table, progress

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT

TOKENS_PER_BATCH = 4096  # padding counted in


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig(PoolingConfig):
    """Write every sheet's activations on a list of items: python -m evals.activations RUN --stimuli CSV."""

    stimuli: str = ""  # CSV file with the columns item and condition
    item: tuple[str, ...] = ("item",)  # its column, or several to be joined by a space
    condition: tuple[str, ...] = ("condition",)  # the same for the condition, joined by _
    dtype: Literal["float32", "float16"] = "float32"  # of the stored numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stimuli:
            raise UserError("stimuli is missing; add --stimuli FILE.csv")


def of_stimuli(cfg: PoolingConfig, subject: Subject, found: Stimuli) -> dict[str, np.ndarray]:
    """Activations of all items: sheet -> (n_items, n_units) float32."""
    return of_tokens(subject.model, token_lists(cfg, subject, found), cfg.pooling)


def token_lists(cfg: PoolingConfig, subject: Subject, found: Stimuli) -> list[np.ndarray]:
    from topogpt.text import tokenizer

    words, block_size = tokenizer.load(cfg.vocab_dir), subject.model.cfg.block_size
    if subject.model.cfg.vocab_size < words.n_vocab:
        raise UserError(
            f"{subject.label} knows {subject.model.cfg.vocab_size} tokens, fewer than GPT-2's "
            f"{words.n_vocab}; stimuli cannot be read to it"
        )
    encode = words.encode_document if cfg.eot else words.encode
    lists = [encode(item).astype(np.int64) for item in found.items]
    for item, tokens in zip(found.items, lists, strict=True):
        if len(tokens) == 0 or len(tokens) > block_size:
            raise UserError(
                f"{found.source}: the item {item[:40]!r} has {len(tokens)} tokens; the model reads 1 to "
                f"{block_size}"
            )
    return lists


def of_tokens(
    model: "GPT", lists: Sequence[np.ndarray], pooling: Literal["mean", "last"] = "mean"
) -> dict[str, np.ndarray]:
    """Mean over each list's tokens, or its last token: sheet -> (n_lists, n_units) float32.

    Lists of similar length share a batch, padded on the right. Attention is causal, so padding changes
    nothing before it, and it is never counted.
    """
    import torch

    from topogpt.model.gpt import sheet_names

    found = {
        sheet: np.empty((len(lists), model.cfg.n_embd), np.float32)
        for sheet in sheet_names(model.cfg.n_layer)
    }
    with torch.inference_mode():
        for batch in progress(list(batches([len(tokens) for tokens in lists])), "reading items"):
            lengths = torch.tensor([len(lists[i]) for i in batch])
            tokens = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
            for row, i in enumerate(batch):
                tokens[row, : lengths[row]] = torch.from_numpy(lists[i])
            place = torch.arange(tokens.shape[1])
            if pooling == "mean":
                weight = (place < lengths[:, None]) / lengths[:, None]  # (B, T)
            else:
                weight = (place == lengths[:, None] - 1).float()
            weight = weight.to(model.device)
            named = model(tokens.to(model.device), activations=True, last_only=True).activations
            for sheet, x in named.items():
                found[sheet][batch] = torch.einsum("bt,btc->bc", weight, x.float()).cpu().numpy()
    check_finite(found)
    return found


def check_finite(found: Mapping[str, np.ndarray]) -> None:
    for sheet, x in found.items():
        if not np.isfinite(x).all():
            raise UserError(
                f"the activations of {sheet} are not finite; the run diverged: use another --checkpoint"
            )


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by length, so many that TOKENS_PER_BATCH holds them, padded."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():  # the last is the longest
        if batch and (len(batch) + 1) * lengths[i] > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def analyse(cfg: ActivationsConfig, subject: Subject) -> Analysis:
    path = Path(cfg.stimuli)
    found = stimuli.read(path, cfg.item, cfg.condition)
    patterns = of_stimuli(cfg, subject, found)
    arrays = {sheet: stored(x, cfg.dtype) for sheet, x in patterns.items()}
    arrays |= {f"positions.{sheet}": p.astype(np.int32) for sheet, p in subject.positions.items()}
    results: dict[str, Any] = {
        "n_items": len(found.items),
        "items": found.items,
        "conditions": found.conditions,
    }
    results["mean_magnitude"] = {sheet: float(np.abs(x).mean()) for sheet, x in patterns.items()}
    return Analysis(protocol_of(cfg), {path.name: found.sha256}, results, arrays)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    if np.abs(x).max() > np.finfo(dtype).max:
        raise UserError(
            f"dtype = {dtype} cannot hold activations of {np.abs(x).max():.3g}; use --dtype float32"
        )
    return x.astype(dtype)


def table(contents: list[dict[str, Any]]) -> None:
    print_table(
        ["sheet", *(f"{c['model']['label']}: mean |activation|" for c in contents)],
        [
            [sheet, *(c["results"]["mean_magnitude"].get(sheet) for c in contents)]
            for sheet in contents[0]["model"]["sheets"]
        ],
    )


def main(argv: list[str]) -> None:
    run_analyses("activations", ActivationsConfig, argv, analyse, table)


if __name__ == "__main__":
    run_main(main)
