"""Which outputs and inputs of layers belong to one channel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning", reason="it finds which channels are coupled")

from sparsifai.model.channels.coupling import find_channels  # noqa: E402


def test_channels_after_a_pixel_shuffle_are_coupled_with_those_of_the_other_term_of_a_sum():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fine, self.shuffle, self.coarse = nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)
            self.out = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.out(self.shuffle(self.fine(x)) + self.coarse(F.interpolate(x, scale_factor=2)))

    found = find_channels(Added().eval(), torch.randn(2, 3, 8, 8))
    fine = [[index for name, index in channel.outputs if name == "fine"] for channel in found]
    coarse = [[index for name, index in channel.outputs if name == "coarse"] for channel in found]
    assert fine[:4] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert coarse[:4] == [[0], [1], [2], [3]]
    assert [channel.inputs for channel in found[:4]] == [(("out", index),) for index in range(4)]
