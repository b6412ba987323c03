"""GPT-2's names, shapes and settings as stock transformers has them, and ours: a kind of stock.py.

Conv1D stores (in, out), so linear weights are transposed. Biases and the tanh approximation of GELU, which
stock GPT-2 has and TopoLM has not, are model.bias and model.gelu of ours; where there are no biases, theirs
are zeros.
"""

from typing import Any

import torch
from torch import Tensor

from topogpt.settings import GPTConfig
from topogpt.sharing.places import Places

CLASS, MODEL_TYPE = "GPT2LMHeadModel", "gpt2"
PREFIX, EMBEDDING = "transformer.", "transformer.wte.weight"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
PLACES = Places("transformer.h", attn="attn", before_mlp="ln_2", fc="mlp.c_fc")

# Fields of GPTConfig that the class can express, or that do not change what the model computes.
EXPRESSIBLE = set(
    "n_layer n_head n_embd block_size vocab_size dropout bias gelu post_residual n_inner".split()
)

SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
ACTIVATION, DROPOUT, HIDDEN = "activation_function", "resid_pdrop", "n_inner"
SWITCHES: dict[str, type] = {}  # keys of config.json that must be true or false
DEFAULTS = {"activation_function": "gelu_new", "resid_pdrop": 0.1}  # what leaving out means


def to_theirs(cfg: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours, without the tied head, under their names and in their shapes."""
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = weight.T if name.endswith(TRANSPOSED) else weight
        if not cfg.bias and name.endswith((*TRANSPOSED, *NORMS)):
            tensors[name.removesuffix("weight") + "bias"] = weight.new_zeros(len(weight))
    return tensors


def to_ours(cfg: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.T.contiguous() if name.endswith(TRANSPOSED) else t
        for name, t in tensors.items()
        if cfg.bias or not name.endswith(".bias")
    }


def to_config(cfg: GPTConfig) -> dict[str, Any]:
    """What config.json says of the architecture."""
    return {
        "model_type": MODEL_TYPE,
        "activation_function": {"exact": "gelu", "tanh": "gelu_new"}[cfg.gelu],
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_inner": cfg.n_inner,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "vocab_size": cfg.n_vocab,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def required(said: dict[str, Any]) -> dict[str, Any]:
    """What a config.json must say, or leave out, for our model to compute the same."""
    return {
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    }  # fmt: skip


def switches(said: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fields of GPTConfig that are no sizes."""
    return {"bias": any(bool(torch.any(t)) for name, t in tensors.items() if name.endswith(".bias"))}


def in_words(cfg: GPTConfig) -> str:
    """What else the card says of the architecture."""
    return "with biases" if cfg.bias else "biases zero"
