"""What is compared: for each task, the settings by name, and the sparsities at which each is measured.

A setting has arguments of SparsifyCallback, or is None for the dense net, or is a `FasterAI`. To add a row to a table
of results, add a line here.
"""

from dataclasses import dataclass

from sparsifai.all import between, granularities


@dataclass(frozen=True)
class FasterAI:
    "A setting of FasterAI's SparsifyCallback, with one of its schedules as it ships them"

    schedule: str
    context: str = "global"
    criteria: str = "large_final"


_EARLY = {"schedule": between("agp", 0, 0.35)}
_LATE = {"schedule": between("agp", 0, 0.75)}
_STRAIGHT_THROUGH = {"straight_through": True}

# One table of digits for each of these.
DIGITS_CASES = {
    f"{context}, {criterion}": {"context": context, "criteria": criterion}
    for context in ("global", "local")
    for criterion in ("large_final", "movement")
}

DIGITS = {
    "FasterAI agp": FasterAI("agp"),
    "FasterAI one_cycle": FasterAI("one_cycle"),
    "agp": {"schedule": "agp"},
    "one_cycle": {"schedule": "one_cycle"},
    "defaults": {},
    "agp in 0.35": _EARLY,
    "straight-through": _STRAIGHT_THROUGH,
    "straight-through, agp in 0.35": {**_STRAIGHT_THROUGH, **_EARLY},
    "straight-through, agp in 0.75": {**_STRAIGHT_THROUGH, **_LATE},
    "straight-through, agp in 0.75, decay 0": {**_STRAIGHT_THROUGH, **_LATE, "decay": 0.0},
    "straight-through, agp in 0.75, no gradient of masked weights": {
        **_STRAIGHT_THROUGH,
        **_LATE,
        "gradient_sparsity": 1.0,
    },
}
DIGITS_SPARSITIES = (0.9, 0.95, 0.98, 0.99)

_ALL = (0.8, 0.9, 0.95, 0.98)
_HIGH = (0.9, 0.95, 0.98)
_TWO = (0.9, 0.95)
_HALF = (0.5,)
# N:M needs a multiple of M inputs, which the first convolution, with three, does not have.
_TWO_FOUR = {"context": "2:4", "exclude": "stem.0"}
_RIGL = {"context": "erk", "schedule": "one_shot", "regrow": "grad"}

# From a setting to its arguments and sparsities.
CIFAR10 = {
    "dense": (None, (0.0,)),
    "defaults": ({}, _ALL),
    "erk": ({"context": "erk"}, _HIGH),
    "RigL": (_RIGL, _TWO),
    "movement": ({"criteria": "movement"}, _TWO),
    "random": ({"criteria": "random"}, _TWO),
    "FasterAI agp": (FasterAI("agp"), _TWO),
    "FasterAI one_cycle": (FasterAI("one_cycle"), _TWO),
    "2:4": (_TWO_FOUR, _HALF),
    "2:4, SR-STE": ({**_TWO_FOUR, **_STRAIGHT_THROUGH, "schedule": "one_shot"}, _HALF),
    "agp in 0.35": (_EARLY, _TWO),
    "straight-through": (_STRAIGHT_THROUGH, _TWO),
    "straight-through, agp in 0.35": ({**_STRAIGHT_THROUGH, **_EARLY}, _HIGH),
    "straight-through, movement, agp in 0.35": ({**_STRAIGHT_THROUGH, **_EARLY, "criteria": "movement"}, _TWO),
}

# Convolutions of one input channel an output: a twentieth of the weights of EfficientNet-Lite0.
_NO_DEPTHWISE = {"exclude": "*_depthwise_conv"}


def _named(rows):
    "From 'CONTEXT, CRITERION' to arguments of Sparsifier, with those of a third column"
    return {
        f"{context}, {criterion}{', depthwise dense' if more else ''}": {
            "context": context,
            "criteria": criterion,
            **(more[0] if more else {}),
        }
        for context, criterion, *more in rows
    }


# The second table is of criteria that need data.
ONE_SHOT = _named(
    [
        ("global", "large_final"),
        ("local", "large_final"),
        ("erk", "large_final"),
        ("uniform_plus", "large_final"),
        ("lamp", "large_final"),
        ("global", "normalized_final"),
        ("local", "large_final", _NO_DEPTHWISE),
    ]
)
CALIBRATED = _named(
    [
        ("global", "fisher"),
        ("global", "snip"),
        ("local", "fisher"),
        ("local", "snip"),
        ("local", "wanda"),
        ("per_output", "wanda"),
        ("local", "wanda", _NO_DEPTHWISE),
    ]
)
ONE_SHOT_SPARSITIES = (0.3, 0.1, 0.5, 0.2, 0.4)  # in the order in which they are run

FINE_TUNE = {
    "dense": (None, (0.0,)),
    "magnitude": ({}, (0.8, 0.9, 0.95)),
    "movement": ({"criteria": "movement"}, (0.8, 0.9, 0.95)),
    "movement pruning": ({"criteria": "movement_pruning"}, (0.8, 0.9, 0.95)),
    "straight-through, magnitude": (_STRAIGHT_THROUGH, (0.8, 0.9, 0.95)),
    "straight-through, movement": ({**_STRAIGHT_THROUGH, "criteria": "movement"}, (0.8, 0.9, 0.95)),
    # As published: masked weights get no gradient, and their scores go on accumulating.
    "straight-through, movement pruning": (
        {**_STRAIGHT_THROUGH, "criteria": "movement_pruning", "gradient_sparsity": 1.0},
        (0.8, 0.9, 0.95),
    ),
}


def head_and_neuron(model):
    "Attention heads and neurons of MLPs, in one Sparsifier"
    return granularities["head"](model) + granularities["neuron"](model)


head_and_neuron.joint = True

_MOVEMENT_PRUNING = {**_STRAIGHT_THROUGH, "criteria": "movement_pruning", "gradient_sparsity": 1.0}
_WEIGHTS = (0.9, 0.8, 0.5)
_GROUPS = (0.5, 0.25)
_HEADS = {"granularity": "head", "layers": ("bert.encoder.*.attention.*",)}
_NEURONS = {"granularity": "neuron", "layers": ("*.layer.?.intermediate.dense", "*.layer.?.output.dense")}
# The same fraction in each attention and each MLP.
_BOTH = {"granularity": head_and_neuron, "context": "local"}

_GATES = {"criteria": "gate_importance"}
_TAYLOR = {"criteria": "taylor"}
_EACH_TEN = {"every": 10}  # so that a score is the mean over ten batches

TEXT = {
    "dense": (None, (0.0,)),
    "weights, magnitude": ({}, _WEIGHTS),
    "weights, movement": ({"criteria": "movement"}, _WEIGHTS),
    "weights, straight-through movement pruning": (_MOVEMENT_PRUNING, _WEIGHTS),
    "weights, straight-through magnitude": (_STRAIGHT_THROUGH, _HALF),
    "weights, straight-through movement pruning, late": (
        {**_MOVEMENT_PRUNING, "schedule": between("agp", 0.25, 0.75)},
        _HALF,
    ),
    "heads, magnitude": (_HEADS, _GROUPS),
    "heads, gate importance": ({**_HEADS, **_GATES, **_EACH_TEN}, _GROUPS),
    "neurons, magnitude": (_NEURONS, _GROUPS),
    "neurons, gate importance": ({**_NEURONS, **_GATES, **_EACH_TEN}, _GROUPS),
    "heads and neurons, magnitude": (_BOTH, _HALF),
    "heads and neurons, gate importance": ({**_BOTH, **_GATES, **_EACH_TEN}, _HALF),
}


def _by_criteria(heads, neurons, ending=""):
    "From names to arguments and sparsities: heads, then neurons, by the magnitude and by criteria of data"
    return {
        f"{what}, {criterion}{ending}": ({**groups, **options}, _GROUPS)
        for what, groups in (("heads", heads), ("neurons", neurons))
        for criterion, options in (("magnitude", {}), ("taylor", _TAYLOR), ("gate importance", _GATES))
    }


# Pruned once after the training of the dense net, and not trained after it.
TEXT_ONE_SHOT = {
    "weights, magnitude, once": ({"context": "local"}, _WEIGHTS),
    "weights, wanda, once": ({"context": "per_output", "criteria": "wanda"}, _WEIGHTS),
    **_by_criteria(_HEADS, _NEURONS, ", once"),
}

_NEURONS_OF_LLAMA = {"granularity": "neuron", "layers": ("*.mlp.*",)}
_HEADS_OF_LLAMA = {"granularity": "head", "layers": ("*.self_attn.*",)}

DECODER = {
    "dense": (None, (0.0,)),
    "weights, magnitude": ({"context": "local"}, _HALF),
    "weights, wanda": ({"context": "per_output", "criteria": "wanda"}, _HALF),
    "2:4, magnitude": ({"context": "2:4"}, _HALF),
    "2:4, wanda": ({"context": "2:4", "criteria": "wanda"}, _HALF),
    **_by_criteria(_HEADS_OF_LLAMA, _NEURONS_OF_LLAMA),
}
