"""Check an exported folder with whatever transformers is installed, without anything of this repository.

    python tests/compat/check_export.py FOLDER --write      # with one version: keep what it computes
    python tests/compat/check_export.py FOLDER              # with another: compare; exit code 1 if it differs

It needs torch, numpy, safetensors and transformers; a LoRA step is added where peft is installed. What is
kept lies beside the folder, in FOLDER.expected.npz.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

TEXTS = [
    "The cerebral cortex is a folded sheet. They'd 3,600 neurons, and it's 2.5 mm thick.",
    "  blanks\tand\n\n    lines\r\n na\u00efve \u65e5\u672c\u8a9e \U0001f600\U0001f3fd \u200b!",
    "one<|endoftext|>two",
]
TOLERANCE = 1e-4  # of a logit, in float32


def main() -> None:
    folder, write = Path(sys.argv[1]), "--write" in sys.argv[2:]
    expected = folder.with_name(f"{folder.name}.expected.npz")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model = model.float().eval()
    cfg, rotary = model.config, model.config.model_type == "arcee"
    assert type(model).__name__ == ("ArceeForCausalLM" if rotary else "GPT2LMHeadModel")
    assert (cfg.hidden_act if rotary else cfg.activation_function) == "gelu"
    tied = {"lm_head.weight"} if cfg.tie_word_embeddings else set()
    assert not info["unexpected_keys"] and not set(info["missing_keys"]) - tied, info
    assert load_file(folder / "topography.safetensors")["layer.0.attn"].shape == (cfg.hidden_size, 2)
    found = compute(model, folder)
    version = transformers.__version__
    if write:
        np.savez_compressed(expected, **found)
        print(f"transformers {version}: kept in {expected}")
        return
    with np.load(expected, allow_pickle=False) as kept:
        assert kept.keys() == found.keys(), (list(kept.keys()), list(found))
        worst = 0.0
        for name, value in found.items():
            assert kept[name].shape == value.shape, f"{name}: {value} instead of {kept[name]}"
            if name.startswith("logits"):
                worst = max(worst, float(np.abs(kept[name] - value).max()))
            else:
                assert np.array_equal(kept[name], value), f"{name}: {value} instead of {kept[name]}"
    assert worst <= TOLERANCE, f"a logit differs by {worst}"
    print(
        f"transformers {version}: tokens and greedy text are the same, logits differ by at most {worst:.2g}"
    )
    lora_step(model)


@torch.no_grad()
def compute(model: transformers.PreTrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """Tokens, logits (of the last tokens, to keep the file small) and greedy text."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    found = {}
    for i, text in enumerate(TEXTS):
        tokens = words(text, return_tensors="pt")["input_ids"]
        assert words.decode(tokens[0]) == text
        found[f"tokens{i}"] = tokens.numpy()
        found[f"logits{i}"] = model(tokens).logits[0, -4:].numpy()
        # Explicit lengths and no stopping, so that versions differ in nothing but the model.
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
        )
        found[f"greedy{i}"] = out.numpy()
    return found


def lora_step(model: transformers.PreTrainedModel) -> None:
    try:
        import peft
    except ModuleNotFoundError:
        print("no LoRA step: peft is not installed")
        return
    conv = model.config.model_type == "gpt2"  # which has Conv1D
    config = peft.LoraConfig(target_modules=["c_attn"] if conv else ["q_proj"], fan_in_fan_out=conv)
    model = peft.get_peft_model(model, config)
    tokens = torch.arange(100, 132)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    print(f"peft {peft.__version__}: five LoRA steps took the loss from {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
