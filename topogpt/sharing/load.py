"""Read models back: a GPT-2 style folder as weights of ours, and any run, folder or Hub name as a model.

    cfg, weights, positions = load_gpt2_folder("out/topolm/hf")    # or a repository of the Hub, USER/NAME
    model = load_model("out/topolm").model                         # a run, an exported folder or USER/NAME
    cfg, weights, positions = initial(cfg.model, "out/topolm/hf")  # to start a run of this shape from it

Biases and the tanh approximation of GELU, which stock GPT-2 has and TopoLM has not, become model.bias and
model.gelu; biases that are all zero, as export.py writes them, are none.
What our GPT cannot compute is refused.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from topogpt import topography
from topogpt.errors import UserError
from topogpt.model.gpt import GPT, sheet_names
from topogpt.runs.checkpoint import load_run, load_weights
from topogpt.settings import N_VOCAB, GPTConfig

N_PADDED = GPTConfig().vocab_size  # rows of the embedding of ours: a multiple of 64
PADDING_FILE = "padding.safetensors"  # the rows that export.py cuts off, so that coming back changes nothing
VOCABULARY_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"  # see `digest`
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files store among the weights

# What a config.json must say, or leave out, for our model to compute the same.
REQUIRED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs -> model.gelu
ASKED_FILES = ["*.json", "*.safetensors", "merges.txt"]


class Imported(NamedTuple):
    cfg: GPTConfig
    weights: dict[str, Tensor]  # our names and shapes, float32, without the tied head
    positions: dict[str, np.ndarray] | None  # sheet -> (n_units, 2); None where the folder has none


class LoadedModel(NamedTuple):
    model: GPT  # in eval mode
    positions: dict[str, np.ndarray] | None  # sheet -> (n_units, 2)
    folder: Path  # of the checkpoint or the exported folder


def load_model(
    path_or_name: str | Path, checkpoint: str = "best", device: str | torch.device = "cpu"
) -> LoadedModel:
    """A model from the folder of a run, an exported folder or the Hub.

    `checkpoint` is best, last or step-N; for a repository of the Hub, step-N is the tag.
    """
    path = Path(path_or_name)
    if (path / "checkpoints").is_dir() or (path.is_dir() and not (path / "config.json").exists()):
        run = load_run(path, checkpoint, device)
        return LoadedModel(run.model, run.positions, run.folder)
    folder = find_folder(path_or_name, checkpoint if checkpoint.startswith("step-") else None)
    cfg, weights, positions = load_gpt2_folder(folder)
    model = GPT(cfg)
    load_weights(model, weights)
    return LoadedModel(model.to(device).eval(), positions, folder)


def initial(cfg: GPTConfig, path_or_name: str | Path) -> Imported:
    """Weights to start a run of shape `cfg` from: of a run's best checkpoint, a folder or the Hub.

    Sizes must be those of cfg; a shorter context takes the first positions. Load them with
    `checkpoint.load_weights`.
    """
    loaded = load_model(path_or_name)
    there = loaded.model.cfg
    for key in ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu", "block_size"):
        has, wanted = getattr(there, key), getattr(cfg, key)
        if has != wanted and not (key == "block_size" and has > wanted):
            raise UserError(
                f"init_from = {path_or_name} has {key} {has}, but model.{key} = {wanted}; give "
                + (f"--model.{key} {has}" if key != "bias" else "--model.bias" if has else "--model.no_bias")
            )
    weights = {name: t.detach() for name, t in loaded.model.named_parameters()}
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: cfg.block_size].clone()
    return Imported(cfg, weights, loaded.positions)


def load_gpt2_folder(path_or_repo: str | Path) -> Imported:
    """Weights and shape of a GPT-2 style folder or repository, in our names, and its positions if it has any.

    GPT-2's 50257 rows are padded to our 50304: with the run's own rows where export.py kept them, else with
    the mean row. A token of the mean row has the mean logit, so by Jensen's inequality 47 of them raise the
    loss by less than 47 / 50257 = 0.001 nats, whatever the model; rows of zeros, whose logit is 0, would win
    over every real token in a model whose logits are negative, as GPT-2's are.
    """
    folder = find_folder(path_or_repo)
    said = read_json(folder / "config.json")
    check_computes_the_same(folder, said)
    tensors = read_tensors(folder)
    weights = {}
    for name, tensor in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith(MASKS):
            continue
        weights[name] = tensor.float().T.contiguous() if name.endswith(TRANSPOSED) else tensor.float()
    if not any(t.count_nonzero() for name, t in weights.items() if name.endswith(".bias")):
        weights = {name: t for name, t in weights.items() if not name.endswith(".bias")}
    wte = weights.get("transformer.wte.weight")
    head = weights.pop("lm_head.weight", wte)
    if wte is not None and not torch.equal(head, wte):
        raise UserError(f"{folder}: lm_head.weight is not transformer.wte.weight; our head is tied to it")
    cfg = config_of(folder, said, weights)
    check_shapes(folder, cfg, weights)
    return Imported(cfg, weights, read_positions(folder, cfg))


def config_of(folder: Path, said: dict[str, Any], weights: dict[str, Tensor]) -> GPTConfig:
    """Our configuration of the folder's model; pads the embedding in `weights`."""
    try:
        n_vocab, width = said["vocab_size"], said["n_embd"]
        shape = {key: said[key] for key in ("n_layer", "n_head", "n_embd")}
        shape |= {"block_size": said["n_positions"], "dropout": said.get("resid_pdrop", 0.1)}
    except KeyError as error:
        raise UserError(f"{folder}/config.json has no {error.args[0]}; it is no GPT-2 style folder") from None
    check_vocabulary(folder, n_vocab)
    wte = weights.get("transformer.wte.weight")
    if wte is None or tuple(wte.shape) != (n_vocab, width):
        raise UserError(
            f"{folder}: transformer.wte.weight is {'missing' if wte is None else tuple(wte.shape)}, but "
            f"config.json says vocab_size {n_vocab} and n_embd {width}"
        )
    if n_vocab == N_VOCAB:
        rows = wte.mean(0, keepdim=True).expand(N_PADDED - n_vocab, -1)
        if (folder / PADDING_FILE).is_file():
            rows = read_file(folder / PADDING_FILE)["transformer.wte.weight"].float()
        weights["transformer.wte.weight"] = torch.cat([wte, rows])
        n_vocab += len(rows)
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
    if said.get("n_inner") not in (None, 4 * said.get("n_embd", 0)):
        raise UserError(f"{folder}/config.json: n_inner = {said['n_inner']}, but our MLP is 4 x n_embd wide")


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


# ---- vocabulary ----------------------------------------------------------------------------------


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of the folder's tokenizer; None where it has none."""
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        said = read_json(folder / "tokenizer.json")
        added = {entry["content"]: entry["id"] for entry in said.get("added_tokens", [])}
        return said.get("model", {}).get("vocab", {}) | added
    return None


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


# ---- files ---------------------------------------------------------------------------------------


def find_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a copy of the repository of the Hub, in the Hub's own cache."""
    path, name = Path(path_or_repo), str(path_or_repo)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give an exported folder, such as out/NAME/hf")
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is neither a folder nor the name of a repository of the Hub (USER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=ASKED_FILES))
    except Exception as error:  # no network, no such repository or tag, no right to read it
        offline = type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        reason = "it cannot be reached" if offline else " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is no folder here and could not be fetched from the Hub ({reason}); give a run, an "
            "exported folder or USER/NAME"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; export it again") from None


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or missing: {error}; export it again") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder, from one file or from several with their index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return read_file(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(read_json(index)["weight_map"].values())):
        tensors |= read_file(folder / Path(name).name)
    return tensors


def read_positions(folder: Path, cfg: GPTConfig) -> dict[str, np.ndarray] | None:
    if not (folder / "topography.safetensors").exists():
        return None
    try:
        positions = topography.load_topography(folder).positions
    except ValueError as error:
        raise UserError(str(error)) from None
    if list(positions) != sheet_names(cfg.n_layer) or {len(p) for p in positions.values()} != {cfg.n_embd}:
        raise UserError(
            f"{folder}/topography.safetensors does not hold {2 * cfg.n_layer} sheets of {cfg.n_embd} units"
        )
    return positions
