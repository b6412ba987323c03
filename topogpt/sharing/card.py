"""The model card of an exported run, made from what the run recorded: README.md of the folder and the Hub."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from topogpt import topo
from topogpt.runs.folder import read_metrics
from topogpt.settings import N_VOCAB
from topogpt.topo import N_NOISE, noise_floor

# What is known about data sets: name on the Hub -> title, licence (the Hub's name for it), licence in words.
LICENCES = {
    "HuggingFaceFW/fineweb-edu": ("FineWeb-Edu", "odc-by", "ODC-By 1.0"),
    "HuggingFaceFW/fineweb": ("FineWeb", "odc-by", "ODC-By 1.0"),
}
ASK = "not recorded with the run; ask whoever trained it"

TOPOLM = """@inproceedings{rathi2025topolm,
  title={TopoLM: brain-like spatio-functional organization in a topographic language model},
  author={Rathi, Neil and Mehrer, Johannes and AlKhamissi, Badr and Binhuraib, Taha and
          Blauch, Nicholas M. and Schrimpf, Martin},
  booktitle={International Conference on Learning Representations},
  year={2025},
  url={https://arxiv.org/abs/2410.11516}
}"""
FINEWEB = """@article{penedo2024fineweb,
  title={The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale},
  author={Penedo, Guilherme and Kydlicek, Hynek and Ben Allal, Loubna and Lozhkov, Anton and
          Mitchell, Margaret and Raffel, Colin and von Werra, Leandro and Wolf, Thomas},
  year={2024},
  url={https://arxiv.org/abs/2406.17557}
}"""


class Data(NamedTuple):
    """What a run was trained on, as far as its manifest says."""

    words: str  # a sentence for the card
    repo: str | None = None  # data set of the Hub
    licence: str = ASK


def write(
    run: Path, state: dict[str, Any], n_parameters: int, repo_id: str | None, dtype: str, has_picture: bool
) -> str:
    """Text of README.md for a checkpoint with this state.json."""
    cfg, step = state["config"], state["train_state"]["step"]
    data = data_of(cfg, state.get("data", {}))
    value = validation_at(run, step)
    name = repo_id.rpartition("/")[2] if repo_id else cfg["run_name"]
    evaluations = read_evaluations(run)
    sections = [
        front_matter(name, data, value),
        f"# {name}\n\n{what_it_is(cfg, n_parameters)}",
        "![one token on every sheet](sheets.png)\n\nOne token's activation on every sheet."
        if has_picture
        else "",
        f"## How to load it and its map\n\n{how_to_load(cfg, repo_id)}",
        f"## Training\n\n{training(cfg, step, data, dtype)}",
        f"## Results\n\n{results(cfg, value, evaluations)}",
        f"## Files\n\n{FILES}",
        f"## Provenance\n\n{provenance(run)}",
        f"## Limits and licence\n\n{LIMITS}",
        "## Citation\n\n```bibtex\n"
        + "\n\n".join([TOPOLM] + [FINEWEB] * ("fineweb" in (data.repo or "")))
        + "\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# ---- sections ------------------------------------------------------------------------------------


def front_matter(name: str, data: Data, value: dict[str, Any] | None) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if value:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data.repo or "unknown",
                dataset_name=LICENCES.get(data.repo or "", ("validation text of the run",))[0],
                dataset_split="validation",
                metric_type=kind,
                metric_name=words,
                metric_value=round(number, 4),
            )
            for kind, words, number in (
                ("cross_entropy", "cross-entropy (nats per token)", value["cross_entropy"]),
                ("perplexity", "perplexity per token", perplexity(value["cross_entropy"])),
            )
            if math.isfinite(number)
        ]
    card = ModelCardData(
        language="en" if data.repo in LICENCES else None,
        license="unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "topography", "cortex", "topogpt"],
        datasets=[data.repo] if data.repo else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---"


def what_it_is(cfg: dict[str, Any], n_parameters: int) -> str:
    model, sheets = cfg["model"], cfg["topo"]
    h, w = topo.grid_shape(model["n_embd"])
    text = (
        "A GPT whose units lie on two-dimensional sheets, as neurons do in cortex: "
        f"{model['n_layer']} layers, {model['n_embd']} wide, {model['n_head']} heads, "
        f"{model['block_size']} tokens of context, {n_parameters / 1e6:.1f}M parameters as trained. The "
        f"attention and the MLP of each layer are a sheet of {h}x{w} units each, {2 * model['n_layer']} in "
        f"all. It is a plain `GPT2LMHeadModel` ({'exact GELU' if model['gelu'] == 'exact' else 'tanh GELU'}, "
        f"{'with biases' if model['bias'] else 'biases zero'}) and needs no code of ours."
    )
    if sheets["loss"] == "none":
        return f"{text}\n\n**This is a control:** its units have positions, but no spatial loss was trained."
    where = "after" if model["post_residual"] else "before"
    return (
        f"{text}\n\nA spatial loss ({sheets['loss']}, weight {sheets['weight']}) pulled units that lie close "
        "together towards firing together. A sheet shows the output of its branch, "
        f"{where} it is added to the residual stream."
    )


def how_to_load(cfg: dict[str, Any], repo_id: str | None) -> str:
    """About ten lines of Python that run as they are: in this folder, or anywhere for a repository."""
    model = cfg["model"]
    layer = model["n_layer"] // 2
    module = f"transformer.h[{layer}]" + ("" if model["post_residual"] else ".mlp")
    here = '"."  # this folder; for a repository: huggingface_hub.snapshot_download("USER/NAME")'
    imports, run = "AutoModelForCausalLM", "model(torch.tensor([[1, 2, 3]]))"
    note = "The run's tokens are not GPT-2's words, so there is no tokenizer."
    if model["vocab_size"] >= N_VOCAB:
        imports += ", AutoTokenizer"
        run = (
            "words = AutoTokenizer.from_pretrained(folder)\n"
            'tokens = words("<|endoftext|>The cortex", return_tensors="pt")  # documents start with it\n'
            "print(words.decode(model.generate(**tokens, max_new_tokens=8)[0]))"
        )
        note = (
            "The tokenizer reads `<|endoftext|>` in a text as the end-of-text token; pass "
            "`split_special_tokens=True` where it should be plain text, as in training."
        )
    lines = ["import torch", "from safetensors.torch import load_file", f"from transformers import {imports}"]
    if repo_id:
        here = f'snapshot_download("{repo_id}")'
        lines.insert(1, "from huggingface_hub import snapshot_download")
    lines += [
        "",
        f"folder = {here}",
        "model = AutoModelForCausalLM.from_pretrained(folder).eval()",
        "shown = []",
        f"model.{module}.register_forward_hook(lambda module, inputs, output: shown.append(output))",
        run,
        f'row, column = load_file(f"{{folder}}/topography.safetensors")["layer.{layer}.mlp"].long().T',
        "output = shown[0][0] if isinstance(shown[0], tuple) else shown[0]  # (batch, tokens, units)",
        f"sheet = torch.zeros{topo.grid_shape(model['n_embd'])}",
        "sheet[row, column] = output[0, -1].detach()  # the last token's activation, every unit in its place",
        "print(sheet)",
    ]
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\n`topography.json` says which module shows each sheet. {note}"


def training(cfg: dict[str, Any], step: int, data: Data, dtype: str) -> str:
    model, optim = cfg["model"], cfg["optim"]
    tokens = step * cfg["batch_size"] * model["block_size"]
    lines = [
        f"Data: {data.words}",
        f"Licence of the data: {data.licence}",
        f"Tokens seen: {tokens:,} ({step:,} steps of {cfg['batch_size']} sequences of {model['block_size']})",
        f"Tokenizer: GPT-2's byte-pair encoding, {N_VOCAB} tokens"
        if model["vocab_size"] >= N_VOCAB
        else f"Tokens: {model['vocab_size']} numbers, not GPT-2's words",
        f"Optimiser: AdamW, peak learning rate {optim['lr']}, {optim['warmup_steps']} warm-up steps, weight "
        f"decay {optim['weight_decay']}, dropout {model['dropout']}",
        f"Stored as {dtype}; every setting is in `training_config.yaml`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def results(
    cfg: dict[str, Any], value: dict[str, Any] | None, evaluations: list[tuple[str, str, str]]
) -> str:
    h, w = topo.grid_shape(cfg["model"]["n_embd"])
    floor, spread = noise_floor(h, w)
    lines = ["The run has no evaluation at this step."]
    if value:
        n_vocab = min(cfg["model"]["vocab_size"], N_VOCAB)
        ce, noise = value["cross_entropy"], f"white noise on this {h}x{w} grid: {floor:.3f} +- {spread:.3f}"
        lines = [
            f"On validation text, after {value['step']:,} steps:",
            "",
            "| measure | value | for comparison |",
            "|---|---|---|",
            f"| cross-entropy (nats per token) | {ce:.4f} | {math.log(n_vocab):.2f}: a blind guess |",
            f"| perplexity per token | {perplexity(ce):.2f} | {n_vocab}: a blind guess |",
            f"| spatial loss, mean over sheets | {value['spatial_loss']:.4f} | 0.5: independent units |",
            f"| mean Moran's I of single-token maps, unsmoothed | {value['moran']:.3f} | {noise} |",
        ]
    lines += ["", MORAN]
    if evaluations:
        lines += ["", "| evaluation | measure | value |", "|---|---|---|"]
        lines += [f"| {name} | {key} | {number} |" for name, key, number in evaluations]
    return "\n".join(lines)


MORAN = f"""Moran's I (queen contiguity, row-standardised) is about 0 for maps without order and 1 for
perfectly smooth ones. The floor is the mean and standard deviation over {N_NOISE} maps of white noise,
unsmoothed; smoothing a map raises both its value and its floor."""

FILES = """| file | what it is |
|---|---|
| `model.safetensors`, `config.json` | the model, as stock `transformers` loads it |
| `topography.safetensors` | row and column of every unit: sheet -> (units, 2) |
| `topography.json` | grid, seed, distance of neighbours in mm (a convention), which module shows a sheet |
| `training_config.yaml`, `metrics.jsonl` | all settings of the run, and its record |
| `padding.safetensors` | the padding rows of the embedding, to train on from here in TopoGPT |"""

LIMITS = """A language model repeats what its data hold, mistakes and prejudices too. This one was trained
for research on topography, without instruction tuning or safety training. The licence of the weights is for
whoever publishes them to state: replace `license: unknown` above."""


def provenance(run: Path) -> str:
    """Code, versions and machine of the run's last start; paths and diffs stay at home."""
    try:
        starts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        last = starts[-1]
        packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
        changed = " with uncommitted changes" if last["git_diff"] else ""
        return "\n".join(
            [
                f"- Code: TopoGPT, git {last['git_sha'] or 'unknown'}{changed}",
                f"- Started {starts[0]['started']}"
                + (f", resumed {len(starts) - 1} times" if starts[1:] else ""),
                f"- Machine: {last['world_size']} x {last['device']}; Python {last['python']}; {packages}",
                f"- SHA-256 of the token data: train {last['data_sha256']['train_data_dir']}, "
                f"validation {last['data_sha256']['val_data_dir']}",
            ]
        )
    except (OSError, ValueError, LookupError, TypeError):
        return "Not recorded."


# ---- what the run recorded -----------------------------------------------------------------------


def data_of(cfg: dict[str, Any], fingerprints: dict[str, str]) -> Data:
    """The run's data, from the manifest beside its shards if that is of these very tokens."""
    import hashlib

    for pattern in cfg["train_data_dir"]:
        for folder in (Path(pattern), *list(Path(pattern).parents)[:2]):
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                shards = sorted(
                    (s for s in manifest["shards"] if s["split"] == "train"), key=lambda s: s["path"]
                )
                lines = "".join(f"{s['tokens']} {s['sha256']}\n" for s in shards)
                if hashlib.sha256(lines.encode()).hexdigest() == fingerprints.get("train_data_dir"):
                    return describe(manifest["source"], sum(s["tokens"] for s in shards))
            except (OSError, ValueError, LookupError, TypeError):
                continue
    return Data(words="unknown: no manifest of its tokens was found when the model was exported")


def describe(source: dict[str, Any], n_tokens: int) -> Data:
    repo = source.get("dataset")
    size = f"{n_tokens:,} tokens in all"
    if "python_documentation" in source:
        return Data(
            words=f"the documentation inside Python {source['python_documentation']} ({size})",
            licence="PSF-2.0, Python's own",
        )
    if not repo:
        return Data(words=f"files of whoever prepared them ({size})")
    title, licence, words = LICENCES.get(repo, (repo, None, ASK))
    part = "".join(f", {source[key]}" for key in ("config",) if source.get(key))
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    link = f"[{title}](https://huggingface.co/datasets/{repo}){part}{revision} ({size})"
    return Data(words=link, repo=repo, licence=words)


def validation_at(run: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation up to a step."""
    found = next((r for r in reversed(read_metrics(run, "val")) if r.get("step", step + 1) <= step), None)
    return found if found and {"cross_entropy", "spatial_loss", "moran"} <= found.keys() else None


def read_evaluations(run: Path) -> list[tuple[str, str, str]]:
    """Numbers of out/RUN/evals/*.json, of its summary where it has one: (analysis, measure, value)."""
    rows = []
    for path in sorted((run / "evals").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        shown = content.get("summary", content) if isinstance(content, dict) else {}
        rows += [(path.stem, key, f"{number:.4g}") for key, number in numbers(shown)]
    return rows


def numbers(content: Any, prefix: str = "", depth: int = 2) -> list[tuple[str, float]]:
    """Numbers of a nested mapping with their dotted names, not deeper than `depth` levels."""
    if isinstance(content, bool) or not isinstance(content, dict | int | float):
        return []
    if not isinstance(content, dict):
        return [(prefix, content)]
    if not depth:
        return []
    below = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in content.items()]
    return [pair for key, value in below for pair in numbers(value, key, depth - 1)]


def picture_of(run: Path, step: int) -> Path | None:
    """The picture of the sheets at the exported step, else the one before and after training."""
    for path in (run / "maps" / f"step-{step:06d}.png", run / "maps" / "before-and-after.png"):
        if path.is_file():
            return path
    return None


def perplexity(cross_entropy: float) -> float:
    return math.exp(min(cross_entropy, 700.0))
