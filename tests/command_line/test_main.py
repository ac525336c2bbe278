"""The command line as a whole: help, versions, exit statuses, one line for an error, and what ends it from outside."""

import re
import subprocess
import sys
import warnings

import pytest
from forked import ROOT

from sparsifai import __version__
from sparsifai.command_line import list_values
from sparsifai.command_line.main import COMMANDS, main

COMMAND = [sys.executable, "-m", "sparsifai"]


def shown(capsys, *arguments):
    """Standard output of what ends by itself, such as --help."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_says_what_a_command_does_and_has_an_example(capsys):
    every = shown(capsys, "--help")
    for command in COMMANDS:
        assert re.search(f"(?m)^    {command} ", every)
        help_of_one = shown(capsys, command, "--help")
        assert f"example: sparsifai {command} " in help_of_one
        assert "--json" in help_of_one
    assert shown(capsys, "--version") == f"sparsifai {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, command, "--help").splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("example: "))


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom sparsifai.command_line.main import main\n"
        "try: main(['apply', '--help'])\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "example: sparsifai apply" in done.stdout
    assert not {"torch", "numpy", "yaml", "rich", "fastai", "transformers"} & {*done.stderr.split()}


@pytest.mark.parametrize(
    ("arguments", "start", "message"),
    [
        ([], "sparsifai: ", "the following arguments are required: command"),
        (["prune"], "sparsifai: ", "invalid choice: 'prune'"),
        (["list", "colours"], "sparsifai list: ", "invalid choice: 'colours'"),
        (["plan", "--input", "1"], "sparsifai plan: ", "the following arguments are required: recipe"),
        (["shrink", "--input", "1,x"], "sparsifai shrink: ", "'1,x' is not a shape such as 1,3,224,224"),
        (["shrink", "--input", "1,0"], "sparsifai shrink: ", "'1,0' is not a shape"),
        (["apply", "--sparsty", "0.5"], "sparsifai apply: ", "--sparsty 0.5; did you mean --sparsity?; see sparsifai"),
        (["list", "criteria", "more"], "sparsifai list: ", "unrecognized arguments: more; see sparsifai list --help"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(arguments, start, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(start)
    assert message in error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("one\nof \x1b[2J two"), 2, "sparsifai list: one of \\x1b[2J two\n"),
        (MemoryError(), 2, "sparsifai list: MemoryError\n"),
        (ValueError("list: what is wrong"), 2, "sparsifai list: what is wrong\n"),
        (OSError(2, "No such file", "net.pth"), 2, "sparsifai list: net.pth: No such file\n"),
        (OSError("no folder"), 2, "sparsifai list: no folder\n"),
        (OSError(), 2, "sparsifai list: OSError\n"),
        (KeyboardInterrupt(), 130, "sparsifai list: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_status(error, status, line, monkeypatch, capsys):
    def fails(given):
        raise error

    monkeypatch.setattr(list_values, "run", fails)
    assert main(["list"]) == status
    assert capsys.readouterr() == ("", line)


def test_warnings_are_lines_of_the_command(monkeypatch, capsys):
    def warns(given):
        warnings.warn("much is lost\nhere", stacklevel=1)
        warnings.warn("of a library, to its developers", FutureWarning, stacklevel=1)

    monkeypatch.setattr(list_values, "run", warns)
    assert main(["list"]) == 0
    assert capsys.readouterr().err == "sparsifai list: warning: much is lost here\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_real_process_ends_well():
    environment = {"cwd": ROOT, "text": True, "stderr": subprocess.PIPE}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "list", "--json"], stdout=full, **environment)
    assert (done.returncode, done.stderr) == (2, "sparsifai list: No space left on device\n")
    with subprocess.Popen([*COMMAND, "list"], stdout=subprocess.PIPE, **environment) as reading:
        reading.stdout.close()  # as of `sparsifai list | head` when head has gone
        assert (reading.stderr.read(), reading.wait()) == ("", 141)
