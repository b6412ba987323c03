"""Whatever a config file or a command line holds: settings, or one short line, soon.

pytest tests/test_config_fuzz.py
"""

import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from topogpt.config import flag_names, parse
from topogpt.errors import UserError
from topogpt.settings import PrepareConfig, TrainConfig

SECONDS = 2.0  # of this process, and a fuzzed file costs a tenth of it; the old code took 11 s, or hung
KEYS = sorted(dict(flag_names(TrainConfig)))


def outcome(path: Path, content: str | bytes, *flags: str) -> str:
    """The message that a file gets, or ""; it must be short, one line, and there soon."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    name = [] if "run_name" in str(content) else ["--run_name", "a"]
    return outcome_of([str(path), *name, *flags])


def outcome_of(arguments: list[str], cls: type = TrainConfig) -> str:
    start = time.process_time()
    try:
        parse(cls, arguments)
        said = ""
    except UserError as error:
        said = str(error)
        assert said and not set(said) & set("\n\r\0\x1b") and len(f"error: {said}") <= 300
    assert time.process_time() - start < SECONDS
    return said


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "some.yaml"


def bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


MISTAKES = {  # content -> what its line must hold
    "optim: {lr: 1" + "0" * 400 + "}": "optim.lr = inf",
    "max_steps: 1" + "0" * 400: "at most 15 digits",
    "topo: {seed: 1" + "0" * 5000 + "}": "at most 15 digits",
    'max_steps: !!int "x"': "must be a whole number, not x",
    'optim: {lr: !!float "x"}': "must be a number, not x",
    'wandb: !!bool "x"': "must be true or false",
    "run_name: !!python/object:os.system {}": "cannot be read",
    'out_dir: "a\\0b"': "NUL",
    'run_name: "a\\nb"': "run_name = a b must be a plain name",
    "run_name: " + "a" * 300: "must be a plain name",
    'max_steps: "x\\ny"': "not x y",
    "[" * 3000: "cannot be read",
    "a: " + "{a: " * 3000: "cannot be read",
    "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)): "cannot be read",
    bomb(): "unknown key a",
    bomb().replace("a:", "run_name:", 1).replace("i:", "max_steps:"): "run_name must be text, not a list",
    "model: &a {x: *a}": "nests too deep",
    "".join(f"k{i}: 1\n" for i in range(20_000)): "cannot be read",
    "".join(f"k{i}: 1\n" for i in range(15_000)): "unknown key k0",
    "model: {n_embd: 1000000000}": "n_embd = 1000000000",
    "model: {n_embd: 1000000007, n_head: 1}": "n_embd = 1000000007",
    "model: {n_layer: 1000000000, n_embd: 16, n_head: 1}": "n_layer = 1000000000",
    "model: {vocab_size: 1000000000000}": "vocab_size = 1000000000000",
    "train_data_dir: [a, --max_steps=3]": "would be a flag",
    "train_data_dir: [[a]]": "not a list",
    "max_steps: 1:30": "must be a whole number, not 1:30",
    "max_steps: 010": "not 010",
    "optim: {lr: 0_1}": "not 0_1",
    "max_steps: 0x10": "not 0x10",
    "x" * 500 + ": 1": "unknown key xxx",
    "max_steps: " + "x" * 5000: "must be a whole number",
    "? {a: b}\n: c": "cannot be read",
    "max_steps: 1\n'max_steps': 2": "given twice",
}


@pytest.mark.parametrize("content", MISTAKES, ids=range(len(MISTAKES)))
def test_a_hostile_file_gets_one_short_line(path, content):
    assert MISTAKES[content] in outcome(path, content)


@pytest.mark.parametrize("text", ["010", "1:30", "2026-01-01", "1_000", "1e3", "0x10"])
def test_a_text_stays_as_it_is_written(path, text):
    path.write_text(f"run_name: {text}\n")
    assert parse(TrainConfig, [str(path)]).run_name == text


def test_a_pipe_is_not_waited_for(path):
    os.mkfifo(path)
    assert "pipe" in outcome_of([str(path)])


def test_the_last_of_many_flags_is_found_soon(path):
    path.write_text("".join(f"{key}: 1\n" for key in KEYS if key.startswith("optim.") and "lr" in key))
    assert "layout" in outcome_of([str(path), *["--seed", "1"] * 40, "--topo.layout", "x"])


def test_a_flag_for_a_switch_takes_no_value():
    assert "--wandb takes no value, but got yes" in outcome_of(["--run_name", "a", "--wandb", "yes"])


scalars = st.one_of(
    st.sampled_from("010 1:30 1e400 .inf -0 ~ yes !!set *a << -3 --seed=1".split()),
    st.sampled_from(["!!int x", "!!set {a}", "&a 1"]),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.text("\0\x1b\n\u2028\ud800\u00e9{}[]:#&*!|>%@-'\" ", max_size=6),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda v: f"[{', '.join(v)}]")
        | st.dictionaries(scalars, inner, max_size=2).map(
            lambda d: f"{{{', '.join(f'{k}: {v}' for k, v in d.items())}}}"
        )
    ),
    max_leaves=5,
)
keys = st.one_of(st.sampled_from([*KEYS, "model", "topo", "optim"]), st.text(max_size=5))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@example(lines=[("max_steps", "!!timestamp x")], prefix="", tail=b"")
@given(
    lines=st.lists(st.tuples(keys, values), max_size=3),
    prefix=st.text(max_size=2),
    tail=st.binary(max_size=3),
)
def test_any_file_gets_settings_or_one_short_line(tmp_path_factory, lines, prefix, tail):
    content = (prefix + "".join(f"{key}: {value}\n" for key, value in lines)).encode("utf-8", "surrogatepass")
    outcome(tmp_path_factory.getbasetemp() / "any.yaml", content + tail)


flags = st.sampled_from([f"--{key}" for key in KEYS] + ["--no_wandb", "-x", "--", "a.yaml"])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(arguments=st.lists(flags | scalars, max_size=4), cls=st.sampled_from([TrainConfig, PrepareConfig]))
def test_any_command_line_gets_settings_or_one_short_line(arguments, cls):
    outcome_of(arguments, cls)
