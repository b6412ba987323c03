"""Where surviving connections are on the sheets. Run: pytest tests/evals/test_connections.py"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from evals import connections
from evals.connections import ConnectionsConfig, Places, Sheet, Wired, places_of
from topogpt import topo
from topogpt.analysis import measures
from topogpt.errors import UserError
from topogpt.model import connectome
from topogpt.runs.checkpoint import load_run
from topogpt.settings import GPTConfig
from topogpt.spatial.layout import laid_out


def plain(there: np.ndarray, places: Places) -> dict[str, float]:
    """The same by loops over units and connections."""
    (h, w), n = topo.grid_of(places.outputs), len(there)
    shared = []
    for i, j in itertools.combinations(range(n), 2):
        if np.abs(places.outputs[i] - places.outputs[j]).max() == 1:
            both, each = (there[i] & there[j]).sum(), there[i].sum() * there[j].sum()
            shared.append(both / each**0.5 if each else 0.0)
    counts = np.zeros((h, w))
    for i in range(n):
        counts[tuple(places.outputs[i])] = there[i].sum()
    lengths = []
    for i, j in zip(*np.nonzero(there), strict=True):
        a = (places.outputs[i] + 0.5) / (h, w)
        b = (places.inputs[j] + 0.5) / topo.grid_of(places.inputs)
        lengths.append(np.linalg.norm(a - b))
    return {"shared": np.mean(shared), "moran": topo.morans_i(counts), "length": np.mean(lengths)}


@pytest.mark.parametrize("kind", ["identity", "permuted"])
def test_against_loops(kind):
    there = np.random.default_rng(0).random((20, 12)) < 0.3
    there[3] = False  # a unit without any
    places = Places(topo.positions(kind, 20, 1, "a"), topo.positions(kind, 12, 1, "b"))
    found = Wired(there, Sheet(places)).measure()
    assert found == pytest.approx(plain(there, places), abs=1e-6)
    assert "length" not in Wired(there, Sheet(places._replace(inputs=None))).measure()


def test_pairs_of_neighbours():
    pairs = {frozenset(pair) for pair in zip(*measures.edges(3, 4, "queen")[:2], strict=True)}
    near = [np.abs(np.subtract(np.divmod(a, 4), np.divmod(b, 4))).max() for a, b in map(sorted, pairs)]
    assert len(pairs) == 3 * 3 + 2 * 4 + 2 * 6 == len(near) and set(near) == {1}


@pytest.mark.parametrize("layout", topo.LAYOUTS)
def test_units_lie_where_their_sheets_say(layout):
    cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64)
    positions = laid_out(cfg, layout, "permuted", seed=3)
    found = places_of(SimpleNamespace(model=SimpleNamespace(cfg=cfg), positions=positions))
    assert len(found) == 6
    row_by_row = {n: topo.positions("identity", n, 0, "") for n in (16, 64)}
    last = found["transformer.h.1.mlp.c_proj.weight"], found["transformer.h.1.mlp.c_fc.weight"]
    assert (last[0].inputs == last[1].outputs).all() and (last[1].inputs == row_by_row[16]).all()
    if layout == "per_branch":
        assert (last[0].outputs == positions["layer.1.mlp"]).all()
        assert (found["transformer.h.0.attn.c_proj.weight"].outputs == positions["layer.0.attn"]).all()
    elif layout == "c_fc":
        assert (last[1].outputs == positions["layer.1.fc"]).all()
        assert (last[0].outputs == row_by_row[16]).all()
    else:  # the last sixteen of the one sheet, on rows of their own
        own = positions["all"][-16:]
        assert (last[0].outputs == own - own.min(axis=0) * (1, 0)).all()
        assert topo.units_by_cell(last[0].outputs).shape == (16,)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruned run: connections of c_fc where the way is short, all others at random."""
    run = tiny.random_run(tmp_path_factory.mktemp("connections"), "grown", vocab_size=64)
    cfg = load_run(run).model.cfg
    wiring = {}
    for name, shape in [(n, p.shape) for n, p in load_run(run).model.named_parameters() if p.dim() == 2]:
        places, draw = places_of_identity(cfg).get(name), np.random.default_rng(len(wiring))
        chance = draw.random(shape)
        if "c_fc" in name:
            a, b = topo.unit_square(places.outputs), topo.unit_square(places.inputs)
            chance = np.linalg.norm(a[:, None] - b, axis=-1)
        there = chance <= np.quantile(chance, 0.25)
        wiring[name] = torch.from_numpy(there.astype(np.int8))
    connectome.write(run / "pruned", connectome.Connectome(wiring), cfg)
    return run


def places_of_identity(cfg: GPTConfig) -> dict[str, Places]:
    positions = laid_out(cfg, "per_branch", "identity")
    return places_of(SimpleNamespace(model=SimpleNamespace(cfg=cfg), positions=positions))


def test_planted_short_connections_are_found_and_random_ones_are_not(run, capsys):
    connections.ANALYSIS.main([str(run), "--n_shuffles", "99", "--n_random", "9"])
    found = json.loads((run / "evals" / "connections.json").read_text())["results"]
    assert found["kept"] == pytest.approx(0.25, abs=0.03)
    near, random = found["kinds"]["mlp.c_fc"], found["kinds"]["mlp.c_proj"]
    assert near["length"]["value"] < 0.6 * near["length"]["random"]
    assert near["shared"]["value"] > 0.5 > near["shared"]["random"]
    for measure in ("length", "shared"):
        assert near[measure]["p_shuffled"] == 0.01 and near[measure]["p_random"] == 0.1
        assert random[measure]["p_shuffled"] > 0.01
        assert random[measure]["value"] == pytest.approx(random[measure]["random"], abs=0.03)
    assert "length" not in found["kinds"]["attn.c_proj"]
    shown = capsys.readouterr().out
    assert "random wiring" in shown and "units shuffled" in shown
    assert (run / "evals" / "connections.png").stat().st_size > 10_000


def test_mistakes_are_one_line(run, tmp_path):
    plain = tiny.random_run(tmp_path, "dense", vocab_size=64)
    with pytest.raises(UserError, match="dense was trained under no connectome"):
        connections.ANALYSIS.main([str(plain)])
    with pytest.raises(UserError, match="is no connectome"):
        connections.ANALYSIS.main([str(plain), "--connectome", str(tmp_path)])
    with pytest.raises(UserError, match="connectome has no effect with control"):
        ConnectionsConfig(run="a", control="b", connectome="c")
    with pytest.raises(UserError, match="n_random = 1"):
        ConnectionsConfig(run="a", n_random=1)
