"""The notebooks run, are stored with their outputs, and tell a story: a goal, what is seen, what to try next.

Notebooks are stored as they run with the settings of their cell that is tagged `parameters`, and are tested with
smaller ones and generated pictures; tests/notebook.py says how their outputs are stored after a change.
"""

import ast
import json
import re
from pathlib import Path

import pytest
from forked import run
from notebook import tagged, text_of
from pictures import draw_pictures
from test_documentation import broken_links

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))

# What stands in the place of a notebook's settings, so that it does not take long. Where it has a `folder`, the tests
# make one, of 20 pictures of each class for training and 20 for validation.
SMALL = {
    "01_quickstart": {"folder": "", "per_class": 20, "epochs": 2},
    "02_granularity": {"digits": 520, "epochs": 1, "seeds": 1},
    "03_criteria_and_schedules": {"digits": 520, "epochs": 1, "seeds": 1},
    "04_in_a_fastai_project": {"folder": "", "per_class": 20, "epochs": 3},
    "05_pruning_at_initialization": {"digits": 520, "epochs": 1, "seeds": 1, "many_steps": 3},
    "06_nm_and_blocks": {"digits": 520, "epochs": 1, "seeds": 1},
    "07_lottery_ticket": {"digits": 520, "epochs": 1, "seeds": 2},
    "08_compound": {"folder": "", "per_class": 20, "few": 12, "epochs": 1, "student_epochs": 2, "seeds": 1},
    "09_recipes": {"digits": 520},
    "10_from_zeros_to_speed": {"folder": "", "per_class": 20, "epochs": 2, "inner": 1024},
    "11_transformers": {"digits": 520, "epochs": 4},
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder, train=20, test=20)
    return folder


def small(name, pictures):
    return {**SMALL[name], **({"folder": str(pictures)} if "folder" in SMALL[name] else {})}


def cells_of(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source_of(cell):
    return "".join(cell["source"])


def outputs_of(path):
    return [output for cell in cells_of(path, "code") for output in cell["outputs"]]


def prose_of(path):
    """Without code, formulas, links and the rows of tables."""
    text = "\n".join(source_of(cell) for cell in cells_of(path, "markdown"))
    other = r"^```.*?^```$|`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|^\|.*?$"
    return re.sub(other, "", text, flags=re.DOTALL | re.MULTILINE)


NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def numbers_in(text):
    return [number.rstrip(",").replace(",", "") for number in NUMBER.findall(text)]


def numbers_shown(path):
    """All numbers of the code and of what it has shown, and the percentages that fractions are."""
    texts = [source_of(cell) for cell in cells_of(path, "code")]
    for output in outputs_of(path):
        texts.append(text_of([output]))
        texts.append(re.sub(r"<[^>]*>", " ", "".join(output.get("data", {}).get("text/html", ""))))
        texts.append("".join(output.get("data", {}).get("text/markdown", "")).replace("<td>", " "))
    shown = [float(number) for text in texts for number in numbers_in(text)]
    return shown + [100 * number for number in shown]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)


@each_notebook
def test_a_notebook_is_stored_with_its_outputs(path):
    code = cells_of(path, "code")
    outputs = outputs_of(path)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 600_000
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps(outputs))
    (parameters,) = [cell for cell in code if tagged(cell, "parameters")]
    assert parameters in code[:2]
    # Whole numbers, none of which is smaller in the notebook than here, and texts, which are empty.
    stored = {each.targets[0].id: ast.literal_eval(each.value) for each in ast.parse(source_of(parameters)).body}
    assert stored.keys() == SMALL[path.stem].keys()
    for name, value in SMALL[path.stem].items():
        assert stored[name] == value if isinstance(value, str) else stored[name] > value


@each_notebook
def test_a_story_begins_with_its_goal_and_ends_with_what_to_try(path):
    first, *_, last = cells_of(path, "markdown")
    assert re.match(r"# .+\n\n", source_of(first))
    assert "At the end you have" in source_of(first)
    assert re.match(r"# %pip install .*sparsifai", source_of(cells_of(path, "code")[0]))
    assert source_of(last).startswith("## Try next\n")
    assert re.search(r"\]\(\w+\.ipynb\)", source_of(last)) or path == NOTEBOOKS[-1]
    assert re.search(r"\]\(\.\./docs/\w+\.md", source_of(last))
    assert "https://arxiv.org/abs/" in "".join(source_of(cell) for cell in cells_of(path, "markdown"))


@each_notebook
def test_the_code_of_a_story_is_for_reading(path):
    for cell in cells_of(path, "markdown") + cells_of(path, "code"):
        long = [line for line in source_of(cell).splitlines() if len(line) >= 100 and not line.startswith("|")]
        assert long == []
    for cell in cells_of(path, "code"):
        nodes = list(ast.walk(ast.parse(source_of(cell))))
        assert not any(isinstance(node, ast.Assert) for node in nodes), "a notebook shows what a test asserts"
        filters = [node for node in nodes if getattr(node, "attr", "") in ("filterwarnings", "simplefilter")]
        assert not filters, "a filter hides warnings of this library, too"


@each_notebook
def test_a_story_shows_tables_and_pictures_rather_than_raw_values(path):
    for output in outputs_of(path):
        if not output.get("data", {}).keys() & {"text/html", "text/markdown", "image/png"}:
            assert not re.search(r"^\s*(tensor\(|array\(|\[|\{|\(#\d+\) \[)", text_of([output]), re.MULTILINE)


@each_notebook
def test_the_numbers_of_a_story_are_shown(path):
    shown = numbers_shown(path)

    def is_shown(number):
        decimals = len(number.partition(".")[2])
        return any(abs(float(number) - each) <= 0.5 * 10**-decimals + 1e-9 for each in shown)

    assert [number for number in numbers_in(prose_of(path)) if not is_shown(number)] == []


@each_notebook
def test_links_of_a_story_lead_somewhere(path):
    text = "\n".join(source_of(cell) for cell in cells_of(path, "markdown"))
    assert broken_links(f"nbs/{path.name}", text) == []


@pytest.mark.fastai
@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path, pictures):
    pytest.importorskip("fastai", reason="the notebooks train with fastai")
    pytest.importorskip("IPython", reason="comes with ipykernel")
    result = run(ROOT / "tests/notebook.py", path, json.dumps(small(path.stem, pictures)), folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.fastai
@pytest.mark.slow
def test_a_registry_that_is_not_as_stored_is_told(tmp_path):
    pytest.importorskip("IPython", reason="comes with ipykernel")
    outputs = [{"output_type": "stream", "name": "stdout", "text": ["<schedule: one_shot, lin>\n"]}]
    source = ["from sparsifai import schedules\n", "print(schedules)"]
    cell = {"cell_type": "code", "metadata": {"tags": ["registry"]}, "source": source, "outputs": outputs}
    path = tmp_path / "stale.ipynb"
    path.write_text(json.dumps({"cells": [cell]}))
    result = run(ROOT / "tests/notebook.py", path, "{}", folder=tmp_path)
    assert result.returncode == 1
    assert "stale.ipynb is stale" in result.stderr


@pytest.mark.fastai
@pytest.mark.slow
def test_a_notebook_is_stored_from_jupyter_without_the_settings_of_that_run(tmp_path, pictures):
    pytest.importorskip("fastai", reason="the notebooks train with fastai")
    pytest.importorskip("nbclient")
    path = tmp_path / NOTEBOOKS[0].name
    path.write_text(NOTEBOOKS[0].read_text())
    settings = json.dumps(small(path.stem, pictures))
    result = run(ROOT / "tests/notebook.py", path, settings, "--store", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [*map(source_of, cells_of(path, "code"))] == [*map(source_of, cells_of(NOTEBOOKS[0], "code"))]
    assert any("sparsity" in "".join(output.get("data", {}).get("text/html", "")) for output in outputs_of(path))
    assert str(pictures) not in path.read_text()
