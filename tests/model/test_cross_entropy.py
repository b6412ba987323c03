"""cross_entropy.py against torch's own. Run: pytest tests/model/test_cross_entropy.py"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from topogpt.model import cross_entropy
from topogpt.model.cross_entropy import linear_cross_entropy


def inputs(dtype=torch.float64, n=13, c=8, v=40):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, c, generator=g, dtype=torch.float64).to(dtype) for rows in (n, v))
    targets = torch.randint(0, v, (n,), generator=g)
    targets[[0, 5]] = -1
    return x.requires_grad_(), weight.requires_grad_(), targets


def plain(x, weight, targets):
    return F.cross_entropy(
        (x @ weight.T).float() if x.dtype != torch.float64 else x @ weight.T, targets, ignore_index=-1
    )


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])  # tokens at a time; 13 tokens in all
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_equal_torch_s(monkeypatch, chunk, dtype, atol):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", chunk * 40)
    (x, w, t), (x2, w2, _) = inputs(dtype), inputs(dtype)
    ours, theirs = linear_cross_entropy(x, w, t), plain(x2, w2, t)
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(x.grad, x2.grad, atol=atol, rtol=0)
    torch.testing.assert_close(w.grad, w2.grad, atol=atol, rtol=0)
    assert (x.grad[[0, 5]] == 0).all()


def test_under_autocast_the_products_are_bfloat16_and_the_rest_is_not():
    (x, w, t), (x2, w2, _) = inputs(torch.float32), inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(x, w, t)
    ours.backward()
    theirs = plain(x2, w2, t)
    theirs.backward()
    assert ours.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=0)
    assert (ours.double() - theirs).abs() > 1e-7  # it is not fp32 in disguise
    torch.testing.assert_close(x.grad.double(), x2.grad, atol=5e-3, rtol=0)
    torch.testing.assert_close(w.grad.double(), w2.grad, atol=5e-3, rtol=0)


def test_gradient_passes_gradcheck(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 5 * 40)
    x, w, t = inputs()
    torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, t), (x, w))


def test_without_gradients_only_the_loss_is_computed():
    x, w, t = inputs()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, t), plain(x, w, t))


def test_targets_that_never_count_lose_nothing():
    x, w, _ = inputs()
    loss = linear_cross_entropy(x, w, torch.full((13,), -1))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_huge_logits_stay_finite():
    x, w, t = inputs(torch.float32)
    (x2, w2) = ((v.detach() * 1e3).requires_grad_() for v in (x, w))
    loss = linear_cross_entropy(x2, w2, t)
    loss.backward()
    assert loss.isfinite() and x2.grad.isfinite().all() and w2.grad.isfinite().all()


def test_compiles_into_one_graph():
    (x, w, t), (x2, w2, _) = inputs(torch.float32), inputs(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = compiled(x, w, t), linear_cross_entropy(x2, w2, t)
    torch.testing.assert_close(a, b)
    a.backward(), b.backward()
    torch.testing.assert_close([x.grad, w.grad], [x2.grad, w2.grad])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_one_product(mode):
    """Evaluation does not pay for gradients, though the weight, a parameter, requires them."""
    x, weight = torch.randn(10, 8), torch.nn.Parameter(torch.randn(30, 8))
    targets = torch.randint(0, 30, (10,))
    with FlopCounterMode(display=False) as counted:
        training = linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert counted.get_total_flops() > 2 * 10 * 8 * 30
    with FlopCounterMode(display=False) as counted, mode():
        assert linear_cross_entropy(x, weight, targets) == training
    assert counted.get_total_flops() == 2 * 10 * 8 * 30
