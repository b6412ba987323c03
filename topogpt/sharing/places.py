"""Where a stock model shows what a sheet of ours shows."""

from collections.abc import Iterable
from typing import NamedTuple

from topogpt.settings import GPTConfig
from topogpt.topo import ONE_SHEET


class Places(NamedTuple):
    """Names of modules."""

    blocks: str  # the list of blocks, inside the model
    attn: str  # inside a block, as the rest
    before_mlp: str  # the norm that reads the stream between the attention and the MLP
    fc: str  # the first layer of the MLP

    def shown_by(self, cfg: GPTConfig, sheets: Iterable[str]) -> dict[str, str]:
        """Which module shows each sheet."""
        modules = {
            ONE_SHEET: "the sheets of all branches side by side: layer.0.attn, layer.0.mlp, layer.1.attn, ..."
        }
        for i in range(cfg.n_layer):
            block = f"{self.blocks}.{i}"
            attn, mlp = f"{block}.{self.attn} (output)", f"{block}.mlp (output)"
            if cfg.post_residual:
                attn, mlp = f"{block}.{self.before_mlp} (input)", f"{block} (output)"
            modules |= {f"layer.{i}.attn": attn, f"layer.{i}.mlp": mlp}
            modules |= {f"layer.{i}.fc": f"{block}.{self.fc} (output)"}
        return {name: modules[name] for name in sheets}
