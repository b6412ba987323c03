"""Activations on lists of texts or tokens: one pattern per item and sheet, pooled over the item's tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import PoolingConfig, Subject
from topogpt.errors import UserError
from topogpt.terminal import progress

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT

TOKENS_PER_BATCH = 4096  # padding counted in


def of_stimuli(cfg: PoolingConfig, subject: Subject, found: Stimuli) -> dict[str, np.ndarray]:
    """Activations of all items: sheet -> (n_items, n_units) float32."""
    return of_tokens(subject.model, token_lists(cfg, subject, found), cfg.pooling, subject.sheets)


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
    model: "GPT",
    lists: Sequence[np.ndarray],
    pooling: Literal["mean", "last"] = "mean",
    sheets: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Mean over each list's tokens, or its last token: sheet -> (n_lists, n_units) float32.

    sheets: names of those that are wanted; None: of every branch.

    Lists of similar length share a batch, padded on the right. Attention is causal, so padding changes
    nothing before it, and it is never counted.
    """
    import torch

    found: dict[str, np.ndarray] = {}
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
            named = model(tokens.to(model.device), activations=sheets or True, last_only=True).activations
            for sheet, x in named.items():
                if sheet not in found:
                    found[sheet] = np.empty((len(lists), x.shape[-1]), np.float32)
                found[sheet][batch] = torch.einsum("bt,btc->bc", weight, x.float()).cpu().numpy()
    check_finite(found)
    return found


def check_finite(found: Mapping[str, np.ndarray]) -> None:
    for sheet, x in found.items():
        if not np.isfinite(x).all():
            raise UserError(
                f"the activations of {sheet} are not finite; the run diverged: use another --checkpoint"
            )


def batches(lengths: Sequence[int], n_tokens: int | None = None) -> Iterator[list[int]]:
    """Indices by length, so many that n_tokens (None: TOKENS_PER_BATCH) hold them, padded."""
    n_tokens = n_tokens or TOKENS_PER_BATCH
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():  # the last is the longest
        if batch and (len(batch) + 1) * lengths[i] > n_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
