"""`compare`: what each form of a sparse model saves in file size, parameters, FLOPs and time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..model.flops import count_flops
from ..model.layers import find_weights
from ..model.parallel import unwrapped
from ..model.running import evaluating, run, untraced
from ..model.zeros import Count, check_counted, has_zero_slices, measured
from ..support.arguments import checks_arguments
from ..support.checks import check_count, check_is_module
from ..support.printable import printable
from ..support.progress import progress
from ..support.warning import own_filters
from .comparison_table import Comparison, Form, caption
from .csr import CSRLinear, to_sparse_layout
from .shrink import shrink
from .sparse_file import SparseFile, save_sparse
from .timing import is_noise, median_milliseconds, time_in_turn, waiting_for
from .two_four import semi_structured_layers, to_semi_structured


@checks_arguments
def compare(dense: nn.Module, sparse: nn.Module, example_input: Any, repeats: int | None = None) -> Comparison:
    """Compare each form of a sparse model with the dense model: file size, parameters, FLOPs and time.

    The forms are 'dense'; 'masked', the sparse model itself, stored by `save_sparse`; 'shrunk' by `shrink`;
    'semi-structured' by `to_semi_structured`; and 'CSR' by `to_sparse_layout`. If a form is not available, its note
    says why.

    Times are medians of forward passes in evaluation mode, without gradients, after a warm-up. In each round every form
    runs once, and the order is reversed from round to round. A time is marked `~` if its difference from the dense
    model is within the noise: 1 lies within the middle three quarters of the ratios of all rounds.

    Modes, buffers and gradients of the models and the random generators are unchanged afterwards.

    Args:
        dense: The dense model. Of a wrapper (compiled, data parallel) the model inside is compared.
        sparse: The sparse model, likewise.
        example_input: A batch, a tuple of several positional inputs, or a dictionary of named ones. FLOPs and times
            are for the whole batch.
        repeats: How often each form is timed, at least 3. By default as often as fits into about a second for all forms
            together, 7 to 200 times.

    Returns:
        The table, one row per form.

    Raises:
        TypeError: A model is not a torch.nn.Module.
        ValueError: A model does not run on the example, or `repeats` is not a whole number of at least 3.

    Example:
        >>> from copy import deepcopy
        >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> sparse = deepcopy(dense)
        >>> _ = Sparsifier(sparse).sparsify(0.5)
        >>> compare(dense, sparse, torch.rand(8, 64)).relative('masked', 'flops')
        1.0
    """
    for name, model in (("dense", dense), ("sparse", sparse)):
        check_is_module("compare", name, model)
        check_counted("compare", measured(model))
    if repeats is not None and check_count("repeats", repeats) < 3:
        raise ValueError(f"compare: repeats must be at least 3, not {repeats}; fewer runs cannot be told from noise")
    dense, sparse = unwrapped(dense), unwrapped(sparse)
    with untraced(dense), untraced(sparse), evaluating(dense), evaluating(sparse), torch.no_grad():
        flops = {name: _flops(name, model, example_input) for name, model in (("dense", dense), ("sparse", sparse))}
        models, forms = {"dense": dense, "masked": sparse}, [_form("dense", dense, flops["dense"])]
        masked = _form("masked", sparse, flops["sparse"])
        saved = "as many FLOPs as dense" if masked.flops == forms[0].flops else "they save no FLOPs"
        forms.append(_noted(masked, f"its zeros are multiplied like any other weight: {saved}"))
        makers = {"shrunk": _shrunk, "semi-structured": _semi_structured, "CSR": _csr}
        for name, make in progress(makers.items(), "making the forms to compare", name=itemgetter(0)):
            made, note = _attempt(partial(make, sparse, masked, flops["sparse"], example_input))
            form = Form(name)
            if made is not None:
                models[name], form = made
            forms.append(_noted(form, note))
        runs = {name: partial(run, model, example_input) for name, model in models.items()}
        seconds = time_in_turn(runs, repeats, waiting_for(list(models.values())))
    return Comparison(tuple(_with_time(form, seconds) for form in forms), caption(seconds, dense))


def _flops(name: str, model: nn.Module, example: Any) -> dict[str, int]:
    """FLOPs by weight, with an error that names the model if it does not run on the example."""
    try:
        return count_flops(model, find_weights(model), example)
    except ValueError as error:
        raise ValueError(f"compare: {printable(name)}: {error}") from error


def _form(name: str, model: nn.Module, flops: Mapping[str, int]) -> Form:
    """The numbers of a form whose parameters are dense tensors."""
    count = Count.of(*measured(model).values())
    size, note = _attempt(partial(_file, model))
    stored = None if size is None else size.dense_bytes if name == "dense" else size.bytes
    total = sum(flops.values()) if flops else None
    return _noted(Form(name, stored, count.weights, count.weights - count.zeros, total), note)


def _file(model: nn.Module) -> SparseFile:
    with TemporaryDirectory() as folder:
        return save_sparse(model, Path(folder) / "model")


# Functions that make a form take (sparse model, Form of the masked model, FLOPs by weight, example) and return this.
Made = tuple[nn.Module, Form]


def _shrunk(sparse: nn.Module, masked: Form, flops: Mapping[str, int], example: Any) -> Made:
    nothing = "nothing to remove: no whole filter, head or neuron is zero"
    if not has_zero_slices(sparse):
        raise ValueError(nothing)
    model = shrink(sparse, example)
    run(model, example)
    form = _form("shrunk", model, _flops("shrunk", model, example))
    if form.parameters == masked.parameters:
        raise ValueError(nothing)
    return model, form


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
    for name, layer in model.named_modules():
        if isinstance(layer, CSRLinear):
            weights, stored = layer.in_features * layer.out_features, len(layer.values)
            left_out += weights - stored
            saved += flops.get(f"{name}.weight" if name else "weight", 0) * (weights - stored) // weights
    return model, _from_masked(masked, "CSR", left_out, saved)


def _from_masked(masked: Form, name: str, left_out: int, saved: int) -> Form:
    """A form that the masked model is converted to after loading: parameters left out, FLOPs saved."""
    parameters, flops = masked.parameters, masked.flops
    return replace(
        masked,
        name=name,
        parameters=None if parameters is None else parameters - left_out,
        flops=None if flops is None else flops - saved,
        note="its file is that of masked, converted after loading",
    )


def _attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What a function makes, with its warnings as a note; or None, with its error as a note."""
    with own_filters(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            made = make()
        except (ImportError, ValueError, RuntimeError) as error:
            return None, _in_one_line(error)
        except Exception as error:  # raised by the model's own code, when it is copied or converted
            return None, f"{type(error).__name__}: {_in_one_line(error)}"
    return made, "; ".join(_in_one_line(each.message) for each in caught if each.category is UserWarning)


def _in_one_line(message: object) -> str:
    """A message in one line, without the name of the function at its beginning."""
    return re.sub(r"^\w+: ", "", " ".join(str(message).split()))


def _noted(form: Form, note: str) -> Form:
    return replace(form, note="; ".join(filter(None, (form.note, note))))


def _with_time(form: Form, seconds: Mapping[str, list[float]]) -> Form:
    """A form with its time, if it has been run."""
    if form.name not in seconds:
        return form
    own = seconds[form.name]
    within_noise = form.name != "dense" and is_noise(own, seconds["dense"])
    return replace(form, milliseconds=median_milliseconds(own), is_noise=within_noise)
