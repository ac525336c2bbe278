"""Standing in for the step of an optimizer: what is called, and what is given back in any order."""

import warnings
from itertools import permutations

import pytest
import torch

from sparsifai.support.stand_in import StandIn


class Notes(StandIn):
    def __init__(self, optimizer, name, seen):
        super().__init__(optimizer)
        self.name, self.seen = name, seen

    def _step(self, *arguments, **keywords):
        self.seen.append(self.name)
        return self.own_step(*arguments, **keywords)


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)


@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("order", list(permutations("abc")))
def test_the_own_step_comes_back_whichever_ends_first(order, is_scheduled):
    steps, seen = optimizer(), []
    scheduler = torch.optim.lr_scheduler.ConstantLR(steps) if is_scheduled else None
    before = vars(steps).get("step")
    made = {name: Notes(steps, name, seen) for name in "abc"}
    for each in made.values():
        each.begin()
    left = list("cba")
    for name in order:
        seen.clear()
        steps.step()
        assert seen == left
        made[name].end()
        made[name].end()
        left.remove(name)
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.step()
        if is_scheduled:
            scheduler.step()
    assert seen == []
    assert vars(steps).get("step") is before


def test_a_scheduler_finds_its_mark():
    steps = optimizer()
    scheduler, stands_in = torch.optim.lr_scheduler.ConstantLR(steps), Notes(steps, "a", [])
    stands_in.begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.step()
        scheduler.step()
    assert stands_in.seen == ["a"]
