"""Settings: every name, default and meaning, and how YAML and the command line become one frozen dataclass.

    cfg = parse(TrainConfig, sys.argv[1:])      # [file.yaml] [--flag value] [--topo.weight 2.5]
 The YAML file is flattened into arguments placed before the user's, so tyro types and checks both and the
command line wins. This module imports neither torch nor anything else of ours, so that `--help` and mistakes
answer at once.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import tyro
import yaml

import topo

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value and the remedy; exit code 2.

    No ValueError, as tyro would take those for its own.
    """


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

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_head))
            raise UserError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"try --model.n_head {nearest}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout = {self.dropout} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TopoConfig:
    """The sheets and the spatial loss on them."""

    loss: Literal["none", "topolm"] = "topolm"  # spatial loss added to the cross-entropy; none = the control
    weight: float = 2.5  # weight of the spatial loss, summed over sheets
    weight_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear: warm-up; cosine: to 0
    weight_warmup_steps: int = 0  # steps of the linear warm-up of the weight
    positions: Literal["permuted", "identity"] = "permuted"  # at random, fixed, per sheet; or in order
    seed: int = 0  # of the positions
    radius: int = 5  # a neighbourhood is the units at linf distance < radius of a centre (5: 9x9 units)
    neighbourhoods: int = 5  # random neighbourhoods per sheet and micro-batch; 0 = all of them
    distance: Literal["l2", "l1", "linf"] = "l2"  # between units, inside a neighbourhood

    def __post_init__(self) -> None:
        check_at_least("topo.weight", self.weight, 0)
        check_at_least("topo.weight_warmup_steps", self.weight_warmup_steps, 0)
        check_at_least("topo.radius", self.radius, 2)
        check_at_least("topo.neighbourhoods", self.neighbourhoods, 0)
        if self.weight_warmup_steps and self.weight_schedule != "linear":
            raise UserError(
                f"topo.weight_warmup_steps = {self.weight_warmup_steps} has no effect with "
                f"topo.weight_schedule = {self.weight_schedule}; use --topo.weight_schedule linear"
            )
        if self.weight_schedule == "linear" and not self.weight_warmup_steps:
            raise UserError("topo.weight_schedule = linear has no effect without --topo.weight_warmup_steps")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are TopoLM's."""

    lr: float = 6e-4  # peak learning rate
    min_lr: float = 6e-5  # learning rate from decay_steps on
    warmup_steps: int = 2000  # linear warm-up
    decay_steps: int | None = 600_000  # the cosine reaches min_lr here; None = at max_steps
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # on matrices and embeddings, not on norms
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping

    def __post_init__(self) -> None:
        check_at_least("optim.lr", self.lr, 0)
        check_at_least("optim.min_lr", self.min_lr, 0)
        check_at_least("optim.warmup_steps", self.warmup_steps, 0)
        if self.decay_steps is not None:
            check_at_least("optim.decay_steps", self.decay_steps, 1)
            if self.decay_steps < self.warmup_steps:
                raise UserError(
                    f"optim.decay_steps = {self.decay_steps} is below optim.warmup_steps = "
                    f"{self.warmup_steps}; the cosine lies between them"
                )
        check_at_least("optim.weight_decay", self.weight_decay, 0)
        check_at_least("optim.grad_clip", self.grad_clip, 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} = {getattr(self, name)} must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise UserError(
                f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}; give a smaller --optim.min_lr"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT whose units lie on a sheet: train.py [config.yaml] --run_name NAME [--flag value ...]."""

    run_name: str = ""  # name of the run; its folder is out_dir/run_name
    train_data_dir: tuple[str, ...] = ("data/fineweb-edu-10B/train",)  # token shards: folder, glob or paths
    val_data_dir: tuple[str, ...] = ("data/fineweb-edu-10B/val",)  # the same, for validation
    per_device_batch_size: int = 48  # sequences per GPU and micro-step: lower it when memory runs out
    batch_size: int = 960  # sequences per optimiser step, over all GPUs and micro-steps
    max_steps: int = 600_000  # optimiser steps
    wandb: bool = False  # copy the metrics to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "topogpt"  # its project

    resume: bool = False  # continue the run from its last checkpoint
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

    model: GPTConfig = field(default_factory=GPTConfig)
    topo: TopoConfig = field(default_factory=TopoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if not self.run_name:
            raise UserError("run_name is missing; add --run_name NAME")
        if Path(self.run_name).name != self.run_name or self.run_name.startswith("."):
            raise UserError(
                f"run_name = {self.run_name} must be a plain name; the folder above it is --out_dir"
            )
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other; give one of them")
        for name in (
            "per_device_batch_size",
            "batch_size",
            "max_steps",
            "eval_every",
            "log_every",
            "save_every",
        ):
            check_at_least(name, getattr(self, name), 1)
        for name in ("val_tokens", "keep_last", "max_skipped"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("patience", self.patience, 0)
        self.check_sheet()

    def check_sheet(self) -> None:
        side, (h, w) = 2 * self.topo.radius - 1, topo.grid_shape(self.model.n_embd)
        if min(h, w) < 3:
            square = max(3, round(self.model.n_embd**0.5)) ** 2
            raise UserError(
                f"model.n_embd = {self.model.n_embd} makes a sheet of {h}x{w} units, too narrow for a "
                f"neighbourhood; choose one that is more nearly a square, such as --model.n_embd {square}"
            )
        if side > min(h, w):
            raise UserError(
                f"topo.radius = {self.topo.radius} is too large for the sheet: {side}x{side} units do not "
                f"fit the {h}x{w} of model.n_embd = {self.model.n_embd}; try --topo.radius {(min(h, w) + 1) // 2}"
            )


def check_at_least(key: str, value: float, minimum: float) -> None:
    if not (math.isfinite(value) and value >= minimum):
        raise UserError(f"{key} = {value} must be a finite number of at least {minimum}")


# ---- YAML and command line -> dataclass ----------------------------------------------------------


def parse(cls: type[Config], argv: list[str], *, prog: str | None = None) -> Config:
    """Build `cls` from `[file.yaml] [--flag value ...]`; raise UserError on unknown keys and wrong values.

    A class with positional fields (tyro.conf.Positional) takes no file. Prints the help and exits with code 0
    where `--help` is among the arguments.
    """
    known = dict(flag_names(cls))
    positional = any(get_origin(f.type) is Annotated for f in known.values())
    groups: list[Given] = []
    if not positional and argv and not argv[0].startswith("-"):
        groups, argv = yaml_arguments(Path(argv[0]), known), argv[1:]
    for arg in argv:
        if is_flag(arg):
            check_known(arg.partition("=")[0].removeprefix("--"), known, where="command line")
            groups.append(Given("command line", [arg]))
        elif not positional and arg.endswith((".yaml", ".yml")) and Path(arg).is_file():
            raise UserError(f"command line: the config file {arg} must come first, before the flags")
        elif groups and groups[-1].where == "command line":
            groups[-1].arguments.append(arg)
        else:
            groups.append(Given("command line", [arg]))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            arguments = [a for group in groups for a in group.arguments]
            return tyro.cli(cls, args=arguments, prog=prog, use_underscores=True)
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            explain(cls, groups, known, ["-"] if positional else [])
            raise UserError(f"command line: {first_sentence(said.getvalue())}") from None


class Given(NamedTuple):
    """A flag with its values, and where it was given."""

    where: str
    arguments: list[str]


def is_flag(arg: str) -> bool:
    return arg.startswith("-") and arg != "-" and re.match(r"-(\.?\d|inf|nan)", arg) is None


def explain(cls: type, groups: list[Given], known: dict[str, dataclasses.Field], before: list[str]) -> None:
    """Raise a UserError for the first flag that tyro does not take on its own."""
    for where, arguments in groups:
        if not is_flag(arguments[0]):
            continue
        try:
            tyro.cli(cls, args=before + arguments, use_underscores=True, console_outputs=False)
        except UserError:
            pass  # its value is understood; what it clashes with is another matter
        except SystemExit:
            flag, _, value = arguments[0].partition("=")
            values = ([value] if value else []) + arguments[1:]
            name = flag.removeprefix("--").replace("-", "_")
            if name not in known or known[name].type is bool:
                name = name.replace("no_", "")
                raise UserError(
                    f"{where}: {flag} takes no value, but got {' '.join(values)}; use --{name} or --no_{name}"
                ) from None
            wanted = describe_type(known[name].type)
            given = " ".join(values) or "nothing"
            raise UserError(f"{where}: {flag} must be {wanted}, not {given}") from None


def describe_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if type(None) in get_args(kind):
        return f"{describe_type(get_args(kind)[0])} or None"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, "one path or more")


def flag_names(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every dotted flag of a nested dataclass with its field."""
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from flag_names(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def check_known(key: str, known: dict[str, dataclasses.Field], *, where: str) -> None:
    name = key.replace("-", "_")
    if name in ("h", "help") or name in known:
        return
    head, _, tail = name.rpartition(".")
    if tail.startswith("no_") and known.get(f"{head}.{tail[3:]}" if head else tail[3:], None) is not None:
        return
    nearest = difflib.get_close_matches(name, known, n=1)
    nearest = nearest or [k for k in known if k.rpartition(".")[2] == tail]
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help for all keys"
    raise UserError(f"{where}: unknown key {key}; {hint}")


def yaml_arguments(path: Path, known: dict[str, dataclasses.Field]) -> list[Given]:
    """Flatten a YAML file into command-line arguments; nested mappings become dotted flags."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"command line: {path} is not a .yaml file, and no flag stands before it")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except FileNotFoundError:
        there = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(path), there, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "give the path of a YAML file"
        raise UserError(f"config file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, not a {type(settings).__name__}")
    where = f"config file {path}"
    return [Given(where, arguments) for arguments in flatten(settings, where, known)]


def flatten(
    settings: dict, where: str, known: dict[str, dataclasses.Field], prefix: str = ""
) -> Iterator[list[str]]:
    """The arguments that stand for each setting."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        is_section = any(k.startswith(f"{name}.") for k in known)
        if isinstance(value, dict) and (is_section or name not in known):
            yield from flatten(value, where, known, f"{name}.")
            continue
        if is_section:
            if value is not None:  # a section whose keys are all commented out
                raise UserError(
                    f"{where}: {name} = {value} must be a section of keys, such as {name}.{{...}}"
                )
            continue
        check_known(name, known, where=where)
        kind = known[name].type
        optional = type(None) in get_args(kind)
        if kind is bool and isinstance(value, bool):
            head, dot, tail = name.rpartition(".")
            yield [f"--{name}" if value else f"--{head}{dot}no_{tail}"]
        elif get_origin(kind) is tuple and isinstance(value, list):
            yield [f"--{name}", *map(str, value)]
        elif kind is bool or isinstance(value, bool | list | dict) or (value is None and not optional):
            shown = "nothing" if value is None else repr(value)
            quote = (
                "; put it in quotes"
                if isinstance(value, bool)
                else "; without quotes"
                if kind is bool
                else ""
            )
            raise UserError(f"{where}: {name} must be {describe_type(kind)}, not {shown}{quote}")
        else:
            yield [f"--{name}={value}"]


def first_sentence(box: str) -> str:
    """The message inside tyro's box, as one line."""
    lines = [line.strip("│|╭╮╰╯ \n") for line in box.splitlines()][1:]
    body = []
    for line in lines:
        if set(line) <= set("─-╰╯"):
            break
        body.append(line)
    return " ".join(body) or "could not be understood; see --help"


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def to_yaml(cfg: object) -> str:
    """The resolved settings as YAML that `parse` reads back."""
    plain = dataclasses.asdict(cfg)
    return yaml.safe_dump(
        {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}, sort_keys=False
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on the command line."""
    with user_errors():
        main(sys.argv[1:])
