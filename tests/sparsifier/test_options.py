"""The options of a Sparsifier, and the sparsity that is asked for."""

import math

import numpy as np
import pytest
import torch

from sparsifai import Sparsifier, criteria, schedules


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (50, ValueError, "sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
        (1.5, ValueError, "pass 0.015 for 1.5 %"),
        (-0.1, ValueError, "sparsity -0.1 is not a fraction from 0 to 1"),
        (101, ValueError, "sparsity 101.0 is not a fraction from 0 to 1"),
        (math.nan, ValueError, "sparsity nan is not a fraction from 0 to 1"),
        (np.bool_(True), TypeError, "a number from 0 to 1, or a dictionary of them by layer, not"),
        (True, TypeError, "a number from 0 to 1, or a dictionary of them by layer, not True"),
        ("0.5", TypeError, "not '0.5'"),
        ([0.5, 0.5], TypeError, "not .0.5, 0.5."),
        ({}, ValueError, "the dictionary of sparsities is empty"),
        ({"0": 50}, ValueError, "pass 0.5 for 50 %"),
        (None, TypeError, "two names of one number; pass one of them: neither is given"),
    ],
)
def test_what_is_no_sparsity_is_refused(mlp, sparsity, error, message):
    sparsifier = Sparsifier(mlp)
    with pytest.raises(error, match=message):
        sparsifier.sparsify(sparsity)
    assert all(mask.all() for mask in sparsifier.masks.values())


def test_compression_ratio_is_another_name_of_sparsity(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(compression_ratio=torch.tensor(0.5))
    assert sparsifier.sparsity == 0.5
    with pytest.raises(TypeError, match="both are given"):
        sparsifier.sparsify(0.5, compression_ratio=0.5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"granularity": "filters"}, "unknown granularity 'filters'; did you mean 'filter'"),
        ({"context": "globl"}, "unknown context 'globl'; did you mean 'global'"),
        ({"criteria": "larg_final"}, "unknown criterion 'larg_final'; did you mean 'large_final'"),
        ({"pool": "average"}, "unknown pooling 'average'; choose from 'l2', 'max', 'mean', 'squared_sum', 'sum'"),
    ],
)
def test_unknown_names_are_answered_with_close_matches(mlp, axes, message):
    with pytest.raises(ValueError, match=message):
        Sparsifier(mlp, **axes)


@pytest.mark.parametrize("round_to", [0, -2, 1.5, True])
def test_round_to_is_a_whole_number(mlp, round_to):
    with pytest.raises(ValueError, match="round_to must be a whole number of groups, at least 1"):
        Sparsifier(mlp, round_to=round_to)


@pytest.mark.parametrize("seed", ["a", 1.5, True, None])
def test_a_seed_is_a_whole_number(mlp, seed):
    with pytest.raises(TypeError, match="seed must be a whole number"):
        Sparsifier(mlp, seed=seed)


def test_arguments_in_the_wrong_place_are_told_of(mlp):
    with pytest.raises(
        ValueError, match=r"granularity cos fails on the axes .*; a granularity is a function of a layer"
    ):
        Sparsifier(mlp, schedules["cos"])
    with pytest.raises(ValueError, match=r"context large_final is not a function of \(layers, sparsity\)"):
        Sparsifier(mlp, "weight", criteria["large_final"])
