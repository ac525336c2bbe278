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


def without_a_block(kind, config, batch, **sizes):
    """A model of transformers of which one block is pruned, and the smaller one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    Sparsifier(model, "block", criteria="random", seed=1, example_input=batch).sparsify(0.2)
    return model, shrink(model, batch)


PICTURES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
OF_PICTURES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "mlp_ratio": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        ("Dinov2Model", "Dinov2Config", {"num_hidden_layers": 4, **OF_PICTURES}),
        ("Dinov2Backbone", "Dinov2Config", {"num_hidden_layers": 4, "out_indices": [2, -1], **OF_PICTURES}),
        ("SegformerModel", "SegformerConfig",  # heads of different sizes, all of which stay
         {"hidden_sizes": [16, 32], "num_attention_heads": [1, 4], "depths": [2, 2], "sr_ratios": [2, 1],
          "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}),
    ],
)  # fmt: skip
def test_a_model_without_a_block_is_saved_and_loaded(kind, config, sizes, tmp_path):
    model, small = without_a_block(kind, config, PICTURES, **sizes)
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for each in (small, loaded):
            outputs = each(**PICTURES)[0], model(**PICTURES)[0]
            first, expected = (value if isinstance(value, tuple) else (value,) for value in outputs)
            assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(first, expected, strict=True))


def test_where_a_config_cannot_say_which_block_is_gone_another_way_is_named(tmp_path):
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    }  # fmt: skip
    transformers = pytest.importorskip("transformers")
    tokens = {"input_ids": torch.arange(3, 21).reshape(2, 9)}
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**sizes)).eval()
    with torch.no_grad():
        for weight in model.layers[0].parameters():  # unlike the second, it has no norm layer before its attention
            weight.zero_()
    small = shrink(model, tokens)
    assert len(small.layers) == 1
    with pytest.raises(ValueError, match=r"its config cannot say .*; use torch.save.*since whole modules are removed"):
        small.save_pretrained(tmp_path)
    torch.save(small, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(**tokens)[0], small(**tokens)[0])
