"""What the documentation says runs: README, docstrings, examples and notebooks."""

import doctest
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from test_package import OF_THE_CORE  # isort: skip

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))


@pytest.mark.parametrize("module", OF_THE_CORE)
def test_docstring_examples(module):
    assert doctest.testmod(import_module(module)).failed == 0


def run(path, *arguments, folder):
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, str(path), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def blocks_of(document):
    """The Python blocks of a Markdown file, joined into one script."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL))


@pytest.mark.fastai
@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_blocks_of_the_documents_run_in_order(document, tmp_path):
    pytest.importorskip("fastai", reason="the documents use fastai")
    code = blocks_of(document)
    assert code
    script = tmp_path / "script.py"
    script.write_text(code)
    result = run(script, folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.fastai
@pytest.mark.slow
def test_the_main_job(tmp_path):
    pytest.importorskip("fastai", reason="the main job trains with fastai")
    picture = tmp_path / "digits.png"
    result = run(ROOT / "examples/digits.py", "--epochs", "2", "--picture", str(picture), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.rindex("accuracy") :].splitlines()[1:7]
    sparsities = [float(re.findall(r"([\d.]+)%", line)[1]) for line in table]
    targets = [0, 90, 50, 70, 60, 82.0]
    assert sparsities == pytest.approx(targets, abs=1.5)
    assert picture.stat().st_size > 10_000


def test_the_plain_torch_loop(tmp_path):
    pytest.importorskip("sklearn", reason="the loop trains on scikit-learn's digits")
    result = run(ROOT / "examples/torch_loop.py", "--epochs", "2", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "90.00%" in result.stdout


@pytest.mark.fastai
def test_the_pets_example_says_clearly_when_the_data_cannot_be_had(tmp_path):
    pytest.importorskip("fastai", reason="the example trains with fastai")
    # A proxy that nobody answers at stands for a machine without internet.
    os.environ["https_proxy"] = "http://127.0.0.1:9"
    try:
        result = run(ROOT / "examples/pets.py", folder=tmp_path)
    finally:
        del os.environ["https_proxy"]
    assert result.returncode == 1
    assert "The PETS data could not be downloaded" in result.stderr
    assert "Traceback" not in result.stderr


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == [
        "01_quickstart.ipynb",
        "02_granularity.ipynb",
        "03_criteria_and_schedules.ipynb",
        "04_in_a_fastai_project.ipynb",
        "05_pruning_at_initialization.ipynb",
        "06_nm_and_blocks.ipynb",
        "07_lottery_ticket.ipynb",
        "08_compound.ipynb",
        "09_recipes.ipynb",
        "10_from_zeros_to_speed.ipynb",
    ]


@pytest.mark.fastai
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_are_stored_with_their_outputs(path):
    pytest.importorskip("fastai", reason="the notebooks train with fastai")
    nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(output.get("data", {}).get("image/png") for cell in code for output in cell.outputs)
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 600_000
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
