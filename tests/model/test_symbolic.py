"""Models that torch.fx can trace because it replaces functions for the whole process; here it is done without."""

import math
from functools import partial
from math import sqrt

import pytest
import torch
import torch.fx
from torch import nn

from sparsifai.model.layers import find_weights
from sparsifai.model.tracing import traced_flow


def helper(x):
    return x / math.sqrt(x.size(-1))


@torch.fx.wrap
def decides(x):
    return x * 2 if x.sum() > 0 else x


def decorated(function):
    def called(self, x):
        return function(self, x)

    return called


compiled = torch.compile(lambda x: x + 1, backend="eager")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.factor = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.unregistered = [nn.ReLU()]

    def forward(self, x):
        return self.head(self.between(self.stem(x) * self.factor[0]))

    def between(self, x):
        return x / math.sqrt(x.size(-1))


class ByHelper(Base):
    def between(self, x):
        return helper(x)


class ByName(Base):
    def between(self, x):
        return x / sqrt(x.size(-1))


class BySuper(Base):
    def between(self, x):
        return super().between(x) + 1


class ByLocalImport(Base):
    def between(self, x):
        import math as m

        return x / m.sqrt(x.size(-1))


class ByStaticMethod(Base):
    @staticmethod
    def between(x):
        return x / math.sqrt(x.size(-1))


class ByClassMethod(Base):
    @classmethod
    def between(cls, x):
        return x / math.sqrt(x.size(-1))


class ByDecorated(Base):
    @decorated
    def between(self, x):
        return x / math.sqrt(x.size(-1))


class ByWrapped(Base):
    def between(self, x):
        return decides(x)


class ByCompiled(Base):
    def between(self, x):
        return compiled(x)


class ByUnregistered(Base):
    def between(self, x):
        return self.unregistered[0](x)


class Rounding:
    @staticmethod
    def half(x):
        return x * math.ceil(x.size(-1) / 2) * math.floor(x.size(-1) / 2) * math.trunc(x.size(-1) / 2)

    def __call__(self, x):
        return self.half(x)


class ByPlainClass(Base):
    def between(self, x):
        return Rounding.half(x)


class ByObject(Base):
    def between(self, x):
        return Rounding()(x)


class ByPartial(Base):
    def between(self, x):
        return partial(Rounding.half)(x)


class ByTable(Base):
    table = {"half": Rounding.half}

    def between(self, x):
        return self.table["half"](x)


class ByParent(ByPlainClass):
    def between(self, x):
        return ByPlainClass.between(self, x)


KINDS = [
    *(
        Base,
        ByHelper,
        ByName,
        BySuper,
        ByLocalImport,
        ByStaticMethod,
        ByClassMethod,
        ByDecorated,
        ByWrapped,
        ByCompiled,
    ),
    *(ByUnregistered, ByPlainClass, ByObject, ByPartial, ByTable, ByParent),
]


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_proxies_are_operations(kind):
    model = kind()
    attributes, names = [list(vars(module)) for module in model.modules()], set(globals())
    flow = traced_flow(model)
    assert flow.first(find_weights(model)) == {"stem.weight"}
    assert flow.last(find_weights(model)) == {"head.weight"}
    assert [step.parameters for step in flow.steps if "stem.weight" in step.parameters]
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert set(globals()) == names
    with torch.no_grad():
        assert model(torch.ones(2, 4)).shape == (2, 2)
