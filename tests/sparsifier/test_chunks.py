"""Chunks and shuffles of channels: they are followed, so that what is pruned can be removed, or named as the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning", reason="what is coupled torch-pruning knows")

from conftest import dense_of  # noqa: E402

from sparsifai import Sparsifier, load_shrunk, save_shrunk, shrink, shrinkage  # noqa: E402

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned_and_shrunk(model, example=EXAMPLE):
    """The Sparsifier of a model at half of its coupled filters, and the shrunk model, which has the same outputs."""
    model = model.eval()
    sparsifier = Sparsifier(model, "filter", "local", coupled=True, example_input=example)
    sparsifier.sparsify(0.5)
    assert shrinkage(model, example).zeros_left == 0
    small = shrink(model, example)
    with torch.no_grad():
        expected = model(example)
        assert (small(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
    small.train()(example).sum().backward()
    return sparsifier, small


def alive(sparsifier, name):
    return sparsifier.masks[f"{name}.weight"].flatten(1).any(1)


def conv(inputs, outputs, kernel=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class C2f(nn.Module):
    """The block of YOLOv8: one half of the channels goes through bottlenecks, all results are concatenated."""

    def __init__(self, split, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.split = conv(3, 2 * width), conv(4 * width, width), split
        self.blocks = nn.ModuleList(nn.Sequential(conv(width, width, 3), conv(width, width, 3)) for _ in range(2))
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        y = list(self.split(self.first(x)))
        for block in self.blocks:
            y.append(y[-1] + block(y[-1]))
        return self.out(self.last(torch.cat(y, 1)))


SPLITS = {
    "chunk": lambda x: x.chunk(2, 1),
    "torch.chunk": lambda x: torch.chunk(x, 2, dim=1),
    "split": lambda x: x.split(x.shape[1] // 2, dim=1),
    "torch.split": lambda x: torch.split(x, [x.shape[1] // 2] * 2, 1),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_chunks_of_channels_lose_as_many(split):
    sparsifier, small = pruned_and_shrunk(C2f(split))
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    kept = alive(sparsifier, "first.0").unflatten(0, (2, 8))
    assert kept.sum(1).tolist() == [4, 4]
    assert kept[0].tolist() != kept[1].tolist()
    assert torch.equal(kept[1], alive(sparsifier, "blocks.0.1.0"))
    assert torch.equal(kept[1], alive(sparsifier, "blocks.1.1.0"))
    assert small.last[0].in_channels == 16


def test_a_split_of_a_fixed_size_keeps_its_layers_dense():
    class Fixed(C2f):
        def __init__(self):
            super().__init__(lambda x: x.split(8, 1))

    sparsifier, small = pruned_and_shrunk(Fixed())
    assert dense_of(sparsifier)["first.0.weight"] == "its removal would change the model's outputs"
    assert (small.first[0].out_channels, small.last[0].out_channels) == (16, 4)


@pytest.mark.parametrize("axes", [4, 3, 2])
def test_glu_joins_the_gate_with_what_it_gates(axes):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gated = nn.Conv2d(3, 16, 1) if axes == 4 else nn.Linear(3, 16)
            self.out = nn.Conv2d(8, 2, 3, padding=1) if axes == 4 else nn.Linear(8, 2)

        def forward(self, x):
            return self.out(F.glu(self.gated(x), 1 if axes == 4 else -1))

    example = EXAMPLE if axes == 4 else torch.randn(5, 4, 3)[0 if axes == 2 else slice(None)]
    sparsifier, small = pruned_and_shrunk(Gated(), example)
    kept = alive(sparsifier, "gated").unflatten(0, (2, 8))
    assert torch.equal(kept[0], kept[1])
    assert small.gated.weight.shape[0] == 8
    assert small.out.weight.shape[1] == 4


class Shuffled(nn.Module):
    """A block of ShuffleNet: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, and a sum."""

    def __init__(self, shuffle, width=16, groups=2):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1, groups=groups)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.last, self.out = nn.Conv2d(width, width, 1, groups=groups), nn.Linear(width, 3)
        self.shuffle = shuffle

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.depthwise(self.shuffle(F.relu(self.first(x))))
        return self.out(F.relu(x + self.last(y)).mean((2, 3)))


def by_views(x):
    batch, channels, height, width = x.shape
    x = x.view(batch, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


SHUFFLES = {
    "views": by_views,
    "permute": lambda x: x.unflatten(1, (2, -1)).permute(0, 2, 1, 3, 4).reshape(x.shape),
    "function": lambda x: F.channel_shuffle(x, 2),
    "module": nn.ChannelShuffle(2),
}


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_channels_that_a_shuffle_puts_side_by_side_are_pruned_together(shuffle):
    sparsifier, small = pruned_and_shrunk(Shuffled(shuffle))
    assert dense_of(sparsifier) == {"out.weight": "yields the model's output"}
    kept = alive(sparsifier, "first").unflatten(0, (2, 8))
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(alive(sparsifier, "depthwise").unflatten(0, (8, 2)), kept.T)
    assert alive(sparsifier, "last").unflatten(0, (2, 8)).sum(1).tolist() == [4, 4]
    assert small.depthwise.groups == 8
    assert small.first.weight.shape == (8, 4, 1, 1)


def test_the_file_of_a_shrunk_model_with_groups(tmp_path):
    _, small = pruned_and_shrunk(Shuffled(nn.ChannelShuffle(2)))
    save_shrunk(small.eval(), tmp_path / "small.safetensors")
    loaded = load_shrunk(Shuffled(nn.ChannelShuffle(2)).eval(), tmp_path / "small.safetensors")
    assert torch.equal(loaded(EXAMPLE), small(EXAMPLE))
    assert (loaded.first.in_channels, loaded.first.out_channels, loaded.depthwise.groups) == (8, 8, 8)


def test_a_view_that_is_no_shuffle_stays_as_it_is():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.out(x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).mean(2))

    with pytest.raises(ValueError, match="no layer is left"):
        pruned_and_shrunk(Averaged())


@pytest.mark.slow
def test_shufflenet_of_torchvision():
    models = pytest.importorskip("torchvision", reason="its models are the test").models
    torch.manual_seed(0)
    model = models.shufflenet_v2_x0_5(num_classes=10)
    before = sum(parameter.numel() for parameter in model.parameters())
    sparsifier, small = pruned_and_shrunk(model, torch.randn(2, 3, 64, 64))
    # Blocks hand halves of their channels on, each with a part in several shuffles, in unequal numbers.
    assert set(dense_of(sparsifier).values()) == {
        "goes through a chunk of channels, whose 2 parts must keep equal sizes",
        "yields the model's output",
    }
    assert sum(parameter.numel() for parameter in small.parameters()) < 0.6 * before
