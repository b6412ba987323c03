"""Stimuli are read as they stand in their files, and activations are those of one item at a time.

pytest tests/analysis/test_stimuli.py
"""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from evals.activations import ANALYSIS
from topogpt import topography
from topogpt.analysis import activations, stimuli
from topogpt.errors import UserError, user_errors
from topogpt.files import sha256
from topogpt.sharing import export

transformers = pytest.importorskip("transformers")
REAL = tiny.ROOT.parent / "shared" / "data" / "stimuli"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the public stimuli in {REAL}")
ITEMS = [
    "the old man",
    "cats",
    "It's a well-known fact that nobody knows why",
    "na\u00efve, \u00fcber",
    "a b c d e f g",
]


# ---- reading -------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_csv_may_hold(tmp_path, encoding, end):
    lines = [
        "item,condition,more",
        '"no, he said",S,1',
        "  \u00c4pfel und \u00d6l ,N,2",
        "",
        '"say ""hi""",S,',
    ]
    path = write(tmp_path / "items.csv", end.join(lines) + end, encoding)
    found = stimuli.read(path)
    assert found.items == ["no, he said", "\u00c4pfel und \u00d6l", 'say "hi"']
    assert found.conditions == ["S", "N", "S"] and found.source == str(path)
    assert found.where("S").tolist() == [True, False, True]
    assert found.where(lambda c: c in "NM").tolist() == [False, True, False]
    assert found.where("s").dtype == bool and not found.where("s").any()


def test_columns_are_chosen_and_joined(tmp_path):
    path = write(tmp_path / "words.csv", "a,b,kind,class\nthe, dog ,x,noun\n,runs,y,verb\n")
    found = stimuli.read(path, ["a", "b"], ["kind", "class"])
    assert found.items == ["the dog", "runs"] and found.conditions == ["x_noun", "y_verb"]


def test_a_set_is_known_by_its_bytes(tmp_path):
    one = stimuli.read(write(tmp_path / "one.csv", "item,condition\na,x\n"))
    two = stimuli.read(write(tmp_path / "two.csv", "item,condition\na,x\n\n"))
    assert one.items == two.items and one.sha256 != two.sha256 and len(one.sha256) == 64


def write_localizer(folder: Path, *runs: list[tuple[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, run in enumerate(runs):
        with (folder / f"run{i}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"stim{k}" for k in range(1, 15)])
            writer.writerows([[7, *[text] * 12, condition] for text, condition in run])
    return folder


def test_the_localiser_is_all_runs_of_a_folder_in_lower_case(tmp_path):
    folder = write_localizer(tmp_path / "all", [("THE", "S"), ("POME", "N")], [("A", "S")])
    found = stimuli.localizer(folder)
    assert found.items == [" ".join([word] * 12) for word in ("the", "pome", "a")]
    assert found.conditions == ["S", "N", "S"]
    hashes = [found.sha256]
    (folder / "run1.csv").rename(folder / "run2.csv")
    hashes.append(stimuli.localizer(folder).sha256)
    write_localizer(folder, [("THE", "S"), ("POME", "S")])
    hashes.append(stimuli.localizer(folder).sha256)
    assert len(set(hashes)) == 3  # names and contents count


# ---- the published sets --------------------------------------------------------------------------


@real
def test_the_localiser_has_240_sentences_and_240_nonword_strings():
    found = stimuli.localizer(REAL / "fedorenko2010_localizer")
    assert Counter(found.conditions) == {"S": 240, "N": 240}
    assert {len(item.split(" ")) for item in found.items} == {12}
    assert all(item == item.lower() for item in found.items)
    assert found.items[0] == "just the barest suggestion of a heel is found on teenage pumps"
    assert found.conditions[:4] == ["S", "S", "S", "N"]


@real
def test_the_profiles_have_160_other_items_of_each_condition():
    found = stimuli.profiles(REAL / "fedorenko_profiles.csv")
    assert Counter(found.conditions) == dict.fromkeys("SWJN", 160)
    sentences = {i for i, c in zip(found.items, found.conditions, strict=True) if c == "S"}
    assert not sentences & set(stimuli.localizer(REAL / "fedorenko2010_localizer").items)


@real
def test_the_words_of_moseley_are_four_times_forty():
    found = stimuli.moseley(REAL / "moseley2014.csv")
    kinds = [f"{a}_{b}" for a in ("abstract", "concrete") for b in ("noun", "verb")]
    assert Counter(found.conditions) == dict.fromkeys(kinds, 40)
    assert found.items[0] == "dole" and all(item and " " not in item for item in found.items)
    assert found.where(lambda c: c.endswith("_noun")).sum() == 80


@real
def test_the_pairs_of_hauptman_are_nouns_and_verbs():
    found = stimuli.hauptman(REAL / "elli_hauptman2024.csv")
    assert Counter(found.conditions) == {"noun": 288, "verb": 288}
    first = {"noun": "the", "verb": "to"}
    assert all(i.split()[0] == first[c] for i, c in zip(found.items, found.conditions, strict=True))
    assert found.items[0] == "the garage the rink"


# ---- a model to show them to ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run of two layers of 16 units that reads GPT-2's tokens, 48 at a time, and its control."""
    out = tmp_path_factory.mktemp("out")
    tiny.random_run(out, "run")
    tiny.random_run(out, "control", seed=1)
    return out


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("item", "condition"), *((text, "SN"[i % 2]) for i, text in enumerate(ITEMS))]
        )
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A stock GPT-2, as transformers makes and saves it."""
    folder = tmp_path_factory.mktemp("gpt2")
    cfg = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=48)
    transformers.GPT2LMHeadModel(cfg).save_pretrained(folder)
    return folder


def run(source: Path, *more: object) -> tuple[dict, dict[str, np.ndarray]]:
    """What the command leaves in the folder of its source."""
    ANALYSIS.main([str(source), "--no_figures", "--device", "cpu", *map(str, more)])
    folder = source / "evals"
    content = json.loads((folder / "activations.json").read_text())
    return content, load_file(folder / "activations.safetensors")


def one_by_one(source: Path, gpt2, pooling: str = "mean", eot: bool = False) -> dict[str, np.ndarray]:
    """Pooled activations by the plainest way: no batch, no padding."""
    from topogpt.sharing.load import load_model

    model, found = load_model(source).model, {}
    for text in ITEMS:
        tokens = gpt2.encoding.encode_ordinary(text)
        tokens = [50256, *tokens] if eot else tokens
        with torch.no_grad():
            named = model(torch.tensor([tokens]), activations=True).activations
        for sheet, x in named.items():
            found.setdefault(sheet, []).append((x[0].mean(0) if pooling == "mean" else x[0, -1]).numpy())
    return {sheet: np.array(x) for sheet, x in found.items()}


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("eot", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 16, 4096])
def test_pooled_activations_are_those_of_each_item_alone(
    out, items, gpt2, monkeypatch, pooling, eot, tokens_per_batch
):
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", tokens_per_batch)
    content, arrays = run(
        out / "run", "--stimuli", items, "--pooling", pooling, "--eot" if eot else "--no_eot"
    )
    expected = one_by_one(out / "run", gpt2, pooling, eot)
    assert list(expected) == content["model"]["sheets"]
    for sheet, x in expected.items():
        assert arrays[sheet].dtype == np.float32 and arrays[sheet].shape == (5, 16)
        assert abs(x).max() > 0.5 and arrays[sheet] == pytest.approx(x, abs=1e-5)
    assert content["results"]["items"] == ITEMS
    assert content["results"]["conditions"] == ["S", "N", "S", "N", "S"]
    assert content["protocol"]["pooling"] == pooling and content["protocol"]["eot"] is eot
    assert content["data_sha256"] == {"items.csv": sha256(items)}
    magnitude = content["results"]["mean_magnitude"]["layer.1.mlp"]
    assert magnitude == pytest.approx(np.abs(expected["layer.1.mlp"]).mean(), rel=1e-4)


def test_batches_hold_all_items_and_no_more_tokens_than_told(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 30, 100).tolist()
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", 100)
    found = list(activations.batches(lengths))
    assert sorted(i for batch in found for i in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in found)
    assert len(found) < 30
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", 10)  # an item that is longer has a batch of its own
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 10 for b in activations.batches(lengths))


def test_half_precision_is_for_storage_alone(out, items):
    _, whole = run(out / "run", "--stimuli", items)
    content, half = run(out / "run", "--stimuli", items, "--dtype", "float16")
    assert content["protocol"]["dtype"] == "float16"
    for sheet in content["model"]["sheets"]:
        assert half[sheet].dtype == np.float16 and np.array_equal(
            half[sheet], whole[sheet].astype(np.float16)
        )


def test_positions_are_those_of_the_run(out, items):
    content, arrays = run(out / "run", "--stimuli", items)
    assert content["model"]["grid"] == [4, 4]
    there = topography.load_topography(out / "run").positions
    assert {name for name in arrays if name.startswith("positions.")} == {f"positions.{s}" for s in there}
    for sheet, position in there.items():
        assert arrays[f"positions.{sheet}"].dtype == np.int32
        assert np.array_equal(arrays[f"positions.{sheet}"], position)


def test_a_control_is_analysed_the_same_way(out, items, gpt2, capsys):
    run(out / "run", "--stimuli", items, "--control", out / "control")
    said = capsys.readouterr().out
    assert "run: mean |activation|" in said and "control: mean |activation|" in said
    arrays = load_file(out / "control" / "evals" / "activations.safetensors")
    assert arrays["layer.0.mlp"] == pytest.approx(one_by_one(out / "control", gpt2)["layer.0.mlp"], abs=1e-5)


def test_an_exported_run_has_the_activations_and_positions_of_the_run(out, items, tmp_path):
    folder = export.export(out / "run", out=tmp_path / "hf")
    _, ours = run(out / "run", "--stimuli", items)
    _, exported = run(folder, "--stimuli", items)
    assert ours.keys() == exported.keys()
    for name, x in ours.items():
        assert exported[name] == pytest.approx(x, abs=1e-4)


# ---- models without positions --------------------------------------------------------------------


def test_a_stock_gpt2_is_laid_out_as_told(out, stock, items, gpt2):
    _, arrays = run(stock, "--stimuli", items, "--positions", "identity")
    assert arrays["layer.1.mlp"] == pytest.approx(one_by_one(stock, gpt2)["layer.1.mlp"], abs=1e-5)
    cells = arrays["positions.layer.0.attn"]
    assert cells.tolist() == [[i, j] for i in range(4) for j in range(4)]
    _, arrays = run(stock, "--stimuli", items, "--positions", "permuted")
    both = [arrays[f"positions.layer.{i}.attn"].tolist() for i in (0, 1)]
    assert all(sorted(p) == cells.tolist() for p in both) and both[0] != both[1]
    content, arrays = run(stock, "--stimuli", items, "--positions", out / "run")
    for sheet, position in topography.load_topography(out / "run").positions.items():
        assert np.array_equal(arrays[f"positions.{sheet}"], position)
    assert content["model"]["spatial_loss"] is None and content["protocol"]["positions"] == str(out / "run")


def test_an_exported_folder_that_lost_its_topography(out, items, tmp_path, capsys):
    folder = export.export(out / "run", out=tmp_path / "hf")
    (folder / "topography.safetensors").unlink()
    line = ends(capsys, folder, "--stimuli", items)
    assert f"{folder} has no positions of its units; give --positions identity" in line


# ---- mistakes ------------------------------------------------------------------------------------


def ends(capsys, source: Path, *more: object) -> str:
    """The one line that a mistake ends with."""
    with pytest.raises(SystemExit) as stop, user_errors():
        run(source, *more)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "has no column item; its columns are: none"),
        ("item;condition\na;x\n", "has no column item; its columns are: item;condition"),
        ("item,kind\na,x\n", "has no column condition; its columns are: item, kind"),
        ("item,condition\n", "has no items below its line of column names"),
        ("item,condition\na,x\n  ,y\n", "line 3: the item is empty"),
        ("item,condition\n\n\n,y\n", "line 4: the item is empty"),
        ('item,condition\n"a\nb",x\n,y\n', "line 4: the item is empty"),
        ("item,condition\na,x\nb\n", "line 3 has fewer fields than the line of column names"),
        ("item,condition\nthe dog, the cat,x\n", "line 2 has more fields than columns; quote"),
        ("item,condition\n" + "dog " * 49 + ",x\n", "has 49 tokens; the model reads 1 to 48"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(out, tmp_path, capsys, text, reason):
    path = write(tmp_path / "bad.csv", text)
    line = ends(capsys, out / "run", "--stimuli", path)
    assert str(path) in line and reason in line


def test_a_file_that_cannot_be_read(out, tmp_path, capsys):
    line = ends(capsys, out / "run", "--stimuli", tmp_path / "nothing.csv")
    assert f"{tmp_path / 'nothing.csv'} does not exist" in line
    assert "Is a directory" in ends(capsys, out / "run", "--stimuli", tmp_path)
    latin = write(tmp_path / "latin.csv", "item,condition\ncaf\u00e9,x\n", "latin-1")
    assert "cannot be read as CSV" in (line := ends(capsys, out / "run", "--stimuli", latin))
    assert "save it as UTF-8" in line
    assert "stimuli is missing; add --stimuli FILE.csv" in ends(capsys, out / "run")


def test_an_item_that_just_fits_is_read(out, tmp_path, capsys):
    path = write(tmp_path / "long.csv", "item,condition\n" + " ".join(["dog"] * 48) + ",x\n")
    run(out / "run", "--stimuli", path)
    assert "has 49 tokens" in ends(capsys, out / "run", "--stimuli", path, "--eot")


def test_a_folder_without_the_localiser(tmp_path):
    with pytest.raises(
        UserError, match="holds no CSV files; `python -m evals.fetch` fetches the public stimuli"
    ):
        stimuli.localizer(tmp_path)


@pytest.mark.parametrize(
    "conditions, few", [("SS", "0 item(s) of N"), ("SSN", "1 item(s) of N"), ("SNN", "1 item(s) of S")]
)
def test_a_contrast_needs_two_items_on_either_side(tmp_path, conditions, few):
    text = "item,condition\n" + "".join(f"word,{c}\n" for c in conditions)
    found = stimuli.read(write(tmp_path / "few.csv", text))
    with pytest.raises(UserError) as error:
        stimuli.check_groups(found, found.where("S"), found.where("N"), "S - N")
    assert few in str(error.value) and stimuli.counted(found) in str(error.value)
    many = found._replace(conditions=list("SSNN"), items=list("abcd"))
    stimuli.check_groups(many, many.where("S"), many.where("N"), "S - N")
    assert stimuli.counted(many) == "2 of N, 2 of S"


@pytest.mark.parametrize(
    "more, reason",
    [
        ([], "has no positions of its units; give --positions identity (unit i in cell i), permuted, or"),
        (["--positions", "random"], "positions: random is neither a folder"),
        (["--positions", "EMPTY"], "holds no topography"),
        (["--positions", "OTHER"], "are of 2 sheets of 16 units, but"),
    ],
)
def test_positions_that_do_not_fit(stock, items, tmp_path, capsys, more, reason):
    (tmp_path / "EMPTY").mkdir()
    tiny.random_run(tmp_path, "OTHER", n_layer=1, vocab_size=64)
    more = [str(tmp_path / x) if x.isupper() else x for x in more]
    assert reason in ends(capsys, stock, "--stimuli", items, *more)


def test_a_model_of_other_tokens_is_refused(tmp_path, items, capsys):
    small = tiny.random_run(tmp_path, vocab_size=64)
    assert "knows 64 tokens, fewer than GPT-2's 50257" in ends(capsys, small, "--stimuli", items)
    assert not (small / "evals" / "activations.json").exists()


def test_what_a_model_and_its_results_must_be(out, items, tmp_path, capsys):
    (tmp_path / "a run").mkdir()
    assert ends(capsys, tmp_path / "a rum", "--stimuli", items).endswith(
        f"did you mean {tmp_path / 'a run'}?\n"
    )
    assert "has no checkpoint step-3" in ends(
        capsys, out / "run", "--stimuli", items, "--checkpoint", "step-3"
    )
    (tmp_path / "file").touch()
    line = ends(capsys, out / "run", "--stimuli", items, "--results_dir", tmp_path / "file" / "evals")
    assert "cannot be made" in line and "--results_dir" in line
    more = ["--control", out / "control", "--results_dir", tmp_path]
    assert "results_dir has no effect with control" in ends(capsys, out / "run", "--stimuli", items, *more)
