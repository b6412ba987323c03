"""What is said of a model before its numbers, and of its control. pytest tests/analysis/test_matching.py"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from evals import contrasts, topography
from evals.topography import TopographyConfig
from topogpt.analysis.matching import notes
from topogpt.analysis.subject import load_subjects
from topogpt.errors import UserError


def run_of(out: Path, name: str, *, loss: str = "topolm", step: int = 8, last: int = 18, **more: Any) -> Path:
    """A run with a checkpoint of a step and its last evaluation."""
    run = tiny.random_run(out, name, step=step, topo={"loss": loss}, vocab_size=64, **more)
    record = {"split": "val", "cross_entropy": 3.0}
    lines = [json.dumps(record | {"step": k}) for k in sorted({step, last})]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def changed(run: Path, **config: Any) -> Path:
    """The run, as if it had been trained with other settings."""
    state = json.loads((run / "best" / "state.json").read_text())
    data = state["data"] | config.pop("data", {})
    tiny.seal((run / "best").resolve(), config=state["config"] | config, data=data)
    return run


def test_the_checkpoint_a_run_was_resumed_from_is_no_setting_it_differs_in(tmp_path):
    model = tiny.random_run(tmp_path, "model", vocab_size=tiny.VOCAB)
    control = tiny.random_run(tmp_path, "control", seed=1, vocab_size=tiny.VOCAB)
    plain = said(model, control)
    assert said(changed(model, checkpoint="step-5"), control) == plain


def said(model: Path, control: Path | None = None) -> list[str]:
    given = TopographyConfig(run=str(model), control=str(control) if control else None)
    return notes(load_subjects(given))


def test_a_matched_control_needs_no_word(tmp_path):
    model, control = (run_of(tmp_path, loss, loss=loss, seed=i) for i, loss in enumerate(("topolm", "none")))
    assert said(model, control) == [] and said(model) == []


def test_an_untrained_model_is_called_so(tmp_path):
    first = run_of(tmp_path, "first", step=0)
    (line,) = said(first)
    assert line.startswith(
        "first: this checkpoint is of step 0, an untrained model; the run went on to step 18"
    )
    only = run_of(tmp_path, "only", step=0, last=0)
    untrained, stopped = said(only)
    assert (
        untrained.endswith("an untrained model") and "interrupted or still runs, at 0 of 18 steps" in stopped
    )


def test_an_interrupted_run_is_called_so_and_one_that_stopped_by_itself_is_not(tmp_path):
    run = run_of(tmp_path, "run", last=8)
    assert said(run) == ["run: the run was interrupted or still runs, at 8 of 18 steps"]
    values = zip((2, 4, 6, 8), (3.0, 4.0, 5.0, 6.0), strict=True)
    lines = [json.dumps({"split": "val", "step": k, "cross_entropy": x}) for k, x in values]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert said(changed(run, patience=3)) == []


def test_every_setting_in_which_a_control_differs_is_named(tmp_path):
    model = run_of(tmp_path, "model")
    control = run_of(tmp_path, "control", loss="none", step=4, seed=1)
    state = json.loads((control / "best" / "state.json").read_text())["config"]
    changed(control, seed=5, max_steps=18, optim=state["optim"] | {"lr": 0.5}, batch_size=32)
    changed(model, data={"train_data_dir": "a" * 64}), changed(control, data={"train_data_dir": "b" * 64})
    (line,) = said(model, control)
    assert line.startswith("control control is not matched; it differs from model in ")
    for part in ("seed (1337, 5)", "optim.lr (0.01, 0.5)", "train_data_dir (aaaaaaaa, bbbbbbbb)"):
        assert part in line, line
    assert "step of the checkpoint (8, 4)" in line and "batch_size (8, 32)" in line
    assert "topo." not in line.replace("topo.seed", "") and "val_data_dir" not in line


def test_a_control_with_a_loss_or_that_is_the_model_is_none(tmp_path):
    model, other = run_of(tmp_path, "model"), run_of(tmp_path, "other", seed=1)
    assert said(model, other) == ["control other has a spatial loss itself (topolm)"]
    assert said(model, model) == ["control model has the weights of model: it is the model itself"]


def test_a_model_that_does_not_say_how_it_was_trained(tmp_path):
    from topogpt.sharing import export

    model, control = run_of(tmp_path, "model"), run_of(tmp_path, "control", loss="none", seed=1)
    folder = export.export(control, "best", say=lambda line: None)
    assert said(model, folder) == []  # its settings are in the folder, its step is not
    (folder / "training_config.yaml").unlink()
    (line,) = said(model, folder)
    assert line.startswith("how ") and line.endswith(
        "was trained is not known, so the control may not be matched"
    )


@pytest.mark.parametrize("more", [{"n_layer": 3}, {"n_embd": 36}, {"vocab_size": 96}])
@pytest.mark.parametrize("analysis", [contrasts, topography])
def test_a_control_of_another_shape_is_one_line_before_the_work(tmp_path, analysis, more, monkeypatch):
    monkeypatch.setattr(analysis.ANALYSIS.__class__, "save", lambda *_: pytest.fail("it was analysed"))
    model = run_of(tmp_path, "model")
    other = tiny.random_run(tmp_path, "other", topo={"loss": "none"}, **({"vocab_size": 64} | more))
    (key, value) = next(iter(more.items()))
    with pytest.raises(UserError, match=f"model has {key} .*, but control other has {value}; give") as error:
        analysis.ANALYSIS.main([str(model), "--control", str(other), "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_the_terminal_says_so_before_the_numbers(tmp_path, capsys):
    model, control = run_of(tmp_path, "model"), run_of(tmp_path, "control", loss="none", last=8, seed=1)
    text = tmp_path / "shard.bin"
    tiny.write_shard(text, np.arange(400) % 64)
    given = [
        model,
        "--control",
        control,
        "--text",
        text,
        "--no_figures",
        "--permutations",
        9,
        "--device",
        "cpu",
    ]
    topography.ANALYSIS.main(list(map(str, given)))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "note: control: the run was interrupted or still runs, at 8 of 18 steps" and len(rest) > 5
