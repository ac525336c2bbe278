"""Section `layouts`: Linear layers on the CPU whose weights are stored as CSR or BSR, beside dense ones."""

from functools import partial
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.report import Table
from benchmarks.timing import interleaved, milliseconds, seconds_of, threads
from sparsifai import Sparsifier
from sparsifai.export.csr import CSRLinear

BATCHES = (1, 8, 64)
# Granularity -> the shape of the blocks that are stored, None for single weights.
LAYOUTS = {"weight": None, "4x4": (4, 4), "16x16": (16, 16), "32x32": (32, 32)}


def layouts(quick):
    "Forward of one Linear layer, sparse over dense, by batch size"
    sides = (512, 2048) if quick else (512, 1024, 2048, 4096)
    levels = (0.8, 0.95) if quick else (0.5, 0.8, 0.9, 0.95, 0.99)
    rows = [
        row
        for side, level, granularity in product(sides, levels, LAYOUTS)
        for row in _rows(side, level, granularity, counts=(1,) if quick else (1, 2), rounds=5 if quick else 7)
    ]
    return Table(
        "layouts",
        "square Linear layers of float32, forward",
        rows,
        "CSR is the layer of `to_sparse_layout`; of BSR, the faster one of its way and of F.linear counts.",
    )


@torch.inference_mode()
def _rows(side, level, granularity, counts, rounds):
    "Of one layer in one layout, by the number of threads"
    layer, block = _sparse_layer(side, level, granularity), LAYOUTS[granularity]
    if block is None:
        ways = {"CSR": CSRLinear(layer.weight, layer.bias)}
    else:
        stored = _stored(layer.weight, block)
        ways = {"transposed": partial(_product, stored, layer.bias), "F.linear": partial(_linear, stored, layer.bias)}
    name = "CSR" if block is None else f"BSR {granularity}"
    for count in counts:
        with threads(count):
            taken = {batch: _seconds({"dense": layer, **ways}, torch.randn(batch, side), rounds) for batch in BATCHES}
        row = {"side": side, "zeros": level, "layout": name, "threads": count}
        row |= {f"dense ms, batch {batch}": milliseconds(taken[batch]["dense"]) for batch in BATCHES}
        yield row | {f"/ dense, batch {batch}": _fastest(taken[batch]) / taken[batch]["dense"] for batch in BATCHES}


def _sparse_layer(side, level, granularity):
    torch.manual_seed(0)
    layer = nn.Linear(side, side)
    Sparsifier(layer, granularity, "local").sparsify(level)
    return layer


def _seconds(ways, inputs, rounds):
    expected = ways["dense"](inputs)
    for name, way in ways.items():
        assert torch.allclose(way(inputs), expected, atol=1e-3), name
    return interleaved({name: lambda number, way=way: seconds_of(way, inputs) for name, way in ways.items()}, rounds)


def _fastest(seconds):
    "Of the ways to multiply with what is stored"
    return min(taken for name, taken in seconds.items() if name != "dense")


def _stored(weight, block):
    "As BSR, with the indices of 32 bits that CSRLinear has"
    sparse = weight.to_sparse_bsr(block)
    indices = sparse.crow_indices().int(), sparse.col_indices().int()
    return torch.sparse_bsr_tensor(*indices, sparse.values(), sparse.shape, check_invariants=False)


def _product(stored, bias, inputs):
    "As CSRLinear does it"
    if len(inputs) == 1:
        return torch.addmv(bias, stored, inputs[0])[None]
    return torch.addmm(bias[:, None], stored, inputs.t()).t().contiguous()


def _linear(stored, bias, inputs):
    return F.linear(inputs, stored, bias)
