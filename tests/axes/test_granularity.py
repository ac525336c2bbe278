import pickle

import pytest
from oracle import CONVOLUTION, MATRIX

from sparsifai import along, block, granularities

AXES = {"out": 4, "in": 3, "h": 2, "w": 5}


def test_every_registered_granularity_is_tested():
    alone = {name for name, each in granularities.items() if not getattr(each, "joint", False)}
    assert alone == set(CONVOLUTION)


@pytest.mark.parametrize("name", CONVOLUTION)
def test_axes_of_the_mask(name):
    assert tuple(granularities[name](AXES)) == CONVOLUTION[name]
    if name in MATRIX:
        assert tuple(granularities[name]({"out": 4, "in": 3})) == MATRIX[name]


def test_a_tuple_of_axes_is_a_granularity():
    for given in (("out", "h"), ["out", "h"], along("out", "h")):
        assert granularities.resolve(given)(AXES) == ("out", "h")


def test_tiles():
    for given in ("4x2", block(4, 2)):
        assert granularities.resolve(given)({"out": 8, "in": 6}) == {"out": 4, "in": 2}
        assert granularities.resolve(given)(AXES) == {"out": 4, "in": 2, "h": 1, "w": 1}


def test_a_granularity_of_your_own_is_one_function(registering):
    @granularities.register
    def filter_pairs(axes):
        return {"out": 2}

    assert granularities.resolve("filter_pairs") is granularities.resolve(filter_pairs) is filter_pairs


@pytest.mark.parametrize("granularity", [*granularities.values(), along("out", "h"), block(4, 2)])
def test_granularities_can_be_pickled(granularity):
    again = pickle.loads(pickle.dumps(granularity))
    assert again is granularity if getattr(granularity, "joint", False) else again(AXES) == granularity(AXES)
