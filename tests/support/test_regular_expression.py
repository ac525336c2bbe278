"""Regular expressions of others: the answers are those of Python's `re`, and no expression takes long."""

import re
import time
from hashlib import pbkdf2_hmac
from threading import Thread

import pytest

from sparsifai.support.regular_expression import SHORT, TimeLimit, compiled, is_quick

NAMES = [
    f"encoder.layer.{layer}.{module}.{parameter}"
    for layer in range(12)
    for module in ("attention.self.query", "attention.output.dense", "intermediate.dense", "norm")
    for parameter in ("weight", "bias")
] + ["head", "head.weight", "conv1.weight", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "layer[0].weight"]

# As recipes of SparseML and users have them.
ORDINARY = [
    r".*\.weight", r"encoder\.layer\.[0-9]+\.attention.*", "(?!.*head).*", "(?:.*attention.*|.*dense).weight",
    r".*(?<!norm)\.weight", r".*(query|key|value)\.(weight|bias)$", r"^encoder\.layer\.([0-5]|1[01])\..*", "[^.]*",
    r".*layer\.\d{1,2}\.(?!norm)\w+.*", r"\w+\.weight", r"(?P<name>.*)\.bias", ".*?dense.*?", r"(\w+\.){2,5}weight",
    r".*\b1\b.*", "conv1.weight", "(?=.*self)(?=.*bias).*", r"\x61*", "(?#a remark)head", r"[a-z[]+0\].*",
    r"(?i)HEAD.*", r"(.)\1*",
]  # fmt: skip

# They take exponential or polynomial time in Python's `re`.
HOSTILE = [
    ".*(a|a)*x", "((a+))+x", ".*" * 12 + "x", ".*" * 500 + "x", "(a*)*x", "((a*)*)*x", "(a?){40}a{40}x", "(a|aa)+x",
    "(.*a){20}x", "(?:a|b|ab)*?x", "(?=(a+)+x).*", "(?!(a+)+x).*x", ".*(?<=a)(a|a)*x", "(.?){300}x",
    "(" * 25 + "a" + "*)" * 25 + "x", "(?:(?=.*x)" * 20 + ".*" + ")*" * 20, "(.*a.{200}|.*b.{201}|.*c.{202})x",
    "(a|a)*(?<!a)", "(a|aa|aaa)*c?bb", "((a|a)*b?)*(?!b)(?<!b)", r"(a*)*(b*)*\2bb", "(a{1,1000}){1,1000}bb",
    "|" * 900, "(" * 350 + "a" + ")*" * 350,
]  # fmt: skip


@pytest.mark.parametrize("expression", ORDINARY)
def test_ordinary_expressions(expression):
    limit, python = TimeLimit(60, "too much"), re.compile(expression)
    found = [name for name in NAMES if limit.matches(compiled(expression), name)]
    assert found == [name for name in NAMES if python.fullmatch(name)]
    assert found


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_expressions_have_an_answer_or_are_over_time(expression):
    """Python's `re` would take years for most of them."""
    try:
        answer = TimeLimit(0.2, "too much").matches(compiled(expression), "a" * 150 + "b")
    except ValueError as error:
        answer, message = False, str(error)
        assert "too much" in message or "recursion" in message or "repeated" in message  # noqa: PT017 (either an answer or this error)
    assert not answer


def test_all_matches_together_are_limited():
    limit = TimeLimit(0.2, "too much")

    def many():
        for length in range(1_000_000):
            limit.matches(compiled("(a|a)*(?<!a)"), "a" * (length % 20 + 10))

    with pytest.raises(ValueError, match="^too much$"):
        many()
    with pytest.raises(ValueError, match="^too much$"):
        limit.matches(compiled("a"), "a")


@pytest.mark.parametrize("expression", ["(?R)", "(a(?1)?)", "(?P<n>a(?&n)?)", "(?P<n>a(?P>n)?)", "(a)(?+1)(b)"])
def test_expressions_that_call_themselves_are_refused(expression):
    with pytest.raises(ValueError, match="calls itself"):
        compiled(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(", "missing"),
        ("a" * 1101, "1,101 characters"),
        ("*", "nothing"),
        ("(?x) a", "flag x"),
        ("(?:" * 4 + "a" + "{99})" * 4, "repeated too often"),
        ("(?:" + "(a|b)" * 200 + "){999}", "repeated too often"),
    ],
)
def test_what_is_no_expression(expression, message):
    with pytest.raises(ValueError, match=message):
        compiled(expression)


def test_the_time_of_other_threads_does_not_count():
    limit, begin = TimeLimit(0.2, "too much"), time.process_time()
    busy = Thread(target=pbkdf2_hmac, args=("sha512", b"a", b"b", 400_000))
    busy.start()
    busy.join()
    assert time.process_time() - begin > 0.2
    assert limit.left() > 0


QUICK = [".*layers[.]3[.].*proj.*", "(?:query|key).*", r"\w+\.weight", ".*.*.*x", "(.*).*\\1x"]


@pytest.mark.parametrize("expression", QUICK)
def test_quick_expressions_are_quick(expression):
    assert is_quick(expression)
    for text in ("a" * SHORT, "." * SHORT, "a." * (SHORT // 2), "x" + "a" * (SHORT - 1)):
        assert TimeLimit(1, "too much").matches(compiled(expression), text) in (False, True)


@pytest.mark.parametrize("expression", [each for each in HOSTILE if each != "|" * 900] + ["(a)(?#)*", "(a*)|" * 5])
def test_hostile_expressions_are_not_quick(expression):
    assert not is_quick(expression)
