"""Attentions with fewer heads take the same arguments as those of torch, and give the same."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, shrink

WIDTH, HEADS = 12, 4


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, *inputs, **named):
        return self.attention(*inputs, **named)[0]


def masked_and_small(seed=0, **options):
    """Attention with heads 1 and 2 pruned, the same with two heads, and inputs."""
    torch.manual_seed(seed)
    model = Attends(**options).eval()
    key, value = options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    inputs = [torch.randn(3, 3, width) for width in (WIDTH, key, value)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
        model.attention.out_proj.weight[:, 3:9] = 0
    small = shrink(model, tuple(inputs))
    assert small.attention.num_heads == 2
    return model.attention, small.attention, inputs


def assert_same(masked, small, inputs, **named):
    expected, weights = masked(*inputs, average_attn_weights=False, **named)
    got, weights_left = small(*inputs, average_attn_weights=False, **named)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if weights is None:
        assert weights_left is None
    else:
        of_heads = -3  # (batch, heads, queries, keys), without a batch (heads, queries, keys)
        kept = weights.index_select(of_heads, torch.tensor([0, 3]))
        torch.testing.assert_close(weights_left, kept, rtol=0, atol=1e-5)
        _, mean = small(*inputs, **named)
        torch.testing.assert_close(mean, kept.mean(of_heads), rtol=0, atol=1e-5)


OPTIONS = [
    {}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "kdim": 5, "vdim": 7},
]  # fmt: skip
PADDING = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
LATER = torch.ones(3, 3, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "of keys": {"key_padding_mask": PADDING},
    "of keys, added": {"key_padding_mask": torch.zeros(3, 3).masked_fill(PADDING, -1e4)},
    "of scores": {"attn_mask": LATER},
    "of scores, added": {"attn_mask": torch.randn(3, 3)},
    "both": {"key_padding_mask": PADDING, "attn_mask": LATER},
    "causal": {"attn_mask": LATER, "is_causal": True},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_arguments_of_torch(options):
    masked, small, inputs = masked_and_small(**options)
    for (name, masks), weights in itertools.product(MASKS.items(), (True, False)):
        assert_same(masked, small, inputs, need_weights=weights, **masks)
        if "key_padding_mask" not in masks:
            assert_same(masked, small, [each[:, 0] if not options.get("batch_first") else each[0] for each in inputs],
                        need_weights=weights, **masks)  # fmt: skip
        assert name


def test_masks_for_each_head():
    masked, small, inputs = masked_and_small()
    mask = torch.randn(3, HEADS, 3, 3)
    expected, _ = masked(*inputs, attn_mask=mask.flatten(0, 1))
    got, _ = small(*inputs, attn_mask=mask[:, [0, 3]].flatten(0, 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_hint_without_a_mask_is_an_error():
    _, small, inputs = masked_and_small()
    with pytest.raises(RuntimeError, match="pass attn_mask"):
        small(*inputs, is_causal=True)


def test_it_trains_and_is_copied_and_pickled():
    _, small, inputs = masked_and_small(dropout=0.5)
    for each in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(each) is type(small)
        assert torch.equal(each(*inputs)[0], small(*inputs)[0])
    small.train()
    outputs = [small(*inputs, need_weights=weights)[0] for weights in (True, False)]
    sum(output.sum() for output in outputs).backward()
    assert small.in_proj_weight.grad.any()
    assert not torch.equal(outputs[0], small(*inputs)[0])


def test_parameters_keep_their_names():
    masked, small, _ = masked_and_small()
    assert small.state_dict().keys() == masked.state_dict().keys()
    assert isinstance(small, nn.MultiheadAttention)
    assert small.embed_dim == WIDTH


def test_a_subclass_with_a_forward_of_its_own_is_named():
    pytest.importorskip("torch_pruning", reason="where no head is removed, shrink looks for filters with it")

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0] * 2

    torch.manual_seed(0)
    model = nn.Sequential(Own(WIDTH, HEADS), nn.Linear(WIDTH, WIDTH)).eval()
    Sparsifier(model, "head", "local", "random").sparsify(0.5)
    with pytest.warns(UserWarning, match="2 of 2 zero heads cannot be removed: 0 .Own has a forward of its own"):
        shrink(model, torch.randn(3, 3, WIDTH))
