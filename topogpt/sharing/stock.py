"""The class of stock transformers that computes what a model of ours does, and the way there and back.

A kind, gpt2.py or arcee.py, is what is peculiar to one class: names, shapes, settings. Here is what is common
to all: which kind it is, storing in a dtype, and the padding. Their embedding holds GPT-2's tokens, ours (and
a head of its own) is padded to a multiple of 64. What neither side can compute is refused.
"""

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.settings import N_VOCAB, GPTConfig
from topogpt.sharing import arcee, gpt2
from topogpt.sharing.tokenizer_files import check_vocabulary
from topogpt.text.tokenizer import EOT

KINDS = {("layernorm", "learned"): gpt2, ("rmsnorm", "rope"): arcee}  # by model.norm and model.position
MODEL_TYPES = {kind.MODEL_TYPE: kind for kind in KINDS.values()}  # by what config.json calls it
N_PADDED = GPTConfig().vocab_size  # rows of the embedding of ours: a multiple of 64
HEAD = "lm_head.weight"  # of every kind
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files store among the weights
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs -> model.gelu


# ---- which kind ----------------------------------------------------------------------------------


def of_model(cfg: GPTConfig) -> ModuleType:
    """The kind that computes what this model does; UserError where there is none."""
    kind = KINDS.get((cfg.norm, cfg.position))
    if kind is None:
        raise UserError(
            f"model.norm = {cfg.norm} with model.position = {cfg.position} cannot be exported: stock classes "
            + " or ".join(f"have {norm} with {position} ({k.CLASS})" for (norm, position), k in KINDS.items())
            + "; the run itself works in sample.py and here"
        )
    for f in fields(GPTConfig):
        value = getattr(cfg, f.name)
        if f.name not in kind.EXPRESSIBLE and (f.default is MISSING or value != f.default):
            raise UserError(
                f"model.{f.name} = {value} cannot be exported: {kind.CLASS} does not compute it; the run "
                "itself works in sample.py and here"
            )
    return kind


def of_folder(folder: Path, said: Any) -> ModuleType:
    """The kind of a folder, by its config.json."""
    name = said.get("model_type", "gpt2") if isinstance(said, dict) else None
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise UserError(
            f"{folder}/config.json: model_type = {name}, but our GPT computes as {' or '.join(MODEL_TYPES)}; "
            "it cannot be loaded"
        )
    return MODEL_TYPES[name]


# ---- ours to theirs ------------------------------------------------------------------------------


def to_stock(model: GPT, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under the names of the class, without a tied head, and the padding rows by the same names.

    Gives `model` the values that come back from them.
    """
    cfg, stored = model.cfg, getattr(torch, dtype)
    kind = of_model(cfg)
    parameters = dict(model.named_parameters())  # names the tied head once, as transformer.wte.weight
    tensors: dict[str, Tensor] = {}
    for name, t in kind.to_theirs(cfg, {name: p.detach().float() for name, p in parameters.items()}).items():
        tensors[name] = t.to(stored, copy=True, memory_format=torch.contiguous_format)
        if not tensors[name].isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}; export another checkpoint or --dtype float32")
    for name, weight in kind.to_ours(cfg, {name: t.float() for name, t in tensors.items()}).items():
        parameters[name].data.copy_(weight)
    padding = {}
    if cfg.vocab_size > cfg.n_vocab:
        for name in {kind.EMBEDDING, HEAD} & tensors.keys():
            padding[name] = tensors[name][cfg.n_vocab :].clone()
            tensors[name] = tensors[name][: cfg.n_vocab].clone()
    return tensors, padding


def to_config(cfg: GPTConfig, dtype: str) -> dict[str, Any]:
    """config.json; under `topography`, what our model has and the class has not."""
    kind, eot = of_model(cfg), EOT if cfg.n_vocab == N_VOCAB else None
    ours = {"post_residual": cfg.post_residual} | ({"scale_attention": True} if cfg.scale_attention else {})
    said = {"architectures": [kind.CLASS], **kind.to_config(cfg), "bos_token_id": eot, "eos_token_id": eot}
    return said | {"torch_dtype": dtype, "topography": ours}


# ---- theirs to ours ------------------------------------------------------------------------------


def from_stock(
    folder: Path, said: dict[str, Any], tensors: dict[str, Tensor], padding: dict[str, Tensor] | None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our configuration and weights, float32 without a tied head, of a folder's config.json and tensors.

    GPT-2's rows are padded to ours: with the run's own rows where the export kept them (`padding`), else with
    the mean row. A token of the mean row has the mean logit, so by Jensen's inequality 47 of them raise the
    loss by less than 47 / 50257 = 0.001 nats, whatever the model; rows of zeros, whose logit is 0, would win
    over every real token in a model whose logits are negative, as GPT-2's are.
    """
    kind = of_folder(folder, said)
    tensors = {
        name if name.startswith((kind.PREFIX, HEAD)) else kind.PREFIX + name: t.float()
        for name, t in tensors.items()
        if not name.endswith(MASKS)
    }
    cfg = config_of(folder, kind, said, tensors)
    check_vocabulary(folder, cfg.vocab_size)
    embedding = tensors.get(kind.EMBEDDING)
    if cfg.tied and embedding is not None and not torch.equal(tensors.pop(HEAD, embedding), embedding):
        raise UserError(f"{folder}: {HEAD} is not {kind.EMBEDDING}; our head is tied to it")
    check_shapes(folder, kind, cfg, tensors)
    if cfg.vocab_size == N_VOCAB:
        for name in {kind.EMBEDDING, HEAD} & tensors.keys():
            tensors[name] = torch.cat([tensors[name], padding_rows(folder, name, tensors[name], padding)])
        cfg = replace(cfg, vocab_size=len(tensors[kind.EMBEDDING]))
    try:
        return cfg, kind.to_ours(cfg, tensors)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; it cannot be loaded") from None


def config_of(folder: Path, kind: ModuleType, said: dict[str, Any], tensors: dict[str, Tensor]) -> GPTConfig:
    """Our configuration of the folder's model, with its own number of rows."""
    rope = [said.get(key) or {} for key in ("rope_scaling", "rope_parameters")]  # transformers 4 and 5
    if not all(isinstance(entry, dict) for entry in rope):
        raise UserError(f"{folder}/config.json: rope_scaling and rope_parameters must be objects; correct it")
    said = kind.DEFAULTS | {key: value for key, value in said.items() if value is not None}
    ours = said.get("topography")
    said = said | rope[0] | rope[1] | {"topography": ours if isinstance(ours, dict) else {}}
    sizes = {"vocab_size": "vocab_size", **kind.SIZES}
    for key in sizes.values():
        if type(said.get(key)) is not int or said[key] < 1:
            raise UserError(f"{folder}/config.json has no number {key}; it is no folder of a {kind.CLASS}")
    check_claims(folder, kind, {ours: (key, said[key]) for ours, key in sizes.items()}, tensors)
    types = {kind.ACTIVATION: str, kind.DROPOUT: int | float, kind.HIDDEN: int | None} | kind.SWITCHES
    for key, wanted in types.items():
        value = said.get(key)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            name = getattr(wanted, "__name__", str(wanted)).replace("None", "null")
            raise UserError(f"{folder}/config.json: {key} = {value!r:.80} must be {name}; correct it")
    for key, wanted in kind.required(said).items():
        if said.get(key, wanted) != wanted:
            raise UserError(
                f"{folder}/config.json: {key} = {said[key]}, but our GPT computes as with {wanted}; it "
                "cannot be loaded"
            )
    activation = said[kind.ACTIVATION]
    if activation not in GELUS:
        raise UserError(
            f"{folder}/config.json: {kind.ACTIVATION} = {activation}, but our GPT has only "
            f"{', '.join(GELUS)}; it cannot be loaded"
        )
    n_inner = said.get(kind.HIDDEN)
    shape = {ours: said[theirs] for ours, theirs in sizes.items()}
    shape["n_inner"] = None if n_inner == 4 * shape["n_embd"] else n_inner  # which is ours without saying so
    return GPTConfig(
        **shape,
        dropout=said[kind.DROPOUT],
        gelu=GELUS[activation],
        post_residual=bool(said["topography"].get("post_residual", False)),
        **kind.switches(said, tensors),
    )


def check_claims(
    folder: Path, kind: ModuleType, claimed: dict[str, tuple[str, int]], tensors: dict[str, Tensor]
) -> None:
    """Compare the sizes of config.json, ours -> (its name, value), with the tensors: a model costs time."""
    block = re.compile(re.escape(kind.PLACES.blocks) + r"\.(\d+)\.")
    found = {"n_layer": len({match[1] for name in tensors if (match := block.match(name))})}
    if (embedding := tensors.get(kind.EMBEDDING)) is not None and embedding.dim() == 2:
        found |= zip(("vocab_size", "n_embd"), embedding.shape, strict=True)
    for ours, there in found.items():
        key, value = claimed[ours]
        if value != there:
            raise UserError(
                f"{folder}/config.json: {key} = {value}, but the safetensors file holds {there}; "
                "get both again, of one model"
            )


def check_shapes(folder: Path, kind: ModuleType, cfg: GPTConfig, tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        weights = dict(GPT(cfg).named_parameters())
    expected = {name: tuple(t.shape) for name, t in kind.to_theirs(cfg, weights).items()}
    for name in sorted(expected.keys() | tensors.keys()):
        there = tuple(tensors[name].shape) if name in tensors else "missing"
        if there != expected.get(name):
            raise UserError(
                f"{folder}: {name} is {there}, but our model has {expected.get(name, 'no such weight')}"
            )


def padding_rows(folder: Path, name: str, real: Tensor, padding: dict[str, Tensor] | None) -> Tensor:
    if padding is None:
        return real.mean(0, keepdim=True).expand(N_PADDED - len(real), -1)
    rows = padding.get(name)
    if rows is None or rows.shape[1:] != real.shape[1:] or len({len(t) for t in padding.values()}) > 1:
        raise UserError(f"{folder}: the padding rows of {name} do not fit; export it again")
    return rows.float()
