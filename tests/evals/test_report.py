"""The report: one page that needs nothing else, and a reader that shows what the model does.

pytest tests/evals/test_report.py

The last test drives the page in a browser, and is skipped where none is installed.
"""

import base64
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import texts
import tiny
import torch
from items import write_stimuli
from markupsafe import escape

import evals
from evals import contrasts
from evals.ablate import AblateConfig
from evals.report import __main__ as report
from evals.report import overview, page, reader
from topogpt import topo
from topogpt.analysis import nulls, section
from topogpt.analysis.results import read
from topogpt.analysis.section import Card, Number, Table
from topogpt.analysis.subject import EvalConfig, load_subject
from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.sharing import export
from topogpt.text import tokenizer
from train import train

pytest.importorskip("matplotlib")
HOSTILE = "<img src=x onerror=boom()>&\"'"  # a name of a run
TEXT = (
    "The cortex\u2019s </script><script>boom()</script> <!-- HEAD --> folds & folds.\n\nIt is \u6f22\u5b57."
)
SHAPE = {"n_layer": 2, "n_embd": 20, "n_head": 2, "block_size": 32, "vocab_size": 50304, "dropout": 0.0}
ANALYSES = section.discover(evals)
ReportConfig = report.config_with(ANALYSES)
SECTIONS = (
    "head reader training topography contrasts localize dimensionality ablate timescales provenance".split()
)


@pytest.fixture(scope="module")
def runs(folder) -> list[Path]:
    """A run with a hostile name and its control, of GPT-2's tokens: 4 sheets of 4x5 units."""
    found = []
    for name, loss in ((HOSTILE, "topolm"), ("control", "none")):
        cfg = tiny.config(folder, name, model=SHAPE, topo={"loss": loss}, max_steps=4)
        train(cfg)
        found.append(tiny.folder_of(cfg))
    return found


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory) -> Path:
    return write_stimuli(tmp_path_factory.mktemp("stimuli"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "a&b.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def arguments(runs: list[Path], *more: object) -> list[str]:
    control = ["--control", runs[1]] if runs[1:] else []
    return [str(a) for a in (runs[0], *control, "--device", "cpu", "--sample_tokens", 400, *more)]


@pytest.fixture(scope="module")
def made(runs, stimuli, text) -> Path:
    """The report of both runs, with every analysis but the lesions, on our text."""
    report.main(arguments(runs, "--stimuli_dir", stimuli, "--texts", text))
    return runs[0] / "evals" / "report.html"


@pytest.fixture(scope="module")
def written(made) -> str:
    return made.read_text(encoding="utf-8")


def data_of(written: str) -> dict:
    found = re.search(r'<script type="application/json" id="reader-data">(.*?)</script>', written, re.S)
    return json.loads(found[1])


def without_data(written: str) -> str:
    return re.sub(r'(id="reader-data">).*?(</script>)', r"\1\2", written, flags=re.S)


def section_of(written: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?</section>', without_data(written), re.S)[0]


# ---- the page ------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, name, attributes) -> None:
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name) -> None:
        assert self.open and self.open.pop() == name, (name, self.getpos())


def test_page_has_every_section_and_its_elements_are_closed(written):
    assert re.findall(r'<section id="(\w+)"', written) == SECTIONS
    assert not re.search(r"<!-- [A-Z_]+ -->", without_data(written))
    balance = Balance()
    balance.feed(written)
    assert balance.open == []


def test_page_fetches_nothing(written):
    found = re.findall(r"""(?:src|href|action|srcset|poster)\s*=\s*["']?([^"'\s>]*)""", without_data(written))
    outside = [address for address in found if not address.startswith(("#", "data:image/png;base64,"))]
    assert set(outside) <= {"x"}  # of the hostile name, escaped: no element
    assert not re.search(
        r"<(link|iframe|object|embed|base)\b|@import|url\(|https?:|//[a-z]", page_text(written)
    )
    assert not re.search(r"\b(fetch|XMLHttpRequest|importScripts|eval|Function)\s*\(|innerHTML", written)


def page_text(written: str) -> str:
    """What we wrote ourselves: without pictures, data and comments of the script."""
    return re.sub(r"data:image/png;base64,[\w+/=]*|//[ -].*", "", without_data(written))


def test_every_figure_of_the_analyses_is_inside_with_a_caption(made, written):
    pictures = sorted(made.parent.glob("*.png"))
    assert len(pictures) > 10
    for path in pictures:
        assert base64.b64encode(path.read_bytes()).decode() in written, path.name
    for figure in re.findall(r"<figure.*?</figure>", without_data(written), re.S):
        assert re.search(r"<figcaption[^>]*>", figure)
    shown = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<figcaption>(.*?)</figcaption>", written)]
    assert [int(re.match(r"Figure (\d+)", c)[1]) for c in shown] == list(range(1, len(shown) + 1))
    assert shown.pop(0) == "Figure 1. "  # the reader's, which its script fills
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', without_data(written))
    assert len(alts) == len(set(alts)) and all(len(alt) > 40 for alt in alts)
    assert any("control: mean Moran&#39;s I" in alt for alt in alts)
    assert len(shown) == len(pictures) + 1 and all("drew it" not in c and len(c) > 60 for c in shown)


def test_names_and_texts_are_escaped(written):
    assert escape(HOSTILE) in written
    assert "<img src=x" not in written and "boom()</script>" not in written
    assert written.count("<script") == written.count("</script>") == 2


def test_numbers_of_the_analyses_are_in_their_tables(made, runs, written):
    contents = {name: [read(run / "evals", name).results for run in runs] for name in SECTIONS[3:6]}
    for i in range(2):
        found = contents["topography"][i]
        values = [found["moran"][fwhm]["mean"] for fwhm in ("0.0", "1.0", "2.0")]
        values += [found[k]["mean"] for k in ("spatial_loss", "wiring_length", "smoothness_tdann")]
        values += [found["moran"]["1.0"]["floor"], found["smoothness_correlation"]["mean"]]
        assert [v for v in values if page.shown(v) not in section_of(written, "topography")] == []
        contrast = contents["contrasts"][i]["contrasts"]["moseley_noun-verb"]
        for value in (contrast["moran"]["2.0"]["mean"], contrast["published"]["topo_smoothed"]):
            assert f">{page.shown(value)}<" in section_of(written, "contrasts")
        localize = contents["localize"][i]
        network = section_of(written, "localize")
        assert f">{page.shown(localize['n_network'])}<" in network
        assert page.shown(Number(localize["profiles"]["network"]["J"]["mean"], 4)) in network
    cards = section_of(written, "head")
    assert page.shown(contents["topography"][1]["moran"]["0.0"]["mean"]) in cards
    last = tiny.records(runs[0], "val")
    best = min(last, key=lambda r: r["cross_entropy"])
    assert f">{page.shown(best['cross_entropy'])}<" in cards


def test_provenance_says_what_repeats_the_report(written, runs):
    said = html.unescape(re.sub(r"<[^>]+>", " ", section_of(written, "provenance")))
    content = read(runs[0] / "evals", "localize").content
    assert content["model"]["weights_sha256"] in said
    assert all(digest in said for digest in content["data_sha256"].values())
    commands = html.unescape(re.search(r"<pre>(.*?)</pre>", section_of(written, "provenance"), re.S)[1])
    line = commands.splitlines()[-1]
    assert shlex.split(line)[2:] == ["evals.report", str(runs[0]), "--control", str(runs[1])]
    assert "n_embd: 20" in said and "permutations: 999" in said


# ---- what is run ---------------------------------------------------------------------------------


def shown(name: str, run: Path, *more: object) -> report.Shown:
    """What the report has of one analysis."""
    cfg = parse(ReportConfig, arguments([run], "--no_figures", *more))
    model = report.Model(str(run), load_subject(cfg, str(run)))
    return report.shown(cfg, name, ANALYSES[name], [model])


@pytest.fixture
def alone(tmp_path) -> Path:
    """A run that was never analysed."""
    tiny.write_shards(tmp_path)
    return tiny.random_run(tmp_path, "alone")


def test_results_that_are_there_are_not_made_again_but_stale_ones_are(alone):
    path = alone / "evals" / "topography.json"
    assert "there were no results" in shown("topography", alone).done[0]
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"written": "before"}))
    assert shown("topography", alone).done == []
    assert shown("topography", alone).found[0].content["written"] == "before"

    again = shown("topography", alone, "--redo")
    assert "--redo" in again.done[0] and again.found[0].content["written"] != "before"
    content["model"] |= {"weights_sha256": "0" * 64, "checkpoint": "step-000001"}
    path.write_text(json.dumps(content))
    again = shown("topography", alone)
    assert "other weights (step-000001)" in again.done[0]
    assert again.found[0].content["model"]["weights_sha256"] != "0" * 64
    content = json.loads(path.read_text())
    del content["protocol"]["n_maps"]
    path.write_text(json.dumps(content))
    assert "of an older version, without n_maps" in shown("topography", alone).done[0]
    path.write_text("{")
    assert "topography.json cannot be read" in shown("topography", alone).done[0]


def test_missing_stimuli_are_a_line_and_stale_results_are_not_shown(alone, tmp_path, capsys):
    report.main(arguments([alone], "--stimuli_dir", tmp_path / "none"))
    assert "contrasts: alone: no results. " in capsys.readouterr().out
    written = (alone / "evals" / "report.html").read_text(encoding="utf-8")
    for name in ("contrasts", "localize"):
        said = section_of(written, name)
        assert "does not exist" in said or "holds no CSV files" in said
        assert "python -m evals.fetch" in said and f"python -m evals.{name} " in said
        assert "<table" not in said and "<img" not in said
    assert "<table" in section_of(written, "topography")

    content = json.loads((alone / "evals" / "topography.json").read_text())
    content["model"]["weights_sha256"] = "0" * 64
    (alone / "evals" / "contrasts.json").write_text(json.dumps(content))
    found = shown("contrasts", alone, "--stimuli_dir", tmp_path / "none")
    assert found.found == [] and "python -m evals.fetch" in found.missing[0]


def test_contrasts_of_the_users_own_stand_beside_the_published_ones(alone, stimuli, tmp_path):
    path = tmp_path / "music.csv"
    path.write_text("item,condition\na song,music\nthe drum,music\na word,speech\nto say,speech\n")
    contrasts.ANALYSIS.main([str(alone), "--stimuli", str(path), "--permutations", "19", "--device", "cpu"])
    report.main(arguments([alone], "--stimuli_dir", stimuli))
    written = (alone / "evals" / "report.html").read_text(encoding="utf-8")
    theirs, ours = (section_of(written, name) for name in ("contrasts", "contrasts-music"))
    assert "music - speech (2 and 2 items)" in ours and ours.count("<img") == 2
    assert "music" not in theirs and theirs.count("<img") == 7
    assert f"--stimuli {path}" in section_of(written, "provenance")


def test_lesions_are_made_only_when_asked_for(alone, stimuli, monkeypatch):
    monkeypatch.setitem(AblateConfig.__init__.__kwdefaults__, "random_draws", 3)  # a hundred take a minute
    found = shown("ablate", alone, "--stimuli_dir", stimuli)
    assert found.found == [] and "--ablate" in found.missing[0]
    found = shown("ablate", alone, "--stimuli_dir", stimuli, "--ablate")
    effect = found.found[0].content["results"]["effects"][0]
    assert shown("ablate", alone, "--redo").found  # not made again, and not lost
    change = effect["measures"]["loss"]["change"]
    table = next(part for part in found.section.parts if isinstance(part, Table))
    assert page.shown(change) in [page.shown(cell) for row in table.rows for cell in row]


def test_a_page_shows_no_picture_but_of_its_own_results(made):
    """Figures are drawn anew for every page; without them it has none, whatever lies there."""
    path = made.parent / "topography-maps.png"
    before = path.read_bytes()
    path.write_bytes(b"of other results")
    assert shown("topography", made.parent.parent).images == []
    cfg = parse(ReportConfig, arguments([made.parent.parent]))
    subjects = [load_subject(cfg, str(run)) for run in (made.parent.parent, made.parents[2] / "control")]
    models = [report.Model(str(s.results.parent), s, i) for i, s in enumerate(subjects)]
    images = report.shown(cfg, "topography", ANALYSES["topography"], models).images
    assert len(images) == 3 and path.read_bytes() == before == images[0].png


def test_our_own_stimuli_stand_in_and_are_named(alone, stimuli, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(alone), "--device", "cpu", "--no_figures", "--fwhm_mm", "0", "--permutations", "9"]
    for name in ("contrasts", "localize"):
        ANALYSES[name].main(argv)
        said, content = capsys.readouterr().out, read(alone / "evals", name).content
        assert "topogpt's own stimuli" in said and "(own stimuli)" in said
        assert all(source.startswith("topogpt's own stimuli: ") for source in content["data_sha256"])
        assert all("(own stimuli)" in key for key in content["summary"])
        cards = ANALYSES[name].said([read(alone / "evals", name)]).cards
        assert cards and all("own stimuli" in card.what for card in cards)
    found = content["results"]["n_items"]
    assert min(found) >= 80
    contrasts_found = read(alone / "evals", "contrasts").results["contrasts"].values()
    assert all(min(c["n"]) >= 80 and c["published"] is None for c in contrasts_found)
    (tmp_path / "data").mkdir()
    shutil.copytree(stimuli, tmp_path / "data" / "stimuli")  # fetched: theirs are used from now on
    assert "of our own stimuli" in shown("localize", alone).done[0]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--sample_tokens", 65537], "sample_tokens = 65537 must be at most 65536"),
        (["--reader_tokens", 1], "reader_tokens = 1 must be a finite number of at least 2"),
        (["--texts", "nowhere.txt"], "texts: .*nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line(runs, more, message):
    with pytest.raises(UserError, match=message):
        report.main([*arguments(runs[:1])[:3], *map(str, more)])


def test_a_control_of_another_shape_is_refused(runs, alone):
    with pytest.raises(UserError, match="n_embd 20, but control alone has 16; give its matched control"):
        report.main(arguments([runs[0], alone]))


# ---- pieces of the page --------------------------------------------------------------------------


def record(folder: Path, place: int) -> overview.Model:
    """A run that is nothing but its record."""
    folder.mkdir()
    lines = [
        {"step": 0, "split": "val", "tokens": 0, "cross_entropy": 9.0, "spatial_loss": 0.5, "moran": 0.0}
    ]
    lines += [{"step": 1, "split": "train", "tokens": 10, "cross_entropy": 8.5}]
    lines += [{"step": 1, "split": "train", "tokens": 400, "cross_entropy": float("nan")}]
    more = {"spatial_loss": 0.2 + place, "moran": 0.4}
    lines += [{"step": k, "split": "val", "tokens": 500 * k, "cross_entropy": 3.0 - k} | more for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return overview.Model(str(folder), SimpleNamespace(label=f"run {place}", grid=(12, 12)), place)


def test_curves_are_of_the_record_and_beside_what_no_map_reaches(tmp_path):
    models = [record(tmp_path / name, i) for i, name in enumerate("ab")]
    entropy, spatial, moran = overview.draw_training(models).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in entropy.get_lines()}
    assert lines["run 0"] == lines["run 1"] == [[0, 9], [500, 2], [1000, 1]]
    assert lines["run 0, training steps"] == [[10, 8.5]]  # what is not finite is left out
    low, high = entropy.get_ylim()
    assert low < 1 and 2 < high < 9  # the first twentieth does not widen the axis
    assert [line.get_ydata()[-1] for line in spatial.get_lines()] == pytest.approx([0.2, 1.2, 0.5])
    null = moran.get_lines()[-1]
    assert null.get_label() == "no map"
    assert null.get_ydata()[0] == nulls.noise_morans(12, 12, 0.0, 1.0, "queen", 999, 0).mean()
    assert overview.draw_training(models[:1]).axes[0].get_xlim()[0] == 0


def test_a_grey_card_says_why(tmp_path):
    macro = page.templates().get_template("parts.html.jinja").module.card
    grey = macro(Card("a", "b", [0.5], {"p": 0.4}, grey="Shuffled labels reach it."))
    assert 'class="card grey"' in grey and "Shuffled labels reach it." in grey
    assert "grey" not in macro(Card("a", "b", [0.5], {"p": 0.01}))


def test_what_must_be_known_first_stands_above_the_cards(runs, alone, stimuli):
    lines = overview.notes([report.Model(str(alone), load_subject(EvalConfig(run=str(alone)), str(alone)))])
    assert lines == ["alone: the run was interrupted or still runs, at 8 of 18 steps."]
    values = {"lead": "", "training": SimpleNamespace(notes=[], images=[]), "sections": [], "facts": {}}
    values |= {
        "reader_notes": [],
        "reader_data": None,
        "results": [],
        "done": [],
        "commands": [],
        "details": [],
    }
    cards, subject = [Card("a", "b", [1.0], {})], SimpleNamespace(label="m")
    made = page.render(models=[subject], notes=lines, cards=cards, **values)
    assert made.index(lines[0]) < made.index('class="cards"')


def test_table_escapes_and_puts_numbers_right():
    table = Table(["<a>", "b"], [["<i>", 1.23456], ["group"], ["x", Number(-2.0, spread=0.5)], ["y", None]])
    made = page.templates().get_template("parts.html.jinja").module.table(table)
    assert '<th class="t" scope="col">&lt;a&gt;</th>' in made and '<td class="t">&lt;i&gt;</td>' in made
    assert '<td class="n">1.235</td>' in made and '<td class="n">\u22122.000 \u00b1 0.500</td>' in made
    assert '<th colspan="2" scope="rowgroup">group</th>' in made and '<td class="n">\u2013</td>' in made


# ---- an analysis is one file ---------------------------------------------------------------------

TOY = '''"""A toy."""
from topogpt.analysis.results import Outcome
from topogpt.analysis.section import Analysis, Card, Drawing, Section, Table, labels
from topogpt.analysis.subject import EvalConfig, protocol_of
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToyConfig(EvalConfig):
    """Toy with a model."""

    times: int = 2  # how often


def analyse(cfg, subject):
    answer = 21.5 * cfg.times
    return Outcome(protocol_of(cfg), {}, {"answer": answer}, {}, {"the answer": answer})


def section(found):
    answers = [r.results["answer"] for r in found]
    table = Table(["", *labels(found)], [["the answer", *answers]], explanations=["What <toys> say."])
    return Section("Toys & games", ["Is it fun?", table], ["only a toy"], [Card("Fun", "toys", answers, {})])


def draw(found):
    from topogpt.drawing import new_figure

    yield Drawing("toy-figure", new_figure(2, 1), "Nothing at all.")


ANALYSIS = Analysis(ToyConfig, analyse, section, draw, order=15)
'''


def test_a_new_file_is_all_there_is_to_a_new_analysis(alone, tmp_path, monkeypatch, capsys):
    """It is found by the terminal, by the page with its navigation, and by the model card."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(evals, "__path__", [*evals.__path__, str(tmp_path / "more")])
    monkeypatch.delitem(sys.modules, "evals.toy", raising=False)
    found = section.discover(evals)
    assert [*found][:3] == ["topography", "toy", "contrasts"]

    found["toy"].main([str(alone), "--times", "3", "--device", "cpu"])
    said = capsys.readouterr().out
    assert re.search(r"the answer +64.500\n", said) and "only a toy" in said and "toy-figure.svg" in said
    report.main(arguments([alone], "--stimuli_dir", tmp_path / "none"))
    written = (alone / "evals" / "report.html").read_text(encoding="utf-8")
    assert '<a href="#topography">Topography</a>\n  <a href="#toy">Toys &amp; games</a>' in written
    shown = section_of(written, "toy")
    for part in ("Is it fun?", "64.500", "What &lt;toys&gt; say.", "Nothing at all.", "only a toy"):
        assert part in shown
    assert "Fun" in section_of(written, "head")
    assert f"python -m evals.toy {alone} --times 3" in section_of(written, "provenance")
    card = (export.export(alone, out=tmp_path / "hf") / "README.md").read_text(encoding="utf-8")
    assert re.search(r"toy .*the answer .*64\.5", card)


# ---- data of the reader --------------------------------------------------------------------------

TYPES = {"units": "<u2", "activations": "u1", "low": "<f4", "step": "<f4", "mean": "<f4", "sd": "<f4"}
TYPES |= {"extremes": "<u2", "extremes_z": "<i2"}


def opened(model: dict, n_units: int) -> dict[str, np.ndarray]:
    found = {key: np.frombuffer(base64.b64decode(model[key]), kind) for key, kind in TYPES.items()}
    found["activations"] = found["activations"].reshape(-1, n_units)
    for key in ("extremes", "extremes_z"):
        found[key] = found[key].reshape(n_units, -1)
    return found


def decoded(model: dict, n_units: int) -> np.ndarray:
    """Activations of all texts, (n_tokens, n_units)."""
    x = opened(model, n_units)
    return x["low"] + x["step"] * x["activations"].astype(np.float32)


def plain(subject, tokens: np.ndarray, lead: list[int]) -> np.ndarray:
    """The same from the model, (n, S h w), in the plainest way."""
    with torch.no_grad():
        text = torch.tensor([*lead, *tokens.tolist()])[None]
        named = subject.model(text, activations=True).activations
    maps = [topo.on_grid(named[sheet][0].numpy(), p) for sheet, p in subject.positions.items()]
    return np.concatenate([m.reshape(len(m), -1) for m in maps], axis=1)[len(lead) :]


def test_embedded_activations_are_the_models(written, runs, text):
    data, words = data_of(written), texts.load()
    shown = [TEXT, *reader.SENTENCES]
    assert data["texts"][0]["name"] == "a&b"
    for passage, said in zip(data["texts"], shown, strict=True):
        assert said.startswith("".join(passage["words"]))
    assert len(data["texts"][0]["words"]) == 31 and len(data["texts"][1]["words"]) <= 31  # of 32 with EOT
    tokens = [words.encode(said)[: len(p["words"])] for p, said in zip(data["texts"], shown, strict=True)]
    for run, model in zip(runs, data["models"], strict=True):
        subject = load_subject(parse(ReportConfig, arguments([run])), str(run))
        expected = np.concatenate([plain(subject, t.astype(int), [tokenizer.EOT]) for t in tokens])
        x = opened(model, expected.shape[1])
        assert model["label"] == subject.label and x["step"].max() < np.ptp(expected, axis=0).max() / 200
        off = np.abs(decoded(model, expected.shape[1]) - expected)
        assert (off <= x["step"] / 2 + 1e-5).all()
        units = np.concatenate([topo.units_by_cell(p) for p in subject.positions.values()])
        assert np.array_equal(x["units"], units)


def test_statistics_and_extremes_are_of_the_held_out_sample(written, runs):
    data = data_of(written)
    cfg = parse(ReportConfig, arguments(runs[:1]))
    subject = load_subject(cfg, str(runs[0]))
    found = reader.choose_texts([subject], (), cfg.budget, None)
    sample = np.concatenate([plain(subject, t, [tokenizer.EOT]) for t in found.sample])
    assert 350 < len(sample) <= 400 and data["sample"]["ends"][-1] == len(data["sample"]["words"]) == len(
        sample
    )
    x = opened(data["models"][0], sample.shape[1])
    np.testing.assert_allclose(x["mean"], sample.mean(0), atol=1e-5)
    np.testing.assert_allclose(x["sd"], sample.std(0), rtol=1e-3, atol=1e-6)
    z = (sample - sample.mean(0)) / sample.std(0)
    k = reader.EXTREMES
    ordered = np.sort(z, axis=0)
    np.testing.assert_allclose(x["extremes_z"][:, :k] / 100, ordered[::-1][:k].T, atol=0.02)
    np.testing.assert_allclose(x["extremes_z"][:, k:] / 100, ordered[:k][::-1].T, atol=0.02)
    at = np.take_along_axis(z, x["extremes"].T.astype(int), 0)
    np.testing.assert_allclose(x["extremes_z"] / 100, at.T, atol=0.02)


def test_quantised_values_are_half_a_step_off_at_most():
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 10.0 ** np.arange(-3, 4)
    x[:, 3] = 5
    small = reader.quantise(x.astype(np.float32))
    back = small.low + small.step * small.q
    assert (np.abs(back - x) <= small.step * 0.5001 + 1e-6 * np.abs(x)).all()
    assert (small.q.max(0)[[0, 6]] == 255).all() and small.step[3] == 0


def test_held_out_text_is_cut_at_documents_and_first_pieces_come_first(tmp_path, monkeypatch):
    eot, documents = tokenizer.EOT, [np.arange(100, 170), np.arange(300, 310), np.arange(500, 540)]
    stream = np.concatenate([np.concatenate([[eot], d]) for d in documents])
    tiny.write_shard(tmp_path / "train" / "a.bin", stream)
    tiny.write_shard(tmp_path / "val" / "a.bin", stream)
    subject = load_subject(parse(ReportConfig, arguments([tiny.random_run(tmp_path)])), str(tmp_path / "run"))
    pieces = reader.held_out(subject, 100, 30, True)
    assert [p[0] for p in pieces] == [100, 500, 130]  # 300: too short; 160 and 530: shorter than SHORTEST
    assert [len(p) for p in pieces] == [30, 30, 30]
    assert [len(p) for p in reader.held_out(subject, 50, 30, True)] == [30, 20]
    numbers = reader.held_out(subject, 1000, 30, False)  # no words, so no documents
    assert [p[0] for p in numbers] == stream[:-1:30].tolist()[: len(numbers)]


def test_tokens_of_a_small_vocabulary_are_numbers(stimuli, tmp_path):
    tiny.write_shards(tmp_path)
    run = tiny.random_run(tmp_path, vocab_size=tiny.VOCAB)
    report.main(arguments([run], "--no_figures", "--stimuli_dir", stimuli))
    written = (run / "evals" / "report.html").read_text(encoding="utf-8")
    passage = data_of(written)["texts"][0]
    assert passage["name"] == "held-out text 1" and len(passage["words"]) == 48  # nothing comes before them
    assert all(0 <= int(word) < tiny.VOCAB for word in passage["words"])
    assert "run knows 64 tokens, fewer than GPT-2" in section_of(written, "contrasts")
    with pytest.raises(UserError, match="knows 64 tokens, fewer than GPT-2's 50257, so words cannot be read"):
        report.main(arguments([run], "--texts", "a.txt"))


def test_without_held_out_text_there_are_our_sentences(alone, tmp_path):
    shutil.rmtree(tmp_path / "val")
    report.main(arguments([alone], "--no_figures"))
    written = (alone / "evals" / "report.html").read_text(encoding="utf-8")
    data = data_of(written)
    assert [t["name"] for t in data["texts"]] == ["sentence"] * 2
    assert data["sample"]["what"].endswith("tokens of the texts shown")
    assert "No held-out text to read: " in section_of(written, "reader")
    assert "topography" in written and "<table" not in section_of(written, "topography")


# ---- in a browser --------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)

CAUGHT = "<script>window.caught = []; window.onerror = message => { caught.push(String(message)); };</script>"

DRIVE = """
const all = selector => [...document.querySelectorAll(selector)];
const fire = (node, type, more) => node.dispatchEvent(new MouseEvent(type, {bubbles: true, ...more}));
const pixels = canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
const cell = (canvas, row, column) => {
  const box = canvas.getBoundingClientRect();
  return {clientX: box.left + (column + .5) / canvas.width * box.width,
    clientY: box.top + (row + .5) / canvas.height * box.height};
};
const word = k => all("#words span")[k];
const out = {caught, bar: pixels(document.querySelector(".bar canvas"))};
const of = i => `#sheets .group:nth-child(${i + 1})`;
out.order = all(`${of(0)} canvas`).map(canvas => canvas.dataset.sheet);
out.names = all("#sheets canvas").map(canvas => canvas.getAttribute("aria-label"));
out.headings = all("#sheets h3").map(node => node.textContent);
const now = (i = 0) => ({at: document.getElementById("at").textContent,
  sheets: all(`${of(i)} canvas`).map(pixels),
  moran: all(`${of(i)} .under span:last-child`).map(s => s.textContent)});
out.pinned = now();
fire(word(5), "mouseover");
out.hovered = now();
fire(document.getElementById("words"), "mouseleave", {bubbles: false});
out.left = now().at;
fire(word(3), "click");
document.getElementById("words").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
out.moved = now().at;
const canvas = all("#sheets canvas").find(c => c.dataset.sheet === "3");
fire(canvas, "mousemove", cell(canvas, 1, 2));
out.under = document.getElementById("under").textContent;
fire(canvas, "click", cell(canvas, 1, 2));
out.panel = document.getElementById("panel").textContent;
out.correlations = pixels(document.getElementById("correlations"));
out.around = all("#around > *").map(node => node.textContent);
out.top = all(".top.high li").map(li => [li.firstChild, li.querySelector("mark")].map(n => n.textContent));
out.colour = word(4).style.background;
fire(all("#around button")[0], "click");
out.neighbour = document.querySelector("#panel h3").textContent;
const choice = document.getElementById("text");
choice.value = "1";
choice.dispatchEvent(new Event("change", {bubbles: true}));
out.words = all("#words span").map(span => span.textContent);
fire(word(5), "mouseover");
out.second = now();
out.control = now(1);
const key = name =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
fire(canvas, "click", cell(canvas, 1, 2));
canvas.focus();
for (const name of ["ArrowRight", "ArrowDown", "ArrowUp", "ArrowDown", "PageDown"]) key(name);
out.keyed = document.getElementById("under").textContent;
out.stops = all("#sheets canvas").filter(c => c.tabIndex === 0).map(c => [c.dataset.model, c.dataset.sheet]);
fire(document.querySelector('[data-scale="sheet"]'), "click");
out.scaled = now(1);
document.body.dataset.result = JSON.stringify(out);
"""


@pytest.fixture(scope="module")
def seen(written, tmp_path_factory) -> dict:
    """What the page holds after each of the events in DRIVE."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser, google-chrome or chrome on the path")
    folder = tmp_path_factory.mktemp("browser")
    driven = written.replace("<head>", f"<head>{CAUGHT}", 1)
    driven = driven.replace("</body>", f"<script>{{{DRIVE}}}</script></body>", 1)
    (folder / "page.html").write_text(driven, encoding="utf-8")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'user'}",
    ]
    command += ["--window-size=1366,2000", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<body[^>]*data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:] + done.stdout[-500:]
    return json.loads(html.unescape(found[1]))


class Shown:
    """What the embedded data say that the page should show."""

    def __init__(self, data: dict, model: int) -> None:
        self.h, self.w = data["grid"]
        self.n = self.h * self.w
        self.n_units = self.n * len(data["sheets"])
        self.starts = np.cumsum([0, *(len(t["words"]) for t in data["texts"])])
        self.x = decoded(data["models"][model], self.n_units)
        self.own = opened(data["models"][model], self.n_units)

    def z(self, text: int, token: int, scale: str = "unit") -> np.ndarray:
        """Maps of all sheets, (S, h w)."""
        x = self.x[self.starts[text] + token].reshape(-1, self.n)
        if scale == "sheet":
            return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        return (x - self.own["mean"].reshape(x.shape)) / self.own["sd"].reshape(x.shape)


def places(seen: dict, canvas: list[int]) -> np.ndarray:
    """Where on the colour bar, 0 to 255, the pixels of a canvas lie."""
    bar = np.array(seen["bar"]).reshape(256, 4)
    assert len({tuple(c) for c in bar}) > 200
    apart = np.abs(np.array(canvas).reshape(-1, 1, 4) - bar).sum(-1)
    assert (apart.min(1) == 0).all()
    return apart.argmin(1)


def check_maps(seen: dict, state: dict, expected: np.ndarray, grid: list[int]) -> None:
    for place, canvas, moran in zip(seen["order"], state["sheets"], state["moran"], strict=True):
        z = expected[int(place)]
        wanted = np.clip((z / 3 + 1) * 127.5, 0, 255)
        assert np.abs(places(seen, canvas) - wanted).max() <= 1.6, place  # some neighbours share a colour
        said = float(moran.removeprefix("I ").replace("\u2212", "-"))
        assert abs(said - topo.morans_i(z.reshape(grid))) < 0.006


def test_in_a_browser_words_change_the_maps(seen, written):
    data = data_of(written)
    shown, other = Shown(data, 0), Shown(data, 1)
    assert seen["caught"] == [] and sorted(seen["order"]) == ["0", "1", "2", "3"]
    assert seen["order"] == ["0", "2", "1", "3"]  # attention above MLP
    check_maps(seen, seen["pinned"], shown.z(0, 8), data["grid"])
    check_maps(seen, seen["hovered"], shown.z(0, 5), data["grid"])
    assert "token 6 of 31" in seen["hovered"]["at"] and seen["headings"] == [HOSTILE, "control: control"]
    assert len(seen["names"]) == 8 and seen["names"][0].startswith(
        f"{HOSTILE}, layer.0.attn: activations of 4 by 5"
    )
    assert seen["left"] == seen["pinned"]["at"] and "token 9 of 31" in seen["left"]
    assert "token 5 of 31" in seen["moved"]  # the fourth was clicked, then one to the right
    said = "".join(data["texts"][1]["words"]).replace(" ", "")
    assert "".join(seen["words"]).replace(" ", "") == said
    check_maps(seen, seen["second"], shown.z(1, 5), data["grid"])
    check_maps(seen, seen["control"], other.z(1, 5), data["grid"])
    check_maps(seen, seen["scaled"], other.z(1, 5, "sheet"), data["grid"])
    assert seen["keyed"].startswith("control, layer.0.attn, row 2, column 3, ") and seen["stops"] == [
        ["1", "0"]
    ]
    assert seen["control"]["sheets"] != seen["second"]["sheets"]


def test_in_a_browser_a_unit_shows_what_drives_it(seen, written):
    data = data_of(written)
    shown = Shown(data, 0)
    first, cell = 3 * shown.n, 1 * shown.w + 2
    unit = shown.own["units"][first + cell]
    z = shown.z(0, 4)[3, cell]
    value = f"{z:+.2f}".replace("-", "\u2212")
    assert seen["under"] == f"{HOSTILE}, layer.1.mlp, row 1, column 2, unit {unit}: {value} sd"
    assert f"layer.1.mlp, unit {unit}row 1, column 2" in seen["panel"] and f"{value} sd at" in seen["panel"]

    q = shown.x[:, first : first + shown.n].astype(float)
    r = np.corrcoef(q.T)[cell]
    assert np.abs(places(seen, seen["correlations"]) - (r + 1) * 127.5).max() <= 1.6
    around = [(row, column) for row in (0, 1, 2) for column in (1, 2, 3)]
    for (row, column), said in zip(around, seen["around"], strict=True):
        there = row * shown.w + column
        word = data["sample"]["words"][shown.own["extremes"][first + there, 0]].strip()
        assert said.endswith(word)
        if there != cell:
            assert abs(float(re.match(r"r (.\d\.\d\d)", said)[1].replace("\u2212", "-")) - r[there]) < 0.006
    assert seen["neighbour"] == f"layer.1.mlp, unit {shown.own['units'][first + shown.w * 0 + 1]}"
    k = reader.EXTREMES
    for (value, word), at, z in zip(
        seen["top"],
        shown.own["extremes"][first + cell, :k],
        shown.own["extremes_z"][first + cell, :k],
        strict=True,
    ):
        assert (
            word == data["sample"]["words"][at] and abs(float(value.replace("\u2212", "-")) - z / 100) < 0.06
        )
    assert seen["colour"].startswith("rgb(")
