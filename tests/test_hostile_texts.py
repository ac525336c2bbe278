"""Texts that were written to harm are used under limits of CPU time and memory: a result, or a clear error."""

import sys
from pathlib import Path

import forked
import hostile_texts
import pytest


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are read from /proc")
def test_hostile_recipes_end_soon_in_a_result_or_a_printable_error(tmp_path):
    done = forked.run(Path(__file__).with_name("use_hostile_texts.py"), folder=tmp_path)
    last = (tmp_path / "current").read_text()
    assert (done.returncode, last) == (0, "all"), f"it ended at {last!r}: {done.stderr[-1000:]}"
    assert done.stdout == ""


def test_the_corpus_is_found():
    assert len(hostile_texts.TEXTS) == len({make() for make in hostile_texts.TEXTS.values()}) > 1000
