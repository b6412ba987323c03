"""What an analysis is told, and the model it looks at: settings that several share, and the Subject.

subject = load_subject(cfg, "out/topolm")       # or an exported folder, or USER/NAME on the Hub
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from topogpt import topo, topography
from topogpt.errors import UserError, check_at_least
from topogpt.files import sha256
from topogpt.runs.seal import read_state

if TYPE_CHECKING:  # --help and mistakes answer at once
    from topogpt.model.gpt import GPT
    from topogpt.sharing.load import LoadedModel

ELSEWHERE = "run control checkpoint results_dir stimuli_dir figures device vocab_dir".split()


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What every analysis can be told."""

    run: str  # a run (out/NAME), an exported folder, or USER/NAME on the Hub
    control: str | None = None  # its control: analysed the same way, and shown beside it
    checkpoint: str = "best"  # which checkpoint of a run: best, last or step-N; on the Hub the tag step-N
    layout: topo.Layout | None = None  # which sheets; None: the model's own; others into evals/LAYOUT
    positions: str | None = None  # for a model without: identity, permuted, or a folder with a topography
    results_dir: str | None = None  # folder for the results; None: evals/ inside the run or folder
    stimuli_dir: str = "data/stimuli"  # folder of published stimuli (evals.fetch); without it: our own
    figures: bool = True  # whether to draw the figures
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute; auto: the first that is there
    vocab_dir: str | None = None  # folder with vocab.bpe and encoder.json; None: found or fetched

    def __post_init__(self) -> None:
        if self.control is not None and self.results_dir is not None:
            raise UserError("results_dir has no effect with control, as each model has a folder of its own")

    @property
    def sources(self) -> list[str]:
        """The model, and its control if there is one."""
        return [self.run] if self.control is None else [self.run, self.control]

    @property
    def variant(self) -> str:
        """What is added to the name of results that stand beside the usual ones: NAME-VARIANT.json."""
        return ""


@dataclass(frozen=True, kw_only=True)
class PoolingConfig(EvalConfig):
    """How the tokens of an item become one pattern of activation."""

    pooling: Literal["mean", "last"] = "mean"  # mean over an item's tokens (never padding), or its last one
    eot: bool = False  # whether an end-of-text token, which starts documents in training, leads each item


@dataclass(frozen=True, kw_only=True)
class MoranConfig(EvalConfig):
    """How maps are smoothed, and their Moran's I is tested."""

    fwhm_mm: tuple[float, ...] = (0.0, 1.0, 2.0)  # widths of the Gaussian readout: TopoLM's "smoothed" is 2
    unit_distance_mm: float = 1.0  # distance of neighbours on the grid
    contiguity: Literal["queen", "rook"] = "queen"  # which cells are neighbours in Moran's I
    permutations: int = 999  # how many for Moran's I, and how many noise maps for its floor
    seed: int = 0  # seed of permutations, noise and splits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fwhm_mm or min(self.fwhm_mm) < 0 or len(set(self.fwhm_mm)) < len(self.fwhm_mm):
            raise UserError(f"fwhm_mm = {list(self.fwhm_mm)} must be different widths of at least 0")
        check_at_least("permutations", self.permutations, 1)
        if not 0 < self.unit_distance_mm < float("inf"):
            raise UserError(f"unit_distance_mm = {self.unit_distance_mm} must be above 0")


@dataclass(frozen=True, kw_only=True)
class MapConfig(PoolingConfig, MoranConfig):
    """How maps of contrasts between items are made and tested."""

    alpha: float = 0.05  # level of the false discovery rate over all units of all sheets
    shuffles: int = 300  # of the items' labels: what a map's Moran's I is compared with

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)
        check_at_least("shuffles", self.shuffles, 1)


def check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UserError(f"alpha = {alpha} must be between 0 and 1")


def protocol_of(cfg: EvalConfig) -> dict[str, Any]:
    """The settings that numbers depend on: all but where things lie and how they are shown."""
    return {key: value for key, value in asdict(cfg).items() if key not in ELSEWHERE}


# ---- the model -----------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model with its sheets, and where its results go."""

    label: str  # what figures and tables call it
    model: "GPT"  # in eval mode, on its device
    positions: dict[str, np.ndarray]  # sheet -> (n_units, 2)
    results: Path  # folder
    checkpoint: Path  # folder of its weights
    settings: dict[str, Any] | None  # of the run it comes from, where that is known
    weights_sha256: str

    @property
    def sheets(self) -> list[str]:
        return list(self.positions)

    @property
    def layout(self) -> topo.Layout:
        return topo.layout_of(self.sheets, self.model.cfg.n_layer)

    @property
    def grid(self) -> tuple[int, int]:
        return topo.grid_of(self.positions[self.sheets[0]])

    @property
    def n_units(self) -> int:
        """Of a sheet."""
        return len(self.positions[self.sheets[0]])

    def on_layout(self, layout: topo.Layout) -> "Subject":
        """The same model with these sheets, their units in order where they are not its own."""
        from topogpt.spatial.layout import laid_out

        if layout == self.layout:
            return self
        return self._replace(positions=laid_out(self.model.cfg, layout, "identity"))

    def on_grid(self, values: Mapping[str, np.ndarray] | np.ndarray) -> np.ndarray:
        """Values of units, sheet -> (..., n_units) or (S, ..., n_units), as maps (S, ..., h, w)."""
        if isinstance(values, np.ndarray):
            values = dict(zip(self.sheets, values, strict=True))
        return np.stack([topo.on_grid(values[sheet], p) for sheet, p in self.positions.items()])


def load_subjects(cfg: EvalConfig) -> list[Subject]:
    """The model, and its control on the same sheets; UserError where that has another shape."""
    model = load_subject(cfg, cfg.run)
    if cfg.control is None:
        return [model]
    control = load_subject(replace(cfg, layout=model.layout), cfg.control)
    shapes = [
        {key: getattr(s.model.cfg, key) for key in ("n_layer", "n_embd", "vocab_size")}
        | {"sheets of": "{}x{}".format(*s.grid)}
        for s in (model, control)
    ]
    for key, value in shapes[0].items():
        if shapes[1][key] != value:
            raise UserError(
                f"{model.label} has {key} {value}, but control {control.label} has {shapes[1][key]}; give "
                "its matched control"
            )
    return [model, control]


def load_subject(cfg: EvalConfig, source: str) -> Subject:
    from topogpt.distributed import pick_device
    from topogpt.sharing.load import load_model

    loaded = load_model(source, cfg.checkpoint, pick_device(cfg.device))
    positions = positions_on(cfg, source, loaded)
    settings, hashed = settings_of(loaded.folder), weights_hash(loaded.folder)
    results = Path(cfg.results_dir) if cfg.results_dir else results_folder(source)
    if loaded.positions and positions.keys() != loaded.positions.keys():  # beside those of its own sheets
        results = results / topo.layout_of(positions, loaded.model.cfg.n_layer)
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{results} cannot be made: {error.strerror}; choose another --results_dir") from None
    label = settings["run_name"] if settings else source.rstrip("/")
    return Subject(label, loaded.model, positions, results, loaded.folder, settings, hashed)


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Settings of the run that a checkpoint or an exported folder comes from, where it says."""
    import yaml

    exported = folder / "training_config.yaml"
    if (folder / "state.json").is_file():
        return read_state(folder)["config"]
    if not exported.is_file():
        return None
    try:
        settings = yaml.safe_load(exported.read_text(encoding="utf-8"))
        settings["run_name"], settings["model"], settings["topo"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{exported} is damaged: {reason}; export the model again") from None
    return settings


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights, which a run's checkpoint has in its state.json, compared when it was loaded."""
    if (folder / "state.json").is_file() and (known := read_state(folder).get("sha256")):
        return known["model.safetensors"]
    return sha256(*sorted(folder.glob("model*.safetensors")))


def results_folder(source: str) -> Path:
    """evals/ inside a run or an exported folder; for a repository of the Hub a folder of its name in out/."""
    folder = Path(source) if Path(source).is_dir() else Path("out") / source.replace("/", "--")
    return folder / "evals"


def positions_on(cfg: EvalConfig, source: str, loaded: "LoadedModel") -> dict[str, np.ndarray]:
    """Positions on the sheets that cfg.layout names: the model's own, or as --positions says."""
    from topogpt.spatial.layout import laid_out

    shape, own = loaded.model.cfg, loaded.positions
    own_layout = topo.layout_of(own, shape.n_layer) if own else None
    layout = cfg.layout or own_layout or "per_branch"
    if layout == own_layout:
        return own
    kind = cfg.positions or ("identity" if own or layout == "c_fc" else None)
    if kind is None:
        raise UserError(
            f"{source} has no positions of its units; give --positions identity (unit i in cell i), "
            "permuted, or a folder that holds topography.safetensors"
        )
    if kind in ("identity", "permuted"):
        return laid_out(shape, layout, kind)
    expected = laid_out(shape, layout, "identity")
    try:
        positions = topography.load_topography(kind).positions
    except ValueError as error:
        raise UserError(f"positions: {error}") from None
    here, there = ((len(some), len(next(iter(some.values()))), list(some)) for some in (expected, positions))
    if here != there:
        raise UserError(
            f"positions = {kind} are of {there[0]} sheets of {there[1]} units, but {source} has {here[0]} "
            f"of {here[1]}"
        )
    return positions
