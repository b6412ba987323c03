"""Write text with a trained model.

python sample.py out/topolm --prompt "The cortex"          # or out/topolm/hf, or USER/topolm from the Hub
"""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text with a trained model: sample.py RUN [--prompt TEXT]."""

    run: Positional[str]  # a run (out/NAME), an exported folder, or USER/NAME on the Hub
    prompt: str = ""  # text to continue; empty: a new document
    checkpoint: str = "best"  # of a run: best, last or step-N; on the Hub: the tag step-N
    n_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # length of each; it ends earlier where the model ends the document
    temperature: float = 0.8  # below 1: likelier words; 0: always the likeliest
    top_k: int | None = 200  # draw among the k likeliest tokens only
    top_p: float | None = None  # draw among the likeliest tokens that together reach this probability
    seed: int = 0  # of the draws
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("temperature", self.temperature, 0)
        if self.top_k is not None:
            check_at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1")


def main(argv: list[str]) -> None:
    cfg = parse(SampleConfig, argv, prog="sample.py")
    import torch  # takes seconds: only once the command line is understood

    from topogpt.distributed import pick_device
    from topogpt.sharing.load import load_model
    from topogpt.text import tokenizer

    device = pick_device(cfg.device)
    model = load_model(cfg.run, cfg.checkpoint, device).model
    words = tokenizer.load(cfg.vocab_dir)
    start = words.encode_document(cfg.prompt).astype(
        "int64"
    )  # begins with the end-of-text token, as in training
    generator = torch.Generator(device).manual_seed(cfg.seed)
    for i in range(cfg.n_samples):
        tokens = model.generate(
            torch.from_numpy(start)[None].to(device),
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            n_vocab=min(words.n_vocab, model.cfg.vocab_size),
            stop=words.eot,
            generator=generator,
        )[0, 1:].tolist()
        if i:
            print("-" * 80)
        print(words.decode([t for t in tokens if t != words.eot]))


if __name__ == "__main__":
    run_main(main)
