import pytest

from sparsifai import contexts, criteria, granularities, quantities, schedules


@pytest.fixture
def registering():
    """What a test registers is forgotten after it."""
    registries = (granularities, contexts, criteria, schedules, quantities)
    before = [dict(registry) for registry in registries]
    yield
    for registry, functions in zip(registries, before, strict=True):
        registry._functions.clear()
        registry._functions.update(functions)
