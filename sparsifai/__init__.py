"""sparsifai: train neural networks whose weights are exact zeros.

Four questions say how a model is pruned. Each has a registry of answers, which are functions: how weights are grouped
(`granularities`), where scores are ranked (`contexts`), what the score of a weight is (`criteria`), and when the
sparsity grows (`schedules`). `Sparsifier` prunes any torch model. `SparsifyCallback` calls it while a fastai Learner
trains.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .axes.budget import bounded
from .axes.changed_schedule import between, during, raised, stepped
from .axes.context import contexts, global_, local
from .axes.criterion import (
    criteria,
    fisher,
    gate_importance,
    grasp,
    lamp,
    large_final,
    large_init,
    large_init_large_final,
    magnitude_increase,
    movement,
    movement_pruning,
    movmag,
    normalized_final,
    obs,
    small_final,
    small_init,
    small_init_small_final,
    snip,
    sparsegpt,
    squared_final,
    synflow,
    taylor,
    updating_magnitude_increase,
    updating_movement,
    updating_movmag,
    wanda,
)
from .axes.granularity import along, block, granularities
from .axes.n_of_m import blocks, is_nm
from .axes.quantity import quantities, taken
from .axes.ranking.selection import select_groups
from .axes.schedule import ac_dc, agp, cos, dsd, iterative, lin, one_cycle, one_shot, schedules
from .export.comparison import compare
from .export.comparison_table import Comparison
from .export.csr import to_sparse_layout
from .export.experts import remove_experts
from .export.pretrained_sparse import save_pretrained_sparse
from .export.shrink import shrink, shrinkage
from .export.shrinkage_table import Shrinkage
from .export.shrunk_file import load_shrunk, save_shrunk
from .export.sparse_file import SparseFile, load_sparse, save_sparse
from .export.two_four import SemiStructured, semi_structured_layers, to_semi_structured
from .gradual.plan_table import Plan
from .loops.manager import TrainingManager
from .loops.parts import Distil, Freeze, Keep, Regularize, Sparsify
from .loops.quantize_part import Quantize
from .model.joint.attention_kinds import register_attention
from .model.joint.mlp import register_mlp
from .model.layers import register_layer
from .quantization.quantized import Quantized, load_quantized
from .quantization.static import quantize
from .sparsifier.given_masks import from_torch_prune
from .sparsifier.report import Report
from .sparsifier.sparsifier import Sparsifier
from .sparsifier.sparsifiers import Sparsifiers
from .support.version import __version__ as __version__
from .training.distillation import Distillation
from .training.distillation_loss import distillation_losses, soft_targets
from .training.feature_losses import attention_transfer, relational, similarity
from .training.regularizer import Regularizer
from .training.sensitivity import highest_sparsity, sensitivity
from .training.sensitivity_table import Sensitivity
from .training.ticket import LotteryTickets, Ticket

if TYPE_CHECKING:
    from .callbacks.freeze import FreezeCallback
    from .callbacks.keep import KeepSparsity
    from .callbacks.sparsify import SparsifyCallback
    from .quantization.quantize_callback import QuantizeCallback
    from .recipes.recipe import Recipe
    from .training.distill import DistillCallback
    from .training.lottery import lottery_ticket
    from .training.regularize import RegularizeCallback

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

__all__ = [
    "Comparison",
    "Distil",
    "DistillCallback",
    "Distillation",
    "Freeze",
    "FreezeCallback",
    "Keep",
    "KeepSparsity",
    "LotteryTickets",
    "Plan",
    "Quantize",
    "QuantizeCallback",
    "Quantized",
    "Recipe",
    "Regularize",
    "RegularizeCallback",
    "Regularizer",
    "Report",
    "SemiStructured",
    "Sensitivity",
    "Shrinkage",
    "SparseFile",
    "Sparsifier",
    "Sparsifiers",
    "Sparsify",
    "SparsifyCallback",
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
    "lottery_ticket",
    "magnitude_increase",
    "movement",
    "movement_pruning",
    "movmag",
    "normalized_final",
    "obs",
    "one_cycle",
    "one_shot",
    "quantities",
    "quantize",
    "raised",
    "register_attention",
    "register_layer",
    "register_mlp",
    "relational",
    "remove_experts",
    "save_shrunk",
    "save_pretrained_sparse",
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

# Recipe too, as it needs PyYAML, whose import takes a while.
_ON_FIRST_USE = {**_NEED_FASTAI, "Recipe": ".recipes.recipe"}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
