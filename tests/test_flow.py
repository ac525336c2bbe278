import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import Sparsifier
from sparsifai.flow import _recorded, _shell, _traced, find_flow
from sparsifai.target import find_targets


class Reversed(nn.Module):
    """Defined in the opposite order of its computation, with two outputs and a functional call."""

    def __init__(self):
        super().__init__()
        self.second_head = nn.Linear(4, 2)
        self.first_head = nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.weight_of_a_call = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.late = nn.Conv2d(4, 4, 1)
        self.early = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.early(x)))
        x = self.late(F.conv2d(x, self.weight_of_a_call)) + x
        x = x.mean((2, 3))
        return self.first_head(x), torch.sigmoid(self.second_head(x))


class Branching(nn.Module):
    """What fx cannot trace: the path depends on the values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)
        self.stem = nn.Conv2d(2, 6, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.stem(x).relu())
        if x.sum() > 1e9:
            x = x * 2
        return self.head(self.dropout(x).amax((2, 3)))


EXAMPLE = torch.randn(2, 2, 6, 6)


@pytest.mark.parametrize("how", ["traced", "recorded"])
def test_first_last_and_norms_by_data_flow_not_by_file_order(how):
    model = Reversed()
    flow = _traced(_shell(model)) if how == "traced" else _recorded(_shell(model), EXAMPLE)
    targets = find_targets(model)
    assert flow.first(targets) == {"early.weight"}
    assert flow.last(targets) == {"first_head.weight", "second_head.weight"}
    assert flow.norms_behind(model, targets) == {"norm": {"early.weight"}}


def test_what_cannot_be_traced_needs_an_example_and_is_left_as_it_was():
    model = Branching().train()
    with pytest.raises(ValueError, match=r"the data flow of Branching cannot be traced .* pass example_input="):
        Sparsifier(model, "filter")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sparsifier = Sparsifier(model, "filter", example_input=EXAMPLE)
    assert sparsifier.dense == {"head.weight": "yields the model's output"}
    assert sparsifier.followers == dict.fromkeys(["stem.bias", "norm.weight", "norm.bias"], ("stem.weight",))
    assert model.training
    assert model.dropout.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    Sparsifier(Branching(), "weight")  # needs no data flow, so no example


@pytest.mark.parametrize("example", [(EXAMPLE,), {"x": EXAMPLE}])
def test_examples_may_be_tuples_and_dictionaries(example):
    assert find_flow(Branching(), example).last(find_targets(Branching())) == {"head.weight"}


def test_tracing_leaves_no_proxy_on_the_model():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            self.seen = self.layer(x)
            return self.head(self.seen)

    model = Remembers()
    Sparsifier(model, "filter")
    assert not hasattr(model, "seen")


def test_weights_that_are_turned_before_use():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.stem = nn.Linear(3, 4)

        def forward(self, x):
            return (x @ self.stem.weight.t()).relu() @ self.head.weight.t()

    model = Turned()
    for flow in (find_flow(model), _recorded(_shell(model), torch.randn(2, 3))):
        assert flow.first(find_targets(model)) == {"stem.weight"}
        assert flow.last(find_targets(model)) == {"head.weight"}


@pytest.mark.parametrize(
    ("model", "first", "last", "norms"),
    [
        ("resnet18", {"conv1.weight"}, {"fc.weight"}, 20),
        ("mobilenet_v3_small", {"features.0.0.weight"}, {"classifier.3.weight"}, 34),
        ("vgg11_bn", {"features.0.weight"}, {"classifier.6.weight"}, 8),
        ("densenet121", {"features.conv0.weight"}, {"classifier.weight"}, 59),
        ("vit_b_16", {"conv_proj.weight"}, {"heads.head.weight"}, 0),
    ],
)
@pytest.mark.slow
def test_torchvision_models(model, first, last, norms):
    models = pytest.importorskip("torchvision").models
    # dense blocks normalize concatenations, of which a layer's channels are a part: those norms have no one producer
    net = getattr(models, model)(weights=None)
    flow, targets = find_flow(net), find_targets(net)
    assert flow.first(targets) == first
    assert flow.last(targets) == last
    assert len(flow.norms_behind(net, targets)) == norms
