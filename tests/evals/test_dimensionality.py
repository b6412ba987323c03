"""Effective dimensionality. pytest tests/evals/test_dimensionality.py"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from evals import dimensionality
from evals.dimensionality import DimensionalityConfig, measure
from topogpt import topo
from topogpt.analysis import reading
from topogpt.analysis.covariance import Covariance
from topogpt.analysis.dimensions import Dimensionality, shuffled
from topogpt.analysis.dimensions import dimensionality as of_covariance
from topogpt.analysis.results import read
from topogpt.analysis.section import Number
from topogpt.analysis.subject import Subject
from topogpt.analysis.untrained import untrained
from topogpt.errors import UserError
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import GPTConfig

CFG = DimensionalityConfig(run="-")


def some_subject() -> Subject:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=64)).eval()
    positions = {s: topo.positions("permuted", 16, 0, s) for s in sheet_names(2)}
    return Subject("random", model, positions, Path(), Path(), None, "")


def of(x: np.ndarray, batch: int = 100) -> Dimensionality:
    covariance = Covariance()
    for rows in torch.from_numpy(x.astype(np.float32)).split(batch):
        covariance.add(rows)
    return of_covariance(covariance)


def noise(n: int, n_units: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n_units))


def test_isotropic_noise_has_as_many_dimensions_as_units_and_one_pattern_has_one():
    assert of(noise(20_000, 12)).value == pytest.approx(12, rel=0.01)
    alone = of(100 + noise(500, 1) * noise(1, 12, 1))
    assert alone.value == pytest.approx(1, abs=1e-5) and alone.n_units == 12
    assert np.isnan(of(np.ones((50, 3))).value)  # nothing varies


def test_it_is_that_of_the_eigenvalues_whatever_the_batch_and_the_rotation():
    x = 5 + noise(300, 20) @ noise(20, 20, 1) * np.linspace(0.1, 3, 20)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    for batch in (2, 7, 300):
        assert of(x, batch).value == pytest.approx(expected, rel=1e-5)
    rotation = np.linalg.qr(noise(20, 20, 2))[0]
    assert of(x @ rotation).value == pytest.approx(expected, rel=1e-5)


def test_the_null_is_the_mean_over_shuffles():
    draw = np.random.default_rng(0)
    x = noise(40, 15) ** 3 * np.linspace(0.2, 2, 15)  # heavy tails, few tokens
    squares = []
    for _ in range(400):
        c = np.cov(draw.permuted(x, axis=0).T)
        squares.append((c**2).sum())
    variance = x.var(0, ddof=1)
    assert shuffled(variance, 40) == pytest.approx(variance.sum() ** 2 / np.mean(squares), rel=0.01)
    assert of(x).shuffled == pytest.approx(shuffled(variance, 40), rel=1e-5)
    assert shuffled(np.ones(30), 10**9) == pytest.approx(30)


def test_sheets_and_modules_are_measured_on_the_tokens_that_count(monkeypatch):
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", 70)  # two windows a batch
    subject, windows = some_subject(), np.random.default_rng(0).integers(0, 64, (5, 32))
    seen = {}
    module = subject.model.transformer.h[1].mlp.c_fc
    handle = module.register_forward_hook(lambda m, i, out: seen.update({"c_fc": out}))
    with torch.no_grad():
        seen |= subject.model(torch.from_numpy(windows), activations=True).activations
    handle.remove()
    found = measure(replace(CFG, skip=3), subject, windows)
    assert list(found) == [*sheet_names(2), "layer.0.fc", "layer.1.fc"]
    found |= measure(replace(CFG, skip=3, names=("*.1.mlp.c_fc",)), subject, windows)
    assert not module._forward_hooks
    assert found["transformer.h.1.mlp.c_fc"] == found["layer.1.fc"]
    for name, x in (("layer.1.attn", seen["layer.1.attn"]), ("layer.1.fc", seen["c_fc"])):
        c = np.cov(x[:, 3:].flatten(0, 1).double().numpy().T)
        assert found[name].value == pytest.approx(np.trace(c) ** 2 / (c**2).sum(), rel=1e-4)
        assert found[name].n_units == len(c)
    assert list(measure(replace(CFG, names=("*.1.ln_2",)), subject, windows)) == ["transformer.h.1.ln_2"]


def test_an_untrained_model_is_a_function_of_shape_and_seed_alone():
    subject = some_subject()
    before = torch.get_rng_state()
    first, second, other = (untrained(subject, seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(first, subject.model.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("layer.7.mlp",),
            "names = layer.7.mlp is no sheet and no module.*layer.0.attn, layer.0.mlp to layer.1.fc, all",
        ),
        (("transformer.h.0",), "transformer.h.0 gives no activation per token"),
        (("transformer.wpe",), "transformer.wpe gives no activation per token"),
        (("transformer.h",), "transformer.h is never called"),
    ],
)
def test_names_that_have_no_activations_are_refused(names, message):
    windows = np.zeros((1, 32), int)
    with pytest.raises(UserError, match=message):
        measure(replace(CFG, names=names), some_subject(), windows)


def test_mistakes_are_said():
    with pytest.raises(UserError, match="names is empty"):
        DimensionalityConfig(run="-", names=())
    with pytest.raises(UserError, match="skip = -1"):
        DimensionalityConfig(run="-", skip=-1)


def test_the_whole_way(tmp_path, capsys):
    tiny.write_shards(tmp_path)
    runs = [tiny.random_run(tmp_path / "out", name, seed=i) for i, name in enumerate(("a", "b"))]
    given = [runs[0], "--control", runs[1], "--text", tmp_path / "val", "--n_tokens", 480]
    dimensionality.ANALYSIS.main(list(map(str, given)))
    said = capsys.readouterr().out
    found = [read(run / "evals", "dimensionality") for run in runs]
    for result in found:
        mlp = result.results["kinds"]["layer.*.mlp"]
        values = [result.results["by_name"][f"layer.{i}.mlp"]["value"] for i in (0, 1)]
        assert mlp["value"] == pytest.approx(np.mean(values)) and 1 <= mlp["value"] <= mlp["shuffled"] <= 16
        for key in ("value", "shuffled", "untrained"):
            assert str(Number(mlp[key], 1)) in said
        assert result.content["summary"]["units shuffled, layer.*.mlp"] == mlp["shuffled"]
    (runs[0] / "evals" / "dimensionality.png").stat()
    dimensionality.ANALYSIS.main(
        [*map(str, given), "--no_untrained", "--no_figures", "--names", "layer.*.mlp"]
    )
    found = read(runs[0] / "evals", "dimensionality")
    assert list(found.results["kinds"]) == ["layer.*.mlp"]
    assert found.results["kinds"]["layer.*.mlp"]["untrained"] is None
    assert dimensionality.section([found]).cards[0].beside.keys() == {"units shuffled"}
