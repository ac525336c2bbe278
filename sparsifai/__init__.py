"""sparsifai: train neural networks whose weights are exact zeros.

Four questions say how a model is pruned. Each has a registry of answers, which are functions: how weights are grouped
(`granularities`), where scores are ranked (`contexts`), what the score of a weight is (`criteria`), and when the
sparsity grows (`schedules`). `Sparsifier` prunes any torch model. `SparsifyCallback` calls it while a fastai Learner
trains.
"""

from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Any

from .support.foreign_names import unknown_name as _unknown_name
from .support.version import __version__ as __version__

if TYPE_CHECKING:
    from .callbacks.freeze import FreezeCallback as FreezeCallback
    from .callbacks.keep import KeepSparsity as KeepSparsity
    from .callbacks.sparsify import SparsifyCallback as SparsifyCallback
    from .public import *
    from .quantization.quantize_callback import QuantizeCallback as QuantizeCallback
    from .recipes.recipe import Recipe
    from .training.distill import DistillCallback as DistillCallback
    from .training.lottery import lottery_ticket as lottery_ticket
    from .training.regularize import RegularizeCallback as RegularizeCallback

# What `from sparsifai import *` brings. sparsifai.all has the names that need fastai, too.
__all__ = [
    "Comparison",
    "Distil",
    "Distillation",
    "Freeze",
    "Keep",
    "LotteryTickets",
    "Plan",
    "Quantize",
    "Quantized",
    "Recipe",
    "Regularize",
    "Regularizer",
    "Report",
    "SemiStructured",
    "Sensitivity",
    "Shrinkage",
    "SparseFile",
    "Sparsifier",
    "Sparsifiers",
    "Sparsify",
    "Ticket",
    "TrainingManager",
    "ac_dc",
    "agp",
    "along",
    "attention_transfer",
    "between",
    "block",
    "blocks",
    "bounded",
    "compare",
    "contexts",
    "cos",
    "criteria",
    "distillation_losses",
    "dsd",
    "during",
    "fisher",
    "from_torch_prune",
    "gate_importance",
    "global_",
    "granularities",
    "grasp",
    "highest_sparsity",
    "is_nm",
    "iterative",
    "lamp",
    "large_final",
    "large_init",
    "large_init_large_final",
    "lin",
    "load_quantized",
    "load_shrunk",
    "load_sparse",
    "local",
    "magnitude_increase",
    "movement",
    "movement_pruning",
    "movmag",
    "normalized_final",
    "obs",
    "one_cycle",
    "one_shot",
    "plot_schedule",
    "quantities",
    "quantize",
    "raised",
    "register_attention",
    "register_layer",
    "register_mlp",
    "relational",
    "remove_experts",
    "save_pretrained_sparse",
    "save_shrunk",
    "save_sparse",
    "schedules",
    "select_groups",
    "semi_structured_layers",
    "sensitivity",
    "shrink",
    "shrinkage",
    "similarity",
    "small_final",
    "small_init",
    "small_init_small_final",
    "snip",
    "soft_targets",
    "sparsegpt",
    "squared_final",
    "stepped",
    "synflow",
    "taken",
    "taylor",
    "to_semi_structured",
    "to_sparse_layout",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
    "wanda",
]

# Imported on first use, as they need fastai, which the rest does not.
_NEED_FASTAI = {
    "DistillCallback": ".training.distill",
    "FreezeCallback": ".callbacks.freeze",
    "KeepSparsity": ".callbacks.keep",
    "QuantizeCallback": ".quantization.quantize_callback",
    "RegularizeCallback": ".training.regularize",
    "SparsifyCallback": ".callbacks.sparsify",
    "lottery_ticket": ".training.lottery",
}
# Recipe by itself, as it needs PyYAML, whose import takes a while.
_ALONE = {**_NEED_FASTAI, "Recipe": ".recipes.recipe"}
_IMPORTING = RLock()  # torch cannot be imported by several threads at once


def __getattr__(name: str) -> Any:
    if name not in _ALONE and name not in __all__:
        raise _unknown_name(__name__, name)
    with _IMPORTING:
        if name in _NEED_FASTAI:
            import_module(".callbacks.methods", __name__)  # adds the methods of a Learner
        found = getattr(import_module(_ALONE.get(name, ".public"), __name__), name)
    return globals().setdefault(name, found)  # the next use finds it without this function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ALONE})
