"""The config of a smaller model of transformers says its widths, or it is not saved."""

import copy
import pickle

import pytest
import torch
from joint_models import model_and_batch, output_of
from torch import nn

from sparsifai import Sparsifier, shrink

pytest.importorskip("transformers", reason="these are its models")


def shrunk(name, *kinds, context="local"):
    model, batch = model_and_batch(name)
    for kind in kinds:
        Sparsifier(model, kind, context, "random", seed=1).sparsify(0.5)
    return shrink(model, batch), model, batch


CONFIGS = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "qwen3": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "gemma3": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48},
    "mistral": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48},
    "mixtral": {"num_attention_heads": 2, "intermediate_size": 48},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48},
    "t5": {"num_heads": 2, "d_kv": 16, "d_ff": 48},
}
NEURONS = {
    "bert": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim", "distilbert": "hidden_dim", "vit":
    "intermediate_size", "clip": "intermediate_size", "neox": "intermediate_size", "falcon": "ffn_hidden_size",
    "deberta": "intermediate_size",
}  # fmt: skip


@pytest.mark.parametrize("name", [*CONFIGS, *NEURONS])
def test_a_smaller_model_is_saved_and_loaded(name, tmp_path):
    small, model, batch = shrunk(name, *(("head", "neuron") if name in CONFIGS else ("neuron",)))
    expected = CONFIGS[name] if name in CONFIGS else {NEURONS[name]: 256 if name in ("gpt2", "falcon") else 48}
    expected = {key: 128 if name in ("gpt2", "falcon") else value for key, value in expected.items()}
    assert {key: getattr(small.config, key) for key in expected} == expected
    assert any(getattr(model.config, key, None) != value for key, value in expected.items())
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, batch), output_of(small, batch))
    assert loaded.num_parameters() == small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_what_the_config_cannot_say_is_not_saved(name, tmp_path):
    small, model, batch = shrunk(name, "head")
    assert small.config.to_dict() == model.config.to_dict()
    for each in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with pytest.raises(ValueError, match=r"its config cannot say that .* has the shape .*; use sparsifai.save_shr"):
            each.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path)


def test_layers_of_different_widths_are_named(tmp_path):
    small, _, _ = shrunk("llama", "neuron", context="global")
    with pytest.raises(ValueError, match=r"its layers have different widths .intermediate_size would be \["):
        small.save_pretrained(tmp_path)


def test_a_model_inside_another_one(tmp_path):
    class Classifier(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.last = inner, nn.Linear(64, 3)

        def forward(self, input_ids):
            return self.last(output_of.__wrapped__(self.inner, {"input_ids": input_ids}))

    inner, batch = model_and_batch("bert")
    model = Classifier(inner).eval()
    Sparsifier(model, "neuron", "local", "random").sparsify(0.5)
    small = shrink(model, batch)
    assert small.inner.config.intermediate_size == 48
    Sparsifier(small, "head", "local", "random").sparsify(0.5)
    smaller = shrink(small, batch)
    with pytest.raises(ValueError, match="BertModel.save_pretrained: its config cannot say"):
        smaller.inner.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_fewer_layers(name, tmp_path):
    """A layer that is zero is removed as a whole, and the number of layers is in the config."""
    model, batch = model_and_batch(name)
    with torch.no_grad():
        for parameter in next(part for part in model.modules() if isinstance(part, nn.ModuleList))[0].parameters():
            parameter.zero_()
    Sparsifier(model, "neuron", "local", "random").sparsify(0.5)
    small = shrink(model, batch)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, batch), output_of(small, batch))
    assert loaded.config.num_hidden_layers == 1
