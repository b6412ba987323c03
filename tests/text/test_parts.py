"""The same bytes for any number of workers and ranks, whatever kills them; nothing finished is done again.

pytest tests/text/test_parts.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import texts
from texts import (
    ROOT,
    arguments,
    bytes_of,
    check_against_naive,
    make_documents,
    run,
    write_jsonl,
    write_parquet,
)

import prepare_fineweb
from topogpt.errors import UserError
from topogpt.ranks import read_place
from topogpt.text import parts, sources

SMALL_UNITS = (
    "import sys; from topogpt.text import sources; sources.UNIT_BYTES = 20_000;"
    "import prepare_fineweb as p; p.run_main(p.main)"
)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    texts.small_units(monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    write_parquet(folder / "a.parquet", make_documents(600, seed=1))
    write_jsonl(folder / "b.jsonl", make_documents(300, seed=2))
    write_jsonl(folder / "c.jsonl.zst", make_documents(100, seed=3))
    return folder


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, str]:
    """What one worker makes of the corpus, undisturbed."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        texts.small_units(patch)
        run(out, "--source", corpus, num_proc=1)
    return bytes_of(out)


def test_one_worker_and_two_write_the_same_bytes(tmp_path, corpus, expected):
    run(tmp_path / "other name", "--source", corpus, num_proc=2)
    assert bytes_of(tmp_path / "other name") == expected


def test_a_finished_folder_is_left_as_it_is(tmp_path, corpus, expected, capsys):
    for _ in range(2):
        run(tmp_path / "out", "--source", corpus)
    assert "nothing to do" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == expected


@pytest.fixture
def submitted(monkeypatch) -> list[str]:
    """Names of the units that are given to workers."""
    names: list[str] = []

    def recorded(pool: type) -> type:
        class Recorder(pool):
            def submit(self, function, *args):
                names.extend(arg.name for arg in args if isinstance(arg, sources.Unit))
                return super().submit(function, *args)

        return Recorder

    for name in ("ThisProcess", "ProcessPoolExecutor"):
        monkeypatch.setattr(parts, name, recorded(getattr(parts, name)))
    return names


@pytest.mark.parametrize("n_sidecars", [1, 12])
def test_a_killed_run_continues_to_the_same_bytes_without_redoing_units(
    tmp_path, corpus, expected, submitted, n_sidecars
):
    out = tmp_path / "out"
    process = kill_when(out, corpus, lambda: len(list(out.glob(".parts/*-*.json"))) >= n_sidecars)
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    finished = {path.name.removesuffix(".json") for path in out.glob(".parts/*-*.json")}
    run(out, "--source", corpus)
    assert finished.isdisjoint(submitted) and submitted
    assert bytes_of(out) == expected


def test_a_run_killed_while_it_makes_shards_continues_to_the_same_bytes(
    tmp_path, corpus, expected, submitted
):
    out = tmp_path / "out"
    kill_when(out, corpus, lambda: list(out.glob("train/*.bin*")))
    run(out, "--source", corpus)
    assert not submitted
    assert bytes_of(out) == expected


def kill_when(out: Path, corpus: Path, condition) -> subprocess.Popen:
    """Start a preparation and SIGKILL it; its workers must end, too."""
    command = [sys.executable, "-c", SMALL_UNITS, *arguments(out, "--source", corpus, num_proc=2)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    t0 = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - t0 < 60:
        time.sleep(0.001)
    process.kill()
    process.wait()
    while still := workers_below(out):
        assert time.monotonic() - t0 < 70, still
        time.sleep(0.05)
    return process


def workers_below(out: Path) -> list[str]:
    """Processes that have a file of the folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(str(out)):
                found.append(str(link))
        except OSError:
            pass
    return found


def stop_after_five_units(out: Path, corpus: Path) -> None:
    def tokenise_five(worker, unit):
        if len(list(out.glob(".parts/*-*.json"))) == 5:
            raise UserError("stopped")
        return tokenise_unit(worker, unit)

    tokenise_unit = parts.tokenise_unit
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(parts, "tokenise_unit", tokenise_five)
        run(out, "--source", corpus)


def test_parts_of_other_settings_are_not_used(tmp_path, corpus, submitted):
    out = tmp_path / "out"
    stop_after_five_units(out, corpus)
    submitted.clear()
    manifest = run(out, "--source", corpus, "--val_fraction", 0.5)
    assert manifest["documents"]["val"] > 350
    assert "00000-00000" in submitted
    fresh = run(tmp_path / "fresh", "--source", corpus, "--val_fraction", 0.5)
    assert manifest == fresh and bytes_of(out) == bytes_of(tmp_path / "fresh")


def test_a_damaged_part_is_made_again(tmp_path, corpus, expected):
    out = tmp_path / "out"
    stop_after_five_units(out, corpus)
    part = min(out.glob(".parts/*.train.bin"))
    part.write_bytes(part.read_bytes()[:-2])
    run(out, "--source", corpus)
    assert bytes_of(out) == expected


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_divide_the_units_and_rank_0_makes_the_shards(
    tmp_path, corpus, expected, submitted, monkeypatch, names
):
    out, of_rank = tmp_path / "out", {}
    for rank in (2, 1, 0):
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], "3")
        submitted.clear()
        prepare_fineweb.main(arguments(out, "--source", corpus, num_proc=1))
        of_rank[rank] = set(submitted)
        assert (out / "manifest.json").exists() == (rank == 0)
    sizes = [len(names) for names in of_rank.values()]
    assert max(sizes) - min(sizes) <= 1 and len(set.union(*of_rank.values())) == sum(sizes)
    assert bytes_of(out) == expected


def test_one_process_finishes_what_some_ranks_left(tmp_path, corpus, expected, submitted, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepare_fineweb.main(arguments(tmp_path / "out", "--source", corpus))
    before = set(submitted)
    monkeypatch.delenv("RANK")
    submitted.clear()
    run(tmp_path / "out", "--source", corpus)
    assert before and before.isdisjoint(submitted)
    assert bytes_of(tmp_path / "out") == expected


def test_rank_0_says_what_is_missing_when_the_others_do_nothing(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parts, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(parts, "LOG_SECONDS", 0.2)
    with pytest.raises(UserError, match="the other ranks finished nothing.*units are missing"):
        run(tmp_path / "out", "--source", corpus)
    assert "rank 0 waits for 1 others" in capsys.readouterr().out


def test_a_rank_that_is_still_at_work_when_rank_0_has_enough_ends_well(tmp_path, corpus, monkeypatch, capsys):
    def tokenise_unit(worker, unit):
        (tmp_path / "out" / "manifest.json").write_text("{}")
        raise FileNotFoundError(2, "No such file or directory", "part")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parts, "tokenise_unit", tokenise_unit)
    prepare_fineweb.main(arguments(tmp_path / "out", "--source", corpus, "--max_tokens", 9))
    assert "rank 1 of 2 is done" in capsys.readouterr().out


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert read_place() == (0, 1, 1, 0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert read_place()[:2] == (0, 4)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_max_tokens_keeps_the_first_documents_that_reach_it(tmp_path, corpus, gpt2, submitted, num_proc):
    documents = make_documents(600, seed=1) + make_documents(300, seed=2)
    limit, n_tokens, kept = 31_234, 0, []
    while n_tokens < limit:
        kept.append(documents[len(kept)])
        n_tokens += 1 + len(gpt2.encode(kept[-1].text))
    out = tmp_path / "out"
    manifest = run(out, "--source", corpus, "--max_tokens", limit, num_proc=num_proc)
    check_against_naive(out, manifest, kept, gpt2)
    assert sum(manifest["tokens"].values()) == n_tokens
    n_units = len({name[:11] for name in submitted})
    assert n_units < 14  # of more than 40: the rest is not tokenised


def die(unit):
    os._exit(1)


def test_a_worker_that_dies_is_one_clear_line(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(parts, "work", die)
    with pytest.raises(UserError, match="a worker process died.*smaller --num_proc"):
        run(tmp_path / "out", "--source", corpus, num_proc=2)


def test_an_interrupt_ends_with_one_line_and_leaves_nothing_running(tmp_path, corpus):
    arguments_ = arguments(tmp_path / "out", "--source", corpus, num_proc=2)
    command = [sys.executable, "-c", SMALL_UNITS, *arguments_]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts its background jobs with the signal ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "out").glob(".parts/*-*.json")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; the same command continues from here"
    assert not workers_below(tmp_path / "out")
