"""Masks stay what they were, bit for bit: a stored hash for every case of a table over all axes and options.

`python tests/test_mask_hashes.py` writes mask_hashes.json anew. Do that only where masks are meant to change, and say
in the CHANGELOG which and why.

The hashes are the same on every machine and with every version of torch. So weights come from whole numbers of numpy's
legacy RandomState, divided by powers of two, gradients and activations are computed in float64 from small whole
numbers, and no sum is rounded. What draws from torch's generators ('random', as criterion or as regrowth) is left
out, for torch does not promise the same numbers in every version: `drawn` below stands for it, and shows as well in
what order layers are scored. Criteria are not run behind norm layers, whose roots are rounded.
"""

import hashlib
import itertools
import json
import math
import warnings
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparsifai import Sparsifier, block, blocks, bounded, granularities

FILE = Path(__file__).with_suffix("").with_name("mask_hashes.json")


@cache
def numbers(seed, shape, low, high):
    """Whole numbers from low to high, high included, as float64."""
    return torch.from_numpy(
        np.random.RandomState(seed).randint(low, high + 1, size=tuple(shape), dtype=np.int64)
    ).double()


# Values of weights, which every dtype can hold; bfloat16 and float16 round none.
KINDS = {
    "many values": lambda seed, shape: numbers(seed, shape, -255, 255) / 64,
    "many ties": lambda seed, shape: numbers(seed, shape, -3, 3) / 4,
    "mostly zero": lambda seed, shape: numbers(seed, shape, -255, 255).clamp(min=192) - 192,
    "one value": lambda seed, shape: torch.full(tuple(shape), 0.5, dtype=torch.float64),
    "two signs": lambda seed, shape: numbers(seed, shape, 0, 1) * 2 - 1,
    "infinite": lambda seed, shape: numbers(seed, shape, -9, 9).masked_fill(numbers(seed, shape, -9, 9) > 5, math.inf),
    "small": lambda seed, shape: numbers(seed, shape, -1, 1),
    "denormal in float16": lambda seed, shape: numbers(seed, shape, -255, 255) * 2.0**-24,
}
LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.to(memory_format=torch.channels_last),
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda weight: torch.stack([weight, weight], 4)[..., 0],
}


def filled(make, kind="many values", dtype="float32", layout="contiguous"):
    """A model with weights of a kind: each parameter, tied ones once, has numbers of its own."""
    model = make()
    for seed, parameter in enumerate(model.parameters()):
        value = KINDS[kind](seed, parameter.shape).to(getattr(torch, dtype))
        parameter.data = LAYOUTS[layout](value).clone() if value.dim() == 4 else value.clone()
    return model


def convolutions():
    """Plain, grouped, depthwise and transposed convolutions and matrices, sizes that tiles and blocks do not divide."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, (3, 2), groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.ConvTranspose2d(8, 6, (2, 3), groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 9, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(9, 11), nn.ReLU(), nn.Linear(11, 4),
    )  # fmt: skip


def plain():
    """Convolutions and matrices of more weights."""
    return nn.Sequential(nn.Conv2d(20, 18, 3, bias=False), nn.Conv2d(18, 9, 5, bias=False), nn.Linear(9, 7))


def matrices():
    return nn.Sequential(nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 18), nn.ReLU(), nn.Linear(18, 6))


def computing():
    """What runs on small whole numbers and gives such: no norm, no mean."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 2), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 7),
        nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Layers whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 6, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.last((x + self.second(x.relu()) + self.third(x)).relu())


class Tied(nn.Module):
    """Two layers that share one matrix, and a decoder that shares that of an embedding."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.embedding, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.second.weight, self.decoder.weight = self.first.weight, self.embedding.weight

    def forward(self, x):
        return self.last(self.second(self.first(self.embedding(x)).relu()).relu())


class Others(nn.Module):
    """The other kinds of layers."""

    def __init__(self):
        super().__init__()
        self.narrow, self.deep = nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(2, 5, (1, 2, 3))
        self.one, self.three = nn.ConvTranspose1d(6, 8, 3, groups=2), nn.ConvTranspose3d(3, 4, 2)
        self.attention, self.apart = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.lstm, self.gru, self.cell = nn.LSTM(5, 6, 2), nn.GRU(4, 3, bidirectional=True), nn.RNNCell(4, 6)
        self.bilinear, self.embedding = nn.Bilinear(3, 4, 5), nn.Embedding(7, 6)


LEVELS = (0.3, 0.8, 0.95, 0.4)
# Of contexts that refuse more.
LEVELS_OF = {
    "2:4": (0.3, 0.5, 0.25),
    "3:4": (0.1, 0.25, 0.0),
    "uniform_plus": (0.25, 0.5, 0.4),
    "bounded": (0.25, 0.5, 0.4),
}


class Drawn:
    """A criterion of other numbers at each call, as a generator gives them."""

    __name__ = "drawn"

    def __init__(self):
        self.calls = 0

    def __call__(self, weight):
        self.calls += 1
        return numbers(self.calls, weight.shape, 0, 999).float()


# --- What is done with a Sparsifier: yields its masks after each update --------------------------


def masks_of(sparsifier):
    return dict(sparsifier.all_masks)


def sparsified(*levels, **options):
    """Ask for one level after the other."""

    def steps(sparsifier):
        for level in levels:
            sparsifier.sparsify(level, **options)
            yield masks_of(sparsifier)

    return steps


@torch.no_grad()
def moved(sparsifier, seed):
    """Change all weights by whole numbers, as an optimizer may, masked ones too."""
    for number, target in enumerate(each for each in sparsifier.layers.values() if each.is_selected):
        parameter = target.parameter
        parameter.add_((numbers(100 * seed + number, parameter.shape, -40, 40) / 32).to(parameter.dtype))


def trained(*levels):
    """Change the weights before every update, the last of which falls."""

    def steps(sparsifier):
        for seed, level in enumerate(levels):
            moved(sparsifier, seed + 1)
            sparsifier.sparsify(level)
            yield masks_of(sparsifier)

    return steps


def batches():
    """Two of inputs whose mean squares per channel are exact squares, with coefficients of the loss."""
    inputs = [
        (numbers(seed, (4, 2, 5, 5), 0, 1) * 2 - 1) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1) for seed in (1, 2)
    ]
    return [(values, numbers(seed, (4, 3), -2, 2)) for seed, values in enumerate(inputs)]


def quadratic(output, coefficients):
    return (coefficients * output).sum() / 4 + output.square().sum() / 64


def calibrated(*levels, **options):
    def steps(sparsifier):
        for level in levels:
            sparsifier.calibrate(batches(), quadratic)
            sparsifier.sparsify(level, **options)
            yield masks_of(sparsifier)

    return steps


def shown_gradients(sparsifier, seed):
    for number, target in enumerate(each for each in sparsifier.layers.values() if each.is_selected):
        parameter = target.parameter
        parameter.grad = (numbers(1000 * seed + number, parameter.shape, -50, 50) / 16).to(parameter.dtype)
    sparsifier.collect_gradients()


def regrown(sparsifier):
    """Rise, then drop and regrow at one level, weights and gradients changing."""
    for seed, (level, drop) in enumerate([(0.3, 0), (0.6, 0.3), (0.6, 0.1), (0.8, 0.5), (0.5, 0.2)]):
        moved(sparsifier, seed + 1)
        shown_gradients(sparsifier, seed + 1)
        sparsifier.sparsify(level, drop=drop)
        yield masks_of(sparsifier)


def updated(sparsifier):
    """As training does, by update_masks, with an optimizer."""
    optimizer = torch.optim.SGD(sparsifier.model.parameters(), lr=0.5, momentum=0.5)
    for seed, level in enumerate((0.2, 0.45, 0.7)):
        shown_gradients_of_all(sparsifier, seed)
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
        sparsifier.update_masks(level, optimizer)
        yield masks_of(sparsifier)


def shown_gradients_of_all(sparsifier, seed):
    for number, parameter in enumerate(sparsifier.model.parameters()):
        parameter.grad = (numbers(1000 * seed + number, parameter.shape, -50, 50) / 16).to(parameter.dtype)


def restored(sparsifier):
    """Saved and loaded on the way, and recovered from the zeros."""
    sparsifier.sparsify(0.4)
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in sparsifier.state_dict().items()}
    sparsifier.sparsify(0.8)
    yield masks_of(sparsifier)
    sparsifier.load_state_dict(state)
    yield masks_of(sparsifier)
    sparsifier.check(0.9)
    sparsifier.recover_masks()
    yield masks_of(sparsifier)
    sparsifier.sparsify(0.6)
    yield masks_of(sparsifier)


def halved_square(weight):
    return weight.square() / 2


def spread_of(grouping, scores):
    """An own pooling."""
    members = grouping.members(scores)
    return members.amax(1) - members.amin(1)


# --- The table ------------------------------------------------------------------------------------------------------

# Joint granularities make groups of weights of several layers, which these nets do not have.
ALONE = [name for name, each in granularities.items() if not getattr(each, "joint", False)]
GRANULARITIES = {name: name for name in ALONE} | {"4x4": "4x4", "3x2": block(3, 2), "(h, out)": ("h", "out")}
CONTEXTS = {
    **{name: name for name in ("local", "global", "erk", "er", "lamp", "uniform_plus", "per_output", "2:4")},
    "blocks(3)": blocks(3),
    "bounded": bounded("global", {"0": 0.25, "3": (0.1, 0.6)}),
}
BLOCKS = {"blocks(4)": blocks(4), "blocks(16)": blocks(16), "blocks(3) of outputs": blocks(3, "out")}
BLOCKS |= {name: name for name in ("1:4", "3:4", "4:8", "2:16")}
POOLINGS = {name: name for name in ("mean", "sum", "max", "l2")} | {"own": spread_of}
OF_WEIGHTS = ("large_final", "small_final", "squared_final", "normalized_final", "lamp")
OF_CHANGES = (
    "large_init", "small_init", "large_init_large_final", "small_init_small_final", "magnitude_increase", "movement",
    "movmag", "updating_magnitude_increase", "updating_movement", "updating_movmag",
)  # fmt: skip
OF_DATA = ("grad", "snip", "grasp", "taylor", "fisher", "movement_pruning", "wanda")
# Their scores are roots and quotients, whose sums over a group depend on the order of adding.
ROUNDED = ("normalized_final", "lamp", "wanda")
WITHOUT_CHILDREN = [name for name, module in Others().named_modules() if not list(module.children())]


def cases():
    """Yields what a case is called, the model, what is done, and the arguments of the Sparsifier."""
    both = ("global", "local")
    for how, where in product(GRANULARITIES, CONTEXTS):
        axes = {"granularity": GRANULARITIES[how], "context": CONTEXTS[where]}
        yield ("axes", how, where), (convolutions,), sparsified(*LEVELS_OF.get(where, LEVELS)), axes
    for what, how, where in product(OF_WEIGHTS, ("weight", "row", "filter", "4x4"), both):
        if what in ROUNDED and how != "weight":
            continue
        axes = {"granularity": how, "context": where, "criteria": what}
        yield ("criteria", what, how, where), (convolutions, "many ties"), sparsified(0.3, 0.7, 0.5), axes
    for kind, dtype, where in product(KINDS, ("float32", "float64", "float16", "bfloat16"), (*both, "2:4")):
        levels = LEVELS_OF.get(where, (0.00004, 0.50001, 0.9, 1.0, 0.2))
        yield ("dtypes", kind, dtype, where), (plain, kind, dtype), sparsified(*levels), {"context": where}
    for layout, how, where in product(LAYOUTS, ("weight", "kernel", "filter", "row", "3x2"), ("global", "erk")):
        axes = {"granularity": how, "context": where, "layers": ["0", "1"]}
        yield ("layouts", layout, how, where), (plain, "many ties", "float32", layout), sparsified(0.3, 0.6), axes
    for where, kind, how in product(BLOCKS, ("many values", "many ties"), ("weight", "kernel")):
        levels = (
            (0.2, 0.75, 0.5) if where in ("1:4", "2:16") else LEVELS_OF["3:4"] if where == "3:4" else LEVELS_OF["2:4"]
        )
        axes = {"granularity": how, "context": BLOCKS[where]}
        yield ("blocks", where, kind, how), (convolutions, kind), sparsified(*levels), axes
    for pool, how, what in product(POOLINGS, ("filter", "kernel", "3x2", "shared_row"), ("large_final", "small_final")):
        axes = {"granularity": how, "criteria": what, "pool": POOLINGS[pool]}
        yield ("pool", pool, how, what), (convolutions,), sparsified(0.3, 0.7), axes
    for number, how, where in product((2, 3), ("filter", "channel", "column"), both):
        axes = {"granularity": how, "context": where, "round_to": number}
        yield ("round_to", number, how, where), (matrices,), sparsified(0.3, 0.6, 0.2), axes
    for where, number in product((*both, "erk"), (None, 2)) if find_spec("torch_pruning") else ():
        axes = {"context": where, "coupled": True, "round_to": number, "example_input": torch.ones(1, 3, 6, 6)}
        yield ("coupled", where, number), (Residual,), sparsified(0.3, 0.7), {"granularity": "filter", **axes}
    for how, where in product(("weight", "filter", "layer"), both):
        axes = {"granularity": how, "context": where, "may_empty": True}
        yield ("may_empty", how, where), (matrices,), sparsified(0.5, 0.95, 1.0), axes
    for how, where in product(("weight", "row", "column", "filter", "channel", "2x3"), both):
        axes = {"granularity": how, "context": where}
        yield ("tied", how, where), (Tied,), sparsified(0.3, 0.7), axes
    for how, where in product(("weight", "kernel", "column", "channel", "2x3"), both):
        axes = {"granularity": how, "context": where, "layers": WITHOUT_CHILDREN}
        yield ("other layers", how, where), (Others, "many ties"), sparsified(0.3, 0.7), axes
    yield ("other layers, by default",), (Others,), sparsified(0.3, 0.7), {}
    for what, how, where in product(OF_CHANGES, ("weight", "filter"), both):
        axes = {"granularity": how, "context": where, "criteria": what}
        yield ("training", what, how, where), (convolutions,), trained(0.25, 0.5, 0.8, 0.4), axes
    for what, dtype in product(("movement", "updating_movmag"), ("float64", "float16", "bfloat16")):
        yield ("training", what, dtype), (plain, "many values", dtype), trained(0.3, 0.7), {"criteria": what}
    for what, where in product((Drawn, halved_square), both):
        yield (
            ("own criterion", what.__name__, where),
            (matrices,),
            trained(0.3, 0.7),
            {"context": where, "criteria": what},
        )
    small = (computing, "small", "float64")
    for what, how in product(OF_DATA, ("weight", "filter", "kernel")):
        if what in ROUNDED and how != "weight":
            continue
        for where in (*both, "per_output"):
            axes = {"granularity": how, "context": where, "criteria": what}
            if (how, where) != ("filter", "per_output"):
                yield ("data", what, how, where), small, calibrated(0.3, 0.6, 0.9), axes
        yield ("data, in steps", what, how), small, calibrated(0.3, 0.85, steps=3), axes | {"context": "global"}
    for how, steps in product(("weight", "filter", "kernel"), (1, 7)):
        axes = {"granularity": how, "criteria": "synflow", "example_input": torch.ones(1, 2, 5, 5, dtype=torch.float64)}
        yield ("synflow", how, f"{steps} steps"), small, sparsified(0.5, 0.93, steps=steps), axes
    for where in (*both, "erk"):
        axes = {"context": where}
        yield ("steps", where), (convolutions,), sparsified(0.3, 0.83, steps=5), axes
        scopes = {"0": 0.3, "3": 0.6}, {"*": 0.7, "1[0-9]": 0.9}, {"5": 0.8}
        yield ("patterns", where), (convolutions,), sparsified(*scopes), axes
        yield ("patterns, in steps", where), (matrices,), sparsified({"0": 0.3, "*": 0.6}, steps=3), axes
    for back, how, where in product(
        ("grad", "large_init", Drawn), ("weight", "kernel"), (*both, "erk", "lamp", "blocks(4)")
    ):
        axes = {"granularity": how, "context": BLOCKS.get(where, where), "regrow": back}
        yield ("regrow", getattr(back, "__name__", back), how, where), (convolutions,), regrown, axes
    for where in both:
        yield ("update_masks", where), (matrices,), updated, {"context": where, "criteria": "movement"}
        yield ("restored", where), (convolutions, "many ties"), restored, {"context": where}
    selected = {"layers": [nn.Conv2d, "12", "14"], "exclude": "3", "granularity": "filter"}
    yield ("layers and exclude",), (convolutions,), sparsified(0.5), selected


def hash_of(model, steps, arguments):
    """The first 16 digits of the SHA-256 of all masks that a case gives, with their names, in the order of the report.

    'refused' if the arguments are.
    """
    digest, arguments = (
        hashlib.sha256(),
        {key: Drawn() if value is Drawn else value for key, value in arguments.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            updates = steps(Sparsifier(filled(*model), **arguments))
            first = next(updates)
        except ValueError:
            return "refused"
        for masks in itertools.chain([first], updates):
            for name, mask in masks.items():
                digest.update(f"{name} {tuple(mask.shape)} {mask.dtype}".encode())
                digest.update(mask.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def hashes():
    """Name of a case -> its hash."""
    return {", ".join(map(str, name)): hash_of(*case) for name, *case in cases()}


def test_masks_are_bit_for_bit_those_that_are_stored():
    found, stored = hashes(), json.loads(FILE.read_text())
    if find_spec("torch_pruning") is None:
        stored = {name: value for name, value in stored.items() if not name.startswith("coupled")}
    assert list(found) == list(stored)
    changed = [name for name in found if found[name] != stored[name]]
    assert not changed, f"{len(changed)} of {len(stored)} cases have other masks"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps(hashes(), indent=0) + "\n")
