"""Devices that lack what CUDA has, by a stand-in: no float64, no found_inf, tensors without values.

pytest tests/training/test_device.py
"""

import contextlib

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topogpt import distributed
from topogpt.analysis.covariance import Covariance
from topogpt.analysis.pairs import log_probabilities
from topogpt.distributed import Ranks, pick_device
from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.text.loader import open_corpus
from topogpt.training import setup
from topogpt.training.step import optimizer_step
from topogpt.training.validation import evaluate

AWAY = torch.device("meta")  # plays an Apple GPU


class AppleLike(TorchDispatchMode):
    """Refuses float64 on the device; all that comes back from it is ones, or what is given."""

    comes_back = 1.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == AWAY:
            return self.comes_back
        comes = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        if comes and args[0].device == AWAY and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (x.device, x.dtype) == (AWAY, torch.float64):
                raise TypeError(f"{func}: this device has no float64")
        return out


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The stand-in has none; float32 is what `auto` trains in on an Apple GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


def test_the_stand_in_refuses_float64_on_its_device_alone():
    with AppleLike():
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(2).double().to(AWAY)
        assert torch.ones(2, device=AWAY).cpu().double().sum() == 2
        assert distributed.widest(AWAY) == torch.float32
    assert distributed.widest(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("loss, name", [("topolm+toponets", "adamw"), ("neighbour+wiring", "muon")])
def test_a_step_and_an_evaluation_take_no_float64(folder, loss, name):
    topo = {"loss": loss, "factor_h": 4.0, "factor_w": 4.0}
    cfg = tiny.config(folder, "away", topo=topo, optim={"name": name}, compile="off")
    corpus = open_corpus(cfg.val_data_dir, key="val_data_dir", vocab_size=tiny.VOCAB)
    with AppleLike():
        t = setup.build(cfg, Ranks(0, 1, AWAY))
        tokens = torch.zeros(2, 16, dtype=torch.long, device=AWAY)
        done = optimizer_step(t, 0, [setup_batch(tokens)])
        assert done.losses.device == AWAY
        assert evaluate(t, corpus).cross_entropy == 1.0  # ones, by their number


def setup_batch(tokens: torch.Tensor):
    from topogpt.text.loader import MicroBatch

    return MicroBatch(tokens, tokens, 0)


def test_a_step_that_is_not_finite_is_skipped_where_the_kernel_would_not(folder, monkeypatch):
    t = setup.build(tiny.config(folder, "skipped", compile="off"), Ranks(0, 1, AWAY))
    steps = []
    monkeypatch.setattr(t.optimizer, "step", lambda: steps.append(1))
    tokens = torch.zeros(2, 16, dtype=torch.long, device=AWAY)
    with AppleLike() as device:
        for device.comes_back, taken in ((1.0, 0), (0.0, 1)):  # of `skip`
            optimizer_step(t, 0, [setup_batch(tokens)])
            assert len(steps) == taken
    assert getattr(t.optimizer, "found_inf", None) is None


def test_two_analyses_take_no_float64():
    model = GPT(tiny.config(tiny.ROOT).model).to(AWAY)
    with AppleLike():
        covariance = Covariance()
        covariance.add(torch.ones(5, 4, device=AWAY))
        assert covariance.total.dtype == torch.float64
        rows = [torch.arange(n).numpy() for n in (3, 5)]
        assert log_probabilities(model, rows).shape == (2,)


def test_auto_takes_an_apple_gpu_only_where_a_run_works(monkeypatch):
    assert distributed.can_train("cpu") and not distributed.can_train("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for works, picked in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(distributed, "can_train", lambda device, works=works: works)
        assert pick_device("auto") == picked
        assert pick_device("auto", world=2) == "cpu"
    with pytest.raises(UserError, match="device = mps trains in one process, not 2"):
        pick_device("mps", world=2)
