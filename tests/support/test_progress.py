"""Progress bars: in a terminal and a notebook, not elsewhere; they close, and can be switched off."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsifai import Report, Sparsifier, compare, highest_sparsity, load_sparse, save_sparse, sensitivity, shrink
from sparsifai.support import progress as module
from sparsifai.support.progress import bars, progress

fastprogress = pytest.importorskip("fastprogress.fastprogress", reason="comes with fastai")


def test_things_pass_as_they_are_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(module, "DELAY", -1.0)
    things = [1, 2, 3]
    assert progress(things, "counting") is things
    assert list(progress(things, "counting")) == things
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stdout", [None, io.StringIO(), "closed", SimpleNamespace(write=len)])
def test_any_stdout_will_do(stdout, monkeypatch):
    if stdout == "closed":
        stdout = io.StringIO()
        stdout.close()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert str(Report.of(nn.Linear(2, 2))).startswith("layer")


def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(open_terminal):
    terminal = open_terminal()
    seen = []
    for number in progress([5, 6, 7], "counting", name=str):
        seen.append(number)
        assert terminal.lines()[-1].startswith(f"counting: {number} |")
    assert seen == [5, 6, 7]
    assert "66.67% [2/3 " in terminal.text
    assert terminal.lines() == [""]


def test_a_shorter_name_leaves_nothing_of_a_longer_one(open_terminal):
    terminal = open_terminal()
    for name in progress(["a.long.name", "b"], "counting", name=str):
        (line,) = terminal.lines()
        assert line.count("|") == 2
        assert line.endswith("]")
        assert line.count("]") == 1
        assert ("long" in line) == (name != "b")


@pytest.mark.parametrize("columns", ["40", "60", "200"])
def test_a_line_is_not_broken(columns, open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setenv("COLUMNS", columns)
    for _ in progress(range(30), "finding filters that go together", name=lambda number: f"layer{number}" * 5):
        assert all(len(line) < max(int(columns), 50) for line in terminal.lines())


def test_work_that_is_done_soon_shows_nothing(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setattr(module, "DELAY", 3600.0)
    assert list(progress(range(100), "counting")) == list(range(100))
    assert terminal.read() == ""


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([1, 2])


@pytest.mark.parametrize("things", [[], [1], iter([1, 2]), torch.utils.data.DataLoader(Endless())])
def test_one_step_and_steps_that_nobody_can_count_show_nothing(things, open_terminal):
    open_terminal()
    assert progress(things, "counting") is things


def test_only_the_first_process_shows_a_bar(open_terminal, monkeypatch):
    open_terminal()
    monkeypatch.setenv("RANK", "1")
    things = [1, 2]
    assert progress(things, "counting") is things
    monkeypatch.setenv("RANK", "0")
    assert progress(things, "counting") is not things


def test_fastprogress_can_switch_all_bars_off(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setattr(fastprogress, "NO_BAR", True)
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert terminal.read() == ""


def test_without_fastprogress_there_is_no_bar(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setitem(sys.modules, "fastprogress", None)
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert terminal.read() == ""


def test_inside_of_work_with_a_bar_there_is_no_other_one(open_terminal):
    terminal = open_terminal()
    for number in progress([1, 2], "outer"):
        for _ in progress([1, 2], "inner"):
            assert "inner" not in terminal.read()
        assert number in (1, 2)
    with bars(False):
        things = [1, 2]
        assert progress(things, "hidden") is things
    for _ in progress([1, 2], "shown"):
        pass
    assert "shown" in terminal.read()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_work_that_ends_early_takes_its_bar_away(error, open_terminal):
    terminal = open_terminal()

    def work():
        for number in progress([1, 2, 3], "counting"):
            if number == 2:
                assert "counting |" in terminal.lines()[-1]
                raise error

    for _ in range(2):
        with pytest.raises(error):
            work()
        assert terminal.lines() == [""]
    for _ in progress([1, 2, 3], "counting"):
        break
    assert terminal.lines() == [""]


def test_things_that_fail_take_their_bar_away(open_terminal):
    terminal = open_terminal()

    class Failing(list):
        def __iter__(self):
            yield 1
            raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        list(progress(Failing([1, 2]), "counting"))
    assert terminal.lines() == [""]
    assert next(iter(progress([1, 2], "again"))) == 1


def test_steps_that_print_have_a_line_of_the_bar_before_them(open_terminal):
    terminal = open_terminal()
    for number in progress([1, 2], "rounds", prints=True):
        sys.stdout.write(f"epoch {number}\n")
    lines = terminal.lines()
    assert [line[:7] for line in lines] == ["rounds ", "epoch 1", "rounds ", "epoch 2", ""]
    assert "0.00% [0/2 " in lines[0]
    assert "50.00% [1/2 " in lines[2]


def test_each_of_many_short_steps_that_print_has_its_line(open_terminal):
    terminal = open_terminal()
    for _ in progress(range(40), "rounds", prints=True):
        pass
    assert all(f" [{number}/40 " in line for number, line in enumerate(terminal.lines()[:-1]))


def test_a_notebook_shows_a_bar_that_is_gone_at_the_end(monkeypatch, capsys):
    """What a kernel does with it is what IPython's `display` and its handle get."""
    display = pytest.importorskip("IPython.display", reason="comes with notebooks")
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    def show(what, display_id=False):
        shown.append(what)
        return Handle()

    monkeypatch.setattr(module, "DELAY", -1.0)
    monkeypatch.setattr(display, "display", show)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(kernel=True))
    for _ in progress([1, 2], "rounds", name=str, prints=True):
        pass
    texts = [getattr(each, "data", None) or str(each) for each in shown]
    assert sum("rounds: 1" in each for each in texts) == 1
    assert any("50.00%" in each and "rounds: 2" in each for each in texts)
    assert shown[-1].data == ""
    assert capsys.readouterr().out == ""


# --- Where they are shown -----------------------------------------------------------------------------------------

INPUTS = torch.randn(4, 1, 8, 8)
BATCHES = [(INPUTS, torch.tensor([0, 1, 0, 1]))] * 2


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    ).eval()


def pruned(granularity="weight", **options):
    model = net()
    Sparsifier(model, granularity, **options).sparsify(0.5)
    return model


def _by_sparsegpt(folder):
    sparsifier = Sparsifier(net(), context="local", criteria="sparsegpt")
    sparsifier.calibrate(BATCHES)
    sparsifier.sparsify(0.5)


def _by_obs(folder):
    sparsifier = Sparsifier(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), context="local", criteria="fisher", compensate=True
    )
    sparsifier.calibrate([(torch.randn(4, 4), torch.randn(4, 4))] * 2, nn.functional.mse_loss)
    sparsifier.sparsify(0.5)


WORK = {
    "calibrating": lambda folder: Sparsifier(net(), criteria="wanda").calibrate(BATCHES),
    "layer by layer: 0.weight": _by_sparsegpt,
    "layer by layer: 1.weight": _by_obs,
    "running the calibration batches": _by_sparsegpt,
    "finding filters that go together: 0": lambda folder: pruned("filter", coupled=True, example_input=INPUTS),
    "joining filters that go together": lambda folder: shrink(pruned("filter"), INPUTS),
    "making the forms to compare: shrunk": lambda folder: compare(net(), pruned(), INPUTS, repeats=3),
    "timing": lambda folder: compare(net(), pruned(), INPUTS, repeats=3),
    "sensitivity: 0.weight": lambda folder: sensitivity(net(), lambda model: 1.0, [0.5]),
    "highest sparsity": lambda folder: highest_sparsity(net(), 1, lambda model: 1.0, precision=0.2),
    "compressing": lambda folder: save_sparse(pruned(), folder / "model"),
    "reading": lambda folder: save_sparse(pruned(), folder / "model") and load_sparse(folder / "model", net()),
}  # fmt: skip


@pytest.mark.parametrize("what", WORK)
def test_long_work_shows_itself(what, open_terminal, tmp_path):
    terminal = open_terminal()
    if "together" in what or "forms" in what:
        pytest.importorskip("torch_pruning", reason="needs pip install 'sparsifai[shrink]'")
    WORK[what](tmp_path)
    assert f"\r{what}" in terminal.read()
    assert terminal.lines() == [""]
