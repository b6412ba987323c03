"""Fixtures for all tests. Run: pytest, or pytest tests/test_train.py"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the same sums in every process, and no fight for cores
ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for processes tests start

import pytest  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Keep what is remembered of shards out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Undo what a test, or the training it started, set for the whole process."""
    yield
    if torch := sys.modules.get("torch"):
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with train/ and val/, of tokens below tiny.VOCAB."""
    return tiny.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards) -> Path:
    """A folder with train/, val/ and, once there are runs, out/."""
    folder = tmp_path_factory.mktemp("runs")
    for split in ("train", "val"):
        (folder / split).symlink_to(shards / split)
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Training in this process draws no pictures of the sheets: they take longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            from topogpt.training import maps

            patch.setattr(maps, "draw", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, loaded once."""
    import texts

    return texts.load()
