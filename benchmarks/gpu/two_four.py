"""Section `two_four`: weights in 2:4 through torch's own form: the same outputs, and how fast beside the dense ones."""

from contextlib import nullcontext

import torch
from torch import nn

from benchmarks.gpu.running import measure
from benchmarks.gpu.workloads import side_of_pictures, transformer
from benchmarks.timing import milliseconds
from sparsifai import Sparsifier, to_semi_structured

BATCHES = (1, 16, 64, 256)
TOKENS = 197  # of a picture of 224 px in patches of 16
NEAR = 1e-2
MLPS = {"ViT-B/16": (768, 3072), "ViT-L/16": (1024, 4096), "decoder 7B": (4096, 11008)}


def two_four(section):
    "The layers of an MLP, MLP blocks, and a whole ViT-B/16; eager first, for compiling takes long"
    mlps = {"small": (64, 128)} if section.quick else MLPS
    batches = BATCHES[:2] if section.quick else BATCHES
    for name, sides in mlps.items():
        for batch in batches:
            section.part(f"Linear of {name}, batch {batch}", _linear, name, sides, batch)
    for name, sides in mlps.items():
        section.part(f"MLP of {name}", _mlp, name, sides, batches)
    section.part("vit_b_16", _vit, batches)
    for name, sides in list(mlps.items())[:2]:
        section.part(f"MLP of {name}, torch.compile", _mlp, name, sides, batches[-2:], True)
    section.part("vit_b_16, torch.compile", _vit, batches[-2:-1], True)


def _sparse(section, model, layers=None):
    "In half precision and 2:4, and its converted copy; without a GPU, which alone has the kernels, the model itself"
    model = model.to(section.device)
    Sparsifier(model, context="2:4", layers=layers).sparsify(0.5)
    model = model.to(torch.float16 if section.on_gpu else torch.float32).eval().requires_grad_(False)
    return model, to_semi_structured(model) if section.on_gpu else model


def _input(section, *shape):
    return torch.randn(*shape, device=section.device, dtype=torch.float16 if section.on_gpu else torch.float32)


def _linear(section, name, sides, batch):
    "Each of the two layers alone, on as many tokens as a batch of pictures has"
    for inputs, outputs in (sides, sides[::-1]):
        torch.manual_seed(0)
        layer, converted = _sparse(section, nn.Sequential(nn.Linear(inputs, outputs)))
        given = _input(section, batch * TOKENS, inputs)
        _compare(section, "2:4, a Linear layer", f"{name} {inputs}x{outputs}", batch, layer, converted, given)


def _mlp(section, name, sides, batches, compiled=False):
    torch.manual_seed(0)
    layers = nn.Linear(*sides), nn.GELU(), nn.Linear(*sides[::-1])
    dense, sparse = _sparse(section, nn.Sequential(*layers))
    if compiled:
        dense, sparse = (torch.compile(model, dynamic=False) for model in (dense, sparse))
    for batch in batches:
        given = _input(section, batch, TOKENS, sides[0])
        _compare(section, "2:4, an MLP block", _label(name, compiled), batch, dense, sparse, given)


def _vit(section, batches, compiled=False):
    "Only its MLP layers: those of attention are read by MultiheadAttention itself"
    side = side_of_pictures(section)
    dense, sparse = _sparse(section, transformer(section), layers="*.mlp.*")
    if compiled:
        dense, sparse = (torch.compile(model, dynamic=False) for model in (dense, sparse))
    for batch in batches:
        given = _input(section, batch, 3, side, side)
        _compare(section, "2:4, a whole model", _label("vit_b_16", compiled), batch, dense, sparse, given)


def _label(name, compiled):
    return f"{name}, torch.compile" if compiled else name


@torch.no_grad()
def _compare(section, table, name, batch, dense, sparse, given):
    "Outputs and times of one input; NEAR is a share of the largest output"
    expected, output = dense(given), sparse(given)
    difference = float((output - expected).abs().max() / expected.abs().max())
    outputs_equal = difference <= NEAR
    cases = {"dense": lambda number: dense(given), "2:4": lambda number: sparse(given)}
    with torch.inference_mode() if section.on_gpu else nullcontext():
        times = measure(section.device, cases, 3 if section.quick else 15, warm_up=3)
    section.row(
        table,
        case=name,
        batch=batch,
        **{
            "dense ms": milliseconds(times["dense"].device),
            "2:4 ms": milliseconds(times["2:4"].device),
            "times as fast": times["dense"].device / times["2:4"].device,
            "host ms, dense": milliseconds(times["dense"].host),
            "host ms, 2:4": milliseconds(times["2:4"].host),
            "largest difference": difference,
        },
    )
    if not outputs_equal:
        section.fail(f"{table}, {name}, batch {batch}", f"outputs differ by {difference:.2e} of the largest")
