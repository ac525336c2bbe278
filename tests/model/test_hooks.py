import copy
import pickle

import pytest
import torch
from torch import nn

from sparsifai.model.hooks import RecordedOutputs, hooked


def number_of_hooks(model):
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules())


def test_hooks_see_the_inputs_and_the_output_and_may_replace_both(mlp):
    seen = []

    def before(layer, inputs, named):
        seen.append((layer, inputs, named))
        return (torch.zeros(3, 4),), {}

    def after(layer, inputs, named, output):
        seen.append((layer, inputs, named))
        return output - layer.bias

    given = torch.ones(3, 4)
    with hooked(after=[(mlp[0], after)], before=[(mlp[0], before)]):
        output = mlp[0](input=given)
    assert output.eq(0).all()
    assert [layer for layer, _, _ in seen] == [mlp[0], mlp[0]]
    assert seen[0][2]["input"] is given
    assert seen[1][1][0].eq(0).all()
    assert number_of_hooks(mlp) == 0


def test_hooks_are_removed_after_an_error_in_the_block(mlp):
    with pytest.raises(TypeError), hooked(after=[(mlp[0], print)], before=[(mlp[2], print)]):
        mlp[1](None)
    assert number_of_hooks(mlp) == 0


def test_hooks_are_on_the_layers_within_the_block(mlp):
    with hooked(after=[(mlp[0], print)], before=[(mlp[2], print)]):
        assert number_of_hooks(mlp) == 2
    assert number_of_hooks(mlp) == 0


def test_hooks_are_removed_if_one_of_them_cannot_be_put_on(mlp):
    with pytest.raises(AttributeError), hooked(after=[(mlp[0], print), ("no layer", print)]):
        pass
    assert number_of_hooks(mlp) == 0


def test_recorded_outputs_are_copies_of_the_latest():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with RecordedOutputs(model, ["0", "0"]) as outputs:
        assert number_of_hooks(model) == 1
        model(torch.ones(2, 4))
        given = torch.randn(2, 4)
        model(given)
    assert number_of_hooks(model) == 0
    assert torch.equal(outputs["0"], model[0](given))  # as before the activation, which works in place


def test_a_copy_of_a_model_with_hooks_has_no_outputs(mlp):
    recorded = RecordedOutputs(mlp, ["0"])
    recorded.start()
    mlp(torch.ones(2, 4))
    for copied in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        (hook,) = copied[0]._forward_hooks.values()
        assert hook.outputs == {}
    recorded.remove()
    assert list(recorded.outputs) == ["0"]
    assert number_of_hooks(mlp) == 0
