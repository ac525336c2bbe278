"""The bookkeeping of `python -m benchmarks.accuracy`: what is stored, what is run again, and what the tables say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEASURED = {"accuracy": 0.5, "zeros": 0.9, "seconds": 1.0, "date": "2026-01-02", "torch": "2"}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def cell_of(seed=0, setting="defaults", sparsity=0.9, case=""):
    from benchmarks.accuracy.cells import Cell

    return Cell("digits", case, setting, sparsity, seed, 2, 100)


def stored(file, *runs):
    """The records of runs, each a cell and what was measured, after they went through a file."""
    from benchmarks.accuracy.cells import done, store

    for cell, measured in runs:
        store(file, cell, {**MEASURED, **measured})
    return list(done(file).values())


def test_a_stored_run_is_found_by_its_cell(tmp_path):
    from benchmarks.accuracy.cells import done

    file = tmp_path / "new" / "digits.jsonl"
    stored(file, (cell_of(0), {"accuracy": 0.25}), (cell_of(1), {}))
    assert done(file)[cell_of(0)]["accuracy"] == 0.25
    assert list(done(file)) == [cell_of(0), cell_of(1)]
    assert cell_of(2) not in done(file)
    assert done(tmp_path / "none.jsonl") == {}


def test_a_line_that_was_cut_off_is_told_and_its_run_repeated(tmp_path, capsys):
    from benchmarks.accuracy.cells import done

    file = tmp_path / "digits.jsonl"
    stored(file, (cell_of(0), {}), (cell_of(1), {}))
    file.write_text(file.read_text()[:-20])
    assert list(done(file)) == [cell_of(0)]
    assert f"{file}: line 2 is no JSON" in capsys.readouterr().out
    stored(file, (cell_of(1), {}))
    assert list(done(file)) == [cell_of(0), cell_of(1)]


def test_the_shares_of_processes_are_all_cells():
    from benchmarks.accuracy.cells import share

    cells = list(range(7))
    assert share(cells, (1, 1)) == cells
    assert sorted(share(cells, (1, 2)) + share(cells, (2, 2))) == cells


def test_mean_and_standard_error():
    from benchmarks.accuracy.cells import Summary

    # The deviations are -0.02, -0.01 and 0.03: a variance of 14e-4 / 2, and of the mean, a third of it.
    summary = Summary.of([0.90, 0.91, 0.95])
    assert summary.mean == pytest.approx(0.92)
    assert summary.error == pytest.approx((14e-4 / 2 / 3) ** 0.5)
    assert summary.seeds == 3
    assert str(summary) == "92.0 ± 1.5"
    assert Summary.of([0.9]) == Summary(0.9, None, 1)
    assert str(Summary.of([0.9])) == "90.0"


def test_a_table_has_a_row_for_each_setting_and_says_what_it_is_made_of(tmp_path):
    from benchmarks.accuracy.report import tables

    runs = stored(
        tmp_path / "digits.jsonl",
        (cell_of(0), {"accuracy": 0.90}),
        (cell_of(1), {"accuracy": 0.92, "date": "2026-01-03"}),
        (cell_of(0, sparsity=0.98), {"accuracy": 0.6, "zeros": 0.979}),
        (cell_of(1, sparsity=0.98), {"accuracy": 0.8, "zeros": 0.971}),
        (cell_of(0, "agp"), {"accuracy": 0.8}),
    )
    (table,) = tables(runs)
    assert table.splitlines() == [
        "2 epochs on 100 pictures; seeds in brackets; 2026-01-02 to 2026-01-03.",
        "",
        "| setting | 90 % | 98 % |",
        "|---|---|---|",
        "| defaults | 91.0 ± 1.0 (2) | 70.0 ± 10.0 (2) |",
        "| agp | 80.0 (1) | - |",
        "",
        "Other zeros than these, of all weights: defaults at 98 % has 97.1 %.",
    ]


def test_a_table_of_a_language_model_has_perplexities(tmp_path):
    from benchmarks.accuracy.cells import Cell, store
    from benchmarks.accuracy.report import tables

    file = tmp_path / "decoder.jsonl"
    runs = [{"perplexity": value, "zeros": 0.5, "date": "2026-01-02"} for value in (7.5, 8.3)]
    for seed, run in enumerate(runs):
        store(file, Cell("decoder", "", "wanda", 0.5, seed, 1, 2000), run)
    (table,) = tables([json.loads(line) for line in file.read_text().splitlines()])
    assert table.splitlines()[0] == "1 epoch on 2,000 snippets; 2 seeds; 2026-01-02."
    assert table.splitlines()[-1] == "| wanda | 7.90 ± 0.40 |"


def test_rows_stand_in_the_order_of_the_cells(tmp_path):
    from benchmarks.accuracy.cells import ordered

    cells = [cell_of(0, "agp"), cell_of(0, "defaults"), cell_of(0, "agp", case="local")]
    runs = stored(
        tmp_path / "digits.jsonl",
        *((cell, {}) for cell in (cell_of(0, "removed"), cells[2], cells[1], cells[0])),
    )
    order = [(run["case"], run["setting"]) for run in ordered(runs, cells)]
    assert order == [("", "agp"), ("", "defaults"), ("", "removed"), ("local", "agp")]


def test_a_page_gets_its_tables_and_stays_the_same_else(tmp_path):
    from benchmarks.accuracy.report import write_page

    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- digits -->\nold\n<!-- end of digits -->\n\n## B\n")
    runs = stored(tmp_path / "digits.jsonl", (cell_of(0), {"accuracy": 0.75}))
    write_page(page, {"digits": runs})
    text = page.read_text()
    assert text.startswith("# A\n\n<!-- digits -->\n")
    assert text.endswith("\n\n<!-- end of digits -->\n\n## B\n")
    assert "| defaults | 75.0 |" in text
    assert "old" not in text
    with pytest.raises(SystemExit, match="needs the comments <!-- cifar10 -->"):
        write_page(page, {"cifar10": []})


@pytest.mark.fastai
@pytest.mark.parametrize(("page", "task"), [("accuracy.md", "digits"), ("transformers.md", "text")])
def test_a_page_of_the_docs_has_the_tables_of_the_stored_runs(page, task, tmp_path):
    pytest.importorskip("fastai", reason="the tasks train with fastai")
    pytest.importorskip("sklearn", reason="a task trains on scikit-learn's digits")
    from benchmarks.accuracy.__main__ import STORED, stored_runs
    from benchmarks.accuracy.report import write_page
    from benchmarks.accuracy.tasks import PAGES

    copied = Path(shutil.copy(ROOT / "docs" / page, tmp_path))
    names = [name for name in PAGES if PAGES[name] == page and (STORED / f"{name}.jsonl").exists()]
    assert task in names
    write_page(copied, {name: stored_runs(name, STORED) for name in names})
    assert copied.read_text() == (ROOT / "docs" / page).read_text()


@pytest.mark.fastai
@pytest.mark.slow
def test_a_command_that_was_stopped_goes_on(tmp_path):
    pytest.importorskip("fastai", reason="the tasks train with fastai")
    pytest.importorskip("sklearn", reason="the task trains on scikit-learn's digits")
    command = [sys.executable, "-m", "benchmarks.accuracy", "--quick", "--out", str(tmp_path)]
    command += ["--settings", "dense", "agp", "--task"]

    def run(*tasks, code):
        ended = subprocess.run([*command, *tasks], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    first = run("one_shot", "digits", code=1)
    assert "one_shot is left out: one_shot needs 1,000 pictures" in first
    file = tmp_path / "digits.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 5  # dense, and four cases
    assert first.count("seed 0: 0.") == 5
    assert all(json.loads(line)["zeros"] == pytest.approx(0.9, abs=1e-3) for line in lines[1:])
    file.write_text("\n".join(lines[:4]) + "\n")
    second = run("digits", code=0)
    assert second.count("seed 0: 0.") == 1
    assert file.read_text().splitlines()[:4] == lines[:4]
    # The same seed gives the same net.
    assert json.loads(file.read_text().splitlines()[4])["accuracy"] == json.loads(lines[4])["accuracy"]
    assert "| agp | " in second
