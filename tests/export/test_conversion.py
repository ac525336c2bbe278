"""What the conversions to CSR and 2:4 share."""

from sparsifai.export.conversion import list_reasons


def test_reasons_are_listed_with_their_layers():
    assert list_reasons({"a": "small", "b": "tied", "c": "small"}) == "a, c (small); b (tied)"
    assert list_reasons(dict.fromkeys("abcdef", "small")) == "a, b, c and 3 more (small)"
    assert list_reasons({f"{number}": f"reason {number // 2}" for number in range(16)}).endswith("and 3 more reasons")
    assert list_reasons({}) == "it has no weights with named axes"
