"""GPT-2's tokenizer in the forms that transformers reads, and whether a folder's tokenizer is GPT-2's."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from topogpt.errors import UserError
from topogpt.files import write_json
from topogpt.settings import N_VOCAB
from topogpt.text.tokenizer import EOT, Tokenizer

VOCABULARY_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"  # see `digest`


def write_tokenizer(folder: Path, words: Tokenizer, block_size: int) -> None:
    """GPT-2's tokenizer in all the forms that transformers reads, from the two files we have."""
    write = partial(write_json, indent=2)
    bpe, encoder = words.vocab_files()
    shutil.copyfile(encoder, folder / "vocab.json")
    shutil.copyfile(bpe, folder / "merges.txt")
    merges = [line.split(" ") for line in bpe.read_text(encoding="utf-8").split("\n")[1:] if line]
    special = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    special |= {"normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    model |= {"byte_fallback": False, "vocab": json.loads(encoder.read_bytes())}
    model |= {"merges": [" ".join(pair) for pair in merges]}  # older readers know this form only
    words_and_rules = {"version": "1.0", "truncation": None, "padding": None}
    words_and_rules |= {"added_tokens": [{"id": EOT, **special}], "normalizer": None, "pre_tokenizer": level}
    words_and_rules |= {"post_processor": level | {"trim_offsets": False}, "decoder": level, "model": model}
    write(folder / "tokenizer.json", words_and_rules)
    eot = special["content"]
    names = {f"{role}_token": eot for role in ("bos", "eos", "unk")}
    write(folder / "special_tokens_map.json", names)
    options = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    options |= {"clean_up_tokenization_spaces": False, "model_max_length": block_size}
    write(folder / "tokenizer_config.json", options | {"added_tokens_decoder": {str(EOT): special}} | names)


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of the folder's tokenizer; None where it has none."""
    names = [name for name in ("vocab.json", "tokenizer.json") if (folder / name).is_file()]
    if not names:
        return None
    tokens, said = {}, strict_json(folder / names[0])
    try:
        if names[0] == "tokenizer.json":
            tokens = {entry["content"]: entry["id"] for entry in said.get("added_tokens", [])}
            said = said.get("model", {}).get("vocab", {})
        tokens = said | tokens
        sorted(tokens.values())
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / names[0]} is no vocabulary ({reason}); export it again") from None
    return tokens


def digest(tokens: dict[str, int]) -> str:
    """SHA-256 of a vocabulary, whatever the order and the spelling of its file."""
    return hashlib.sha256(json.dumps(sorted(tokens.items(), key=lambda x: x[1])).encode()).hexdigest()


def check_vocabulary(folder: Path, n_vocab: int) -> None:
    """Refuse a vocabulary that is not GPT-2's: the ids in our shards would mean other words."""
    tokens = vocabulary(folder)
    if tokens is not None and len(tokens) != n_vocab:
        raise UserError(
            f"{folder} has {len(tokens)} tokens in its tokenizer but vocab_size = {n_vocab} in config.json; "
            "export it again"
        )
    if n_vocab > N_VOCAB or (tokens is not None and digest(tokens) != VOCABULARY_SHA256):
        raise UserError(
            f"{folder} has another vocabulary ({n_vocab} tokens) than GPT-2's {N_VOCAB}, in which our shards "
            "and tokenizer are written; it cannot be loaded"
        )


def strict_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an exported folder; raises UserError where it holds none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"it holds a {type(said).__name__}, not an object")
        return said
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; export it again") from None
