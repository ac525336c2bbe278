"""YAML from other people: what is read, and that nothing else happens."""

import pytest
from work import at_most_calls

from sparsifai import Recipe
from sparsifai.recipes.safe_yaml import Located, dump_yaml, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1.5E3", -1500.0),
        ("2:4", "2:4"),
        ("0x1f", 31),
        ("1_000", 1000),
        ("yes", True),
        ("~", None),
        ("2024-01-02", "2024-01-02"),
        ("75%", "75%"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("a: &x 3\nb: *x", {"a": 3, "b": 3}),
        ("a: &x [1, &y {b: 2}]\nc: *x\nd: *y", {"a": [1, {"b": 2}], "c": [1, {"b": 2}], "d": {"b": 2}}),
    ],
)
def test_values(text, value):
    read = load_yaml(text).value
    assert read == value
    assert type(read) is type(value)
    assert load_yaml(dump_yaml(value)).value == value


def test_what_an_alias_stands_for_is_no_part_of_another_value():
    value = load_yaml("a: &x [1]\nb: *x").value
    value["a"].append(2)
    assert value["b"] == [1]


def test_a_recipe_may_have_aliases_of_lists_and_mappings():
    text = "epochs: 4\nsteps:\n- sparsify: {sparsity: 0.5, layers: &names [a, b], schedule: &late {iterative: 2}}\n"
    recipe = Recipe.loads(text + "- sparsify: {sparsity: 0.6, exclude: *names, schedule: *late}\n")
    assert recipe.steps[1].options == {"sparsity": 0.6, "exclude": ["a", "b"], "schedule": {"iterative": 2}}
    assert Recipe.loads(recipe.dumps()) == recipe


def test_text_that_looks_like_a_number_is_quoted():
    assert load_yaml(dump_yaml({"1e-5": "1e5"})).value == {"1e-5": "1e5"}


def test_lines():
    located = load_yaml("\na: 1\nb:\n  - c: 2\n    d: 3\n  - 4\n")
    assert located.line() == 2
    assert located.line("b") == 3
    assert located.line("b", 0, "d") == 5
    assert located.line("b", 1) == 6
    assert located.line("b", 1, "of what is not there") == 6
    assert Located({}).line("b") == 1


def test_an_error_names_the_line_once():
    located = load_yaml("a: 1\nb: {c: 2}")

    def fail():
        with located.at("b", "c"), located.at("a"):
            raise TypeError("wrong")

    with pytest.raises(ValueError, match="^line 1: a: wrong$"):
        fail()
    assert str(located.error(("b", "c"), "wrong")) == "line 2: b.c: wrong"


# --- Hostile texts ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "quadratic": "a: &a [" + "x, " * 1000 + "]\nb: [" + "*a, " * 40_000 + "]",
    "long aliases": "a: &a [" + "x" * 2000 + "]\nb: [" + "*a, " * 10_000 + "]",
    "deep aliases": "a: &a [x]\n"
    + "".join(f"{b}: &{b} [*{a}]\n" for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv", strict=True)),
    "deep": "[" * 100_000,
    "deep mapping": "\n".join(" " * level + "a:" for level in range(500)),
    "long": "a: " + "x" * 2_000_000,
    "huge number": "epochs: " + "9" * 5000,
    "huge hexadecimal": "epochs: 0x" + "f" * 5000,
    "infinite": "epochs: .inf",
    "power": "epochs: ${9**9**9**9}\nsteps: [keep]",
    "python": "!!python/object/apply:os.system ['touch TOUCHED']",
    "python in a value": "steps:\n- sparsify: {sparsity: !!python/object/apply:os.system ['touch TOUCHED']}",
    "import": "epochs: ${__import__('os').system('touch TOUCHED')}\nsteps: [keep]",
    "attribute": "variables: {a: 1}\nepochs: ${a.__class__}\nsteps: [keep]",
    "nul": "a: \x00",
    "merge": "<<: {steps: [keep]}",
    "many": "steps: [" + "keep," * 200_000 + "]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly_and_run_no_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with at_most_calls(1_000_000), pytest.raises(ValueError, match=r"\w"):
        Recipe.loads(HOSTILE[name])
    assert not list(tmp_path.iterdir())
