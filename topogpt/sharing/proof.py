"""The proof that an exported folder is the model it was made from: logits, greedy text and tokens agree.

prove(folder, model, words)     # -> a line that says what was found; UserError where anything differs
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.text.tokenizer import Tokenizer

TOLERANCE = 1e-4  # largest difference of a logit from ours, in float32
N_GREEDY = 24  # tokens of the greedy text that is compared

TEXT = """The cerebral cortex is a folded sheet, about three millimetres thick. Neurons that lie close
together on it tend to respond to similar things: in the visual cortex of a cat or a monkey,
preferred orientation changes smoothly from one column to the next, and in the temporal lobe there
are patches for faces, for places and for words. Why? One answer is economy. Wires cost space and
energy, so units that talk to each other often should be neighbours. In 1950 P. A. P. Moran proposed
a number for how alike neighbours are; for 28 x 28 = 784 units without any order it is close to 0,
and for a smooth map it approaches 1. "Is it so?" asked the student. "Let's measure it," said her
teacher, "before we believe it." They'd 3,600 tokens, two cores, and an hour.
"""


def prove(folder: Path, model: GPT, words: Tokenizer | None) -> str:
    """Load the folder with transformers and compare it with `model`; return a line that says what was found.

    Raises UserError where anything differs.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        return "not checked against transformers, which is not installed (pip install transformers)"
    n_vocab = model.cfg.n_vocab
    if words is not None:
        tokens = words.encode_document(TEXT).tolist()
    else:
        tokens = [b % n_vocab for b in TEXT.encode()]
    tokens = (tokens * (1 + model.cfg.block_size // len(tokens)))[: model.cfg.block_size]
    text = torch.tensor([tokens])
    with quiet(transformers):
        theirs = load_theirs(folder)
        if words is not None:
            check_tokenizer(folder, words)
        with torch.no_grad():
            difference = (theirs(text).logits - model(text).logits[..., :n_vocab]).abs().max().item()
        if not difference <= TOLERANCE:  # written so that NaN fails
            raise UserError(
                f"the exported model is not ours: with transformers {transformers.__version__} a logit "
                f"differs by {difference:.2g} (at most {TOLERANCE:g} is allowed); nothing was exported"
            )
        n_new = min(N_GREEDY, model.cfg.block_size - 1)
        prompt = text[:, : max(1, min(16, model.cfg.block_size - n_new))]
        check_greedy(theirs, model, prompt, n_new, n_vocab)
    same = "greedy text and tokenizer are" if words else "greedy text is"
    return (
        f"checked with transformers {transformers.__version__}: the logits of {text.numel():,} tokens differ "
        f"by at most {difference:.1g}, {same} the same"
    )


def load_theirs(folder: Path) -> Any:
    """The folder as a stock model in float32, every weight of it from the file."""
    from transformers import AutoModelForCausalLM

    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever it stumbles over, nobody else could load it either
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers cannot load the exported model: {reason}; nothing was exported"
        ) from None
    wrong = {key: sorted(map(str, info.get(key, ()))) for key in ("unexpected_keys", "mismatched_keys")}
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    wrong["missing_keys"] = sorted(set(info["missing_keys"]) - tied)
    for key, names in wrong.items():
        if names:
            raise UserError(
                f"the exported model is not ours: {key}: {', '.join(names)}; nothing was exported"
            )
    return theirs.float().eval()


def check_tokenizer(folder: Path, words: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if theirs(TEXT)["input_ids"] != words.encode(TEXT).tolist() or len(theirs) != words.n_vocab:
        raise UserError("the exported tokenizer gives other tokens than ours; nothing was exported")


def check_greedy(theirs: Any, model: GPT, prompt: Any, n_new: int, n_vocab: int) -> None:
    """Compare greedy continuations up to the first near-tie, where rounding may decide."""
    a = model.generate(prompt, n_new, temperature=0, n_vocab=n_vocab)[0]
    options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    b = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    apart = torch.nonzero(a != b)
    if len(a) == len(b) and not len(apart):
        return
    i = int(apart[0]) if len(apart) else min(len(a), len(b))
    with torch.no_grad():
        top = model(a[None, :i]).logits[0, -1, :n_vocab].topk(min(2, n_vocab)).values
    if len(a) != len(b) or (top[0] - top[-1]).item() > 2 * TOLERANCE:
        raise UserError(f"the exported model's greedy text leaves ours at token {i}; nothing was exported")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bars and messages of transformers, which are about other uses than this one."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
