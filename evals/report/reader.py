"""Data of the report's reader: what every unit does on a few texts, small enough to lie inside a page.

Each text is read after an end-of-text token, as documents are in training, and that token is not shown.
Activations are stored as one byte each, between the smallest and the largest value of their unit, in the
order of the grid. Beside them: each unit's mean and standard deviation over a larger sample of held-out
text, and the tokens of that sample at which it was highest and lowest.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt import topo
from topogpt.analysis import heldout
from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.terminal import PALETTE, progress

SENTENCES = (
    "In the cortex, neurons that answer to the same things lie side by side, and so a map of the world "
    "spreads over a folded sheet of cells.",
    "When the choir sang the anthem rang across the square, and those who had heard it remembered it for "
    "years.",
)
N_HELD_OUT = 3  # texts of the held-out sample that are shown
PIECE = 256  # tokens of a document that are read at once
SHORTEST = 16  # tokens; shorter pieces are left out
EXTREMES = 5  # tokens kept of each unit, at either end


class Passage(NamedTuple):
    name: str  # what the page calls it
    tokens: np.ndarray  # (n,) int64


class Texts(NamedTuple):
    """What the reader shows, and the sample that its statistics are of."""

    shown: list[Passage]  # none where there is no held-out text and tokens are no words
    sample: list[np.ndarray]  # of tokens
    source: str  # of the sample
    words: bool  # whether tokens are GPT-2's, or only numbers
    missing: str | None  # why there is no held-out text


class Budget(NamedTuple):
    shown: int  # tokens of each text
    sample: int  # tokens of held-out text


# ---- texts ---------------------------------------------------------------------------------------


def choose_texts(
    subjects: Sequence[Subject], files: Sequence[str], budget: Budget, vocab_dir: str | None
) -> Texts:
    """Texts of the given files, or else of the first model's held-out shards, and our sentences."""
    from topogpt.text import tokenizer

    cfg = subjects[0].model.cfg
    words = cfg.vocab_size >= tokenizer.N_VOCAB
    longest = min(PIECE, min(s.model.cfg.block_size for s in subjects) - words)
    if files and not words:
        raise UserError(
            f"texts = {' '.join(files)}: {subjects[0].label} knows {cfg.vocab_size} tokens, fewer than "
            f"GPT-2's {tokenizer.N_VOCAB}, so words cannot be read to it; leave --texts out"
        )
    try:
        pieces, missing = held_out(subjects[0], budget.sample, longest, words), None
    except UserError as error:
        pieces, missing = [], str(error)
    shown = [read_file(Path(file), vocab_dir) for file in files]
    if not files:
        shown = [Passage(f"held-out text {k}", p) for k, p in enumerate(pieces[:N_HELD_OUT], start=1)]
    if words:
        encode = tokenizer.load(vocab_dir).encode
        shown += [Passage("sentence", encode(text).astype(np.int64)) for text in SENTENCES]
    shown = [Passage(p.name, p.tokens[: min(budget.shown, longest)]) for p in shown]
    source = "held-out text" if pieces else "the texts shown"
    return Texts(shown, pieces or [p.tokens for p in shown], source, words, missing)


def read_file(path: Path, vocab_dir: str | None) -> Passage:
    try:
        tokens = heldout.text_file(path, vocab_dir)[0][1:]  # without the end-of-text token before it
    except UserError as error:
        raise UserError(f"texts: {error}") from None
    if not len(tokens):
        raise UserError(f"texts = {path} is empty; give a file with words")
    return Passage(path.stem, tokens.astype(np.int64))


def held_out(subject: Subject, n_tokens: int, longest: int, words: bool) -> list[np.ndarray]:
    """Pieces of held-out documents, first pieces first, n_tokens in all."""
    from topogpt.text import tokenizer

    if subject.settings is None:
        raise UserError(
            f"{subject.label} is no run, so its validation shards are unknown; give --texts FILE.txt"
        )
    stream = heldout.shards(subject, None, 8 * n_tokens)[0].astype(np.int64)
    documents = [stream]
    if words:
        documents = np.split(stream, np.flatnonzero(stream == tokenizer.EOT))
        documents = [d[d != tokenizer.EOT] for d in documents]
    shortest = min(SHORTEST, longest)
    found = [
        (start, document[start : start + longest])
        for document in documents
        for start in range(0, len(document) - shortest + 1, longest)
    ]
    found.sort(key=lambda pair: pair[0])  # stable: the first piece of every document, then the second ones
    pieces, left = [], n_tokens
    for _, piece in found:
        if left >= shortest:
            pieces.append(piece[:left])
            left -= len(pieces[-1])
    return pieces


# ---- one model -----------------------------------------------------------------------------------


def activations(subject: Subject, tokens: np.ndarray, words: bool) -> Any:
    """Of every unit at every token: (n, S h w) float32 tensor, sheet by sheet in the order of the grid."""
    import torch

    from topogpt.text import tokenizer

    lead = [tokenizer.EOT] * words
    device = subject.model.device
    text = torch.from_numpy(np.concatenate([lead, tokens]).astype(np.int64)).to(device)
    with torch.inference_mode():
        named = subject.model(text[None], activations=subject.sheets, last_only=True).activations
        order = {s: torch.from_numpy(topo.units_by_cell(p)) for s, p in subject.positions.items()}
        shown = [named[s][0, len(lead) :].float()[:, cells.to(device)] for s, cells in order.items()]
        return torch.cat(shown, dim=1)


class Statistics(NamedTuple):
    """Of every unit over the sample."""

    mean: np.ndarray  # (U,) float32
    sd: np.ndarray
    where: np.ndarray  # (2k, U): places in the sample, the k highest first, then the k lowest, lowest last
    value: np.ndarray  # (2k, U): the activations there


def statistics(subject: Subject, sample: Sequence[np.ndarray], words: bool) -> Statistics:
    import torch

    n, shift, best = 0, None, []
    for tokens in progress(sample, f"{subject.label}: reading held-out text"):
        x = activations(subject, tokens, words)
        if shift is None:
            shift = x.mean(0)
            total = torch.zeros_like(shift, dtype=torch.float64 if x.device.type != "mps" else torch.float32)
            squares, best = total.clone(), [(x[:0], x[:0].long())] * 2
        total += (x - shift).sum(0)
        squares += ((x - shift) ** 2).sum(0)
        place = torch.arange(n, n + len(x), device=x.device)[:, None].expand_as(x)
        best = [highest(found, sign * x, place) for found, sign in zip(best, (1, -1), strict=True)]
        n += len(x)
    (high, at_high), (low, at_low) = best
    deviation = total / n
    return Statistics(
        (shift + deviation).float().cpu().numpy(),
        (squares / n - deviation**2).clamp_min(0).sqrt().float().cpu().numpy(),
        torch.cat([at_high, at_low.flip(0)]).cpu().numpy(),
        torch.cat([high, -low.flip(0)]).cpu().numpy(),
    )


def highest(found: tuple[Any, Any], x: Any, place: Any) -> tuple[Any, Any]:
    """The EXTREMES highest values of what was found before and of x, with their places."""
    import torch

    values, places = torch.cat([found[0], x]), torch.cat([found[1], place])
    top = values.topk(min(EXTREMES, len(values)), dim=0)
    return top.values, places.gather(0, top.indices)


class Quantised(NamedTuple):
    """x is about low + step * q, off by half a step at most."""

    q: np.ndarray  # (n, U) uint8
    low: np.ndarray  # (U,) float32
    step: np.ndarray


def quantise(x: np.ndarray) -> Quantised:
    low = x.min(0)
    step = ((x.max(0) - low) / 255).astype(np.float32)
    q = np.divide(x - low, step, out=np.zeros_like(x), where=step > 0)
    return Quantised(q.round().clip(0, 255).astype(np.uint8), low, step)


def data_of_model(subject: Subject, texts: Texts) -> dict[str, Any]:
    found = statistics(subject, texts.sample, texts.words)
    seen = [activations(subject, p.tokens, texts.words).cpu().numpy() for p in texts.shown]
    small = quantise(np.concatenate(seen))
    z = np.divide(found.value - found.mean, found.sd, out=np.zeros_like(found.value), where=found.sd > 0)
    units = np.concatenate([topo.units_by_cell(p) for p in subject.positions.values()])
    return {
        "label": subject.label,
        "units": packed(units, np.uint16),
        "activations": packed(small.q, np.uint8),
        "low": packed(small.low, np.float32),
        "step": packed(small.step, np.float32),
        "mean": packed(found.mean, np.float32),
        "sd": packed(found.sd, np.float32),
        "extremes": packed(found.where.T, np.uint16),
        "extremes_z": packed((100 * z.T).round().clip(-32767, 32767), np.int16),  # hundredths
    }


def packed(values: np.ndarray, dtype: type) -> str:
    """Base64 of the numbers, little-endian, as the page's typed arrays read them."""
    array = np.ascontiguousarray(values.astype(np.dtype(dtype).newbyteorder("<")))
    return base64.b64encode(array.tobytes()).decode("ascii")


# ---- the page's data -----------------------------------------------------------------------------


def data(subjects: Sequence[Subject], texts: Texts, vocab_dir: str | None) -> dict[str, Any]:
    """What the page's script reads: texts, sample and one entry per model."""
    vocab_size, n = subjects[0].model.cfg.vocab_size, sum(map(len, texts.sample))

    def words_of(tokens: np.ndarray) -> list[str]:
        return heldout.words_of(tokens, vocab_size, vocab_dir)

    shown = [{"name": p.name, "words": words_of(p.tokens)} for p in texts.shown]
    sample = {"words": [word for tokens in texts.sample for word in words_of(tokens)]}
    sample |= {"ends": np.cumsum([len(tokens) for tokens in texts.sample]).tolist()}
    sample |= {"what": f"{n:,} tokens of {texts.source}"}
    models = [data_of_model(subject, texts) for subject in subjects]
    found = {"grid": list(subjects[0].grid), "sheets": subjects[0].sheets, "stops": PALETTE}
    return found | {"texts": shown, "sample": sample, "models": models}
