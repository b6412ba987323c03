"""What a notebook asks of a model: its activations as maps, a lesion, what it costs.

    run = topogpt.load("out/demo")                                       # or USER/NAME, or an exported folder
    maps = topogpt.activations(run, ["The cortex is a sheet."])          # sheet -> (tokens, height, width)
    with topogpt.lesion(run, "layer.1.mlp"):
        run.cross_entropy(["The cortex is a sheet."])

`import topogpt` has the names.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from topogpt import drawing, topo
from topogpt.analysis import measures
from topogpt.analysis.lesions import hooked
from topogpt.model.gpt import GPT
from topogpt.runs.folder import read_metrics
from topogpt.sharing.load import load_model
from topogpt.spatial.layout import Kind, laid_out
from topogpt.text import tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Text = str | Sequence[int] | np.ndarray  # or its tokens


class Run:
    """A model with its sheets: what `load` returns, or made of a GPT of one's own.

    Args:
        model: it is put in eval mode.
        positions: sheet -> (n_units, 2), row and column of each unit; or permuted (at random, seed 0) or
            identity (unit i in cell i, row by row).
        layout: sheets of permuted or identity positions: per_branch (the outputs of each attention and MLP),
            c_fc (of each mlp.c_fc), or one_sheet (of all branches together).
        encode: text to tokens; None: GPT-2's, whose vocabulary is found on this machine, or fetched once.
        decode: tokens to text; None: GPT-2's.
        folder: of the checkpoint or the exported folder, where there is one.

    Raises:
        ValueError: the positions are not those of the model's sheets.
    """

    def __init__(
        self,
        model: GPT,
        positions: Mapping[str, np.ndarray] | Kind = "permuted",
        *,
        layout: topo.Layout = "per_branch",
        encode: Callable[[str], Sequence[int] | np.ndarray] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        folder: Path | None = None,
    ) -> None:
        given = positions
        if isinstance(given, str):
            given = laid_out(model.cfg, layout, given)
        layout = topo.layout_of(given, model.cfg.n_layer)
        expected = laid_out(model.cfg, layout, "identity")
        shapes = {p.shape for p in expected.values()}
        if {p.shape for p in given.values()} != shapes:
            raise ValueError(f"positions must be arrays {shapes.pop()}: {', '.join(expected)}")
        self.model = model.eval()
        self.positions: dict[str, np.ndarray] = {sheet: given[sheet] for sheet in expected}
        self.folder = folder
        self._encode, self._decode = encode, decode

    def __repr__(self) -> str:
        h, w = self.grid
        where = f" from {self.folder}" if self.folder else ""
        return f"Run({self.model.n_parameters():,} parameters, {len(self.sheets)} sheets of {h}x{w}{where})"

    @property
    def sheets(self) -> list[str]:
        """Names of the sheets, in forward order: layer.0.attn, layer.0.mlp, ..."""
        return list(self.positions)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a sheet, in cells."""
        return topo.grid_of(self.positions[self.sheets[0]])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of the run's metrics.jsonl (step, split, cross_entropy, moran, ...); [] without one."""
        folders = [] if self.folder is None else [self.folder, *self.folder.resolve().parents[:2]]
        return next((found for folder in folders if (found := read_metrics(folder))), [])

    @cached_property
    def gpt2(self) -> tokenizer.Tokenizer:
        """GPT-2's tokenizer."""
        return tokenizer.load()

    def encode(self, text: Text) -> np.ndarray:
        """Tokens of a text, (T,) int64; tokens are checked and given back.

        Raises:
            ValueError: it has no tokens, more than the context holds, or some that the model does not know.
        """
        encode = self._encode or (lambda words: self.gpt2.encode(words))
        tokens = np.asarray(encode(text) if isinstance(text, str) else text, dtype=np.int64)
        n, cfg = len(tokens), self.model.cfg
        said = repr(text if len(str(text)) <= 40 else str(text)[:37] + "...")
        if not 1 <= n <= cfg.block_size:
            raise ValueError(f"{said} has {n} tokens; the model reads 1 to {cfg.block_size}")
        if not 0 <= tokens.min() <= tokens.max() < cfg.vocab_size:
            raise ValueError(f"{said} has token {tokens.max()}; the model knows 0 to {cfg.vocab_size - 1}")
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of tokens."""
        ids = [int(token) for token in tokens]
        return self._decode(ids) if self._decode else self.gpt2.decode(ids)

    def tokens(self, texts: Text | Sequence[Text]) -> list[str]:
        """The tokens of texts as words, one for each map of `activations`."""
        return [self.decode([token]) for text in as_list(texts) for token in self.encode(text)]

    def activations(self, texts: Text | Sequence[Text]) -> dict[str, np.ndarray]:
        """`topogpt.activations` of this run."""
        return activations(self, texts)

    def lesion(self, units: "Units", fill: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """`topogpt.lesion` of this run."""
        return lesion(self, units, fill)

    @torch.inference_mode()
    def cross_entropy(self, texts: Text | Sequence[Text]) -> float:
        """Nats per token over all tokens but each text's first, which nothing predicts.

        Raises:
            ValueError: a text has a single token.
        """
        total, count = 0.0, 0
        for text in as_list(texts):
            row = torch.from_numpy(self.encode(text)).to(self.model.device)[None]
            if row.shape[1] < 2:
                raise ValueError(f"{text!r} has 1 token; to predict one takes two")
            loss = self.model(row[:, :-1], row[:, 1:]).loss
            total, count = total + loss.item() * (row.shape[1] - 1), count + row.shape[1] - 1
        return total / count

    def sample(
        self, prompt: Text, max_new_tokens: int = 50, *, temperature: float = 1.0, seed: int = 0
    ) -> str:
        """The prompt and what the model writes after it; temperature 0: the likeliest token each time."""
        start = torch.from_numpy(self.encode(prompt)).to(self.model.device)[None]
        generator = torch.Generator(self.model.device).manual_seed(seed)
        new = self.model.generate(
            start,
            max_new_tokens,
            temperature=temperature,
            n_vocab=self.model.cfg.n_vocab,
            generator=generator,
        )
        return self.decode(new[0].tolist())


def load(
    source: str | Path,
    checkpoint: str = "best",
    *,
    positions: Mapping[str, np.ndarray] | Kind | None = None,
    layout: topo.Layout | None = None,
    device: str = "cpu",
) -> Run:
    """A trained model with its sheets.

    Args:
        source: a run (out/NAME), an exported folder (out/NAME/hf), or USER/NAME on the Hub.
        checkpoint: of a run: best, last or step-N; on the Hub: the tag step-N.
        positions: for a model without, such as a stock GPT-2, or instead of its own: see `Run`.
        layout: sheets to look at instead of its own, in order unless positions says otherwise: see `Run`.
        device: where it computes: cpu, cuda, mps.

    Raises:
        topogpt.UserError: nothing of this name is there, it is damaged, or no GPT of this shape.
        ValueError: the model has no positions, and none are given.
    """
    loaded = load_model(source, checkpoint, device)
    chosen = positions
    if chosen is None:
        chosen = loaded.positions if layout is None else "identity"
    if not chosen:
        raise ValueError(f"{source} has no positions of its units; give positions='identity' or 'permuted'")
    return Run(loaded.model, chosen, layout=layout or "per_branch", folder=loaded.folder)


@torch.inference_mode()
def activations(run: Run, texts: Text | Sequence[Text]) -> dict[str, np.ndarray]:
    """What every sheet shows on every token of some texts.

    Args:
        texts: a text or several, each read by itself, from its first token; or their tokens. Training
            documents begin with GPT-2's end-of-text token 50256; none is added here.

    Returns:
        sheet -> (tokens, height, width) float32, the tokens of all texts one after the other: the output of
            each branch before it is added to the residual stream (after, with post_residual), in no unit.

    Raises:
        ValueError: there is no text, or one is empty or longer than the context.
    """
    named: dict[str, list[np.ndarray]] = {sheet: [] for sheet in run.sheets}
    lists = [run.encode(text) for text in as_list(texts)]
    for tokens in lists:
        row = torch.from_numpy(tokens).to(run.model.device)[None]
        shown = run.model(row, activations=run.sheets, last_only=True).activations
        for sheet in named:
            named[sheet].append(shown[sheet][0].float().cpu().numpy())
    return {sheet: topo.on_grid(np.concatenate(named[sheet]), p) for sheet, p in run.positions.items()}


Units = str | Sequence[str] | Mapping[str, Sequence[int] | np.ndarray]  # what to lesion; see `lesion`


@contextlib.contextmanager
def lesion(run: Run, units: Units, fill: float = 0.0) -> Iterator[None]:
    """Silence units while the `with` block runs: they write `fill` into the residual stream, for every token.

    Args:
        units: a sheet or several, all of their units; or sheet -> which units: a mask (n_units,), a mask on
            the grid (height, width), or numbers of units.
        fill: what lesioned units show.

    Raises:
        ValueError: there is no such sheet or unit, or a mask has another shape.
    """
    names = [units] if isinstance(units, str) else units
    chosen: Mapping[str, Any] = units if isinstance(units, Mapping) else dict.fromkeys(names, slice(None))
    device = run.model.device
    masks = {s: torch.from_numpy(mask_of(run, s, which)).to(device) for s, which in chosen.items()}

    def silence(mask: Tensor, out: Tensor, units: slice) -> Tensor:
        return out.masked_fill(mask[units], fill)

    with hooked(run.model, list(masks), [partial(silence, mask) for mask in masks.values()]):
        yield


def mask_of(run: Run, sheet: str, which: Any) -> np.ndarray:
    """Which units of a sheet are meant, (n_units,) bool."""
    if sheet not in run.positions:
        raise ValueError(f"{sheet!r} is no sheet; they are {', '.join(run.sheets)}")
    position, (h, w) = run.positions[sheet], run.grid
    mask = np.zeros(len(position), bool)
    if not isinstance(which, slice):
        which = np.asarray(which)
        if which.dtype == bool:
            if which.shape not in (mask.shape, (h, w)):
                raise ValueError(f"{sheet}: the mask has shape {which.shape}, not {mask.shape} or {(h, w)}")
            which = which if which.shape == mask.shape else which[position[:, 0], position[:, 1]]
        elif which.size and not (which.dtype.kind in "iu" and 0 <= which.min() <= which.max() < len(mask)):
            raise ValueError(f"{sheet}: units are numbers from 0 to {len(mask) - 1}")
        elif not which.size:
            which = which.astype(np.int64)
    mask[which] = True
    return mask


class Floor(NamedTuple):
    """Moran's I of maps without any order."""

    mean: float
    sd: float


def morans_i_floor(
    grid: tuple[int, int],
    fwhm_mm: float = 0.0,
    *,
    unit_distance_mm: float = 1.0,
    maps: int = 999,
    seed: int = 0,
) -> Floor:
    """Moran's I that white noise reaches on a grid, smoothed as one's maps were: read every value beside it.

    Raw noise has -1 / (n_units - 1) (Moran 1950); smoothed at a FWHM of 2 mm it reaches about 0.6 on 28x28.

    Args:
        grid: height and width, in cells.
        fwhm_mm: full width at half maximum of the smoothing (`smooth`), in mm; 0: none.
        unit_distance_mm: between neighbouring cells.
        maps: how many are drawn.
        seed: of the noise.
    """
    smoothed = partial(measures.smooth, fwhm_mm=fwhm_mm, unit_distance_mm=unit_distance_mm)
    values = topo.noise_morans(*grid, maps, seed, readout=smoothed)
    return Floor(float(values.mean()), float(values.std()))


class Picture:
    """A figure that a notebook shows."""

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure

    def savefig(self, path: str | Path, **more: Any) -> None:
        """Write it to a file, as matplotlib does."""
        self.figure.savefig(path, **more)

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.figure.savefig(png, format="png")
        return png.getvalue()


def draw(maps: Mapping[str, np.ndarray], *, token: int = -1, title: str = "") -> Picture:
    """A picture of every sheet: a notebook shows it, `.savefig(path)` keeps it.

    Args:
        maps: sheet -> (tokens, height, width), as `activations` returns it, or (height, width). Each is
            standardised, so that colours are standard deviations from its own mean.
        token: which of the tokens is drawn.

    Raises:
        ImportError: matplotlib is missing (pip install 'topogpt[figures]').
        ValueError: there is no map, or they are of several shapes.
    """
    if not maps:
        raise ValueError("there is no map to draw")
    chosen = {s: drawing.standardised(m[token] if m.ndim == 3 else m) for s, m in maps.items()}
    if len({m.shape for m in chosen.values()}) > 1:
        raise ValueError("the maps are of several shapes; draw those of one shape together")
    try:
        figure = drawing.draw_sheets([drawing.Maps("", chosen)], title, "standard deviations", drawing.LIMIT)
    except ModuleNotFoundError:
        raise ImportError("matplotlib is not installed; pip install 'topogpt[figures]'") from None
    return Picture(figure)


def as_list(texts: Text | Sequence[Text]) -> list[Text]:
    """Several texts as they are, one in a list; tokens of a text are numbers."""
    if isinstance(texts, str) or (len(texts) and isinstance(texts[0], int | np.integer)):
        return [texts]
    if not len(texts):
        raise ValueError("there is no text")
    return list(texts)
