import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import Sparsifier
from sparsifai.model.layers import find_weights
from sparsifai.model.tracing import _recorded, _traced, find_flow


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
    flow = _traced(model) if how == "traced" else _recorded(model, EXAMPLE)
    targets = find_weights(model)
    assert flow.first(targets) == {"early.weight"}
    assert flow.last(targets) == {"first_head.weight", "second_head.weight"}
    assert flow.norms_behind(model, targets) == {("norm", False): {"early.weight"}}


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
    assert find_flow(Branching(), example).last(find_weights(Branching())) == {"head.weight"}


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
    for flow in (find_flow(model), _recorded(model, torch.randn(2, 3))):
        assert flow.first(find_weights(model)) == {"stem.weight"}
        assert flow.last(find_weights(model)) == {"head.weight"}


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
    flow, targets = find_flow(net), find_weights(net)
    assert flow.first(targets) == first
    assert flow.last(targets) == last
    assert len(flow.norms_behind(net, targets)) == norms


def flows(model, example):
    return find_flow(model, example), _recorded(model, example)


class Forward(nn.Module):
    """A convolution, a norm layer and a head, with what is between them given."""

    def __init__(self, between, norm=None, shape=(2, 3)):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = norm or nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)
        self.between, self.shape = between, shape
        self.prelu = nn.PReLU()

    def forward(self, x):
        x = self.norm(self.between(self, self.conv(x)))
        return self.head(x.amax(self.shape))


def writes(model, x):
    x.add_(1)
    return x


def sets(model, x):
    x[:, 0] = 1.0
    return x


@pytest.mark.parametrize(
    ("between", "norm", "dies"),
    [
        (lambda model, x: model.prelu(x), None, True),
        (lambda model, x: F.pad(F.relu(x), (1, 1)).type(torch.float32), None, False),  # not among those followed
        (lambda model, x: F.interpolate(x.to(torch.float32), scale_factor=2.0), None, True),
        (lambda model, x: nn.functional.relu_(x), None, True),
        (lambda model, x: torch.sigmoid(x), None, False),
        (lambda model, x: torch.cat([x, x], 1)[:, :6], None, False),
        (writes, None, False),
        (sets, None, False),
    ],
)
def test_what_stands_between_a_filter_and_its_norm_layer(between, norm, dies):
    model = Forward(between, norm)
    for flow in flows(model, EXAMPLE):
        expected = {("norm", False): {"conv.weight"}} if dies else {}
        assert flow.norms_behind(model, ["conv.weight"]) == expected
        assert flow.last(find_weights(model)) == {"head.weight"}


def test_a_layer_norm_behind_moved_channels():
    model = Forward(lambda model, x: x.permute(0, 2, 3, 1), nn.LayerNorm(6), (1, 2))
    for flow in flows(model, EXAMPLE):
        assert flow.norms_behind(model, ["conv.weight"]) == {("norm", True): {"conv.weight"}}
    assert set(Sparsifier(model, "filter").followers) == {"conv.bias", "norm.weight", "norm.bias"}
    unmoved = Forward(lambda model, x: x.permute(0, 1, 3, 2), nn.LayerNorm(4))
    assert set(Sparsifier(unmoved, "filter").followers) == {"conv.bias"}


def test_changing_the_type_is_not_reading_a_size():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.type(torch.float32)).type(torch.float32)

    assert find_flow(Typed()).last(find_weights(Typed())) == {"inner.1.weight"}
    assert find_flow(Typed()).first(find_weights(Typed())) == {"inner.0.weight"}


def test_containers_of_torch_are_looked_into():
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    sparsifier = Sparsifier(model, "filter", example_input=torch.randn(2, 5, 6))
    assert sparsifier.dense == {"2.weight": "yields the model's output"}
    assert not any("norm" in name for name in sparsifier.followers)  # both stand behind sums
    # Past the attention, the residual path carries the input on to the next layers.
    assert set(Sparsifier(model[1:], "channel", example_input=torch.randn(2, 5, 8)).dense) == {
        "1.self_attn.in_proj_weight",
        "1.linear1.weight",
        "2.weight",
    }


def test_attention_is_two_steps():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)})

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["attention"](x, x, x)[0]

    for flow in flows(Attends(), torch.randn(2, 3, 4)):
        assert flow.first(find_weights(Attends())) == {"inner.attention.in_proj_weight"}
        assert flow.last(find_weights(Attends())) == {"inner.attention.out_proj.weight"}


class Wrapped:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("wrap", [Wrapped, lambda x: {"logits": [x]}, lambda x: x.as_subclass(torch.nn.Buffer)])
def test_the_output_is_found_in_what_models_return(wrap):
    class Wraps(Branching):
        def forward(self, x):
            return wrap(super().forward(x))

    assert Sparsifier(Wraps(), "filter", example_input=EXAMPLE).dense == {"head.weight": "yields the model's output"}


def test_a_flow_that_does_not_show_the_output_is_an_error_not_a_guess():
    class Hides(Branching):
        def forward(self, x):
            super().forward(x)
            return 3.0

    with pytest.raises(ValueError, match="does not show which layer yields the model's output, .* name the layers"):
        Sparsifier(Hides(), "filter", example_input=EXAMPLE)
    assert list(Sparsifier(Hides(), "filter", layers="stem", example_input=EXAMPLE).masks) == ["stem.weight"]


def test_recording_leaves_the_random_state_alone():
    class Draws(Branching):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    model = Draws()
    state = torch.get_rng_state()
    Sparsifier(model, "filter", example_input=EXAMPLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_activations_and_buffers_that_a_forward_writes_are_left_alone():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.kept = self.layer(x)
            return self.head(self.kept)

    model = Keeps()
    model(torch.randn(2, 4)).sum().backward()
    kept = model.kept
    Sparsifier(model, "filter", example_input=torch.randn(2, 4))
    assert model.calls == 1
    assert model.kept is kept


@pytest.mark.fastai
@pytest.mark.slow
def test_a_unet_of_fastai():
    vision = pytest.importorskip("fastai.vision.all", reason="it is fastai's")
    resnet = pytest.importorskip("torchvision").models.resnet18(weights=None)
    model = vision.DynamicUnet(nn.Sequential(*list(resnet.children())[:-2]), 2, (32, 32))
    dense = Sparsifier(model, "filter", example_input=torch.randn(2, 3, 32, 32)).dense
    assert dense == {"layers.12.0.weight": "yields the model's output"}


def test_an_example_that_does_not_fit_says_so():
    with pytest.raises(
        ValueError, match="example_input does not run through Branching .*; pass a batch that the model acc"
    ):
        Sparsifier(Branching(), "filter", example_input=torch.randn(3))
