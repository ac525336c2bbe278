"""Regular expressions that are matched in a time linear in the text, whoever wrote them.

Python's `re` tries one way after the other, which takes exponential time for `(a|a)*x`, and cannot be interrupted.
Here all ways are followed at once (K. Thompson, Regular expression search algorithm, 1968): a text is read character by
character, with the set of instructions that may come next. What follows a set and a character is remembered, so that
most texts are read with one look-up per character.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cached_property, lru_cache

from .expression_parser import Condition, parse
from .work import Work

# So many sets are remembered; then they are forgotten.
_REMEMBERED = 5000

# An instruction in a new set takes longer than a character after a known one.
_NEW = 4

# A lookahead or lookbehind, and a place in a text -> whether it holds there.
_Known = dict[tuple[int, int], bool]


class RegularExpression:
    """A regular expression that is matched with whole texts.

    Args:
        expression: The expression, in the syntax of Python's `re` without references, conditional, atomic and
            possessive parts, and flags.

    Raises:
        ValueError: It is not valid, has a part that is not supported, or is too large.

    Example:
        >>> RegularExpression('(a|a)*x').matches('a' * 40, Work(1000, 'too much'))
        False
    """

    def __init__(self, expression: str):
        self._program = parse(expression)
        self._moves: dict[tuple[int, str], int] = {}
        self._closed: dict[tuple[int, tuple[bool, ...]], int] = {}
        self._conditions_of: dict[int, tuple[int, ...]] = {}
        self._read_by: dict[str, int] = {}

    def matches(self, text: str, work: Work) -> bool:
        """Whether it matches a whole text.

        Args:
            text: The text.
            work: What may be spent: one step per character, and four per instruction where a set is new.

        Raises:
            ValueError: The work is spent.
        """
        return self._matches_from(0, self._program.end, text, 0, len(text), work, {})

    # A set of instructions is an int with one bit for each. It is closed if it has no more than characters and ends:
    # jumps and conditions are replaced by what follows them.

    def _matches_from(
        self, start: int, end: int, text: str, first: int, last: int | None, work: Work, known: _Known
    ) -> bool:
        """Whether the program from `start` to `end` matches text[first:last], or if last is None, some beginning."""
        anywhere = last is None
        last = len(text) if last is None else last
        work.spend(last - first + 1)
        moves, wanted = self._moves, 1 << end
        states = self._close(1 << start, text, first, work, known)
        for position in range(first, last):
            if not states or (anywhere and states & wanted):
                break
            following = moves.get((states, text[position]))
            if following is None:
                following = self._move(states, text[position], work)
            # Negative if what follows depends on the place in the text.
            states = following if following >= 0 else self._close(~following, text, position + 1, work, known)
        return bool(states & wanted)

    def _move(self, states: int, character: str, work: Work) -> int:
        """The set after a character, closed; or ~ of it, not closed, if it has conditions."""
        reading = self._read_by.get(character)
        if reading is None:
            work.spend(len(self._readers))
            reading = sum(bits for matches, bits in self._readers if matches(character))
            self._read_by[character] = reading
        following = (states & reading) << 1
        closed = ~following if self._conditions(following, work) else self._follow(following, {}, work)
        if len(self._moves) >= _REMEMBERED:
            self._moves.clear()
        self._moves[states, character] = closed
        return closed

    def _close(self, states: int, text: str, position: int, work: Work, known: _Known) -> int:
        """A set with what follows its jumps, and those of its conditions that hold at a place in the text."""
        numbers = self._conditions(states, work)
        holds = {number: self._holds(number, text, position, work, known) for number in numbers}
        key = (states, tuple(holds.values()))
        closed = self._closed.get(key)
        if closed is None:
            if len(self._closed) >= _REMEMBERED:
                self._closed.clear()
            closed = self._closed[key] = self._follow(states, holds, work)
        return closed

    def _conditions(self, states: int, work: Work) -> tuple[int, ...]:
        """The conditions that may decide what follows a set."""
        if not self._program.conditions:
            return ()
        found = self._conditions_of.get(states)
        if found is None:
            if len(self._conditions_of) >= _REMEMBERED:
                self._conditions_of.clear()
            holds = dict.fromkeys(self._program.conditions, True)
            passed = self._follow(states, holds, work, keep_conditions=True)
            found = self._conditions_of[states] = tuple(n for n in self._program.conditions if passed >> n & 1)
        return found

    def _follow(self, states: int, holds: dict[int, bool], work: Work, keep_conditions: bool = False) -> int:
        """A set without its jumps and conditions, and with what follows them."""
        jumps, conditions = self._program.jumps, self._program.conditions
        seen, closed, waiting = states, 0, list(_numbers(states))
        work.spend(_NEW * (len(waiting) + 1))
        while waiting:
            number = waiting.pop()
            if number in jumps:
                following = jumps[number]
            elif number in conditions:
                following = [number + 1] if holds[number] else []
                closed |= 1 << number if keep_conditions else 0
            else:
                closed |= 1 << number
                continue
            for each in following:
                if not seen >> each & 1:
                    seen |= 1 << each
                    waiting.append(each)
                    work.spend(_NEW)
        return closed

    def _holds(self, number: int, text: str, position: int, work: Work, known: _Known) -> bool:
        """Whether a condition holds at a place in the text."""
        if (number, position) not in known:
            known[number, position] = self._look(self._program.conditions[number], text, position, work, known)
        return known[number, position]

    def _look(self, condition: Condition, text: str, position: int, work: Work, known: _Known) -> bool:
        if condition.place:
            return re.compile(condition.place).match(text, position) is not None
        start, end = condition.start, condition.end
        if condition.width is None:
            return self._matches_from(start, end, text, position, None, work, known) == condition.wanted
        first = position - condition.width
        if first < 0:
            return not condition.wanted
        return self._matches_from(start, end, text, first, position, work, known) == condition.wanted

    @cached_property
    def _readers(self) -> list[tuple]:
        """For each expression of a single character, its matcher and the instructions that have it."""
        bits: dict[str, int] = {}
        for number, character in self._program.characters.items():
            bits[character] = bits.get(character, 0) | 1 << number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [(re.compile(character).fullmatch, which) for character, which in bits.items()]


def _numbers(states: int) -> Iterator[int]:
    """The instructions of a set."""
    while states:
        lowest = states & -states
        yield lowest.bit_length() - 1
        states ^= lowest


@lru_cache(maxsize=2000)
def compiled(expression: str) -> RegularExpression:
    """A regular expression, which remembers what it has matched, from one use to the next.

    Raises:
        ValueError: It is not valid, has a part that is not supported, or is too large.
    """
    return RegularExpression(expression)
