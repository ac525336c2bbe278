"""Models and checkpoints that commands are given by name."""

import sys

import pytest
import torch
from torch import nn

MODELS = """
from torch import nn

number = 3

def net(outputs=3):
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, outputs))

def loud():
    print("made")
    return net()

def broken():
    raise KeyError("kind")

def leaving():
    raise SystemExit(5)

def tied():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model
"""
INPUT = "1,2,8,8"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the command: with a module of models, and a checkpoint of one of them."""
    (tmp_path / "sparsifai_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sparsifai_models", raising=False)
    torch.save(net().state_dict(), "net.pth")
    return tmp_path


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, outputs))


def small_bert():
    """A model of transformers."""
    transformers = pytest.importorskip("transformers", reason="save_pretrained is its own")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)
