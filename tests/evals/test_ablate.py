"""Lesions take out what they say and nothing else, and are measured as a plain loop measures them.

pytest tests/evals/test_ablate.py
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from evals import ablate
from evals.ablate import ANALYSIS, AblateConfig
from topogpt.analysis import lesions, measures, stimuli
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
    rows, sums = [row.numpy() for row in tokens((7, 33))], everywhere(subject, 0.0)
    for row in rows:
        x = torch.from_numpy(row[None, :-1])
        shown = subject.model(x, activations=True).activations
        stream = subject.model.transformer.wte(x) + subject.model.transformer.wpe(torch.arange(32))
        for i, sheet in enumerate(subject.sheets):  # in forward order, here
            added = shown[sheet] - stream if subject.model.cfg.post_residual else shown[sheet]
            sums[i] += added[0].double().sum(0).numpy()
            stream = stream + added
    found = lesions.mean_outputs(subject.model, subject.sheets, rows)
    assert found == pytest.approx(sums / (7 * 32), abs=1e-5)


# ---- which units ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, column, radius", [(0, 0, 1.5), (2, 1, 1.0), (3, 3, 2.0), (1, 2, 0.0), (2, 2, 99)]
)
def test_a_disc_is_the_cells_within_its_radius(out, subject, row, column, radius):
    cfg = settings_of(out, disc="layer.1.attn", centre=(row, column), radius=radius)
    (lesion,) = ablate.lesions_of(cfg, subject, everywhere(subject, 0.0))
    for sheet, units, among in zip(subject.sheets, lesion.units, lesion.among, strict=True):
        assert among.all() if sheet == "layer.1.attn" else not among.any()
        for unit, (i, j) in enumerate(subject.positions[sheet]):
            inside = ((i - row) ** 2 + (j - column) ** 2) ** 0.5 <= radius
            assert units[unit] == (sheet == "layer.1.attn" and inside)
    assert lesion.units.sum() == {0.0: 1, 1.0: 5, 1.5: 4, 2.0: 6, 99: 16}[radius]


def test_a_disc_is_one_on_the_grid(out, subject):
    cfg = settings_of(out, disc="layer.0.mlp", centre=(1, 1), radius=1)
    (lesion,) = ablate.lesions_of(cfg, subject, everywhere(subject, 0.0))
    grid = subject.on_grid(lesion.units)[subject.sheets.index("layer.0.mlp")]
    assert grid.astype(int).tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_most_selective_are_those_of_largest_t():
    t = np.array([[1.0, -9.0, 3.0], [3.0, 0.0, 2.0]])
    chosen = [set(zip(*np.nonzero(measures.most_selective(t, k)), strict=True)) for k in range(1, 7)]
    order = [(0, 2), (1, 0), (1, 2), (0, 0), (1, 1), (0, 1)]  # the first where t is the same
    assert chosen == [set(order[:k]) for k in range(1, 7)]


def test_sizes_are_those_that_the_model_has(out, subject):
    t = np.arange(64.0).reshape(4, 16)
    assert [x.units.sum() for x in ablate.lesions_of(settings_of(out), subject, t)] == [1, 28]
    found = ablate.lesions_of(settings_of(out, units=(64, 5)), subject, t)
    assert [(x.name, x.units.sum()) for x in found] == [("5 most selective", 5), ("64 most selective", 64)]
    assert found[0].units[3, 11:].all()


def test_random_units_are_as_many_and_others_at_each_draw():
    among = np.ones((4, 16), bool)
    draws = [lesions.random_units(among, 20, seed, draw) for seed in (0, 1) for draw in range(40)]
    assert all(draw.sum() == 20 and draw.shape == (4, 16) for draw in draws)
    assert len({draw.tobytes() for draw in draws}) == 80
    share = np.mean(draws, axis=0)  # each unit is drawn with probability 20/64
    assert abs(share - 20 / 64).max() < 5 * (20 / 64 * 44 / 64 / 80) ** 0.5
    assert np.array_equal(draws[3], lesions.random_units(among, 20, 0, 3))
    assert (lesions.random_units(among, 8, 0, 3) <= draws[3]).all()
    among[1:] = False
    assert not lesions.random_units(among, 16, 0, 0)[1:].any()


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
    assert len(ablate.held_out(settings_of(out), subject)[0]) == 599 // 48  # all that there are


def test_held_out_text_is_one_document(out, subject, gpt2):
    cfg = settings_of(out, text=str(out / "held.txt"), n_tokens=100)
    stream = gpt2.encode_document((out / "held.txt").read_text())
    rows, said = ablate.held_out(cfg, subject)
    assert [row.tolist() for row in rows] == [stream[:49].tolist(), stream[48:97].tolist()]
    assert said == {str(out / "held.txt"): sha256(out / "held.txt")}
    (out / "short.txt").write_text("The cortex")
    rows, _ = ablate.held_out(settings_of(out, text=str(out / "short.txt")), subject)
    assert [row.tolist() for row in rows] == [[50256, 464, 20223]]


@pytest.mark.parametrize("eot", [False, True])
@pytest.mark.parametrize("run", ["plain", "post"])
def test_a_lesion_measures_what_the_changed_model_measures(out, gpt2, run, eot):
    """Against a model of changed weights, item by item, and Benjamini-Hochberg by hand."""
    cfg, subject = settings_of(out, run, eot=eot), subject_of(out, run)
    units, fill = some_units(subject, 3), everywhere(subject, 0.2)
    found = stimuli.read(out / "items.csv")
    rows, _ = ablate.held_out(cfg, subject)
    bench = ablate.bench_of(cfg, subject, found, rows)
    seen = bench.under(units, fill)
    model = without(subject, units, fill)
    assert seen["cross_entropy"] == pytest.approx(plain_cross_entropy(model, rows), rel=1e-5)
    by_condition = {"S": ITEMS[:4], "N": ITEMS[4:8], "W": ITEMS[8:]}
    assert list(seen["conditions"]) == ["N", "S", "W"]
    for name, items in by_condition.items():
        expected = plain_cross_entropy(model, [gpt2.encode_document(text) for text, _ in items])
        assert seen["conditions"][name] == pytest.approx(expected, rel=1e-5)
    patterns = []
    for text, _ in ITEMS[:8]:
        ids = gpt2.encode_document(text) if eot else gpt2.encode(text)
        with torch.no_grad():
            named = model(torch.from_numpy(ids.astype(np.int64))[None], activations=True).activations
        patterns.append([named[sheet][0].mean(0).numpy() for sheet in subject.sheets])
    test = measures.welch(np.array(patterns[:4]), np.array(patterns[4:]))
    with lesions.lesioned(subject.model, subject.sheets, units, fill):
        assert bench.contrast().t[~units] == pytest.approx(test.t[~units], rel=1e-2, abs=1e-2)
    t, p = np.abs(test.t[~units]), np.sort(test.p[~units])
    passing = [i + 1 for i in range(len(p)) if p[i] < 0.05 * (i + 1) / len(p)]
    assert seen["contrast"]["mean_abs_t"] == pytest.approx(t.mean(), rel=1e-3)
    assert seen["contrast"]["significant_percent"] == pytest.approx(100 * max(passing, default=0) / len(p))


def test_draws_are_summed_up():
    draws = [{"a": a, "b": {"c": 2 * a}} for a in (1.0, 2.0, 6.0)]
    expected = {"a_mean": 3.0, "a_sd": 7**0.5, "b": {"c_mean": 6.0, "c_sd": 2 * 7**0.5}}
    found = ablate.summary(draws)
    assert found.pop("b") == pytest.approx(expected.pop("b")) and found == pytest.approx(expected)
    assert ablate.summary(draws[:1]) == {"a_mean": 1.0, "a_sd": None, "b": {"c_mean": 2.0, "c_sd": None}}


# ---- the command ---------------------------------------------------------------------------------


def arguments(out: Path, run: str = "plain") -> list[str]:
    return [str(out / run), "--no_figures", "--device", "cpu", "--stimuli", str(out / "items.csv")]


def results(out: Path, run: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder = out / run / "evals"
    return json.loads((folder / "ablate.json").read_text()), load_file(folder / "ablate.safetensors")


def test_the_command_lesions_a_run_and_its_control(out, capsys):
    argv = [
        *arguments(out),
        "--control",
        str(out / "control"),
        "--units",
        "5",
        "1",
        "64",
        "--random_draws",
        "2",
    ]
    ANALYSIS.main([*argv, "--n_tokens", "200", "--lesion", "mean"])
    said = capsys.readouterr().out
    headings = [line.split()[0] for line in said.splitlines() if "cross-entropy in nats" in line]
    assert headings == ["plain,", "control,"]
    for run in ("plain", "control"):
        content, arrays = results(out, run)
        found, subject = content["results"], subject_of(out, run)
        assert [lesion["name"] for lesion in found["lesions"]] == [f"{k} most selective" for k in (1, 5, 64)]
        assert found["n_units"] == 64 and found["conditions"] == ["S", "N"] == found["what"].split(" - ")
        assert content["protocol"]["tokens_predicted"] == 192 and content["protocol"]["lesion"] == "mean"
        assert set(content["data_sha256"]) == {"items.csv", str(out / "val")}
        assert arrays["t"].shape == (4, 4, 4)
        rows, _ = ablate.held_out(settings_of(out, run, n_tokens=200), subject)
        assert found["no_lesion"]["cross_entropy"] == pytest.approx(plain_cross_entropy(subject.model, rows))
        fill = lesions.mean_outputs(subject.model, subject.sheets, rows)
        largest = np.sort(arrays["t"].ravel())[::-1]
        for lesion in found["lesions"]:
            mask, k = arrays[f"lesioned.{lesion['name']}"], lesion["k"]
            assert mask.dtype == np.uint8 and mask.sum() == k
            assert sorted(arrays["t"][mask == 1]) == pytest.approx(sorted(largest[:k]))
            units = (
                np.stack([g[tuple(p.T)] for g, p in zip(mask, subject.positions.values(), strict=True)]) == 1
            )
            changed = plain_cross_entropy(without(subject, units, fill), rows)
            assert lesion["cross_entropy"] == pytest.approx(changed, rel=1e-5)
            drawn = [lesions.random_units(np.ones((4, 16), bool), k, 0, draw) for draw in (0, 1)]
            random = [plain_cross_entropy(without(subject, u, fill), rows) for u in drawn]
            assert lesion["random"]["cross_entropy_mean"] == pytest.approx(np.mean(random), rel=1e-5)
            assert lesion["random"]["cross_entropy_sd"] == pytest.approx(
                abs(np.diff(random))[0] / 2**0.5, abs=1e-4
            )
            if k < 64:
                left = np.abs(arrays["t"][mask == 0])
                assert lesion["contrast_intact"]["mean_abs_t"] == pytest.approx(left.mean(), rel=1e-5)
        last = found["lesions"][-1]
        assert last["contrast"] == {"significant_percent": None, "mean_abs_t": None}  # no unit is left
        line = next(x for x in said.splitlines() if x.startswith("64 most selective")).split()
        if run == "plain":
            first = found["no_lesion"]["cross_entropy"]
            assert line[3:6] == ["64", f"{last['cross_entropy']:.3f}", f"{last['cross_entropy'] - first:.3f}"]
            assert line[-1] == "-"


def test_the_same_command_finds_the_same(out):
    argv = [*arguments(out, "biases"), "--units", "3", "--n_tokens", "200"]
    ANALYSIS.main(argv)
    first, arrays = results(out, "biases")
    ANALYSIS.main(argv)
    again, arrays_again = results(out, "biases")
    assert first["results"] == again["results"] and first["protocol"] == again["protocol"]
    assert all(np.array_equal(a, arrays_again[name]) for name, a in arrays.items())


def test_a_disc_of_a_post_residual_model(out, capsys):
    disc = ["--disc", "layer.1.mlp", "--centre", "1", "2", "--radius", "1"]
    ANALYSIS.main([*arguments(out, "post"), *disc, "--n_tokens", "100"])
    content, arrays = results(out, "post")
    (lesion,) = content["results"]["lesions"]
    assert lesion["name"] == "disc of radius 1 at layer.1.mlp 1,2" and lesion["k"] == 5
    sheet = content["model"]["sheets"].index("layer.1.mlp")
    mask = arrays["lesioned.disc of radius 1 at layer.1.mlp 1,2"]
    assert mask[sheet].sum() == mask.sum() == 5
    assert "lesioned is what the branch of a sheet adds" in capsys.readouterr().out


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
    assert set(content["results"]["no_lesion"]["conditions"]) == {"S", "N"}
    assert content["results"]["lesions"][1]["random"]["cross_entropy_sd"] is None  # of one draw


def test_an_exported_folder_with_a_text_of_its_own(out, tmp_path):
    folder = export.export(out / "control", out=tmp_path / "hf")
    (folder / "training_config.yaml").unlink()  # as in a model of somebody else's
    argv = [str(folder), "--no_figures", "--device", "cpu", "--stimuli", str(out / "items.csv")]
    with pytest.raises(UserError, match="is no run, so it has no held-out text.*--text FILE.txt"):
        ANALYSIS.main(argv)
    ANALYSIS.main([*argv, "--text", str(out / "held.txt"), "--units", "4", "--n_tokens", "96"])
    content = json.loads((folder / "evals" / "ablate.json").read_text())
    ANALYSIS.main(
        [*arguments(out, "control"), "--text", str(out / "held.txt"), "--units", "4", "--n_tokens", "96"]
    )
    same = results(out, "control")[0]["results"]["lesions"][0]
    assert content["results"]["lesions"][0]["cross_entropy"] == pytest.approx(same["cross_entropy"], rel=1e-5)


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
        (
            ["--units", "4", "--disc", "layer.0.mlp", "--centre", "0", "0", "--radius", "1"],
            "exclude each other",
        ),
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
    assert "sizes of lesions" in said and "l2 distance in cells" in said
