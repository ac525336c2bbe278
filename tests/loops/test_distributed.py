"""TrainingManager in two processes with DistributedDataParallel: the same masks and weights in both."""

import processes
import pytest
import torch
from sparsifier.test_distributed import pytestmark as needs_gloo
from sparsifier.test_distributed import seen_in

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def managed(tmp_path_factory):
    return [each["managed"] for each in seen_in("replicated", tmp_path_factory)]


@pytest.mark.parametrize("kind", processes.MANAGED)
def test_both_processes_have_the_same_masks_and_weights(managed, kind):
    ours, theirs = (each[kind] for each in managed)
    assert len(ours["stages"]) == 10
    for one, other in zip(ours["stages"], theirs["stages"], strict=True):
        assert all(torch.equal(mask, other["masks"][name]) for name, mask in one["masks"].items())
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
        assert torch.equal(one["averaged"], other["averaged"])  # what is called after a backward sees the mean
    assert ours["sparsity"] == theirs["sparsity"]
    assert ours["sparsity"] == pytest.approx(0.6, abs=0.01) or kind == "several"
