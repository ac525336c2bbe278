import re
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(EXPRESSIONS)
def test_agrees_with_python(expression):
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
    ("expression", "message"),
    [
        ("9**9**9", "the exponent 387420489 is beyond 100"),
        ("(10**50)**3", "beyond 1e100"),
        ("9**9**9**9**9**9", "beyond"),
        ("10.0**99 * 10**99", "beyond 1e100"),
        ("round(5, -10**9)", "digits is beyond 100"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "expression .0 "),
        ("(-8) ** 0.5", "no number"),
        ("1e999", "no finite number"),
        ("9" * 400, "beyond 1e100"),
        ("1 + " * 2000 + "1", "characters, more than 500"),
        ("-" * 400 + "1", "deeper than 50"),
        ("(" * 240 + "1" + ")" * 240, "arithmetic that can be read"),
        ("", "arithmetic that can be read"),
        ("1 +", "arithmetic that can be read"),
        ("1if 1else 2", "arithmetic that can be read"),
        ("a\0", "arithmetic that can be read"),
        ("True", "no number"),
        ("'a' * 9", "no number"),
        ("[1]", "is not arithmetic"),
        ("a.real", "is not arithmetic"),
        ("a[0]", "is not arithmetic"),
        ("1 < 2", "is not arithmetic"),
        ("1 << 9999999999", "is not arithmetic"),
        ("lambda: 1", "is not arithmetic"),
        ("(a := 3)", "is not arithmetic"),
        ("[x for x in range(9)]", "is not arithmetic"),
        ("__import__('os').system('true')", "is not arithmetic"),
        ("open('/tmp/x')", r"unknown function 'open'; known are 'abs', .*'round'"),
        ("roud(1.5)", "did you mean 'round'"),
        ("max(*a)", "is not arithmetic"),
        ("max(1)", "not iterable"),
        ("max()", "expected at least 1 argument"),
        ("round(1, ndigits=2)", "is not arithmetic"),
        ("epoch * 2", "undefined name 'epoch'; did you mean 'epochs'"),
        ("flag + 1", "'flag' is True, which is no number"),
        ("nothing + 1", "'nothing' is None, which is no number"),
        ("word + 1", r"expression 'linear' \(the value of 'word'\): undefined name 'linear'"),
        ("one + 1", "variables that depend on themselves: one -> two -> three -> one"),
        ("itself", "variables that depend on themselves: itself -> itself"),
    ],
)
def test_what_is_refused_at_once(expression, message):
    variables = {"a": 1, "epochs": 30, "flag": True, "nothing": None, "word": "linear", "itself": "itself + 1"}
    variables |= {"one": "eval(two)", "two": "three", "three": "one * 2"}
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        evaluate(expression, variables)
    assert time.perf_counter() - begun < 1


def test_variables_that_grow_are_computed_once_and_bounded():
    doubled = {"v0": 1} | {f"v{i}": f"v{i - 1} + v{i - 1}" for i in range(1, 45)}
    assert evaluate("v44", doubled) == 2**44
    squared = {"v0": 9} | {f"v{i}": f"v{i - 1} * v{i - 1}" for i in range(1, 45)}
    with pytest.raises(ValueError, match="beyond 1e100"):
        evaluate("v44", squared)
    chain = {"v0": 1} | {f"v{i}": f"v{i - 1}" for i in range(1, 1000)}
    with pytest.raises(ValueError, match="more than 50 variables that depend on each other, from 'v999' on"):
        evaluate("v999", chain)


@given(st.text(max_size=40))
def test_any_text_is_a_number_or_an_error(text):
    with suppress(ValueError):
        assert isinstance(evaluate(text, {"a": 2}), (int, float))


def test_names_in_no_dictionary():
    with pytest.raises(ValueError, match="undefined name 'a'; no variable is defined"):
        evaluate("a", {})
    with pytest.raises(ValueError, match="is no text"):
        evaluate(3, {})
