"""What is lost when a run's MLPs are made smaller: losses, sizes and speed of every method at every share.

found = measure(cfg)        # a CompressConfig; found.models[0] of the run, [1] of its control
save(cfg, found)            # RUN/compress.json, and compress.png where matplotlib is there
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from topogpt.distributed import pick_device
from topogpt.errors import UserError
from topogpt.files import sha256, write_json
from topogpt.model import compress
from topogpt.model.gpt import GPT
from topogpt.runs import provenance
from topogpt.runs.checkpoint import LoadedRun, load_run
from topogpt.settings import COMPRESSIONS, CompressConfig
from topogpt.spatial.layout import laid_out
from topogpt.terminal import progress
from topogpt.text.loader import Corpus, MicroBatch, Share, fixed_batches, open_corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "topogpt-compress-1"
ENCODING = (
    "float32 values (small sheets, or kept units' rows and columns); l1: and a bit for each weight of c_fc"
)
SAME_SHAPE = ("n_layer", "n_embd", "n_hidden", "vocab_size", "bias")
ROUNDS, TIMED_TOKENS = 3, 512  # of measuring tokens/s
# Okabe and Ito's
COLOURS = dict(zip(COMPRESSIONS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))


class Row(NamedTuple):
    """One compressed model; `method` none is the model as it was."""

    method: str
    keep: float
    n_parameters: int
    loss: float  # cross-entropy, nats per token
    increase: float  # over the model as it was
    tokens_per_s: float | None  # of a forward pass; None where the model is not really smaller
    n_bytes: int  # what storing it takes


class Found(NamedTuple):
    """Of one run."""

    label: str
    run: LoadedRun
    rows: list[Row]  # the first is of the model as it was
    narrow: GPT | None  # of `units` at the first share


class Data(NamedTuple):
    val: Corpus
    fit: Corpus | None  # where something is fitted


class Measured(NamedTuple):
    models: list[Found]  # of the run, and of its control
    data_sha256: dict[str, str]  # what stands for the tokens of each corpus


def measure(cfg: CompressConfig) -> Measured:
    """Compress the run, and its control, in every way asked for."""
    device = pick_device(cfg.device)
    runs = [load_run(Path(name), cfg.checkpoint, device) for name in (cfg.run, cfg.control) if name]
    check(cfg, runs)
    data = open_data(cfg, runs[0])
    hashes = {name: corpus.fingerprint for name, corpus in data._asdict().items() if corpus is not None}
    return Measured([measure_one(cfg, run, data) for run in runs], hashes)


def check(cfg: CompressConfig, runs: Sequence[LoadedRun]) -> None:
    """What would fail later, before anything takes time."""
    model = runs[0].model.cfg
    if "downsample" in cfg.method:
        for keep in cfg.keep:
            compress.downsampled_shape(model.n_hidden, keep)
    for key in SAME_SHAPE:
        first, *others = (getattr(run.model.cfg, key) for run in runs)
        if others and others[0] != first:
            raise UserError(
                f"control = {cfg.control} has {key} {others[0]}, but {cfg.run} has {first}; give a control "
                "of the same shape"
            )


def open_data(cfg: CompressConfig, run: LoadedRun) -> Data:
    """The run's own validation and training shards, or those given."""

    def corpus(key: str, given: tuple[str, ...]) -> Corpus:
        model, settings = run.model.cfg, run.state["config"]
        try:
            found = open_corpus(
                given or settings[key],
                key=key if given else f"{key} of the run",
                vocab_size=model.vocab_size,
                log=lambda line: None,
            )
            found.n_windows(model.block_size)
        except UserError as error:
            raise UserError(f"{error}; or give other shards: --{key}") from None
        return found

    fit = corpus("train_data_dir", cfg.train_data_dir) if "units" in cfg.method else None
    return Data(corpus("val_data_dir", cfg.val_data_dir), fit)


def measure_one(cfg: CompressConfig, run: LoadedRun, data: Data) -> Found:
    model, label = run.model, run.state["config"]["run_name"]
    loss = cross_entropy(model, data.val, cfg.n_tokens)
    if not math.isfinite(loss):
        raise UserError(f"the loss of {label} is {loss} before it is compressed; choose another --checkpoint")
    rows = [Row("none", 1.0, model.n_parameters(), loss, 0.0, None, 4 * model.n_parameters())]
    choices = fit(cfg, model, data) if "units" in cfg.method else []
    narrow: list[GPT] = []
    todo = [(method, keep) for method in cfg.method for keep in cfg.keep]
    for method, keep in progress(todo, f"compressing {label}"):
        if method == "units":
            small = compress.units(model, keep, choices)
            narrow.append(small.model)
        else:
            small = getattr(compress, method)(model, keep)
        after = cross_entropy(small.model, data.val, cfg.n_tokens)
        n_bytes = 4 * small.n_parameters + -(-small.n_index_bits // 8)
        rows.append(Row(method, keep, small.n_parameters, after, after - loss, None, n_bytes))
    if narrow:
        speeds = iter(tokens_per_s([model, *narrow], data.val))
        rows = [r._replace(tokens_per_s=next(speeds)) if r.method in ("none", "units") else r for r in rows]
    return Found(label, run, rows, narrow[0] if narrow else None)


def fit(cfg: CompressConfig, model: GPT, data: Data) -> list[compress.Choice]:
    """What `units` takes, gathered on training text."""
    products = compress.HiddenProducts(model.cfg.n_layer, model.cfg.n_hidden, model.device)
    with torch.inference_mode(), compress.watched(model, products):
        for batch in batches(model, data.fit, cfg.fit_tokens):
            model(batch.tokens, last_only=True)
    return compress.choose(model, products, max(cfg.keep), cfg.choose)


def batches(model: GPT, corpus: Corpus, n_tokens: int) -> Iterator[MicroBatch]:
    length = model.cfg.block_size
    return fixed_batches(
        corpus,
        n_tokens=n_tokens,
        block_size=length,
        per_device_batch_size=max(1, 2048 // length),
        ranks=Share(device=model.device),
    )


def cross_entropy(model: GPT, corpus: Corpus, n_tokens: int) -> float:
    """Nats per token over the first n_tokens, in the windows that validation in training has, too."""
    total, n = 0.0, 0
    with torch.inference_mode():
        for batch in batches(model, corpus, n_tokens):
            loss = model(batch.tokens, batch.targets, keep_logits=False).loss
            total, n = total + loss.item() * batch.tokens.numel(), n + batch.tokens.numel()
    return total / n


def tokens_per_s(models: Sequence[GPT], corpus: Corpus) -> list[float]:
    """Of a forward pass with logits: the best of rounds in which the models take turns."""
    length = min(TIMED_TOKENS, models[0].cfg.block_size)
    text = torch.from_numpy(corpus.window(0, length).astype("int64"))
    tokens = text.repeat(max(1, TIMED_TOKENS // length), 1).to(models[0].device)
    best = [math.inf] * len(models)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for i, model in enumerate(models):
                wait(tokens.device)
                t0 = time.perf_counter()
                model(tokens)
                wait(tokens.device)
                best[i] = min(best[i], time.perf_counter() - t0)
    return [tokens.numel() / dt for dt in best]


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---- what is left ----------------------------------------------------------------------------------------


def blind(found: Found) -> float:
    """Loss of a guess that knows nothing: as likely one token as another."""
    return math.log(found.run.model.cfg.n_vocab)


def save(cfg: CompressConfig, measured: Measured) -> list[Path]:
    """Write RUN/compress.json, and compress.png where matplotlib is there; return what was written."""
    found = measured.models
    content = {
        "format": FORMAT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "protocol": asdict(cfg) | {"encoding": ENCODING, "ridge": compress.RIDGE},
        "data_sha256": measured.data_sha256,
        "code": provenance.code(),
        "device": str(found[0].run.model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "blind_guess": blind(found[0]),
        "models": [
            {
                "label": f.label,
                "checkpoint": f.run.folder.name,
                "weights_sha256": sha256(f.run.folder / "model.safetensors"),
                "spatial_loss": f.run.state["config"]["topo"]["loss"],
                "rows": [row._asdict() for row in f.rows],
            }
            for f in found
        ],
    }
    written = [Path(cfg.run) / "compress.json"]
    write_json(written[0], content)
    try:
        figure = draw(found)
    except ModuleNotFoundError:
        return written
    written.append(Path(cfg.run) / "compress.png")
    from topogpt import drawing

    drawing.save(figure, written[1])
    return written


def draw(found: Sequence[Found]) -> "Figure":
    """Loss against the share that is kept."""
    from topogpt.drawing import new_figure

    figure = new_figure(4.6, 3.2)
    axis = figure.subplots()
    for f, line in zip(found, ("o-", "s--"), strict=False):
        for method in dict.fromkeys(row.method for row in f.rows[1:]):
            points = sorted((100 * row.keep, row.loss) for row in f.rows if row.method in (method, "none"))
            shares, losses = zip(*points, strict=True)
            name = f"{method}, {f.label}" if len(found) > 1 else method
            axis.plot(shares, losses, line, color=COLOURS[method], ms=3.5, lw=1, label=name)
        axis.axhline(f.rows[0].loss, color="0.3", lw=0.8, ls=line[1:])
    axis.set_ylim(axis.get_ylim())  # the losses decide, as a blind guess may be far away
    guess = blind(found[0])
    axis.axhline(guess, color="0.6", lw=0.8, ls=":", label=f"a blind guess ({guess:.2f})")
    axis.set(xlabel="kept (%)", ylabel="validation loss (nats per token)")
    axis.set_title(f"{found[0].label}: MLPs made smaller", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6.5, frameon=False)
    return figure


def narrower_run(cfg: CompressConfig, found: Found) -> LoadedRun:
    """The model of `units` at the first share, as export takes it, with what was measured.

    The units of c_fc that are kept fill no sheet, so such a run goes on with the sheets of its branches.
    """
    assert found.narrow is not None
    keep = cfg.keep[0]
    row = next(row for row in found.rows if (row.method, row.keep) == ("units", keep))
    facts = {
        "keep": keep,
        "n_hidden": found.narrow.cfg.n_hidden,
        "n_hidden_before": found.run.model.cfg.n_hidden,
        "cross_entropy": row.loss,
        "cross_entropy_before": found.rows[0].loss,
        "n_tokens": cfg.n_tokens,
        "fit_tokens": cfg.fit_tokens,
    }
    config = found.run.state["config"] | {"model": asdict(found.narrow.cfg)}
    positions, narrow = found.run.positions, found.narrow.cfg
    if config["topo"].get("layout") == "c_fc":  # these sheets have holes now
        config["topo"] = config["topo"] | {"layout": "per_branch", "positions": "identity"}
        positions = laid_out(narrow, "per_branch", "identity")
    state = found.run.state | {"config": config, "compressed": facts}
    return LoadedRun(found.narrow.to("cpu").eval(), positions, state, found.run.folder)
