"""The API pages: each public name has an entry, and the example in its docstring runs as the page shows it."""

import ast
import doctest
import inspect
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from page import python_of

import sparsifai
from sparsifai.support.registry import Registry

PAGES = sorted((Path(__file__).parents[1] / "docs/api").glob("*.md"))
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
NEEDED = {
    "learner": ("fastai",),
    "integrations": ("transformers", "lightning", "accelerate"),
    "quantization": ("onnx", "onnxscript", "onnxruntime"),
}
NEEDED_BY_NAME = {
    **dict.fromkeys(("shrink", "shrinkage", "Shrinkage", "save_shrunk", "load_shrunk"), "torch_pruning"),
    "save_pretrained_sparse": "transformers",
    "plot_schedule": "matplotlib",
}
MARKS = {
    "learner": [pytest.mark.fastai],
    "integrations": [pytest.mark.slow, pytest.mark.filterwarnings("ignore")],  # warnings of lightning
}


def entries():
    for page in PAGES:
        marked = MARKS.get(page.stem, ())
        for entry in ENTRY.findall(page.read_text()):
            yield pytest.param(page, entry, id=f"{page.stem}-{entry.removeprefix('sparsifai.')}", marks=marked)


def documented(entry):
    """The object of an entry, and the module and the docstring of its definition."""
    module, _, name = entry.rpartition(".")
    thing = getattr(import_module(module), name)
    if thing is None:  # fastcore's patch leaves nothing behind in the module
        from fastai.learner import Learner, Recorder

        thing = getattr(Learner if hasattr(Learner, name) else Recorder, name)
    if not isinstance(thing, Registry):
        return thing, sys.modules[thing.__module__], inspect.getdoc(thing)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("sparsifai.") and vars(module).get(name) is thing:
            statements = ast.parse(inspect.getsource(module)).body
            for statement, after in zip(statements, statements[1:], strict=False):
                if isinstance(statement, ast.Assign) and statement.targets[0].id == name:
                    return thing, module, ast.literal_eval(after.value)
    raise AssertionError(f"no module defines {entry}")


@cache
def beginning_of(page):
    """The names that the block at the top of a page makes."""
    namespace = {"__name__": "__main__"}
    exec(compile(python_of(page.read_text()), page, "exec"), namespace)
    return namespace


@pytest.mark.fastai
def test_every_public_name_has_one_entry():
    pytest.importorskip("fastai", reason="sparsifai.all has names that need it")
    found = [entry.removeprefix("sparsifai.") for page in PAGES for entry in ENTRY.findall(page.read_text())]
    public = {*sparsifai.__all__, *import_module("sparsifai.all").__all__}
    assert sorted(name for name in found if "." not in name) == sorted(public)
    code = "".join(path.read_text() for path in Path(sparsifai.__file__).parent.glob("callbacks/*.py"))
    methods = re.findall(r"^@patch(?:_to\(\w+\))?\n(?:@.*\n)*def ([a-z]\w*)", code, re.MULTILINE)
    assert {"sparsify", "shrink", "sparsity_report", "plot_sparsity"} <= set(methods)
    assert set(methods) <= {name.rpartition(".")[2] for name in found if name.startswith("callbacks.")}


@pytest.mark.parametrize(("page", "entry"), list(entries()))
def test_the_example_of_a_public_name_runs(page, entry, registering):
    by_name = NEEDED_BY_NAME.get(entry.rpartition(".")[2])
    for library in (*NEEDED.get(page.stem, ()), *([by_name] if by_name else [])):
        pytest.importorskip(library, reason=f"the examples of {page.name} use it")
    thing, module, text = documented(entry)
    example = doctest.DocTestParser().get_doctest(text, beginning_of(page), entry, module.__file__, 0)
    assert 1 <= sum(each.source.count("\n") for each in example.examples) <= 9
    assert doctest.DocTestRunner().run(example).failed == 0
