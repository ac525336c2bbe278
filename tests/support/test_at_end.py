import pytest
from interrupts import Interrupted, interrupted

from sparsifai.support.at_end import AtEnd


def test_it_is_undone_once_also_after_an_error():
    undone = []
    at_end = AtEnd(lambda: undone.append(1))
    with pytest.raises(KeyError), at_end, at_end:
        raise KeyError
    assert undone == [1]


def test_what_is_interrupted_is_undone_again_and_before_what_is_around_it():
    order, fails = [], [Interrupted]

    def undo_inner():
        order.append("inner")
        if fails:
            raise fails.pop()

    outer, inner = AtEnd(lambda: order.append("outer")), AtEnd(undo_inner)
    with pytest.raises(Interrupted), outer, outer, inner:  # the inner one is entered once
        pass
    assert order == ["inner", "inner", "outer"]


def test_whatever_line_is_interrupted():
    held = []

    def change():
        at_end = AtEnd(held.clear)
        with at_end, at_end:
            held.append(1)

    lines = interrupted(change).lines
    assert lines > 10
    for at in range(1, lines + 1):
        assert interrupted(change, at).where is not None
        assert held == []
