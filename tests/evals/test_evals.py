"""Analyses of sheets: topography, contrasts, localiser, figures. Run: pytest tests/evals/test_evals.py"""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import items
import numpy as np
import pytest
import texts
import tiny
import torch
from scipy import stats

import train
from evals import contrasts, figures, localize, topography
from evals.contrasts import ContrastsConfig
from evals.localize import LocalizeConfig
from evals.topography import TopographyConfig
from topogpt import topo
from topogpt.analysis import activations, heldout, measures, reading
from topogpt.analysis.contrast import Items, t_maps
from topogpt.analysis.results import read
from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import Subject, load_subject
from topogpt.errors import UserError
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import GPTConfig, TopoConfig
from topogpt.spatial.topolm import TopoLMLoss

REFERENCE = texts.DATA / "reference" / "topolm"
ANALYSES = """activations topography contrasts localize dimensionality timescales figures ablate report
    fetch compare""".split()


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory) -> Path:
    return items.write_stimuli(tmp_path_factory.mktemp("stimuli"))


@pytest.fixture(scope="module")
def runs(folder) -> list[Path]:
    """A run and its control, of GPT-2's tokens: 2 layers of 5x5 units."""
    found = []
    for name, loss in (("topographic", "topolm"), ("control", "none")):
        cfg = tiny.config(
            folder,
            name,
            model={"n_layer": 2, "n_head": 5, "n_embd": 25, "vocab_size": 50304, "block_size": 32},
            topo={"loss": loss},
            max_steps=4,
            eval_every=4,
        )
        train.train(cfg)
        found.append(tiny.folder_of(cfg))
    return found


@pytest.fixture(scope="module")
def analysed(runs, stimuli) -> list[Path]:
    """Every analysis of both, through the command line; the folders of their results."""
    for module, more in ((topography, []), (contrasts, []), (localize, ["--smallest_cluster", "2"])):
        given = [runs[0], "--control", runs[1], "--stimuli_dir", stimuli, "--permutations", 49, *more]
        given += ["--shuffles", 19] if module is not topography else []
        module.ANALYSIS.main(list(map(str, given)))
    return [run / "evals" for run in runs]


def some_subject(n_layer: int = 2, n_embd: int = 36, **model) -> Subject:
    torch.manual_seed(0)
    cfg = GPTConfig(
        **{"n_layer": n_layer, "n_head": 2, "n_embd": n_embd, "block_size": 32, "vocab_size": 64} | model
    )
    positions = {s: topo.positions("permuted", n_embd, 0, s) for s in sheet_names(n_layer)}
    return Subject("random", GPT(cfg).eval(), positions, Path(), Path(), None, "")


# ---- the whole way -------------------------------------------------------------------------------


def test_every_analysis_leaves_numbers_arrays_and_figures(analysed, runs):
    for folder in analysed:
        for name in ("topography", "contrasts", "localize"):
            content = read(folder, name).content
            assert content["analysis"] == name and content["results"]
            assert bool(content["summary"]) == (name == "topography")  # the others have too few items
            assert content["model"]["sheets"] == sheet_names(2) and content["model"]["grid"] == [5, 5]
            assert re.fullmatch("[0-9a-f]{64}", content["model"]["weights_sha256"])
            assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in content["data_sha256"].values())
            assert all(np.isfinite(a).all() for a in read(folder, name).arrays.values())
            assert "NaN" not in (folder / f"{name}.json").read_text()
    drawn = {path.name for path in analysed[0].glob("*.png")}
    assert drawn == {path.with_suffix(".png").name for path in analysed[0].glob("*.svg")}
    assert len(drawn) == 3 + 7 + 3
    assert not list(analysed[1].glob("*.png"))  # the control is drawn beside the model


def test_the_tables_show_model_control_and_floor(runs, stimuli, capsys):
    given = [
        runs[0],
        "--control",
        runs[1],
        "--stimuli_dir",
        stimuli,
        "--permutations",
        49,
        "--no_figures",
        "--shuffles",
        19,
    ]
    contrasts.ANALYSIS.main(list(map(str, given)))
    said = capsys.readouterr().out
    lines = said.splitlines()
    head = next(line for line in lines if line.startswith("readout "))
    for word in ("topographic", "control", "labels shuffled", "white noise", "TopoLM", "its control"):
        assert word in head
    assert sum(line.startswith("significant units, raw") for line in lines) == 6
    assert any("to (100%)" in line and "the (100%)" in line for line in lines)
    assert "verb pairs - noun pairs: 4 and 4 items; fewer than 20 on a side carry no headline" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("verb pairs - noun pairs"))
    row = lines[at + 1].split()
    assert row[0] == "raw"
    value = read(runs[0] / "evals", "contrasts").results["contrasts"]["hauptman_verb-noun"]["moran"]["0.0"]
    assert f"{value['mean']:.3f}" in row and f"{value['floor']:.3f}" in row
    assert value["labels"]["value"] == value["mean"] and f"{value['labels']['p']:.3f}" in row
    smoothed = [line for line in lines[at:] if line.startswith("FWHM 2 mm")][0].split()
    assert "0.815" in smoothed and "0.604" in smoothed  # published


def test_the_same_weights_give_the_same_numbers_from_an_export(runs, analysed, stimuli, tmp_path):
    from topogpt.sharing import export

    folder = export.export(runs[0], "best", say=lambda line: None)
    given = [folder, "--stimuli_dir", stimuli, "--permutations", 49, "--no_figures", "--shuffles", 19]
    contrasts.ANALYSIS.main(list(map(str, given)))
    ours, theirs = (read(place, "contrasts").results for place in (analysed[0], folder / "evals"))
    for name, found in ours["contrasts"].items():
        for fwhm, moran in found["moran"].items():
            other = theirs["contrasts"][name]["moran"][fwhm]
            assert other["mean"] == pytest.approx(moran["mean"], abs=1e-4)


def test_figures_are_drawn_from_the_files_alone_and_the_same_again(analysed, runs, tmp_path):
    before = {p.name: p.read_bytes() for p in analysed[0].glob("*.svg")}
    for folder, run in zip(analysed, ("a", "b"), strict=True):
        (tmp_path / run / "evals").mkdir(parents=True)
        for path in folder.glob("*.*s*"):
            if path.suffix in (".json", ".safetensors"):
                (tmp_path / run / "evals" / path.name).write_bytes(path.read_bytes())
    figures.main([str(tmp_path / "a"), "--control", str(tmp_path / "b")])
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "evals").glob("*.svg")} == before


def test_help_and_mistakes_answer_without_torch_or_scipy():
    code = f"import sys; {'; '.join(f'import evals.{name}' for name in ANALYSES)}; "
    code += "import evals.report.__main__; "
    code += "print([m for m in ('torch', 'scipy', 'matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", ANALYSES)
def test_help_says_what_every_flag_is(name):
    done = subprocess.run(
        [sys.executable, "-m", f"evals.{name}", "--help"], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"python -m evals.{name}" in " ".join(done.stdout.split())


def test_a_random_model_of_full_width_meets_the_floor(tmp_path):
    """No map: 8 sheets of 28x28, 40 against 40 items."""
    words = np.random.default_rng(0).integers(1000, 20000, (80, 2))
    rows = [[texts.load().decode(w).strip() or "x", "ab"[i % 2]] for i, w in enumerate(words.tolist())]
    path = items.write_csv(tmp_path / "words.csv", "item,condition", rows)
    subject = some_subject(n_layer=4, n_embd=784, vocab_size=50304)
    cfg = ContrastsConfig(run="-", stimuli=str(path), permutations=199, shuffles=19)
    (found,) = contrasts.analyse(cfg, subject).results["contrasts"].values()
    for fwhm, floor in (("0.0", 0.0), ("1.0", 0.07), ("2.0", 0.60)):
        assert found["moran"][fwhm]["floor"] == pytest.approx(floor, abs=0.011)
        assert found["moran"][fwhm]["mean"] == pytest.approx(found["moran"][fwhm]["floor"], abs=0.03)


# ---- topography ----------------------------------------------------------------------------------


def test_one_pass_over_the_text_gives_the_covariance_and_the_maps_of_a_plain_one(monkeypatch):
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", 70)  # two windows a batch
    subject = some_subject()
    windows = np.random.default_rng(0).integers(0, 64, (5, 32))
    found = topography.collect(subject, windows, n_maps=7)
    with torch.no_grad():
        named = subject.model(torch.from_numpy(windows), activations=True).activations
    at = np.linspace(0, 159, 7).round().astype(int)
    assert found.tokens == windows.ravel()[at].tolist()
    for i, (sheet, p) in enumerate(subject.positions.items()):
        x = topo.on_grid(named[sheet].flatten(0, 1).double().numpy(), p)  # (160, 6, 6)
        np.testing.assert_allclose(found.maps[i], x[at], atol=1e-6)
        flat = x.reshape(160, -1)
        np.testing.assert_allclose(found.covariance[sheet], np.cov(flat.T) * 159, atol=1e-4)
        r = topography.correlations_of(found.covariance[sheet])
        np.testing.assert_allclose(r, np.corrcoef(flat.T), atol=1e-4)


def test_the_spatial_loss_is_that_of_training_over_all_neighbourhoods():
    subject = some_subject(n_embd=100)._replace(
        settings={"topo": {"radius": 3, "distance": "l1", "loss": "topolm"}}
    )
    windows = np.random.default_rng(0).integers(0, 64, (4, 32))
    found = topography.spatial_losses(subject, topography.collect(subject, windows, 1).covariance)
    loss = TopoLMLoss(TopoConfig(radius=3, distance="l1", neighbourhoods=0), subject.positions)
    with torch.no_grad():
        named = subject.model(torch.from_numpy(windows), activations=True).activations
        expected = loss(named, loss.choose(0, 0, 0))
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_planted_map_is_found(analysed):
    """Units whose activation is a smooth function of their place: every measure says so."""
    h = w = 12
    y, x = np.mgrid[:h, :w] / 11.0
    draw = np.random.default_rng(0)
    waves = [np.cos(2 * np.pi * (a * x + b * y + c)) for a, b, c in draw.uniform(0, 0.6, (200, 3))]
    smooth, noise = np.stack(waves), draw.standard_normal((200, h, w))
    subject = some_subject(n_layer=1, n_embd=144)

    def measured(samples: np.ndarray) -> tuple[float, ...]:
        flat = samples.reshape(200, -1)
        covariance = np.cov(flat.T) * 199
        r = topography.correlations_of(covariance)
        curve = measures.curve(r, h, w)
        return (
            topography.spatial_losses(subject, {"sheet": covariance})["sheet"],
            measures.smoothness_correlation(curve),
            measures.wiring_length(r, h, w),
            topography.cluster_size(samples, "largest"),
        )

    loss, smoothness, wiring, cluster = measured(smooth)
    loss0, smoothness0, wiring0, cluster0 = measured(noise)
    assert loss < 0.2 and abs(loss0 - 0.5) < 0.02
    assert smoothness > 0.8 and smoothness0 < 0.1
    assert wiring < 0.5 and abs(wiring0 - 1) < 0.05
    assert cluster > 3 * cluster0


def test_held_out_text_is_the_validation_shards_or_a_file(runs, tmp_path):
    subject = load_subject(TopographyConfig(run=str(runs[0])), str(runs[0]))
    found = heldout.read(subject, None, 100)
    shard = np.fromfile(Path(subject.settings["val_data_dir"][0]) / "one.bin", "<u2", offset=1024)
    assert found.tokens.shape == (3, 32) and found.tokens.ravel().tolist() == shard[:96].tolist()
    path = tmp_path / "a.txt"
    path.write_text("The cortex is a folded sheet of cells.", encoding="utf-8")
    said = heldout.read(subject, str(path), 100)
    assert said.tokens.shape == (1, 10) and said.tokens[0, 0] == 50256
    with pytest.raises(UserError, match="text = .*none.txt cannot be read"):
        heldout.read(subject, str(tmp_path / "none.txt"), 100)
    with pytest.raises(UserError, match="no held-out text of its own; give --text"):
        heldout.read(subject._replace(settings=None), None, 100)
    gone = subject._replace(settings={"val_data_dir": [str(tmp_path / "gone")]})
    with pytest.raises(UserError, match="val_data_dir of the run.*gone.*--text FILE.txt"):
        heldout.read(gone, None, 100)


# ---- contrasts -----------------------------------------------------------------------------------


def test_t_maps_are_unit_by_unit_and_significance_is_over_all_units():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 9, 4, 4)), draw.standard_normal((2, 7, 4, 4))
    a[1, :, 2, 3] += 5
    found = t_maps(ContrastsConfig(run="-"), a, b, 0.0)
    p = np.empty((2, 4, 4))
    for place in np.ndindex(2, 4, 4):
        s, i, j = place
        t, p[place] = stats.ttest_ind(a[s, :, i, j], b[s, :, i, j], equal_var=False)
        assert found.t[place] == pytest.approx(t, rel=1e-6)
    np.testing.assert_allclose(found.p, stats.false_discovery_control(p.ravel()).reshape(p.shape), rtol=1e-5)
    assert found.significant[1, 2, 3] and np.array_equal(found.significant, found.p < 0.05)


def test_the_published_contrasts_have_their_items_and_signs():
    folder = texts.DATA / "stimuli"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/stimuli")
    found = {c.name: c for c in contrasts.published_contrasts(folder)}
    n = {
        k: (int(c.source.where(c.first).sum()), int(c.source.where(c.second).sum())) for k, c in found.items()
    }
    assert n == {
        "moseley_concrete": (40, 40),
        "moseley_abstract": (40, 40),
        "moseley_abstract-concrete": (80, 80),
        "moseley_noun-verb": (80, 80),
        "hauptman_verb-noun": (288, 288),
        "hauptman_content": (288, 288),
    }
    assert found.keys() - contrasts.PUBLISHED.keys() == {"hauptman_content"}
    pairs = found["hauptman_verb-noun"]
    assert pairs.source.items[int(pairs.source.where(pairs.first).argmax())].startswith("to ")  # verb - noun
    content = found["hauptman_content"].source.items
    assert content[0] == "garage rink" and not {"the", "to"} & {w for item in content for w in item.split()}


def test_published_values_are_the_means_of_the_released_files():
    if not REFERENCE.is_dir():
        pytest.skip("needs ../shared/data/reference")
    columns = ["concrete-concrete", "abstract-abstract", "abstract-concrete", "noun-verb"]
    columns = [f"moseley_{c}" for c in columns] + ["elli_noun_verb"]
    for model, key in (("preresid", "topo"), ("nontopo", "control")):
        for smoothing in ("unsmoothed", "smoothed"):
            with (REFERENCE / f"moran_{model}_{smoothing}.csv").open() as file:
                rows = list(csv.DictReader(file))
            for column, published in zip(columns, contrasts.PUBLISHED.values(), strict=True):
                mean = np.mean([float(row[column]) for row in rows])
                assert getattr(published, f"{key}_{smoothing}") == pytest.approx(mean, abs=6e-5), column


BAD = {
    "three_conditions": (
        [["x", "a"], ["y", "b"], ["z", "c"]],
        [],
        "1 of a, 1 of b, 1 of c.*--conditions A B",
    ),
    "one_condition": ([["x", "a"], ["y", "a"]], [], "2 of a.*add items of another condition"),
    "too_few_items": ([["x", "a"], ["y", "a"], ["z", "b"]], [], r"1 item\(s\) of b.*two or more"),
    "unknown_condition": (
        [["x", "a"], ["y", "b"]],
        ["--conditions", "a", "c"],
        "has no c; it has 1 of a, 1 of b",
    ),
    "empty_item": ([["x", "a"], [" ", "b"]], [], "line 3: the item is empty"),
    "no_items": ([], [], "no items"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_stimuli_that_makes_no_contrast_is_one_line(case, runs, tmp_path):
    rows, more, message = BAD[case]
    path = items.write_csv(tmp_path / "mine.csv", "item,condition", rows)
    with pytest.raises(UserError, match=message) as error:
        contrasts.ANALYSIS.main([str(runs[0]), "--stimuli", str(path), *more])
    assert "\n" not in str(error.value) and "mine.csv" in str(error.value)


def test_a_contrast_of_the_users_own(runs, tmp_path, capsys):
    rows = [[w, c] for c, ws in (("b", "tree stone"), ("a", "run sing")) for w in ws.split()]
    path = items.write_csv(tmp_path / "mine.csv", "word,kind", rows)
    given = [str(runs[0]), "--stimuli", str(path), "--item", "word", "--condition", "kind"]
    given += ["--results_dir", str(tmp_path / "res")]
    contrasts.ANALYSIS.main([*given, "--permutations", "19", "--fwhm_mm", "0"])
    content = read(tmp_path / "res", "contrasts-mine").content
    assert list(content["results"]["contrasts"]) == ["b_a"]  # as they come
    t = read(tmp_path / "res", "contrasts-mine").arrays["t.b_a.0.0"]
    subject = load_subject(ContrastsConfig(run=str(runs[0])), str(runs[0]))
    words = texts.load()
    x = activations.of_tokens(subject.model, [words.encode(w).astype(np.int64) for w, _ in rows])
    grids = subject.on_grid(x)
    expected = stats.ttest_ind(grids[:, :2], grids[:, 2:], axis=1, equal_var=False).statistic
    np.testing.assert_allclose(t, expected, rtol=1e-3)
    assert content["results"]["contrasts"]["b_a"]["published"] is None
    drawn = {path.stem for path in (tmp_path / "res").glob("*.png")}
    assert drawn == {"contrasts-mine-b_a-maps", "contrasts-mine-moran"}


# ---- localiser -----------------------------------------------------------------------------------


def planted(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Activations (2, n, 6, 6) to sentences and nonwords: the first sheet's upper half prefers sentences,
    its last row nonwords."""
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, n, 6, 6)), draw.standard_normal((2, n, 6, 6))
    a[0, :, :3] += 3
    b[0, :, 5] += 3
    return a, b


def both(a: np.ndarray, b: np.ndarray) -> Items:
    return Items(np.concatenate([a, b], 1), np.arange(a.shape[1] + b.shape[1]) < a.shape[1], None)


def test_the_network_is_what_answers_to_sentences_and_nothing_else():
    cfg = LocalizeConfig(run="-")
    found = t_maps(cfg, *planted(), 0.0)
    network = localize.chosen(found, cfg.top_percent)
    assert network[0, :3].all() and not network[0, 3:].any() and not network[1].any()
    assert (found.significant & (found.t < 0))[0, 5].all()
    top = localize.chosen(found, 10.0)
    assert top.sum() == 7 and set(np.flatnonzero(top)) == set(np.argsort(-found.t, axis=None)[:7])
    (region,) = localize.clusters_of(network, cfg.smallest_cluster)
    assert region[0] == 0 and region[1].sum() == 18


def test_selectivity_is_checked_on_items_that_did_not_choose():
    a, b = planted(40)
    found = localize.held_out(LocalizeConfig(run="-"), both(a, b))
    assert found["n_network"] == 18
    assert found["same_sign_percent"] == found["significant_again_percent"] == 100
    assert found["effect_size"] == pytest.approx(3, abs=0.5) and abs(found["effect_size_outside"]) < 1.5
    noise = np.random.default_rng(1).standard_normal((2, 2, 40, 6, 6))
    by_chance = localize.held_out(LocalizeConfig(run="-", top_percent=20), both(*noise))
    assert by_chance["significant_again_percent"] < 10 and abs(by_chance["effect_size"]) < 0.3


def test_profiles_are_means_over_units_then_items():
    others = Stimuli("f", ["x"] * 8, list("SSWWJJNN"), "")
    responses = np.random.default_rng(0).random((8, 5))
    found = localize.profile(responses, others)
    for k, condition in enumerate("SWJN"):
        each = [responses[2 * k].mean(), responses[2 * k + 1].mean()]
        assert found[condition]["mean"] == pytest.approx(np.mean(each))
        assert found[condition]["sem"] == pytest.approx(stats.sem(each)) and found[condition]["n"] == 2


def test_the_localizer_writes_network_profiles_and_clusters(analysed):
    content, arrays = (found := read(analysed[0], "localize")).content, found.arrays
    found = content["results"]
    assert found["n_units"] == 100 and found["n_network"] == int(arrays["network"].sum())
    assert found["n_network"] == sum(found["by_sheet"].values())
    assert ((arrays["network"] > 0) <= (arrays["t"] > 0)).all()
    for k, cluster in enumerate(found["clusters"], start=1):
        s = content["model"]["sheets"].index(cluster["sheet"])
        assert (arrays["clusters"][s] == k).sum() == cluster["size"] >= 2
        assert arrays["t"][s, cluster["row"], cluster["column"]] == pytest.approx(cluster["peak_t"], rel=1e-5)
    assert (arrays["clusters"] > 0).sum() == sum(c["size"] for c in found["clusters"])


def test_matched_lengths_read_as_many_first_tokens_of_every_item(runs, stimuli):
    """The shortest item of both sets counts; what follows in an item is not read."""
    cfg = LocalizeConfig(run=str(runs[0]), stimuli_dir=str(stimuli), match_length=True)
    subject, both_sets = load_subject(cfg, cfg.run), localize.stimuli_of(cfg)
    lengths = [len(texts.load().encode(item)) for found in both_sets for item in found.items]
    read = localize.patterns_of(cfg, subject, *both_sets)
    assert set(read.lengths) == {min(lengths)} and max(lengths) > 2 * min(lengths)
    first = texts.load().encode(both_sets[0].items[3])[: min(lengths)].astype(np.int64)
    alone = subject.on_grid(activations.of_tokens(subject.model, [first], "mean", subject.sheets))
    np.testing.assert_allclose(read.patterns[:, 3], alone[:, 0], atol=1e-5)
    whole = localize.patterns_of(replace(cfg, match_length=False), subject, *both_sets)
    assert not np.allclose(whole.patterns[:, 3], alone[:, 0], atol=1e-3)


@pytest.mark.parametrize("value, grey", [(0.05, False), (0.01, True)])
def test_a_map_that_white_noise_reaches_is_no_headline(value, grey):
    """Of 4 sheets and 64 maps; its band is that of one map a sheet, as maps of one text are alike."""
    moran = {"0.0": {"mean": value, "floor": 0.0, "floor_sd": 0.002}}
    results = {"moran": moran, "spatial_loss": {"mean": 0.5}}
    found = SimpleNamespace(results=results, arrays={"maps": np.zeros((4, 64, 2, 2))})
    card = topography.cards([found])[0]
    assert card.values == [value] and (card.grey == "White noise reaches it: no map.") == grey


def test_a_localizer_without_nonwords_is_one_line(runs, stimuli, tmp_path):
    path = items.write_csv(tmp_path / "mine.csv", "item,condition", [["a b", "S"], ["c d", "S"]])
    with pytest.raises(UserError, match="mine.csv: 0 item.s. of N"):
        localize.ANALYSIS.main([str(runs[0]), "--stimuli_dir", str(stimuli), "--localizer", str(path)])
    with pytest.raises(UserError, match="evals.fetch"):
        localize.ANALYSIS.main([str(runs[0]), "--stimuli_dir", str(tmp_path / "nowhere")])


# ---- settings ------------------------------------------------------------------------------------

MISTAKES = {
    "no permutations": (["--permutations", "0"], "permutations = 0"),
    "negative width": (["--fwhm_mm", "0", "-1"], "fwhm_mm"),
    "a width twice": (["--fwhm_mm", "1", "1"], "different widths"),
    "no distance": (["--unit_distance_mm", "0"], "unit_distance_mm = 0.0"),
    "alpha": (["--alpha", "1.5"], "alpha = 1.5"),
    "a side twice": (["--stimuli", "a.csv", "--conditions", "a", "a"], "conditions = a a"),
    "a setting without effect": (["--item", "word"], "item has no effect without --stimuli"),
    "one folder for two": (
        ["--control", "x", "--results_dir", "y"],
        "results_dir has no effect with control",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_setting_is_one_line(case):
    given, message = MISTAKES[case]
    with pytest.raises(UserError, match=message) as error:
        contrasts.ANALYSIS.main(["out/none", *given])
    assert "\n" not in str(error.value)


def test_results_of_another_format_are_not_read(tmp_path):
    (tmp_path / "contrasts.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="no topogpt-eval-2.*python -m evals.contrasts"):
        read(tmp_path, "contrasts")
    with pytest.raises(UserError, match="it is not there"):
        read(tmp_path, "localize")
    with pytest.raises(UserError, match="holds no results to draw"):
        figures.main([str(tmp_path)])


def test_a_diverged_model_is_one_line():
    subject = some_subject()
    subject.model.transformer.h[1].mlp.c_proj.weight.data[3, 2] = torch.inf
    with pytest.raises(UserError, match="layer.1.mlp are not finite.*--checkpoint"):
        activations.of_tokens(subject.model, [np.array([1, 2])])
    with pytest.raises(UserError, match="layer.1.mlp are not finite"):
        topography.collect(subject, np.zeros((1, 8), np.int64), 1)


def test_an_exported_folder_knows_its_radius_and_its_text(runs, analysed):
    """As its run does: the spatial loss and the held-out text are the same without more being said."""
    topography.ANALYSIS.main([str(runs[0] / "hf"), "--permutations", "49", "--no_figures"])
    ours, theirs = (
        read(place, "topography").content for place in (runs[0] / "evals", runs[0] / "hf" / "evals")
    )
    assert theirs["results"]["spatial_loss"]["mean"] == pytest.approx(
        ours["results"]["spatial_loss"]["mean"], abs=1e-4
    )
    assert theirs["data_sha256"] == ours["data_sha256"]
    assert theirs["model"]["label"] == ours["model"]["label"] == "topographic"
