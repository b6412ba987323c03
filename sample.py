"""Write text with a trained model.

python sample.py out/topolm --prompt "The cortex"          # or out/topolm/hf, or USER/topolm from the Hub
"""

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.settings import SampleConfig


def main(argv: list[str]) -> None:
    cfg = parse(SampleConfig, argv, prog="sample.py")
    import torch  # takes seconds: only once the command line is understood

    from topogpt.distributed import pick_device
    from topogpt.sharing.load import load_model
    from topogpt.text import tokenizer

    device = pick_device(cfg.device)
    model = load_model(cfg.run, cfg.checkpoint, device).model
    words = tokenizer.load(cfg.vocab_dir)
    # begins with the end-of-text token, as in training
    start = words.encode_document(cfg.prompt).astype("int64")
    if start.max() >= model.cfg.vocab_size:
        raise UserError(
            f"{cfg.run} knows {model.cfg.vocab_size} tokens, fewer than GPT-2's {words.n_vocab}, so none "
            "can be read to it; give a run of the default --model.vocab_size"
        )
    generator = torch.Generator(device).manual_seed(cfg.seed)
    for i in range(cfg.n_samples):
        tokens = model.generate(
            torch.from_numpy(start)[None].to(device), cfg.max_new_tokens, temperature=cfg.temperature,
            top_k=cfg.top_k, top_p=cfg.top_p, n_vocab=min(words.n_vocab, model.cfg.vocab_size),
            stop=words.eot, generator=generator,
        )[0, 1:].tolist()  # fmt: skip
        if i:
            print("-" * 80)
        print(words.decode([t for t in tokens if t != words.eot]))


if __name__ == "__main__":
    run_main(main)
