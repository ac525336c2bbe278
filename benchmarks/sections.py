"""The sections of `python -m benchmarks`: each measures one thing and returns a Table."""

import math
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from torch import nn

from benchmarks.memory import bytes_per_weight
from benchmarks.peers import (
    FasterAI,
    TorchPrune,
    fasterai_callback,
    fasterai_is_installed,
    kinds_of,
    layers_of,
)
from benchmarks.report import Table
from benchmarks.timing import copying, interleaved, milliseconds, ratio, seconds_of, threads
from sparsifai import Sparsifier

MISSING = "not installed"


def random_model(name, zeros=False):
    """A model of torchvision, the same random weights each time.

    zeros: whether its last layer is all zeros, as the heads of some models begin: the only layer of which, ranked
        globally, all weights but the one that must stay fall.
    """
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    head = layers_of(model)[-1].weight
    if zeros:
        nn.init.zeros_(head)
    elif not head.any():
        nn.init.normal_(head, std=0.02)
    return model


def move(model):
    "Change the weights a little, as training does, so that criteria that compare have something to compare"
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.add_(torch.randn_like(layer.weight), alpha=0.1 * float(layer.weight.std()))


def weights_of(model):
    "The weights of the layers that take part"
    return [layer.weight for layer in layers_of(model)]


# --- Updates of masks: build and scaling ---------------------------------------------------------------------------


def update_seconds(make_model, granularity, context, criteria, rounds, slow_rounds, peers):
    """Median seconds of a copy, of building masks, of building and applying them, and of the peers' updates.

    make_model: gives a fresh model, of which each library gets one. peers: which of them can do the same.
    """
    levels = [0.45 + 0.1 * number / rounds for number in range(rounds + 1)]
    model = make_model()
    sparsifier = Sparsifier(model, granularity, context, criteria, layers=kinds_of(model))
    move(model)
    sparsifier.sparsify(levels[0])
    # In this order: what is built alone is not kept, so that both rise from the level of the round before.
    cases = {
        "copy": copying(weights_of(model)),
        "build": lambda number: seconds_of(sparsifier._build_masks, levels[number + 1]),
        "update": lambda number: seconds_of(sparsifier.sparsify, levels[number + 1]),
    }
    if "FasterAI" in peers:
        cases["FasterAI"] = _fasterai_update(make_model(), granularity, context, criteria, levels)
    if "torch prune" in peers:
        cases["torch prune"] = _prune_update(make_model(), context, levels)
    return interleaved(cases, rounds, slow=("FasterAI", "torch prune"), slow_rounds=slow_rounds)


def _fasterai_update(model, granularity, context, criteria, levels):
    peer = FasterAI(model, granularity, context, criteria)
    move(model)
    peer.update(levels[0])
    return lambda number: seconds_of(peer.update, levels[number + 1])


def _prune_update(model, context, levels):
    move(model)
    peer = TorchPrune(model, context)

    def case(number):
        seconds = seconds_of(peer.update, levels[number + 1])
        peer.restore()
        return seconds

    return case


HEAD_OF_ZEROS = "global magnitude, head of zeros"


def build(quick):
    "Mask updates at a level that rises a little each time"
    axes = {
        "global magnitude": ("weight", "global", "large_final"),
        HEAD_OF_ZEROS: ("weight", "global", "large_final"),
        "local magnitude": ("weight", "local", "large_final"),
        "global movement": ("weight", "global", "movement"),
        "global filter": ("filter", "global", "large_final"),
        "global kernel": ("kernel", "global", "large_final"),
        "global channel": ("channel", "global", "large_final"),
    }
    rows = []
    with threads(1):
        for name in ("resnet18",) if quick else ("resnet18", "resnet50", "vit_b_16"):
            for case, (granularity, context, criteria) in axes.items():
                can = ["FasterAI"] if granularity == "weight" or "resnet" in name else []
                can += ["torch prune"] if (granularity, criteria) == ("weight", "large_final") else []
                can = [] if case == HEAD_OF_ZEROS else can  # whose ranking does not differ then
                peers = [peer for peer in can if peer != "FasterAI" or fasterai_is_installed()]
                seconds = update_seconds(
                    partial(random_model, name, zeros=case == HEAD_OF_ZEROS),
                    granularity,
                    context,
                    criteria,
                    rounds=7 if quick else 15,
                    slow_rounds=1 if quick else 3,
                    peers=peers,
                )
                rows.append({"model": name, "case": case, **_update_columns(seconds, can)})
    return Table(
        "build",
        "one mask update near 0.5, one thread",
        rows,
        "ms; `update` is build and apply; peers build and apply too. With filters, kernels and channels FasterAI masks "
        "convolutions only, sparsifai linear layers too, and with filters what stands behind them.",
    )


def _update_columns(seconds, can):
    columns = {"copy ms": milliseconds(seconds["copy"])}
    for name in ("build", "update"):
        columns |= {f"{name} ms": milliseconds(seconds[name]), f"{name} / copy": seconds[name] / seconds["copy"]}
    for peer in ("FasterAI", "torch prune"):
        taken = seconds.get(peer)
        columns[f"{peer} ms"] = MISSING if peer in can and taken is None else milliseconds(taken)
        columns[f"{peer} / copy"] = ratio(taken, seconds["copy"])
        columns[f"{peer} / update"] = ratio(taken, seconds["update"])
    return columns


SIZES = (2**20, 2**22, 2**24, 2**26, 250_000_000)


def side_of_layers(weights):
    "Of four square layers that have about so many weights"
    return round(math.sqrt(weights / 4))


def layers_with(weights):
    "A model of four linear layers with about so many weights"
    side = side_of_layers(weights)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(4)))


def scaling(quick):
    "A global magnitude update of models from a million weights to 250 million"
    rows = []
    with threads(1):
        for asked_for in SIZES[:3] if quick else SIZES:
            # Peers take minutes on the largest ones.
            can = ["FasterAI", "torch prune"] if asked_for <= 2**24 else []
            peers = [peer for peer in can if peer != "FasterAI" or fasterai_is_installed()]
            seconds = update_seconds(
                partial(layers_with, asked_for),
                "weight",
                "global",
                "large_final",
                rounds=7 if quick or asked_for > 2**24 else 15,
                slow_rounds=1 if quick else 3,
                peers=peers,
            )
            weights = 4 * side_of_layers(asked_for) ** 2
            rows.append({"weights": weights, **_per_weight(seconds, weights, can)})
    return Table("scaling", "global magnitude update near 0.5, one thread", rows, "ns per weight.")


def _per_weight(seconds, weights, can):
    columns = {"copy ns": 1e9 * seconds["copy"] / weights}
    for name in ("build", "update"):
        columns |= {f"{name} ns": 1e9 * seconds[name] / weights, f"{name} / copy": seconds[name] / seconds["copy"]}
    for peer in ("FasterAI", "torch prune"):
        taken = seconds.get(peer)
        columns[f"{peer} ns"] = 1e9 * taken / weights if taken else MISSING if peer in can else None
    return columns


# --- Applying masks ------------------------------------------------------------------------------------------------


def apply(quick):
    "Masks that are there already, applied to weights and gradients"
    rounds = 10 if quick else 60
    model = random_model("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    sparsifier = Sparsifier(model, layers=kinds_of(model))
    sparsifier.sparsify(0.5)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    # The step comes first: gradients are there for what follows, and all weights have been touched.
    cases = {
        "step": lambda number: seconds_of(step),
        "copy": copying(weights_of(model)),
        "sparsifai apply_masks": lambda number: seconds_of(sparsifier.apply_masks),
        "sparsifai mask_gradients": lambda number: seconds_of(sparsifier.mask_gradients),
        "FasterAI _apply_masks": None,
    }
    if fasterai_is_installed():
        fasterai = FasterAI(random_model("resnet18"))
        fasterai.update(0.5)
        cases["FasterAI _apply_masks"] = lambda number: seconds_of(fasterai.apply)
    prune = TorchPrune(random_model("resnet18"))
    prune.update(0.5)
    cases["torch prune, hooks of a forward"] = lambda number: seconds_of(prune.apply)
    seconds = interleaved(cases, rounds)
    rows = [
        {
            "case": name,
            "ms": milliseconds(seconds[name]) if name in seconds else MISSING,
            "/ copy": ratio(seconds.get(name), seconds["copy"]),
            "/ step": ratio(seconds.get(name), seconds["step"]),
        }
        for name in cases
    ]
    return Table(
        "apply",
        f"resnet18 at 0.5, batch 16 of 64 px, SGD, threads: {torch.get_num_threads()}",
        rows,
        "`step` is dense.",
    )


# --- Training steps ------------------------------------------------------------------------------------------------


def learner(optimizer, batches):
    "A Learner on random images, each item of its data a whole batch"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    several = [(torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))) for _ in range(batches)]
    dls = DataLoaders(DataLoader(several, bs=None), DataLoader(several[:1], bs=None), device=torch.device("cpu"))
    return Learner(dls, random_model("resnet18"), loss_func=nn.CrossEntropyLoss(), opt_func=optimizer)


def seconds_of_batches(learn, callbacks):
    "Seconds of the batches of one fit, without the first two, in which things are made"
    from fastai.callback.core import Callback

    class Starts(Callback):
        order = -100  # the first to be called: from one start to the next is all of a batch
        run_valid = False
        times = ()

        def before_batch(self):
            self.times = (*self.times, time.perf_counter())

    starts = Starts()
    with learn.no_bar(), learn.no_logging(), redirect_stdout(StringIO()):
        learn.fit(1, cbs=[starts, *callbacks], reset_opt=False)
    return list(np.diff(starts.times)[2:])


def step(quick):
    "What sparsity costs in a Learner"
    from fastai.optimizer import SGD, OptimWrapper

    optimizers = {
        "SGD, fastai's": partial(SGD, mom=0.9),
        "AdamW, torch's": partial(OptimWrapper, opt=torch.optim.AdamW),
    }
    rounds, batches = (3, 6) if quick else (8, 12)
    rows = []
    for name, optimizer in optimizers.items():
        variants = _step_variants(rounds)
        learners = {variant: learner(optimizer, batches) for variant in variants}
        seconds = {variant: [] for variant in variants}
        for number in range(rounds):
            for variant, callbacks in variants.items():
                seconds[variant] += seconds_of_batches(learners[variant], callbacks(number))
        middle = {variant: median(several) for variant, several in seconds.items()}
        for target in ("moving", "fixed"):
            rows.append({"optimizer": name, "target": target, **_step_columns(middle, target)})
    return Table(
        "step",
        f"a fastai Learner on resnet18, batch 16 of 64 px, global magnitude, threads: {torch.get_num_threads()}",
        rows,
        "ms per batch. `moving`: the masks are updated in every batch, on the way from 0 to 0.9; `fixed`: at 0.9.",
    )


def _step_variants(rounds):
    """From names to functions that give the callbacks for the fit of a round.

    The fits together are one linear schedule, and each moves the target through its part of it, for in a short fit
    from 0 to the target the updates would be far larger than in training.
    """
    from sparsifai.callback import SparsifyCallback

    # One callback for all fits goes on where it was, as in one long fit.
    moving, fixed = SparsifyCallback(0.9, schedule="lin"), SparsifyCallback(0.9, schedule="one_shot")

    def moved(number):
        moving.schedule = lambda t: (number + t) / rounds
        return [moving]

    variants = {"dense": lambda number: [], "sparsifai moving": moved, "sparsifai fixed": lambda number: [fixed]}
    if fasterai_is_installed():
        variants["FasterAI moving"] = lambda number: [fasterai_callback(0.9, number / rounds, (number + 1) / rounds)]
        variants["FasterAI fixed"] = lambda number: [fasterai_callback(0.9, 0, 1, one_shot=True)]
    return variants


def _step_columns(seconds, target):
    columns = {"dense ms": milliseconds(seconds["dense"])}
    for library in ("sparsifai", "FasterAI"):
        taken = seconds.get(f"{library} {target}")
        columns[f"{library} ms"] = MISSING if taken is None else milliseconds(taken)
        columns[f"{library} / dense"] = ratio(taken, seconds["dense"])
    return columns


# --- Memory --------------------------------------------------------------------------------------------------------


def memory(quick):
    "Bytes per weight beyond those of the dense model"
    if not Path("/proc/self/clear_refs").exists():
        return Table("memory", "needs Linux, which counts the peak")
    cases = {
        "global magnitude": ("global", "large_final", "weight"),
        "local magnitude": ("local", "large_final", "weight"),
        "global movement": ("global", "movement", "weight"),
        "global filter": ("global", "large_final", "filter"),
    }
    if quick:
        cases = {"global magnitude": cases["global magnitude"]}
    rows = []
    for model in ("resnet18",) if quick else ("resnet18", "resnet50"):
        for case, (context, criteria, granularity) in cases.items():
            columns = {}
            for library in ("sparsifai", "FasterAI", "torch prune"):
                if library == "torch prune" and (criteria, granularity) != ("large_final", "weight"):
                    peak, kept = None, None
                elif library == "FasterAI" and not fasterai_is_installed():
                    peak, kept = MISSING, MISSING
                else:
                    peak, kept = bytes_per_weight(library, model, context, criteria, granularity)
                columns |= {f"{library} peak": peak, f"{library} kept": kept}
            rows.append({"model": model, "case": case, **columns})
    return Table(
        "memory",
        "bytes per weight beyond the dense model, at the peak of an update near 0.5 and after it",
        rows,
        "Counted by the system, each in a fresh process. What movement compares with, 4 bytes, is among them.",
    )


# --- Exactness -----------------------------------------------------------------------------------------------------

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


SECTIONS = {
    "build": build,
    "apply": apply,
    "step": step,
    "memory": memory,
    "exactness": exactness,
    "scaling": scaling,
}
