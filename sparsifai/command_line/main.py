"""From the words of a command line to the command, and from its errors to one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, NoReturn

from ..support.printable import LONGEST_MESSAGE, printable
from ..support.version import __version__
from ..support.warning import own_filters
from . import apply, compare, convert, list_values, plan, report, shrink

COMMANDS = {
    "plan": plan,
    "report": report,
    "apply": apply,
    "shrink": shrink,
    "compare": compare,
    "convert": convert,
    "list": list_values,
}

# The exit status after Ctrl-C, and after a reader of the output, such as `head`, has gone: those of a shell.
INTERRUPTED, UNREAD = 130, 141


class _Parser(argparse.ArgumentParser):
    """A parser that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message, LONGEST_MESSAGE)}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `sparsifai`. By default those of the command line.

    Returns:
        The exit status: 0 after success, 2 after an error, which is printed on standard error, 3 if `convert` wrote a
        recipe without a part that would change the model, 130 after Ctrl-C, and 141 if the reader of the output has
        gone.
    """
    given, unknown = _parser().parse_known_args(arguments)
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in vars(given)], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    prefix = f"sparsifai {given.command}: "

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        _tell(f"{prefix}warning: {message}")

    try:
        with own_filters():
            # What users can do something about; what libraries tell their developers is not shown.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            status = given.run(given) or 0
            sys.stdout.flush()  # an error of a full disk is told now
        return status
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that nothing is written at exit, which would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        _tell(f"{prefix}interrupted")
        return INTERRUPTED
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _tell(f"{prefix}{place}{error.strerror or str(error) or type(error).__name__}")
        return 2
    except (ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
        what = str(error).removeprefix(f"{given.command}: ")  # functions of this name begin so, too
        _tell(f"{prefix}{what or type(error).__name__}")
        return 2


def _tell(message: str) -> None:
    """One line on standard error."""
    print(printable(" ".join(message.split()), LONGEST_MESSAGE), file=sys.stderr)


def _filled(description: str) -> str:
    """A text with paragraphs as wide as the terminal, and examples as they are, so that they can be copied."""
    width = min(get_terminal_size().columns, 120)
    paragraphs = description.split("\n\n")
    return "\n\n".join(each if each.startswith("example:") else fill(each, width) for each in paragraphs)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "sparsifai", description="Plan sparse training, prune checkpoints, and measure and shrink sparse models."
    )
    parser.add_argument("--version", action="version", version=f"sparsifai {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.DESCRIPTION.partition("\n")[0],
            description=_filled(module.DESCRIPTION),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(added)
        added.add_argument("--json", action="store_true", help="print JSON with raw numbers instead of a table")
        if module is not convert:  # which prints no table
            added.add_argument("--all", action="store_true", help="print all rows of a table, also in a terminal")
        added.set_defaults(run=module.run, parser=added)
    return parser
