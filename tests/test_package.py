import builtins
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import sparsifai

MODULES = [module.name for module in pkgutil.walk_packages(sparsifai.__path__, "sparsifai.")]
NEED_FASTAI = ("all", "sparsify", "distill", "freeze", "keep", "display", "lottery", "regularize", "rewind")
OF_THE_CORE = [name for name in MODULES if name.rpartition(".")[2] not in NEED_FASTAI]
assert len(MODULES) > 60


def loaded_after(code):
    """Modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_core_works_without_importing_fastai_or_anything_slow():
    loaded = loaded_after(
        "import torch, sparsifai\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "sparsifier = sparsifai.Sparsifier(model, 'filter')\n"
        "sparsifier.sparsify(0.5); str(sparsifier.report())"
    )
    assert not loaded & {"fastai", "fastcore", "matplotlib", "torchvision", "pandas", "sklearn", "scipy", "IPython"}
    assert "sparsifai.model.flow" in loaded


def test_importing_adds_nothing_heavy_to_torch():
    heavy = {name.partition(".")[0] for name in loaded_after("import sparsifai") - loaded_after("import torch")}
    assert {name for name in heavy if not name.startswith("_")} <= {"sparsifai", *sys.stdlib_module_names, "torch"}


@pytest.mark.fastai
def test_the_callbacks_load_fastai_on_first_use():
    pytest.importorskip("fastai", reason="the callbacks need fastai")
    assert "fastai.learner" in loaded_after("import sparsifai\nsparsifai.SparsifyCallback")
    assert "SparsifyCallback" in dir(sparsifai)
    with pytest.raises(AttributeError, match="module 'sparsifai' has no attribute 'Sparsify'"):
        _ = sparsifai.Sparsify


@pytest.mark.fastai
def test_the_star_import_shadows_nothing():
    pytest.importorskip("fastai", reason="beside fastai's star import")
    names = {}
    exec("from sparsifai.all import *", names)  # noqa: S102
    names = {name for name in names if not name.startswith("__")}
    assert names == set(sparsifai.__all__)
    assert not names & set(dir(builtins))
    assert not names & set(sys.stdlib_module_names)
    fastai_names = {}
    exec("from fastai.vision.all import *", fastai_names)  # noqa: S102
    # fastai's own star import takes cos from math; ours is the schedule, as in the name's other users.
    assert names & set(fastai_names) <= {"cos"}


def test_every_public_name_is_exported():
    from sparsifai.axes import criterion, schedule

    for module, registry in ((criterion, criterion.criteria), (schedule, schedule.schedules)):
        functions = {name for name, value in vars(module).items() if registry.get(name) is value}
        assert functions - {"random"} <= set(sparsifai.__all__)
    assert all(hasattr(sparsifai, name) for name in sparsifai.__all__ if name not in sparsifai._NEED_FASTAI)


@pytest.mark.parametrize("module", OF_THE_CORE)
def test_everything_public_has_a_docstring(module):
    module = import_module(module)
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
