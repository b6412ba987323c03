"""Runs side by side: python -m evals.compare. pytest tests/evals/test_compare.py"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from evals import compare, dimensionality, topography
from topogpt import topo
from topogpt.analysis import comparison, compression, measures, reading, sidebyside
from topogpt.analysis.results import read
from topogpt.analysis.sidebyside import Value
from topogpt.analysis.subject import Subject
from topogpt.config import flat
from topogpt.errors import user_errors
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import CompressConfig, GPTConfig

MORAN, SMOOTH, DIM, KEPT = "I c_fc", "smooth c_fc", "dim layer.*.fc", "loss at 20 %"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with shards, and a run whose copies the others are."""
    folder = tiny.write_shards(tmp_path_factory.mktemp("compare"))
    tiny.random_run(folder, "template", vocab_size=tiny.VOCAB, block_size=16)
    return folder


@pytest.fixture
def plant(template, tmp_path):
    """Make a run out of what its files shall say."""

    def make(name: str, loss: str, seed: int, cross_entropy: float = 3.0, **more) -> Path:
        run = tmp_path / name
        shutil.copytree(template / "template", run, symlinks=True)
        state = json.loads((template / "template" / "best" / "state.json").read_text())
        config = state["config"] | {"run_name": name, "seed": seed, "max_steps": 8}
        config |= {"val_data_dir": [str(template / "val")]} | more.pop("config", {})
        config["topo"] |= {"loss": loss, "seed": seed} | more.pop("topo", {})
        config["model"] |= more.pop("model", {})
        records = more.pop("records", [(0, 4.2), (8, cross_entropy)])
        tiny.seal(run / "best", config=config, **more)
        lines = [{"step": step, "split": "val", "cross_entropy": ce} for step, ce in records]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


@pytest.fixture
def fixed(monkeypatch):
    """No model is read: numbers are a function of the run's name and seed; returns who was measured."""
    asked = []

    def measure(cfg, m, layouts):
        asked.append(Path(m.source).name)
        up = 0.0 if m.is_control else 0.5
        return {
            MORAN: Value(0.01 * m.seed + up, -0.002),
            SMOOTH: Value(0.2 + up, 0.1),
            DIM: Value(40.0 - 20 * up + m.seed, 60.0),
            KEPT: Value(6.0 - up, 5.0),
        }

    monkeypatch.setattr(compare, "measure", measure)
    return asked


def main(*given: object) -> None:
    compare.main([str(a) for a in given])


def result(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text())


def ends(capsys, *given: object) -> str:
    """The one line that a mistake ends with."""
    with pytest.raises(SystemExit) as stop, user_errors():
        main(*given)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# ---- numbers ---------------------------------------------------------------------------------------------


def test_spread_is_that_of_the_textbook():
    assert sidebyside.spread([]) == (0, None, None, None)
    assert sidebyside.spread([2.0]) == (1, 2.0, None, None)
    assert sidebyside.spread([1.0, 3.0]) == (2, 2.0, pytest.approx(2**0.5), None)
    values = [0.3, 0.5, 0.1, 0.7]
    found, interval = sidebyside.spread(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)


def test_planted_runs_give_their_gaps_means_spreads_and_paired_differences(plant, fixed, tmp_path, capsys):
    runs = [plant(f"none-{s}", "none", s, 3 + s / 10) for s in (1, 2)]
    runs += [plant(f"toponets-{s}", "toponets", s, 3 + s / 10 + g) for s, g in ((1, 0.5), (2, 0.3))]
    main(*runs, "--out", tmp_path / "new" / "out")
    none, toponets = result(tmp_path / "new" / "out")["objectives"]
    assert (none["objective"], toponets["objective"]) == ("none", "toponets")
    assert none["seeds"] == toponets["seeds"] == [1, 2]
    loss = toponets["columns"]["loss"]
    assert loss["over_seeds"]["mean"] == pytest.approx(3.55) and loss["minus_control"]["n"] == 2
    assert loss["minus_control"]["mean"] == pytest.approx(0.4)
    assert loss["minus_control"]["sd"] == pytest.approx(0.02**0.5)
    assert loss["minus_control"]["half_width"] is None  # nothing is pretended of two
    assert none["columns"]["loss"]["minus_control"]["n"] == 0
    of_map = toponets["columns"][MORAN]
    assert of_map["over_seeds"]["mean"] == pytest.approx(0.515)
    assert of_map["minus_control"]["mean"] == pytest.approx(0.5)
    assert of_map["minus_control"]["sd"] == pytest.approx(0, abs=1e-12)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("toponets")
    assert lines[at + 1].split() == "seed 1 3.6000 +0.5000 0.510 (-0.002) 0.700 (0.100)".split() + (
        "31.0 (41.0) 5.500 (5.000)".split()
    )
    assert lines[at + 3].split()[:3] == ["mean", "3.5500", "+0.4000"]
    assert lines[at + 4].split()[:3] == ["sd", "0.0707", "0.1414"]
    assert lines[at + 5].split() == "- control +0.4000 +0.500 +0.500 -10.0 -0.500".split()
    assert "95 %" not in lines[at + 7] and max(map(len, lines[: at + 7])) <= 120


def test_three_seeds_have_an_interval_of_their_paired_differences(plant, fixed, tmp_path, capsys):
    gaps = {1: 0.5, 2: 0.3, 3: 0.1}
    runs = [plant(f"none-{s}", "none", s, 3 + s) for s in gaps]
    runs += [plant(f"topolm-{s}", "topolm", s, 3 + s + g) for s, g in gaps.items()]
    main(*runs, "--out", tmp_path / "out")
    found = result(tmp_path / "out")["objectives"][1]["columns"]["loss"]["minus_control"]
    assert found["half_width"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.2 / 3**0.5)
    row = next(line for line in capsys.readouterr().out.splitlines() if "+- 95 %  " in line)
    assert row.split()[3] == f"{found['half_width']:.4f}"


def test_the_order_of_the_runs_does_not_matter(plant, fixed, tmp_path, capsys):
    runs = [plant(f"none-{s}", "none", s) for s in (1, 2)]
    runs += [plant(f"t{tau}-{s}", "toponets", s, topo={"tau": tau}) for tau in (50.0, 5.0) for s in (2, 1)]
    main(*runs, "--out", tmp_path / "a")
    main(*runs[::-1], "--out", tmp_path / "b")
    for kind in ("md", "csv"):
        assert (tmp_path / "a" / f"compare.{kind}").read_text() == (
            tmp_path / "b" / f"compare.{kind}"
        ).read_text()
    objectives = [o["objective"] for o in result(tmp_path / "a")["objectives"]]
    assert objectives == ["none", "toponets, tau 5", "toponets, tau 50"]
    assert sorted(fixed) == sorted(run.name for run in runs)  # and nothing twice


def test_csv_and_markdown_hold_the_same(plant, fixed, tmp_path):
    runs = [plant("n", "none", 1, 3.0), plant("w", "wiring", 1, 3.25)]
    main(*runs, "--out", tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        none, wiring = csv.DictReader(file)
    assert (none["gap"], wiring["gap"], wiring["control"]) == ("", "0.25", str(runs[0]))
    assert wiring["seed"] == "1" and wiring["I c_fc: white noise"] == "-0.002"
    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and rows[1].startswith("| --- | ---: |")
    assert "| **wiring** |" in lines[4] and "+0.2500" in lines[5]


# ---- objectives and controls -----------------------------------------------------------------------------


def members(*runs: Path) -> list[comparison.Member]:
    return [
        comparison.member(
            str(run),
            json.loads((run / "best" / "state.json").read_text()),
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        )
        for run in runs
    ]


def labels(*runs: Path, by: tuple[str, ...] = ()) -> list[str]:
    return [o.label for o in comparison.compare(members(*runs), by).objectives]


def test_a_label_names_exactly_what_differs(plant):
    none = plant("none", "none", 1, topo={"tau": 7.0, "radius": 3, "positions": "identity"})
    topolm = plant("topolm", "topolm", 1, topo={"weight": 9.0, "tau": 7.0})
    weak, strong = (plant(f"t{tau}", "toponets", 1, topo={"tau": tau}) for tau in (1.0, 50.0))
    assert labels(none, topolm, weak) == ["none", "topolm", "toponets"]  # as no loss has two weights
    assert labels(strong, none, weak) == ["none", "toponets, tau 1", "toponets, tau 50"]
    small = plant("small", "toponets", 1, topo={"tau": 1.0, "factor_h": 2.0})
    named = ["toponets, tau 1, factor_h 2", "toponets, tau 1, factor_h 8", "toponets, tau 50, factor_h 8"]
    assert labels(weak, strong, small) == named
    longer = plant("longer", "none", 1, config={"max_steps": 16}, records=[(8, 3.0), (16, 2.9)])
    assert labels(none, longer) == ["none, max_steps 8", "none, max_steps 16"]
    shown = plant("shown", "none", 2, config={"out_dir": "elsewhere", "log_every": 5, "wandb": True})
    assert labels(none, shown) == ["none"]


def test_by_says_what_is_one_objective(plant, fixed, capsys):
    runs = [plant("none", "none", 1)]
    runs += [plant(f"t{tau}", "toponets", int(tau), topo={"tau": tau}) for tau in (1.0, 50.0)]
    assert labels(*runs, by=("topo.loss",)) == ["none", "toponets"]
    main(*runs, "--by", "topo.loss")
    assert "toponets: its runs differ in topo.tau" in capsys.readouterr().out


def test_the_settings_that_a_loss_reads_are_settings():
    assert comparison.READ_BY.keys() <= comparison.known().keys()
    everything = flat({"topo": {}, **{k: 0 for k in comparison.ELSEWHERE}})
    assert not everything.keys() & comparison.known().keys()


def test_a_control_of_another_seed_is_not_used(plant, fixed, tmp_path, capsys):
    runs = [
        plant("none-1", "none", 1),
        plant("topolm-1", "topolm", 1, 3.5),
        plant("topolm-2", "topolm", 2, 4),
    ]
    main(*runs, "--out", tmp_path / "out")
    gaps = {Path(run["run"]).name: run["gap"] for run in result(tmp_path / "out")["runs"]}
    assert gaps == {"none-1": None, "topolm-1": 0.5, "topolm-2": None}
    assert "topolm-2: no gap, as no control has seed 2 (only 1)" in capsys.readouterr().out


def test_a_control_that_differs_in_more_than_the_objective_is_not_used(plant):
    other = plant("none", "none", 1, config={"max_steps": 16}, records=[(8, 3.0), (16, 2.9)])
    topolm = plant("topolm", "topolm", 1, 3.5)
    found = comparison.compare(members(other, topolm))
    assert not found.controls
    assert found.warnings[0].endswith("more than objective and seed: max_steps (8, 16)")
    assert found.warnings[1].endswith("none differs in max_steps (16, 8), too")
    fitting = plant("none-8", "none", 1)
    assert comparison.compare(members(other, topolm, fitting)).controls[str(topolm)].source == str(fitting)
    assert comparison.compare(members(topolm)).warnings[0].startswith("no run is a control")


def test_other_training_text_is_another_objective(plant):
    data = [{"train_data_dir": letter * 64, "val_data_dir": "c" * 64} for letter in "ab"]
    runs = [plant(f"n{i}", "none", 1, data=d) for i, d in enumerate(data)]
    assert labels(*runs) == ["none, train_data_dir aaaaaaaa", "none, train_data_dir bbbbbbbb"]


def test_a_run_that_is_not_finished_has_no_gap_and_one_that_stopped_early_has(plant):
    control = plant("none", "none", 1, config={"max_steps": 16}, records=[(8, 3.0), (16, 2.9)])
    half = plant("half", "topolm", 1, config={"max_steps": 16, "patience": 3}, records=[(8, 3.1), (12, 3.2)])
    found = comparison.compare(members(control, half))
    assert not found.controls and found.warnings[-1].endswith("half came to 12 of 16 steps")
    rising = [(8, 3.1), (9, 3.2), (10, 3.3), (11, 3.4)]
    patience = {"max_steps": 16, "patience": 3}
    control = plant("none-p", "none", 1, config=patience, records=[(8, 3.0), (16, 2.9)])
    early = plant("early", "topolm", 1, config=patience, records=rising)
    assert comparison.compare(members(control, early)).controls.keys() == {str(early)}
    assert comparison.rises([3, 2, 2.5, 2.6]) == 2 and comparison.rises([3, 2]) == 0
    assert comparison.rises([3.0, float("nan")]) == 1 and comparison.rises([]) == 0


# ---- what is measured ------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_single_analyses(plant, tmp_path):
    run = plant("one", "none", 1)
    main(run, "--n_tokens", 480, "--keep", 0.5, "--n_maps", 20, "--out", tmp_path / "out")
    (found,) = result(tmp_path / "out")["runs"]
    given = [run, "--n_tokens", 480, "--no_figures"]
    topography.ANALYSIS.main([*map(str, given), "--n_maps", "20", "--fwhm_mm", "0"])
    dimensionality.ANALYSIS.main(list(map(str, given)))
    single = read(run / "evals", "topography").results
    assert found["I branch"] == pytest.approx(single["moran"]["0.0"]["mean"], abs=1e-9)
    assert found["I branch: white noise"] == pytest.approx(single["moran"]["0.0"]["floor"], abs=1e-9)
    assert found["smooth branch"] == pytest.approx(single["smoothness_correlation"]["mean"], abs=1e-9)
    kind = read(run / "evals", "dimensionality").results["kinds"]["layer.*.fc"]
    assert found[DIM] == pytest.approx(kind["value"], rel=1e-6)
    assert found[f"{DIM}: units shuffled"] == pytest.approx(kind["shuffled"], rel=1e-6)
    cfg = CompressConfig(run=str(run), keep=(0.5,), method=("downsample",), n_tokens=480)
    whole, half = compression.measure(cfg).models[0].rows
    assert found["loss at 50 %"] == pytest.approx(half.loss, rel=1e-6)
    assert found["loss at 50 %: whole model"] == pytest.approx(whole.loss, rel=1e-6)
    assert abs(half.loss - whole.loss) > 1e-3  # so that they cannot be confused


def some_subject() -> Subject:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=64)).eval()
    positions = {s: topo.positions("permuted", 16, 0, s) for s in sheet_names(2)}
    return Subject("random", model, positions, Path(), Path(), {}, "")


def test_sheets_of_c_fc_lie_row_by_row_and_are_measured_like_those_of_the_branches(monkeypatch):
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", 70)  # two windows a batch
    subject = some_subject()
    windows = np.random.default_rng(0).integers(0, 64, (5, 32))
    on_c_fc = subject.on_layout("c_fc")
    assert on_c_fc.sheets == ["layer.0.fc", "layer.1.fc"] and on_c_fc.grid == (8, 8)
    found, seen = reading.collect(on_c_fc, windows, 7), []
    c_fc = subject.model.transformer.h[1].mlp.c_fc
    c_fc.register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        subject.model(torch.from_numpy(windows))
    x = seen[0].flatten(0, 1).numpy()
    places = np.linspace(0, 159, 7).round().astype(int)
    assert found.maps.shape == (2, 7, 8, 8) and found.tokens == windows.ravel()[places].tolist()
    np.testing.assert_allclose(found.maps[1], x[places].reshape(7, 8, 8), atol=1e-6)
    expected = np.cov(x.T) * (len(x) - 1)
    np.testing.assert_allclose(found.covariance["layer.1.fc"], expected, atol=1e-4 * expected.max())


def test_sheets_of_the_model_s_own_come_first():
    subject = some_subject()
    assert subject.on_layout("per_branch") is subject
    on_c_fc = subject.on_layout("c_fc").positions["layer.1.fc"]
    assert np.array_equal(on_c_fc, topo.positions("identity", 64, 0, ""))
    mine = {s: topo.positions("permuted", 64, 3, s) for s in ("layer.0.fc", "layer.1.fc")}
    subject = subject._replace(positions=mine)
    assert subject.on_layout("c_fc").positions == mine
    at = subject.on_layout("per_branch").positions
    assert list(at) == sheet_names(2) and at["layer.1.mlp"][5].tolist() == [1, 1]


@pytest.mark.parametrize(
    "own, is_control, layouts",
    [
        ("per_branch", False, ["per_branch", "c_fc"]),
        ("c_fc", False, ["per_branch", "c_fc"]),
        ("one_sheet", False, ["c_fc", "one_sheet"]),
        ("per_branch", True, ["per_branch", "c_fc", "one_sheet"]),
    ],
)
def test_a_control_is_looked_at_on_the_sheets_of_all(own, is_control, layouts):
    assert compare.layouts_of(own, ["per_branch", "one_sheet"], is_control) == layouts


def test_a_map_in_c_fc_alone_is_seen_in_c_fc_alone():
    subject = some_subject()
    row, column = np.divmod(np.arange(64), 8)
    waves = [np.cos((i + 1) * np.pi * row / 8) + np.cos((i % 3 + 1) * np.pi * column / 8) for i in range(16)]
    for block in subject.model.transformer.h:
        block.mlp.c_fc.weight.data = torch.tensor(
            np.stack(waves, 1) / (1 + np.arange(16)), dtype=torch.float32
        )
    windows = np.random.default_rng(0).integers(0, 64, (8, 32))
    found = compare.map_of(subject, windows, 16, "branch")
    found |= compare.map_of(subject.on_layout("c_fc"), windows, 16, "c_fc")
    assert found["I c_fc"].value > 0.5 and abs(found["I branch"].value - found["I branch"].null) < 0.1
    assert found["I c_fc"].null == pytest.approx(topo.noise_floor(8, 8)[0], abs=0.02)
    assert found["smooth c_fc"].value > 2 * found["smooth c_fc"].null
    assert found["smooth branch"].value < 2 * found["smooth branch"].null


def test_the_null_of_smoothness_is_the_same_units_laid_at_random():
    draw = np.random.default_rng(0)
    at = np.stack(np.divmod(np.arange(36), 6), 1)
    near = np.exp(-np.linalg.norm(at[:, None] - at, axis=-1) / 2)
    order = draw.permutation(36)
    mapped, mixed = compare.smoothness(near, 6, 6), compare.smoothness(near[order][:, order], 6, 6)
    assert mapped.value == pytest.approx(measures.smoothness_correlation(measures.curve(near, 6, 6)))
    assert mapped.value > 3 * mapped.null
    for null in (mapped.null, mixed.null):  # whichever way the units lay before
        assert null == pytest.approx(mixed.value, rel=0.5)


def test_a_run_is_measured_again_only_when_it_or_the_question_changed(plant, fixed, capsys):
    run = plant("one", "none", 1)
    main(run)
    main(run)
    assert fixed == ["one"] and capsys.readouterr().out.count("measured in") == 1
    main(run, "--keep", 0.5)
    assert fixed == ["one"] * 2
    main(run, "--keep", 0.5)
    assert fixed == ["one"] * 2
    path = run / "best" / "model.safetensors"
    weights = load_file(path)
    weights["transformer.wte.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    tiny.seal(run / "best")
    main(run, "--keep", 0.5)
    assert fixed == ["one"] * 3
    (run / "evals" / "compare.json").write_text("{")  # no file of ours
    main(run, "--keep", 0.5)
    assert fixed == ["one"] * 4


def test_an_interrupted_call_goes_on(plant, fixed, monkeypatch):
    runs = [plant(name, "none", seed) for seed, name in enumerate("abc")]
    whole = compare.measure

    def interrupted(cfg, m, layouts):
        if m.source.endswith("c"):
            raise KeyboardInterrupt
        return whole(cfg, m, layouts)

    monkeypatch.setattr(compare, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(*runs)
    monkeypatch.setattr(compare, "measure", whole)
    main(*runs)
    assert fixed == ["a", "b", "c"]


def test_the_figure_has_a_point_a_seed_and_the_null(plant, fixed, tmp_path):
    runs = [
        plant(f"{loss}-{s}", loss, s, 3 + s * (loss != "none")) for loss in ("none", "topolm") for s in (1, 2)
    ]
    numbers = {str(run): compare.measure(None, m, []) for run, m in zip(runs, members(*runs), strict=True)}
    compared = comparison.compare(members(*runs))
    figure = sidebyside.draw(sidebyside.Found(compared, numbers, [MORAN, SMOOTH], {}, {}))
    (axis,) = figure.axes
    none, topolm, null = axis.lines[:3]
    assert [list(map(float, xy)) for xy in topolm.get_xydata()] == [[0.51, 1.0], [0.52, 2.0]]
    assert none.get_ydata().tolist() == [0, 0] and list(null.get_xdata()) == [-0.002, -0.002]
    assert none.get_color() != topolm.get_color()
    assert {t.get_text() for t in figure.legends[0].get_texts()} >= {"none", "topolm"}
    main(*runs, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    main(*runs[2:], "--out", tmp_path / "out")  # no control: no gap, and no figure of other runs
    assert not (tmp_path / "out" / "compare.png").exists()


# ---- mistakes --------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_compared_are_refused(plant, capsys):
    one = plant("one", "none", 1, data={"train_data_dir": "a" * 64, "val_data_dir": "b" * 64})
    other = plant("other", "none", 2, data={"train_data_dir": "a" * 64, "val_data_dir": "c" * 64})
    assert "validated on another text (cccccccc) than" in ends(capsys, one, other)
    fewer = plant("fewer", "none", 1, config={"val_tokens": 32})
    same = plant("same", "none", 2)
    assert "another number of tokens (592) than" in ends(capsys, fewer, same)
    narrow = plant("narrow", "none", 2, model={"n_inner": 16})
    assert "has n_hidden 16, but" in ends(capsys, same, narrow)
    again = plant("again", "none", 2)
    assert "are both none, seed 2; give one of them" in ends(capsys, same, again)


def test_mistakes_are_one_line(plant, tmp_path, capsys):
    run = plant("run", "none", 1)
    assert "runs are missing" in ends(capsys)
    assert f"run {tmp_path / 'nothere'} does not exist" in ends(capsys, run, tmp_path / "nothere")
    assert "are one run; give it once" in ends(capsys, run, f"{run}/")
    link = tmp_path / "link"
    link.symlink_to(run)
    assert "are one run; give it once" in ends(capsys, run, link)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "topography.json").write_text("{}")
    assert "is an exported folder" in ends(capsys, hf)
    young = plant("young", "none", 1, records=[])
    assert "no finished evaluation yet" in ends(capsys, young)
    between = plant("between", "none", 1, records=[(4, 3.0)])
    assert "was not evaluated at step 8, only at 4" in ends(capsys, between)
    (tmp_path / "file").touch()
    line = ends(capsys, run, "--out", tmp_path / "file" / "out")
    assert f"out = {tmp_path / 'file' / 'out'} cannot be written" in line and "--out" in line
    assert "by = topo.los is no setting" in ends(capsys, run, "--by", "topo.los")
    assert "did you mean topo.loss?" in ends(capsys, run, "--by", "topo.los")
    assert "keep = 1.5" in ends(capsys, run, "--keep", "1.5")
    assert "sheets = foo are none of" in ends(capsys, run, "--sheets", "foo")
    assert "names = foo is no sheet" in ends(capsys, run, "--names", "foo", "--n_tokens", 64)
    assert not (run / "evals" / "compare.json").exists()


def test_other_text_than_the_losses_are_of_is_refused(plant, template, capsys):
    lost = plant("lost", "none", 1, config={"val_data_dir": ["nowhere"]})
    line = ends(capsys, lost)
    assert "nowhere matches no shard" in line and "--val_data_dir" in line
    main(lost, "--val_data_dir", template / "val", "--n_tokens", 64)
    known = plant("known", "none", 1, data={"train_data_dir": "a" * 64, "val_data_dir": "b" * 64})
    assert "is not the text that its loss is of" in ends(capsys, known)


def test_a_run_that_may_not_be_written_is_measured_all_the_same(plant, fixed, capsys):
    run = plant("run", "none", 1)
    (run / "evals").touch()  # no folder can be made here
    main(run)
    said = capsys.readouterr().out
    assert "compare.json cannot be written" in said and "seed 1" in said
