"""Names of layers with any characters: tables, warnings, errors and the command line show them escaped."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsifai
from sparsifai import (
    Recipe,
    SparseFile,
    Sparsifier,
    compare,
    load_sparse,
    save_sparse,
    shrink,
    to_sparse_layout,
)
from sparsifai.__main__ import main

NAMES = ["\x1b[2J\x1b]0;title\x07", "a\rb", "a\nb  100%", "\u202eabc", "\x9b2J", "{0}{", "long" * 2000, "<script>"]
SURROGATE = "\udc80"
RECIPE = Recipe({"epochs": 2, "steps": [{"sparsify": {"sparsity": 0.99}}]})
EXAMPLE = torch.ones(2, 8)


def model_of(name):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model = nn.Sequential()
    for module_name, module in {name: body, "head": nn.Linear(8, 2)}.items():
        model.add_module(module_name, module)
    return model


def sparsified(name, **options):
    sparsifier = Sparsifier(model_of(name), **options)
    sparsifier.sparsify(0.5)
    return sparsifier


def constant(name):
    model = model_of(name)
    with torch.no_grad():
        model[0][0].weight.fill_(1)
    Sparsifier(model, context="local").sparsify(0.5)


def not_a_number(name):
    model = model_of(name)
    with torch.no_grad():
        model[0][0].weight.fill_(torch.nan)
    Sparsifier(model).sparsify(0.5)


def frozen(name):
    model = model_of(name)
    model[0].requires_grad_(False)
    return Sparsifier(model, granularity="filter", layers="head")


def with_mask(name, mask):
    sparsifier = Sparsifier(model_of(name))
    sparsifier.set_masks({next(iter(sparsifier.layers)): mask})


def saved(name, folder):
    save_sparse(sparsified(name).model, folder / "sparse.safetensors")
    return folder / "sparse.safetensors"


def loaded_elsewhere(name, folder):
    model = model_of(name)
    model[0][0] = nn.Linear(8, 9)
    load_sparse(saved(name, folder), model)


def reported(name, folder):
    torch.save(model_of(name).state_dict(), folder / "checkpoint.pth")
    return main(["report", str(folder / "checkpoint.pth")]), main(["report", str(saved(name, folder))])


# What is done with a model that has a layer of the name: a result to show, a warning or an error.
WAYS = {
    "report": lambda name, folder: sparsified(name).report(),
    "plan": lambda name, folder: RECIPE.plan(model_of(name), example_input=EXAMPLE),
    "unknown layer": lambda name, folder: Sparsifier(model_of(name), layers="hed"),
    "layer in a recipe": lambda name, folder: Recipe(
        {"steps": [{"sparsify": {"sparsity": 0.5, "layers": [f"{name}x"[:1000]]}}]}).apply(model_of(name)),
    "excluded": lambda name, folder: Sparsifier(model_of(name), exclude=["*"]),
    "dense layers": lambda name, folder: Sparsifier(model_of(name), layers="head").sparsify({f"{name}.*"[:1000]: 0.5}),
    "ties": lambda name, folder: constant(name),
    "NaN": lambda name, folder: not_a_number(name),
    "frozen": lambda name, folder: frozen(name),
    "whole filters": lambda name, folder: sparsified(name, granularity="filter").report(),
    "wrong mask": lambda name, folder: with_mask(name, torch.ones(3, 3).bool()),
    "mask of text": lambda name, folder: with_mask(name, "x"),
    "mask that empties": lambda name, folder: with_mask(name, torch.zeros(8, 8).bool()),
    "missing data": lambda name, folder: sparsified(name, criteria="movement_pruning"),
    "per_output": lambda name, folder: sparsified(name, granularity="filter", context="per_output"),
    "state": lambda name, folder: sparsified("other").load_state_dict(sparsified(name).state_dict()),
    "sparse file": lambda name, folder: SparseFile.read(saved(name, folder)),
    "loaded": lambda name, folder: loaded_elsewhere(name, folder),
    "command line": reported,
    "shrink": lambda name, folder: shrink(sparsified(name, granularity="filter").model, EXAMPLE),
    "layout": lambda name, folder: to_sparse_layout(sparsified(name).model.eval()),
    "compare": lambda name, folder: compare(model_of(name).eval(), sparsified(name).model.eval(), EXAMPLE, repeats=3),
}  # fmt: skip


def shown(way, name, folder, capsys):
    """All that a terminal or a notebook gets to show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = WAYS[way](name, folder)
            # A model itself is shown by torch.
            texts = [] if isinstance(made, nn.Module) else [str(made), getattr(made, "_repr_html_", str)()]
        except Exception as error:
            texts = [str(error)]
    output = capsys.readouterr()
    return [*texts, *(str(each.message) for each in caught), output.out, output.err]


@pytest.mark.parametrize("way", WAYS)
def test_no_name_reaches_a_terminal_as_it_is(way, tmp_path, capsys):
    for name in NAMES:
        usual, texts = shown(way, "usual", tmp_path, capsys), shown(way, name, tmp_path, capsys)
        if way != "compare":  # whose notes are wrapped
            assert [text.count("\n") for text in texts] == [text.count("\n") for text in usual], name
        for text in texts:
            assert all(line.isprintable() for line in text.split("\n")), (name, text)
            assert len(text) < 8000, name
        assert not any("<table" in text and "<script>" in text for text in texts)


@pytest.mark.parametrize("way", WAYS)
def test_a_surrogate_is_shown_as_an_escape_or_refused(way, tmp_path, capsys):
    for text in shown(way, SURROGATE, tmp_path, capsys):
        assert "\udc80" not in text
        assert all(line.isprintable() for line in text.split("\n")), text


def test_a_surrogate_in_a_name_is_not_stored(tmp_path):
    with pytest.raises(ValueError, match=r"the name '.*udc80.*' has half of a surrogate pair, which no file can store"):
        saved(SURROGATE, tmp_path)
    assert not list(tmp_path.iterdir())


# Files whose errors may have a bare name -> why.
BARE_NAMES = {
    "axes/budget.py": "names of contexts",
    "export/safetensors_file.py": "read_tensors and the command line make errors of a file printable",
    "export/sparse_bitmask.py": "read_tensors makes errors of a file printable",
    "export/sparse_format.py": "read_tensors makes errors of a file printable",
    "export/sparse_tensor.py": "read_tensors makes errors of a file printable",
    "gradual/gradual_pruning.py": "names of arguments",
    "model/running.py": "names of arguments",
    "recipes/axis_value.py": "Located.at makes errors of a recipe printable",
    "recipes/reading.py": "names of variables are identifiers",
    "recipes/sparseml/parsing.py": "names of modifiers are letters",
    "sparsifier/copying.py": "names of arguments",
    "support/checks.py": "names of arguments",
    "support/pickles.py": "names of opcodes",
    "training/rewind.py": "the function that checks a state of an optimizer makes its errors printable",
    "training/saved_run.py": "names of settings",
}


def bare_names(text):
    """Lines of errors that put a name into their message as it is: {name}, not {printable(name)} or {name!r}."""
    for error in ast.walk(ast.parse(text)):
        for value in ast.walk(error) if isinstance(error, ast.Raise) else ():
            if isinstance(value, ast.FormattedValue) and value.conversion == -1:
                last = getattr(value.value, "attr", getattr(value.value, "id", ""))
                if last in ("name", "names", "key", "place"):
                    yield error.lineno


def test_errors_show_names_with_printable():
    package = Path(sparsifai.__file__).parent
    found = {
        path.relative_to(package).as_posix(): lines
        for path in package.rglob("*.py")
        if (lines := list(bare_names(path.read_text("utf-8"))))
    }
    assert {file: lines for file, lines in found.items() if file not in BARE_NAMES} == {}
    assert found.keys() == BARE_NAMES.keys()


def test_a_bare_name_is_found():
    assert list(bare_names('x = 1\nraise ValueError(f"no {layer.name}")')) == [2]
    assert not list(bare_names('raise ValueError(f"no {printable(layer.name)}, {name!r}")'))
