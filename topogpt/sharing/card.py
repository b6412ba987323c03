"""The model card of an exported run, made from what the run recorded: README.md of the folder and the Hub."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from topogpt import topo
from topogpt.files import read_json
from topogpt.model import connectome
from topogpt.runs.folder import read_metrics
from topogpt.settings import N_VOCAB
from topogpt.spatial.schedule import losses_in_words
from topogpt.topo import N_MAPS, noise_floor

if TYPE_CHECKING:
    from topogpt.runs.checkpoint import LoadedRun

# What is known about data sets: name on the Hub -> title, licence (the Hub's name for it), licence in words.
LICENCES = {
    "HuggingFaceFW/fineweb-edu": ("FineWeb-Edu", "odc-by", "ODC-By 1.0"),
    "HuggingFaceFW/fineweb": ("FineWeb", "odc-by", "ODC-By 1.0"),
}
SAID = {"started", "git_sha", "git_diff", "python", "packages", "device", "world_size", "data_sha256"}
ASK = "not recorded with the run; ask whoever trained it"


class Data(NamedTuple):
    """What a run was trained on, as far as its manifest says."""

    words: str  # a sentence for the card
    repo: str | None = None  # data set of the Hub
    licence: str = ASK


def write(run: Path, loaded: "LoadedRun", repo_id: str | None, dtype: str, has_picture: bool) -> str:
    """Text of README.md for a checkpoint, from card.md.jinja."""
    import jinja2

    from topogpt.sharing import stock

    state, kind = loaded.state, stock.of_model(loaded.model.cfg)
    cfg, step = state["config"], state["train_state"]["step"]
    model, compressed = loaded.model.cfg, state.get("compressed")
    value, evaluations = (None, []) if compressed else (validation_at(run, step), read_evaluations(run))
    data = data_of(cfg, state.get("data", {}))
    name = repo_id.rpartition("/")[2] if repo_id else cfg["run_name"]
    h, w = topo.grid_of(next(iter(loaded.positions.values())))
    layer = model.n_layer // 2  # which the card's code looks at
    *_, sheet = (name for name in loaded.positions if name.startswith((topo.ONE_SHEET, f"layer.{layer}.")))
    n_vocab = model.n_vocab
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    words = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    return words.get_template("card.md.jinja").render(
        front_matter=front_matter(name, data, value, kind.MODEL_TYPE), name=name,
        kind=kind, places=kind.PLACES, repo_id=repo_id, has_picture=has_picture,
        cfg=cfg, model=model, sheets=cfg["topo"], losses=losses_in_words(cfg["topo"]), h=h, w=w,
        n_sheets=len(loaded.positions), layout=topo.layout_of(loaded.positions, model.n_layer),
        layer=layer, sheet=sheet,
        gpt2_words=model.vocab_size >= N_VOCAB, N_VOCAB=N_VOCAB, dtype=dtype,
        n_parameters=loaded.model.n_parameters(), data=data, step=step,
        tokens=step * cfg["batch_size"] * model.block_size,
        value=value, evaluations=evaluations, compressed=compressed, n_vocab=n_vocab, blind=math.log(n_vocab),
        perplexity=perplexity(value["cross_entropy"]) if value else None,
        floor=floor_of_mean(h, w, model.block_size, len(loaded.positions)),
        starts=read_starts(run), thousands="{:,}".format, wiring=wiring_of(run),
    )  # fmt: skip


def wiring_of(run: Path) -> dict[str, Any] | None:
    """The record of the connectome that the run was trained under, if any."""
    return read_json(run / connectome.RECORD) if (run / connectome.RECORD).is_file() else None


def floor_of_mean(h: int, w: int, n_tokens: int, n_sheets: int) -> tuple[float, float]:
    """Mean of white noise's Moran's I, and the spread of a mean over as many maps as an evaluation takes."""
    floor, sd = noise_floor(h, w)
    return floor, sd / math.sqrt(n_sheets * min(N_MAPS, n_tokens))


def front_matter(name: str, data: Data, value: dict[str, Any] | None, model_type: str) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if value:
        title = LICENCES.get(data.repo or "", ("validation text of the run",))[0]
        text = {"dataset_type": data.repo or "unknown", "dataset_name": title, "dataset_split": "validation"}
        text |= {"task_type": "text-generation"}
        results = [
            EvalResult(metric_type=kind, metric_name=words, metric_value=round(number, 4), **text)
            for kind, words, number in (
                ("cross_entropy", "cross-entropy (nats per token)", value["cross_entropy"]),
                ("perplexity", "perplexity per token", perplexity(value["cross_entropy"])),
            )
            if math.isfinite(number)
        ]
    said = {"language": "en" if data.repo in LICENCES else None, "license": "unknown"}
    said |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    said |= {"tags": [model_type, "topography", "cortex", "topogpt"]}
    said |= {"datasets": [data.repo] if data.repo else None}
    said |= {"model_name": name, "eval_results": results} if results else {}
    return ModelCardData(**said).to_yaml()


def read_starts(run: Path) -> list[dict[str, Any]]:
    """provenance.json, a list of the run's starts; empty where it is missing or lacks what the card says."""
    try:
        starts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        return starts if all(SAID <= start.keys() for start in starts) else []
    except (OSError, ValueError, TypeError, AttributeError):
        return []


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
    part = f", {source['config']}" if source.get("config") else ""
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
        content = read_json(path)
        summary = content.get("summary", content)
        beside = {key: said for key, said in summary.items() if isinstance(said, dict) and "value" in said}
        rows += [(path.stem, key, beside_nulls(said)) for key, said in beside.items()]
        others = {key: said for key, said in summary.items() if key not in beside}
        rows += [(path.stem, key, f"{number:.4g}") for key, number in numbers(others)]
    return rows


def beside_nulls(said: dict[str, float]) -> str:
    """A value of a summary, and what it is compared with: 0.78 (item labels shuffled 0.778, p 0.43)."""
    nulls = ", ".join(f"{name} {number:.3g}" for name, number in said.items() if name != "value")
    return f"{said['value']:.4g} ({nulls})"


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
