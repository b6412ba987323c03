"""What a user writes with types, checked by mypy and never run: the public names as a notebook uses them."""

from typing import assert_type

import numpy as np
import torch

import topogpt

run = topogpt.load("out/demo", "last", positions="identity", device="cpu")
assert_type(run, topogpt.Run)
assert_type(run.model, topogpt.GPT)
assert_type(run.model.cfg, topogpt.GPTConfig)
assert_type(run.sheets, list[str])
assert_type(run.grid, tuple[int, int])
assert_type(run.tokens("The cortex"), list[str])
assert_type(run.cross_entropy(["The cortex", "is a sheet."]), float)
assert_type(run.sample("The cortex", 5, temperature=0), str)

maps = topogpt.activations(run, [464, 27928])
for sheet, grids in maps.items():
    assert_type(sheet, str)
    topogpt.morans_i(topogpt.smooth(grids, 2.0)).mean()
assert_type(topogpt.morans_i_floor(run.grid, 2.0).mean, float)
topogpt.draw(maps, token=0).savefig("maps.png")
with topogpt.lesion(run, {"layer.1.mlp": run.positions["layer.1.mlp"][:, 0] < 3}, fill=0.5):
    run.activations("The cortex")
with run.lesion(["layer.0.attn", "layer.0.mlp"]):
    pass
topogpt.Run(topogpt.GPT(topogpt.GPTConfig(n_layer=1)), "identity", encode=lambda text: list(text.encode()))

positions = {"fc": topogpt.positions("permuted", 784, seed=0, sheet="fc")}
assert_type(topogpt.grid_shape(784), tuple[int, int])
topogpt.on_grid(np.zeros(784), positions["fc"])
spatial = topogpt.SpatialLoss(positions, radius=3, neighbourhoods=0, distance="linf")
assert_type(spatial.forward({"fc": torch.randn(8, 784)}, step=1, reduce=False), torch.Tensor)
pyramid = topogpt.LaplacianPyramid.from_layer(run.model, run.model.lm_head, factor_h=8.0, factor_w=8.0)
topo_loss = topogpt.TopoLoss(losses=[pyramid, topogpt.LaplacianPyramidOnInput("lm_head", 2, 2, scale=None)])
assert_type(topo_loss.compute(model=run.model), torch.Tensor)
assert_type(topo_loss.compute(model=run.model, reduce_mean=False), dict[str, torch.Tensor])
tau = topogpt.TauScheduler(topo_loss, start_value=0.0, end_value=1.0, num_steps=100, mode="linear")
assert_type(topogpt.ChainedTauScheduler([tau]).get_current_tau(), float)
assert_type(topogpt.load_topography("out/demo").grid, tuple[int, int])
assert_type(topogpt.__version__, str)
topogpt.load(3)  # type: ignore[arg-type]
print(topogpt.nothing_of_this_name)  # type: ignore[attr-defined]
