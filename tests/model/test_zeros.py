import pytest
import torch

from sparsifai.model.zeros import Count, figures


def test_zeros_of_several_tensors_are_counted():
    count = Count.of(torch.tensor([[0.0, -0.0], [1.0, float("nan")]]), torch.zeros(1000))
    assert (count.weights, count.zeros) == (1004, 1002)
    assert count.sparsity == pytest.approx(1002 / 1004)
    assert count.density == pytest.approx(2 / 1004)
    assert figures(count) == ("1,004", "1,002", "99.80%")


def test_no_weights_are_not_sparse():
    assert (Count.of().weights, Count.of().sparsity) == (0, 0.0)
