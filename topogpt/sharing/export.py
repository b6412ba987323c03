"""Write a checkpoint as a folder that stock transformers loads, prove that it does, and push it to the Hub.

    python export.py out/topolm                                  # -> out/topolm/hf
    python export.py out/topolm --checkpoint step-500 --dtype bfloat16 --out topolm-bf16
    python export.py out/topolm --push_to_hf                     # as YOU/topolm
    python export.py out/topolm --push_to_hf USER/NAME --private

The folder is a GPT2LMHeadModel (no remote code) with its tokenizer, the positions of its units and a model
card. Before it gets its name it is loaded with transformers, and its logits, its greedy text and its tokens
are compared with ours.
"""

import json
import shlex
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.files import fsync, permit
from topogpt.settings import ExportConfig, GPTConfig
from topogpt.sharing import push as hub

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT
    from topogpt.runs.checkpoint import LoadedRun
    from topogpt.text.tokenizer import Tokenizer

# Fields of GPTConfig that a GPT2LMHeadModel can express, or that do not change what the model computes.
EXPRESSIBLE = set("n_layer n_head n_embd block_size vocab_size dropout bias gelu post_residual".split())


def main(argv: list[str]) -> None:
    cfg = parse(ExportConfig, optional_value(argv), prog="export.py")
    run = Path(cfg.run)
    if cfg.private and cfg.push_to_hf is None:
        raise UserError("private = True has no effect without --push_to_hf; add that, or leave --private out")
    if not run.is_dir():
        raise UserError(f"run {run} does not exist; give the folder of a run, such as out/NAME")
    repo_id = trouble = None
    if cfg.push_to_hf is not None:
        try:
            repo_id = hub.full_name(cfg.push_to_hf or run.resolve().name)
        except hub.PushFailed as error:
            trouble = error  # the folder is worth having all the same
    folder = export(
        run, cfg.checkpoint, cfg.out, cfg.dtype, repo_id=repo_id, vocab_dir=cfg.vocab_dir, say=print
    )
    if trouble:
        later = f"python hub.py {shlex.quote(str(folder))} USER/NAME"
        raise hub.PushFailed(f"{trouble}; the folder is complete: {later}")
    if repo_id:
        print(f"pushed: {hub.push(folder, repo_id, cfg.private, say=print)}")


def optional_value(argv: list[str]) -> list[str]:
    """Give a bare --push_to_hf an empty value: one before a flag, an existing folder (RUN) or the end."""
    out = []
    for i, arg in enumerate(argv):
        bare = arg.replace("-", "_") == "__push_to_hf"
        following = argv[i + 1] if i + 1 < len(argv) else "-"
        out.append(f"{arg}=" if bare and (following.startswith("-") or Path(following).is_dir()) else arg)
    return out


def export(
    run: str | Path,
    which: str = "best",
    out: str | Path | None = None,
    dtype: str = "float32",
    *,
    repo_id: str | None = None,
    vocab_dir: str | None = None,
    say: Any = print,
) -> Path:
    """Export a checkpoint (best, last, step-N) of a run, and return the folder; raises UserError.

    repo_id is the repository that the model card names. The folder appears, or replaces an older export, only
    once it has passed `prove`.
    """
    from topogpt.runs.checkpoint import load_run
    from topogpt.sharing import proof
    from topogpt.text import tokenizer

    run = Path(run)
    target = Path(out) if out else run / "hf"
    check_replaceable(target)
    loaded = load_run(run, which)
    check_expressible(loaded.model.cfg)
    words = tokenizer.load(vocab_dir) if loaded.model.cfg.vocab_size >= tokenizer.N_VOCAB else None
    part = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write_weights(part, loaded.model, dtype)
        write_json(part / "config.json", config_json(loaded, dtype))
        write_topography(part, loaded)
        eot = words.eot if words else None
        generation = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
        write_json(part / "generation_config.json", generation)
        if words is not None:
            write_tokenizer(part, words, loaded.model.cfg.block_size)
        write_record(part, run, loaded, repo_id, dtype)
        say(proof.prove(part, loaded.model, words))
        put_in_place(part, target)
    except OSError as error:
        raise UserError(
            f"{error.filename or target}: {error.strerror or error}; nothing was exported"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"exported step {loaded.state['train_state']['step']:,} of {run}: {target}")
    return target


def check_expressible(cfg: GPTConfig) -> None:
    """Refuse an architecture that GPT2LMHeadModel does not compute."""
    for f in fields(GPTConfig):
        value = getattr(cfg, f.name)
        if f.name not in EXPRESSIBLE and (f.default is MISSING or value != f.default):
            raise UserError(
                f"model.{f.name} = {value} cannot be exported: GPT2LMHeadModel does not compute it; the run "
                "itself works in sample.py and here"
            )


def check_replaceable(target: Path) -> None:
    if target.exists() and not (target / "topography.json").is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise UserError(f"out = {target} is there and is no export of ours; choose another --out")


def put_in_place(part: Path, target: Path) -> None:
    """Give the finished folder its name, in place of an older export."""
    for path in part.iterdir():
        path.chmod((part / "config.json").stat().st_mode)  # safetensors' files are for their owner alone
        fsync(path)
    fsync(part)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# ---- the files -----------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def n_vocab_of(cfg: GPTConfig) -> int:
    """Rows that are real tokens: GPT-2's 50257, or all of a smaller embedding."""
    from topogpt.settings import N_VOCAB

    return min(cfg.vocab_size, N_VOCAB)


def write_weights(folder: Path, model: "GPT", dtype: str) -> None:
    """model.safetensors in GPT2LMHeadModel's names and shapes; rounds `model` to the same values.

    Conv1D stores (in, out), so linear weights are transposed; missing biases are zeros; the tied head is
    left out.
    """
    import torch
    from safetensors.torch import save_file

    from topogpt.sharing import load as hf_import

    stored = getattr(torch, dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():  # names the tied head once, as transformer.wte.weight
        rounded = parameter.detach().to(stored)
        if not rounded.isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}; export another checkpoint or --dtype float32")
        parameter.data = rounded.float()
        transposed = name.endswith(hf_import.TRANSPOSED)
        tensors[name] = rounded.T.contiguous() if transposed else rounded.contiguous()
        if not model.cfg.bias and name.endswith(
            (*hf_import.TRANSPOSED, "ln_1.weight", "ln_2.weight", "ln_f.weight")
        ):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(parameter), dtype=stored)
    wte, n_vocab = tensors["transformer.wte.weight"], n_vocab_of(model.cfg)
    tensors["transformer.wte.weight"] = wte[:n_vocab].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    permit(folder / "model.safetensors")
    if n_vocab < len(wte):
        padding = {"transformer.wte.weight": wte[n_vocab:].clone()}
        save_file(padding, folder / hf_import.PADDING_FILE, metadata={"format": "pt"})
        permit(folder / hf_import.PADDING_FILE)


def config_json(loaded: "LoadedRun", dtype: str) -> dict[str, Any]:
    from topogpt import topo, topography
    from topogpt.settings import N_VOCAB
    from topogpt.text.tokenizer import EOT

    cfg, sheets = loaded.model.cfg, loaded.state["config"]["topo"]
    n_vocab = n_vocab_of(cfg)
    eot = EOT if n_vocab == N_VOCAB else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": {"exact": "gelu", "tanh": "gelu_new"}[cfg.gelu],
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_inner": None,
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
        "topography": {
            "format": topography.FORMAT,
            "file": "topography.safetensors",
            "grid": list(topo.grid_shape(cfg.n_embd)),
            "unit_distance_mm": 1.0,
            "positions": sheets["positions"],
            "seed": sheets["seed"],
            "loss": sheets["loss"],
            "weight": sheets["weight"] if sheets["loss"] != "none" else 0.0,
            "post_residual": cfg.post_residual,
            "step": loaded.state["train_state"]["step"],
        },
    }


def write_topography(folder: Path, loaded: "LoadedRun") -> None:
    from topogpt import topography

    cfg, sheets = loaded.model.cfg, loaded.state["config"]["topo"]
    modules = {}
    for i in range(cfg.n_layer):
        block = f"transformer.h.{i}"
        modules[f"layer.{i}.attn"] = (
            f"{block}.ln_2 (input)" if cfg.post_residual else f"{block}.attn (output)"
        )
        modules[f"layer.{i}.mlp"] = f"{block} (output)" if cfg.post_residual else f"{block}.mlp (output)"
    topography.save_topography(
        folder,
        loaded.positions,
        kind=sheets["positions"],
        seed=sheets["seed"],
        shown_by=modules,
        step=loaded.state["train_state"]["step"],
    )


def write_tokenizer(folder: Path, words: "Tokenizer", block_size: int) -> None:
    """GPT-2's tokenizer in all the forms that transformers reads, from the two files we have."""
    from topogpt.text.tokenizer import EOT

    bpe, encoder = words.vocab_files()
    shutil.copyfile(encoder, folder / "vocab.json")
    shutil.copyfile(bpe, folder / "merges.txt")
    merges = [line.split(" ") for line in bpe.read_text(encoding="utf-8").split("\n")[1:] if line]
    special = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    special |= {"normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": EOT, **special}],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": level | {"trim_offsets": False},
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": json.loads(encoder.read_bytes()),
                "merges": [" ".join(pair) for pair in merges],  # older readers know this form only
            },
        },
    )
    eot = special["content"]
    names = {f"{role}_token": eot for role in ("bos", "eos", "unk")}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": block_size,
            "added_tokens_decoder": {str(EOT): special},
            **names,
        },
    )


def write_record(folder: Path, run: Path, loaded: "LoadedRun", repo_id: str | None, dtype: str) -> None:
    """The resolved training config, the metrics, the picture of the sheets and the model card."""
    import yaml

    from topogpt.sharing import card as modelcard

    config = yaml.safe_dump(plain(loaded.state["config"]), sort_keys=False)
    (folder / "training_config.yaml").write_text(config, encoding="utf-8")
    if (run / "metrics.jsonl").is_file():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    picture = modelcard.picture_of(run, loaded.state["train_state"]["step"])
    if picture:
        shutil.copyfile(picture, folder / "sheets.png")
    card = modelcard.write(run, loaded.state, loaded.model.n_parameters(), repo_id, dtype, bool(picture))
    (folder / "README.md").write_text(card, encoding="utf-8")


def plain(value: Any) -> Any:
    """Settings as YAML knows them: tuples become lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
