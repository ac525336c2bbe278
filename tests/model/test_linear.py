import torch
from torch import nn

from sparsifai.model.layers import find_weights
from sparsifai.model.linear import why_not_two_four


def test_two_four_kernels_take_what_torch_says():
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
    assert (limits.sparse_min_rows, limits.sparse_min_cols) == (16, 16)
    model = nn.ModuleList([nn.Linear(16, 32), nn.Linear(16, 24), nn.Linear(8, 16), nn.Conv2d(16, 16, 1)])
    model.append(nn.MultiheadAttention(16, 2))
    reasons = {name: why_not_two_four(model, target) for name, target in find_weights(model).items()}
    assert reasons == {
        "0.weight": "", "1.weight": "sides not multiples of 16", "2.weight": "sides not multiples of 16",
        "3.weight": "not a Linear weight",
        "4.in_proj_weight": "not a Linear weight", "4.out_proj.weight": "not a Linear weight",
    }  # fmt: skip
