"""Regular expressions as programs of single characters, jumps and conditions, which `regular_expression.py` runs.

The syntax is that of Python's `re`, without what makes matching take exponential time or depends on more than the text
at a place: references to groups, conditional, atomic and possessive parts, and flags. Whether a repetition is greedy
or lazy makes no difference to whether a whole text matches.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field

from .printable import quoted

# Limits far beyond what names of layers need.
LONGEST = 1100  # characters of an expression
DEEPEST = 30  # parentheses within each other
MOST_CHARACTERS = 5000  # single characters and jumps, where a{3} is three of them

_ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-3][0-7]{2}|.)"
_SET = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_CHARACTER = re.compile(f"{_ESCAPE}|{_SET}|.", re.DOTALL)
_REPETITION = re.compile(r"([*+?]|\{(?!\})(?P<least>[0-9]*)(?P<comma>,?)(?P<most>[0-9]*)\})(?P<kind>[?+]?)")
_COMMENTS = re.compile(r"(?:\(\?#[^)]*\))*")
_FLAGS = re.compile(r"\(\?[aiLmsux-]")
# Python takes milliseconds for each of them.
_WIDE_SET = re.compile(r"\[(?=.*-).*([^\0-\u07ff]|\\[uUN])", re.DOTALL)
_PLACES = ("^", "$", r"\A", r"\Z", r"\b", r"\B")
_OPENINGS = re.compile(r"\((?:\?(?:#|P[<>=]|<?[=!]|.))?", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """What must hold at a place in a text.

    Args:
        place: '^', '$' or another sign of a place; empty for a lookahead or lookbehind.
        start: The instruction where the program of a lookahead or lookbehind starts.
        end: The instruction where it has matched.
        width: The number of characters of a lookbehind; None for a lookahead.
        wanted: Whether it must match or must not.
    """

    place: str = ""
    start: int = 0
    end: int = 0
    width: int | None = None
    wanted: bool = True


@dataclass
class Program:
    """Instructions by number. The program of the whole expression starts at 0.

    Args:
        characters: Instruction -> the expression of a single character. The next instruction follows.
        conditions: Instruction -> what must hold. The next instruction follows.
        jumps: Instruction -> the instructions that may follow.
        length: Number of instructions.
        end: The instruction where the whole expression has matched.
    """

    characters: dict[int, str] = field(default_factory=dict)
    conditions: dict[int, Condition] = field(default_factory=dict)
    jumps: dict[int, list[int]] = field(default_factory=dict)
    length: int = 0
    end: int = 0


# --- Parts of an expression -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A single character, a place ('^'), or parts in order ('all'), in alternative ('any'), repeated or looked at.

    size: number of instructions. width: number of characters, for a lookbehind, which has a fixed one.
    """

    kind: str
    parts: tuple[_Part, ...] = ()
    text: str = ""
    least: int = 1
    most: int | None = 1
    wanted: bool = True

    @property
    def width(self) -> int:
        if self.kind == "character":
            return 1
        if self.kind in ("all", "repeated"):
            return self.least * sum(part.width for part in self.parts)
        return self.parts[0].width if self.kind == "any" else 0


def parse(expression: str) -> Program:
    """Turn a regular expression into a program.

    Args:
        expression: The expression, up to 1,100 characters.

    Raises:
        ValueError: It is not valid, has parts that are not supported, or is too large.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, more than {LONGEST:,}")
    _check_characters(expression)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about sets that it will read in another way one day
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is not valid: {error}") from None
    program, later = Program(), list[tuple[int, _Part]]()
    _write(_Parser(expression).whole(), program, later)
    program.end = _next(program)
    while later:  # after the expression itself, as the instructions of a part follow each other
        number, look = later.pop()
        start = program.length
        _write(look.parts[0], program, later)
        width = look.parts[0].width if look.kind == "behind" else None
        program.conditions[number] = Condition("", start, _next(program), width, look.wanted)
    return program


def _check_characters(expression: str) -> None:
    """Refuse what would make Python's own check slow."""
    position = 0
    while position < len(expression):
        if flags := _FLAGS.match(expression, position):
            raise _unsupported(f"{flags[0]}...)")
        found = _COMMENTS.match(expression, position)
        if not found or not found[0]:
            found = _CHARACTER.match(expression, position)
        assert found is not None  # it matches any character
        check_sets(found[0])
        position = found.end()


def check_sets(expression: str) -> None:
    """Refuse sets of characters, such as [a-z], whose ranges reach so far that Python needs milliseconds for them.

    Args:
        expression: A set, or an expression or glob with sets.

    Raises:
        ValueError: There is one.
    """
    if _WIDE_SET.search(expression):
        raise ValueError(f"the set in {quoted(expression)} has a range of rare characters; list them instead")


class _Parser:
    """Reads an expression that Python has found valid."""

    def __init__(self, expression: str):
        self.text, self.position, self.depth, self.size = expression, 0, 0, 0

    def whole(self) -> _Part:
        return self._alternatives()[0]

    def _alternatives(self) -> tuple[_Part, int]:
        """The part up to a closing parenthesis or the end, and the number of its instructions."""
        options: list[_Part] = []
        items: list[_Part] = []
        size = 0
        while self.position < len(self.text) and self.text[self.position] != ")":
            if self.text[self.position] == "|":
                self.position += 1
                options.append(_Part("all", tuple(items)))
                items, size = [], size + 2
                continue
            item, size_of_item = self._repeated(*self._item())
            size += size_of_item
            items.append(item)
            if size > MOST_CHARACTERS:
                raise ValueError(
                    f"it stands for more than {MOST_CHARACTERS:,} single characters, where a{{3}} counts as three; "
                    "shorten its repetitions"
                )
        options.append(_Part("all", tuple(items)))
        return (options[0] if len(options) == 1 else _Part("any", tuple(options))), size + 1

    def _item(self) -> tuple[_Part, int]:
        if self.text[self.position] == "(":
            return self._group()
        found = _CHARACTER.match(self.text, self.position)
        assert found is not None  # it matches any character
        self.position, text = found.end(), found[0]
        if text in _PLACES or text == r"\z":
            return _Part("place", text=text), 1
        if re.fullmatch(r"\\[1-9]", text):
            raise _unsupported(f"the reference {text} to a group")
        return _Part("character", text=text), 1

    def _group(self) -> tuple[_Part, int]:
        found = _OPENINGS.match(self.text, self.position)
        assert found is not None  # there is a parenthesis
        opening = found[0]
        self.position = found.end()
        if opening == "(?#":
            self.position = self.text.index(")", self.position) + 1
            return _Part("all"), 1
        if opening == "(?P<":
            self.position = self.text.index(">", self.position) + 1
        elif opening not in ("(", "(?:", "(?=", "(?!", "(?<=", "(?<!"):
            raise _unsupported(f"{opening}...)")
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"its parentheses are nested deeper than {DEEPEST} levels")
        inner, size = self._alternatives()
        self.depth -= 1
        self.position += 1  # the closing parenthesis
        if opening in ("(", "(?:", "(?P<"):
            return inner, size
        return _Part("behind" if "<" in opening else "ahead", (inner,), wanted=opening.endswith("=")), size + 2

    def _repeated(self, item: _Part, size: int) -> tuple[_Part, int]:
        """The part with the repetitions behind it: Python allows one."""
        comments = _COMMENTS.match(self.text, self.position)
        assert comments is not None  # there may be none
        found = _REPETITION.match(self.text, comments.end())
        if found is None or not (found["least"] is None or found["least"] or found["comma"]):
            return item, size
        if found["kind"] == "+":
            raise _unsupported(f"the possessive repetition {found[0]}")
        self.position = found.end()
        if found["least"] is None:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
        else:
            least = int(found["least"] or 0)
            most = (int(found["most"]) if found["most"] else None) if found["comma"] else least
        copies = max(least, 1) if most is None else most
        return _Part("repeated", (item,), least=least, most=most), copies * (size + 2) + 1


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"{what} is not supported, as matching it can take forever or depends on other text; leave it out"
    )


# --- From parts to instructions ---------------------------------------------------------------------------------------


def _next(program: Program) -> int:
    """Add an instruction, and return its number."""
    program.length += 1
    return program.length - 1


def _write(part: _Part, program: Program, later: list[tuple[int, _Part]]) -> None:
    """Add the instructions of a part. later: lookaheads and lookbehinds with their instructions, written afterwards."""
    if part.kind == "character":
        program.characters[_next(program)] = part.text
    elif part.kind == "place":
        program.conditions[_next(program)] = Condition(part.text)
    elif part.kind in ("ahead", "behind"):
        later.append((_next(program), part))
    elif part.kind == "all":
        for each in part.parts:
            _write(each, program, later)
    elif part.kind == "any":
        _write_any(part, program, later)
    else:
        _write_repeated(part, program, later)


def _write_any(part: _Part, program: Program, later: list[tuple[int, _Part]]) -> None:
    choice = _next(program)
    program.jumps[choice], ends = [], []
    for each in part.parts:
        program.jumps[choice].append(program.length)
        _write(each, program, later)
        ends.append(_next(program))
    program.jumps.update({end: [program.length] for end in ends})


def _write_repeated(part: _Part, program: Program, later: list[tuple[int, _Part]]) -> None:
    (item,) = part.parts
    start = program.length
    for _ in range(part.least):
        start = program.length
        _write(item, program, later)
    if part.most is None and part.least:
        again = _next(program)
        program.jumps[again] = [start, program.length]
        return
    if part.most is None:
        _next(program)
        _write(item, program, later)
        program.jumps[_next(program)] = [start]
        program.jumps[start] = [start + 1, program.length]
        return
    choices = []
    for _ in range(part.most - part.least):
        choices.append(_next(program))
        _write(item, program, later)
    program.jumps.update({choice: [choice + 1, program.length] for choice in choices})
