"""Section `layouts`: Linear layers on the CPU whose weights are stored as CSR or BSR, beside dense ones."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.report import Table
from benchmarks.timing import interleaved, milliseconds, seconds_of, threads
from sparsifai import Sparsifier
from sparsifai.sparse_layout import CSRLinear

BATCHES = (1, 8, 64)
# Granularity -> the shape of the blocks that are stored, None for single weights.
LAYOUTS = {"weight": None, "4x4": (4, 4), "16x16": (16, 16), "32x32": (32, 32)}


def layouts(quick):
    "Forward of one Linear layer, sparse over dense, by batch size"
    sides = (512, 2048) if quick else (512, 1024, 2048, 4096)
    levels = (0.8, 0.95) if quick else (0.5, 0.8, 0.9, 0.95, 0.99)
    weights = {
        (side, level, granularity): _sparse_weight(side, level, granularity)
        for side in sides
        for level in levels
        for granularity in LAYOUTS
    }
    rows = []
    for count in (1,) if quick else (1, 2):
        with threads(count), torch.inference_mode():
            for (side, level, granularity), weight in weights.items():
                name = "CSR" if LAYOUTS[granularity] is None else f"BSR {granularity}"
                row = {"threads": count, "side": side, "zeros": level, "layout": name}
                taken = {batch: _seconds(weight, LAYOUTS[granularity], batch, 5 if quick else 7) for batch in BATCHES}
                row |= {f"dense ms, batch {batch}": milliseconds(taken[batch]["dense"]) for batch in BATCHES}
                row |= {f"/ dense, batch {batch}": _fastest(taken[batch]) / taken[batch]["dense"] for batch in BATCHES}
                rows.append(row)
    return Table(
        "layouts",
        "square Linear layers of float32, forward",
        rows,
        "CSR is the layer of `to_sparse_layout`; of BSR, the faster one of its way and of F.linear counts.",
    )


def _sparse_weight(side, level, granularity):
    torch.manual_seed(0)
    layer = nn.Linear(side, side)
    Sparsifier(layer, granularity, "local").sparsify(level)
    return layer.weight.detach()


def _seconds(weight, block, batch, rounds):
    layer = nn.Linear(*reversed(weight.shape))
    layer.weight.copy_(weight)
    inputs, bias = torch.randn(batch, weight.shape[1]), layer.bias
    calls = {"dense": partial(layer, inputs)}
    if block is None:
        calls["CSR"] = partial(CSRLinear(weight, bias), inputs)
    else:
        stored = _stored(weight, block)
        calls |= {
            "transposed": partial(_product, inputs, stored, bias),
            "F.linear": partial(F.linear, inputs, stored, bias),
        }
    expected = calls["dense"]()
    for name, call in calls.items():
        assert torch.allclose(call(), expected, atol=1e-3), name
    return interleaved({name: lambda number, call=call: seconds_of(call) for name, call in calls.items()}, rounds)


def _fastest(seconds):
    "Of the ways to multiply with what is stored"
    return min(taken for name, taken in seconds.items() if name != "dense")


def _stored(weight, block):
    "As BSR, with the indices of 32 bits that CSRLinear has"
    sparse = weight.to_sparse_bsr(block)
    indices = sparse.crow_indices().int(), sparse.col_indices().int()
    return torch.sparse_bsr_tensor(*indices, sparse.values(), sparse.shape, check_invariants=False)


def _product(inputs, sparse, bias):
    "As CSRLinear does it"
    if len(inputs) == 1:
        return torch.addmv(bias, sparse, inputs[0])[None]
    return torch.addmm(bias[:, None], sparse, inputs.t()).t().contiguous()
