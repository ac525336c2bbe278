"""The messages of all errors of this folder."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsifai.support.checks import (
    check_count,
    check_fraction,
    check_is_module,
    check_number,
    check_round_to,
    check_seed,
)
from sparsifai.support.files import open_regular, read_bytes, write_whole
from sparsifai.support.registry import Registry

ROOT = str(Path(__file__).parent)
INF, NAN = float("inf"), float("nan")


def red():
    return "ff0000"


def colours(names=("red", "sky blue")):
    registry = Registry("colour")
    for name in names:
        registry.register(red, name=name)
    return registry


FRACTION = "sparsity must be a number from 0 to 1, not "
NUMBER = "tolerance must be a number "
COUNT = "every must be a whole number of at least 1, not "
ROUND_TO = "round_to must be a whole number of at least 1, a number of groups, not "

# Name, mistake, class of the error, message.
MESSAGES = [
    ("a word for a fraction", partial(check_fraction, "half"), TypeError, f"{FRACTION}'half'"),
    ("True for a fraction", partial(check_fraction, True), TypeError, f"{FRACTION}True"),
    ("numpy's True for a fraction", partial(check_fraction, np.bool_(True)), TypeError, FRACTION),
    ("several fractions", partial(check_fraction, torch.ones(2)), TypeError, FRACTION),
    (
        "another name, and what else may be given",
        partial(check_fraction, None, "initial_sparsity", ", or a dictionary"),
        TypeError,
        "initial_sparsity must be a number from 0 to 1, or a dictionary, not None",
    ),
    (
        "a percentage",
        partial(check_fraction, 50),
        ValueError,
        "sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %",
    ),
    ("more than 100 %", partial(check_fraction, 101), ValueError, "sparsity 101.0 is not a fraction from 0 to 1"),
    ("a negative fraction", partial(check_fraction, -0.1), ValueError, "sparsity -0.1 is not a fraction from 0 to 1"),
    ("NaN for a fraction", partial(check_fraction, NAN), ValueError, "sparsity nan is not a fraction from 0 to 1"),
    (
        "a dictionary for a model",
        partial(check_is_module, "shrink", "model", {}),
        TypeError,
        "shrink: model must be a torch.nn.Module, not dict; for a Learner, pass learn.model",
    ),
    (
        "a number that is too small",
        partial(check_number, "tolerance", -1),
        ValueError,
        f"{NUMBER}of at least 0, not -1",
    ),
    (
        "a number that is too large",
        partial(check_number, "tolerance", 2, 0, 1),
        ValueError,
        f"{NUMBER}from 0 to 1, not 2",
    ),
    ("NaN", partial(check_number, "tolerance", NAN), ValueError, f"{NUMBER}of at least 0, not nan"),
    ("a word for a number", partial(check_number, "tolerance", "a"), ValueError, f"{NUMBER}of at least 0, not 'a'"),
    ("infinity", partial(check_number, "tolerance", INF), ValueError, "tolerance must be a finite number, not inf"),
    ("a word for a seed", partial(check_seed, "a"), TypeError, "seed must be a whole number, not 'a'"),
    ("True for a seed", partial(check_seed, True), TypeError, "seed must be a whole number, not True"),
    ("none of something", partial(check_count, "every", 0), ValueError, f"{COUNT}0"),
    ("one and a half", partial(check_count, "every", 1.5), ValueError, f"{COUNT}1.5"),
    ("True for a count", partial(check_count, "every", True), ValueError, f"{COUNT}True"),
    ("a multiple of 0 groups", partial(check_round_to, 0), ValueError, f"{ROUND_TO}0"),
    ("a multiple of True groups", partial(check_round_to, True), ValueError, f"{ROUND_TO}True"),
    (
        "a name with a spelling mistake",
        partial(colours().resolve, "rad"),
        ValueError,
        "unknown colour 'rad'; did you mean 'red'?",
    ),
    (
        "a name with a spelling mistake of two others",
        partial(colours(["red", "rod"]).resolve, "rad"),
        ValueError,
        "unknown colour 'rad'; did you mean 'rod' or 'red'?",
    ),
    (
        "another name",
        partial(colours().resolve, "xyz"),
        ValueError,
        "unknown colour 'xyz'; choose from 'red', 'sky blue'",
    ),
    ("a wrong key", partial(colours().__getitem__, "rad"), KeyError, "unknown colour 'rad'; did you mean 'red'?"),
    (
        "a number for a function",
        partial(colours().resolve, 3),
        TypeError,
        "a colour must be a registered name or a function, not 3",
    ),
    (
        "a name that is registered",
        partial(colours().register, red),
        ValueError,
        "colour 'red' is already registered; choose another name, or pass replace=True to replace it",
    ),
    (
        "a function without a name",
        partial(colours().register, lambda: 1),
        ValueError,
        "has no name of its own; pass name=",
    ),
    (
        "a folder for a file to write",
        partial(write_whole, ROOT, print),
        IsADirectoryError,
        f"it is a folder; pass the name of a file: '{ROOT}'",
    ),
    (
        "a device for a file to write",
        partial(write_whole, "/dev/null", print),
        OSError,
        "it is a device; pass the name of a regular file: '/dev/null'",
    ),
    (
        "a folder that is not there",
        partial(write_whole, f"{ROOT}/none/file", print),
        FileNotFoundError,
        f"the folder does not exist; create it first: '{ROOT}/none'",
    ),
    ("a folder for a file to read", partial(open_regular, ROOT), IsADirectoryError, "it is a folder; pass the name of"),
    (
        "a file that is too large",
        partial(read_bytes, __file__, 10, "a recipe"),
        ValueError,
        f"{__file__} has more than 10 bytes, which is the limit for a recipe; is it another file?",
    ),
    (
        "registering a word",
        partial(colours().register, "blue"),
        TypeError,
        "colour registry: 'blue' is not a function",
    ),
]


@pytest.mark.parametrize(
    ("mistake", "error", "message"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES]
)
def test_errors(mistake, error, message):
    with pytest.raises(error) as raised:
        mistake()
    assert type(raised.value) is error
    assert message in (str(raised.value) if isinstance(raised.value, OSError) else str(raised.value.args[0]))
