"""What a run came to, and its map at a glance: grid, sheets, Moran's I beside its floor, a small picture.

    python topo.py out/topolm                     # or an exported folder, or USER/NAME on the Hub
    python topo.py out/topolm --checkpoint last --draw

All of it is read from the run's record; no model is run. `from topo import load_topography` and the other
names below are where a reader looks for them; they are defined in topogpt/topo.py and topography.py.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt.config import parse
from topogpt.drawing import LIMIT, standardised
from topogpt.errors import UserError, run_main
from topogpt.runs.folder import read_maps, read_metrics, step_folder
from topogpt.settings import GPTConfig, MapConfig
from topogpt.spatial.layout import laid_out
from topogpt.spatial.schedule import losses_in_words
from topogpt.terminal import has_colours, picture, print_table, say
from topogpt.topo import (
    grid_shape,
    mean_morans_i,
    morans_i,
    noise_floor,
    on_grid,
    positions,
    sheet_order,
    sheet_shape,
)
from topogpt.topography import Topography, download_topography, load_topography, save_topography

__all__ = ["Topography", "grid_shape", "load_topography", "morans_i", "on_grid", "positions"]
__all__ += ["save_topography"]

FIGURES = {
    "cross_entropy": "cross-entropy (nats)",
    "spatial_loss": "spatial loss per sheet",
    "moran": "mean Moran's I",
}
Record = dict[str, Any]  # a line of metrics.jsonl
Maps = dict[str, np.ndarray]  # sheet -> (n_maps, h, w)


class Found(NamedTuple):
    """What is known of a run, an exported folder or a repository."""

    folder: Path
    is_run: bool
    settings: dict[str, Any]  # of training; empty where they are not recorded
    topography: Topography | None  # None before the first checkpoint
    records: list[Record]  # evaluations
    chosen: Record | None  # the one that is shown
    named: str  # what the chosen step is: best, last, exported
    maps: Maps | None  # of the chosen step


def main(argv: list[str]) -> None:
    cfg = parse(MapConfig, argv, prog="topo.py")
    found = find(cfg.run, cfg.checkpoint)
    if cfg.draw and not found.is_run:
        problem = "is no run, and only a run keeps its maps as arrays; leave out --draw"
        raise UserError(f"draw: {cfg.run} {problem}")
    show_run(found)
    say()
    floor = noise_floor(*grid_of(found))
    show_figures(found, floor)
    say()
    show_sheets(found, floor)
    if found.maps is not None:
        say()
        show_maps(found.maps, found.chosen["step"])
    say()
    show_files(found, cfg)


# ---- reading ---------------------------------------------------------------------------------------------


def find(source: str, checkpoint: str) -> Found:
    path = Path(source)
    if (path / "topography.json").is_file():
        return find_exported(path)
    if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        return find_run(path, checkpoint)
    if path.is_dir():
        raise UserError(
            f"{source} is neither a run (no metrics.jsonl) nor an exported folder (no topography.json); "
            "give the folder of a run, such as out/NAME"
        )
    if path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        there = sorted(p.parent.name for p in path.parent.glob("*/config.yaml"))
        runs = f" (runs in {path.parent}: {', '.join(there)})" if there else ""
        raise UserError(f"{source} does not exist{runs}; give a run, an exported folder or USER/NAME")
    return find_exported(download(source))


def find_run(run: Path, checkpoint: str) -> Found:
    records = read_metrics(run, "val")
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"run {run} has no metrics.jsonl; give the folder of a run, such as out/NAME")
    if not records:
        raise UserError(f"run {run} has no evaluation yet; wait for its first one")
    folder, chosen, named = choose(run, checkpoint, records)
    known, settings = topography_of(folder or run), read_settings(run / "config.yaml")
    maps = read_maps(run, chosen["step"])
    return Found(run, True, settings, known, records, chosen, named, maps)


def choose(run: Path, checkpoint: str, records: list[Record]) -> tuple[Path | None, Record, str]:
    """Folder of a checkpoint, where it is there; the evaluation that belongs to it; what that one is."""
    is_step = re.fullmatch(r"step-(\d+)", checkpoint)
    if checkpoint not in ("best", "last") and not is_step:
        raise UserError(f"checkpoint = {checkpoint} is not best, last or step-N")
    folder = step_folder(run, int(is_step[1])) if is_step else (run / checkpoint).resolve()
    found = folder if (folder / "model.safetensors").is_file() else None
    name = re.fullmatch(r"step-(\d+)", folder.name)  # of another name where the link leads nowhere
    if name is None:
        return found, records[-1], "last"
    at = [record for record in records if record["step"] <= int(name[1])]
    if at and at[-1]["step"] == int(name[1]):
        return found, at[-1], checkpoint
    if is_step or not at:
        steps = ", ".join(f"{record['step']}" for record in records[-8:])
        raise UserError(f"run {run} was not evaluated at {folder.name}; its last evaluations: {steps}")
    return found, at[-1], f"before {checkpoint}"


def find_exported(folder: Path) -> Found:
    known = topography_of(folder)
    if known is None:
        raise UserError(f"{folder} has no topography.safetensors beside its topography.json; export it again")
    step = json.loads((folder / "topography.json").read_text(encoding="utf-8")).get("step")
    records = read_metrics(folder, "val")
    chosen = next((r for r in records if r["step"] == step), None)
    settings = read_settings(folder / "training_config.yaml")
    return Found(folder, False, settings, known, records, chosen, "exported", None)


def topography_of(folder: Path) -> Topography | None:
    """Positions in a folder, or None where it has none."""
    try:
        return load_topography(folder)
    except ValueError as error:
        if "holds no topography" in str(error):
            return None
        raise UserError(f"{error}; use another checkpoint") from None


def download(repo: str) -> Path:
    """The small files of a repository of the Hub that are there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = download_topography(repo)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in ("metrics.jsonl", "training_config.yaml"):
        try:
            hf_hub_download(repo, name)
        except EntryNotFoundError:  # what it would tell is said to be missing
            continue
        except Exception as error:  # the network, or no right to read it
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{repo}: {name} could not be read from the Hub: {reason}; try again") from None
    return folder


def read_settings(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings["model"]["n_embd"], settings["model"]["n_layer"], settings["topo"]["loss"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}; it is no run's") from None
    return settings


def grid_of(found: Found) -> tuple[int, int]:
    if found.topography is not None:
        return found.topography.grid
    if found.settings:
        model, layout = found.settings["model"], found.settings["topo"].get("layout", "per_branch")
        n_hidden = model.get("n_inner") or 4 * model["n_embd"]
        return sheet_shape(layout, model["n_layer"], model["n_embd"], n_hidden)
    raise UserError(f"{found.folder} has neither config.yaml nor a checkpoint; its grid is not known")


# ---- showing ---------------------------------------------------------------------------------------------


def show_run(found: Found) -> None:
    settings, known = found.settings, found.topography
    if settings:
        model = settings["model"]
        say(
            f"{settings.get('run_name')}: a GPT of {model['n_layer']} layers, {model['n_embd']} wide; "
            f"spatial loss: {losses_in_words(settings['topo'])}"
        )
    if found.records:
        last = found.records[-1]
        say(f"trained for {last['step']:,} steps on {last.get('tokens', 0):,} tokens")
    h, w = grid_of(found)
    if known is None:
        say(f"sheets: {h}x{w} units; there is no checkpoint yet that keeps their positions")
        return
    seed = f", seed {known.seed}" if known.kind == "permuted" else ""
    given = known.kind and (not settings or as_configured(settings, known))
    kind = f"{known.kind}{seed}" if given else "of their own, taken from where the run started (init_from)"
    n = len(known.positions)
    say(f"sheets: {n} of {h}x{w} units, {n * h * w:,} in all; positions: {kind}")


def as_configured(settings: dict[str, Any], known: Topography) -> bool:
    """Whether positions are those that their kind and seed give."""
    model = GPTConfig(**settings["model"])
    layout = settings["topo"].get("layout", "per_branch")
    given = laid_out(model, layout, known.kind, known.seed or 0)
    return given.keys() == known.positions.keys() and all(
        np.array_equal(p, known.positions[sheet]) for sheet, p in given.items()
    )


def show_figures(found: Found, floor: tuple[float, float]) -> None:
    """First, chosen and last evaluation side by side."""
    if not found.records:
        say("on validation text: not recorded here (no metrics.jsonl)")
        return
    shown = {r["step"]: r for r in (found.records[0], found.chosen, found.records[-1]) if r is not None}
    steps = sorted(shown)
    is_chosen = found.chosen["step"] if found.chosen else None
    heads = [f"step {s:,}" + (f" ({found.named})" if s == is_chosen else "") for s in steps]
    rows = []
    for key, name in FIGURES.items():
        noise = shown_floor(floor) if key == "moran" else ""
        rows.append([name, *(shown[s].get(key) for s in steps), noise])
    print_table(["on validation text", *heads, "white noise"], rows)


def shown_floor(floor: tuple[float, float]) -> str:
    return f"{round(floor[0], 3) + 0.0:.3f} +- {floor[1]:.3f}"  # no -0.000


def show_sheets(found: Found, floor: tuple[float, float]) -> None:
    """Moran's I of every sheet, a layer a row and a branch a column, beside that of white noise."""
    by_sheet = (found.chosen or {}).get("moran_by_sheet")
    if not by_sheet and found.maps is not None:
        by_sheet = mean_morans_i(found.maps)
    if not by_sheet:
        say("Moran's I of each sheet: not recorded here; python -m evals.topography measures it")
        return
    h, w = grid_of(found)
    say(f"Moran's I of each sheet at step {found.chosen['step']:,}, mean over the maps of single tokens")
    say(f"(white noise: mean and standard deviation of one {h}x{w} map in which nothing is alike)")
    rows, branches = {}, []
    for sheet in sorted(by_sheet, key=sheet_order):
        layer, _, branch = sheet.rpartition(".")
        rows.setdefault(layer or "one sheet", {})[branch] = by_sheet[sheet]
        branches += [branch] if branch not in branches else []
    noise = shown_floor(floor)
    lines = [[layer, *(values.get(b) for b in branches), noise] for layer, values in rows.items()]
    print_table(["sheet", *branches, "white noise"], lines)


def show_maps(maps: Mapping[str, np.ndarray], step: int) -> None:
    """As many sheets as the terminal is wide enough for, evenly spaced over depth."""
    colours, names = has_colours(), sorted(maps, key=sheet_order)
    w = next(iter(maps.values())).shape[-1]
    wide = max(w if colours else 2 * w, len(max(names, key=len)))
    across = min(len(names), max(1, (shutil.get_terminal_size((80, 24)).columns + 2) // (wide + 2)))
    spread = np.linspace(0, len(names) - 1, across) if across > 1 else [len(names) // 2]
    chosen = [names[round(i)] for i in spread]
    columns = [sheet_lines(name, maps[name][-1], wide, colours) for name in chosen]
    say(
        f"maps of the last token at step {step:,}, each under its own Moran's I; "
        f"low: {'blue' if colours else 'light'}"
    )
    for line in zip(*columns, strict=True):
        say("  ".join(line).rstrip())


def sheet_lines(name: str, grid: np.ndarray, wide: int, colours: bool) -> Sequence[str]:
    h, w = grid.shape
    z = standardised(grid) / LIMIT
    moran = mean_morans_i({name: grid})[name]
    space = " " * (wide - (w if colours else 2 * w))
    lines = picture(z.tolist(), colours)
    return [name.ljust(wide), f"{moran:.3f}".ljust(wide), *(line + space for line in lines)]


def show_files(found: Found, cfg: MapConfig) -> None:
    if not found.is_run:
        path = found.folder / "sheets.png"
        say(f"picture: {path}" if path.is_file() else "picture: none is stored here")
        say("maps as arrays: only the run that this was exported from has them")
        return
    run, step = found.folder, found.chosen["step"]
    if found.maps is None:
        say(f"maps of step {step:,}: not there any more ({run}/maps/step-{step:06d}.npz)")
    path = run / "maps" / f"step-{step:06d}.png"
    say(f"picture:          {path if path.is_file() else 'none was drawn; that takes matplotlib'}")
    if cfg.draw:
        say(f"before and after: {draw_before_and_after(found)}")
    say(f"all of it:        {run}/ (metrics.jsonl, log.txt, maps/, best/, last/)")


def draw_before_and_after(found: Found) -> Path | str:
    """Draw the maps of the first and the chosen step side by side; return the picture's path."""
    from topogpt.training import maps  # imports torch

    steps = [found.records[0]["step"], found.chosen["step"]]
    columns = [(f"step {step:,}", read_maps(found.folder, step)) for step in steps]
    if any(arrays is None for _, arrays in columns):
        return "not drawn: the maps of both steps are not there"
    path = found.folder / "maps" / "before-and-after.png"
    name = found.settings.get("run_name") or found.folder.name
    try:
        maps.draw(path, columns, f"{name}: the same token on every sheet")
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib)"
    return path


if __name__ == "__main__":
    run_main(main)
