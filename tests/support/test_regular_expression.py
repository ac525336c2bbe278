"""Regular expressions in linear time: the answers are those of Python's `re`, and the work is bounded."""

import random
import re
import warnings
from contextlib import suppress

import pytest

from sparsifai.support.regular_expression import RegularExpression
from sparsifai.support.work import Work

NAMES = [
    f"encoder.layer.{layer}.{module}.{parameter}"
    for layer in range(12)
    for module in ("attention.self.query", "attention.output.dense", "intermediate.dense", "norm")
    for parameter in ("weight", "bias")
] + ["head", "head.weight", "conv1.weight", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]

# As recipes of SparseML and users have them.
ORDINARY = [
    r".*\.weight", r"encoder\.layer\.[0-9]+\.attention.*", "(?!.*head).*", "(?:.*attention.*|.*dense).weight",
    r".*(?<!norm)\.weight", r".*(query|key|value)\.(weight|bias)$", r"^encoder\.layer\.([0-5]|1[01])\..*", "[^.]*",
    r".*layer\.\d{1,2}\.(?!norm)\w+.*", r"\w+\.weight", r"(?P<name>.*)\.bias", ".*?dense.*?", "", r"(\w+\.){2,5}weight",
    r".*\b1\b.*", "conv1.weight", "(?=.*self)(?=.*bias).*", "(?:(?<=a)a|^a)*", r"\x61*", "(?#a remark)head",
]  # fmt: skip

# They take exponential or polynomial time in Python's `re`.
HOSTILE = [
    ".*(a|a)*x", "((a+))+x", ".*" * 12 + "x", ".*" * 500 + "x", "(a*)*x", "((a*)*)*x", "(a?){40}a{40}x", "(a|aa)+x",
    "(.*a){20}x", "(a*?)*?x", "(?:a|b|ab)*?x", "(?=(a+)+x).*", "(?!(a+)+x).*x", ".*(?<=a)(a|a)*x", "(.?){300}x",
    "(" * 25 + "a" + "*)" * 25 + "x", "(?:(?=.*x)" * 20 + ".*" + ")*" * 20, "(?:(?=(?=.*a)(?=.*b).*c).)*", ".*a.{400}x",
    "(?:(?<=a)(?<!b)(?=.*q).|.)*x", "(.*a.{200}|.*b.{201}|.*c.{202})x", "|" * 900, "(a|" * 25 + "b" + ")+" * 25,
]  # fmt: skip


@pytest.mark.parametrize("expression", ORDINARY)
def test_ordinary_expressions(expression):
    own, python = RegularExpression(expression), re.compile(expression)
    work = Work(200_000, "too much")
    found = [name for name in NAMES if own.matches(name, work)]
    assert found == [name for name in NAMES if python.fullmatch(name)]
    if expression not in ("", "(?:(?<=a)a|^a)*"):
        assert found


@pytest.mark.parametrize("expression", HOSTILE)
def test_the_work_is_linear_in_the_text(expression):
    """Twice the text takes at most twice the work, or with looks ahead at every place four times."""
    own, spent = RegularExpression(expression), []
    for length in (500, 1000):
        work = Work(10**9, "too much")
        assert not (own.matches("a" * length + "b", work) and expression.endswith("x"))
        spent.append(10**9 - work.left)
    assert spent[1] < 1000 * 3000
    assert spent[1] <= spent[0] * (4.1 if "(?=" in expression else 2.1)


def test_spent_work_is_an_error():
    with pytest.raises(ValueError, match="^too much$"):
        RegularExpression(".*a.{400}").matches("ab" * 500, Work(1000, "too much"))


CHARACTERS = [
    "a", "b", "a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", r"\d", "^", "$", r"\b", r"\B", r"\A", r"\Z", "[]a]", "[^]a]",
    r"[\]a]", r"\x61", r"\141", r"\0", "{", "}", r"[a\-b]", "-", "\n", "x{", "{,", "{}", "(?#x)", r"\N{DIGIT ONE}",
]  # fmt: skip
REPETITIONS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{1,2}?", "{,}", "*+", "{0}", "{3,1}"]
OPENINGS = ["(", "(?:", "(?P<n{}>", "(?=", "(?!", "(?<=", "(?<!"]
TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "aab",
    "bba",
    "a.b",
    "abab",
    "a\n",
    "\n",
    "a-b",
    "a1",
    "aaaa",
    "x{",
    "a]",
    "{",
    "b{}a",
    "a{,",
]


def expression_of(chance, depth=3):
    """A random expression, most often a valid one."""

    def item():
        if depth and chance.random() < 0.35:
            part = chance.choice(OPENINGS).format(chance.randrange(10**6)) + expression_of(chance, depth - 1) + ")"
        else:
            part = chance.choice(CHARACTERS)
        return part + (chance.choice(REPETITIONS) if chance.random() < 0.4 else "")

    options = chance.choice([1, 1, 1, 2, 3])
    return "|".join("".join(item() for _ in range(chance.randrange(4))) for _ in range(options))


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions_match_what_they_match_in_python(seed):
    chance, compared = random.Random(seed), 0
    for _ in range(2000):
        expression = expression_of(chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                python = re.compile(expression)
        except re.error:
            python = None
        own = None
        with suppress(ValueError):
            own = RegularExpression(expression)
        if own is None:  # it is not valid, or has a possessive repetition
            assert python is None or re.search(r"[*+?}]\+", expression), expression
            continue
        compared += 1
        assert python is not None, expression
        for text in TEXTS:
            matches = own.matches(text, Work(100_000, "too much"))
            assert matches == (python.fullmatch(text) is not None), (expression, text)
    assert compared > 800
