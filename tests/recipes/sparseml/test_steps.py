"""What each modifier of SparseML becomes."""

import re

import pytest

from sparsifai.axes.schedule import schedules
from sparsifai.recipes.sparseml.convert import convert


def only(text):
    """The one step that a modifier becomes, and its notices by key. text: the modifier in one line."""
    recipe, notices = convert(f"modifiers:\n  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 20}}\n  - {text}\n")
    assert recipe["epochs"] == 20
    assert {notice.line for notice in notices} <= {3}
    (step,) = recipe["steps"] or [None]
    return step, {notice.key: notice.message for notice in notices}


COMMON = "start_epoch: 0, end_epoch: 10, update_frequency: 0.5, params: [a.weight], init_sparsity: 0.1"


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8}}", {}),
        (f"!MagnitudePruningModifier {{{COMMON}, final_sparsity: 0.8}}", {}),
        (f"!GlobalMagnitudePruningModifier {{{COMMON}, final_sparsity: 0.8}}", {"context": "global"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, global_sparsity: True}}", {"context": "global"}),
        (f"!MovementPruningModifier {{{COMMON}, final_sparsity: 0.8}}", {"criteria": "movement_pruning"}),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, score_type: movement}}",
            {"criteria": "movement_pruning"},
        ),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, inter_func: linear}}", {"schedule": "lin"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: block}}", {"granularity": "1x4"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: block4}}", {"granularity": "1x4"}),
        (f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, mask_type: [2, 4]}}", {"granularity": "2x4"}),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.5, mask_type: '2:4'}}",
            {"context": "2:4", "sparsity": 0.5},
        ),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.5, mask_type: tensorrt}}",
            {"context": "2:4", "sparsity": 0.5},
        ),
        (
            f"!GMPruningModifier {{{COMMON}, final_sparsity: {{0.8: [a.weight, 're:b'], 0.5: ['re:.*']}}}}",
            {"sparsity": {"re:.*": 0.5, "re:b.*": 0.8, "a.weight": 0.8}, "layers": None},
        ),
    ],
)
def test_gradual_modifiers(text, changed):
    expected = {
        "sparsity": 0.8,
        "layers": ["a.weight"],
        "granularity": "weight",
        "context": "local",
        "criteria": "large_final",
        "schedule": "agp",
        "start": 0,
        "end": 10,
        "update_every": 0.5,
        "initial_sparsity": 0.1,
    } | changed
    step, notices = only(text)
    assert step == {"sparsify": {key: value for key, value in expected.items() if value is not None}}
    if isinstance(expected["sparsity"], dict):  # the last match counts, in SparseML the first
        assert list(step["sparsify"]["sparsity"]) == list(expected["sparsity"])
    assert list(notices) == (["params"] if expected["layers"] is None else [])


def test_structured_pruning():
    step, notices = only(
        "!StructuredPruningModifier {init_sparsity: 0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 10, "
        "update_frequency: 1, mask_type: channel, param_groups: [[a, b]]}"
    )
    assert "layers" not in step["sparsify"]
    assert (step["sparsify"]["granularity"], step["sparsify"]["pool"]) == ("channel", "l2")
    assert notices.keys() == {"mask_type", "param_groups"}
    step, notices = only("!StructuredPruningModifier {final_sparsity: 0.5, params: [a.weight]}")
    assert step["sparsify"]["granularity"] == "filter"
    assert notices == {}


def test_ac_dc_ends_with_a_sparse_phase():
    acdc = "!ACDCPruningModifier {compression_sparsity: 0.9, start_epoch: 2, end_epoch: %s, update_frequency: 3, "
    acdc += "params: __ALL_PRUNABLE__, momentum_buffer_reset: True}"
    step, notices = only(acdc % 17)
    assert notices.keys() == {"params", "end_epoch", "momentum_buffer_reset"}
    assert step["sparsify"] == {
        "sparsity": 0.9,
        "granularity": "weight",
        "context": "global",
        "criteria": "large_final",
        "schedule": {"ac_dc": {"warm_up": 0.25, "phase": 0.25, "dense": 0.5, "sparse": 0.75}},
        "start": 2,
        "end": 14,
        "update_every": 3,
    }
    for end in (8, 12, 13.5, 14, 15, 17, 19, 20):
        step = only(acdc % end)[0]["sparsify"]
        for tenth in range(int(10 * (step["end"] - step["start"]))):
            # Phases 0, 2, ... are dense, 1, 3, ... are sparse.
            level = schedules["ac_dc"]((tenth / 10) / (step["end"] - step["start"]), **step["schedule"]["ac_dc"])
            assert level == tenth // 30 % 2
        assert level == 1
    acdc = acdc.replace("2, ", "-1, ", 1).replace("momentum_buffer_reset: True", "global_sparsity: False")
    step = only(acdc % 12)[0]["sparsify"]
    assert (step["context"], step["start"]) == ("local", 0)
    with pytest.raises(ValueError, match="line 3: ACDCPruningModifier, update_frequency"):
        only(acdc % 3)


def test_rigl():
    step, notices = only(
        "!RigLPruningModifier {sparsity: 0.8, start_epoch: 5, end_epoch: 15, update_frequency: 0.1, params: __ALL__, "
        "global_sparsity: True, sparsity_strategy: erdos_renyi, init_update_fraction: 0.25, inter_func: cubic}"
    )
    assert step["sparsify"] == {
        "sparsity": 0.8,
        "layers": ["*"],
        "granularity": "weight",
        "context": "er",
        "criteria": "large_final",
        "schedule": "cos",
        "regrow": "grad",
        "drop": 0.25,
        "drop_schedule": {"between": ["cos", 0.25, 0.75]},
        "start": 5,
        "end": 15,
        "update_every": 0.1,
        "initial_sparsity": pytest.approx(0.6),
    }
    assert notices.keys() == {"params", "init_update_fraction", "inter_func"}


def test_constant_pruning_keeps():
    assert only("!ConstantPruningModifier {start_epoch: 0.0, params: __ALL_PRUNABLE__}") == ({"keep": {}}, {})
    assert only("!ConstantPruningModifier") == ({"keep": {}}, {})
    step, notices = only("!ConstantPruningModifier {start_epoch: 3, end_epoch: 9, update_frequency: 1, params: [a]}")
    assert step == {"keep": {}}
    assert notices.keys() == {"start_epoch", "end_epoch", "update_frequency", "params"}


def test_trainable_parameters_and_distillation():
    step, notices = only("!TrainableParamsModifier {params: ['re:features'], trainable: False, end_epoch: 5}")
    assert (step, notices) == ({"freeze": {"layers": ["re:features.*"], "end": 5}}, {})
    step, notices = only("!TrainableParamsModifier {params: __ALL__, trainable: False, params_strict: False}")
    assert step == {"freeze": {"layers": ["*"]}}
    assert notices.keys() == {"params_strict"}
    step, notices = only("!TrainableParamsModifier {params: __ALL__, trainable: True}")
    assert step is None
    assert "left out: params='__ALL__', trainable=True" in notices["TrainableParamsModifier"]
    step, notices = only("!DistillationModifier {hardness: 0.75, start_epoch: 5, distill_output_keys: [logits]}")
    assert step == {
        "distil": {"weight": 0.75, "temperature": 2.0, "schedule": {"between": ["one_shot", 0.25, 1]}},
    }
    assert notices.keys() == {"distill_output_keys"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!SetWeightDecayModifier {start_epoch: 0, weight_decay: 0.01}", "weight decay is left to fastai"),
        ("!SetLearningRateModifier {learning_rate: 0.1}", "left to fastai, such as .*; left out: learning_rate=0.1"),
        ("!QuantizationModifier {start_epoch: 5, submodules: [a, b]}", r"left to torch.*submodules=\['a', 'b'\]"),
        ("!OBSPruningModifier {final_sparsity: 0.9}", "has no counterpart.*final_sparsity=0.9"),
        ("!MFACPruningModifier {final_sparsity: 0.9}", "has no counterpart"),
        ("!LayerThinningModifier {structure_type: filter}", "has no counterpart"),
        ("!GMPrunningModifier {final_sparsity: 0.9}", "is not a known modifier; did you mean 'GMPruningModifier'"),
        ("!GMPruningModifier {final_sparsity: 0.9, score_type: MFAC}", "score_type 'MFAC' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: [1, -1]}", r"mask_type '\[1, -1\]' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: odd}", "mask_type 'odd' has no counterpart"),
    ],
)  # fmt: skip
def test_a_modifier_without_counterpart_is_left_out_with_a_notice(text, message):
    step, notices = only(text)
    assert step is None
    assert len(notices) == 1
    assert re.search(message, notices[text[1 : text.index(" ")]])


@pytest.mark.parametrize("key", ["leave_enabled: False", "log_types: [x]", "odd: 3", "init_sparsity: __FROM_PARAM__"])
def test_a_parameter_that_is_not_converted_has_a_notice_with_its_line(key):
    text = (
        f"modifiers:\n  - !GMPruningModifier\n    params: [a]\n    final_sparsity: 0.5\n    end_epoch: 4\n    {key}\n"
    )
    recipe, notices = convert(text)
    assert recipe["steps"][0]["sparsify"].keys() & {"leave_enabled", "log_types", "odd", "initial_sparsity"} == set()
    assert [(notice.line, notice.key) for notice in notices] == [(6, key.split(":")[0])]
