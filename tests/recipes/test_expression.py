"""Arithmetic in recipes."""

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most_calls

from sparsifai.recipes.expression import evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("7 // 2 + 7 % 4", 6),
        ("eval(epochs * 0.5)", 15.0),
        ("  eval( epochs )  ", 30),
        ("end - start", 18.0),
        ("max(epochs, 40) + min(1, 2)", 41),
        ("round(10 / 3, 2) + round(2.6) + int(2.9) + abs(-1) + float(1)", 3.33 + 3 + 2 + 1 + 1),
        ("epochs\n/ 3", 10.0),
    ],
)
def test_by_hand(expression, value):
    variables = {"epochs": 30, "start": "eval(epochs * 0.1)", "end": "start * 7", "unused": "what is this"}
    result = evaluate(expression.replace("\n", " "), variables)
    assert result == pytest.approx(value)
    assert type(result) is type(value)


NUMBERS = st.one_of(st.integers(0, 99), st.floats(0, 99, allow_subnormal=False).map(lambda value: round(value, 3)))
EXPRESSIONS = st.recursive(
    st.one_of(NUMBERS.map(repr), st.sampled_from(["a", "b"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda part: f"({' '.join(part)})"
        ),
        st.tuples(inner, st.integers(0, 3)).map(lambda part: f"({part[0]}) ** {part[1]}"),
        inner.map("-{}".format),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda part: f"{part[0]}({part[1]}, {part[2]})"),
        st.tuples(st.sampled_from(["abs", "int", "float", "round"]), inner).map(lambda part: f"{part[0]}({part[1]})"),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_the_value_is_that_of_python(expression):
    names = {"a": 3, "b": 0.25}
    try:
        expected = eval(expression, {}, dict(names))
    except ArithmeticError:
        with pytest.raises(ValueError, match="expression"):
            evaluate(expression, names)
        return
    problem, result = "", None
    try:
        result = evaluate(expression, names)
    except ValueError as error:
        problem = str(error)
    if problem:
        assert re.search("beyond 1e100|characters", problem)
    else:
        assert result == expected
        assert type(result) is type(expected)


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "9**9**9**9**9**9", "(10**50)**3", "1 + " * 2000 + "1", "-" * 400 + "1", "1 << 9999999999"],
)
def test_hostile_expressions_are_refused_at_once(expression):
    with at_most_calls(10_000), pytest.raises(ValueError, match="^expression "):
        evaluate(expression, {})


def test_variables_that_are_nested_too_deeply_are_refused():
    variables = {f"v{number}": "+".join([f"v{number - 1}"] * 45) if number else 1 for number in range(49)}
    with pytest.raises(ValueError, match="it and its variables are nested too deeply"):
        evaluate("v48", variables)


def test_growing_variables_are_computed_once_and_limited():
    doubled = {"v0": 1} | {f"v{i}": f"v{i - 1} + v{i - 1}" for i in range(1, 45)}
    assert evaluate("v44", doubled) == 2**44
    squared = {"v0": 9} | {f"v{i}": f"v{i - 1} * v{i - 1}" for i in range(1, 45)}
    with pytest.raises(ValueError, match="beyond 1e100"):
        evaluate("v44", squared)
    chain = {"v0": 1} | {f"v{i}": f"v{i - 1}" for i in range(1, 1000)}
    with pytest.raises(ValueError, match="more than 50 variables"):
        evaluate("v999", chain)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_number_or_an_error(text):
    with suppress(ValueError):
        assert isinstance(evaluate(text, {"a": 2}), (int, float))
