"""GPT-2's names, shapes and settings as stock transformers has them, and ours: both ways.

Conv1D stores (in, out), so linear weights are transposed. Biases and the tanh approximation of GELU, which
stock GPT-2 has and TopoLM has not, are model.bias and model.gelu of ours; where there are no biases, theirs
are zeros. Their embedding holds GPT-2's tokens, ours is padded to a multiple of 64. What either cannot
compute is refused.
"""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.settings import N_VOCAB, GPTConfig
from topogpt.sharing.tokenizer_files import check_vocabulary
from topogpt.text.tokenizer import EOT
from topogpt.topo import ONE_SHEET

N_PADDED = GPTConfig().vocab_size  # rows of the embedding of ours: a multiple of 64
WTE = "transformer.wte.weight"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files store among the weights
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs -> model.gelu

# Fields of GPTConfig that a GPT2LMHeadModel can express, or that do not change what the model computes.
EXPRESSIBLE = set(
    "n_layer n_head n_embd block_size vocab_size dropout bias gelu post_residual n_inner".split()
)

# What a config.json must say, or leave out, for our model to compute the same.
REQUIRED = {
    "model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip


# ---- ours to theirs ------------------------------------------------------------------------------


def check_expressible(cfg: GPTConfig) -> None:
    """Refuse an architecture that GPT2LMHeadModel does not compute."""
    for f in fields(GPTConfig):
        value = getattr(cfg, f.name)
        if f.name not in EXPRESSIBLE and (f.default is MISSING or value != f.default):
            raise UserError(
                f"model.{f.name} = {value} cannot be exported: GPT2LMHeadModel does not compute it; the run "
                "itself works in sample.py and here"
            )


def to_gpt2(model: GPT, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Weights under GPT2LMHeadModel's names, without the tied head, and the padding rows of the embedding.

    Rounds `model` to the same values.
    """
    stored = getattr(torch, dtype)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # names the tied head once, as transformer.wte.weight
        rounded = parameter.detach().to(stored)
        if not rounded.isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}; export another checkpoint or --dtype float32")
        parameter.data = rounded.float()
        tensors[name] = (rounded.T if name.endswith(TRANSPOSED) else rounded).contiguous()
        if not model.cfg.bias and name.endswith((*TRANSPOSED, *NORMS)):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(parameter), dtype=stored)
    n_vocab = model.cfg.n_vocab
    padding = tensors[WTE][n_vocab:].clone()
    tensors[WTE] = tensors[WTE][:n_vocab].clone()
    return tensors, padding


def to_gpt2_config(cfg: GPTConfig, dtype: str) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel."""
    n_vocab = cfg.n_vocab
    eot = EOT if n_vocab == N_VOCAB else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": {"exact": "gelu", "tanh": "gelu_new"}[cfg.gelu],
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_inner": cfg.n_inner,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "vocab_size": n_vocab,
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
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": dtype,
    }


def shown_by(cfg: GPTConfig, sheets: Iterable[str]) -> dict[str, str]:
    """Which module of theirs shows each sheet."""
    modules = {
        ONE_SHEET: "the sheets of all branches side by side: layer.0.attn, layer.0.mlp, layer.1.attn, ..."
    }
    for i in range(cfg.n_layer):
        block = f"transformer.h.{i}"
        attn, mlp = f"{block}.attn (output)", f"{block}.mlp (output)"
        if cfg.post_residual:
            attn, mlp = f"{block}.ln_2 (input)", f"{block} (output)"
        modules |= {f"layer.{i}.attn": attn, f"layer.{i}.mlp": mlp}
        modules |= {f"layer.{i}.fc": f"{block}.mlp.c_fc (output)"}
    return {name: modules[name] for name in sheets}


# ---- theirs to ours ------------------------------------------------------------------------------


def from_gpt2(
    folder: Path, said: dict[str, Any], tensors: dict[str, Tensor], padding: Tensor | None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our configuration and weights, float32 without the tied head, of a folder's config.json and tensors.

    GPT-2's rows are padded to ours: with the run's own rows where the export kept them (`padding`), else with
    the mean row. A token of the mean row has the mean logit, so by Jensen's inequality 47 of them raise the
    loss by less than 47 / 50257 = 0.001 nats, whatever the model; rows of zeros, whose logit is 0, would win
    over every real token in a model whose logits are negative, as GPT-2's are.
    """
    check_computes_the_same(folder, said)
    weights = {}
    for name, tensor in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not name.endswith(MASKS):
            weights[name] = tensor.float().T.contiguous() if name.endswith(TRANSPOSED) else tensor.float()
    if not any(t.count_nonzero() for name, t in weights.items() if name.endswith(".bias")):
        weights = {name: t for name, t in weights.items() if not name.endswith(".bias")}
    wte = weights.get(WTE)
    head = weights.pop("lm_head.weight", wte)
    if wte is not None and not torch.equal(head, wte):
        raise UserError(f"{folder}: lm_head.weight is not {WTE}; our head is tied to it")
    cfg = config_of(folder, said, weights, padding)
    check_shapes(folder, cfg, weights)
    return cfg, weights


def config_of(
    folder: Path, said: dict[str, Any], weights: dict[str, Tensor], padding: Tensor | None
) -> GPTConfig:
    """Our configuration of the folder's model; pads the embedding in `weights`."""
    try:
        n_vocab, width = said["vocab_size"], said["n_embd"]
        shape = {key: said[key] for key in ("n_layer", "n_head", "n_embd")}
        shape |= {"block_size": said["n_positions"], "dropout": said.get("resid_pdrop", 0.1)}
    except KeyError as error:
        raise UserError(f"{folder}/config.json has no {error.args[0]}; it is no GPT-2 style folder") from None
    if said.get("n_inner") != 4 * width:  # which is ours without saying so
        shape["n_inner"] = said.get("n_inner")
    check_vocabulary(folder, n_vocab)
    wte = weights.get(WTE)
    if wte is None or tuple(wte.shape) != (n_vocab, width):
        raise UserError(
            f"{folder}: {WTE} is {'missing' if wte is None else tuple(wte.shape)}, but "
            f"config.json says vocab_size {n_vocab} and n_embd {width}"
        )
    if n_vocab == N_VOCAB:
        mean = wte.mean(0, keepdim=True).expand(N_PADDED - n_vocab, -1)
        weights[WTE] = torch.cat([wte, mean if padding is None else padding.float()])
        n_vocab = len(weights[WTE])
    return GPTConfig(
        vocab_size=n_vocab,
        bias=any(name.endswith(".bias") for name in weights),
        gelu=GELUS[said.get("activation_function", "gelu_new")],
        post_residual=bool(said.get("topography", {}).get("post_residual", False)),
        **shape,
    )


def check_computes_the_same(folder: Path, said: dict[str, Any]) -> None:
    for key, wanted in REQUIRED.items():
        value = said.get(key, wanted)
        if value != wanted:
            raise UserError(
                f"{folder}/config.json: {key} = {value}, but our GPT computes as with {wanted}; it cannot be "
                "loaded"
            )
    if said.get("activation_function", "gelu_new") not in GELUS:
        raise UserError(
            f"{folder}/config.json: activation_function = {said['activation_function']}, but our GPT "
            f"has only {', '.join(GELUS)}; it cannot be loaded"
        )


def check_shapes(folder: Path, cfg: GPTConfig, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in GPT(cfg).state_dict().items()}
    del expected["lm_head.weight"]
    for name in sorted(expected.keys() | weights.keys()):
        there = tuple(weights[name].shape) if name in weights else "missing"
        if there != expected.get(name):
            raise UserError(
                f"{folder}: {name} is {there}, but our model has {expected.get(name, 'no such weight')}"
            )
