"""Names with any characters are printable wherever they are shown."""

import unicodedata
import warnings

import pytest

from sparsifai.support.cells import Cells
from sparsifai.support.listing import in_short
from sparsifai.support.printable import printable, printable_lines, quoted
from sparsifai.support.registry import close_matches
from sparsifai.support.warning import warn

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "a\rb": r"a\rb",
    "a\nb": r"a\nb",
    "\u202eabc": r"\u202eabc",
    "\udc80": r"\udc80",
    "\x9b2J": r"\x9b2J",
    "\u2028": r"\u2028",
    "\0": r"\x00",
    "\U000e0041": r"\U000e0041",
    "\u200b": r"\u200b",
}
ORDINARY = ["layer1.0.conv1.weight", "große_Schicht", "层.0", "a b", "[0]", "'x'", "\\n", "é", "🙂", ""]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_stay_as_they_are(name):
    assert printable(name) == printable_lines(name) == in_short([name]) == name
    assert Cells((name,), [(name,)]).text().splitlines()[-1].strip() == name.strip()


@pytest.mark.parametrize(("name", "shown"), HOSTILE.items(), ids=HOSTILE.values())
def test_no_outlet_shows_a_name_as_it_is(name, shown):
    assert printable(name) == shown
    table = Cells((name,), [(name,)], totals=[(name,)], caption=f"of {shown}", notes=[f"note {name}"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(f"the layer {name} is dense")
    outlets = [
        table.text(), table.html(), in_short([name, name]), str(caught[0].message), quoted(name), quoted([name]),
        close_matches(name, [name, "other"]), close_matches("abcdefgh", [name, "other"]),
    ]  # fmt: skip
    for text in outlets:
        assert shown in text
        assert all(line.isprintable() for line in text.split("\n"))
    assert table.text().count("\n") == 6  # no line more than the table has
    assert table.text().count(shown) == 6


def test_every_character_is_printable():
    """All of Unicode, in one text: nothing of the kinds that a terminal obeys is left."""
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything, most=10**8)
    assert shown.isprintable()
    assert shown.encode()
    assert not {unicodedata.category(each) for each in set(shown)} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_a_long_text_loses_its_middle():
    assert printable("a" * 1000 + "z") == "a" * 99 + "..." + "a" * 97 + "z"
    assert len(printable("\x1b" * 10_000)) == 200
    assert len(quoted(["a" * 100] * 10**5)) <= 90
    assert len(Cells(("layer",), [("a" * 10**6,)]).text()) < 1000


def test_html_is_escaped():
    html = Cells(("<b>",), [("<script>\x1b",)], totals=[("&",)], caption="<i>", notes=["<u>"]).html()
    for raw in ("<b>", "<script>", "<i>", "<u>", "\x1b"):
        assert raw not in html
    assert r"&lt;script&gt;\x1b" in html
