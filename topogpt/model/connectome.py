"""Connectomes: which weights of a model there are, with their signs; pruning, inheriting, training under one.

    folder/connectome.safetensors   wiring by weight name, int8: 1 or -1 a connection and its sign, 0 none
    folder/connectome.json          sha256 of it, shape of the model, fraction, generation, ...

Only matrices are wired; what has no wiring (norms, biases, exempt matrices) starts fresh and is trained as
usual. A wiring is never read off weights: a weight may be 0 and be there. After Model Connectomes (Kotar et
al. 2025, arXiv 2504.21047). Nothing here imports torch before there is something to read.
"""

import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from topogpt import rng
from topogpt.errors import UserError
from topogpt.files import fsync, permit, read_json, sha256, whole, write_json
from topogpt.settings import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from topogpt.model.gpt import GPT

FILE, RECORD = "connectome.safetensors", "connectome.json"
REWIND_FILE = "rewind.safetensors"  # weights to rewind to, beside a connectome that was grown by rewinding
SIZE = 0.02  # of every weight that inherits its sign
SHAPE = "n_layer n_head n_embd n_hidden vocab_size bias gelu norm position tied scale_attention".split()
Per = Literal["matrix", "global"]


@dataclass
class Connectome:
    wiring: dict[str, "Tensor"]  # weight name -> int8 of its shape, on the CPU
    about: dict[str, Any] = field(default_factory=dict)  # the record

    @property
    def kept(self) -> float:
        """Share of the weights of its matrices that are there."""
        n = sum(w.numel() for w in self.wiring.values())
        return sum(int(w.count_nonzero()) for w in self.wiring.values()) / n


# ---- pruning -------------------------------------------------------------------------------------


def prune(
    weights: Mapping[str, "Tensor"],
    masks: Mapping[str, "Tensor"] | None,
    fraction: float,
    per: Per = "matrix",
    exempt: Sequence[str] = (),
) -> dict[str, "Tensor"]:
    """Masks, bool by name, without the smallest `fraction` of the remaining weights of each matrix or all.

    Exactly round(fraction * remaining) go (Python's round: a half to the even number); of equal ones the
    first. What masks has not goes on missing.

    Args:
        weights: by name; those that are no matrices, or match a pattern of exempt (fnmatch), are passed over.
        masks: of the pruning before; None: everything is there.
    """
    import torch

    check_fraction("prune", fraction)
    names = wired_names({name: tuple(w.shape) for name, w in weights.items()}, exempt)
    masks = {n: torch.ones(weights[n].shape, dtype=torch.bool) if masks is None else masks[n] for n in names}
    sizes = {name: weights[name].detach().float().cpu().abs() for name in names}
    left = {name: sizes[name][masks[name]] for name in names}
    for name, values in left.items():
        if not values.isfinite().all():
            raise UserError(f"prune: {name} holds weights that are not finite numbers; train the run anew")
    groups = [[name] for name in names] if per == "matrix" else [names]
    stay: dict[str, Tensor] = {}
    for group in groups:
        values = torch.cat([left[name] for name in group])
        kept = ~smallest(values, round(fraction * len(values)))
        stay |= zip(group, kept.split([len(left[name]) for name in group]), strict=True)
    return {name: torch.zeros_like(mask).masked_scatter_(mask, stay[name]) for name, mask in masks.items()}


def smallest(values: "Tensor", n: int) -> "Tensor":
    """Which of values (N,) are the n smallest, (N,) bool; of equal ones the first."""
    import torch

    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = values.kthvalue(n).values
    found, equal = values < limit, values == limit
    return found | (equal & (equal.cumsum(0) <= n - found.sum()))


def wired_names(shapes: Mapping[str, tuple[int, ...]], exempt: Sequence[str] = ()) -> list[str]:
    """Names of the matrices that match no pattern of exempt; a pattern that matches none is a UserError."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    for pattern in exempt:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            near = ", ".join(difflib.get_close_matches(pattern, matrices, 3, 0.3) or matrices[:3])
            raise UserError(f"exempt = {pattern} matches no matrix of the model; near it: {near}")
    names = [name for name in matrices if not any(fnmatchcase(name, pattern) for pattern in exempt)]
    if not names:
        raise UserError(f"exempt = {' '.join(exempt)} leaves no matrix to prune; exempt less")
    return names


def check_fraction(key: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"{key} = {fraction} must be above 0 and below 1: the share that is cut each time")


def signs(weights: Mapping[str, "Tensor"], masks: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The wiring of masked weights; a weight of exactly 0 that is there counts as positive."""
    import torch

    return {n: torch.where(weights[n].detach().cpu() < 0, -1, 1).to(torch.int8) * m for n, m in masks.items()}


# ---- inheriting ----------------------------------------------------------------------------------


def random_wiring(wiring: Mapping[str, "Tensor"], seed: int) -> dict[str, "Tensor"]:
    """Of every matrix as many connections, elsewhere, with signs of a fair coin: the control."""
    import torch

    found = {}
    for name, wired in wiring.items():
        g, n = torch.Generator().manual_seed(rng.seed(seed, "wiring", name)), int(wired.count_nonzero())
        flat = torch.zeros(wired.numel(), dtype=torch.int8)
        coins = torch.randint(0, 2, (n,), generator=g, dtype=torch.int8)
        flat[torch.randperm(wired.numel(), generator=g)[:n]] = 2 * coins - 1
        found[name] = flat.view_as(wired)
    return found


def inherit(
    model: "GPT",
    connectome: Connectome,
    how: Literal["signs", "random", "dense", "rewind"],
    seed: int,
    rewind: Mapping[str, "Tensor"] | None = None,
) -> Connectome | None:
    """Set the start of a new model, and return what it is trained under.

    signs: connections are sign * 0.02. random: so are those of a random wiring of equal sparsity. rewind:
    all weights are those of `rewind`, by name, and what is not connected is 0. dense: as it is, under
    nothing.
    """
    import torch

    if how == "dense":
        return None
    if how == "random":
        connectome = Connectome(random_wiring(connectome.wiring, seed), connectome.about | {"random": seed})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if how == "rewind":
                assert rewind is not None
                weight.copy_(rewind[name])
            elif name in connectome.wiring:
                weight.copy_(connectome.wiring[name] * SIZE)
    Masks(model, connectome).of_weights()
    return connectome


class Masks:
    """What keeps the pruned weights of a model at exactly 0; without a connectome it does nothing."""

    def __init__(self, model: "GPT", connectome: Connectome | None) -> None:
        wiring = connectome.wiring if connectome else {}
        pairs = [(p, (wiring[n] == 0).to(p.device)) for n, p in model.named_parameters() if n in wiring]
        assert len(pairs) == len(wiring), "every wired matrix is one of the model's"
        self.pairs = pairs  # a weight, and where it has no connection

    def of_gradients(self) -> None:
        """After the reduction over ranks and before the norm is taken."""
        for weight, pruned in self.pairs:
            weight.grad.masked_fill_(pruned, 0.0)

    def of_weights(self) -> None:
        """After the optimiser's step, whose update may reach every weight (Muon's does)."""
        for weight, pruned in self.pairs:
            weight.data.masked_fill_(pruned, 0.0)


# ---- files ---------------------------------------------------------------------------------------


def write(folder: Path, connectome: Connectome, cfg: GPTConfig) -> None:
    """Write both files, whole, the record last: a folder that has it is complete."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    with whole(folder / FILE) as part:
        save_file({n: w.contiguous() for n, w in connectome.wiring.items()}, part, metadata={"format": "pt"})
        permit(part)
    made = {"sha256": sha256(folder / FILE), "model": asdict(cfg), "kept": connectome.kept}
    write_json(folder / RECORD, connectome.about | made)
    fsync(folder)


@functools.cache  # one copy a process, whatever happens to the repository
def find(source: str | Path) -> Path:
    """The folder itself, or a copy of a repository of the Hub (USER/NAME), in the Hub's own cache."""
    folder = Path(source)
    if folder.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[FILE, RECORD, REWIND_FILE]))
    except Exception as error:  # no network, no such repository, no right to read it
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"connectome = {source} is no folder here and could not be fetched from the Hub ({reason}); give "
            "what train_itp.py has made, such as out/NAME, or USER/NAME"
        ) from None


def check(folder: str | Path, cfg: GPTConfig, key: str = "connectome") -> dict[str, Any]:
    """The record of a connectome that is whole and fits a model of this shape; else a UserError.

    folder: of a connectome, of a run trained under one, or a repository of the Hub.
    """
    folder = find(folder)
    missing = [name for name in (FILE, RECORD) if not (folder / name).is_file()]
    if missing:
        what = f"is incomplete: it has no {missing[0]}" if len(missing) == 1 else "is no connectome"
        if (folder / "itp.json").is_file():
            what = "has generations still to come: go on with train_itp.py --resume"
        what = what if folder.is_dir() else "does not exist"
        raise UserError(
            f"{key} = {folder} {what}; give what train_itp.py has made, such as out/NAME, or a run trained "
            "under one"
        )
    record = read_json(folder / RECORD)
    if record.get("sha256") != sha256(folder / FILE) or not isinstance(record.get("model"), dict):
        raise UserError(f"{key} = {folder} is damaged: {FILE} is not what {RECORD} says; make it anew")
    there = GPTConfig(**record["model"])
    for name in (*SHAPE, *(["block_size"] if cfg.position == "learned" else [])):
        has, wanted = getattr(there, name), getattr(cfg, name)
        if has != wanted:
            flag = "n_inner" if name == "n_hidden" else name
            given = f"{'' if has else 'no_'}{flag}" if isinstance(has, bool) else f"{flag} {has}"
            raise UserError(
                f"{key} = {folder} has {name} {has}, but model.{flag} = {wanted}; give --model.{given}"
            )
    return record


def read(folder: str | Path, cfg: GPTConfig, key: str = "connectome") -> Connectome:
    """A connectome for a model of this shape."""
    from safetensors.torch import load_file

    about = check(folder, cfg, key)
    return Connectome(load_file(find(folder) / FILE), about)


def describe(connectome: Connectome) -> str:
    n = sum(math.prod(w.shape) for w in connectome.wiring.values())
    return f"{connectome.kept:.1%} of {n:,} weights in {len(connectome.wiring)} matrices"
