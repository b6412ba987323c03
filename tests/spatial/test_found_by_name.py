"""Adding an objective is adding a file, and a word in settings. pytest tests/spatial/test_found_by_name.py"""

import pytest
import tiny

import topogpt.spatial
from topogpt import settings
from topogpt.errors import UserError
from topogpt.settings import TopoConfig
from train import train

TOY = '''"""A toy: how far the activations of each sheet are from one."""

import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self, cfg, positions):
        super().__init__()
        self.positions, self.sheets = dict(positions), list(positions)

    def choose(self, seed, step, micro_batch):
        return torch.zeros(len(self.sheets), 1, dtype=torch.int64)

    def forward(self, activations, chosen):
        return torch.stack([(activations[sheet] - 1).square().mean() for sheet in self.sheets])


LOSS = Toy
'''


def test_an_objective_is_one_file_and_one_word(tmp_path, folder, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(topogpt.spatial, "__path__", [*topogpt.spatial.__path__, str(tmp_path)])
    monkeypatch.setattr(settings, "OBJECTIVES", (*settings.OBJECTIVES, "toy"))
    cfg = tiny.config(folder, "toy", topo={"loss": "toy", "weight": 5.0}, max_steps=12)
    assert train(cfg).step == 12
    losses = [record["spatial_loss"] for record in tiny.records(tiny.folder_of(cfg), "train")]
    assert losses[-1] < 0.5 * losses[0]  # it is minimised, and it is the toy's


def test_a_name_that_is_no_objective_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"topo\.loss = topolmm is no spatial loss.*none, topolm"):
        TopoConfig(loss="topolmm")
