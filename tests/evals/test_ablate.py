"""Lesions and stimulation do what they say and nothing else; planted effects are found, others are not.

pytest tests/evals/test_ablate.py
"""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from minimal_pairs import plain_scores, write_pairs
from safetensors.numpy import load_file

from evals import ablate
from evals.ablate import ANALYSIS, AblateConfig
from topogpt.analysis import experiment, lesions, measures, sets, stimuli
from topogpt.analysis.activations import token_lists
from topogpt.analysis.results import Result
from topogpt.analysis.stimuli import LOCALIZER_WORDS
from topogpt.analysis.subject import Subject, load_subject
from topogpt.config import parse
from topogpt.errors import UserError, user_errors
from topogpt.files import sha256
from topogpt.sharing import export
from topogpt.text import loader as data

pytest.importorskip("scipy")
ITEMS = [
    ("the old man walked to the harbour", "S"),
    ("she read a letter from her brother", "S"),
    ("nobody knew where the key was", "S"),
    ("they sold the house in spring", "S"),
    ("pome oy ree holily shourn ne sleoming", "N"),
    ("ot momp vo detlerence", "N"),
    ("wose ro speont ree intlossion oy", "N"),
    ("kake wews baps ose", "N"),
    ("harbour", "W"),
]


def write_csv(path: Path, items: list[tuple[str, str]] = ITEMS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("item", "condition"), *items])
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with validation shards, stimuli and runs of two layers of 16 units; one run has biases."""
    out = tmp_path_factory.mktemp("out")
    tiny.write_shards(out)
    write_csv(out / "items.csv")
    (out / "held.txt").write_text("The cortex is a folded sheet of neurons. " * 20)
    for seed, name in enumerate(["plain", "control"]):
        tiny.random_run(out, name, seed=seed)
    tiny.random_run(out, "biases", bias=True)
    tiny.random_run(out, "post", post_residual=True)
    return out


def settings_of(out: Path, run: str = "plain", **settings) -> AblateConfig:
    settings = {"stimuli": str(out / "items.csv"), "device": "cpu", "figures": False} | settings
    return AblateConfig(run=str(out / run), **settings)


def subject_of(out: Path, run: str = "plain") -> Subject:
    return load_subject(settings_of(out, run), str(out / run))


@pytest.fixture(scope="module", params=["plain", "biases", "post"])
def subject(request, out) -> Subject:
    return subject_of(out, request.param)


def tokens(shape=(2, 40), seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50257, shape, generator=torch.Generator().manual_seed(seed))


def everywhere(subject: Subject, value) -> np.ndarray:
    return np.full((len(subject.sheets), subject.model.cfg.n_embd), value)


def some_units(subject: Subject, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((len(subject.sheets), subject.model.cfg.n_embd)) < 0.3


def branches(model) -> Iterator[torch.nn.Module]:
    for block in model.transformer.h:
        yield from (block.attn, block.mlp)


@torch.no_grad()
def without(subject: Subject, units: np.ndarray, fill: np.ndarray) -> torch.nn.Module:
    """The reference: another model, whose output weights make constants of the units."""
    model = type(subject.model)(replace(subject.model.cfg, bias=True)).eval()
    there = subject.model.state_dict()
    model.load_state_dict({k: there.get(k, torch.zeros_like(v)) for k, v in model.state_dict().items()})
    for branch, gone, value in zip(branches(model), units, fill, strict=True):
        branch.c_proj.weight[torch.from_numpy(gone)] = 0
        branch.c_proj.bias[torch.from_numpy(gone)] = torch.from_numpy(value[gone]).float()
    return model


# ---- lesions -------------------------------------------------------------------------------------


def test_a_lesion_of_no_units_changes_not_a_bit(subject):
    with torch.no_grad():
        plain = subject.model(tokens(), activations=True)
        with lesions.lesioned(
            subject.model, subject.sheets, everywhere(subject, False), everywhere(subject, 9.0)
        ):
            same = subject.model(tokens(), activations=True)
    assert plain.logits.numpy().tobytes() == same.logits.numpy().tobytes()
    for sheet, x in plain.activations.items():
        assert x.numpy().tobytes() == same.activations[sheet].numpy().tobytes()


@torch.no_grad()
def test_a_lesion_of_all_units_leaves_the_embeddings(subject):
    model, parts = subject.model, subject.model.transformer
    with lesions.lesioned(model, subject.sheets, everywhere(subject, True), everywhere(subject, 0.0)):
        logits = model(tokens()).logits
    embedded = parts.wte(tokens()) + parts.wpe(torch.arange(40))
    assert torch.equal(logits, model.lm_head(parts.ln_f(embedded)))
    assert not torch.allclose(logits, model(tokens()).logits, atol=0.1)


@pytest.mark.parametrize("fill", [0.0, 0.7])
@torch.no_grad()
def test_a_lesion_is_what_changed_output_weights_are(subject, fill):
    units, values = some_units(subject), everywhere(subject, fill) * np.arange(1, 17)
    before = subject.model(tokens()).logits
    with lesions.lesioned(subject.model, subject.sheets, units, values):
        found = subject.model(tokens(), activations=True)
    expected = without(subject, units, values)(tokens(), activations=True)
    assert torch.allclose(found.logits, expected.logits, atol=2e-5)
    assert (found.logits - before).abs().max() > 0.1
    for i, sheet in enumerate(subject.sheets):
        x = found.activations[sheet]
        assert torch.allclose(x, expected.activations[sheet], atol=2e-5)
        if not subject.model.cfg.post_residual:
            assert (x[..., units[i]] == torch.from_numpy(values[i][units[i]]).float()).all()
    assert torch.equal(subject.model(tokens()).logits, before)


@torch.no_grad()
def test_sheets_may_come_in_any_order(subject):
    """As they do in a checkpoint of more than ten layers, which sorts layer.10 before layer.2."""
    units, fill, order = some_units(subject), everywhere(subject, 0.5), [2, 0, 3, 1]
    with lesions.lesioned(subject.model, subject.sheets, units, fill):
        expected = subject.model(tokens()).logits
    with lesions.lesioned(subject.model, [subject.sheets[i] for i in order], units[order], fill[order]):
        assert torch.equal(subject.model(tokens()).logits, expected)


@pytest.mark.parametrize("where", ["outside the model", "in a hook"])
def test_hooks_are_gone_after_an_error(subject, where):
    hooks = [lambda *args: None] * 3 + [lambda *args: 1 / 0]
    before = subject.model(tokens()).logits
    with pytest.raises(ZeroDivisionError):
        if where == "in a hook":
            with lesions.hooked(subject.model, subject.sheets, hooks):
                subject.model(tokens())
        else:
            with lesions.lesioned(subject.model, subject.sheets, *[everywhere(subject, True)] * 2):
                raise ZeroDivisionError
    assert all(not module._forward_hooks for module in subject.model.modules())
    assert torch.equal(subject.model(tokens()).logits, before)


def test_no_hook_stays_where_another_cannot_be_set(subject):
    with (
        pytest.raises(AttributeError),
        lesions.hooked(subject.model, ["layer.0.mlp", "layer.0.no"], [print] * 2),
    ):
        pass
    assert all(not module._forward_hooks for module in subject.model.modules())


@torch.no_grad()
def test_means_are_over_all_tokens_and_of_what_a_branch_adds(subject):
    rows, shown_by = [row.numpy() for row in tokens((7, 33))], [[] for _ in subject.sheets]
    for row in rows:
        x = torch.from_numpy(row[None, :-1])
        shown = subject.model(x, activations=True).activations
        stream = subject.model.transformer.wte(x) + subject.model.transformer.wpe(torch.arange(32))
        for i, sheet in enumerate(subject.sheets):  # in forward order, here
            added = shown[sheet] - stream if subject.model.cfg.post_residual else shown[sheet]
            shown_by[i].append(added[0].double().numpy())
            stream = stream + added
    found = lesions.moments(subject.model, subject.sheets, 16, rows)
    each = np.array([np.concatenate(x) for x in shown_by])  # (S, 7 * 32, n_units)
    assert found.mean == pytest.approx(each.mean(1), abs=1e-5)
    assert found.sd == pytest.approx(each.std(1), abs=1e-5)


@torch.no_grad()
def test_stimulation_is_added_by_hand(subject):
    """To the biases of what writes into the residual stream, of another model."""
    units, added = some_units(subject), everywhere(subject, 0.3) * np.arange(1, 17)
    model = without(subject, everywhere(subject, False), added)
    for branch, mask, value in zip(branches(model), units, added, strict=True):
        branch.c_proj.bias += torch.from_numpy(mask * value).float()
    with lesions.stimulated(subject.model, subject.sheets, units, added):
        found = subject.model(tokens()).logits
    assert torch.allclose(found, model(tokens()).logits, atol=2e-5)
    assert (found - subject.model(tokens()).logits).abs().max() > 0.1


@torch.no_grad()
def test_stimulation_by_nothing_changes_not_a_bit(subject):
    before = subject.model(tokens()).logits
    with lesions.stimulated(subject.model, subject.sheets, everywhere(subject, True), everywhere(subject, 0)):
        assert subject.model(tokens()).logits.numpy().tobytes() == before.numpy().tobytes()


@pytest.mark.parametrize("change", [lesions.lesioned, lesions.stimulated])
@torch.no_grad()
def test_hidden_units_are_those_before_the_gelu(subject, change):
    units = np.random.default_rng(0).random((2, 64)) < 0.3
    values = np.random.default_rng(1).standard_normal((2, 64))
    model = without(subject, everywhere(subject, False), everywhere(subject, 0.0))
    for block, mask, value in zip(model.transformer.h, units, values, strict=True):
        mask, value = torch.from_numpy(mask), torch.from_numpy(value).float()
        block.mlp.c_fc.bias[mask] += value[mask]
        if change is lesions.lesioned:
            block.mlp.c_fc.weight[mask], block.mlp.c_fc.bias[mask] = 0, value[mask]
    with change(subject.model, ["layer.0.fc", "layer.1.fc"], units, values):
        found = subject.model(tokens()).logits
    assert torch.allclose(found, model(tokens()).logits, atol=2e-5)
    assert (found - subject.model(tokens()).logits).abs().max() > 0.1


@pytest.mark.parametrize("change", [lesions.lesioned, lesions.stimulated])
@torch.no_grad()
def test_the_sheet_of_all_branches_is_those_of_each_one_after_the_other(subject, change):
    units, values = some_units(subject), np.random.default_rng(1).standard_normal((4, 16))
    assert subject.sheets == ["layer.0.attn", "layer.0.mlp", "layer.1.attn", "layer.1.mlp"]
    with change(subject.model, subject.sheets, units, values):
        expected = subject.model(tokens()).logits
    with change(subject.model, ["all"], units.reshape(1, 64), values.reshape(1, 64)):
        assert torch.equal(subject.model(tokens()).logits, expected)
    rows = [row.numpy() for row in tokens((3, 20))]
    apart = lesions.moments(subject.model, subject.sheets, 16, rows)
    together = lesions.moments(subject.model, ["all"], 64, rows)
    assert all(np.array_equal(x.reshape(1, 64), y) for x, y in zip(apart, together, strict=True))


# ---- which units ---------------------------------------------------------------------------------


def selectivity(t: np.ndarray, p: float = 1.0) -> measures.TTest:
    return measures.TTest(t, np.full(t.shape, p))


@pytest.mark.parametrize(
    "row, column, radius", [(0, 0, 1.5), (2, 1, 1.0), (3, 3, 2.0), (1, 2, 0.0), (2, 2, 99)]
)
def test_a_disc_is_the_cells_within_its_radius(out, subject, row, column, radius):
    cfg = settings_of(out, disc="layer.1.attn", centre=(row, column), radius=radius)
    (target,) = ablate.targets_of(cfg, subject, selectivity(everywhere(subject, 0.0)))
    assert subject.sheets[target.sheet] == "layer.1.attn"
    for sheet, units in zip(subject.sheets, target.units, strict=True):
        for unit, (i, j) in enumerate(subject.positions[sheet]):
            inside = ((i - row) ** 2 + (j - column) ** 2) ** 0.5 <= radius
            assert units[unit] == (sheet == "layer.1.attn" and inside)
    assert target.units.sum() == {0.0: 1, 1.0: 5, 1.5: 4, 2.0: 6, 99: 16}[radius]


def test_clusters_are_the_largest_sets_of_touching_units_that_the_contrast_drives(out, subject):
    maps = np.zeros((4, 4, 4))
    maps[1, :2, :2] = maps[2, 0, :3] = maps[2, 1, 3] = 9.0  # 4 units; 3; and 1, which touches by a corner
    maps[3] = -9.0
    places = subject.positions.values()
    t = np.stack([grid[p[:, 0], p[:, 1]] for grid, p in zip(maps, places, strict=True)])
    found = selectivity(t)
    found.p[t != 0] = 1e-6
    targets = ablate.targets_of(settings_of(out, cluster=2), subject, found)
    assert [x.name for x in targets] == ["cluster 1, layer.0.mlp", "cluster 2, layer.1.attn"]
    grids = [subject.on_grid(x.units) for x in targets]
    assert np.array_equal(grids[0][1], maps[1] > 0) and grids[0].sum() == 4 and targets[0].sheet == 1
    assert grids[1][2].tolist()[0] == [1, 1, 1, 0] and grids[1].sum() == 3 and targets[1].sheet == 2
    assert len(ablate.targets_of(settings_of(out, cluster=9), subject, found)) == 3
    top = ablate.targets_of(settings_of(out, cluster=1, top_percent=4.7), subject, selectivity(t))
    assert top[0].units.sum() == 3  # whatever their p: of 64, the first ones where t is the same
    with pytest.raises(UserError, match="cluster = 1: no unit of .* answers significantly more to S"):
        ablate.targets_of(settings_of(out, cluster=1), subject, selectivity(t))


def test_the_most_selective_are_those_of_largest_t():
    t = np.array([[1.0, -9.0, 3.0], [3.0, 0.0, 2.0]])
    chosen = [set(zip(*np.nonzero(measures.most_selective(t, k)), strict=True)) for k in range(1, 7)]
    order = [(0, 2), (1, 0), (1, 2), (0, 0), (1, 1), (0, 1)]  # the first where t is the same
    assert chosen == [set(order[:k]) for k in range(1, 7)]


def test_targets_may_be_of_all_kinds_at_once(out, subject):
    t = np.arange(64.0).reshape(4, 16)
    assert [x.name for x in ablate.targets_of(settings_of(out), subject, selectivity(t))] == [
        "1 most selective"  # 1 %
    ]
    cfg = settings_of(out, units=(64, 5), disc="layer.0.mlp", centre=(0, 0), radius=0.0, cluster=1)
    found = ablate.targets_of(cfg, subject, selectivity(t, p=0.0))
    assert [x.units.sum() for x in found] == [5, 64, 16, 1] and found[0].units[3, 11:].all()
    assert [x.sheet is None for x in found] == [True, True, False, False]


# ---- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def plain_cross_entropy(model, rows) -> float:
    """Sequence by sequence, without padding."""
    each = []
    for row in rows:
        row = torch.from_numpy(np.asarray(row, np.int64))
        each += F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="none").tolist()
    return float(np.mean(each))


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_cross_entropy_is_the_mean_over_all_tokens(subject, monkeypatch, tokens_per_batch):
    monkeypatch.setattr("topogpt.analysis.activations.TOKENS_PER_BATCH", tokens_per_batch)
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 50257, n).astype(np.uint16) for n in (2, 9, 49, 17, 2, 30)]
    expected = plain_cross_entropy(subject.model, rows)
    assert lesions.cross_entropy(subject.model, rows) == pytest.approx(expected, rel=1e-5)


def test_held_out_tokens_of_a_run_are_those_of_its_evaluations(out, subject):
    corpus = data.open_corpus([str(out / "val")], key="val", vocab_size=64)
    rows, said = ablate.held_out(settings_of(out, n_tokens=300), subject)
    fixed = data.fixed_batches(corpus, n_tokens=300, block_size=48, per_device_batch_size=4)
    x, y = (torch.cat(each).numpy() for each in zip(*[(b.tokens, b.targets) for b in fixed], strict=True))
    assert np.array_equal([row[:-1] for row in rows], x) and np.array_equal([row[1:] for row in rows], y)
    assert said == {str(out / "val"): corpus.fingerprint}
    assert [len(row) for row in ablate.held_out(settings_of(out, n_tokens=20), subject)[0]] == [21]
    everything, _ = ablate.held_out(settings_of(out, n_tokens=9999), subject)
    assert len(everything) == 599 // 48


def test_held_out_text_is_one_document(out, subject, gpt2):
    cfg = settings_of(out, text=str(out / "held.txt"), n_tokens=100)
    stream = gpt2.encode_document((out / "held.txt").read_text())
    rows, said = ablate.held_out(cfg, subject)
    assert [row.tolist() for row in rows] == [stream[:49].tolist(), stream[48:97].tolist()]
    assert said == {str(out / "held.txt"): sha256(out / "held.txt")}
    (out / "short.txt").write_text("The cortex")
    rows, _ = ablate.held_out(settings_of(out, text=str(out / "short.txt")), subject)
    assert [row.tolist() for row in rows] == [[50256, 464, 20223]]


def bench_of(out: Path, subject: Subject, gpt2, **more) -> experiment.Bench:
    cfg, found = settings_of(out), stimuli.read(out / "items.csv")
    items = token_lists(cfg, subject, found)
    settings = {
        "subject": subject,
        "rows": ablate.held_out(settings_of(out, n_tokens=200), subject)[0],
        "first": items[:4],
        "second": items[4:8],
        "pooling": "mean",
        "pairs": [gpt2.encode_document(text).astype(np.int64) for text, _ in ITEMS[:8]],
        "phenomena": np.array(["a", "b", "b", "b"]),
        "fill": everywhere(subject, 0.2),
        "added": everywhere(subject, 1.5),
    }
    return experiment.Bench(**(settings | more))


@pytest.mark.parametrize("run", ["plain", "post"])
def test_a_lesion_measures_what_the_changed_model_measures(out, gpt2, run):
    """Against a model of changed weights, item by item."""
    subject = subject_of(out, run)
    units, bench = some_units(subject, 3), bench_of(out, subject_of(out, run), gpt2)
    seen, model = bench.under("lesion", units), without(subject, units, bench.fill)
    assert seen.loss == pytest.approx(plain_cross_entropy(model, bench.rows), rel=1e-5)
    scores = plain_scores(model, bench.pairs)
    assert seen.right.tolist() == [good > bad for good, bad in zip(scores[:4], scores[4:], strict=True)]
    patterns = []
    for ids in bench.first + bench.second:
        with torch.no_grad():
            named = model(torch.from_numpy(ids)[None], activations=True).activations
        patterns.append([named[sheet][0].mean(0).numpy() for sheet in subject.sheets])
    test = measures.welch(np.array(patterns[:4]), np.array(patterns[4:]))
    assert seen.t[~units] == pytest.approx(test.t[~units], rel=1e-2, abs=1e-2)
    intact = bench.measure()
    found = experiment.changes(intact, seen, ~units)
    assert found["loss"] == seen.loss - intact.loss
    difference = np.abs(seen.t[~units]).mean() - np.abs(intact.t[~units]).mean()
    assert found["contrast"] == pytest.approx(difference)
    assert found["accuracy"] == 100 * (seen.right.mean() - intact.right.mean())
    assert np.isnan(experiment.changes(intact, seen, everywhere(subject, False))["contrast"])
    assert bench.by_phenomenon(np.array([1, 0, 0.5, 1])) == {"a": 100.0, "b": 50.0}


def test_p_values_are_adjusted_over_all_effects_and_measures():
    def effect(*ps: float) -> dict:
        tests = zip(("loss", "contrast"), ps, strict=True)
        return {"measures": {name: {"units": {"p": p}, "shape": None} for name, p in tests}}

    effects = [effect(0.01, 0.04), effect(0.02, 0.9)]
    experiment.adjust(effects)
    found = [m["units"]["p_adjusted"] for e in effects for m in e["measures"].values()]
    assert found == pytest.approx([0.04, 4 / 3 * 0.04, 0.04, 0.9])


def test_the_unit_that_carries_the_loss_is_found_and_no_other_is(out, gpt2):
    """Planted: unit 5 of layer.1.mlp makes token 7 likely, half of the text; no other does a thing."""
    subject = subject_of(out, "biases")
    model, sheet = subject.model, subject.sheets.index("layer.1.mlp")
    with torch.no_grad():
        for branch in branches(model):
            branch.c_proj.weight.zero_(), branch.c_proj.bias.zero_()
        model.transformer.h[1].mlp.c_proj.bias[5] = 3.0
        model.transformer.wte.weight[:, 5] = 0
        model.transformer.wte.weight[7, 5] = 4.0
    row = np.full(16, 7)
    row[::2] = np.arange(100, 108)
    bench = bench_of(out, subject, gpt2, rows=[row], pairs=None, phenomena=np.array([]))
    bench = bench._replace(fill=everywhere(subject, 0.0))
    targets = [sets.Target(str(unit), np.zeros((4, 16), bool)) for unit in (5, 2)]
    made = []
    for target in targets:
        target.units[sheet, int(target.name)] = True
        draws = [sets.random_units(target.units, 0, k) for k in range(40)]
        made.append(sets.Sets(target, [s for s in draws if not s[sheet, 5]][:19], [], None))
    _, effects = experiment.experiment(bench, made, ["lesion"])
    planted, other = (effect["measures"]["loss"] for effect in effects)
    assert planted["change"] > 0.1 and planted["units"]["p"] == 1 / 20
    assert planted["units"]["mean"] == planted["units"]["high"] == 0
    assert other["change"] == 0 and other["units"]["p"] == 1


def test_p_of_random_targets_spreads_out(out, gpt2):
    """Units that are as random as those they are compared with: no p-value is liked."""
    subject = subject_of(out)
    bench = bench_of(out, subject, gpt2, pairs=None, phenomena=np.array([]))
    bench = bench._replace(rows=[bench.rows[0][:12]])
    shape = np.zeros((4, 16), bool)
    shape[:, :2] = True
    made = [
        sets.sets_of(sets.Target(str(k), sets.random_units(shape, 7, k)), subject.positions, 9, k)
        for k in range(24)
    ]
    _, effects = experiment.experiment(bench, made, ["lesion"])
    for name in ("loss", "contrast"):
        ps = np.array([effect["measures"][name]["units"]["p"] for effect in effects])
        assert 0.3 < ps.mean() < 0.8 and (ps <= 0.2).mean() < 0.5 and len(set(ps.round(3))) > 4


# ---- the command ---------------------------------------------------------------------------------


def arguments(out: Path, run: str = "plain") -> list[str]:
    return [str(out / run), "--no_figures", "--device", "cpu", "--stimuli", str(out / "items.csv")]


def results(out: Path, run: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder = out / run / "evals"
    return json.loads((folder / "ablate.json").read_text()), load_file(folder / "ablate.safetensors")


def test_the_command_measures_sets_as_models_of_changed_weights(out, capsys):
    argv = [*arguments(out), "--control", str(out / "control"), "--units", "5", "1", "64", "--n_items", "3"]
    blimp = write_pairs(out / "blimp.jsonl")
    argv += ["--random_draws", "2", "--n_tokens", "96", "--lesion", "mean", "--blimp", str(blimp)]
    ANALYSIS.main(argv)
    said = capsys.readouterr().out
    headings = [line.split()[0] for line in said.splitlines() if ", intact: " in line]
    assert headings == ["plain,", "control,"] * 3
    for run in ("plain", "control"):
        content, arrays = results(out, run)
        found, subject = content["results"], subject_of(out, run)
        names = [f"{k} most selective" for k in (1, 5, 64)]
        does = list(itertools.product(names, ["lesion", "stimulate"]))
        assert [(effect["target"], effect["do"]) for effect in found["effects"]] == does
        assert found["n_units"] == 64 and found["what"] == "S - N" and found["n_items"] == [3, 3]
        assert content["protocol"]["tokens_predicted"] == 96 and found["n_pairs"] == 9
        assert set(content["data_sha256"]) == {"items.csv", str(out / "val"), str(blimp)}
        rows, _ = ablate.held_out(settings_of(out, run, n_tokens=96), subject)
        intact = plain_cross_entropy(subject.model, rows)
        assert found["intact"]["loss"] == pytest.approx(intact)
        fill = lesions.moments(subject.model, subject.sheets, 16, rows).mean
        for effect in found["effects"][::2]:
            mask, k = arrays[f"target.{effect['target']}"], effect["k"]
            assert mask.dtype == np.uint8 and mask.sum() == k == sum(effect["by_sheet"].values())
            largest = np.sort(arrays["t"].ravel())[::-1]
            assert sorted(arrays["t"][mask == 1]) == pytest.approx(sorted(largest[:k]))
            places = subject.positions.values()
            units = np.stack([g[tuple(p.T)] for g, p in zip(mask, places, strict=True)]) == 1
            loss = effect["measures"]["loss"]
            changed = plain_cross_entropy(without(subject, units, fill), rows) - intact
            assert loss["change"] == pytest.approx(changed, abs=1e-4)
            drawn = [sets.random_units(units, 0, draw) for draw in (0, 1)]
            random = [plain_cross_entropy(without(subject, u, fill), rows) - intact for u in drawn]
            assert loss["units"]["mean"] == pytest.approx(np.mean(random), abs=1e-4)
            assert loss["units"]["p"] in (1 / 3, 2 / 3, 1.0) and loss["shape"] is None
        last = found["effects"][-2]["measures"]  # all units: random sets are the same, and none is left
        assert last["loss"]["units"]["p"] == 1.0
        assert last["contrast"] == {"change": None, "units": None, "shape": None}
        line = next(x for x in said.splitlines() if x.startswith("64 most selective, lesioned")).split()
        if run == "plain":
            assert line[4:6] == ["64", f"{last['loss']['change']:.3f}"]


def test_a_stimulation_by_nothing_changes_nothing(out):
    argv = ["--do", "stimulate", "--strength", "0", "--units", "3", "--random_draws", "3"]
    ANALYSIS.main([*arguments(out), *argv, "--n_tokens", "96", "--blimp", str(write_pairs(out / "b.jsonl"))])
    (effect,) = results(out, "plain")[0]["results"]["effects"]
    for name in ("loss", "contrast", "accuracy"):
        found = effect["measures"][name]
        assert found["change"] == found["units"]["low"] == found["units"]["high"] == 0
        assert found["units"]["p"] == 1


def test_the_same_command_finds_the_same(out):
    argv = [*arguments(out, "biases"), "--units", "3", "--n_tokens", "48", "--random_draws", "3"]
    ANALYSIS.main(argv)
    first, arrays = results(out, "biases")
    ANALYSIS.main(argv)
    again, arrays_again = results(out, "biases")
    assert first["results"] == again["results"] and first["protocol"] == again["protocol"]
    assert all(np.array_equal(a, arrays_again[name]) for name, a in arrays.items())


def test_a_disc_of_a_post_residual_model_stands_beside_its_shape_elsewhere(out, capsys):
    disc = ["--disc", "layer.1.mlp", "--centre", "1", "2", "--radius", "1", "--random_draws", "6"]
    argv = [*arguments(out, "post"), *disc, "--n_tokens", "100", "--do", "lesion"]
    argv.remove("--no_figures")
    ANALYSIS.main(argv)
    content, arrays = results(out, "post")
    (effect,) = content["results"]["effects"]
    assert effect["target"] == "disc of radius 1 at layer.1.mlp 1,2"
    assert effect["by_sheet"] == {"layer.1.mlp": 5} and effect["n_places"] == 4
    assert effect["measures"]["loss"]["shape"]["p"] in {k / 7 for k in range(1, 8)}
    sheet = content["model"]["sheets"].index("layer.1.mlp")
    mask = arrays["target.disc of radius 1 at layer.1.mlp 1,2"]
    assert mask[sheet].sum() == mask.sum() == 5
    said = capsys.readouterr().out
    assert "changed is what their branch adds" in said and "same shape elsewhere" in said
    assert "fits in 4 place(s) of its sheet, too few" in said
    assert all((out / "post" / "evals" / f"ablate.{x}").stat().st_size > 5000 for x in ("png", "svg"))


def test_phenomena_and_clusters_have_their_words(out):
    effect = {"target": "cluster 1, a", "do": "lesion", "k": 3, "n_places": 50}
    test = sets.compare(2.0, [0.0, 1.0, 1.0], "high")._asdict() | {"p_adjusted": 0.25}
    effect["measures"] = {"accuracy": {"change": -2.0, "units": test, "shape": test}}
    effect |= {"phenomena": {"binding": 40.0}, "phenomena_random": {"binding": 55.0}}
    found = Result(
        {
            "model": {"label": "run", "sheets": ["a"]},
            "protocol": {"cluster": 2, "alpha": 0.05, "random_draws": 3, "do": ["lesion"], "lesion": "zero"}
            | {"tokens_predicted": 10, "strength": 2.0},
            "results": {
                "intact": {"accuracy": 60.0, "phenomena": {"binding": 60.0}}, "effects": [effect],
                "n_items": [2, 2], "n_pairs": 7, "what": "S - N", "post_residual": False,
            },
        },
        out,
    )  # fmt: skip
    section = ablate.section([found])
    words, accuracy, phenomena = section.parts[1:]
    assert "more than other places" in words and section.warnings == [
        "run: the contrast is of fewer than 20 items on a side, so it is noisy.",
        "run: 1 cluster(s), as there are no more.",
    ]
    assert [str(x) for x in accuracy.rows[1][2:4]] == ["-2.0", "0.7 (0.1 to 1.0)"]
    assert accuracy.rows[1][4:6] == [0.25, 0.25] and str(accuracy.rows[0][0]).startswith(
        "run, intact: 60.0 %"
    )
    assert [str(x) for x in phenomena.rows[1]] == ["binding", "60.0 %", "40.0 %", "55.0 %"]


def test_by_default_the_language_localiser_is_read(out, tmp_path, capsys):
    folder = tmp_path / "fedorenko2010_localizer"
    folder.mkdir()
    with (folder / "run1.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stim1", *LOCALIZER_WORDS, "stim14"])
        for i, (text, condition) in enumerate(ITEMS[:8]):
            writer.writerow([i, *(text.upper().split() * 4)[:12], condition])
    argv = [str(out / "plain"), "--no_figures", "--device", "cpu", "--stimuli_dir", str(tmp_path)]
    argv += ["--results_dir", str(tmp_path / "found")]
    ANALYSIS.main([*argv, "--n_tokens", "100", "--random_draws", "1"])
    content = json.loads((tmp_path / "found" / "ablate.json").read_text())
    assert "fedorenko2010_localizer" in content["data_sha256"]
    assert content["results"]["n_items"] == [4, 4]
    assert {effect["k"] for effect in content["results"]["effects"]} == {1}  # 1 % of 64


def test_an_exported_folder_with_a_text_of_its_own(out, tmp_path):
    few = ["--n_tokens", "96", "--random_draws", "3"]
    folder = export.export(out / "control", out=tmp_path / "hf")
    (folder / "training_config.yaml").unlink()  # as in a model of somebody else's
    argv = [str(folder), "--no_figures", "--device", "cpu", "--stimuli", str(out / "items.csv")]
    with pytest.raises(UserError, match="is no run, so it has no held-out text.*--text FILE.txt"):
        ANALYSIS.main(argv)
    ANALYSIS.main([*argv, "--text", str(out / "held.txt"), "--units", "4", *few])
    content = json.loads((folder / "evals" / "ablate.json").read_text())
    ANALYSIS.main([*arguments(out, "control"), "--text", str(out / "held.txt"), "--units", "4", *few])
    same = results(out, "control")[0]["results"]["effects"][0]["measures"]["loss"]
    found = content["results"]["effects"][0]["measures"]["loss"]
    assert found["change"] == pytest.approx(same["change"], abs=1e-5)


@pytest.mark.parametrize(
    "argv, reason",
    [
        (
            ["--disc", "layer.2.mlp", "--centre", "0", "0", "--radius", "1"],
            "disc = layer.2.mlp is no sheet of plain",
        ),
        (
            ["--disc", "layer.0.mlp", "--centre", "4", "0", "--radius", "1"],
            "centre = 4 0 is outside the 4x4 sheet",
        ),
        (
            ["--disc", "layer.0.mlp", "--centre", "0", "-1", "--radius", "1"],
            "centre = 0 -1 is outside the 4x4",
        ),
        (
            ["--disc", "layer.0.mlp", "--centre", "0", "0", "--radius", "-1"],
            "radius = -1.0 must be a finite number",
        ),
        (["--disc", "layer.0.mlp", "--centre", "0", "0"], "disc = layer.0.mlp needs a radius"),
        (["--disc", "layer.0.mlp", "--radius", "1"], "disc = layer.0.mlp needs a centre"),
        (["--radius", "2"], "radius has no effect without a disc"),
        (["--cluster", "0"], "cluster = 0 must be"),
        (["--top_percent", "1"], "top_percent has no effect without clusters"),
        (["--cluster", "1", "--top_percent", "0"], "top_percent = 0.0 must be above 0 and at most 100"),
        (["--do", "lesion", "lesion"], "do = lesion lesion must be lesion, stimulate or both"),
        (["--do", "burn"], "--do must be one or more of lesion, stimulate, not burn"),
        (["--strength", "-1"], "strength = -1.0 must be"),
        (["--n_items", "1"], "n_items = 1 must be"),
        (["--blimp_pairs", "0"], "blimp_pairs = 0 must be"),
        (["--blimp", "nothing.parquet"], "nothing.parquet cannot be read as parquet: it is not there"),
        (["--units", "65"], "units = 65 are more than the 64 that plain has"),
        (["--units", "0"], "units = 0 must be"),
        (["--units", "3", "3"], "units = [3, 3] must be different"),
        (["--units"], "units = [] must be different"),
        (["--random_draws", "0"], "random_draws = 0 must be"),
        (["--n_tokens", "0"], "n_tokens = 0 must be"),
        (["--alpha", "1"], "alpha = 1.0 must be between"),
        (["--conditions", "S", "S"], "conditions = S S must be two"),
        (["--conditions", "S", "V"], "0 item(s) of V; the contrast S - V needs two or more"),
        (["--conditions", "S", "W"], "1 item(s) of W"),
        (["--text", "nothing.txt"], "text = nothing.txt cannot be read"),
        (["--text", "EMPTY"], "is empty; give a file of text"),
        (["--text", "LATIN1"], "give a UTF-8 text file"),
        (["--stimuli", "nothing.csv"], "nothing.csv does not exist"),
        (["--lesion", "freeze"], "--lesion must be one of zero, mean, not freeze"),
        (["--checkpoint", "step-3"], "has no checkpoint step-3"),
    ],
)
def test_a_mistake_is_said_in_one_line(out, tmp_path, capsys, argv, reason):
    (tmp_path / "EMPTY").touch()
    (tmp_path / "LATIN1").write_bytes("caf\u00e9".encode("latin-1"))
    argv = [str(tmp_path / x) if x in ("EMPTY", "LATIN1") else x for x in argv]
    with pytest.raises(SystemExit) as stop, user_errors():
        ANALYSIS.main([*arguments(out), *argv])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and reason in line


def test_shards_that_are_gone_have_a_remedy(tmp_path, capsys):
    run = tiny.random_run(tmp_path)
    argv = [str(run), "--no_figures", "--device", "cpu", "--stimuli", str(write_csv(tmp_path / "items.csv"))]
    with pytest.raises(UserError, match="val_data_dir of the run: .*--text FILE.txt"):
        ANALYSIS.main(argv)


def test_a_model_of_other_tokens_is_refused(tmp_path):
    tiny.write_shards(tmp_path)
    run = tiny.random_run(tmp_path, vocab_size=64)
    argv = [str(run), "--no_figures", "--device", "cpu", "--stimuli", str(write_csv(tmp_path / "items.csv"))]
    with pytest.raises(UserError, match="knows 64 tokens, fewer than GPT-2's 50257"):
        ANALYSIS.main(argv)


def test_every_setting_is_said_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(AblateConfig, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "so many most selective units" in said and "l2 distance in cells" in said
