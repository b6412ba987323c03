"""A mistake gets one clear line and exit code 2, at once, and nothing is lost.

    pytest tests/training/test_bad_input.py

Torch cannot be imported where these commands run: it takes seconds, and a mistake should be told before that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from topogpt.config import to_yaml
from topogpt.training import preflight
from train import train

OLD = "old"  # a run that exists


@pytest.fixture(scope="module")
def workplace(folder) -> Path:
    """Good data and bad, YAML files, and a run called old."""
    train(tiny.config(folder, OLD, max_steps=6))
    (folder / "out" / "unsaved").mkdir()
    good = tiny.write_shard(folder / "shards" / "good.bin", np.arange(60)).read_bytes()
    words = np.frombuffer(good[:1024], dtype="<i4").copy()

    def shard(name: str, content: bytes) -> None:
        path = folder / name / "bad.bin"
        path.parent.mkdir()
        path.write_bytes(content)

    (folder / "empty").mkdir()
    shard("truncated", good[:-2])
    shard("headless", good[:500])
    shard("nothing", b"")
    shard("wrong_magic", np.concatenate([[7], words[1:]]).astype("<i4").tobytes() + good[1024:])
    shard("wrong_version", np.concatenate([words[:1], [9], words[2:]]).astype("<i4").tobytes() + good[1024:])
    tiny.write_shard(folder / "beyond" / "bad.bin", np.array([1, 2, 64, 3] * 20))
    tiny.write_shard(folder / "short" / "bad.bin", np.arange(16))
    tiny.write_shard(folder / "other_data" / "good.bin", np.arange(4001) % 60)
    for name in ("pipe/a.bin", "piped/manifest.json"):
        (folder / name).parent.mkdir()
        os.mkfifo(folder / name)
    tiny.write_shard(folder / "piped" / "good.bin", np.arange(60))
    (folder / "file").write_text("not a folder")
    (folder / "good.yaml").write_text(to_yaml(tiny.config(folder, "new", max_steps=6)))
    (folder / "folder.yaml").mkdir()
    (folder / "config.txt").write_text("max_steps: 3\n")
    yamls = {
        "syntax": "max_steps: [1\n",
        "twice": "max_steps: 1\nmax_steps: 2\n",
        "twice_nested": "model:\n  n_layer: 1\n  n_layer: 2\n",
        "list": "- 1\n- 2\n",
        "text": "hello\n",
        "unknown": "max_step: 3\n",
        "unknown_nested": "model: {n_layers: 3}\n",
        "nested_at_the_top": "n_layer: 3\n",
        "number_for_section": "model: 3\n",
        "section_for_number": "max_steps: {a: 3}\n",
        "list_for_number": "max_steps: [3, 4]\n",
        "nothing_for_number": "max_steps:\n",
        "text_for_number": "max_steps: many\n",
        "text_for_bool": 'wandb: "true"\n',
        "number_for_bool": "wandb: 1\n",
        "bool_for_number": "max_steps: true\n",
        "bool_for_choice": "compile: on\n",
        "choice": "topo: {loss: topoloss}\n",
        "negative": "optim: {lr: -1.0}\n",
        "latin": None,
    }
    for name, text in yamls.items():
        (folder / f"{name}.yaml").write_bytes(b"run_name: \xe9t\xe9\n" if text is None else text.encode())
    return folder


def command(folder: Path, given: list[str]) -> subprocess.CompletedProcess:
    """Run train.py in `folder` on arguments, where torch cannot be imported."""
    no_torch = folder / "no_torch"
    no_torch.mkdir(exist_ok=True)
    (no_torch / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    return subprocess.run(
        [sys.executable, str(tiny.ROOT / "train.py"), *given],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(no_torch)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
    }


def flags(text: str) -> list[str]:
    return ["good.yaml", *text.split()]


# name: (arguments, what the line must hold: the key or file, the value, and the remedy)
CASES: dict[str, tuple[list[str], list[str]]] = {
    # data
    "missing_data": (flags("--train_data_dir nowhere"), ["train_data_dir", "nowhere", "prepare_fineweb.py"]),
    "missing_validation_data": (
        flags("--val_data_dir no/*.bin"),
        ["val_data_dir", "no/*.bin", "prepare_fineweb"],
    ),
    "empty_folder": (flags("--train_data_dir empty"), ["train_data_dir", "empty", "prepare_fineweb.py"]),
    "no_data_given": ([*flags("--train_data_dir")], ["train_data_dir", "give"]),
    "truncated_shard": (
        flags("--train_data_dir truncated"),
        ["train_data_dir", "truncated/bad.bin", "1142", "1144"],
    ),
    "half_a_header": (flags("--train_data_dir headless"), ["headless/bad.bin", "500", "truncated"]),
    "empty_file": (flags("--train_data_dir nothing"), ["nothing/bad.bin", "empty", "delete it"]),
    "wrong_magic": (flags("--train_data_dir wrong_magic"), ["wrong_magic/bad.bin", "magic 7", "20240520"]),
    "wrong_version": (flags("--train_data_dir wrong_version"), ["wrong_version/bad.bin", "version 9"]),
    "token_beyond_vocabulary": (
        flags("--val_data_dir beyond"),
        ["val_data_dir", "beyond/bad.bin", "token 64", "offset 2", "vocab_size", "65"],
    ),
    "a_pipe_for_a_shard": (flags("--train_data_dir pipe/*.bin"), ["pipe/a.bin", "a pipe or a device"]),
    "a_pipe_for_a_manifest": (flags("--train_data_dir piped"), ["piped/manifest.json is broken"]),
    "fewer_tokens_than_a_window": (flags("--val_data_dir short"), ["val_data_dir", "16", "17", "block_size"]),
    # values
    "heads_do_not_divide_width": (
        flags("--model.n_head 3"),
        ["n_embd = 16", "n_head = 3", "--model.n_head 2"],
    ),
    "batch_does_not_divide": (flags("--batch_size 7"), ["batch_size = 7", "per_device_batch_size = 2", "8"]),
    "radius_too_large": (flags("--topo.radius 3"), ["topo.radius = 3", "5x5", "4x4", "--topo.radius 2"]),
    "radius_too_small": (flags("--topo.radius 1"), ["topo.radius = 1", "at least 2"]),
    "negative_steps": (flags("--max_steps -3"), ["max_steps = -3", "at least 1"]),
    "negative_patience": (flags("--patience -1"), ["patience = -1", "at least 0"]),
    "negative_rate": (flags("--optim.lr -0.1"), ["optim.lr = -0.1"]),
    "negative_decay_steps": (flags("--optim.decay_steps -5"), ["optim.decay_steps = -5", "at least"]),
    "rate_is_nan": (flags("--optim.lr nan"), ["optim.lr = nan"]),
    "rate_is_infinite": (flags("--optim.lr inf"), ["optim.lr = inf"]),
    "weight_is_infinite": (flags("--topo.weight inf"), ["topo.weight = inf"]),
    "dropout_of_one": (flags("--model.dropout 1.0"), ["model.dropout = 1.0", "below 1"]),
    "beta_of_one": (flags("--optim.beta1 1"), ["optim.beta1 = 1", "below 1"]),
    "least_rate_above_the_peak": (flags("--optim.min_lr 1"), ["optim.min_lr = 1", "optim.lr = 0.01"]),
    "setting_without_effect": (flags("--topo.weight_warmup_steps 5"), ["weight_warmup_steps = 5", "linear"]),
    "no_validation_tokens": (flags("--val_tokens 0"), ["val_tokens = 0", "at least 1"]),
    # command line
    "no_arguments": ([], ["run_name is missing", "--run_name NAME"]),
    "no_name": (["good.yaml", "--run_name", ""], ["run_name is missing", "--run_name NAME"]),
    "name_with_a_folder": (flags("--run_name a/b"), ["run_name = a/b", "--out_dir"]),
    "name_of_the_parent": (flags("--run_name .."), ["run_name = ..", "plain name"]),
    "wrong_type": (flags("--optim.lr abc"), ["--optim.lr", "abc", "number"]),
    "fraction_for_steps": (flags("--max_steps 2.5"), ["--max_steps", "2.5", "whole number"]),
    "bad_choice": (flags("--topo.loss topoloss"), ["topo.loss", "topoloss", "none", "topolm"]),
    "bad_device": (flags("--device tpu"), ["device", "tpu", "cuda", "cpu"]),
    "value_missing": (flags("--max_steps"), ["--max_steps"]),
    "value_for_a_switch": (flags("--wandb true"), ["wandb", "true", "--no"]),
    "unknown_flag": (flags("--max_step 3"), ["unknown key", "max_step", "did you mean", "max_steps"]),
    "flag_without_its_section": (flags("--lr 3"), ["unknown key", "lr", "did you mean", "optim.lr"]),
    "unknown_far_from_all": (flags("--zzzz 3"), ["unknown key", "zzzz", "--help"]),
    "stray_word": (flags("stray"), ["stray"]),
    # YAML
    "yaml_missing": (["god.yaml"], ["god.yaml", "does not exist", "good.yaml"]),
    "yaml_is_a_folder": (["folder.yaml"], ["folder.yaml", "cannot be read"]),
    "yaml_of_another_name": (["config.txt"], ["config.txt", ".yaml"]),
    "yaml_after_the_flags": (["--run_name", "new", "good.yaml"], ["good.yaml", "first"]),
    "yaml_syntax": (["syntax.yaml"], ["syntax.yaml", "line 2"]),
    "yaml_key_twice": (["twice.yaml"], ["twice.yaml", "max_steps", "twice"]),
    "yaml_nested_key_twice": (["twice_nested.yaml"], ["twice_nested.yaml", "n_layer", "twice"]),
    "yaml_list": (["list.yaml"], ["list.yaml", "key: value", "list"]),
    "yaml_text": (["text.yaml"], ["text.yaml", "key: value"]),
    "yaml_not_utf8": (["latin.yaml"], ["latin.yaml", "cannot be read"]),
    "yaml_unknown_key": (["unknown.yaml"], ["unknown.yaml", "max_step", "did you mean max_steps"]),
    "yaml_unknown_nested_key": (["unknown_nested.yaml"], ["model.n_layers", "did you mean model.n_layer"]),
    "yaml_nested_key_at_the_top": (["nested_at_the_top.yaml"], ["n_layer", "did you mean model.n_layer"]),
    "yaml_number_for_a_section": (
        ["number_for_section.yaml"],
        ["number_for_section.yaml", "model", "section"],
    ),
    "yaml_section_for_a_number": (["section_for_number.yaml"], ["section_for_number.yaml", "max_steps"]),
    "yaml_list_for_a_number": (["list_for_number.yaml"], ["list_for_number.yaml", "max_steps"]),
    "yaml_nothing_for_a_number": (["nothing_for_number.yaml"], ["nothing_for_number.yaml", "max_steps"]),
    "yaml_text_for_a_number": (["text_for_number.yaml"], ["text_for_number.yaml", "max_steps", "many"]),
    "yaml_text_for_a_switch": (["text_for_bool.yaml"], ["wandb", "'true'", "true or false", "quotes"]),
    "yaml_number_for_a_switch": (["number_for_bool.yaml"], ["wandb must be true or false", "1"]),
    "yaml_switch_for_a_number": (["bool_for_number.yaml"], ["max_steps", "True"]),
    "yaml_on_for_a_choice": (["bool_for_choice.yaml"], ["bool_for_choice.yaml", "compile", "auto", "quote"]),
    "yaml_bad_choice": (["choice.yaml"], ["topo.loss", "topoloss", "topolm"]),
    "yaml_negative": (["negative.yaml"], ["optim.lr = -1.0"]),
    # runs
    "name_is_taken": (flags("--run_name old"), ["run_name = old", "--resume", "--overwrite", "--run_name"]),
    "resume_of_nothing": (flags("--run_name odl --resume"), ["odl", "old", "--resume"]),
    "resume_and_overwrite": (
        flags("--run_name old --resume --overwrite"),
        ["resume", "overwrite", "one of them"],
    ),
    "resume_with_another_model": (
        flags("--run_name old --resume --model.n_layer 2"),
        ["model.n_layer = 2", "1", "--run_name"],
    ),
    "resume_with_other_sheets": (
        flags("--run_name old --resume --topo.weight 3.5"),
        ["topo.weight = 3.5", "2.5", "--run_name"],
    ),
    "resume_with_other_data": (
        flags("--run_name old --resume --train_data_dir other_data"),
        ["train_data_dir", "--run_name"],
    ),
    "resume_with_another_seed": (
        flags("--run_name old --resume --seed 1"),
        ["seed = 1", "1337", "--run_name"],
    ),
    "resume_with_another_batch": (flags("--run_name old --resume --batch_size 4"), ["batch_size = 4", "8"]),
    "output_below_a_file": (
        flags("--out_dir file/out"),
        ["out_dir = file/out", "cannot be written", "--out_dir"],
    ),
    "output_is_a_file": (flags("--out_dir file"), ["out_dir = file", "cannot be written", "--out_dir"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gets_one_line_that_names_it(workplace, name):
    given, expected = CASES[name]
    before = contents(workplace / "out")
    done = command(workplace, given)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    missing = [part for part in expected if part not in done.stderr]
    assert not missing, f"{missing} not in: {done.stderr}"
    for noise in ("Traceback", "TrainConfig", "Literal", "invalid literal", "{None}"):
        assert noise not in done.stderr, done.stderr
    assert contents(workplace / "out") == before, "nothing may be lost, and nothing begun"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(workplace):
    locked = workplace / "locked"
    locked.mkdir(mode=0o500)
    done = command(workplace, flags("--out_dir locked"))
    assert done.returncode == 2 and "out_dir = locked cannot be written" in done.stderr


def test_the_good_settings_pass_every_check(workplace):
    """All cases above differ from these by their mistake alone: these come as far as to torch."""
    for given in (flags(""), flags("--run_name old --resume"), flags("--run_name old --overwrite")):
        before = contents(workplace / "out")
        done = command(workplace, given)
        assert "torch is not to be imported" in done.stderr, done.stderr
        assert contents(workplace / "out") == before


def test_a_width_without_a_grid_is_told_what_to_change(workplace):
    """17 units lie in one row, which no neighbourhood fits: naming a largest radius of 1 helps nobody."""
    done = command(workplace, flags("--model.n_embd 17 --model.n_head 1"))
    assert done.returncode == 2
    assert "1x17" in done.stderr and "--model.n_embd" in done.stderr
    assert "is 1" not in done.stderr, done.stderr


def test_a_yaml_section_without_keys_is_no_mistake(workplace):
    """As one writes when all lines of a section are commented out."""
    path = workplace / "section.yaml"
    path.write_text((workplace / "good.yaml").read_text().partition("optim:")[0] + "optim:\n  # lr: 0.1\n")
    done = command(workplace, ["section.yaml"])
    assert "torch is not to be imported" in done.stderr, done.stderr


def test_help_needs_no_torch_and_explains_every_setting(workplace):
    done = command(workplace, ["--help"])
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--run_name", "--train_data_dir", "--per_device_batch_size", "--topo.radius", "--wandb"):
        assert flag in done.stdout
    assert "sequences per GPU and micro-step" in " ".join(done.stdout.replace("\u2502", " ").split())


def test_a_mistake_in_another_process_than_the_first_is_told_as_well(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    done = command(workplace, flags(""))
    assert done.returncode == 2
    assert "batch_size = 8" in done.stderr and "3 processes" in done.stderr


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_environment_without_numbers_is_one_line(workplace, monkeypatch, name):
    for key, value in ({"RANK": "0", "WORLD_SIZE": "1"} | {name: "x"}).items():
        monkeypatch.setenv(key, value)
    done = command(workplace, flags(""))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert name in done.stderr and "environment" in done.stderr


def test_settings_that_a_checkpoint_does_not_know_had_their_defaults(workplace):
    """A run of an older version, whose state.json lacks a key that is compared."""
    state = workplace / "out" / "old" / "checkpoints" / "step-000006" / "state.json"
    text = state.read_text()
    content = json.loads(text)
    del content["config"]["topo"]["distance"], content["sha256"]
    try:
        state.write_text(json.dumps(content))
        done = command(workplace, flags("--run_name old --resume --topo.distance linf"))
    finally:
        state.write_text(text)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "topo.distance = linf, but the run was started with l2" in done.stderr
    now = tiny.config(workplace, OLD).topo
    preflight.check_same_section(now, "topo", content["config"]["topo"])  # raises nothing
