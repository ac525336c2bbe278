import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small_net():
    """Convolution, grouped and depthwise convolution, norm and linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, (3, 2), groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def make_learner():
    """A Learner on made-up data that trains a few steps in no time: make_learner(model, steps per epoch)."""
    pytest.importorskip("fastai", reason="fastai callbacks need fastai")
    from fastai.vision.all import SGD, DataLoader, DataLoaders, Learner

    def make(model=None, steps=4, opt_func=SGD, shape=(2, 8, 8), classes=3, **options):
        torch.manual_seed(1)
        pairs = [(torch.randn(*shape), torch.tensor(number % classes)) for number in range(2 * steps)]
        dls = DataLoaders(DataLoader(pairs, bs=2), DataLoader(pairs[:4], bs=2), device="cpu")
        learn = Learner(
            dls, small_net() if model is None else model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, **options
        )
        learn.create_mbar = False
        return learn

    return make
