"""Writing text with a model: one token after the other, with the keys and values of those before kept."""

import torch
from torch import Tensor, nn

from topogpt.settings import N_VOCAB


@torch.no_grad()
def generate(
    model: nn.Module,  # a GPT
    tokens: Tensor,  # (B, T)
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_vocab: int = N_VOCAB,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `tokens`; return (B, T + new) int64.

    Keys and values are cached while the text fits the context; beyond it each step sees the last
    block_size tokens afresh with learned positions, and rotary ones go on. Temperature 0 is greedy. Only the
    first n_vocab tokens can be drawn: the rest is padding. With `stop`, ends once every row has produced that
    token.
    """
    was_training = model.training
    model.eval()
    cache = Cache(model.cfg.n_layer)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        if tokens.shape[1] <= model.cfg.block_size or model.cfg.position == "rope":
            out = model(tokens[:, cache.length :], cache=cache, last_only=True)
        else:
            out = model(tokens[:, -model.cfg.block_size :], last_only=True)
        chosen = sample_from(out.logits[:, -1, :n_vocab].float(), temperature, top_k, top_p, generator)
        tokens = torch.cat([tokens, chosen], dim=1)
        if stop is not None:
            stopped |= chosen[:, 0] == stop
            if stopped.all():
                break
    model.train(was_training)
    return tokens


def sample_from(
    logits: Tensor,  # (B, V)
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row, (B, 1).

    top_k keeps the k likeliest tokens; top_p keeps the smallest set of likeliest tokens whose probability
    reaches p (Holtzman et al. 2020), at least one.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # what is likelier than this token, together
        keep = before < top_p
        keep[:, 0] = True
        probabilities = probabilities * keep
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))


class LayerCache:
    """Keys and values of one layer, (B, H, T, D) each."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None:
            assert k.shape[2] == 1, "a cache is filled at once and then extended token by token"
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v


class Cache:
    """Keys and values of every layer for the tokens seen so far."""

    def __init__(self, n_layer: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layer)]

    @property
    def length(self) -> int:
        k = self.layers[0].k
        return 0 if k is None else k.shape[2]
