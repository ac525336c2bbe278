import numpy as np
import pytest
import torch
from torch import nn

from sparsifai.support.checks import (
    check_count,
    check_fraction,
    check_is_module,
    check_number,
    check_round_to,
    check_seed,
)


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25)])
def test_checked_numbers_are_floats(value):
    for checked in (check_fraction(value), check_number("weight", value)):
        assert type(checked) is float
        assert checked == 0.25


def test_what_is_right_is_returned():
    assert check_fraction(0) == 0
    assert check_fraction(1) == 1
    assert check_number("temperature", 1e9) == 1e9
    assert check_seed(-3) == -3
    assert check_count("every", 7) == 7
    assert check_round_to(None) is None
    assert check_round_to(8) == 8
    check_is_module("shrink", "model", nn.Linear(2, 2))
