"""Names that other libraries have for what has another name here. Errors on unknown names look them up.

FasterAI 0.3 and 0.4, torch.nn.utils.prune, SparseML and llm-compressor, JaxPruner.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from opcode import opname
from typing import TYPE_CHECKING

from .printable import quoted

_LAYERS = (("layers", "layers=nn.Conv2d"),)
_TARGET = (("sparsity", "sparsity=0.5"), ("levels", "levels=(0.5,)"))
_CRITERIA = (("criteria", "criteria='large_final'"),)
_TIMES = (("schedule", "schedule=between('agp', 0.2, 0.8), in fractions of the training"),)
_EVERY = (("every", "every=10, in batches"),)
_NO_NAME = ""  # an argument that has no counterpart: what to write instead

# Argument elsewhere -> arguments here, each with how to write it. The first that the function has is told.
ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    # FasterAI
    "layer_type": _LAYERS,
    "layer_types": _LAYERS,
    "lth": ((_NO_NAME, "lottery tickets are found by a function: lottery_ticket(learn, 0.9, rounds=5)"),),
    "rewind_epoch": (
        ("rewind_to", "rewind_to=1"),
        (_NO_NAME, "a function prunes and rewinds: lottery_ticket(learn, 0.9, rewind_to=1)"),
    ),
    "reset_end": ((_NO_NAME, "tickets = lottery_ticket(learn, 0.9), then tickets[-1].apply(learn.model)"),),
    "save_tickets": (("path", "path='tickets.pt'"), (_NO_NAME, "lottery_ticket(learn, 0.9, path='tickets.pt')")),
    "model": (("learn_or_model", "a Learner or a module"), ("learn", "a Learner"), ("layers", "layers=learn.model[0]")),
    "nm": (("context", "context='2:4'"),),
    "method": (("context", "context='global'"),),
    "sched_func": (("schedule", "schedule='agp'"),),
    "start_pct": _TIMES,
    "end_pct": _TIMES,
    "start_val": (("initial_sparsity", "initial_sparsity=0.2"),),
    "start_sparsity": (("initial_sparsity", "initial_sparsity=0.2"),),
    "end_sparsity": _TARGET,
    "target_sparsity": _TARGET,
    "pruning_ratio": (("sparsity", "sparsity=0.5, a fraction of the weights"),),
    "default_pruning_ratio": (("sparsity", "sparsity={'*': 0.5, 'conv1': 0.2}"),),
    "iterative_steps": (("steps", "steps=5"), ("schedule", "schedule=iterative(5)")),
    "ignored_layers": (("exclude", "exclude='fc'"),),
    "num_heads": (("granularity", "granularity='head'"),),
    "round_to": ((_NO_NAME, "it is an argument of Sparsifier and SparsifyCallback"),),
    "data": (
        ("calibration", "calibration=batches"),
        (_NO_NAME, "batches are given by a method: sparsifier.calibrate(batches, loss_func)"),
    ),
    "calibration_data": (("calibration", "calibration=batches"),),
    "example_inputs": (("example_input", "example_input=batch"),),
    "dummy_input": (("example_input", "example_input=batch"),),
    "sample": (("example_input", "example_input=batch"),),
    "reducer": (("pool", "pool='sum'"),),
    "activations_student": (("features", "features={'layer of the student': 'layer of the teacher'}"),),
    "activations_teacher": (("features", "features={'layer of the student': 'layer of the teacher'}"),),
    "T": (("temperature", "temperature=5"),),
    "verbose": (("progress", "progress=False"), (_NO_NAME, "learn.no_bar() and learn.no_logging() silence a fit")),
    "quantizer": ((_NO_NAME, "layers are rounded to int8 by torch's fake quantization, with no choice of quantizer"),),
    "backend": ((_NO_NAME, "quantize(model, batches, path) writes the int8 model for onnxruntime"),),
    "use_per_tensor": ((_NO_NAME, "weights are rounded by output channel, inputs by tensor"),),
    "eval_fn": (("metric", "metric=function of the model"),),
    "level": (("levels", "levels=(0.5,)"),),
    "higher_is_better": (("lower_is_better", "lower_is_better=False"),),
    "metric_name": (("metric", "metric='accuracy'"),),
    # torch.nn.utils.prune
    "amount": _TARGET,
    "module": (("model", "a torch.nn.Module"), ("layers", "layers=model.conv1")),
    "name": (("layers", "layers='conv1.weight'"),),
    "parameters": (("layers", "layers=['conv1.weight', 'fc.weight']"),),
    "pruning_method": _CRITERIA,
    "importance_scores": (("criteria", "criteria=function of the weight"),),
    "dim": (("granularity", "granularity='filter', or another tuple of axes"),),
    # SparseML and llm-compressor
    "final_sparsity": _TARGET,
    "init_sparsity": (("initial_sparsity", "initial_sparsity=0.05"),),
    "start_epoch": _TIMES,
    "end_epoch": _TIMES,
    "start": _TIMES,
    "end": _TIMES,
    "update_frequency": _EVERY,
    "params": (("layers", "layers=['conv1.weight', 're:.*fc.*']"),),
    "targets": (("layers", "layers=['conv1', 're:.*fc.*']"),),
    "ignore": (("exclude", "exclude='lm_head'"),),
    "inter_func": (("schedule", "schedule='agp', which is cubic"),),
    "mask_type": (("granularity", "granularity='filter'; a pattern such as 2:4 is context='2:4'"),),
    "mask_structure": (("context", "context='2:4'"),),
    "score_type": _CRITERIA,
    "global_sparsity": (("context", "context='global'"),),
    "leave_enabled": ((_NO_NAME, "KeepSparsity stays after a fit and keeps the zeros, until it is removed"),),
    # JaxPruner
    "sparsity_distribution_fn": (("context", "context='erk'"),),
    "dist_type": (("context", "context='erk'"),),
    "scheduler": (("schedule", "schedule='agp'"),),
    "sparsity_type": (("context", "context='2:4'"), ("granularity", "granularity='4x4'")),
    "algorithm": _CRITERIA,
    "update_freq": _EVERY,
    "update_start_step": _TIMES,
    "update_end_step": _TIMES,
    "drop_fraction": (("drop", "drop=0.3"),),
    "drop_fraction_fn": (("drop_schedule", "drop_schedule='cos'"),),
    "rng_seed": (("seed", "seed=0"),),
    # Words that mean the same
    "criterion": _CRITERIA,
    "epochs": (("n_epoch", "n_epoch=5"),),
    "n_epochs": (("n_epoch", "n_epoch=5"),),
    "lr": (("lr_max", "lr_max=1e-3"),),
}

# Kind of a registry -> name elsewhere -> how to write it here.
VALUES: dict[str, dict[str, str]] = {
    "granularity": {
        **dict.fromkeys(("shared_kernel", "input_channel"), "'channel'"),
        **dict.fromkeys(("unstructured", "fine", "element", "elementwise", "parameter"), "'weight'"),
        **dict.fromkeys(("structured", "output_channel"), "'filter'"),
        **dict.fromkeys(("block4", "block_4"), "'1x4'"),
        **dict.fromkeys(("nm", "n:m", "2:4"), "context='2:4'"),
    },
    "context": {
        **dict.fromkeys(("uniform", "layer", "layerwise"), "'local'"),
        **dict.fromkeys(("nm", "n:m"), "'2:4'"),
        "ERK": "'erk'",
        "global_unstructured": "'global'",
    },
    "criterion": {
        **dict.fromkeys(("magnitude", "l1", "L1", "abs", "l1_unstructured", "weight_magnitude"), "'large_final'"),
        "global_magnitude": "criteria='normalized_final' with context='global'",
        **dict.fromkeys(("l2", "L2", "squared_magnitude"), "'squared_final'"),
        **dict.fromkeys(("grad_crit", "first_order"), "'taylor'"),
        **dict.fromkeys(("mfac", "MFAC", "M-FAC", "OBS", "optimal_brain_surgeon"), "'obs'"),
        **dict.fromkeys(("saliency", "SNIP"), "'snip'"),
        **dict.fromkeys(("rigl", "RigL"), "criteria='large_final' with regrow='grad'"),
        **dict.fromkeys(("set", "SET"), "criteria='large_final' with regrow='random'"),
        **dict.fromkeys(("random_unstructured", "rand"), "'random'"),
    },
    "schedule": {
        **dict.fromkeys(("sched_agp", "cubic", "polynomial"), "'agp'"),
        "sched_lin": "'lin'",
        "inverse_cubic": "'lin', which has the same ends",
        "sched_cos": "'cos'",
        "sched_oneshot": "'one_shot'",
        "sched_iterative": "iterative(3)",
        "sched_onecycle": "'one_cycle'",
        "sched_dsd": "'dsd'",
    },
}

# Class -> attribute elsewhere -> how to write it here.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "Sparsifier": {
        "sparsify_model": "sparsify: sparsifier.sparsify(0.5)",
        "prune_model": "sparsify: sparsifier.sparsify(0.5), and shrink(model, batch) removes zero filters",
        "sparsify_layer": "layers=: Sparsifier(model, layers='conv1').sparsify(0.5)",
        "prune_layer": "layers=: Sparsifier(model, layers='conv1').sparsify(0.5)",
        "sparsify_batchnorm": "sparsify: norm layers are pruned with the filters before them",
        "print_sparsity": "report: print(sparsifier.report())",
        "save_model": "state_dict: torch.save(model.state_dict(), path); zeros are in the weights",
        "mask": "masks: a dictionary from parameter name to mask",
        "compute_mask": "sparsify: it builds the masks and applies them",
        "remove": "nothing: the model has no hooks and no other parameters; its weights are the pruned ones",
        "instant_sparsify": "sparsify: sparsifier.sparsify(0.5)",
        "step": "update_masks, after the step of the optimizer; apply_masks keeps the masks as they are",
        "post_gradient_update": "apply_masks, after the step of the optimizer",
    },
    "TrainingManager": {
        "modify": "TrainingManager(model, optimizer, Sparsify(0.9), epochs=5, steps_per_epoch=100), which begins",
        "finalize": "finish: manager.finish(), after the last step",
        "update_masks": "step: manager.step() steps the optimizer and updates the masks",
    },
    "Recipe": {
        "modify": "manager: recipe.manager(model, optimizer, steps_per_epoch)",
        "max_epochs": "epochs",
        "finalize": "finish of its manager: manager.finish(), after the last step",
    },
}

_LOTTERY = "lottery_ticket(learn, 0.9, rounds=5)"
_SHRUNK = "granularity='filter' with coupled=True, then shrink(model, batch)"
_DISTIL = "DistillCallback(teacher)"
_RECIPE = "Recipe.from_sparseml(path)"
_OPERATOR = "Sparsifier(model).sparsify(0.5)"

# Class or function of another library -> how to write it here. Those of schedules and criteria are in VALUES.
PUBLIC: dict[str, str] = {
    # FasterAI
    "PruneCallback": f"SparsifyCallback: {_SHRUNK}",
    "Pruner": f"Sparsifier: {_SHRUNK}",
    "Schedule": "a function of t, or between(agp, 0.2, 0.8)",
    "Criteria": "a function of the weight, with @criteria.register",
    "Granularities": "granularities",
    "Reducer": "pool='sum', an argument of Sparsifier and SparsifyCallback",
    "Normalizer": "a function of the weight, with @criteria.register; normalized_final divides by the l2 norm",
    "available_criterias": "list(criteria)",
    "available_schedules": "list(schedules)",
    "KnowledgeDistillationCallback": _DISTIL,
    **dict.fromkeys(("SoftTarget", "Mutual"), f"{_DISTIL}, whose loss is 'soft_targets'"),
    "Logits": f"{_DISTIL[:-1]}, loss='mean_squared_error')",
    "Attention": f"{_DISTIL[:-1]}, feature_loss='attention_transfer')",
    "Similarity": f"{_DISTIL[:-1]}, feature_loss='similarity')",
    "FitNet": f"{_DISTIL[:-1]}, feature_loss='mean_squared_error')",
    "Quantizer": "quantize(model, batches, path)",
    **dict.fromkeys(("FakeQuantizer", "FakeQuantizeCallback"), "QuantizeCallback"),
    "analyze_sensitivity": "sensitivity(learn)",
    # torch.nn.utils.prune
    **dict.fromkeys(("l1_unstructured", "random_unstructured", "global_unstructured"), _OPERATOR),
    **dict.fromkeys(("ln_structured", "random_structured"), "Sparsifier(model, 'filter').sparsify(0.5)"),
    "custom_from_mask": "Sparsifier(model).set_masks({'conv1.weight': mask})",
    # SparseML and llm-compressor
    "ScheduledModifierManager": f"{_RECIPE}, then recipe.manager(model, optimizer, steps_per_epoch)",
    "oneshot": f"{_RECIPE}, then recipe.apply(model, batches)",
    # JaxPruner
    "create_updater_from_config": "TrainingManager(model, optimizer, Sparsify(0.9), epochs=5, steps_per_epoch=100)",
    "summarize_sparsity": "Report.of(model)",
}


def name_of_argument(name: str, known: Collection[str]) -> str:
    """What an argument of another library is called here.

    Args:
        name: The argument that the user passed.
        known: The arguments that the function has.

    Returns:
        The end of an error message; "" if no library is known to have such an argument.

    Example:
        >>> name_of_argument("layer_type", ["layers", "exclude"])
        'its name here is layers: layers=nn.Conv2d'
    """
    for ours, example in ARGUMENTS.get(name, ()):
        if ours == _NO_NAME:
            return example
        if ours in known:
            return f"its name here is {ours}: {example}"
    return ""


def name_of_value(kind: str, name: str) -> str:
    """What a value of another library is called here.

    Args:
        kind: The kind of a registry, such as 'schedule'.
        name: The name that the user passed.

    Returns:
        The end of an error message; "" if no library is known to have such a value.

    Example:
        >>> name_of_value("schedule", "sched_agp")
        "its name here is 'agp'"
    """
    ours = VALUES.get(kind, {}).get(name)
    return f"its name here is {ours}" if ours else ""


def unknown_name(module: str, name: str) -> AttributeError | ImportError:
    """The error of a name that a module does not have, with what another library's name is called here.

    Args:
        module: Name of the module, whose `__getattr__` calls this.
        name: The name.

    Returns:
        An AttributeError; or, as Python hides its text from `from module import name`, an ImportError there.
    """
    ours = PUBLIC.get(name) or VALUES["schedule"].get(name) or VALUES["criterion"].get(name)
    if not ours and name.endswith("Modifier"):
        ours = f"{_RECIPE}, which converts a recipe with it"
    if not ours:
        return AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
    asked = sys._getframe(2)
    is_import = opname[asked.f_code.co_code[asked.f_lasti]] == "IMPORT_FROM"
    return (ImportError if is_import else AttributeError)(f"{module} has no {name}; what to use here is {ours}")


class ForeignAttributes:
    """A class whose instances tell what an attribute of another library is called here."""

    if not TYPE_CHECKING:  # with it, a type checker would accept every name

        def __getattr__(self, name):
            if hasattr(type(self), name):  # a property that has raised an AttributeError of its own
                return object.__getattribute__(self, name)
            kind = next((each.__name__ for each in type(self).__mro__ if each.__name__ in ATTRIBUTES), "")
            ours = ATTRIBUTES.get(kind, {}).get(name)
            hint = f"; what to use here is {ours}" if ours else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {quoted(name)}{hint}", name=name, obj=self)
