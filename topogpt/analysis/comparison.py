"""Runs side by side: which share an objective, and which is whose control.

Two runs have the same objective where all their settings are the same that had an effect on them, but for
seeds. A control has no spatial loss, and everything else as the run has it. Nothing here reads a model.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from topogpt.config import flat
from topogpt.errors import UserError
from topogpt.settings import GPTConfig, TrainConfig

SEEDS = ("seed", "topo.seed")
# Where a run lies, how it is shown, on which machine it ran: no part of what was trained.
ELSEWHERE = """run_name out_dir resume overwrite checkpoint wandb wandb_project push_to_hf push_every device
    compile deterministic log_every save_every keep_last max_skipped val_data_dir""".split()
# Settings that only these losses read.
READ_BY = {
    "topo.weight": ("topolm",),
    "topo.layout": ("topolm",),
    "topo.positions": ("topolm",),  # losses on weights take units row by row, whatever is shown
    "topo.radius": ("topolm",),
    "topo.neighbourhoods": ("topolm",),
    "topo.distance": ("topolm",),
    "per_device_batch_size": ("topolm",),  # which draws neighbourhoods anew for every micro-batch
    "topo.tau": ("toponets",),
    "topo.factor_h": ("toponets",),
    "topo.factor_w": ("toponets",),
    "topo.neighbour_weight": ("neighbour",),
    "topo.wiring_weight": ("wiring",),
    "topo.modules": ("toponets", "neighbour", "wiring"),
}
FINGERPRINT = re.compile("[0-9a-f]{64}")  # of shards
SHAPE = ("n_layer", "n_embd", "n_hidden", "block_size", "vocab_size")


class Member(NamedTuple):
    """A run of the comparison."""

    source: str  # its folder, as it was given
    seed: int
    settings: dict[str, Any]  # dotted name -> value: those that had an effect, without seeds
    shape: dict[str, int]
    val_text: str  # what stands for the validation text: its fingerprint, or where it lies
    val_tokens: int
    step: int  # of the checkpoint
    cross_entropy: float  # of validation, at that step
    unfinished: str | None  # how far it came, where it neither reached its last step nor stopped by itself

    @property
    def is_control(self) -> bool:
        return self.settings["topo.loss"] == "none"

    @property
    def beside_objective(self) -> dict[str, Any]:
        """What a control must share."""
        return {k: v for k, v in self.settings.items() if not k.startswith("topo.") and k not in READ_BY}


def member(source: str, state: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Member:
    """A run as its checkpoint's state.json and its evaluations say it is; one line where they do not fit."""
    at, config = state["train_state"], state["config"]
    found = [record for record in records if record["step"] == at["step"]]
    if not records:
        raise UserError(f"run {source} has no finished evaluation yet; wait for its first one")
    if not found:
        steps = ", ".join(str(record["step"]) for record in records[-8:])
        raise UserError(f"run {source} was not evaluated at step {at['step']}, only at {steps}")
    texts = {
        key: state["data"].get(key) or " ".join(config[key]) for key in ("train_data_dir", "val_data_dir")
    }
    model = GPTConfig(**config["model"])
    return Member(
        source,
        config["seed"],
        effective(flat(config) | {"train_data_dir": texts["train_data_dir"]}),
        {key: getattr(model, key) for key in SHAPE},
        texts["val_data_dir"],
        config["val_tokens"],
        at["step"],
        found[-1]["cross_entropy"],
        unfinished(config, records),
    )


def unfinished(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str | None:
    """How far a run came by its evaluations, where it neither reached its last step nor stopped by itself."""
    last, stops = records[-1]["step"], config["patience"]
    early = 0 < stops <= rises([record["cross_entropy"] for record in records])
    return None if early or last >= config["max_steps"] else f"{last} of {config['max_steps']} steps"


def rises(losses: Sequence[float]) -> int:
    """How many times in a row the last losses rose."""
    n = 0
    for before, after in zip(losses[-2::-1], losses[::-1], strict=False):
        if after <= before:
            break
        n += 1
    return n


def known() -> dict[str, Any]:
    """Every setting of training that can tell two objectives apart, and its default."""
    settings = flat(asdict(TrainConfig(run_name="-")))
    return {key: value for key, value in settings.items() if key not in (*SEEDS, *ELSEWHERE)}


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that had an effect on what was trained; a setting younger than the run has its default."""
    found, losses = (
        {key: settings.get(key, default) for key, default in known().items()},
        settings["topo.loss"],
    )
    kept = {}
    for key, value in found.items():
        read = READ_BY.get(key)
        unread = read is not None and not set(read) & set(losses.split("+"))
        if not unread and (losses != "none" or not key.startswith("topo.") or key == "topo.loss"):
            kept[key] = value
    return kept


# ---- objectives ------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """Runs that differ in their seeds alone, by seed."""

    label: str
    members: list[Member]


class Comparison(NamedTuple):
    objectives: list[Objective]  # controls first
    controls: dict[str, Member]  # source of a run -> its control, where there is one
    warnings: list[str]  # a line each


def compare(members: Sequence[Member], by: Sequence[str] = ()) -> Comparison:
    """Group runs by objective and find their controls; UserError where they cannot stand in one table."""
    check_together(members)
    check_by(by)
    members = sorted(members, key=lambda m: (m.seed, m.source))
    keys = list(by) or differing(members)
    groups: dict[str, list[Member]] = {}
    for m in members:
        groups.setdefault(label_of(m, keys), []).append(m)
    for label, group in groups.items():
        for a, b in zip(group, group[1:], strict=False):
            if a.seed == b.seed:
                raise UserError(
                    f"{a.source} and {b.source} are both {label}, seed {a.seed}; give one of them, or name a "
                    "setting in which they differ: --by"
                )
    order = sorted(groups, key=lambda label: (not groups[label][0].is_control, natural(label)))
    controls, warnings = find_controls(members)
    return Comparison(
        [Objective(label, groups[label]) for label in order],
        controls,
        [*differences(members), *averaged_over(groups, by), *warnings],
    )


def check_together(members: Sequence[Member]) -> None:
    first = members[0]
    for m in members[1:]:
        for key in SHAPE:
            if m.shape[key] != first.shape[key]:
                raise UserError(
                    f"{m.source} has {key} {m.shape[key]}, but {first.source} has {first.shape[key]}; give "
                    "runs of one shape"
                )
        for key, what in (("val_text", "text"), ("val_tokens", "number of tokens")):
            if getattr(m, key) != getattr(first, key):
                theirs, ours = (short(getattr(x, key)) for x in (m, first))
                raise UserError(
                    f"{m.source} was validated on another {what} ({theirs}) than {first.source} ({ours}), so "
                    "their losses cannot be compared; leave one of them out"
                )


def check_by(by: Sequence[str]) -> None:
    for key in by:
        if key not in known():
            nearest = difflib.get_close_matches(key, known(), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "give some such as topo.loss topo.tau"
            raise UserError(f"by = {key} is no setting that tells objectives apart; {hint}")


def differing(members: Sequence[Member]) -> list[str]:
    """Settings that do not have one value in all the runs on which they had an effect."""
    values: dict[str, set] = {}
    for m in members:
        for key, value in m.settings.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def label_of(m: Member, keys: Iterable[str]) -> str:
    """toponets, tau 50: the spatial loss, and the other settings that tell it apart."""
    told = [key for key in keys if key != "topo.loss" and key in m.settings]
    parts = [f"{key.removeprefix('topo.')} {short(m.settings[key])}" for key in told]
    return ", ".join([m.settings["topo.loss"], *parts])


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, str) and FINGERPRINT.fullmatch(value):
        return value[:8]
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def natural(label: str) -> list[tuple[float, str]]:
    """A key that puts tau 5 before tau 50."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", label)
    return [(float(p), "") if i % 2 else (-math.inf, p) for i, p in enumerate(parts)]


def find_controls(members: Sequence[Member]) -> tuple[dict[str, Member], list[str]]:
    """The control of every run that has one; a line for every run that has none."""
    controls, warnings = {}, []
    there = [m for m in members if m.is_control]
    if not there:
        return {}, ["no run is a control (topo.loss none), so every gap is left empty"]
    for m in members:
        same_seed = [c for c in there if c.seed == m.seed]
        fits = [c for c in same_seed if c.beside_objective == m.beside_objective]
        half_done = [f"{r.source} came to {r.unfinished}" for r in (m, *fits) if r.unfinished]
        if m.is_control:
            if m.unfinished:
                warnings.append(f"{m.source} is not finished ({m.unfinished})")
        elif half_done:
            warnings.append(f"{m.source}: no gap, as {' and '.join(half_done)}")
        elif fits:
            controls[m.source] = fits[0]
        elif same_seed:
            what = "; ".join(f"{c.source} differs in {apart(c, m)}, too" for c in same_seed)
            warnings.append(f"{m.source}: no gap, as the control of its seed, {what}")
        else:
            seeds = ", ".join(str(c.seed) for c in there)
            warnings.append(f"{m.source}: no gap, as no control has seed {m.seed} (only {seeds})")
    return controls, warnings


def apart(a: Member, b: Member) -> str:
    """What a control and a run differ in besides the objective: max_steps (500, 250)."""
    one, other = a.beside_objective, b.beside_objective
    return ", ".join(f"{k} ({short(one[k])}, {short(other[k])})" for k in one if one[k] != other[k])


def differences(members: Sequence[Member]) -> list[str]:
    """A line where runs differ in more than their objective."""
    keys = [key for key in differing(members) if not key.startswith("topo.") and key not in READ_BY]
    if not keys:
        return []
    values = (sorted({short(m.settings[key]) for m in members}, key=natural) for key in keys)
    said = ", ".join(f"{key} ({', '.join(found)})" for key, found in zip(keys, values, strict=True))
    return [f"these runs differ in more than objective and seed: {said}"]


def averaged_over(groups: Mapping[str, Sequence[Member]], by: Sequence[str]) -> list[str]:
    """A line for each row that --by makes of runs which differ."""
    found = {label: differing(group) for label, group in groups.items()} if by else {}
    return [f"{label}: its runs differ in {', '.join(keys)}" for label, keys in found.items() if keys]
