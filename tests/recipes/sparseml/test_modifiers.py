"""Names of parameters in SparseML as patterns of layers."""

import pytest
from sparseml_texts import modifiers

from sparsifai.recipes.sparseml.convert import convert


@pytest.mark.parametrize(
    ("expression", "sparseml", "expected"),
    [
        ("re:.*", "re:.*", ["a.weight", "b.0.weight"]),
        ("re:b", "re:b.*", ["b.0.weight"]),
        ("re:a|b", "re:(?:a|b).*", ["a.weight", "b.0.weight"]),
        ("re:.*0.weight$", "re:.*0.weight$", ["b.0.weight"]),
    ],
)
def test_patterns_match_what_they_match_in_sparseml(expression, sparseml, expected):
    from torch import nn

    from sparsifai import Sparsifier

    recipe, _ = convert(modifiers(f"final_sparsity: 0.8, params: ['{expression}']"))
    (pattern,) = recipe["steps"][0]["sparsify"]["layers"]
    assert pattern == sparseml
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))})
    assert list(Sparsifier(model, layers=pattern).masks) == expected
