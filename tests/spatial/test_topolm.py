"""TopoLM's loss against a plain reference and known answers. Run: pytest tests/spatial/test_topolm.py"""

import numpy as np
import pytest
import torch

from topogpt import topo
from topogpt.settings import GPTConfig, TopoConfig
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.schedule import weight_at
from topogpt.spatial.topolm import TopoLMLoss

SHEETS = ["layer.0.attn", "layer.0.mlp"]
N_UNITS = 100
SHAPE = GPTConfig(n_layer=1, n_embd=N_UNITS, n_head=1)


def small_loss(**settings) -> tuple[TopoLMLoss, dict[str, np.ndarray]]:
    cfg = TopoConfig(**{"radius": 3, "neighbourhoods": 4, **settings})
    positions = sheet_positions(cfg, SHAPE)
    return TopoLMLoss(cfg, positions), positions


def random_activations(dtype=torch.float64, seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(N_UNITS, N_UNITS, generator=g, dtype=torch.float64)
    return {
        s: (torch.randn(2, 30, N_UNITS, generator=g, dtype=torch.float64) @ mix + 3).to(dtype) for s in SHEETS
    }


def reference_loss(
    x: torch.Tensor, position: np.ndarray, centre: tuple[int, int], radius: int
) -> torch.Tensor:
    """One neighbourhood the slow way: from positions, pair by pair."""
    units = [u for u, (i, j) in enumerate(position) if max(abs(i - centre[0]), abs(j - centre[1])) < radius]
    r = torch.corrcoef(x.flatten(0, -2)[:, units].T)
    pairs = [(a, b) for a in range(len(units)) for b in range(a)]
    r = torch.stack([r[a, b] for a, b in pairs])
    d = [1 / (1 + np.linalg.norm(position[units[a]] - position[units[b]])) for a, b in pairs]
    return (1 - torch.corrcoef(torch.stack([r, torch.tensor(d, dtype=r.dtype)]))[0, 1]) / 2


def reference(activations: dict, positions: dict, chosen: torch.Tensor, radius: int) -> torch.Tensor:
    h, w = topo.grid_shape(N_UNITS)
    centres = [(i, j) for i in range(radius - 1, h - radius + 1) for j in range(radius - 1, w - radius + 1)]
    losses = []
    for s, name in enumerate(SHEETS):
        each = [
            reference_loss(activations[name], positions[name], centres[k], radius) for k in chosen[s].tolist()
        ]
        losses.append(torch.stack(each).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["permuted", "identity"])
@pytest.mark.parametrize("neighbourhoods", [4, 7, 0])  # gathered; more columns than units; all 36 of them
@pytest.mark.parametrize("dense", [False, True])
def test_loss_and_gradient_equal_the_reference_in_float64(kind, neighbourhoods, dense):
    loss, positions = small_loss(positions=kind, neighbourhoods=neighbourhoods)
    loss.dense = dense
    chosen = loss.choose(0, step=7, micro_batch=1)
    ours, theirs = random_activations(), random_activations()
    for x in (*ours.values(), *theirs.values()):
        x.requires_grad_()
    a, b = loss(ours, chosen), reference(theirs, positions, chosen, radius=3)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)  # each sheet with a gradient of its own
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for name in SHEETS:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-10, rtol=1e-8)


def test_bfloat16_activations_stay_within_a_hundredth_of_float64():
    loss, positions = small_loss()
    chosen = loss.choose(0, 0, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(random_activations(torch.bfloat16), chosen)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double(), reference(random_activations(), positions, chosen, 3), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("neighbourhoods", [2, 0])
def test_gradient_passes_gradcheck(neighbourhoods):
    loss, _ = small_loss(neighbourhoods=neighbourhoods)
    chosen = loss.choose(0, 0, 0)
    x = {s: v[:, :3].clone().requires_grad_() for s, v in random_activations().items()}
    torch.autograd.gradcheck(lambda *v: loss(dict(zip(SHEETS, v, strict=True)), chosen), tuple(x.values()))


def test_zero_neighbourhoods_means_all_of_them():
    loss, _ = small_loss(neighbourhoods=0)
    assert loss.choose(0, 0, 0).tolist() == [list(range(36))] * 2


def test_a_constant_unit_gives_a_finite_loss_and_gradient():
    loss, positions = small_loss()
    x = random_activations(torch.float32)
    centre = topo.units_by_cell(positions[SHEETS[0]])[44]
    x[SHEETS[0]][..., centre] = 5.0
    x[SHEETS[1]][:] = 0.0  # a whole dead sheet
    for v in x.values():
        v.requires_grad_()
    value = loss(x, loss.choose(0, 0, 0))
    value.sum().backward()
    assert value.isfinite().all() and value[1] == 0.5
    assert all(v.grad.isfinite().all() for v in x.values())


@pytest.mark.parametrize("neighbourhoods", [4, 0])  # gathered columns; one Gram matrix of the sheet
def test_a_constant_unit_counts_as_one_that_is_zero_whatever_the_constant(neighbourhoods):
    """In fp32 the mean of 3.3 is not 3.3: what was left had a gradient a million times that of others."""
    loss, positions = small_loss(neighbourhoods=neighbourhoods)
    chosen = loss.choose(0, 0, 0)
    unit = topo.units_by_cell(positions[SHEETS[0]])[44]

    def found(constant: float) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(1)
        x = {s: torch.randn(4, 1000, N_UNITS, generator=g) for s in SHEETS}
        x[SHEETS[0]][..., unit] = constant
        for v in x.values():
            v.requires_grad_()
        value = loss(x, chosen)
        value.sum().backward()
        return [value.detach(), *(v.grad for v in x.values())]

    zero = found(0.0)
    assert not zero[1][..., unit].any() and zero[1].any()
    for constant in (3.3, -1000.7):
        torch.testing.assert_close(found(constant), zero, rtol=0, atol=0)


def test_independent_units_lose_a_half():
    loss, _ = small_loss(neighbourhoods=0)
    x = {s: torch.randn(1, 20_000, N_UNITS, generator=torch.Generator().manual_seed(1)) for s in SHEETS}
    assert (loss(x, loss.choose(0, 0, 0)) - 0.5).abs().max() < 0.02


def test_correlations_that_equal_the_inverse_distances_lose_nothing():
    cfg = TopoConfig(radius=3, positions="identity", neighbourhoods=0)
    positions = {SHEETS[0]: topo.positions("identity", 25, 0, SHEETS[0])}  # the sheet is one neighbourhood
    d = torch.from_numpy(topo.inverse_distances(3))
    root = torch.linalg.cholesky(d)
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 26, generator=g, dtype=torch.float64) + 1)[0]
    # orthonormal and centred: covariances are exact
    basis = torch.linalg.qr(basis - basis.mean(0))[0][:, :25]
    loss = TopoLMLoss(cfg, positions)
    assert loss({SHEETS[0]: (basis @ root.T)[None]}, loss.choose(0, 0, 0)).item() < 1e-12


def test_neighbourhoods_of_a_micro_batch_depend_on_its_place_alone():
    loss, _ = small_loss()
    first = loss.choose(3, step=5, micro_batch=2)
    assert torch.equal(first, loss.choose(3, step=5, micro_batch=2))
    others = [loss.choose(4, 5, 2), loss.choose(3, 6, 2), loss.choose(3, 5, 3)]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])  # sheets draw independently
    assert all(len(set(row)) == 4 for row in first.tolist())


@pytest.mark.parametrize("neighbourhoods, dense", [(4, False), (4, True), (0, True)])
def test_compiles_into_one_graph(neighbourhoods, dense):
    loss, _ = small_loss(neighbourhoods=neighbourhoods)
    loss.dense = dense
    chosen = loss.choose(0, 0, 0)
    x = {s: v.requires_grad_() for s, v in random_activations(torch.float32).items()}
    eager = loss(x, chosen)
    eager.sum().backward()
    grads = [v.grad.clone() for v in x.values()]
    for v in x.values():
        v.grad = None
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, chosen)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close([v.grad for v in x.values()], grads)


def test_weight_schedules():
    assert weight_at(TopoConfig(), 10, 100) == 2.5
    linear = TopoConfig(weight_schedule="linear", weight_warmup_steps=10)
    assert [weight_at(linear, s, 100) for s in (0, 4, 9, 50)] == [0.25, 1.25, 2.5, 2.5]
    cosine = TopoConfig(weight_schedule="cosine")
    assert weight_at(cosine, 0, 100) == 2.5
    assert weight_at(cosine, 50, 100) == pytest.approx(1.25)
    assert weight_at(cosine, 100, 100) == pytest.approx(0)
