"""Settings: YAML and command line into one dataclass, and back. Run: pytest tests/test_config.py"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml as yaml_library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from topogpt.config import parse, to_yaml
from topogpt.errors import UserError
from topogpt.settings import GPTConfig, OptimConfig, TopoConfig, TrainConfig

CONFIGS = sorted((tiny.ROOT / "configs").glob("*.yaml"))
SECTIONS = (GPTConfig, TopoConfig, OptimConfig, TrainConfig)


def read(path: Path, text: str, *flags: str) -> TrainConfig:
    path.write_text(text)
    return parse(TrainConfig, [str(path), "--run_name", "a", *flags])


@pytest.fixture
def yaml(tmp_path) -> Path:
    return tmp_path / "some.yaml"


# ---- precedence and forms ----------------------------------------------------------------------------------


def test_without_a_file_the_defaults_hold():
    assert parse(TrainConfig, ["--run_name", "a"]) == TrainConfig(run_name="a")


def test_the_file_changes_defaults_and_the_command_line_wins(yaml):
    cfg = read(
        yaml, "max_steps: 7\npatience: 1\nmodel: {n_layer: 2}\n", "--max_steps", "9", "--model.n_layer", "3"
    )
    assert (cfg.max_steps, cfg.patience, cfg.model.n_layer) == (9, 1, 3)


def test_the_command_line_wins_over_switches_and_lists_too(yaml):
    text = "wandb: true\ndeterministic: true\ntrain_data_dir: [a, b]\n"
    cfg = read(yaml, text, "--no-wandb", "--train_data_dir", "c")
    assert (cfg.wandb, cfg.deterministic, cfg.train_data_dir) == (False, True, ("c",))


@pytest.mark.parametrize("text", ["topo: {radius: 3}\n", "topo.radius: 3\n", "topo:\n  radius: 3\n"])
def test_keys_may_be_nested_or_dotted(yaml, text):
    assert read(yaml, text).topo == TopoConfig(radius=3)


@pytest.mark.parametrize(
    "given, expected", [(["--wandb"], True), (["--no-wandb"], False), (["--no_wandb"], False), ([], False)]
)
def test_switches_need_no_value(given, expected):
    assert parse(TrainConfig, ["--run_name", "a", *given]).wandb is expected


def test_switches_of_sections_can_be_turned_off(yaml):
    assert read(yaml, "model: {post_residual: true}\n").model.post_residual
    assert not read(yaml, "model: {post_residual: true}\n", "--model.no_post_residual").model.post_residual


@pytest.mark.parametrize("form", ["--per-device-batch-size", "--per_device_batch_size"])
def test_flags_may_be_written_with_hyphens(form):
    assert parse(TrainConfig, ["--run_name", "a", form, "3"]).per_device_batch_size == 3


def test_a_flag_may_be_joined_to_its_value():
    assert parse(TrainConfig, ["--run_name=a", "--optim.lr=0.5"]).optim.lr == 0.5


def test_a_data_argument_takes_several_paths_or_a_glob_the_shell_left_alone():
    flags = [
        "--run_name",
        "a",
        "--train_data_dir",
        "x/1.bin",
        "x/2.bin",
        "--val_data_dir",
        "path/to/val/*.bin",
    ]
    cfg = parse(TrainConfig, [*flags, "--wandb"])
    assert cfg.train_data_dir == ("x/1.bin", "x/2.bin")
    assert cfg.val_data_dir == ("path/to/val/*.bin",)
    assert cfg.wandb


def test_a_data_key_takes_one_path_or_a_list(yaml):
    assert read(yaml, "train_data_dir: a\n").train_data_dir == ("a",)
    assert read(yaml, "train_data_dir: [a, b]\n").train_data_dir == ("a", "b")


def test_numbers_in_yaml_may_be_written_as_people_write_them(yaml):
    cfg = read(
        yaml, "max_steps: 600_000\noptim: {lr: 6e-4, min_lr: 1.0e-5, weight_decay: 0}\ntopo: {weight: 2}\n"
    )
    assert (cfg.max_steps, cfg.topo.weight) == (600_000, 2.0)
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.weight_decay) == (6e-4, 1e-5, 0.0)


@pytest.mark.parametrize("text", ["optim: {decay_steps: null}\n", "optim:\n  decay_steps:\n"])
def test_null_is_none_where_none_is_a_value(yaml, text):
    assert read(yaml, text).optim.decay_steps is None
    assert read(yaml, text, "--optim.decay_steps", "5000").optim.decay_steps == 5000
    assert parse(TrainConfig, ["--run_name", "a", "--optim.decay_steps", "None"]).optim.decay_steps is None


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_changes_nothing(yaml, text):
    assert read(yaml, text) == TrainConfig(run_name="a")


def test_a_none_that_is_a_name_is_not_a_none(yaml):
    assert read(yaml, "topo: {loss: none}\n").topo.loss == "none"


def test_help_ends_with_exit_code_0_and_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, ["--help"], prog="train.py")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "heads per block; must divide n_embd" in text and "600000" in text


def test_a_mistake_is_a_user_error_of_one_line():
    with pytest.raises(UserError, match="unknown key nonsense") as error:
        parse(TrainConfig, ["--run_name", "a", "--nonsense", "1"])
    assert "\n" not in str(error.value)


def test_a_setting_from_the_file_is_reported_with_the_file(yaml):
    with pytest.raises(UserError, match=r"some\.yaml.*max_steps.*many"):
        read(yaml, "max_steps: many\n")


# ---- there and back ----------------------------------------------------------------------------------------


def round_trip(path: Path, cfg: TrainConfig) -> TrainConfig:
    path.write_text(to_yaml(cfg))
    return parse(TrainConfig, [str(path)])


def test_settings_survive_yaml(yaml):
    cfg = TrainConfig(
        run_name="123",
        train_data_dir=("a", "b c", "*.bin"),
        val_data_dir=("no",),
        wandb=True,
        compile="off",
        wandb_project="null",
        out_dir="~/out: here",
        model=GPTConfig(post_residual=True, dropout=0.1),
        topo=TopoConfig(loss="none", weight=1e-7),
        optim=OptimConfig(decay_steps=None, lr=1e-5, min_lr=3e-6),
    )
    assert round_trip(yaml, cfg) == cfg


@settings(max_examples=25, deadline=None)
@example(run_name="-x", lr=0.001, path=" ")
@given(
    run_name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,8}", fullmatch=True),
    lr=st.floats(1e-4, 1e4),
    path=st.text("ab -*'\"{}[]:#&!%@,|>~\\\u00e9", min_size=1, max_size=6),
)
def test_any_settings_survive_yaml(tmp_path_factory, run_name, lr, path):
    cfg = TrainConfig(run_name=run_name, train_data_dir=("x" + path,), optim=OptimConfig(lr=lr))
    assert round_trip(tmp_path_factory.getbasetemp() / "any.yaml", cfg) == cfg


# ---- the YAML files of the repository ----------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_is_accepted(path):
    cfg = parse(TrainConfig, [str(path), "--run_name", "a"])
    assert cfg.batch_size % cfg.per_device_batch_size == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_files_in_configs_say_only_what_differs_from_the_defaults(path):
    cfg, default = parse(TrainConfig, [str(path), "--run_name", "a"]), TrainConfig(run_name="a")
    settings = dict(walk(yaml_library.safe_load(path.read_text()) or {}))
    for key, value in settings.items():
        ours, theirs = cfg, default
        for name in key.split("."):
            ours, theirs = getattr(ours, name), getattr(theirs, name)
        if key not in ("run_name", "train_data_dir", "val_data_dir"):
            assert ours != theirs, f"{key}: {value} is the default"


def walk(settings: dict, prefix: str = ""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("name", ["topolm", "control"])
def test_topolm_and_its_control_have_the_published_number_of_parameters(name):
    path = tiny.ROOT / "configs" / f"{name}.yaml"
    cfg = parse(TrainConfig, [str(path), "--run_name", "a"])
    assert parameters(cfg.model) == (128_771_216, 127_968_400)


def test_known_numbers_of_parameters():
    assert parameters(GPTConfig()) == (128_771_216, 127_968_400)
    nano = GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)
    with_positions, without = parameters(nano)
    assert round(with_positions / 1e6, 1) == 124.4 and with_positions - without == 1024 * 768


def parameters(cfg: GPTConfig) -> tuple[int, int]:
    from topogpt.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(cfg)
    return model.n_parameters(), model.n_parameters(position_embedding=False)


# ---- the settings themselves -------------------------------------------------------------------------------


def test_every_setting_is_read_somewhere():
    read_names = set()
    for path in [*tiny.ROOT.glob("*.py"), *tiny.ROOT.glob("topogpt/**/*.py")]:
        if path.name == "settings.py":  # its own checks do not count
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read_names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read_names.add(node.value)  # getattr(cfg, key)
    declared = {f.name for section in SECTIONS for f in dataclasses.fields(section)}
    assert declared - read_names == set()


def test_every_setting_has_a_trailing_comment():
    source = (tiny.ROOT / "topogpt" / "settings.py").read_text()
    lines = source.splitlines()
    seen = 0
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.ClassDef) and node.name in {s.__name__ for s in SECTIONS}):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and "default_factory" not in ast.unparse(field):
                seen += 1
                name = f"{node.name}.{field.target.id}"
                assert field.lineno == field.end_lineno, f"{name}: --help loses the comment of a wrapped line"
                assert re.search(r"  # \S", lines[field.lineno - 1]), name
    assert seen > 40


def test_settings_cannot_be_changed_or_given_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopoConfig().radius = 3
    for section in SECTIONS:
        with pytest.raises(TypeError):
            section("a")


def test_settings_made_in_code_are_checked_too():
    with pytest.raises(UserError, match=r"n_embd = 10 .*n_head = 4; try --model\.n_head 5"):
        GPTConfig(n_embd=10, n_head=4)
    with pytest.raises(UserError, match=r"topo\.radius = 5 .*9x9.*8x8.*radius 4"):
        TrainConfig(run_name="a", model=GPTConfig(n_embd=64, n_head=4))
