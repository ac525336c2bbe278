"""What the documentation says runs: README, pages, docstrings, examples and notebooks."""

import doctest
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sparsifai import Recipe

from test_package import OF_THE_CORE  # isort: skip

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("module", OF_THE_CORE)
def test_docstring_examples(module):
    assert doctest.testmod(import_module(module)).failed == 0


def run(path, *arguments, folder):
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, str(path), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def blocks_of(page):
    """The Python blocks of a Markdown file, each on its own lines, so that an error names the line of the file."""
    return python_of((ROOT / page).read_text())


def python_of(markdown):
    lines, within = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            within = line == "```python"
            lines.append("")
        else:
            lines.append(line if within else "")
    return "\n".join(lines)


# Run in one process, as importing fastai takes longer than most pages. Each page has a namespace and a folder of its
# own; what it adds to the registries is named differently on every page.
RUN_PAGES = """
import os, sys, traceback
from pathlib import Path

failed = []
for number, source in enumerate(sorted(Path.cwd().glob("*.py"))):
    folder = Path(f"{source.name}.folder")
    folder.mkdir()
    os.chdir(folder)
    try:
        exec(compile(source.read_text(), source.stem, "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        failed.append(source.stem)
    os.chdir(source.parent)
sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
"""


def run_pages(codes, folder):
    """Run what the pages say, each with its blocks in order. codes: name -> Python."""
    for name, code in codes.items():
        (folder / f"{name.replace('/', '-')}.py").write_text(code)
    runner = folder / "run_pages"
    runner.write_text(RUN_PAGES)
    return run(runner, folder=folder)


def links_of(markdown):
    """Targets of the links and pictures of a page, without those in code."""
    prose = re.sub(r"^```.*?^```$|^    .*?$|`[^`]*`", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors_of(markdown):
    """What a link to a heading of a page may end with, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, markdown):
    """Links of a page to files that are not there, or to headings that a page has not."""
    broken = []
    for link in links_of(markdown):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    return broken


def test_there_are_pages():
    assert [Path(page).name for page in PAGES] == [
        "README.md",
        "CONTRIBUTING.md",
        "cost.md",
        "defaults.md",
        "distributed.md",
        "export.md",
        "fastai.md",
        "four_questions.md",
        "from_fasterai.md",
        "from_sparseml.md",
        "index.md",
        "recipes.md",
        "torch.md",
        "training.md",
    ]
    without_code = {"docs/cost.md", "docs/defaults.md", "docs/index.md"}
    assert {page for page in PAGES if not blocks_of(page).strip()} == without_code


@pytest.mark.fastai
@pytest.mark.slow
def test_the_blocks_of_the_pages_run_in_order(tmp_path):
    pytest.importorskip("fastai", reason="the pages use fastai")
    result = run_pages({page: blocks_of(page) for page in PAGES}, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.folder"))) == len(PAGES)


def test_a_block_that_fails_is_told_with_its_page_and_line(tmp_path):
    page = "# A page\n\n```python\none = 1\n```\n\n```yaml\nan error\n```\n\n```python\nassert one == 2\n```\n"
    result = run_pages({"docs/good.md": "pass", "docs/page.md": python_of(page)}, tmp_path)
    assert result.returncode == 1
    assert 'File "docs-page.md", line 12' in result.stderr
    assert result.stderr.endswith("failed: docs-page.md\n")


def test_the_readme_hides_nothing_and_is_short():
    text = (ROOT / "README.md").read_text()
    assert "<!--" not in text
    assert 6_000 <= len(text.encode()) <= 8_000


def test_recipes_of_the_pages_can_be_read():
    markdown = "".join((ROOT / page).read_text() for page in PAGES)
    recipes = re.findall(r"```yaml\n(.*?)```", markdown, re.DOTALL)
    assert recipes
    for text in recipes:
        assert Recipe.loads(text).steps


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page, (ROOT / page).read_text()) == []


def test_a_broken_link_is_found():
    text = "[a](four_questions.md#the-four-questions) [b](none.md) [c](torch.md#none) [d](https://none.ai) [e](#none)"
    assert broken_links("docs/fastai.md", text) == ["none.md", "torch.md#none", "#none"]


def test_the_readme_and_the_index_lead_to_all_pages():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == {Path(link).name for link in links_of((ROOT / "README.md").read_text()) if link.startswith("docs/")}
    assert pages - {"index.md"} <= set(links_of((ROOT / "docs/index.md").read_text()))


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
