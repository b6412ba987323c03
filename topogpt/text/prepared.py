"""The folder of prepared text: who may write it, what its manifest says, whether it is whole and will fit."""

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topogpt.errors import UserError
from topogpt.files import inside, leftovers, read_json
from topogpt.settings import PrepareConfig
from topogpt.terminal import say
from topogpt.text import parts, tokenizer, vocabulary
from topogpt.text.shards import HEADER_BYTES
from topogpt.text.sources import Unit

SPLIT_RULE = (
    "a document is in val where the first 8 bytes of blake2b of its id (its text, where it has none), as a "
    "big-endian number, divided by 2**64, are below val_fraction"
)
VOCABULARY = vocabulary.SHA256["encoder.json"]  # it implies vocab.bpe
TOKENS_PER_BYTE = 0.275  # of text
MANY_REPAIRED = 0.001  # share of documents whose text was no UTF-8, above which it is a warning


@contextlib.contextmanager
def locked(out: Path, rank: int) -> Iterator[None]:
    """Make the folder and keep a second process of this rank out of it; the lock dies with the process."""
    try:
        (out / ".parts").mkdir(parents=True, exist_ok=True)
        file = open(out / ".parts" / f"lock-{rank}", "w")
    except OSError as error:
        problem = f"cannot be written: {error.strerror}; choose another --out_dir"
        raise UserError(f"out_dir = {out} {problem}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            problem = f"is being prepared by another process of rank {rank}; wait for it, end it, or choose"
            raise UserError(f"out_dir = {out} {problem} another --out_dir") from None
        yield


def describe(cfg: PrepareConfig, source: Any, val_fraction: float) -> dict:
    """The part of the manifest that is known before the work; runs with another one need another folder."""
    return {
        "format": parts.FORMAT, "source": source.description, "text_column": cfg.text_column,
        "tokenizer": "gpt2", "tokenizer_sha256": VOCABULARY, "eot": tokenizer.EOT,
        "val_fraction": val_fraction, "split_rule": SPLIT_RULE, "max_tokens": cfg.max_tokens,
        "shard_size": cfg.shard_size,
    }  # fmt: skip


def check_prepared(out: Path, wanted: dict) -> None:
    """Refuse a finished folder whose settings are others, or whose shards are not all there."""
    path, there = out / "manifest.json", read_json(out / "manifest.json")
    try:
        sizes = {inside(out, shard["path"]): HEADER_BYTES + 2 * shard["tokens"] for shard in there["shards"]}
        counts = [there[what][split] for what in ("documents", "tokens") for split in parts.SPLITS]
        sum([*counts, *there["documents"]["skipped"].values()])
    except (KeyError, TypeError, AttributeError, ValueError):
        problem = "is not a manifest of ours; move it away or choose another --out_dir"
        raise UserError(f"{path} {problem}") from None
    different = [key for key, value in wanted.items() if there.get(key) != value]
    if different:
        raise UserError(
            f"out_dir = {out} holds shards prepared with another {different[0]}: "
            f"{str(there.get(different[0])):.150}; choose another --out_dir or delete that folder"
        )
    bad = [shard for shard, size in sizes.items() if not shard.is_file() or shard.stat().st_size != size]
    if bad:
        remedy = f"delete {out / 'train'}, {out / 'val'} and {path}, and run this again to make them anew"
        raise UserError(f"{bad[0]} is missing or damaged; {remedy}")


def check_no_strangers(out: Path) -> None:
    """Remove shards that an interrupted preparation of ours left; refuse a folder with others."""
    assembly = out / ".parts" / "assembly.json"
    try:
        ours = [inside(out, name) for name in read_json(assembly).get("shards", [])]
        if wrong := [p for p in ours if p.suffix != ".bin" or p.parent not in (out / "train", out / "val")]:
            raise ValueError(f"{wrong[0]} is no shard")
    except (ValueError, TypeError) as error:
        raise UserError(f"{assembly} is not as we write it ({error}); look into it, and delete it") from None
    for shard in ours:
        for path in (shard, *leftovers(shard)):
            path.unlink(missing_ok=True)
    if strangers := sorted(out.glob("train/*.bin")) + sorted(out.glob("val/*.bin")):
        which = (
            f"holds {strangers[0].name}, which is in no manifest, and {len(strangers) - 1} other such shards"
        )
        remedy = f"delete {out / 'train'} and {out / 'val'}, or choose another --out_dir"
        raise UserError(f"out_dir = {out} {which}; {remedy}")


def check_disk(cfg: PrepareConfig, source: Any) -> None:
    """Say before the work that it will not fit: downloads, parts and shards."""
    n_tokens = source.text_bytes * TOKENS_PER_BYTE
    if cfg.max_tokens:
        n_tokens = min(n_tokens, cfg.max_tokens)
    there = sum(path.stat().st_size for path in Path(cfg.out_dir).rglob("*") if path.is_file())
    needed = 2 * 2 * n_tokens + source.download_bytes - there  # 2 bytes in a part, 2 in a shard
    free = shutil.disk_usage(cfg.out_dir).free
    if needed > free:
        remedy = "" if cfg.source or cfg.dataset or cfg.delete_source else ", or add --delete_source"
        raise UserError(
            f"out_dir = {cfg.out_dir} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are "
            f"needed; free some, choose another --out_dir, limit --max_tokens{remedy}"
        )


# ---- saying how it goes ---------------------------------------------------------------------------------


class Progress:
    """A bar with tokens/s and the time left where a person watches, else the same line every LOG_SECONDS."""

    def __init__(self, total_weight: float, max_tokens: int | None) -> None:
        from tqdm import tqdm

        self.total_weight, self.max_tokens = total_weight, max_tokens
        self.weight = self.n_documents = 0
        self.t_shown = time.monotonic()
        self.watched = sys.stderr.isatty()
        file = sys.stderr if self.watched else io.StringIO()
        self.bar = tqdm(total=max_tokens, unit="tok", unit_scale=True, file=file)

    def add(self, unit: Unit, counts: parts.Counts, *, fresh: bool) -> None:
        self.weight += unit.weight
        self.n_documents += counts.n_documents
        self.bar.n += counts.n_tokens
        self.bar.initial += counts.n_tokens * (not fresh)  # not at this run's speed
        if self.weight and not self.max_tokens:
            self.bar.total = round(self.bar.n * self.total_weight / self.weight)

    def show(self) -> None:
        self.bar.set_postfix_str(f"{self.n_documents:,} documents", refresh=self.watched)
        if not self.watched and time.monotonic() - self.t_shown > parts.LOG_SECONDS:
            self.t_shown = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)


def skipped_words(skipped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in skipped.items())


def report(out: Path) -> None:
    """Say what a prepared folder holds."""
    manifest = read_json(out / "manifest.json")
    documents, tokens = manifest["documents"], manifest["tokens"]
    n_tokens, n_documents = (sum(of[split] for split in parts.SPLITS) for of in (tokens, documents))
    say(
        f"{n_tokens:,} tokens of {n_documents:,} documents in {len(manifest['shards'])} shards of "
        f"{manifest['shard_size']:,} (the last shard is short by design); "
        f"skipped documents: {skipped_words(documents['skipped'])}"
    )
    if repaired := documents.get("repaired", 0):
        share = f"{repaired:,} of {n_documents:,} documents hold bytes that are no UTF-8; these became U+FFFD"
        if repaired > MANY_REPAIRED * n_documents:
            share = f"warning: {share}; convert the text (iconv -f LATIN1 -t UTF-8) and prepare it again"
        say(share)
    for split in parts.SPLITS:
        say(f"  {split}: {tokens[split]:,} tokens, {documents[split]:,} documents, {out / split}")
    for split, remedy in (("val", "larger"), ("train", "smaller")):
        if not documents[split] and manifest["val_fraction"]:
            say(
                f"warning: no document fell into {split} at val_fraction = {manifest['val_fraction']}; "
                f"delete {out} and run again with a {remedy} --val_fraction"
            )
