import math
import os
import pickletools
import random
import re
import zipfile

import numpy as np
import pytest
import torch
from terminal import Terminal
from torch import nn

from sparsifai import contexts, criteria, distillation_losses, granularities, quantities, schedules
from sparsifai.axes.criterion import quantities_of
from sparsifai.sparsifier.mask_building import Ranking

# The nets are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def closing_figures():
    """The figures that a test draws are closed after it."""
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.fixture
def registering():
    """What a test registers is forgotten after it."""
    registries = (granularities, contexts, criteria, schedules, quantities, distillation_losses)
    before = [dict(registry) for registry in registries]
    yield
    for registry, functions in zip(registries, before, strict=True):
        registry._functions.clear()
        registry._functions.update(functions)


# Those that work on every net. Joint groups, such as attention heads, are only in nets that have such modules; and what
# runs batches whenever weights are pruned has tests of its own.
GRANULARITIES = [name for name, each in granularities.items() if not getattr(each, "joint", False)]
CRITERIA = [name for name, each in criteria.items() if not {"gate_grad", "inverse_curvature"} & {*quantities_of(each)}]

# The nets of some tests are so small, or so often tied, that users would be warned.
misses_sparsity = pytest.mark.filterwarnings("ignore:the sparsity that was asked for cannot be reached")
has_ties = pytest.mark.filterwarnings("ignore:[0-9]+ scores of .* are equal")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def open_terminal(monkeypatch):
    """Called in the test itself, because pytest replaces stdout between the fixtures and the test."""
    opened = []

    def open_terminal():
        opened.append(Terminal(monkeypatch))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.stdout.close()
        os.close(each.master)


def process_state():
    """What code can change for the whole process, or leave behind in its thread, beside random generators."""
    return {
        "nn.Module": dict(vars(nn.Module)),
        "torch.Tensor": dict(vars(torch.Tensor)),
        "math": dict(vars(math)),
        "hooks of all modules": [
            len(hooks) for name, hooks in sorted(vars(nn.modules.module).items()) if "_hooks" in name
        ],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "modes of torch functions": torch._C._len_torch_function_stack(),
        "modes of operators": torch._C._len_torch_dispatch_stack(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }


PROCESS_AT_START = process_state()


def changed_in_process(before=PROCESS_AT_START):
    """Names of what is no longer as it was, for methods with their names."""
    now, changed = process_state(), []
    for part, value in before.items():
        if isinstance(value, dict):  # fastai adds methods of its own; torch.compile replaces two for good when imported
            changed += [f"{part}.{name}" for name, each in value.items() if not _is_same(each, now[part].get(name))]
        elif now[part] != value:
            changed.append(part)
    return changed


def _is_same(before, now):
    return now is before or (getattr(now, "__module__", None) or "").startswith("torch._dynamo")


@pytest.fixture(autouse=True)
def unchanged_process():
    """Every test leaves nn.Module, torch.Tensor, math and the modes of torch as they were."""
    yield
    changed = changed_in_process()
    torch.set_grad_enabled(True)  # the tests that follow are not to fail, too
    assert changed == []


def random_state():
    """The states of the random generators of torch, numpy and Python, to be compared with ==."""
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2:], random.getstate()


@pytest.fixture
def unchanged_random():
    """A test that asks for it draws no random number that others miss."""
    before = random_state()
    yield
    assert random_state() == before


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


# What synflow needs of an input is its shape.
EXAMPLE = torch.zeros(2, 2, 8, 8)


def show_data(sparsifier, seed=0):
    """Give a criterion that looks at data some; the others see nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(4, 2, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)
    if sparsifier.collected.at("forward", "loss", "backward"):
        sparsifier.calibrate([batch], nn.functional.cross_entropy)


def small_learner(model=None, steps=4, opt_func=None, shape=(2, 8, 8), classes=3, **options):
    """A Learner on made-up data that trains a few steps in no time. steps: per epoch."""
    from fastai.vision.all import SGD, DataLoader, DataLoaders, Learner

    torch.manual_seed(1)
    pairs = [(torch.randn(*shape), torch.tensor(number % classes)) for number in range(2 * steps)]
    dls = DataLoaders(DataLoader(pairs, bs=2), DataLoader(pairs[:4], bs=2), device="cpu")
    model = small_net() if model is None else model
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func or SGD, **options)
    learn.create_mbar = False
    return learn


def picture(number):
    """A made-up picture, 8 x 8."""
    return np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)


def letter(number):
    return "abc"[number % 3]


def picture_learner(callbacks=None, **options):
    """A Learner whose data were made by a DataBlock, so that it can predict, show and be exported."""
    from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, IndexSplitter, Learner
    from fastai.vision.all import accuracy as metric

    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=letter, splitter=IndexSplitter(range(16, 24)))
    torch.manual_seed(0)
    dls = block.dataloaders(range(24), bs=8, num_workers=0, device="cpu")
    model = nn.Sequential(nn.Conv2d(3, 2, 1), *small_net())
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=metric, cbs=callbacks, **options)
    learn.create_mbar = False
    return learn


@pytest.fixture
def make_learner():
    pytest.importorskip("fastai", reason="fastai callbacks need fastai")
    return small_learner


def packages_of(file):
    """The packages whose names stand in an exported Learner, by itself or before a dot: not the paths of code files."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        texts = [argument for _, argument, _ in pickletools.genops(archive.read(pickled)) if isinstance(argument, str)]
    return {re.split(r"[. ]", text)[0] for text in texts}


class OnDevice(Ranking):
    """Ranks scores where the weights are."""

    def stays_on_device(self, layers):
        return True


def as_on_device(sparsifier):
    """Have a Sparsifier on the CPU do what it does on a GPU."""
    sparsifier.ranking = OnDevice(**vars(sparsifier.ranking))
    return sparsifier


def without_values(sparsifier):
    """Move the model of a Sparsifier and its masks to torch's meta device: to read a value there is an error."""
    sparsifier.model.to("meta")
    for layer in sparsifier.layers.values():
        layer.mask = layer.mask.to("meta")
    return as_on_device(sparsifier)


def layers_of(sparsifier):
    """The named weights of the layers that are pruned."""
    return {name: layer.weight for name, layer in sparsifier.layers.items() if layer.is_selected}


def dense_of(sparsifier):
    """Why the other layers stay dense."""
    return {name: layer.why_dense for name, layer in sparsifier.layers.items() if not layer.is_selected}


def masked_of(sparsifier):
    """Every parameter that has a mask, and its mask."""
    return [(sparsifier.model.get_parameter(name), mask) for name, mask in sparsifier.all_masks.items()]


def follower_masks(sparsifier):
    """Parameter name -> mask of what is masked with whole outputs."""
    return {name: mask for name, mask in sparsifier.all_masks.items() if name not in sparsifier.layers}


def followers_of(sparsifier):
    """Parameters that are masked with whole outputs -> the layers that have these outputs."""
    return {follower.name: tuple(follower.producers) for follower in sparsifier.all_masks.followers}


def levels_of(sparsifier):
    """The sparsity that each layer was last pruned to."""
    return {name: layer.level for name, layer in sparsifier.layers.items() if layer.is_selected}
