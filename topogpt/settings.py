"""Every setting of every script: its name, default and meaning; without a default it is given by place."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from topogpt import topo
from topogpt.errors import UserError, check_at_least

OBJECTIVES = ("topolm", "toponets", "neighbour", "wiring")  # spatial losses: a file of topogpt/spatial each
COMPRESSIONS = ("downsample", "every_nth", "units", "l1")  # methods of model/compress.py
MODEL_SIZES = ("n_layer", "n_head", "n_embd", "n_inner", "block_size", "vocab_size")
N_VOCAB = 50257  # GPT-2's tokens; an embedding has more rows, as padding


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model; the defaults are TopoLM's."""

    n_layer: int = 12  # transformer blocks
    n_head: int = 16  # attention heads per block; must divide n_embd
    n_embd: int = 784  # width: units per sheet (784 = 28x28)
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 tokens, padded to a multiple of 64
    dropout: float = 0.0  # on embeddings, attention and both branches
    bias: bool = False  # biases in linear layers and norms; GPT-2 has them, TopoLM has none
    gelu: Literal["exact", "tanh"] = "exact"  # GPT-2 has the tanh approximation, TopoLM the exact one
    post_residual: bool = False  # sheets show a branch's output after the residual addition, not before
    n_inner: int | None = None  # hidden units of each MLP; None: 4 * n_embd
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm has no parameters
    position: Literal["learned", "rope"] = "learned"  # of a token: an embedding, or rotated queries and keys
    tied: bool = True  # the output head is the token embedding, and no matrix of its own
    scale_attention: bool = False  # attention writes 1 / sqrt(2 * n_layer) of itself into the stream

    def __post_init__(self) -> None:
        sizes = [name for name in MODEL_SIZES if getattr(self, name) is not None]
        for name in sizes:
            check_at_least(f"model.{name}", getattr(self, name), 1)
        rows = self.vocab_size + self.block_size + self.n_layer * (4 * self.n_embd + 2 * self.n_hidden)
        if rows * self.n_embd > 10**12 or self.n_layer > 10_000:  # a trillion weights
            made = ", ".join(f"{name} = {getattr(self, name)}" for name in sizes)
            raise UserError(f"model: {made} make a model that no machine holds; choose smaller ones")
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_head))
            raise UserError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"try --model.n_head {nearest}"
            )
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise UserError(
                f"model.position = rope turns pairs of a head's units, and model.n_embd = {self.n_embd} with "
                f"model.n_head = {self.n_head} gives each {self.n_embd // self.n_head}; choose an even number"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout = {self.dropout} must be at least 0 and below 1")

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding that are real tokens: GPT-2's, or all of a smaller one."""
        return min(self.vocab_size, N_VOCAB)

    @property
    def n_hidden(self) -> int:
        """Hidden units of each MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


@dataclass(frozen=True, kw_only=True)
class TopoConfig:
    """The sheets and the spatial loss on them."""

    loss: str = "topolm"  # topolm, toponets, neighbour, wiring; several joined by +; none = the control
    weight: float = 2.5  # of topolm's loss, summed over sheets
    tau: float = 1.0  # of toponets' loss, the mean over layers
    neighbour_weight: float = 1.0  # of neighbour's loss, the mean over layers
    wiring_weight: float = 1.0  # of wiring's loss, the mean over layers
    weight_schedule: Literal["constant", "linear", "cosine", "chained"] = "constant"  # share of all weights
    weight_warmup_steps: int = 0  # of linear and chained (from 0 up); cosine, and chained then, go to 0
    modules: tuple[str, ...] = ("*.mlp.c_fc",)  # whose weights toponets, neighbour and wiring look at
    factor_h: float = 8.0  # toponets compares a sheet with itself, this many times lower and back
    factor_w: float = 8.0  # the same for its width
    layout: topo.Layout = "per_branch"  # sheets: of each branch, of each c_fc, or one for all branches
    positions: Literal["permuted", "identity"] = "permuted"  # at random, fixed, per sheet; or in order
    seed: int = 0  # of the positions
    radius: int = 5  # a neighbourhood is the units at linf distance < radius of a centre (5: 9x9 units)
    neighbourhoods: int = 5  # random neighbourhoods per sheet and micro-batch; 0 = all of them
    distance: Literal["l2", "l1", "linf"] = "l2"  # between units, inside a neighbourhood

    def __post_init__(self) -> None:
        for name in self.objectives:
            if name not in OBJECTIVES or self.objectives.count(name) > 1:
                names = ", ".join(("none", *OBJECTIVES))
                raise UserError(
                    f"topo.loss = {self.loss} is no spatial loss of ours; give one of {names}, or several of "
                    "them, each once, joined by +"
                )
        counts = ("weight_warmup_steps", "neighbourhoods")
        for name in ("weight", "tau", "neighbour_weight", "wiring_weight", *counts):
            check_at_least(f"topo.{name}", getattr(self, name), 0)
        for name in ("factor_h", "factor_w"):
            check_at_least(f"topo.{name}", getattr(self, name), 1)
        if not self.modules:
            raise UserError("topo.modules is empty; name modules, such as --topo.modules '*.mlp.c_fc'")
        of_weights = [name for name in self.objectives if name != "topolm"]
        if self.layout == "c_fc" and self.positions == "permuted" and of_weights:
            raise UserError(
                f"topo.loss = {self.loss}: {of_weights[0]} takes the units of c_fc to lie row by row, and "
                "topo.positions = permuted would show them elsewhere; give --topo.positions identity"
            )
        check_at_least("topo.radius", self.radius, 2)
        warms_up = self.weight_schedule in ("linear", "chained")
        if self.weight_warmup_steps and not warms_up:
            raise UserError(
                f"topo.weight_warmup_steps = {self.weight_warmup_steps} has no effect with "
                f"topo.weight_schedule = {self.weight_schedule}; use --topo.weight_schedule linear"
            )
        if warms_up and not self.weight_warmup_steps:
            raise UserError(f"topo.weight_schedule = {self.weight_schedule} needs --topo.weight_warmup_steps")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the losses that are trained; none of them in a control."""
        return () if self.loss == "none" else tuple(self.loss.split("+"))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule; the defaults are TopoLM's."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: of the blocks' matrices; AdamW of all others
    muon_lr: float | None = None  # peak learning rate of Muon's matrices; None: lr
    muon_momentum: float = 0.95  # of Muon
    schedule: Literal["cosine", "trapezoid"] = "cosine"  # after the warm-up; trapezoid: hold, then go down
    warmdown_steps: int = 0  # of trapezoid: linear from lr to min_lr at decay_steps
    lr: float = 6e-4  # peak learning rate
    min_lr: float = 6e-5  # learning rate from decay_steps on
    warmup_steps: int = 2000  # linear warm-up
    decay_steps: int | None = 600_000  # the schedule reaches min_lr here; None = at max_steps
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # on matrices and embeddings, not on norms
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"):
            check_at_least(f"optim.{name}", getattr(self, name), 0)
        if self.decay_steps is not None:
            check_at_least("optim.decay_steps", self.decay_steps, 1)
            if self.decay_steps < self.warmup_steps:
                raise UserError(
                    f"optim.decay_steps = {self.decay_steps} is below optim.warmup_steps = "
                    f"{self.warmup_steps}; the cosine lies between them"
                )
            if self.warmdown_steps > self.decay_steps - self.warmup_steps:
                raise UserError(
                    f"optim.warmdown_steps = {self.warmdown_steps} are more than lie between warmup_steps = "
                    f"{self.warmup_steps} and decay_steps = {self.decay_steps}; give fewer"
                )
        check_at_least("optim.warmdown_steps", self.warmdown_steps, 0)
        if (self.schedule == "trapezoid") != (self.warmdown_steps > 0):
            raise UserError(
                f"optim.schedule = {self.schedule} with optim.warmdown_steps = {self.warmdown_steps}: "
                "trapezoid goes down in that many steps, cosine in none; give --optim.schedule trapezoid and "
                "--optim.warmdown_steps N, or neither"
            )
        if self.name != "muon" and (self.muon_lr, self.muon_momentum) != (None, OptimConfig.muon_momentum):
            raise UserError("optim.muon_lr and muon_momentum have no effect without --optim.name muon")
        if self.muon_lr is not None and not 0 < self.muon_lr < float("inf"):
            raise UserError(f"optim.muon_lr = {self.muon_lr} must be above 0")
        if self.muon_lr is not None and self.lr == 0:
            raise UserError("optim.lr = 0 gives optim.muon_lr, a share of it, no schedule; give both")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} = {getattr(self, name)} must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise UserError(f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}; give a smaller one")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run goes, whatever it trains: what train.py and finetune.py share."""

    run_name: str = ""  # name of the run; its folder is out_dir/run_name
    per_device_batch_size: int = 48  # sequences per GPU and micro-step: lower it when memory runs out
    batch_size: int = 960  # sequences per optimiser step, over all GPUs and micro-steps
    max_steps: int = 600_000  # optimiser steps
    push_to_hf: bool = False  # at the end export the best checkpoint and push it to the Hub, as run_name
    push_every: int = 0  # with push_to_hf: push the best so far after every so many evaluations, too
    wandb: bool = False  # copy the metrics to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "topogpt"  # its project

    resume: bool = False  # continue the run from its last checkpoint
    checkpoint: str | None = None  # with resume: from best, last or step-N; None: the newest whole one
    overwrite: bool = False  # delete the run of this name, if there is one, and start afresh
    out_dir: str = "out"  # where run folders lie
    seed: int = 1337  # of initialisation, data order, dropout and neighbourhoods

    eval_every: int = 250  # steps between evaluations: validation losses, Moran's I, picture of the sheets
    val_tokens: int = 4_915_200  # validation tokens, always the same first ones
    patience: int = 3  # stop after this many increases of validation cross-entropy in a row; 0 = never
    log_every: int = 10  # steps between lines in metrics.jsonl
    save_every: int = 500  # steps between checkpoints; besides, the best and the final one are saved
    keep_last: int = 2  # newest checkpoints to keep, besides the best
    max_skipped: int = 10  # stop after this many steps in a row skipped for a non-finite gradient

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matrix products; auto: bfloat16 on CUDA
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA
    deterministic: bool = False  # deterministic CUDA kernels, slower: resuming is then exact on CUDA too

    lora_rank: int = 0  # train adapters of this rank in frozen layers (LoRA; takes peft); 0: every weight
    lora_alpha: float = 32.0  # an adapter adds alpha / rank * B A to its layer's weights
    lora_modules: tuple[str, ...] = ("*.attn.*", "*.mlp.*")  # patterns of the layers that get adapters

    def __post_init__(self) -> None:
        name = self.run_name
        if Path(name).name != name or name[:1] == "." or not name.isprintable() or len(name) > 200:
            raise UserError(f"run_name = {name} must be a plain name; the folder above it is --out_dir")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other; give one of them")
        for name in ("per_device_batch_size", "batch_size", "max_steps", "eval_every", "log_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("push_every", "patience", "lora_rank"):
            check_at_least(name, getattr(self, name), 0)
        if self.push_every and not self.push_to_hf:
            raise UserError(f"push_every = {self.push_every} has no effect without --push_to_hf")
        for name in ("save_every", "val_tokens", "keep_last", "max_skipped"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 < self.lora_alpha < float("inf"):
            raise UserError(f"lora_alpha = {self.lora_alpha} must be a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Train a GPT whose units lie on a sheet: train.py [config.yaml] --run_name NAME [--flag value ...]."""

    train_data_dir: tuple[str, ...] = ("data/fineweb-edu-10B/train",)  # token shards: folder, glob or paths
    val_data_dir: tuple[str, ...] = ("data/fineweb-edu-10B/val",)  # the same, for validation
    init_from: str | None = None  # start from these weights: a run, an exported folder, GPT-2 on the Hub
    connectome: str | None = None  # train only the weights that train_itp.py left, in out/NAME
    inherit: Literal["signs", "random", "dense", "rewind"] = "signs"  # signs: 0.02; random, dense: controls
    model: GPTConfig = field(default_factory=GPTConfig)
    topo: TopoConfig = field(default_factory=TopoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if not self.run_name:
            raise UserError("run_name is missing; add --run_name NAME")
        super().__post_init__()
        if self.lora_rank and self.init_from is None:
            raise UserError(f"lora_rank = {self.lora_rank} has no weights to adapt; add --init_from RUN")
        if self.init_from and self.connectome:
            raise UserError("init_from and connectome both say how the weights start; give one of them")
        if self.inherit != "signs" and not self.connectome and type(self) is TrainConfig:
            raise UserError(f"inherit = {self.inherit} has nothing to inherit; add --connectome out/NAME")
        self.check_sheet()

    @property
    def sheet_shape(self) -> tuple[int, int]:
        """Height and width of a sheet."""
        m = self.model
        return topo.sheet_shape(self.topo.layout, m.n_layer, m.n_embd, m.n_hidden)

    def check_sheet(self) -> None:
        side, (h, w) = 2 * self.topo.radius - 1, self.sheet_shape
        key = "n_inner" if self.topo.layout == "c_fc" and self.model.n_inner is not None else "n_embd"
        units = getattr(self.model, key)
        if min(h, w) < 3:
            square = max(3, round(units**0.5)) ** 2
            raise UserError(
                f"model.{key} = {units} makes a sheet of {h}x{w} units, too narrow for a "
                f"neighbourhood; choose one that is more nearly a square, such as --model.{key} {square}"
            )
        if side > min(h, w):
            raise UserError(
                f"topo.radius = {self.topo.radius} is too large for the sheet: {side}x{side} units do not "
                f"fit the {h}x{w} of model.{key} = {units}; try --topo.radius {(min(h, w) + 1) // 2}"
            )


@dataclass(frozen=True, kw_only=True)
class ItpConfig(TrainConfig):
    """Grow a connectome by pruning again and again: train_itp.py [config.yaml] --run_name NAME [...]."""

    generations: int = 6  # trainings, each followed by a pruning
    prune: float = 0.2  # share of the remaining weights that each pruning cuts: the smallest
    per: Literal["matrix", "global"] = "matrix"  # the smallest of each matrix, or of all of them together
    exempt: tuple[str, ...] = ()  # patterns of matrices that are never pruned, such as transformer.wte.weight
    inherit: Literal["signs", "rewind"] = "signs"  # the next starts with 0.02 * sign, or as the first did

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("generations", self.generations, 1)
        if not 0 < self.prune < 1:
            raise UserError(f"prune = {self.prune} must be above 0 and below 1: the share cut each time")
        for name, remedy in (
            ("connectome", "train_itp.py makes one"),
            ("lora_rank", "adapters are not pruned"),
            ("checkpoint", "a generation continues from its newest one"),
            ("push_to_hf", "push a generation with export.py out/NAME/generation-N --push_to_hf USER/NAME"),
        ):
            if getattr(self, name):
                raise UserError(f"{name} has no place here: {remedy}; leave it out")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """Train a finished model on other text, all of it or adapters: finetune.py RUN --data mine.jsonl."""

    run: str  # a run (out/NAME), an exported folder, or USER/NAME on the Hub
    data: tuple[str, ...] = ()  # files, folders, globs (parquet, jsonl, txt), pydoc; or prepared folders
    run_name: str = ""  # name of the new run; default: that of the model with -full or -lora and the rank
    keep_topography: bool = False  # train the spatial loss of the model's own training, too
    topo: TopoConfig = field(default_factory=lambda: TopoConfig(loss="none"))  # else given: the model's
    block_size: int | None = None  # context length in tokens; None: the model's
    lr: float | None = None  # peak learning rate; a cosine ends at a tenth. None: 1e-4, with LoRA 1e-3
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.0  # it would draw the weights to 0, and not to those of the model
    per_device_batch_size: int = 8  # sequences per GPU and micro-step: lower it when memory runs out
    batch_size: int = 16  # sequences per optimiser step, over all GPUs and micro-steps
    max_steps: int = 500  # optimiser steps
    eval_every: int = 50  # steps between evaluations; the first is of the model as it was
    val_tokens: int = 65_536  # validation tokens, always the same first ones
    data_dir: str = "data"  # text is prepared in a folder of this one, once, whatever runs use it
    text_column: str = "text"  # column or JSON key of the text
    val_fraction: float = 0.05  # share of the documents of new text that validate
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data is missing; add --data FILE, a folder of text, or one of prepared shards")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CostConfig(TrainConfig):
    """Say what a config of train.py costs: model.py [config.yaml] [--flag value ...]."""

    run_name: str = "model"  # plays no part here


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise text into shards that train.py reads; without --source or --dataset: FineWeb-Edu sample-10BT.

    A row of parquet or jsonl is a document; so is a .txt file, which is cut at blank lines every 8 MB. Which
    documents are in val is decided by a hash of their id (of the text, where there is none), so neither their
    order nor the number of workers or ranks matters. `--source pydoc` is Python's own documentation. Under
    torchrun or srun the ranks divide the work. A run that was interrupted continues with the same command.
    """

    out_dir: str = "data/fineweb-edu-10B"  # gets train/*.bin, val/*.bin, manifest.json; give one per source
    source: tuple[str, ...] = ()  # files, folders, globs (parquet; jsonl, txt, also .gz, .zst) or pydoc
    dataset: str | None = None  # a dataset of the Hub, streamed through the package `datasets`
    config: str | None = None  # its configuration; without --dataset: FineWeb-Edu's sample (sample-10BT)
    split: str = "train"  # its split
    revision: str = "main"  # of the Hub dataset; resolved to a commit, which is recorded and kept
    text_column: str = "text"  # column or JSON key of the text
    max_tokens: int | None = None  # stop after the document with which train + val reach this
    shard_size: int = 100_000_000  # tokens in a shard; the last one is shorter
    val_fraction: float | None = None  # share in val; default: 0.0005, files of --source 0.01, pydoc 0.05
    num_proc: int | None = None  # worker processes; default: one per core
    skip_broken: bool = False  # count lines of jsonl that are no JSON and go on, instead of ending there
    delete_source: bool = False  # delete each downloaded file once tokenised (never the files of --source)
    vocab_dir: str | None = None  # holds vocab.bpe and encoder.json; default: our cache, then download

    def __post_init__(self) -> None:
        for key in ("max_tokens", "shard_size", "num_proc"):
            if getattr(self, key) is not None:
                check_at_least(key, getattr(self, key), 1)
        if self.shard_size >= 2**31:
            raise UserError(f"shard_size = {self.shard_size} does not fit a header; it must be below 2**31")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction} must be at least 0 and below 1")
        if self.source and self.dataset:
            raise UserError("source and dataset exclude each other; give one of them")
        if "pydoc" in self.source and len(self.source) > 1:
            raise UserError("source = pydoc cannot be mixed with files; prepare them into two folders")
        if self.delete_source and (self.source or self.dataset):
            raise UserError("delete_source deletes downloaded files only, not those of --source, --dataset")
        unused = ["config", "revision"] if self.source else []
        unused += [] if self.dataset else ["split"]
        unused += ["text_column"] if self.source == ("pydoc",) or not (self.source or self.dataset) else []
        for key in unused:
            if getattr(self, key) != getattr(PrepareConfig, key):
                raise UserError(f"{key} = {getattr(self, key)} has no effect on this source; leave it out")


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Find or fetch GPT-2's vocabulary, and say where it lies: python -m topogpt.text.vocabulary."""

    vocab_dir: str | None = None  # holds vocab.bpe and encoder.json; default: our cache, then download


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text with a trained model: sample.py RUN [--prompt TEXT]."""

    run: str  # a run (out/NAME), an exported folder, or USER/NAME on the Hub
    prompt: str = ""  # text to continue; empty: a new document
    checkpoint: str = "best"  # of a run: best, last or step-N; on the Hub: the tag step-N
    n_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # length of each; it ends earlier where the model ends the document
    temperature: float = 0.8  # below 1: likelier words; 0: always the likeliest
    top_k: int | None = 200  # draw among the k likeliest tokens only
    top_p: float | None = None  # draw among the likeliest tokens that together reach this probability
    seed: int = 0  # of the draws
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("temperature", self.temperature, 0)
        if self.top_k is not None:
            check_at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Show what a run came to, and its map: topo.py RUN."""

    run: str  # a run (out/NAME), an exported folder, or USER/NAME on the Hub
    checkpoint: str = "best"  # of a run: best, last or step-N
    draw: bool = False  # draw the sheets of the first and this step side by side, too (takes matplotlib)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint as a folder for stock transformers: export.py RUN [--push_to_hf [USER/NAME]]."""

    run: str  # folder of a run (out/NAME); a connectome; or an exported folder, to push it
    checkpoint: str = "best"  # best, last or step-N
    out: str | None = None  # folder to write; None: RUN/hf
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the stored weights
    sparse: bool = False  # of a run trained under a connectome add masks and values: sparse.safetensors
    push_to_hf: str | None = None  # push to this repository of the Hub: USER/NAME; bare: YOU/(name of RUN)
    private: bool = False  # make a new repository private
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Make a trained model's MLPs smaller, and say what is lost: compress.py RUN [--keep F ...]."""

    run: str  # folder of a run (out/NAME)
    control: str | None = None  # its control: compressed the same way, and shown beside it
    checkpoint: str = "best"  # best, last or step-N
    keep: tuple[float, ...] = (0.8, 0.5, 0.2)  # shares of the MLPs' hidden units (l1: weights) to keep
    # how: resized sheets, every n-th unit, a narrower model that is fitted anew, the largest weights
    method: tuple[Literal["downsample", "every_nth", "units", "l1"], ...] = COMPRESSIONS
    choose: Literal["pivot", "spaced"] = "pivot"  # units kept by `units`: those that explain most, or spaced
    n_tokens: int = 2048  # validation tokens, the run's first ones
    fit_tokens: int = 8192  # training tokens that `units` fits on, the run's first ones
    val_data_dir: tuple[str, ...] = ()  # shards to validate on; none: the run's
    train_data_dir: tuple[str, ...] = ()  # shards to fit on; none: the run's
    out: str | None = None  # folder for the model of `units` at the first keep, for stock transformers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched

    def __post_init__(self) -> None:
        for name in ("n_tokens", "fit_tokens"):
            check_at_least(name, getattr(self, name), 1)
        for share in self.keep:
            if not 0 < share <= 1:
                raise UserError(f"keep = {share} must be above 0 and at most 1")
        for name in ("keep", "method"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name} = {list(given)} must be one or more, each once")
        if "units" not in self.method:
            for name, none in (("out", None), ("choose", "pivot"), ("train_data_dir", ())):
                if getattr(self, name) != none:
                    raise UserError(f"{name} = {getattr(self, name)} has no effect without --method units")
