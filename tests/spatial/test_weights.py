"""Losses on weights against plain references. Run: pytest tests/spatial/test_weights.py"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig
from topogpt.spatial import neighbour, toponets, weights, wiring
from topogpt.topo import grid_shape

SIZES = [(6, 8, 5), (5, 7, 3), (1, 13, 4), (48, 64, 2), (9, 4, 1)]  # h, w, depth
FACTORS = [(1, 1), (1, 2), (1.0, 4.0), (2.0, 3.0), (3, 2.5), (4.3, 1.9), (5.0, 4.0)]
FITTING = [(s, f) for s in SIZES for f in FACTORS if f[0] <= s[0] and f[1] <= s[1]]
LOSSES = [toponets.LOSS, neighbour.LOSS, wiring.LOSS]


def sheet(h: int, w: int, depth: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(h, w, depth, generator=g, dtype=torch.float64).to(dtype)


def config(*modules: str, factor: float = 2.0) -> SimpleNamespace:
    return SimpleNamespace(modules=modules or ("*.mlp.c_fc",), factor_h=factor, factor_w=factor)


def gpt(n_embd: int = 16) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=n_embd, block_size=8, vocab_size=32))


def toponets_by_torch(x: torch.Tensor, factor_h: float, factor_w: float, mode: str = "bilinear"):
    image = x.permute(2, 0, 1)[None]
    small = F.interpolate(image, scale_factor=(1 / factor_h, 1 / factor_w), mode=mode)
    again = F.interpolate(small, size=x.shape[:2], mode=mode)[0].permute(1, 2, 0)
    return 1 - F.cosine_similarity(x, again, dim=-1).mean()


def neighbour_by_hand(x: torch.Tensor) -> float:
    h, w, _ = x.shape
    found = []
    for i in range(h * w):
        for j in range(i):
            (r, c), (s, d) = divmod(i, w), divmod(j, w)
            if max(abs(r - s), abs(c - d)) == 1:
                found.append(1 - float(F.cosine_similarity(x[r, c], x[s, d], dim=0)))
    return sum(found) / len(found)


def wiring_by_hand(weight: torch.Tensor) -> float:
    (n_out, n_in), total = weight.shape, 0.0
    values = weight.tolist()
    (ho, wo), (hi, wi) = grid_shape(n_out), grid_shape(n_in)
    for i in range(n_out):
        for j in range(n_in):
            dy = (i // wo + 0.5) / ho - (j // wi + 0.5) / hi
            dx = (i % wo + 0.5) / wo - (j % wi + 0.5) / wi
            total += abs(values[i][j]) * math.hypot(dy, dx)
    return total / weight.numel()


@pytest.mark.parametrize("size, factors", FITTING, ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "nearest-exact", "bicubic", "area"])
def test_toponets_is_what_interpolate_makes_of_it(size, factors, mode):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        ours, theirs = (sheet(*size, dtype=dtype).requires_grad_() for _ in range(2))
        loss = toponets.toponets_loss(ours, *factors, mode)
        reference = toponets_by_torch(theirs, *factors, mode)
        assert loss.dtype == dtype and abs(loss - reference) < tolerance
        loss.backward()
        reference.backward()
        assert (ours.grad - theirs.grad).abs().max() < 10 * tolerance


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_neighbour_is_the_mean_over_pairs(size):
    assert neighbour.neighbour_loss(sheet(*size)).item() == pytest.approx(neighbour_by_hand(sheet(*size)))


@pytest.mark.parametrize("n_out, n_in", [(12, 6), (48, 12), (7, 9)])
def test_wiring_is_the_mean_of_weight_times_distance(n_out, n_in):
    layer = nn.Linear(n_in, n_out)
    loss = wiring.LOSS(config("0"), nn.Sequential(layer))
    assert loss(nn.Sequential(layer)).item() == pytest.approx(wiring_by_hand(layer.weight), rel=1e-5)


def test_gradients_are_those_of_finite_differences():
    x = sheet(5, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: toponets.toponets_loss(x, 2.5, 3), x)
    assert torch.autograd.gradcheck(neighbour.neighbour_loss, x)
    w = sheet(1, 12, 6)[0].requires_grad_()
    distance = wiring.distances(12, 6).double()
    assert torch.autograd.gradcheck(lambda w: wiring.wiring_loss(w, distance), w)


def test_sizes_of_the_small_copy():
    sizes = {3: (16, 21), 8: (6, 8), 5: (9, 12)}
    assert {factor: small(48, 64, factor) for factor in sizes} == sizes
    assert all(small(n, n, n) == (1, 1) for n in range(1, 200))  # 1 / 49 * 49 is less than 1


def small(h: int, w: int, factor: float) -> tuple[int, int]:
    return tuple(len(toponets.smaller_and_larger(n, factor, "bilinear")[0]) for n in (h, w))


def test_known_answers():
    constant = sheet(1, 1, 7, dtype=torch.float32).expand(48, 64, 7)
    for factor in (1.0, 3.0, 7.0, 8.0, 48.0):
        assert abs(toponets.toponets_loss(constant, factor, factor)) < 1e-6
    assert abs(neighbour.neighbour_loss(constant)) < 1e-6
    noise = sheet(48, 64, 768)
    assert toponets.toponets_loss(noise, 3, 3).item() == pytest.approx(0.89, abs=0.01)
    assert neighbour.neighbour_loss(noise).item() == pytest.approx(1, abs=0.01)
    stripes = torch.tensor([1.0, -1.0])[torch.arange(8) % 2].expand(6, 8)[..., None]  # only columns agree
    n_same, n_pairs = 5 * 8, neighbour.n_pairs(6, 8)
    assert neighbour.neighbour_loss(stripes).item() == pytest.approx(2 * (1 - n_same / n_pairs))
    assert wiring.wiring_loss(torch.eye(9), wiring.distances(9, 9)) == 0  # each unit to the one at its place
    assert wiring.distances(4, 4)[0, 3] == pytest.approx(0.5**0.5)
    assert wiring.distances(4, 1).tolist() == [[pytest.approx(0.125**0.5)]] * 4  # corners and the middle


def test_a_smoother_sheet_has_less_of_each_loss():
    noise = sheet(12, 16, 8)
    smooth = toponets.blur_of(12, 16, 3, 3)(noise)
    assert toponets.toponets_loss(smooth, 3, 3) < toponets.toponets_loss(noise, 3, 3) / 2
    assert neighbour.neighbour_loss(smooth) < neighbour.neighbour_loss(noise) / 2


@pytest.mark.parametrize("loss", [lambda x: toponets.toponets_loss(x, 2, 2), neighbour.neighbour_loss])
@pytest.mark.parametrize("zero", ["one unit", "a corner", "everything"])
def test_zero_weights_make_no_nan_and_no_huge_gradient(loss, zero):
    x = sheet(6, 6, 4, dtype=torch.float32)
    x[{"one unit": (2, 3), "a corner": (slice(0, 3), slice(0, 3)), "everything": slice(None)}[zero]] = 0
    value = loss(x.requires_grad_())
    value.backward()
    assert value.isfinite() and x.grad.abs().max() < 1
    assert zero != "everything" or value == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_finds_its_layers_and_gives_one_value_each(kind):
    model = gpt()
    loss = kind(config(), model)
    assert loss.of_weights and loss.layers == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert not loss.state_dict() and not list(loss.parameters())
    values = loss(model)
    assert values.shape == (2,) and values.dtype == torch.float32
    values.sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"{name}.weight" for name in loss.layers}
    one = kind(config("*.1.mlp.c_fc", "transformer.h.1.*.c_fc"), model)
    assert one.layers == loss.layers[1:] and torch.equal(one(model), values[1:])


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_changes_nothing_and_bfloat16_little(kind):
    model = gpt()
    loss = kind(config(), model)
    exact = loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(model), exact)
    rounded = loss(model.bfloat16())
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, exact, atol=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_it_goes_where_the_model_is(kind):
    loss = kind(config(), gpt())
    assert loss(gpt().to("meta")).device.type == "meta"
    assert all(buffer.is_meta for buffer in loss.buffers())


@pytest.mark.parametrize("kind", LOSSES)
def test_it_is_captured_whole_by_a_compiler(kind):
    model = gpt()
    loss = kind(config(), model)
    compiled = torch.compile(lambda: loss(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), loss(model))


def test_the_class_is_the_function_on_the_layers_sheet():
    model = nn.Sequential(nn.Conv2d(3, 15, 3), nn.Linear(6, 24))
    model.double()
    values = toponets.LOSS(config("0", "1", factor=3.0), model)(model)
    for value, layer in zip(values, model, strict=True):
        h, w = grid_shape(len(layer.weight))
        by_hand = layer.weight.reshape(h, w, -1)
        assert value.item() == pytest.approx(toponets_by_torch(by_hand, 3.0, 3.0).item(), abs=1e-7)


def test_sheets_lie_row_by_row():
    linear, conv = nn.Linear(6, 12), nn.Conv2d(2, 12, 3)
    assert torch.equal(weights.output_sheet(linear.weight)[1, 2], linear.weight[6])  # 3x4
    assert torch.equal(weights.input_sheet(linear.weight)[1, 2], linear.weight[:, 5])  # 2x3
    assert weights.bias_sheet(linear.bias)[2, 3] == linear.bias[11]
    assert torch.equal(weights.output_sheet(conv.weight)[2, 0], conv.weight[8].flatten())


@pytest.mark.parametrize(
    "kind, cfg, message",
    [
        (toponets.LOSS, config("*.mlp.c_fcc"), r"^modules = \*.mlp.c_fcc matches no layer; near it: .*c_fc"),
        (toponets.LOSS, config("transformer.h.0.mlp"), "matches transformer.h.0.mlp, a MLP and no nn.Linear"),
        (toponets.LOSS, config("*.ln_1"), "a LayerNorm and no nn.Linear or nn.Conv2d; near it: "),
        (neighbour.LOSS, SimpleNamespace(modules=()), "modules name no layer; there are transformer.h.0"),
        (toponets.LOSS, config(factor=9), r"^layer transformer.h.0.mlp.c_fc: factor_h = 9 .* the 8x8 sheet"),
        (toponets.LOSS, config(factor=0.5), r"c_fc: factor_h = 0.5 must be a finite number of at least 1"),
        (toponets.LOSS, config(factor=math.nan), "factor_h = nan must be"),
    ],
)
def test_what_cannot_work_is_named(kind, cfg, message):
    with pytest.raises(ValueError, match=message):
        kind(cfg, gpt())


def test_what_has_no_sheet_is_named():
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "one": nn.Linear(4, 1)})
    with pytest.raises(ValueError, match="conv, a Conv2d and no nn.Linear; near it: one"):
        wiring.LOSS(config("conv"), model)
    with pytest.raises(ValueError, match="layer one: a sheet of 1x1 units has no neighbours"):
        neighbour.LOSS(config("one"), model)
    with pytest.raises(ValueError, match=r"factor_w = 7 is larger than the 4x6 sheet; it must be at most 6"):
        toponets.toponets_loss(sheet(4, 6, 2), 2, 7)
    with pytest.raises(ValueError, match="interpolation = 'cubic' must be one of bilinear, nearest"):
        toponets.toponets_loss(sheet(4, 6, 2), 2, 2, "cubic")


@pytest.mark.parametrize("kind", LOSSES)
def test_following_the_gradient_lowers_the_loss(kind):
    model = gpt()
    loss = kind(config(), model)
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-3), loss(model).mean().item()
    for _ in range(50):
        optimizer.zero_grad()
        loss(model).mean().backward()
        optimizer.step()
    assert loss(model).mean().item() < 0.8 * before
