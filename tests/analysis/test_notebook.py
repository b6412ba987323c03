"""Runs as a notebook sees them: maps, lesions, floors. Run: pytest tests/analysis/test_notebook.py"""

import numpy as np
import pytest
import tiny
import torch

import topogpt
from topogpt.analysis import notebook
from topogpt.model.gpt import sheet_names
from topogpt.sharing.load import LoadedModel

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 16, "vocab_size": 256}  # sheets of 3x4


def small_run(**settings) -> topogpt.Run:
    torch.manual_seed(0)
    model = topogpt.GPT(topogpt.GPTConfig(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    letters = {"encode": lambda text: list(text.encode()), "decode": lambda ids: bytes(ids).decode("latin-1")}
    return topogpt.Run(model, **letters, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.random_run(tmp_path_factory.mktemp("out"))


def test_a_run_is_loaded_with_its_sheets_and_metrics(saved):
    run = topogpt.load(saved)
    assert (run.sheets, run.grid) == (sheet_names(2), (4, 4))
    assert run.metrics[-1]["moran"] == 0.5
    assert str(run).startswith("Run(") and "4 sheets of 4x4" in str(run)
    assert not run.model.training
    for sheet, position in topogpt.load_topography(saved).positions.items():
        assert np.array_equal(position, run.positions[sheet])
    identity = topogpt.load(saved, "last", positions="identity")
    assert identity.positions["layer.0.mlp"][5].tolist() == [1, 1]


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(topogpt.UserError, match="nowhere"):
        topogpt.load(tmp_path / "nowhere")


def test_a_model_without_positions_asks_for_some(monkeypatch, tmp_path):
    bare = LoadedModel(small_run().model, None, tmp_path)
    monkeypatch.setattr(notebook, "load_model", lambda *args: bare)
    with pytest.raises(ValueError, match="no positions of its units; give positions='identity'"):
        topogpt.load("gpt2")
    assert topogpt.load("gpt2", positions="identity").positions["layer.0.mlp"][5].tolist() == [1, 1]


def test_positions_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"layer.0.attn are not those of a model of 2 layers"):
        small_run(positions={"layer.0.attn": np.zeros((12, 2))})


def test_activations_are_the_models_own_on_the_grid():
    run, texts = small_run(), ["cortex", "a"]
    maps = topogpt.activations(run, texts)
    assert list(maps) == run.sheets
    for sheet, grids in maps.items():
        assert (grids.shape, grids.dtype) == ((7, 3, 4), np.float32)
        with torch.no_grad():
            x = run.model(torch.tensor([list(b"cortex")]), activations=True).activations[sheet]
        for unit, (row, column) in enumerate(run.positions[sheet]):
            assert torch.equal(torch.from_numpy(grids[:6, row, column].copy()), x[0, :, unit])
        assert np.array_equal(topogpt.activations(run, "a")[sheet], grids[6:])
        assert np.array_equal(run.activations([list(b"cortex"), np.array([97])])[sheet], grids)
    assert run.tokens(texts) == [*"cortexa"]


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "there is no text"),
        ([""], "'' has 0 tokens; the model reads 1 to 16"),
        ("a" * 17, "has 17 tokens"),
        ([[3, 256]], r"\[3, 256\] has token 256; the model knows 0 to 255"),
    ],
)
def test_texts_that_cannot_be_read_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        topogpt.activations(small_run(), texts)


def lesioned(run: topogpt.Run, units, sheet: str, **settings) -> np.ndarray:
    """What the block passes on of a branch's output while it is lesioned, (T, n_units), through a hook."""
    _, layer, branch = sheet.split(".")
    seen = []
    with topogpt.lesion(run, units, **settings):
        module = getattr(run.model.transformer.h[int(layer)], branch)
        handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.no_grad():
            run.model(torch.tensor([list(b"abcd")]))
        handle.remove()
    return seen[0][0].numpy()


def test_a_lesion_silences_what_it_names_and_ends():
    run, sheet = small_run(), "layer.1.attn"
    whole, before = lesioned(run, {}, sheet), run.cross_entropy("abcd")
    assert (lesioned(run, sheet, sheet) == 0).all() and (whole != 0).all()
    position = run.positions[sheet]
    mask = np.linalg.norm(position - [1, 1], axis=1) <= 1  # a disc of five
    disc = lesioned(run, {sheet: mask}, sheet, fill=0.5)
    assert (
        (disc[:, mask] == 0.5).all() and np.array_equal(disc[:, ~mask], whole[:, ~mask]) and mask.sum() == 5
    )
    assert np.array_equal(lesioned(run, {sheet: np.flatnonzero(mask)}, sheet, fill=0.5), disc)
    assert np.array_equal(lesioned(run, {sheet: topogpt.on_grid(mask, position)}, sheet, fill=0.5), disc)
    assert np.array_equal(lesioned(run, {sheet: []}, sheet), whole)
    with run.lesion([sheet, "layer.0.mlp"]):
        assert run.cross_entropy("abcd") != before
        assert (run.activations("abcd")[sheet] == 0).all()
    with pytest.raises(KeyError), run.lesion(sheet):
        raise KeyError
    assert run.cross_entropy("abcd") == before


@pytest.mark.parametrize(
    "units, message",
    [
        ("layer.2.mlp", "'layer.2.mlp' is no sheet; they are layer.0.attn"),
        ({"layer.0.mlp": [12]}, "layer.0.mlp: units are numbers from 0 to 11"),
        ({"layer.0.mlp": [0.5]}, "units are numbers"),
        ({"layer.0.mlp": np.ones((4, 3), bool)}, r"shape \(4, 3\), not \(12,\) or \(3, 4\)"),
    ],
)
def test_lesions_of_what_is_not_there_are_refused(units, message):
    run = small_run()
    with pytest.raises(ValueError, match=message), topogpt.lesion(run, units):
        pass


def test_cross_entropy_is_that_of_all_predicted_tokens():
    run = small_run()
    rows = [torch.tensor([list(text)]) for text in (b"abcd", b"xy")]
    with torch.no_grad():
        losses = [run.model(row[:, :-1], row[:, 1:]).loss.item() for row in rows]
    assert run.cross_entropy(["abcd", "xy"]) == pytest.approx((3 * losses[0] + losses[1]) / 4)
    with pytest.raises(ValueError, match="to predict one takes two"):
        run.cross_entropy("a")


def test_it_writes():
    run = small_run()
    text = run.sample("ab", 5, temperature=0)
    assert text.startswith("ab") and len(text) == 7
    assert run.sample("ab", 5, seed=1) == run.sample("ab", 5, seed=1) != run.sample("ab", 5, seed=2)


def test_the_floor_is_that_of_white_noise():
    raw, smoothed = (
        topogpt.morans_i_floor((28, 28), maps=400),
        topogpt.morans_i_floor((28, 28), 2.0, maps=400),
    )
    assert raw.mean == pytest.approx(-1 / 783, abs=3 * raw.sd / 20)
    assert smoothed.mean == pytest.approx(0.6, abs=0.01)


def test_a_picture_is_shown_by_notebooks():
    pytest.importorskip("matplotlib")
    maps = topogpt.activations(small_run(), "abc")
    for given in (maps, {sheet: grids[0] for sheet, grids in maps.items()}):
        assert topogpt.draw(given, token=0, title="abc")._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no map"):
        topogpt.draw({})
