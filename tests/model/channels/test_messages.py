"""The messages of all errors of this folder, raised by `shrink`."""

import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning", reason="it finds which channels are coupled")

from sparsifai import shrink  # noqa: E402

EXAMPLE = torch.ones(2, 3, 8, 8)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.dropout(self.conv(x))


class Counting(nn.Module):
    """Its output depends on how often it has been called."""

    def __init__(self):
        super().__init__()
        self.conv, self.count = nn.Conv2d(3, 4, 1), 0

    def forward(self, x):
        self.count += 1
        return self.conv(x) * self.count


class Deciding(nn.Module):
    """Its forward needs a number that is computed from the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.conv(x).mean((2, 3)) * int(x.sum()))


def without_torch_pruning():
    with mock.patch.dict("sys.modules", torch_pruning=None):
        shrink(nn.Conv2d(3, 4, 1).eval(), EXAMPLE)


def not_followed():
    with mock.patch("torch_pruning.DependencyGraph.build_dependency", side_effect=KeyError("node")):
        shrink(nn.Conv2d(3, 4, 1).eval(), EXAMPLE)


ROWS = [
    ("random outputs", lambda: shrink(Noisy(), EXAMPLE), ValueError,
     "shrink: Noisy has different outputs for the same input in evaluation mode, so the outputs of the smaller model "
     "cannot be checked; turn off what is random in the model, and what it remembers from one input to the next"),
    ("memory", lambda: shrink(Counting(), EXAMPLE), ValueError,
     "shrink: Counting has different outputs for the same input in evaluation mode"),
    ("decides by values", lambda: shrink(Deciding().eval(), EXAMPLE), ValueError,
     "cannot find the constant channels of Deciding: with NaN as its input it raises ValueError: cannot convert float "
     "NaN to integer; models that decide something by values of their input are not supported"),
    ("no torch-pruning", without_torch_pruning, ImportError,
     "torch-pruning finds which channels are coupled, and cannot be imported (import of torch_pruning halted; None in "
     "sys.modules); run pip install 'sparsifai[shrink]'"),
    ("not followed", not_followed, ValueError,
     "torch-pruning cannot follow the computation of Conv2d (KeyError: 'node'), so it is unknown which channels are "
     "coupled"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_errors(mistake, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        mistake()
