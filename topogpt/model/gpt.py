"""The GPT: GPT-2's architecture, by default without biases and at TopoLM's size.

`GPT(cfg)(tokens, targets) -> Output(logits, loss, activations)`. The model knows neither sheets nor spatial
losses: it returns the named outputs of its branches, and the objective of training adds what it likes.
Parameter names are GPT-2's, so a checkpoint maps onto `transformers.GPT2LMHeadModel` name by name.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topogpt.model.cross_entropy import linear_cross_entropy
from topogpt.model.generate import Cache, LayerCache, generate
from topogpt.settings import GPTConfig
from topogpt.topo import ONE_SHEET, sheet_names

__all__ = ["GPT", "GPTConfig", "Output", "sheet_names"]


class Output(NamedTuple):
    logits: Tensor | None  # (B, T, vocab_size); (B, 1, vocab_size) with last_only; None without keep_logits
    loss: Tensor | None  # scalar: mean cross-entropy in nats over targets that are not -1
    activations: dict[str, Tensor]  # name -> (B, T, n_units), those that were asked for


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, in float32, without parameters (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def new_norm(cfg: GPTConfig) -> nn.Module:
    return RMSNorm() if cfg.norm == "rmsnorm" else nn.LayerNorm(cfg.n_embd, bias=cfg.bias)


class Rotation(NamedTuple):
    """What rotary positions turn queries and keys by (RoFormer, arXiv 2104.09864): (T, D / 2) each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position: Tensor, width: int) -> "Rotation":
        """Of positions (T,) and heads of this width: pair i turns by position / 10000^(2 i / width)."""
        pair = torch.arange(0, width, 2, device=position.device, dtype=torch.float32)
        angle = position.float()[:, None] * (1.0 / 10000 ** (pair / width))
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Turn (B, H, T, D); a pair is unit i of a head and unit i + D / 2, as in Llama."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.scale = (2 * cfg.n_layer) ** -0.5 if cfg.scale_attention else None
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.resid_dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation | None = None) -> Tensor:
        b, t, c = x.shape
        heads = (b, t, self.n_head, c // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(c, 2))  # (B, H, T, D)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        # A cached step asks from the last position only, which may see everything; so may nothing be masked.
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=t == k.shape[2]
        )
        y = y.transpose(1, 2).reshape(b, t, c)
        y = self.c_proj(y)
        return self.resid_dropout(y if self.scale is None else self.scale * y)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.gelu_approximation = "tanh" if cfg.gelu == "tanh" else "none"
        self.c_fc = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Into seen go the outputs of c_fc, (B, T, n_hidden)."""
        hidden = self.c_fc(x)
        if seen is not None:
            seen.append(hidden)
        return self.dropout(self.c_proj(F.gelu(hidden, approximate=self.gelu_approximation)))


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.post_residual = cfg.post_residual
        self.ln_1 = new_norm(cfg)
        self.attn = Attention(cfg)
        self.ln_2 = new_norm(cfg)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream and what the attention and the MLP show, each (B, T, n_embd).

        Into seen go the outputs of c_fc.
        """
        attn = self.attn(self.ln_1(x), cache, rotation)
        middle = x + attn
        mlp = self.mlp(self.ln_2(middle), seen)
        out = middle + mlp
        return (out, middle, out) if self.post_residual else (out, attn, mlp)


class GPT(nn.Module):
    """GPT-2's architecture with the sizes of a GPTConfig, initialised at random (N(0, 0.02))."""

    generate = generate

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),
                **({"wpe": nn.Embedding(cfg.block_size, cfg.n_embd)} if cfg.position == "learned" else {}),
                drop=nn.Dropout(cfg.dropout),
                h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
                ln_f=new_norm(cfg),
            )
        )
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # N(0, 0.02); what writes into the residual stream is scaled by depth (GPT-2)
                scale = (2 * cfg.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def n_parameters(self, *, position_embedding: bool = True) -> int:
        """Number of parameters, the tied head counted once and adapters, which are merged, not at all."""
        n = sum(p.numel() for name, p in self.named_parameters() if ".lora_" not in name)
        learned = self.cfg.position == "learned"
        return n if position_embedding or not learned else n - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> float:
        """Floating-point operations per trained token: 6N + 12 L C T (PaLM, appendix B); frozen: 4N.

        N leaves out what is looked up and not multiplied: positions, and an embedding that is not the head.
        """
        attention = 12 * self.cfg.n_layer * self.cfg.n_embd * self.cfg.block_size
        looked_up = ["transformer.wpe.weight"] + ([] if self.cfg.tied else ["transformer.wte.weight"])
        counted = (p for name, p in self.named_parameters() if name not in looked_up)
        return sum((6 if p.requires_grad else 4) * p.numel() for p in counted) + attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        activations: bool | Sequence[str] = False,
        keep_logits: bool = True,
        last_only: bool = False,
        cache: Cache | None = None,
    ) -> Output:
        """Predict the next tokens.

        Args:
            tokens: (B, T) int64, T at most block_size (cached positions counted in); rotary positions go on
                beyond it, though nothing was trained there.
            targets: (B, T) int64, -1 where no loss is wanted.
            activations: names of those to return, as topo.sheet_names gives them: outputs of branches
                (layer.3.attn, layer.3.mlp), of c_fc (layer.3.fc), or of all branches side by side (all);
                True: of every branch.
            keep_logits: without them the loss is taken chunk by chunk, and they are never stored (training).
            last_only: whether to compute logits for the last position only.
            cache: keys and values of the tokens before these; extended by these.
        """
        start = cache.length if cache is not None else 0
        t = tokens.shape[1]
        position, rotation = torch.arange(start, start + t, device=tokens.device), None
        x = self.transformer.wte(tokens)  # (B, T, C)
        if self.cfg.position == "rope":
            rotation = Rotation.at(position, self.cfg.n_embd // self.cfg.n_head)
        elif start + t > self.cfg.block_size:
            raise ValueError(f"{start + t} tokens do not fit the context of {self.cfg.block_size}")
        else:
            x = x + self.transformer.wpe(position)
        x = self.transformer.drop(x)
        branches = sheet_names(self.cfg.n_layer)
        wanted = branches if activations is True else activations or ()
        kept = [*wanted, *branches] if ONE_SHEET in wanted else wanted
        named = {}
        for i, block in enumerate(self.transformer.h):
            seen = [] if f"layer.{i}.fc" in kept else None
            x, attn, mlp = block(x, cache.layers[i] if cache is not None else None, rotation, seen)
            shown = {f"layer.{i}.attn": attn, f"layer.{i}.mlp": mlp}
            if seen:
                shown[f"layer.{i}.fc"] = seen[0]
            named |= {name: values for name, values in shown.items() if name in kept}
        if ONE_SHEET in wanted:
            named[ONE_SHEET] = torch.cat([named[name] for name in branches], dim=-1)
        named = {name: named[name] for name in wanted}
        x = self.transformer.ln_f(x[:, -1:] if last_only else x)
        if targets is not None and not keep_logits:
            loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
            return Output(None, loss, named)
        logits, loss = self.lm_head(x), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return Output(logits, loss, named)
