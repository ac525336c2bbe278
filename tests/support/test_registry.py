import re
from functools import partial

import pytest

from sparsifai.support.registry import Registry, name_of


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


def test_unknown_names_are_answered_with_close_matches(colours):
    with pytest.raises(ValueError, match=re.escape("unknown colour 'rad'; did you mean 'red'?")):
        colours.resolve("rad")
    with pytest.raises(ValueError, match=re.escape("unknown colour 'xyz'; known are 'red', 'sky blue'")):
        colours.resolve("xyz")
    with pytest.raises(KeyError, match="did you mean 'red'"):
        colours["rad"]


def test_what_a_message_calls_a_function():
    assert name_of(int) == "int"
    assert name_of(partial(int, base=2)) == "int(base=2)"


def test_duplicates_are_refused_unless_replaced(colours):
    def red():
        return "cc0000"

    with pytest.raises(ValueError, match="colour 'red' is registered already; choose another name, or pass replace"):
        colours.register(red)
    assert colours["red"]() == "ff0000"
    colours.register(red, replace=True)
    assert colours["red"]() == "cc0000"


def test_what_has_no_name_or_is_no_function_is_refused(colours):
    with pytest.raises(ValueError, match="has no name of its own; pass name="):
        colours.register(lambda: 1)
    with pytest.raises(TypeError, match="'blue' is not a function"):
        colours.register("blue")
    with pytest.raises(TypeError, match="a colour is a registered name or a function, not 3"):
        colours.resolve(3)


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
