"""What the documentation says runs: README, pages, docstrings and examples."""

import doctest
import re
from pathlib import Path

import pytest
from forked import run
from page import python_of

from sparsifai import Recipe
from sparsifai.recipes.sparseml.other_steps import LEFT_OUT
from sparsifai.recipes.sparseml.steps import STEPS

from test_package import OF_THE_CORE, imported  # isort: skip

ROOT = Path(__file__).parents[1]
OF_THE_API = {
    name
    for page in ROOT.glob("docs/api/*.md")
    for name in re.findall(r"^::: .*?(\w+)$", page.read_text(), re.MULTILINE)
}
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("module", OF_THE_CORE)
def test_docstring_examples(module):
    module, runner = imported(module), doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(module):
        # test_api.py runs those of public names, which begin as their page does.
        if example.name.removeprefix(f"{module.__name__}.") not in OF_THE_API:
            assert runner.run(example).failed == 0


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


def places_in(navigation):
    """The pages in the navigation of the site, in order."""
    for entry in navigation:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from places_in(entry.values())
        else:
            yield from places_in(entry)


def test_the_site_has_every_page_once():
    yaml = pytest.importorskip("yaml")
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")]
    notebooks = [f"nbs/{path.stem}.md" for path in ROOT.glob("nbs/*.ipynb")]
    others = ["readme.md", "contributing.md", "changelog.md", "examples/scripts.md", "examples/recipes.md"]
    assert sorted(places_in(navigation)) == sorted([*pages, *notebooks, *others])


def test_most_pages_have_code():
    without_code = {f"docs/{name}.md" for name in ("accuracy", "cost", "defaults", "papers")}
    assert {page for page in PAGES if not python_of((ROOT / page).read_text()).strip()} == without_code


def test_the_page_of_papers_has_all():
    """All papers that docstrings, comments and pages name by their number."""
    paper = re.compile(r"(?:arXiv:|arxiv\.org/abs/)(\d+\.\d+)")
    others = [*ROOT.glob("sparsifai/**/*.py"), *(path for path in ROOT.glob("docs/*.md") if path.name != "papers.md")]
    named = {number for path in others for number in paper.findall(path.read_text())}
    assert named
    assert named == set(paper.findall((ROOT / "docs/papers.md").read_text()))


@pytest.mark.fastai
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    pytest.importorskip("fastai", reason="the pages use fastai")
    pytest.importorskip("sklearn", reason="the pages train on scikit-learn's digits")
    if page == "docs/quantization.md":
        pytest.importorskip("onnxruntime", reason="int8 models are onnxruntime's")
    result = run(ROOT / "tests/page.py", ROOT / page, folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_block_that_fails_is_told_with_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\none = 1\n```\n\n```yaml\nan error\n```\n\n```python\nassert one == 2\n```\n"
    )
    result = run(ROOT / "tests/page.py", page, folder=tmp_path)
    assert result.returncode == 1
    assert f'File "{page}", line 12' in result.stderr


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


def test_the_page_from_sparseml_has_each_modifier_and_each_argument_that_is_read():
    page = (ROOT / "docs/from_sparseml.md").read_text()
    arguments = page.partition("## Modifiers and their arguments")[2].partition("## What is not converted")[0]
    found = set(re.findall(r"`(\w+)", arguments))
    known = {name.removeprefix("Legacy") for name in {*STEPS, *LEFT_OUT, "EpochRangeModifier"}}
    folder = ROOT / "sparsifai/recipes/sparseml"
    code = "".join((folder / f"{name}.py").read_text() for name in ("steps", "other_steps", "parameters"))
    read = set(re.findall(r"""modifier\.(?:take|number|note|fraction)\(\s*"([a-z_]+)\"""", code))
    assert len(known) > 35
    assert len(read) > 30
    without_tags = {"start", "end", "update", "targets", "mask_structure", "update_scheduler", "apply_globally"}
    assert known | read | without_tags <= found


def test_a_broken_link_is_found():
    text = "[a](four_questions.md#the-four-questions) [b](none.md) [c](torch.md#none) [d](https://none.ai) [e](#none)"
    assert broken_links("docs/fastai.md", text) == ["none.md", "torch.md#none", "#none"]


def test_the_readme_and_the_index_lead_to_all_pages():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == {Path(link).name for link in links_of((ROOT / "README.md").read_text()) if link.startswith("docs/")}
    assert pages - {"index.md"} <= set(links_of((ROOT / "docs/index.md").read_text()))


def files_of_the_checkout():
    """What `git status --ignored` would tell of, but caches: folders, and files with the time of their last change."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    files = [path for folder in (ROOT, ROOT / "examples") for path in folder.iterdir() if path.is_file()]
    times = {path.relative_to(ROOT): path.stat().st_mtime_ns for path in files if path.name[0] != "."}
    return {name for name in folders if not name.endswith("egg-info")}, times


@pytest.mark.fastai
@pytest.mark.slow
def test_the_main_job(tmp_path):
    pytest.importorskip("fastai", reason="the main job trains with fastai")
    picture, before = tmp_path / "digits.png", files_of_the_checkout()
    result = run(ROOT / "examples/digits.py", "--epochs", "2", "--picture", str(picture), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert files_of_the_checkout() == before
    assert result.stdout.endswith(f"picture: {picture}\n")
    table = result.stdout[result.stdout.rindex("accuracy") :].splitlines()[1:7]
    sparsities = [float(re.findall(r"([\d.]+)%", line)[1]) for line in table]
    targets = [0, 90, 50, 70, 60, 82.0]
    assert sparsities == pytest.approx(targets, abs=1.5)
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("example", ["torch_loop", "managed_loop"])
def test_a_loop_without_fastai(example, tmp_path):
    pytest.importorskip("sklearn", reason="the loop trains on scikit-learn's digits")
    result = run(ROOT / f"examples/{example}.py", "--epochs", "2", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "90.00%" in result.stdout


@pytest.mark.slow
@pytest.mark.fastai
def test_the_pets_example_says_clearly_when_the_data_cannot_be_had(tmp_path):
    pytest.importorskip("fastai", reason="the example trains with fastai")
    # A proxy that nobody answers at stands for a machine without internet.
    result = run(ROOT / "examples/pets.py", folder=tmp_path, https_proxy="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "The PETS data could not be downloaded" in result.stderr
    assert "Traceback" not in result.stderr
