"""Tokens from disk to device: shards and their checks, one stream over them, and the order of its windows.

    corpus = open_corpus(["data/fineweb-edu-10B/train"], key="train_data_dir", vocab_size=cfg.vocab_size)
    with TokenLoader(corpus, block_size=1024, batch_size=512, per_device_batch_size=16, seed=0) as loader:
        for micro_batches in loader.steps(start_step=0): ...

The sequences of optimiser step s are a pure function of (shards, seed, s): no iterator state needs saving,
and neither the number of ranks nor resumption changes the order. What a shard is, and how it is checked:
shards.py.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from topogpt import rng
from topogpt.errors import UserError
from topogpt.text.shards import Shard, check_shards

# torch takes seconds to import: what needs it imports it, so mistakes in the data answer at once
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from topogpt.distributed import Ranks

STEPS_AHEAD = 2  # optimiser steps read before they are asked for


class MicroBatch(NamedTuple):
    """Sequences of one forward pass; targets are the tokens one later."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    index: int  # in the global batch, whatever the number of ranks


class Share(NamedTuple):
    """Whose part of each batch, of how many, and where to; distributed.Ranks says the same."""

    rank: int = 0
    world: int = 1
    device: str | torch.device = "cpu"


ALONE = Share()


class Corpus:
    """An ordered set of shards, read as one stream of tokens through memory maps."""

    def __init__(self, shards: Sequence[Shard], *, key: str = "data") -> None:
        self.shards = tuple(shards)
        self.key = key  # the flag that named the shards, for messages
        self.ends = np.cumsum([shard.tokens for shard in shards])
        self.n_tokens = int(self.ends[-1])
        self.maps = [  # opened once; as plain arrays, whose slices are cheaper than a memmap's
            np.asarray(np.memmap(s.path, dtype="<u2", mode="r", offset=s.offset_bytes, shape=(s.tokens,)))
            for s in shards
        ]
        lines = "".join(f"{shard.tokens} {shard.sha256}\n" for shard in shards)
        known = all(shard.sha256 for shard in shards)
        self.fingerprint = hashlib.sha256(lines.encode()).hexdigest() if known else ""

    def window(self, start: int, n: int) -> np.ndarray:
        """`n` tokens from `start` of the stream, uint16; they may straddle shards."""
        assert 0 <= start and 0 < n <= self.n_tokens - start, (start, n, self.n_tokens)
        parts = []
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.maps)):
            at = start - int(self.ends[i]) + self.shards[i].tokens
            parts.append(self.maps[i][at : at + n])
            start, n = start + len(parts[-1]), n - len(parts[-1])
            if n == 0:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def n_windows(self, block_size: int) -> int:
        """How many windows of block_size tokens, and one more for the last target, start block_size apart."""
        n_windows = (self.n_tokens - 1) // block_size
        if n_windows == 0:
            raise UserError(
                f"{self.key}: {self.n_tokens} tokens in {len(self.shards)} shard(s) are fewer than one "
                f"window: block_size + 1 = {block_size + 1}; add data, or use a smaller --model.block_size"
            )
        return n_windows


class TokenLoader:
    """This rank's micro-batches of each optimiser step, read ahead in a thread."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        block_size: int,
        batch_size: int,
        per_device_batch_size: int,
        seed: int,
        ranks: Ranks | Share = ALONE,
    ) -> None:
        assert batch_size % (per_device_batch_size * ranks.world) == 0, (batch_size, per_device_batch_size)
        assert 0 <= ranks.rank < ranks.world, ranks
        self.corpus, self.block_size, self.batch_size, self.seed = corpus, block_size, batch_size, seed
        self.per_device_batch_size, self.ranks = per_device_batch_size, ranks
        self.n_windows = corpus.n_windows(block_size)
        assert self.n_windows < 2**32, self.n_windows
        self.orders: dict[int, np.ndarray] = {}  # epoch -> order of its windows, for two epochs
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="data")

    def sequences(self, step: int) -> np.ndarray:
        """Indices of the windows of optimiser step `step`, over all ranks; (batch_size,) int64."""
        position = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epoch, at = np.divmod(position, self.n_windows)
        return np.concatenate([self.order(int(e))[at[epoch == e]] for e in np.unique(epoch)]).astype(np.int64)

    def order(self, epoch: int) -> np.ndarray:
        order = self.orders.get(epoch)
        if order is None:
            order = rng.permutation(self.n_windows, self.seed, "epoch", epoch).astype(np.uint32)
            latest = dict(list(self.orders.items())[-1:])
            self.orders = latest | {epoch: order}  # replaced whole, because threads share it
        return order

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one optimiser step, read now."""
        return [to_device(batch, self.ranks.device) for batch in self.read(step)]

    def steps(self, start_step: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each optimiser step from `start_step` on, for ever; starts reading."""
        ahead = deque(self.reader.submit(self.read, start_step + i) for i in range(STEPS_AHEAD))

        def follow() -> Iterator[list[MicroBatch]]:
            for step in itertools.count(start_step + STEPS_AHEAD):
                batches = ahead.popleft().result()  # raises what the thread raised
                ahead.append(self.reader.submit(self.read, step))
                yield [to_device(batch, self.ranks.device) for batch in batches]

        return follow()

    def read(self, step: int) -> list[MicroBatch]:
        sequences, size, ranks = self.sequences(step), self.per_device_batch_size, self.ranks
        return [
            read_batch(self.corpus, sequences[m * size : (m + 1) * size], self.block_size, m, ranks.device)
            for m in range(ranks.rank, self.batch_size // size, ranks.world)
        ]

    def close(self) -> None:
        """End the reading thread."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fixed_batches(
    corpus: Corpus,
    *,
    n_tokens: int,
    block_size: int,
    per_device_batch_size: int,
    ranks: Ranks | Share = ALONE,
) -> Iterator[MicroBatch]:
    """This rank's share of the first `n_tokens` tokens in stream order, the same for any number of ranks."""
    n_windows = min(max(n_tokens // block_size, 1), corpus.n_windows(block_size))
    size = per_device_batch_size

    def batch(m: int) -> MicroBatch:
        windows = range(m * size, min((m + 1) * size, n_windows))
        return to_device(read_batch(corpus, windows, block_size, m, ranks.device), ranks.device)

    return map(batch, range(ranks.rank, -(-n_windows // size), ranks.world))


def read_batch(
    corpus: Corpus,
    windows: Sequence[int] | np.ndarray,
    block_size: int,
    index: int,
    device: str | torch.device,
) -> MicroBatch:
    """Copy windows into host memory, pinned where the device is CUDA."""
    import torch

    rows = np.empty((len(windows), block_size + 1), dtype=np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[:] = corpus.window(int(window) * block_size, block_size + 1)
    tokens, targets = (torch.from_numpy(np.ascontiguousarray(x)) for x in (rows[:, :-1], rows[:, 1:]))
    if is_cuda(device):
        tokens, targets = tokens.pin_memory(), targets.pin_memory()
    return MicroBatch(tokens, targets, index)


def to_device(batch: MicroBatch, device: str | torch.device) -> MicroBatch:
    """Move a batch; on CUDA the copy is only enqueued, on the caller's stream."""
    tokens, targets = (x.to(device, non_blocking=is_cuda(device)) for x in (batch.tokens, batch.targets))
    return MicroBatch(tokens, targets, batch.index)


def is_cuda(device: str | torch.device) -> bool:
    return str(device).startswith("cuda")


def open_corpus(
    patterns: Sequence[str],
    *,
    key: str,
    vocab_size: int,
    verify: bool = True,
    log: Callable[[str], object] = print,
) -> Corpus:
    """Check the shards that globs, folders or paths name, and open them as one stream.

    Args:
        key: the flag that the patterns come from, for messages.
        verify: read shards not seen before in full (SHA-256, largest token). Without it, as on all ranks but
            one, only what the cache and the manifest know is compared, and `fingerprint` may be "".
    """
    assert not isinstance(patterns, str), patterns
    try:
        shards = check_shards(patterns, vocab_size, verify, lambda line: log(f"{key}: {line}"))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return Corpus(shards, key=key)
