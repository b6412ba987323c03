"""Activations: one pattern per item and sheet, for any list of texts.

    python -m evals.activations out/topolm --stimuli items.csv        # columns: item, condition
    python -m evals.activations openai-community/gpt2 --stimuli items.csv --positions identity

evals/activations.safetensors then holds, for every sheet, `layer.3.mlp` (items, units) and its units' places
on the grid, `positions.layer.3.mlp` (units, 2); activations.json lists items and conditions in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from topogpt.analysis import stimuli
from topogpt.analysis.activations import of_stimuli
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Section, Table, labels
from topogpt.analysis.subject import PoolingConfig, Subject, protocol_of
from topogpt.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig(PoolingConfig):
    """Write every sheet's activations on a list of items: python -m evals.activations RUN --stimuli CSV."""

    stimuli: str = ""  # CSV file with the columns item and condition
    item: tuple[str, ...] = ("item",)  # its column, or several to be joined by a space
    condition: tuple[str, ...] = ("condition",)  # the same for the condition, joined by _
    dtype: Literal["float32", "float16"] = "float32"  # of the stored numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stimuli:
            raise UserError("stimuli is missing; add --stimuli FILE.csv")


def analyse(cfg: ActivationsConfig, subject: Subject) -> Outcome:
    path = Path(cfg.stimuli)
    found = stimuli.read(path, cfg.item, cfg.condition)
    patterns = of_stimuli(cfg, subject, found)
    arrays = {sheet: stored(x, cfg.dtype) for sheet, x in patterns.items()}
    arrays |= {f"positions.{sheet}": p.astype(np.int32) for sheet, p in subject.positions.items()}
    results: dict[str, Any] = {"n_items": len(found.items), "items": found.items}
    results["conditions"] = found.conditions
    results["mean_magnitude"] = {sheet: float(np.abs(x).mean()) for sheet, x in patterns.items()}
    return Outcome(protocol_of(cfg), {path.name: found.sha256}, results, arrays)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    if np.abs(x).max() > np.finfo(dtype).max:
        raise UserError(
            f"dtype = {dtype} cannot hold activations of {np.abs(x).max():.3g}; use --dtype float32"
        )
    return x.astype(dtype)


def section(found: Sequence[Result]) -> Section:
    rows = [[sheet, *(r.results["mean_magnitude"].get(sheet) for r in found)] for sheet in found[0].sheets]
    return Section(
        "Activations",
        [
            f"How strongly every sheet answers to the {found[0].results['n_items']:,} items of "
            f"{found[0].content['protocol']['stimuli']}; the activations themselves are in "
            "activations.safetensors, a pattern per item and sheet.",
            Table(["sheet", *labels(found, ": mean |activation|")], rows),
        ],
    )


ANALYSIS = Analysis(ActivationsConfig, analyse, section, order=50, by_hand=True)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
