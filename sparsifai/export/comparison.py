"""What zeros buy: file, parameters, FLOPs and time of a model in each form that it can have, beside the dense one."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..model.flops import count_flops
from ..model.layers import find_weights
from ..model.parallel import unwrapped
from ..model.running import evaluating, run, untraced
from ..model.zeros import Count
from ..support.checks import check_count, check_is_module
from .comparison_table import Comparison, Form, caption
from .csr import CSRLinear, to_sparse_layout
from .two_four import semi_structured_layers, to_semi_structured

# Seconds that the timed runs take together, about, and how many rounds of them there are at least and at most.
SECONDS = 1.0


ROUNDS = (7, 200)


# Rounds before them, in which memory and threads are set up.
WARM_UP = 3


def compare(dense: nn.Module, sparse: nn.Module, example_input: Any, repeats: int | None = None) -> Comparison:
    """What each form of a sparse model stores, executes and takes, beside the dense model.

    The forms: 'dense'; 'masked', the sparse model as it is, stored by `save_sparse`; 'shrunk' by `shrink`;
    'semi-structured' by `to_semi_structured`; 'CSR' by `to_sparse_layout`. One that cannot be had has the reason in its
    note. example_input: a batch, a tuple of several positional inputs, a dictionary of named ones; FLOPs and times are
    of all of it. repeats: how often each form is timed, by default for about a second in all.
    Forms are run in turn, there and back, in evaluation mode and without gradients, after a warm-up; times are medians,
    and within the noise, which `~` marks, if the middle three quarters of their ratios to the dense model, round by
    round, have 1 among them. Of a wrapper (compiled, data parallel) what is in it is compared. The models are as before
    afterwards: modes, buffers, gradients; the random generators too.
    TypeError for what is no module, ValueError if one does not run on the example.
    """
    for name, model in (("dense", dense), ("sparse", sparse)):
        check_is_module("compare", name, model)
    if repeats is not None and check_count("repeats", repeats) < 3:
        raise ValueError(f"compare: repeats is at least 3, not {repeats}: of fewer runs nothing can be said")
    dense, sparse = unwrapped(dense), unwrapped(sparse)
    with ExitStack() as stack:
        for model in (dense, sparse):
            stack.enter_context(untraced(model))
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        flops = {name: _flops(name, model, example_input) for name, model in (("dense", dense), ("sparse", sparse))}
        models, forms = {"dense": dense, "masked": sparse}, [_form("dense", dense, flops["dense"])]
        masked = _form("masked", sparse, flops["sparse"])
        same = "as many FLOPs as dense" if masked.flops == forms[0].flops else "no FLOPs are saved by them"
        forms.append(_noted(masked, f"its zeros are multiplied with like any other weight: {same}"))
        for name, make in {"shrunk": _shrunk, "semi-structured": _semi_structured, "CSR": _csr}.items():
            made, note = _attempt(partial(make, sparse, masked, flops["sparse"], example_input))
            form = Form(name)
            if made is not None:
                models[name], form = made
            forms.append(_noted(form, note))
        runs = {name: partial(run, model, example_input) for name, model in models.items()}
        seconds = _take_turns(runs, repeats, _waiting(list(models.values())))
    return Comparison(tuple(_with_time(form, seconds) for form in forms), caption(seconds, dense))


def _flops(name: str, model: nn.Module, example: Any) -> dict[str, int]:
    """By weight. ValueError if the model does not run on the example."""
    try:
        return count_flops(model, find_weights(model), example)
    except ValueError as error:
        raise ValueError(f"compare: {name}: {error}") from error


def _form(name: str, model: nn.Module, flops: Mapping[str, int]) -> Form:
    """A form whose parameters are dense tensors."""
    count = Count.of(*model.parameters())
    size, note = _attempt(partial(_file, model))
    stored = None if size is None else size.dense_bytes if name == "dense" else size.bytes
    total = sum(flops.values()) if flops else None
    return _noted(Form(name, stored, count.weights, count.weights - count.zeros, total), note)


def _file(model: nn.Module) -> Any:
    from .sparse_file import save_sparse

    with TemporaryDirectory() as folder:
        return save_sparse(model, Path(folder) / "model")


# A form of the sparse model, and what it is: (sparse, its Form, its FLOPs by weight, example) -> (model, Form).
Made = tuple[nn.Module, Form]


def _shrunk(sparse: nn.Module, masked: Form, flops: Mapping[str, int], example: Any) -> Made:
    from .shrink import shrink

    nothing = "nothing to remove: no filter is zero as a whole"
    if not _has_zero_slices(sparse):
        raise ValueError(nothing)
    model = shrink(sparse, example)
    run(model, example)
    form = _form("shrunk", model, _flops("shrunk", model, example))
    if form.parameters == masked.parameters:
        raise ValueError(nothing)
    return model, form


def _has_zero_slices(model: nn.Module) -> bool:
    """Whether an output or an input of a weight, or an entry of a bias or norm layer, is zero. Without any, shrinking,
    which takes its time, has nowhere to begin."""
    return any(
        not (parameter != 0).unsqueeze(-1).movedim(axis, 0).flatten(1).any(1).all()
        for parameter in model.parameters()
        for axis in range(min(parameter.dim(), 2))
    )


def _semi_structured(sparse: nn.Module, masked: Form, flops: Mapping[str, int], example: Any) -> Made:
    names = semi_structured_layers(sparse).convertible
    model = to_semi_structured(sparse)
    run(model, example)
    halved = sum(sparse.get_parameter(name).numel() for name in names) // 2
    saved = sum(flops.get(name, 0) for name in names) // 2
    return model, _from_masked(masked, "semi-structured", halved, saved)


def _csr(sparse: nn.Module, masked: Form, flops: Mapping[str, int], example: Any) -> Made:
    model = to_sparse_layout(sparse)
    run(model, example)
    left_out = saved = 0
    for place, layer in model.named_modules():
        if isinstance(layer, CSRLinear):
            weights, stored = layer.in_features * layer.out_features, len(layer.values)
            left_out += weights - stored
            saved += flops.get(f"{place}.weight" if place else "weight", 0) * (weights - stored) // weights
    return model, _from_masked(masked, "CSR", left_out, saved)


def _from_masked(masked: Form, name: str, left_out: int, saved: int) -> Form:
    """A form that is made of the masked model when that has been loaded."""
    parameters, flops = masked.parameters, masked.flops
    return replace(
        masked,
        name=name,
        parameters=None if parameters is None else parameters - left_out,
        flops=None if flops is None else flops - saved,
        note="its file is that of masked, from which it is converted when loaded",
    )


def _attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, and what was warned of; or None, and why it cannot be had."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            made = make()
        except (ImportError, ValueError, RuntimeError) as error:
            return None, _plain(error)
        except Exception as error:  # of the model's own code, which may not bear to be copied or converted
            return None, f"{type(error).__name__}: {_plain(error)}"
    return made, "; ".join(_plain(each.message) for each in caught if each.category is UserWarning)


def _plain(message: object) -> str:
    """A message in one line, without the name of the function that it comes from."""
    return re.sub(r"^\w+: ", "", " ".join(str(message).split()))


def _noted(form: Form, note: str) -> Form:
    return replace(form, note="; ".join(filter(None, (form.note, note))))


def _take_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int | None, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each run in every round. The order is turned round in every other one, as each form may leave caches
    and clocks to the next one in another state."""

    def seconds_of(name: str) -> float:
        wait()
        start = time.perf_counter()
        runs[name]()
        wait()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        round_takes = sum(map(seconds_of, runs))
    if repeats is None:
        least, most = ROUNDS
        repeats = min(max(int(SECONDS / round_takes), least), most)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        for name in runs if number % 2 else reversed(list(runs)):
            taken[name].append(seconds_of(name))
    return taken


def _waiting(models: Sequence[nn.Module]) -> Callable[[], None]:
    """What waits for the devices of models to finish."""
    devices = {parameter.device for model in models for parameter in model.parameters()} - {torch.device("cpu")}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    return wait


def _with_time(form: Form, seconds: Mapping[str, Sequence[float]]) -> Form:
    """A form with its time, and whether that differs from the dense one's by more than the noise."""
    if form.name not in seconds:
        return form
    form = replace(form, milliseconds=1000 * median(seconds[form.name]))
    if form.name == "dense":
        return form
    ratios = [own / dense for own, dense in zip(seconds[form.name], seconds["dense"], strict=True)]
    # Of 7 identical runs the quartiles call 1 in 8 another, these 1 in 64.
    lower, *_, upper = quantiles(ratios, n=8)
    return replace(form, is_noise=lower <= 1 <= upper)
