"""Arcee's names, shapes and settings as stock transformers has them, and ours: a kind of stock.py.

Arcee is a Llama whose MLP has no gate: rotary positions, RMS norms and a head of its own. Its norms have
weights, which are ones here. It has no scale of the attention branch, so model.scale_attention is folded into
o_proj and said in config.json. Folding rounds, unless the scale is a power of two (2, 8 or 32 layers); what
comes back folds to the same o_proj again, and is at most one unit in the last place from what it was.
"""

from typing import Any

import torch
from torch import Tensor

from topogpt.settings import GPTConfig
from topogpt.sharing.places import Places

CLASS, MODEL_TYPE = "ArceeForCausalLM", "arcee"
PREFIX, EMBEDDING = "model.", "model.embed_tokens.weight"
# Modules of a block: ours -> theirs, whose rows follow each other in ours.
PARTS = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
PLACES = Places("model.layers", attn="self_attn", before_mlp="post_attention_layernorm", fc="mlp.up_proj")

# Fields of GPTConfig that the class can express, or that do not change what the model computes.
EXPRESSIBLE = set(
    """n_layer n_head n_embd block_size vocab_size dropout bias gelu post_residual n_inner
    norm position tied scale_attention""".split()
)

SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
    "block_size": "max_position_embeddings", "n_inner": "intermediate_size",
}  # fmt: skip
ACTIVATION, DROPOUT, HIDDEN = "hidden_act", "attention_dropout", "intermediate_size"
THETA = 10000.0  # of Rotation in model/gpt.py
SWITCHES = dict.fromkeys(("tie_word_embeddings", "attention_bias"), bool)  # keys that must be true or false
DEFAULTS = {  # what leaving out means
    "hidden_act": "relu2", "attention_dropout": 0.0, "rms_norm_eps": 1e-5, "rope_theta": THETA,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def names(cfg: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Weights of ours -> theirs, without the norms."""
    found = {"transformer.wte.weight": (EMBEDDING,)}
    if not cfg.tied:
        found["lm_head.weight"] = ("lm_head.weight",)
    for i in range(cfg.n_layer):
        for ours, theirs in PARTS.items():
            for kind in ("weight", "bias") if cfg.bias else ("weight",):
                parts = tuple(f"model.layers.{i}.{name}.{kind}" for name in theirs)
                found[f"transformer.h.{i}.{ours}.{kind}"] = parts
    return found


def to_theirs(cfg: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours, without a tied head, under their names and in their shapes."""
    tensors = {}
    for ours, theirs in names(cfg).items():
        weight = fold(cfg, weights[ours]) if is_scaled(cfg, ours) else weights[ours]
        tensors |= zip(theirs, weight.chunk(len(theirs)), strict=True)
    ones = weights["transformer.wte.weight"].new_ones(cfg.n_embd)
    for name in NORMS[:2]:
        tensors |= {f"model.layers.{i}.{name}": ones for i in range(cfg.n_layer)}
    return tensors | {NORMS[2]: ones}


def to_ours(cfg: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raises ValueError where a norm is not one of ours."""
    for name, t in tensors.items():
        if name.endswith(NORMS) and not bool((t == 1).all()):
            raise ValueError(f"{name} is not 1 everywhere, but our RMS norms have no weights")
    weights = {}
    for ours, theirs in names(cfg).items():
        weight = torch.cat([tensors[name] for name in theirs])
        weights[ours] = unfold(cfg, weight) if is_scaled(cfg, ours) else weight
    return weights


def is_scaled(cfg: GPTConfig, name: str) -> bool:
    return cfg.scale_attention and ".attn.c_proj." in name


def fold(cfg: GPTConfig, weight: Tensor) -> Tensor:
    """The weight times 1 / sqrt(2 * n_layer), rounded once."""
    return (weight.double() * (2 * cfg.n_layer) ** -0.5).float()


def unfold(cfg: GPTConfig, folded: Tensor) -> Tensor:
    """A weight that `fold` makes this of.

    Where rounding takes two weights to one, the nearest quotient folds to it again; where it skips values,
    one that is there came from the nearest quotient alone.
    """
    return (folded.double() / (2 * cfg.n_layer) ** -0.5).float()


def to_config(cfg: GPTConfig) -> dict[str, Any]:
    """What config.json says of the architecture."""
    return {
        "model_type": MODEL_TYPE,
        "hidden_act": {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[cfg.gelu],
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_head,
        "hidden_size": cfg.n_embd,
        "head_dim": cfg.n_embd // cfg.n_head,
        "intermediate_size": cfg.n_hidden,
        "max_position_embeddings": cfg.block_size,
        "vocab_size": cfg.n_vocab,
        "attention_dropout": cfg.dropout,
        "attention_bias": cfg.bias,
        "mlp_bias": cfg.bias,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,  # where transformers 4 looks; 5 looks in rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "initializer_range": 0.02,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        "pad_token_id": None,
    }


def required(said: dict[str, Any]) -> dict[str, Any]:
    """What a config.json must say, or leave out, for our model to compute the same."""
    heads = said["num_attention_heads"]
    return {
        "rms_norm_eps": 1e-6, "num_key_value_heads": heads, "head_dim": said["hidden_size"] // heads,
        "rope_theta": THETA, "rope_type": "default", "type": "default", "partial_rotary_factor": 1.0,
        "mlp_bias": said["attention_bias"],
    }  # fmt: skip


def switches(said: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fields of GPTConfig that are no sizes."""
    return {
        "norm": "rmsnorm", "position": "rope", "bias": said["attention_bias"],
        "tied": said["tie_word_embeddings"],
        "scale_attention": bool(said["topography"].get("scale_attention", False)),
    }  # fmt: skip


def in_words(cfg: GPTConfig) -> str:
    """What else the card says of the architecture."""
    biases = "with biases" if cfg.bias else "no biases"
    head = "tied" if cfg.tied else "untied"
    return f"{biases}, rotary positions, RMS norms whose weights are 1, {head} head"
