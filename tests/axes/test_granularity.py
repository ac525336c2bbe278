import math

import pytest
import torch
from oracle import CONVOLUTION, MATRIX, groups_of

from sparsifai.axes.granularity import along, granularities
from sparsifai.axes.grouping import Grouping, UnavailableError, poolings

# Layers by the axes of their weight, the first of them split over the groups of a grouped convolution.
LAYERS = {
    "convolution": (("out", "in", "h", "w"), (4, 3, 2, 3), 1),
    "grouped": (("out", "in", "h", "w"), (6, 2, 3, 2), 3),
    "depthwise": (("out", "in", "h", "w"), (4, 1, 3, 3), 4),
    "transposed": (("in", "out", "h", "w"), (3, 4, 2, 2), 1),
    "transposed grouped": (("in", "out", "h", "w"), (6, 2, 2, 2), 2),
    "matrix": (("out", "in"), (5, 4), 1),
    "matrix (in, out)": (("in", "out"), (5, 4), 1),
}
CASES = [
    pytest.param(layer, name, indexed, id=f"{layer}-{name}")
    for layer, (axes, *_) in LAYERS.items()
    for name, indexed in (MATRIX if len(axes) == 2 else CONVOLUTION).items()
]


def grouping_of(layer, granularity):
    axes, shape, convolution_groups = LAYERS[layer]
    sizes = dict(zip(axes, shape, strict=True))
    sizes[axes[0]] //= convolution_groups
    return Grouping.of(granularities.resolve(granularity), sizes, convolution_groups), groups_of(
        shape, axes, CONVOLUTION["weight"], convolution_groups
    )


@pytest.mark.parametrize(("layer", "name", "indexed"), CASES)
def test_groups_are_those_of_the_definition(layer, name, indexed):
    axes, shape, convolution_groups = LAYERS[layer]
    grouping, _ = grouping_of(layer, name)
    expected = groups_of(shape, axes, indexed, convolution_groups)
    numbers = torch.arange(math.prod(shape)).reshape(shape).float()
    members = grouping.members(numbers)
    assert [sorted(row) for row in members.tolist()] == [[float(numbers[i]) for i in group] for group in expected]
    assert grouping.size == len(expected[0])

    for fallen in range(len(expected)):
        kept = torch.ones(len(expected), dtype=torch.bool)
        kept[fallen] = False
        mask = grouping.spread(kept)
        assert mask.dim() == len(shape)
        assert {tuple(index) for index in (~mask.expand(shape)).nonzero().tolist()} == set(expected[fallen])
        assert torch.equal(grouping.gather(mask), kept)


def test_every_registered_granularity_is_tested():
    assert set(granularities) == set(CONVOLUTION)


def test_masks_keep_the_grouped_shape():
    shapes = {
        "weight": (4, 3, 2, 3),
        "filter": (4, 1, 1, 1),
        "channel": (1, 3, 1, 1),
        "kernel": (4, 3, 1, 1),
        "row": (4, 3, 2, 1),
        "column": (4, 3, 1, 3),
        "layer": (1, 1, 1, 1),
        "shared_weight": (1, 3, 2, 3),
    }
    for name, shape in shapes.items():
        grouping, _ = grouping_of("convolution", name)
        assert grouping.spread(grouping.all_kept()).shape == shape


def test_a_tuple_of_axes_is_a_granularity():
    by_tuple, _ = grouping_of("convolution", ("out", "h"))
    by_name, _ = grouping_of("convolution", "horizontal_slice")
    by_function, _ = grouping_of("convolution", along("out", "h"))
    by_own, _ = grouping_of("convolution", lambda axes: {"h", "out"})
    assert by_tuple.grid == by_name.grid == by_function.grid == by_own.grid == (4, 1, 2, 1)


@pytest.mark.parametrize(
    ("layer", "indexed", "sizes"),
    [
        ("matrix", {"out": 2, "in": 2}, [4, 4, 4, 4, 2, 2]),  # 5 is no multiple of 2: the last tiles are smaller
        ("matrix", {"out": 3}, [12, 8]),
        ("convolution", {"out": 2, "in": 2, "h": 1, "w": 1}, None),
        ("grouped", {"out": 2}, [24, 24, 24]),
        ("matrix", {"out": 100}, [20]),  # larger than the layer: the layer
    ],
)
def test_extents_make_blocks(layer, indexed, sizes):
    axes, shape, convolution_groups = LAYERS[layer]
    grouping, _ = grouping_of(layer, lambda axes: indexed)
    expected = {}
    per_group = shape[0] // convolution_groups
    for index in torch.ones(shape).nonzero().tolist():
        place = dict(zip(axes, index, strict=True))
        group, place[axes[0]] = divmod(index[0], per_group)
        key = (group, *(place[axis] // indexed[axis] for axis in axes if axis in indexed))
        expected.setdefault(key, set()).add(tuple(index))
    counts = torch.as_tensor(grouping.size).expand(len(expected)).tolist()
    assert counts == [len(group) for group in expected.values()] == (sizes or counts)
    for position, group in enumerate(expected.values()):
        kept = torch.ones(len(expected), dtype=torch.bool)
        kept[position] = False
        mask = grouping.spread(kept)
        assert {tuple(index) for index in (~mask.expand(shape)).nonzero().tolist()} == group
        assert torch.equal(grouping.gather(mask), kept)


def test_pooling_by_hand():
    scores = torch.tensor([[1.0, 2, 3], [-3, 0, 4]])
    expected = {"mean": [2, 1 / 3], "sum": [6, 1], "max": [3, 4], "l2": [14**0.5, 5], "squared_sum": [36, 1]}
    grouping = Grouping.of(granularities["row"], {"out": 2, "in": 3})
    for name, pool in poolings.items():
        assert grouping.pool(scores.__getitem__, pool).tolist() == pytest.approx(expected.pop(name))
    assert not expected
    ragged = Grouping.of(lambda axes: {"out": 1, "in": 2}, {"out": 2, "in": 3})
    assert ragged.pool(scores.__getitem__, poolings["mean"]).tolist() == [1.5, 3, -1.5, 4]
    assert ragged.pool((-scores).__getitem__, poolings["max"]).tolist() == [-1, -3, 3, -4]


def test_groups_of_the_same_values_in_another_order_pool_to_equal_scores():
    values = torch.randn(10_000)
    scores = torch.stack([values[torch.randperm(10_000)] for _ in range(20)])
    grouping = Grouping.of(granularities["row"], {"out": 20, "in": 10_000})
    assert len(grouping.pool(scores.__getitem__, poolings["mean"]).unique()) == 1


def test_equal_groups_pool_to_equal_scores():
    grouping = Grouping.of(granularities["filter"], {"out": 50, "in": 7, "h": 3, "w": 3})
    assert len(grouping.pool(torch.full((50, 7, 3, 3), 0.1).__getitem__, poolings["mean"]).unique()) == 1


def test_a_granularity_that_a_layer_cannot_have_says_what_is_missing():
    with pytest.raises(UnavailableError, match=r"shared_channel needs axis 'h', has only \(out, in\)"):
        grouping_of("matrix", "shared_channel")


@pytest.mark.parametrize("extent", [0, -1, 1.5, True])
def test_extents_are_whole_numbers(extent):
    with pytest.raises(ValueError, match="the extent of a group along 'out' is a whole number from 1 on"):
        grouping_of("matrix", lambda axes: {"out": extent})


def test_a_tuple_of_anything_but_names_is_refused():
    with pytest.raises(TypeError, match="a tuple of axes holds their names"):
        granularities.resolve((0, 1))


def test_whole_outputs_and_inputs():
    flags = {
        name: (grouping.drops_outputs, grouping.drops_inputs)
        for name in CONVOLUTION
        for grouping in [grouping_of("convolution", name)[0]]
    }
    assert [name for name, (outputs, _) in flags.items() if outputs] == ["filter", "layer"]
    assert [name for name, (_, inputs) in flags.items() if inputs] == ["channel", "layer"]
    assert grouping_of("matrix", "row")[0].drops_outputs
    assert grouping_of("matrix", "column")[0].drops_inputs


@pytest.mark.parametrize("layer", ["convolution", "grouped", "transposed", "transposed grouped", "matrix"])
@pytest.mark.parametrize("indexed", [{"out": 1}, {"out": 2}, {}])
def test_outputs_of_whole_groups(layer, indexed):
    axes, shape, convolution_groups = LAYERS[layer]
    grouping, _ = grouping_of(layer, lambda axes: indexed)
    sizes = dict(zip(axes, shape, strict=True))
    out = sizes["out"] * (convolution_groups if axes[0] == "in" else 1)
    kept = torch.arange(math.prod(grouping.grid)) % 2 == 1
    alive = grouping.outputs(kept, out)
    mask = grouping.spread(kept).expand(shape)
    if axes[0] == "in" and convolution_groups > 1:
        mask = mask.unflatten(0, (convolution_groups, -1)).amax((1, 3, 4)).flatten()
    else:
        mask = mask.movedim(axes.index("out"), 0).flatten(1).amax(1)
    assert torch.equal(alive, mask)
