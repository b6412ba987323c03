"""What a model costs, by arithmetic alone: parameters, FLOPs, memory, bytes on disk. No torch, no weights.

    cost = Cost(cfg)        # a TrainConfig
    cost.n_parameters, cost.training_flops, cost.memory(batch).total

Counts of parameters, FLOPs and bytes on disk are exact (optimizer.pt: to 1 %); memory is an estimate, of a
step that is not compiled.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from topogpt import topo, topography
from topogpt.settings import GPTConfig, TopoConfig, TrainConfig

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
NAMES_IN_SAFETENSORS = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "int16": "I16",
}  # fmt: skip
CHUNK_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 24}  # logits at a time: 1 GB in fp32; 64 MB
ADAMW_BYTES = 8  # two fp32 moments a parameter
PER_PARAMETER_IN_PT = 840  # bytes that torch.save adds for the three tensors of a parameter
PER_PT = 2_000  # and for a file
TOKENIZER_BYTES = 3_606_820  # GPT-2's tokenizer in the forms that transformers reads

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(cfg: GPTConfig) -> Shapes:
    """Shape of every weight by its name, the tied head once, as transformer.wte.weight."""
    c, has_norms = cfg.n_embd, cfg.norm == "layernorm"
    block = {"ln_1": (c,), "ln_2": (c,)} if has_norms else {}
    block |= {"attn.c_attn": (3 * c, c), "attn.c_proj": (c, c)}
    block |= {"mlp.c_fc": (cfg.n_hidden, c), "mlp.c_proj": (c, cfg.n_hidden)}
    modules = {f"h.{i}.{name}": shape for i in range(cfg.n_layer) for name, shape in block.items()}
    found: Shapes = {"wte.weight": (cfg.vocab_size, c)}
    if cfg.position == "learned":
        found["wpe.weight"] = (cfg.block_size, c)
    for name, shape in (modules | ({"ln_f": (c,)} if has_norms else {})).items():
        found[f"{name}.weight"] = shape
        if cfg.bias:
            found[f"{name}.bias"] = shape[:1]
    found = {f"transformer.{name}": shape for name, shape in found.items()}
    return found if cfg.tied else found | {"lm_head.weight": (cfg.vocab_size, c)}


def stock_shapes(cfg: GPTConfig) -> Shapes:
    """Shape of every weight of an exported model: GPT-2 has biases everywhere, Arcee weights of norms."""
    if cfg.position == "learned":
        return weight_shapes(replace(cfg, bias=True))
    c, n = cfg.n_embd, cfg.n_hidden
    block = {f"self_attn.{part}_proj": (c, c) for part in "qkvo"}
    block |= {"mlp.up_proj": (n, c), "mlp.down_proj": (c, n)}
    found: Shapes = {"model.embed_tokens.weight": (cfg.vocab_size, c), "model.norm.weight": (c,)}
    if not cfg.tied:
        found["lm_head.weight"] = (cfg.vocab_size, c)
    for i in range(cfg.n_layer):
        at = f"model.layers.{i}"
        for name, shape in block.items():
            found[f"{at}.{name}.weight"] = shape
            if cfg.bias:
                found[f"{at}.{name}.bias"] = shape[:1]
        found |= {f"{at}.{name}_layernorm.weight": (c,) for name in ("input", "post_attention")}
    return found


class Part(NamedTuple):
    """Parameters of one kind of part; FLOPs a token of its forward pass."""

    name: str
    per_layer: int | None  # parameters in one block; None outside the blocks
    parameters: int
    flops: int  # forward, 2 for a multiplication with its addition


class Memory(NamedTuple):
    """Bytes on one device at the worst moment of a step."""

    weights: int  # fp32 weights, gradients and AdamW's moments
    casts: int  # copies of the weights in the dtype of the matrix products
    activations: int  # kept for the backward pass
    losses: int  # while they are taken: a chunk of logits and its gradient, what the sheets show

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Cost:
    """Everything that follows from a config; `dtype` of the matrix products and `device` as on a GPU."""

    cfg: TrainConfig
    device: str = "cuda"

    @property
    def dtype(self) -> str:
        usual = "bfloat16" if self.device == "cuda" else "float32"
        return usual if self.cfg.dtype == "auto" else self.cfg.dtype

    # ---- parameters and FLOPs

    @cached_property
    def shapes(self) -> Shapes:
        return weight_shapes(self.cfg.model)

    @cached_property
    def parts(self) -> list[Part]:
        m = self.cfg.model
        n_layer, c, t = m.n_layer, m.n_embd, m.block_size

        def count(*words: str) -> int:
            return sum(
                math.prod(shape) for name, shape in self.shapes.items() if any(word in name for word in words)
            )

        attention, mlp, norms = count(".attn."), count(".mlp."), count(".ln_1.", ".ln_2.")
        scores = 4 * c * t  # every query with every key, and the values weighted by that: 2 C T each
        logits = 2 * c * m.vocab_size
        head = [Part("token embedding, also the head", None, count(".wte."), logits)]
        if not m.tied:
            head = [
                Part("token embedding", None, count(".wte."), 0),
                Part("head", None, count("lm_head."), logits),
            ]
        rest = [
            Part("position embedding", None, count(".wpe."), 0),
            Part("attention", attention // n_layer, attention, n_layer * (2 * 4 * c * c + scores)),
            Part("MLP", mlp // n_layer, mlp, n_layer * 2 * 2 * c * m.n_hidden),
            Part("norms", norms // n_layer, norms, 0),
            Part("last norm", None, count(".ln_f."), 0),
        ]
        return head + [part for part in rest if part.parameters]

    @cached_property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def n_multiplied(self) -> int:
        """Parameters without those that are looked up: positions, and an embedding that is not the head."""
        looked_up = ["transformer.wpe.weight"] + ([] if self.cfg.model.tied else ["transformer.wte.weight"])
        return self.n_parameters - sum(math.prod(self.shapes.get(name, (0,))) for name in looked_up)

    @property
    def moments(self) -> int:
        """Bytes of the optimiser's moments: two a parameter, and one for Muon's matrices."""
        of_blocks = sum(math.prod(s) for name, s in self.shapes.items() if ".h." in name and len(s) == 2)
        return ADAMW_BYTES * self.n_parameters - (4 * of_blocks if self.cfg.optim.name == "muon" else 0)

    @property
    def forward_flops(self) -> int:
        """Of the matrix products, per token."""
        return sum(part.flops for part in self.parts)

    @property
    def training_flops(self) -> int:
        """Forward and backward pass, which takes twice the forward's products."""
        return 3 * self.forward_flops

    @property
    def palm_flops(self) -> int:
        """6N + 12 L C T (PaLM, appendix B), with N without what is only looked up: what MFU is taken from."""
        m = self.cfg.model
        return 6 * self.n_multiplied + 12 * m.n_layer * m.n_embd * m.block_size

    @property
    def spatial_flops(self) -> int:
        """Of the spatial loss and its gradient per token, on a GPU: Gram matrices, and one dense product."""
        if "topolm" not in self.cfg.topo.objectives:
            return 0
        c, (k, u) = self.n_units, self.chosen
        gram = k * u * u if k * u <= c else c * c
        return self.n_sheets * 2 * (gram + self.columns * c)

    # ---- sheets

    @property
    def n_sheets(self) -> int:
        return len(self.positions)

    @property
    def n_units(self) -> int:
        """Of a sheet."""
        return math.prod(self.cfg.sheet_shape)

    @property
    def n_neighbourhoods(self) -> int:
        return len(topo.neighbourhood_cells(*self.cfg.sheet_shape, self.cfg.topo.radius))

    @property
    def chosen(self) -> tuple[int, int]:
        """Neighbourhoods of a sheet that a micro-step looks at, and the units of each."""
        t: TopoConfig = self.cfg.topo
        return min(t.neighbourhoods or self.n_neighbourhoods, self.n_neighbourhoods), (2 * t.radius - 1) ** 2

    @property
    def columns(self) -> int:
        """Columns of a sheet that the spatial loss copies."""
        k, u = self.chosen
        return min(k * u, self.n_units)

    # ---- bytes

    @property
    def kept_per_token(self) -> int:
        """Bytes kept of a token until the backward pass (eager, with fused attention).

        The residual stream before each norm is fp32; what the matrix products read, and what attention and
        GELU need, is in `dtype`: 6 widths a layer (norm, q, k, v, mixture, norm) and the MLP before and after
        GELU.
        """
        m, width = self.cfg.model, WIDTH[self.dtype]
        c, n_head = m.n_embd, m.n_head
        per_layer = 2 * 4 * c + (6 * c + 2 * m.n_hidden) * width + 4 * n_head + 2 * 8
        last = 4 * c + c * width + 8  # before and after the last norm
        if m.dropout:
            mask = c * (1 if self.device == "cuda" else width)
            per_layer, last = per_layer + 2 * mask, last + mask
            if self.device != "cuda":  # no fused attention: three times its weights
                per_layer += 12 * n_head * m.block_size - 4 * n_head
        return m.n_layer * per_layer + last

    @property
    def shown_per_token(self) -> int:
        """Bytes of what the sheets show of a token, which the spatial loss reads at the end."""
        m = self.cfg.model
        topo, branches = self.cfg.topo, 2 * m.n_layer * m.n_embd * WIDTH[self.dtype]
        if "topolm" not in topo.objectives or topo.layout == "c_fc":  # which the GELU keeps anyway
            return 0
        side_by_side = branches if topo.layout == "one_sheet" else 0
        return side_by_side + (0 if m.post_residual else branches)

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values of a token while text is generated, in fp32 as sample.py does."""
        return 2 * self.cfg.model.n_layer * self.cfg.model.n_embd * WIDTH["float32"]

    def memory(self, batch: int) -> Memory:
        """Of a training step with `batch` sequences on the device."""
        m, width = self.cfg.model, WIDTH[self.dtype]
        n, head = batch * m.block_size, m.vocab_size * m.n_embd
        narrow = 0 if width == 4 else width
        rows = min(n, max(1, CHUNK_ELEMENTS[self.device] // m.vocab_size))
        # logits and log-probabilities of a chunk, while the latter of the chunk before are still there
        logits = m.vocab_size * max(8 * rows, 8 * min(rows, n - rows) + (4 + narrow) * rows)
        gradient = head * (4 + narrow) + n * m.n_embd * width
        shown, columns = n * self.shown_per_token, 0
        if "topolm" in self.cfg.topo.objectives:
            columns = self.n_sheets * 4 * self.columns * (n + self.n_units)
        return Memory(
            weights=self.n_parameters * (4 + 4) + self.moments,
            casts=(self.n_multiplied - head) * narrow,
            activations=n * self.kept_per_token,
            losses=max(logits + gradient + shown, columns + gradient + shown, columns + 2 * 4 * head),
        )

    # ---- files

    @cached_property
    def checkpoint_files(self) -> dict[str, int]:
        """Bytes of model.safetensors and optimizer.pt of a checkpoint."""
        tensors = {name: ("float32", shape) for name, shape in self.shapes.items()}
        tensors |= {topography.PREFIX + name: ("int16", shape) for name, shape in self.positions.items()}
        moments = self.moments + len(self.shapes) * PER_PARAMETER_IN_PT + PER_PT
        return {"model.safetensors": safetensors_size(tensors, {"format": "pt"}), "optimizer.pt": moments}

    @property
    def positions(self) -> Shapes:
        names = topo.sheet_names(self.cfg.model.n_layer, self.cfg.topo.layout)
        return {sheet: (self.n_units, 2) for sheet in names}

    def export_files(self, dtype: str = "float32") -> dict[str, int]:
        """Bytes of the tensors of an exported folder, its padding rows apart."""
        m, pt = self.cfg.model, {"format": "pt"}
        stored = stock_shapes(replace(m, vocab_size=m.n_vocab))
        found = {"model.safetensors": safetensors_size({k: (dtype, v) for k, v in stored.items()}, pt)}
        if m.n_vocab < m.vocab_size:
            rows = (dtype, (m.vocab_size - m.n_vocab, m.n_embd))
            padding = {k: rows for k in stored if k.endswith(("wte.weight", "tokens.weight", "head.weight"))}
            found["padding.safetensors"] = safetensors_size(padding, pt)
        sheets = {name: ("int32", shape) for name, shape in self.positions.items()}
        found["topography.safetensors"] = safetensors_size(sheets, {"format": topography.FORMAT})
        return found


def safetensors_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> int:
    """Bytes of a safetensors file: a header that names every tensor with dtype, shape and place, and data."""
    width = {"int32": 4, "int16": 2, **WIDTH}
    order = sorted(tensors.items(), key=lambda item: (-width[item[1][0]], item[0]))
    header, start = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in order:
        end = start + width[dtype] * math.prod(shape)
        kind = NAMES_IN_SAFETENSORS[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + start
