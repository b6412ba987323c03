"""The stream of tokens, its windows and their order, and what is read ahead."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import ROOT, numbered, write_shard

from topogpt.errors import UserError
from topogpt.text import loader as data
from topogpt.text.loader import Share, TokenLoader, fixed_batches


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loader(corpus: data.Corpus, **options) -> TokenLoader:
    options = {"block_size": 4, "batch_size": 8, "per_device_batch_size": 2, "seed": 1} | options
    return TokenLoader(corpus, **options)


# ---- stream and windows ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ends=st.tuples(st.integers(0, 53), st.integers(0, 53)),
)
def test_a_window_anywhere_equals_the_concatenated_stream(tmp_path_factory, sizes, ends):
    corpus = numbered(tmp_path_factory.mktemp("shards"), *sizes)
    start, stop = sorted(end % (sum(sizes) + 1) for end in ends)
    if start < stop:
        assert corpus.window(start, stop - start).tolist() == list(range(start, stop))
    with pytest.raises(AssertionError):
        corpus.window(start, sum(sizes) - start + 1)


def test_windows_overlap_by_the_target_and_lose_only_the_end_of_the_stream(tmp_path):
    corpus = numbered(tmp_path, 5, 6, 3)
    batches = list(fixed_batches(corpus, n_tokens=10**9, block_size=4, per_device_batch_size=2))
    assert torch.cat([b.tokens for b in batches]).flatten().tolist() == list(range(12))
    assert torch.cat([b.targets for b in batches]).flatten().tolist() == list(range(1, 13))
    assert [tuple(b.tokens.shape) for b in batches] == [(2, 4), (1, 4)]


@pytest.mark.parametrize("n_tokens, n_windows", [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_number_of_windows_counts_the_last_target(tmp_path, n_tokens, n_windows):
    corpus = numbered(tmp_path, n_tokens)
    if n_windows:
        assert loader(corpus).n_windows == n_windows
        return
    for start in (loader, lambda c: fixed_batches(c, n_tokens=4, block_size=4, per_device_batch_size=1)):
        with pytest.raises(UserError, match="train_data_dir: 4 tokens .* block_size . 1 = 5; add data"):
            start(corpus)


# ---- order -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_each_epoch_holds_every_window_once_even_where_a_step_straddles_epochs(batch_size, seed):
    corpus = data.Corpus.__new__(data.Corpus)
    corpus.n_tokens = 4 * 13 + 2  # 13 windows; nothing is read
    loading = loader(corpus, batch_size=batch_size, per_device_batch_size=1, seed=seed)
    stream = np.concatenate([loading.sequences(step) for step in range(40 // batch_size + 1)])
    epochs = [stream[i : i + 13].tolist() for i in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(loading.orders) <= 2  # epochs kept in memory


def test_the_order_is_pinned_and_depends_on_the_seed(tmp_path):
    corpus = numbered(tmp_path, 41)
    assert loader(corpus).sequences(0).tolist() == [8, 6, 0, 3, 9, 5, 2, 7]  # changing it breaks --resume
    assert loader(corpus, seed=2).sequences(0).tolist() != loader(corpus).sequences(0).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_ranks_together_hold_the_single_rank_s_batch(tmp_path, world):
    corpus = numbered(tmp_path, 30, 31, 40)
    alone = loader(corpus, batch_size=12)
    for step in (0, 1, 5):
        expected = {b.index: b for b in alone.step(step)}
        assert list(expected) == list(range(6))
        together = [
            b
            for rank in range(world)
            for b in loader(corpus, batch_size=12, ranks=Share(rank, world)).step(step)
        ]
        assert sorted(b.index for b in together) == list(range(6))
        for b in together:
            assert torch.equal(b.tokens, expected[b.index].tokens)
            assert torch.equal(b.targets, expected[b.index].targets)
        rows = torch.cat([b.tokens for b in expected.values()])  # (12, 4)
        assert (rows[:, 0] // 4).tolist() == alone.sequences(step).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_validation_reads_the_same_tokens_for_any_number_of_ranks(tmp_path, world):
    corpus = numbered(tmp_path, 30, 31, 40)
    options = {"n_tokens": 30, "block_size": 4, "per_device_batch_size": 2}
    shares = [list(fixed_batches(corpus, ranks=Share(rank, world), **options)) for rank in range(world)]
    assert [b.index for b in shares[0]] == list(range(0, 4, world))
    batches = sorted((b for share in shares for b in share), key=lambda b: b.index)
    assert torch.cat([b.tokens for b in batches]).flatten().tolist() == list(range(28))
    assert len(list(fixed_batches(corpus, **options | {"n_tokens": 1}))) == 1


def test_micro_batches_are_contiguous_int64_with_targets_one_later(tmp_path):
    corpus = numbered(tmp_path, 101)
    for b in loader(corpus).step(3):
        assert b.tokens.dtype == b.targets.dtype == torch.int64
        assert b.tokens.shape == b.targets.shape == (2, 4)
        assert b.tokens.is_contiguous() and b.targets.is_contiguous()
        assert torch.equal(b.targets, b.tokens + 1)


def test_starting_at_a_later_step_continues_the_same_order(tmp_path):
    corpus = numbered(tmp_path, 101)
    with loader(corpus) as one, loader(corpus) as other:
        from_start = list(itertools.islice(one.steps(0), 8))
        resumed = list(itertools.islice(other.steps(5), 3))
    for a, b in zip(from_start[5:], resumed, strict=True):
        assert [m.index for m in a] == [m.index for m in b] == [0, 1, 2, 3]
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))
    assert not torch.equal(from_start[4][0].tokens, resumed[0][0].tokens)


# ---- reading ahead ---------------------------------------------------------------------------------


def test_steps_are_read_ahead_in_another_thread_but_only_a_few(tmp_path, monkeypatch):
    read, steps, threads = TokenLoader.read, [], set()

    def spy(self, step):
        steps.append(step)
        threads.add(threading.current_thread())
        return read(self, step)

    monkeypatch.setattr(TokenLoader, "read", spy)
    with loader(numbered(tmp_path, 101)) as loading:
        loading.steps(0)
        loading.reader.submit(int).result()  # the thread has done all that was asked of it
        assert steps == list(range(data.STEPS_AHEAD))
        assert threading.current_thread() not in threads


def test_an_error_in_the_reading_thread_reaches_the_consumer(tmp_path, monkeypatch):
    corpus = numbered(tmp_path, 101)
    window, calls = corpus.window, itertools.count()

    def fail_later(start, n):
        if next(calls) == 20:
            raise OSError("the disk is gone")
        return window(start, n)

    monkeypatch.setattr(corpus, "window", fail_later)
    with loader(corpus) as loading:
        steps = loading.steps(0)
        assert [len(next(steps)) for _ in range(2)] == [4, 4]  # 16 windows
        with pytest.raises(OSError, match="the disk is gone"):
            next(steps)


def test_closing_ends_the_thread(tmp_path):
    before = set(threading.enumerate())
    loading = loader(numbered(tmp_path, 101))
    next(loading.steps(0))
    assert set(threading.enumerate()) - before
    loading.close()
    assert not set(threading.enumerate()) - before
    loading.close()


def test_a_process_that_never_closes_its_loader_still_ends(tmp_path):
    write_shard(tmp_path / "a.bin", range(101))
    script = (
        "import sys; from topogpt.text.loader import *\n"
        "corpus = open_corpus(sys.argv[1:], key='k', vocab_size=101)\n"
        "next(TokenLoader(corpus, block_size=4, batch_size=2, per_device_batch_size=1, seed=0).steps(0))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=60)


def test_opening_a_corpus_does_not_import_torch(tmp_path):
    write_shard(tmp_path / "a.bin", range(9))
    script = (
        "import sys; from topogpt.text.loader import open_corpus\n"
        "open_corpus(sys.argv[1:], key='k', vocab_size=9)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=60)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_batches_arrive_on_the_device(tmp_path):
    corpus = numbered(tmp_path, 101)
    with loader(corpus, ranks=Share(device="cuda")) as loading:
        for step, batches in enumerate(itertools.islice(loading.steps(0), 5)):
            for got, expected in zip(batches, loader(corpus).step(step), strict=True):
                assert got.tokens.is_cuda and torch.equal(got.targets.cpu(), expected.targets)
