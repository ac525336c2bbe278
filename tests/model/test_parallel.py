"""What a single process can show of wrappers; replicas and shards are in tests/sparsifier/test_distributed.py."""

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsifai.model.parallel import (
    agree,
    is_fully_sharded,
    is_sharded,
    kind_of,
    own_shard,
    process_group_of,
    process_groups_of_shards,
    unwrapped,
    whole,
)


def test_wrappers_are_taken_off_one_after_another(mlp):
    assert unwrapped(mlp) is mlp
    assert unwrapped(nn.DataParallel(mlp)) is mlp
    assert unwrapped(torch.compile(nn.DataParallel(mlp))) is mlp
    averaged = unwrapped(AveragedModel(mlp))
    assert list(averaged.state_dict()) == list(mlp.state_dict())


def test_a_model_of_one_process_is_not_sharded(mlp):
    assert process_group_of(nn.DataParallel(mlp)) is None
    assert process_groups_of_shards(mlp) == []
    assert not is_fully_sharded(mlp)
    assert kind_of(mlp[0]) == "Linear"
    weight, mask = mlp[0].weight, torch.ones(8, 1, dtype=torch.bool)
    assert not is_sharded(weight)
    assert whole(weight) is weight
    assert own_shard(weight, mask) == (weight, mask)
    values = [np.array([True, False])]
    assert agree(values, [], torch.device("cpu")) == values
