"""Which chunks and shuffles of channels are found, and that they compute the same."""

import pytest
import torch
import torch.nn.functional as F

from sparsifai.model.channels.rewriting import Rewriting

MAPS, TOKENS = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 16)


def shuffled(x, *axes, parts=4):
    return x.view(len(x), parts, -1, *x.shape[2:]).transpose(*axes).contiguous().view(x.shape)


FOUND = {
    "chunk": (MAPS, lambda x: x.chunk(4, dim=-3), "chunk", 4),
    "chunk of tokens": (TOKENS, lambda x: torch.chunk(x, 2, -1), "chunk", 2),
    "split": (MAPS, lambda x: x.split(4, 1), "chunk", 4),
    "split by sizes": (MAPS, lambda x: torch.split(x, split_size_or_sections=[8, 8], dim=1), "chunk", 2),
    "glu": (TOKENS, F.glu, "chunk", 2),
    "glu of maps": (MAPS, lambda x: F.glu(x, dim=1), "chunk", 2),
    "shuffle": (MAPS, lambda x: F.channel_shuffle(x, 2), "shuffle", 2),
    "views": (MAPS, lambda x: shuffled(x, 1, 2), "shuffle", 4),
    "views, unequal": (MAPS, lambda x: shuffled(x, 2, 1, parts=2), "shuffle", 2),
}
NOT_FOUND = {
    "chunk of positions": (MAPS, lambda x: x.chunk(2, 2)),
    "chunk of tokens": (TOKENS, lambda x: x.chunk(5, 1)),
    "unequal chunks": (MAPS, lambda x: x.chunk(3, 1)),
    "unequal sizes": (MAPS, lambda x: x.split([4, 12], 1)),
    "one chunk": (MAPS, lambda x: x.chunk(1, 1)),
    "other axes": (MAPS, lambda x: shuffled(x, 3, 4)),
    "not swapped": (MAPS, lambda x: x.view(2, 4, 4, 4, 4).contiguous().view(x.shape)),
    "two positions": (MAPS, lambda x: shuffled(x, 2, 3)),
    "swapped twice": (MAPS, lambda x: x.view(2, 2, 8, 4, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape)),
    "whole numbers": (MAPS.long(), lambda x: x.chunk(2, 1)),
}


def rewritten(given, function):
    """What a function returns in the recording and in a later run, and the operations that are found."""
    mode, results = Rewriting(), []
    with mode.recording():
        results.append(function(given))
    with mode:
        results.append(function(given))
    expected = function(given)
    for result in results:
        pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
    return [(each.kind, each.channels, each.parts) for each in mode.operations]


@pytest.mark.parametrize(("given", "function", "kind", "parts"), FOUND.values(), ids=FOUND)
def test_operations_that_are_found(given, function, kind, parts):
    assert rewritten(given, function) == [(kind, 16, parts)]


@pytest.mark.parametrize(("given", "function"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_operations_that_are_left_as_they_are(given, function):
    assert rewritten(given, function) == []


def test_a_shuffle_moves_channels_as_it_says():
    mode = Rewriting()
    with mode.recording():
        moved = F.channel_shuffle(torch.arange(12.0).reshape(1, 12, 1, 1), 3).flatten().tolist()
    (operation,) = mode.operations
    assert [operation.unshuffled(index) for index in range(12)] == moved
    assert [operation.shuffled(operation.unshuffled(index)) for index in range(12)] == list(range(12))
    assert operation.joined[1] == [1, 5, 9]
