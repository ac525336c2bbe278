import functools
from functools import partial

import pytest
from work import at_most_calls

from sparsifai.support.capability import capability
from sparsifai.support.registry import Registry, close_matches, name_of


@pytest.fixture
def colours():
    registry = Registry("colour")

    @registry.register
    def red():
        return "ff0000"

    @registry.register(name="sky blue")
    def blue():
        return "87ceeb"

    return registry


def test_lists_itself_and_resolves_names_and_functions(colours):
    assert list(colours) == ["red", "sky blue"]
    assert repr(colours) == "<colour: red, sky blue>"
    assert repr(Registry("colour", forms=("any of six digits",))) == "<colour: any of six digits>"
    assert len(colours) == 2
    assert colours.resolve("red")() == colours["red"]() == "ff0000"
    own = partial(int, "7")
    assert colours.resolve(own) is own
    assert "red" in colours
    assert "green" not in colours


def test_a_decorated_function_stays_itself(colours):
    def green():
        return "00ff00"

    assert colours.register(green) is green


def test_the_name_of_a_function_in_messages():
    assert name_of(int) == "int"
    assert name_of(partial(int, base=2)) == "int(base=2)"


def test_duplicates_are_refused_unless_replaced(colours):
    def red():
        return "cc0000"

    with pytest.raises(ValueError, match="already registered"):
        colours.register(red)
    assert colours["red"]() == "ff0000"
    colours.register(red, replace=True)
    assert colours["red"]() == "cc0000"


def test_check_and_parse():
    def check(function):
        if function() != 1:
            raise ValueError("must return 1")

    registry = Registry("number", check=check, parse=lambda value: (lambda: value) if isinstance(value, int) else None)
    with pytest.raises(ValueError, match="must return 1"):
        registry.register(lambda: 2, name="two")
    assert "two" not in registry
    with pytest.raises(ValueError, match="must return 1"):
        registry.resolve(lambda: 2)
    assert registry.resolve(5)() == 5


def test_capabilities_become_attributes_and_unknown_ones_are_refused():
    colours = Registry("colour", capabilities=("bright", "warm"))

    @colours.register(bright=True)
    def yellow():
        return "ffff00"

    @functools.wraps(yellow)
    def faded():
        return "ffff99"

    assert yellow.bright is True
    assert capability(yellow, "bright", False) is True
    assert capability(faded, "bright", False) is False
    assert colours.register(faded, name="faded", bright=True) is faded
    assert capability(faded, "bright", False) is True
    assert capability(yellow, "warm", False) is False
    with pytest.raises(TypeError, match="colour registry: unknown capability 'cold'; known are 'bright', 'warm'"):
        colours.register(cold=True)


def test_close_matches_of_many_long_names_are_found_with_bounded_work():
    """difflib takes a time that grows with the number of names and the square of their lengths."""
    many = [f"encoder.layer.{layer}.expert.{expert}.weight" for layer in range(100) for expert in range(200)]
    with at_most_calls(1_000_000):
        hint = close_matches("encoder.layer.17.expert.23.wieght", many)
        assert "'encoder.layer.17.expert.23.weight'" in hint
        assert close_matches("nothing like it", many).startswith("the nearest names are '")
        assert close_matches("x" * 100_000, ["y" * 100_000] * 1000 + ["x" * 99_999]).startswith("did you mean 'xxx")
