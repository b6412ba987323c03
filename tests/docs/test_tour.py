"""The tour runs from another folder, and is kept without outputs. Run: pytest tests/docs/test_tour.py"""

import json

import pytest
import tiny

NOTEBOOK = tiny.ROOT / "docs" / "notebooks" / "tour.ipynb"


def test_it_is_kept_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_it_runs_from_another_folder(tmp_path, trained, monkeypatch, gpt2):
    """On its own random model, and on a run in out/demo; gpt2 leaves its vocabulary in the cache."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if trained:
        tiny.random_run(tmp_path / "out", "demo", n_embd=64, block_size=128)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in shown)
    assert (f"{tmp_path}/out/demo" in text) == trained
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    last = float(text.split("step 200")[1].split("spatial")[1].split()[0])
    assert last < 0.3, text
