"""What a run came to: what was trained, its first and last figures, and its sheets before and after.

python summary.py out/topolm
"""

from pathlib import Path

import yaml

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.runs.folder import read_metrics
from topogpt.settings import SummaryConfig

FIGURES = {
    "cross_entropy": "cross-entropy (nats)",
    "spatial_loss": "spatial loss per sheet",
    "moran": "mean Moran's I",
}


def main(argv: list[str]) -> None:
    run = Path(parse(SummaryConfig, argv, prog="summary.py").run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"run {run} has no metrics.jsonl; give the folder of a run, such as out/NAME")
    evaluations = read_metrics(run, "val")
    if not evaluations:
        raise UserError(f"run {run} has no evaluation yet; wait for its first one")
    first, last = evaluations[0], evaluations[-1]
    cfg = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    model, topo = cfg["model"], cfg["topo"]
    print(
        f"{cfg['run_name']}: a GPT of {model['n_layer']} layers, {model['n_embd']} wide "
        f"({len(last['moran_by_sheet'])} sheets); spatial loss: {topo['loss']}"
        + (f", weight {topo['weight']}" if topo["loss"] != "none" else "")
    )
    print(f"trained for {last['step']:,} steps on {last['tokens']:,} tokens")
    steps = [f"step {record['step']:,}" for record in (first, last)]
    print(f"{'on validation text':26}{steps[0]:>12}{steps[1]:>12}")
    for key, name in FIGURES.items():
        print(f"{name:26}{first[key]:12.3f}{last[key]:12.3f}")
    picture = draw_before_and_after(run, cfg["run_name"], first["step"], last["step"])
    print(f"sheets before and after:  {picture}")
    print(f"all of it:                {run}/ (metrics.jsonl, log.txt, maps/, best/, last/)")


def draw_before_and_after(run: Path, name: str, first: int, last: int) -> Path | str:
    """Draw the maps of two steps side by side; return the picture's path."""
    from topogpt.training import maps  # imports torch

    columns = [
        (f"step {step:,}", maps.load_arrays(run / "maps" / f"step-{step:06d}.npz")) for step in (first, last)
    ]
    path = run / "maps" / "before-and-after.png"
    try:
        maps.draw(path, columns, f"{name}: the same token on every sheet")
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib)"
    return path


if __name__ == "__main__":
    run_main(main)
