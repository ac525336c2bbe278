"""Section `shrinking`: what zeros buy on a CPU with plain dense layers: parameters, FLOPs, time and file."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.models import random_model
from benchmarks.report import Table
from benchmarks.timing import interleaved, milliseconds, seconds_of
from sparsifai import Sparsifier, save_sparse, shrink
from sparsifai.model.flops import count_flops
from sparsifai.model.layers import find_weights

SIDE = 224
BATCHES = (1, 8)
MODELS = ("resnet18", "resnet50", "mobilenet_v2")


def shrinking(quick):
    "A model of torchvision without its dead filters, and with 90 % of its weights zero, beside the dense one"
    return Table(
        "shrinking",
        f"models of torchvision at {SIDE} px, forward",
        [row for name in MODELS[: 1 if quick else None] for row in _rows(name, rounds=7 if quick else 21)],
        "Half of the filters of each layer are zero, in multiples of 8, and `shrink` takes out what it can of them. "
        f"FLOPs and times are dense over sparse. Threads: {torch.get_num_threads()}.",
    )


def _rows(name, rounds):
    dense, example = _trained_model(name), torch.randn(1, 3, SIDE, SIDE)
    made = {"dense": dense} | {form: make(_trained_model(name), example) for form, make in FORMS.items()}
    flops = {form: sum(count_flops(model, find_weights(model), example).values()) for form, model in made.items()}
    files = {form: _file(model) for form, model in made.items()}
    taken = {
        batch: _seconds(made, torch.randn(batch, 3, SIDE, SIDE), rounds if batch == 1 else max(rounds // 3, 5))
        for batch in BATCHES
    }
    for form in FORMS:
        faster = {batch: seconds["dense"] / seconds[form] for batch, seconds in taken.items()}
        promised = flops["dense"] / flops[form]
        yield {
            "model": name,
            "form": form,
            "parameters / dense": _parameters(made[form]) / _parameters(dense),
            "FLOPs, times fewer": promised,
            **{f"dense ms, batch {batch}": milliseconds(seconds["dense"]) for batch, seconds in taken.items()},
            **{f"times faster, batch {batch}": ratio for batch, ratio in faster.items()},
            **{f"of what FLOPs promise, batch {batch}": ratio / promised for batch, ratio in faster.items()},
            "dense file, MB": files["dense"].dense_bytes / 1e6,
            "file, MB": files[form].bytes / 1e6,
            "file / dense": files[form].bytes / files["dense"].dense_bytes,
        }


def _trained_model(name):
    "With the statistics of some batches in its norm layers, without which outputs grow or vanish from layer to layer"
    model = random_model(name)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, SIDE, SIDE))
    return model.eval()


def _without_filters(model, example, **options):
    Sparsifier(model, "filter", "local", round_to=8, **options).sparsify(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of filters that have to stay, as the row shows
        return shrink(model, example)


def _masked(model, example):
    Sparsifier(model, context="local").sparsify(0.9)
    return model


# -> (model, example) -> the model to measure
FORMS = {
    "filters, each layer alone": _without_filters,
    "filters, coupled": lambda model, example: _without_filters(model, example, coupled=True, example_input=example),
    "90 % of the weights, masked": _masked,
}


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _file(model):
    with TemporaryDirectory() as folder:
        return save_sparse(model, Path(folder) / "model.safetensors")


@torch.inference_mode()
def _seconds(models, inputs, rounds):
    "Of a forward of each model, after one in which memory is set up"
    for model in models.values():
        model(inputs)
    return interleaved({form: _case(model, inputs) for form, model in models.items()}, rounds)


def _case(model, inputs):
    return lambda number: seconds_of(model, inputs)
