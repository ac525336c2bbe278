"""What each modifier of SparseML becomes."""

import re

import pytest
from sparseml_texts import modifiers

from sparsifai.recipes.sparseml.convert import convert


def only(text):
    """The one step that a modifier becomes, and its notices by key. text: the modifier in one line."""
    recipe, notices = convert(f"modifiers:\n  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 20}}\n  - {text}\n")
    assert recipe["epochs"] == 20
    assert {notice.line for notice in notices} <= {3}
    (step,) = recipe.get("steps") or [None]
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


ACDC = (
    "!ACDCPruningModifier {compression_sparsity: 0.9, start_epoch: 2, end_epoch: %s, update_frequency: 3, "
    "params: __ALL_PRUNABLE__, momentum_buffer_reset: True}"
)


def test_ac_dc():
    step, notices = only(ACDC % 14)
    assert notices.keys() == {"params", "momentum_buffer_reset"}
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
    step = only((ACDC % 12).replace("2, ", "-1, ", 1).replace("momentum_buffer_reset: True", "global_sparsity: False"))
    assert (step[0]["sparsify"]["context"], step[0]["sparsify"]["start"]) == ("local", 0)


def test_ac_dc_of_one_phase_is_sparse_from_the_start():
    step = only(ACDC % 5)[0]["sparsify"]
    assert (step["schedule"], step["start"], step["end"]) == ("one_shot", 2, 5)


def test_rigl():
    step, notices = only(
        "!RigLPruningModifier {final_sparsity: 0.8, start_epoch: 5, end_epoch: 15, update_frequency: 0.1, "
        "params: __ALL__, global_sparsity: False, sparsity_strategy: erdos_renyi, init_update_fraction: 0.25, "
        "inter_func: cubic, num_grads: 10}"
    )
    assert step["sparsify"] == {
        "sparsity": 0.8,
        "layers": ["*"],
        "granularity": "weight",
        "context": "er",
        "criteria": "large_final",
        "schedule": "one_shot",
        "regrow": "grad",
        "drop": 0.25,
        "drop_schedule": {"between": ["cos", 0.25, 0.75]},
        "start": 5,
        "end": 15,
        "update_every": 0.1,
    }
    assert notices.keys() == {"params", "inter_func", "num_grads"}
    step, notices = only("!RigLPruningModifier {final_sparsity: {0.8: [a], 0.5: ['re:b']}, update_frequency: 1}")
    assert step["sparsify"]["sparsity"] == {"re:b.*": 0.5, "a": 0.8}
    assert (step["sparsify"]["context"], step["sparsify"]["drop"], notices) == ("erk", 0.3, {})


def test_top_kast():
    step, notices = only(
        "!TopKASTPruningModifier {forward_sparsity: 0.9, backward_sparsity: 0.5, start_epoch: 0, end_epoch: 10, "
        "update_frequency: -1, params: ['re:.*weight'], active_weight_decay: 0.0001}"
    )
    assert step["sparsify"] == {
        "sparsity": 0.9,
        "layers": ["re:.*weight.*"],
        "granularity": "weight",
        "context": "global",
        "criteria": "large_final",
        "schedule": "one_shot",
        "straight_through": True,
        "decay": 0,
        "gradient_sparsity": 0.5,
        "start": 0,
        "end": 10,
    }
    assert notices.keys() == {"active_weight_decay"}


@pytest.mark.parametrize(
    ("name", "context"),
    [("OBSPruningModifier", "global"), ("MFACPruningModifier", "local"), ("MFACGlobalPruningModifier", "global")],
)
def test_second_order_modifiers(name, context):
    step, notices = only(f"!{name} {{{COMMON}, final_sparsity: 0.9, num_grads: 64, damp: 1e-7}}")
    assert (step["sparsify"]["criteria"], step["sparsify"]["compensate"]) == ("obs", True)
    assert (step["sparsify"]["context"], step["sparsify"]["schedule"]) == (context, "agp")
    assert (step["sparsify"]["initial_sparsity"], step["sparsify"]["sparsity"]) == (0.1, 0.9)
    without_size = {"OBSPruningModifier"} & {name}  # its documentation and its code differ
    assert notices.keys() == {"num_grads"} | without_size


def test_options_of_second_order_criteria():
    def criterion(text):
        step, notices = only(text)
        return step["sparsify"]["criteria"], {*notices}

    obs = f"!OBSPruningModifier {{{COMMON}, final_sparsity: 0.9, fisher_block_size: %s, damp: '1e-6'}}"
    assert criterion(obs % 50) == ({"obs": {"damping": 1e-6}}, set())
    assert criterion(obs % 4) == ({"obs": {"damping": 1e-6, "block_size": 4}}, set())
    assert criterion((obs % 2000).replace("OBS", "MFAC")) == ({"obs": {"damping": 1e-6}}, {"fisher_block_size"})
    assert criterion(f"!MFACPruningModifier {{{COMMON}, final_sparsity: 0.9}}") == ({"obs": {"damping": 1e-5}}, set())
    gpt = "!SparseGPTModifier {sparsity: 0.5, targets: ['a'], block_size: 128, %s: 0.02}"
    assert criterion(gpt % "percdamp") == criterion(gpt % "dampening_frac") == ({"sparsegpt": {"damping": 0.02}}, set())
    assert criterion((gpt % "percdamp").replace("0.02", "0.01")) == ("sparsegpt", set())


def test_legacy_names_and_parameters():
    text = f"!GMPruningModifier {{{COMMON}, final_sparsity: 0.8, phased: False}}"
    assert only(text.replace("GMPruning", "LegacyGMPruning")) == only(text)
    assert only(text)[1] == {}
    notices = []
    for notice in convert(modifiers("final_sparsity: 0.8, params: [a], phased: True"))[1]:
        notices.append((notice.key, notice.lost))
    assert notices == [("phased", True)]


def test_a_sparsity_that_would_fall_starts_where_it_ends():
    text = modifiers("final_sparsity: 0.1, init_sparsity: 0.3, params: [a]")
    (step,), (notice,) = convert(text)[0]["steps"], convert(text)[1]
    assert (step["sparsify"]["sparsity"], step["sparsify"]["initial_sparsity"]) == (0.1, 0.1)
    assert (notice.key, notice.lost) == ("init_sparsity", True)


def test_constant_pruning_keeps():
    assert only("!ConstantPruningModifier {start_epoch: 0.0, params: __ALL_PRUNABLE__}") == ({"keep": {}}, {})
    assert only("!ConstantPruningModifier") == ({"keep": {}}, {})
    step, notices = only("!ConstantPruningModifier {start_epoch: 3, end_epoch: 9, update_frequency: 1, params: [a]}")
    assert step == {"keep": {}}
    assert notices.keys() == {"start_epoch", "end_epoch", "update_frequency", "params"}


def test_trainable_parameters_and_distillation():
    step, notices = only(
        "!TrainableParamsModifier {params: ['re:features'], trainable: False, end_epoch: 5, update_frequency: 1}"
    )
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
    for keys, lost in (("[start_logits, end_logits]", False), ("[boxes]", False), ("[start, end]", True)):
        text = f"!EpochRangeModifier {{end_epoch: 9}}\n- !DistillationModifier {{distill_output_keys: {keys}}}"
        _, notices = convert(f"modifiers:\n- {text}")
        assert [(notice.key, notice.lost) for notice in notices] == [("distill_output_keys", lost)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!SetWeightDecayModifier {start_epoch: 0, weight_decay: 0.01}", "weight decay is left to fastai"),
        ("!SetLearningRateModifier {learning_rate: 0.1}", "left to fastai, such as .*; left out: learning_rate=0.1"),
        ("!LayerThinningModifier {structure_type: filter}", "has no counterpart"),
        ("!SmoothQuantModifier {smoothing_strength: 0.5}", "weights are not rescaled"),
        ("!AWQModifier {duo_scaling: True}", "weights are not rescaled"),
        ("!FooModifier {final_sparsity: 0.9}", "is not a known modifier; .*; left out: final_sparsity=0.9"),
    ],
)  # fmt: skip
def test_a_modifier_without_counterpart_is_left_out_with_a_notice(text, message):
    step, notices = only(text)
    assert step is None
    assert len(notices) == 1
    assert re.search(message, notices[text[1 : text.index(" ")]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!LayerPruningModifier {layers: [a]}", "has no counterpart: no layer is removed while training"),
        ("!GMPrunningModifier {final_sparsity: 0.9}", "is not a known modifier; did you mean 'GMPruningModifier'"),
        ("!GMPruningModifier {final_sparsity: 0.9, score_type: MFAC}", "score_type 'MFAC' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: [1, -1]}", r"mask_type '\[1, -1\]' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: odd}", "mask_type 'odd' has no counterpart"),
        ("!GMPruningModifier {final_sparsity: 0.9, mask_type: '4:4'}", "mask_type '4:4' has no counterpart"),
    ],
)  # fmt: skip
def test_a_recipe_of_which_no_pruning_is_left_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^line 3: .*nothing that prunes can be converted:\nline 3: .*{message}"):
        only(text)


@pytest.mark.parametrize("key", ["leave_enabled: False", "log_types: [x]", "odd: 3", "init_sparsity: __FROM_PARAM__"])
def test_a_parameter_that_is_not_converted_has_a_notice_with_its_line(key):
    text = (
        f"modifiers:\n  - !GMPruningModifier\n    params: [a]\n    final_sparsity: 0.5\n    end_epoch: 4\n    {key}\n"
    )
    recipe, notices = convert(text)
    assert recipe["steps"][0]["sparsify"].keys() & {"leave_enabled", "log_types", "odd", "initial_sparsity"} == set()
    assert [(notice.line, notice.key) for notice in notices] == [(6, key.split(":")[0])]
