import pytest
from torch import nn
from work import at_most_calls

from sparsifai import Sparsifier
from sparsifai.model import patterns


def body_and_head():
    return nn.ModuleDict({
        "body": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))),
        "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
    })  # fmt: skip


EVERYTHING = ["body.0.weight", "body.1.0.weight", "body.1.1.weight", "head.0.weight", "head.1.weight"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (nn.Conv2d, EVERYTHING[:3]),
        ([nn.Linear, "body.0"], [EVERYTHING[0], *EVERYTHING[3:]]),
        ("head", EVERYTHING[3:]),
        ("body.1", EVERYTHING[1:3]),
        ("body.*.0", [EVERYTHING[1]]),
        ("*.0", [EVERYTHING[0], EVERYTHING[1], EVERYTHING[3]]),
        ("head.1.weight", EVERYTHING[4:]),
        (lambda name, module: getattr(module, "kernel_size", 0) == (1, 1), [EVERYTHING[2]]),
        (lambda name, module: name.endswith("1"), [EVERYTHING[2], EVERYTHING[4]]),
    ],
)
def test_layers_and_exclude_take_the_same_patterns(layers, expected):
    model = body_and_head()
    assert list(Sparsifier(model, layers=layers).masks) == expected
    assert list(Sparsifier(model, exclude=layers).masks) == [name for name in EVERYTHING if name not in expected]


def test_a_module_itself_is_a_pattern():
    model = body_and_head()
    assert list(Sparsifier(model, layers=model["body"]).masks) == EVERYTHING[:3]
    assert list(Sparsifier(model, exclude=[model["body"][1], model["head"][0]]).masks) == [EVERYTHING[0], EVERYTHING[4]]


def test_exclude_wins_over_layers():
    assert list(Sparsifier(body_and_head(), layers=nn.Conv2d, exclude="body.1").masks) == EVERYTHING[:1]


def test_a_module_with_several_names_is_selected_by_any_of_them():
    model = body_and_head()
    model["box"] = nn.Sequential(model["head"])
    assert list(Sparsifier(model, layers="box").masks) == EVERYTHING[3:]
    assert list(Sparsifier(model, layers=model["box"]).masks) == EVERYTHING[3:]
    assert list(Sparsifier(model).masks) == EVERYTHING


@pytest.mark.parametrize("key", [3, ("a", "b")])
def test_keys_of_a_dictionary_are_checked_before_the_model_is_known(key):
    pytest.importorskip("fastai", reason="the callback needs fastai")
    from sparsifai import SparsifyCallback

    with pytest.raises(TypeError, match="cannot select layers"):
        SparsifyCallback({key: 0.5})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("re:.*weight", EVERYTHING),
        ("re:head", EVERYTHING[3:]),
        (r"re:body\..*", EVERYTHING[:3]),
        ("re:(body|head).*", EVERYTHING),
    ],
)
def test_a_regular_expression_matches_whole_names(pattern, names):
    assert list(Sparsifier(body_and_head(), layers=pattern).masks) == names


def test_fractions_by_regular_expression():
    sparsifier = Sparsifier(body_and_head())
    sparsifier.sparsify({"re:body.*": 0.5, "re:head.*": 0.25})
    assert sparsifier.masks[EVERYTHING[-1]].float().mean() == pytest.approx(0.75, abs=0.05)


HOSTILE = ["re:.*(a|a)*x", "re:((a+))+x", f"re:{'.*' * 12}x", f"re:{'.*' * 500}x", "*a" * 500, "[" + "a-z" * 300]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_match_nothing(pattern):
    """Python's re would try all ways to match these names, which takes years."""
    model = nn.ModuleDict({"a" * 150: nn.Linear(2, 2), "b" * 150: nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no layer with a weight to sparsify matches"):
        Sparsifier(model, layers=pattern)


def test_all_patterns_together_take_a_limited_time(monkeypatch):
    model = nn.ModuleDict({"a" * 300: nn.Linear(2, 2)})
    message = "takes too long; give fewer or simpler patterns, or name the layers or containers"
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, layers="re:(a|a)*(?<!a)")
    monkeypatch.setattr(patterns, "SECONDS", -1)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, layers="a*")


def test_a_list_of_many_names_is_looked_up():
    model = nn.ModuleDict({f"layer{number}": nn.Linear(2, 2) for number in range(200)})
    chosen = [f"layer{number}" for number in range(1, 200)] * 50
    with at_most_calls(1_000_000):
        assert len(Sparsifier(model, layers=chosen).masks) == 199


def test_a_name_is_a_pattern_of_itself():
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "*": nn.Linear(2, 2)})
    assert list(Sparsifier(model, layers="a[0]").masks) == ["a[0].weight", "a0.weight"]
    assert list(Sparsifier(model, exclude="a[0].weight").masks) == ["*.weight"]


def test_simple_expressions_look_at_the_clock_once_for_many_names(monkeypatch):
    """With a limit of time for each match, 500 expressions took longer than they may for a model of 10,000 layers."""
    names = [f"model.layers.{layer}.block{block}.weight" for layer in range(100) for block in range(10)]
    places, looks, left = patterns.Places({name: [name] for name in names}), [], patterns.TimeLimit.left
    monkeypatch.setattr(patterns.TimeLimit, "left", lambda limit: looks.append(0) or left(limit))
    for layer in range(10):
        assert len(places.matching(f"re:.*layers[.]{layer}[.].*weight.*")) == 10
    assert len(looks) < len(names)
