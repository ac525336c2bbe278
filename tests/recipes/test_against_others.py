"""The readers of recipes beside independent ones: PyYAML's safe_load, and Python's own arithmetic."""

import random
import re
from collections import Counter
from contextlib import suppress
from math import isfinite

import pytest
import yaml

from sparsifai.recipes.expression import evaluate
from sparsifai.recipes.safe_yaml import load_yaml

# --- YAML -------------------------------------------------------------------------------------------------------------

SCALARS = [
    "a", "1", "-1", "1.5", "1e5", "1e-5", ".5", "5.", "0x1f", "0b11", "0o7", "07", "1_000", "true", "yes", "on",
    "off", "~", "", "null", "2:4", "1:30", "12:30:45", "2001-12-14", ".inf", ".nan", '"q"', "'s'",
    '"\\n\\x41\\u00e9"', "=", "<<", "a b", "a#b", "a #c", "é", "!!str 1", '!!int "3"', "!!float 3", "!!bool yes",
    "!!null x", "!!binary aGk=", "!!set {a}", "*a", "!!python/object:os.system x", "!x y", "&a b", "@", "`", "%",
    "|\n    x\n    y", ">\n    x", "- ", "?", '"', "[", "]", "{", "}", "0.1", "1e400", "1.e+3", "+1", "+.5", "0",
    "-0", "00", "08", "1__0", "._1", "1.2.3", "\ufeff", "\x85", "\u2028", "\t", "y", "n", "NO", "TRUE", '"\\ud800"',
    "0x", "9" * 50, "1e", "e1", ".", "..", "...", "---",
]  # fmt: skip
MUTATIONS = ["", " ", "\n", ":", "-", '"', "\t", "#", "&", "*", "!", "{", "[", ",", "\x00", "\x1b", "\r"]

# What the two may read as different values -> why.
DIFFERENCES = {
    ("str", "int"): "numbers to the base of sixty and of two are text: 2:4 is a context, not 124",
    ("str", "float"): "so are fractions to the base of sixty",
    ("str", "date"): "dates are text",
    ("float", "str"): "1e-5 and +.5 are numbers, as in YAML 1.2",
}
# Why only this library refuses a text: what a refusal has.
ONLY_REFUSED_HERE = [
    "is not a finite number", "the recipe is empty", "is not allowed", "surrogate pair", "a second time",
    "must stand for", "a key must be a single value", "levels",
]  # fmt: skip


def flow(chance, depth):
    kind = chance.random()
    if depth and kind < 0.25:
        return f"[{', '.join(flow(chance, depth - 1) for _ in range(chance.randrange(4)))}]"
    if depth and kind < 0.5:
        pairs = (f"{chance.choice(SCALARS)}: {flow(chance, depth - 1)}" for _ in range(chance.randrange(4)))
        return f"{{{', '.join(pairs)}}}"
    return chance.choice(SCALARS)


def block(chance, depth, indent=0):
    kind, lead = chance.random(), "\n" + " " * indent
    if depth and kind < 0.35:
        items = (block(chance, depth - 1, indent + 2).lstrip("\n") for _ in range(chance.randrange(1, 3)))
        return "".join(f"{lead}- {item}" for item in items)
    if depth and kind < 0.8:
        keys = (
            f"{lead}{chance.choice(SCALARS)}:{chance.choice([' ', ' ', '  ', ''])}"
            for _ in range(chance.randrange(1, 4))
        )
        return "".join(f"{key}{block(chance, depth - 1, indent + 2)}" for key in keys)
    return flow(chance, 2)


def mutated(chance, text):
    characters = list(text)
    for _ in range(chance.randrange(1, 4)):
        if characters:
            characters[chance.randrange(len(characters))] = chance.choice(MUTATIONS)
    return "".join(characters)


def differences(own, other):
    """The types of what differs between two values."""
    if type(own) is type(other) is dict and len(own) == len(other):
        for pair, other_pair in zip(own.items(), other.items(), strict=True):
            yield from differences(list(pair), list(other_pair))
    elif type(own) is type(other) is list and len(own) == len(other):
        for each, other_each in zip(own, other, strict=True):
            yield from differences(each, other_each)
    elif type(own) is not type(other) or own != other:
        yield type(own).__name__, type(other).__name__


@pytest.mark.parametrize("seed", range(4))
def test_yaml_is_read_as_pyyaml_reads_it_or_refused(seed):
    chance, counts = random.Random(seed), Counter()
    for _ in range(1000):
        text = block(chance, 3).lstrip("\n")
        text = mutated(chance, text) if chance.random() < 0.3 else text
        known, refusal = True, ""
        try:
            other = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError):
            known = False
        try:
            own = load_yaml(text).value
        except ValueError as error:
            refusal = str(error)
        counts[known, not refusal] += 1
        assert not refusal or refusal.startswith("line "), text
        if known and refusal:
            counts["only here"] += any(reason in refusal for reason in ONLY_REFUSED_HERE)
        elif known:
            assert set(differences(own, other)) <= DIFFERENCES.keys(), text
        elif not refusal:
            assert "=" in text, text  # PyYAML knows no value for a mere =; here it is text
    assert counts[True, True] > 80
    assert counts[True, False] == counts["only here"]


# --- Arithmetic -------------------------------------------------------------------------------------------------------

VARIABLES = {"a": 3, "b": 0.25, "c": -7, "zero": 0}


def arithmetic(chance, depth):
    kind = chance.random()
    if not depth or kind < 0.2:
        number = chance.choice([chance.randrange(100), round(chance.uniform(0, 99), 3), 10 ** chance.randrange(60)])
        return chance.choice([repr(number), chance.choice([*VARIABLES])])
    first, second = arithmetic(chance, depth - 1), arithmetic(chance, depth - 1)
    if kind < 0.7:
        return f"({first} {chance.choice(['+', '-', '*', '/', '//', '%'])} {second})"
    if kind < 0.8:
        return f"({first}) ** {chance.choice([0, 1, 2, 3, 0.5, -1])}"
    if kind < 0.9:
        return f"{chance.choice(['abs', 'int', 'float', 'round'])}({first})"
    return chance.choice([f"-{first}", f"+{first}", f"min({first}, {second})", f"max({first}, {second}, 1)"])


@pytest.mark.parametrize("seed", range(4))
def test_arithmetic_has_the_value_of_python_or_is_refused(seed):
    chance, equal = random.Random(seed), 0
    for _ in range(1000):
        expression = arithmetic(chance, chance.randrange(6))
        expected = None
        with suppress(ArithmeticError, TypeError, ValueError):  # int(nan), a complex power
            expected = eval(expression, {}, dict(VARIABLES))
        own, refusal = None, ""
        try:
            own = evaluate(expression, VARIABLES)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            has_no_value = isinstance(expected, complex | None) or not isfinite(expected)
            assert has_no_value or re.search("1e100|characters|deeper", refusal), expression
            continue
        equal += 1
        assert (type(own), own) == (type(expected), expected), expression
    assert equal > 600
