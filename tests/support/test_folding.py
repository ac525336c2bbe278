"""Folded tables: what one line stands for, and that it adds up."""

from dataclasses import dataclass

import pytest

from sparsifai.support.folding import block_of
from sparsifai.support.table import Column, Table, percent, ratio


@dataclass(frozen=True, repr=False)
class Zeros(Table):
    """(name, kind, weights, zeros, note) of each layer."""

    rows: tuple

    def _records(self):
        return [
            {"layer": name, "kind": kind, "weights": weights, "zeros": zeros, "sparsity": zeros / weights, "note": note}
            for name, kind, weights, zeros, note in self.rows
        ]

    def _columns(self):
        sparsity = Column("sparsity", show=percent, bar=True, total=ratio("zeros", "weights"))
        names = (Column("layer", left=True), Column("kind", left=True))
        return (*names, Column("weights"), Column("zeros"), sparsity, Column("note", left=True, remark=True))


def block(number, zeros=0, note=""):
    return [
        (f"encoder.{number}.query.weight", "Linear", 100, zeros, note),
        (f"encoder.{number}.conv.weight", "Conv1d", 300, zeros, ""),
    ]


ROWS = (
    ("embedding.weight", "Embedding", 1000, 0, "dense"),
    *block(0), *block(1), *block(2, 50, "late"), *block(3),
    ("head.weight", "Linear", 20, 5, ""),
)  # fmt: skip


def test_text_of_a_folded_table():
    assert str(Zeros(ROWS).fold()).splitlines() == [
        "layer                      kind       weights  zeros  sparsity  note",
        "-----------------------------------------------------------------------------",
        "embedding.weight           Embedding    1,000      0     0.00%  dense",
        "encoder.0 to 1 (4 layers)                 800      0     0.00%",
        "encoder.2 (2 layers)                      400    100    25.00%  late (1 of 2)",
        "encoder.3 (2 layers)                      400      0     0.00%",
        "head.weight                Linear          20      5    25.00%",
        "10 rows in 5 lines; .unfold() shows all.",
    ]


def test_short_tables_stay_as_they_are_and_long_ones_are_folded_by_themselves():
    assert len(str(Zeros(ROWS)).splitlines()) == 2 + 10
    long = Zeros(tuple(row for number in range(31) for row in block(number, number)))
    assert len(str(long).splitlines()) == 2 + 31 + 1
    assert str(long).endswith("62 rows in 31 lines; .unfold() shows all.")
    assert len(str(long.unfold()).splitlines()) == 2 + 62
    assert len(long.records()) == 62


def test_blocks_are_one_line_only_if_all_of_them_is_equal():
    for same in (
        [*block(0), ("encoder.1.query.weight", "Linear", 100, 0, ""), ("encoder.1.key.weight", "Conv1d", 300, 0, "")],
        [*block(0), *block(1, note="another")],
        [*block(0), ("decoder.1.query.weight", "Linear", 100, 0, ""), ("decoder.1.conv.weight", "Conv1d", 300, 0, "")],
        [("norm.weight", "Norm", 10, 0, ""), ("norm.bias", "Norm", 10, 0, ""), *block(0)],
    ):
        assert " to " not in str(Zeros(tuple(same)).fold())
    assert "encoder.0 to 1 (4 layers)" in str(Zeros((*block(0), *block(1))).fold())


def test_many_lines_have_one_for_those_in_the_middle_which_adds_up():
    rows = tuple((f"layer{number}.weight", "Linear", 10, number % 7, "") for number in range(100))
    lines = str(Zeros(rows)).splitlines()
    assert len(lines) == 2 + 40 + 1
    assert [line.split() for line in lines if "between" in line] == [
        ["...", "61", "layers", "between", "...", "Linear", "610", "180", "29.51%"]  # of the layers 20 to 80
    ]
    by_zeros = Zeros(rows).sort("zeros", descending=True)
    assert [line.split()[3] for line in str(by_zeros).splitlines()[2:4]] == ["6", "6"]
    assert str(by_zeros).splitlines()[-2].split()[3] == "0"


def test_remarks_on_a_block_are_listed_or_counted():
    rows = [(f"blocks.0.{name}.weight", "Linear", 10, 0, note) for name, note in (("a", "x"), ("b", "y"), ("c", ""))]
    assert str(Zeros(tuple(rows)).fold()).splitlines()[2].endswith("  x; y (2 of 3)")
    rows = [(*row[:4], f"a long remark on {row[0]}") for row in rows]
    assert str(Zeros(tuple(rows)).fold()).splitlines()[2].endswith("  3 different ones")


def test_html_has_blocks_and_all_rows_below_them():
    html = Zeros(ROWS).fold()._repr_html_()
    folded, _, full = html.partition("<details><summary>All 10 rows</summary>")
    assert folded.count("<tr>") == 1 + 5
    assert full.count("<tr>") == 1 + 10
    assert "encoder.2.conv.weight" in full
    assert "<details>" not in Zeros(ROWS)._repr_html_()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer3.11.downsample.0.weight", "layer3.11"),
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12"),
        ("0.weight", "0"),
        ("Mixed_5b.branch1x1.conv.weight", "Mixed_5b"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("layer4.conv1.weight", "layer4"),
        ("conv1.weight", "conv1.weight"),
        ("weight", "weight"),
        ("encoder.layers.0", "encoder.layers.0"),
        ("", ""),
    ],
)
def test_the_block_of_a_name(name, expected):
    assert block_of(name) == expected
