"""What must be known before numbers are read: how far a model was trained, and whether its control is one.

for line in notes(load_subjects(cfg)): say(line)       # nothing, where all is as it should be
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from topogpt.analysis import comparison
from topogpt.analysis.subject import Subject
from topogpt.config import flat
from topogpt.runs.folder import read_metrics

TEXTS = ("train_data_dir", "val_data_dir")


class Trained(NamedTuple):
    """What is known of a model's training."""

    label: str
    settings: dict[str, Any]  # dotted name -> value, whatever the spatial loss reads of them
    texts: dict[str, tuple[str, str | None]]  # where training and validation text lie, and their fingerprints
    step: int | None  # of the checkpoint; None in an exported folder
    last: int | None  # evaluation of the run
    unfinished: str | None  # how far it came, where it neither reached its last step nor stopped by itself


def trained(subject: Subject) -> Trained | None:
    """None where the model does not say how it was trained."""
    if subject.settings is None:
        return None
    path, config = subject.checkpoint / "state.json", subject.settings
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    records = read_metrics(subject.checkpoint.parents[1], "val") if state else []
    there = flat(config)
    names = (*comparison.SEEDS, *comparison.known())
    return Trained(
        subject.label,
        {k: there.get(k, comparison.known().get(k)) for k in names if k not in TEXTS},
        {key: (" ".join(config[key]), state.get("data", {}).get(key)) for key in TEXTS},
        state["train_state"]["step"] if state else None,
        records[-1]["step"] if records else None,
        comparison.unfinished(config, records) if records else None,
    )


def notes(subjects: Sequence[Subject]) -> list[str]:
    """A line for each thing that a reader of numbers must know first, of the model and of its control."""
    found = [trained(subject) for subject in subjects]
    lines = [line for one in found if one for line in of_one(one)]
    if len(subjects) < 2:
        return lines
    model, control = subjects
    if model.weights_sha256 == control.weights_sha256:
        return [*lines, f"control {control.label} has the weights of {model.label}: it is the model itself"]
    unknown = [s.label for s, one in zip(subjects, found, strict=True) if one is None]
    if unknown:
        said = " and ".join(unknown)
        return [*lines, f"how {said} was trained is not known, so the control may not be matched"]
    return [*lines, *of_both(*found)]


def of_one(one: Trained) -> Iterator[str]:
    if one.step == 0:
        went_on = f"; the run went on to step {one.last}: --checkpoint last" if one.last else ""
        yield f"{one.label}: this checkpoint is of step 0, an untrained model{went_on}"
    if one.unfinished:
        yield f"{one.label}: the run was interrupted or still runs, at {one.unfinished}"


def of_both(model: Trained, control: Trained) -> Iterator[str]:
    """Whether the control is one, and every setting in which it differs beside the spatial loss."""
    if (loss := control.settings["topo.loss"]) != "none":
        yield f"control {control.label} has a spatial loss itself ({loss})"
    apart = [
        (key, model.settings[key], value)
        for key, value in control.settings.items()
        if (not key.startswith("topo.") or key in comparison.SEEDS) and key not in comparison.READ_BY
        if model.settings[key] != value
    ]
    for key, (place, digest) in control.texts.items():
        ours = model.texts[key]
        if (ours[1] != digest) if ours[1] and digest else (ours[0] != place):
            apart.append((key, ours[1] or ours[0], digest or place))
    if None not in (model.step, control.step) and model.step != control.step:
        apart.append(("step of the checkpoint", model.step, control.step))
    if apart:
        said = ", ".join(f"{k} ({comparison.short(a)}, {comparison.short(b)})" for k, a, b in apart)
        yield f"control {control.label} is not matched; it differs from {model.label} in {said}"
