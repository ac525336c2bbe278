import ast
import builtins
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from dataclasses import is_dataclass
from importlib import import_module

import pytest

import sparsifai

MODULES = [module.name for module in pkgutil.walk_packages(sparsifai.__path__, "sparsifai.")]
NEED_FASTAI = (
    "all",
    "sparsify",
    "distill",
    "freeze",
    "keep",
    "display",
    "lottery",
    "lottery_run",
    "quantize_callback",
    "regularize",
    "rewind",
)
# Integrations, each of which needs its library.
NEED_OTHERS = ("trainer", "lightning", "pytorch_lightning", "accelerate")
OF_THE_CORE = [name for name in MODULES if name.rpartition(".")[2] not in (*NEED_FASTAI, *NEED_OTHERS)]
assert len(MODULES) > 60


def imported(module):
    """A module by its name; the test is skipped if the module needs fastai and that is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "fastai":
            raise
        return pytest.skip("this module needs fastai")


def loaded_after(code):
    """Modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_face_imports_nothing_heavy_until_a_name_is_used():
    loaded = loaded_after("import sparsifai; sparsifai.__version__, dir(sparsifai)")
    assert not loaded & {"torch", "numpy", "yaml", "fastai", "sparsifai.public"}
    assert "torch" in loaded_after("import sparsifai; sparsifai.Sparsifier")


def test_several_threads_may_use_names_first():
    loaded_after(
        "import sparsifai\n"
        "from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "list(Pool(16).map(lambda name: getattr(sparsifai, name), ['Recipe', *sparsifai.__all__]))"
    )


def test_the_core_works_without_importing_fastai_or_anything_slow():
    loaded = loaded_after(
        "import torch, sparsifai\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "sparsifier = sparsifai.Sparsifier(model, 'filter')\n"
        "sparsifier.sparsify(0.5); str(sparsifier.report())"
    )
    assert not loaded & {"fastai", "fastcore", "matplotlib", "torchvision", "pandas", "sklearn", "scipy", "IPython"}
    assert "sparsifai.model.flow" in loaded


@pytest.mark.slow
def test_importing_adds_nothing_heavy_to_torch():
    heavy = {name.partition(".")[0] for name in loaded_after("import sparsifai.public") - loaded_after("import torch")}
    assert {name for name in heavy if not name.startswith("_")} <= {"sparsifai", *sys.stdlib_module_names, "torch"}


@pytest.mark.fastai
def test_the_callbacks_load_fastai_on_first_use():
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    assert "fastai.learner" in loaded_after("import sparsifai\nsparsifai.SparsifyCallback")
    assert "SparsifyCallback" in dir(sparsifai)
    with pytest.raises(AttributeError, match="module 'sparsifai' has no attribute 'Sparse'"):
        _ = sparsifai.Sparse


def test_the_star_import_brings_every_name_that_does_not_need_fastai():
    names = "names = {}; exec('from sparsifai import *', names); import sparsifai"
    loaded = loaded_after(f"{names}; assert {{*names}} - {{'__builtins__'}} == {{*sparsifai.__all__}}")
    assert "yaml" in loaded  # which Recipe needs
    assert not loaded & {"fastai", "fastcore"}


def test_a_name_is_public_where_it_is_imported_and_where_it_is_listed():
    public = {name for name in vars(import_module("sparsifai.public")) if not name.startswith("__")}
    assert public | {"Recipe"} == set(sparsifai.__all__)
    assert sorted(sparsifai.__all__) == sparsifai.__all__
    assert set(sparsifai.__all__) <= {*dir(sparsifai)}


def test_whoever_imports_one_axis_finds_the_values_of_all():
    module = "from sparsifai.axes.schedule import schedules; from sparsifai.axes import context, criterion, granularity"
    values = "[*schedules, *context.contexts, *criterion.criteria, *granularity.granularities]"
    found = subprocess.run([sys.executable, "-c", f"{module}; print(*{values})"], capture_output=True, text=True)
    registries = (sparsifai.schedules, sparsifai.contexts, sparsifai.criteria, sparsifai.granularities)
    assert found.stdout.split() == [name for registry in registries for name in registry]


@pytest.mark.fastai
def test_the_star_import_of_all_shadows_nothing():
    pytest.importorskip("fastai", reason="beside fastai's star import")
    names = {}
    exec("from sparsifai.all import *", names)  # noqa: S102
    names = {name for name in names if not name.startswith("__")}
    assert names == {*sparsifai.__all__, *sparsifai._NEED_FASTAI}
    assert not names & set(dir(builtins))
    assert not names & set(sys.stdlib_module_names)
    fastai_names = {}
    exec("from fastai.vision.all import *", fastai_names)  # noqa: S102
    # fastai's own star import takes cos from math; ours is the schedule, as in the name's other users.
    assert names & set(fastai_names) <= {"cos"}


def test_every_public_name_is_exported():
    from sparsifai.axes import criterion, data_criteria, schedule

    modules = ((criterion, sparsifai.criteria), (data_criteria, sparsifai.criteria), (schedule, sparsifai.schedules))
    for module, registry in modules:
        functions = {name for name, value in vars(module).items() if registry.get(name) is value}
        assert functions - {"random"} <= set(sparsifai.__all__)
    assert all(hasattr(sparsifai, name) for name in sparsifai.__all__)


@pytest.mark.parametrize("module", OF_THE_CORE)
def test_everything_public_has_a_docstring(module):
    module = imported(module)
    assert module.__doc__
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not own or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                    assert inspect.getdoc(function), f"{name}.{method}"


# --- Sections of docstrings -------------------------------------------------------------------------------------------

# Answers to the four questions are called by the library. Their docstrings give a formula instead of arguments.
REGISTRIES = (sparsifai.granularities, sparsifai.contexts, sparsifai.criteria, sparsifai.schedules)
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def sections_of(docstring):
    """Name of a section of a docstring -> its lines, without their common indent."""
    sections, name = {}, None
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            sections[name := line.rstrip(":")] = []
        elif line and not line.startswith(" "):
            name = None
        elif name:
            sections[name].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in sections.items()}


def entries_of(section):
    """Names before the colons of a section, where a text follows; several names may share an entry."""
    found = re.findall(r"^([\w*]+(?:, [\w*]+)*): +\S", section, re.MULTILINE)
    return {name for names in found for name in names.split(", ")}


def returns_something(function):
    """Whether the code of a function, without that of functions within it, returns anything but None."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)
    return False


def as_written(value):
    """The signature of a function or class, with the `*` and `**` that it passes on."""
    own = inspect.unwrap(value.__init__ if inspect.isclass(value) and "__init__" in vars(value) else value)
    return inspect.signature(own)


def faults_of(value):
    """What the docstring of a function or class lacks."""
    sections = sections_of(inspect.getdoc(value) or "")
    # The results of functions are dataclasses, which users read and do not make.
    title = "Attributes" if is_dataclass(value) else "Args"
    parameters = [
        {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + name
        for name, each in as_written(value).parameters.items()
        if name not in ("self", "cls")
    ]
    given = entries_of(sections.get(title, ""))
    faults = [f"{title}: has no {name}" for name in parameters if name not in given]
    if not is_dataclass(value):
        faults += [f"{title}: has {name}, which is no parameter" for name in sorted(given - {*parameters})]
    if inspect.isfunction(value) and returns_something(value) and not sections.get("Returns"):
        faults.append("Returns: is missing")
    if "Raises" in sections and not entries_of(sections["Raises"]):
        faults.append("Raises: is empty")
    return faults


def public_methods(kind):
    """Name -> function of the methods that a class of this package adds, without fastai's events."""
    events = ("before_", "after_")
    for owner in kind.__mro__:
        for name, value in vars(owner).items() if owner.__module__.startswith("sparsifai.") else ():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not name.startswith(("_", *events)):
                yield name, function


@pytest.mark.fastai
@pytest.mark.parametrize("name", sorted([*sparsifai.__all__, *sparsifai._NEED_FASTAI]))
def test_docstrings_have_an_entry_for_each_parameter_and_say_what_is_returned(name):
    if name in sparsifai._NEED_FASTAI:
        pytest.importorskip("fastai", reason="the callbacks need fastai")
    value = getattr(sparsifai, name)
    is_answer = any(value is each for registry in REGISTRIES for each in registry.values())
    if is_answer or not (inspect.isfunction(value) or inspect.isclass(value)):
        return
    faults = {name: faults_of(value)}
    if inspect.isclass(value):
        faults |= {f"{name}.{method}": faults_of(function) for method, function in public_methods(value)}
    assert {name: found for name, found in faults.items() if found} == {}


def test_what_a_docstring_lacks_is_found():
    def bare(model, *names, **options):
        """Do something."""
        return model

    def empty(model):
        """Do something.

        Args:
            model:
            modle: The model.

        Raises:
            It fails.
        """

    def complete(model, low, high, **options):
        """Do something.

        Args:
            model: The model.
            low, high: The limits.
            **options: The rest,
                which has: a colon.

        Raises:
            ValueError: It fails.
        """

        def inner():
            return model

    assert faults_of(bare) == [
        "Args: has no model", "Args: has no *names", "Args: has no **options", "Returns: is missing",
    ]  # fmt: skip
    assert faults_of(empty) == [
        "Args: has no model", "Args: has modle, which is no parameter", "Raises: is empty",
    ]  # fmt: skip
    assert faults_of(complete) == []
