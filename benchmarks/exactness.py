"""Section `exactness`: how many weights fall, and which, beside a stable sort and beside other libraries."""

import math
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.models import MISSING
from benchmarks.peers import FasterAI, TorchPrune, fasterai_is_installed, kinds_of
from benchmarks.report import Table
from benchmarks.timing import threads
from sparsifai import Sparsifier

LEVELS = (0.1, 1 / 3, 0.5, 0.9, 0.98765)


def tie_cases(count):
    "Weights by name: values that are all different, and values that are not"
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=random, dtype=torch.float64)
    return {
        "normal": normal,
        "many ties": torch.round(2 * normal) + 10,
        "all equal": torch.full((count,), 0.5, dtype=torch.float64),
        "60 % zeros": normal * (torch.rand(count, generator=random) > 0.6),
    }


def model_of(values, kind):
    "Three linear layers of odd sizes"
    sizes = [(301, 101), (7, 43), (99, 513)]
    model = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in sizes)).to(kind)
    with torch.no_grad():
        for layer, part in zip(model, values.split([math.prod(size) for size in sizes]), strict=True):
            layer.weight.copy_(part.view_as(layer.weight))
    return model


def expected_masks(model, level, context):
    """By definition: in a stable sort of the magnitudes the first round-half-up(level * weights) fall.

    But the best weight of every layer, the last of equals, is not among those that fall.
    """
    magnitudes = [layer.weight.detach().double().abs().flatten().numpy() for layer in model]
    scopes = [magnitudes] if context == "global" else [[each] for each in magnitudes]
    masks = []
    for scope in scopes:
        stays = [len(each) - 1 - int(np.argmax(each[::-1])) for each in scope]
        starts = np.cumsum([0, *map(len, scope)])[:-1]
        order = np.argsort(np.concatenate(scope), kind="stable")
        order = order[~np.isin(order, starts + stays)]
        kept = np.ones(sum(map(len, scope)), bool)
        kept[order[: math.floor(level * len(kept) + 0.5)]] = False
        masks += np.split(kept, starts[1:])
    return masks


def exactness(quick):
    "Whether as many weights fall as were asked for, and the right ones"
    count = 301 * 101 + 7 * 43 + 99 * 513
    rows = []
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    with threads(1):  # so small, the models gain nothing by more
        for kind in kinds[:2] if quick else kinds:
            for name, values in tie_cases(count).items():
                for context in ("global", "local"):
                    what = {"type": str(kind).removeprefix("torch."), "weights": name, "context": context}
                    rows.append({**what, **_exactness_columns(partial(model_of, values, kind), context)})
    return Table(
        "exactness",
        f"{count} weights in three layers, sparsities {', '.join(f'{level:.4g}' for level in LEVELS)}",
        rows,
        "`error`: the largest difference between the number of masked weights and round-half-up(s * N); "
        "`mask`: whether all masks are those of a stable argsort.",
    )


def _exactness_columns(make_model, context):
    errors, equal = [], True
    for level in LEVELS:
        model = make_model()
        expected = expected_masks(model, level, context)
        sparsifier = Sparsifier(model, context=context, layers=kinds_of(model))
        sparsifier.sparsify(level)
        masks = [mask.flatten().numpy() for mask in sparsifier.masks.values()]
        errors.append(sum(int((~mask).sum()) for mask in masks) - _asked_for(model, level, context))
        equal = equal and all(map(np.array_equal, masks, expected))
    columns = {"sparsifai error": max(map(abs, errors)), "mask": "equal" if equal else "DIFFERS"}
    columns["FasterAI error"] = _peer_error(FasterAI, make_model, context) if fasterai_is_installed() else MISSING
    columns["torch prune error"] = _peer_error(TorchPrune, make_model, context)
    return columns


def _asked_for(model, level, context):
    sizes = [layer.weight.numel() for layer in model]
    scopes = [sum(sizes)] if context == "global" else sizes
    return sum(math.floor(level * size + 0.5) for size in scopes)


def _peer_error(peer, make_model, context):
    errors = []
    for level in LEVELS:
        model = make_model()
        try:
            made = peer(model, context=context)
            made.update(level)
        except Exception as error:  # such as a type of numbers that it has no kernel for
            return f"fails: {type(error).__name__}"
        errors.append(abs(made.count() - _asked_for(model, level, context)))
    return max(errors)
