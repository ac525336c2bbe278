"""sparsifai: train neural networks whose weights are exact zeros.

Four questions, one registry of functions for each: how (granularities), where (contexts), what (criteria) and
when (schedules). `Sparsifier` works on any torch model; `SparsifyCallback` calls it in a fastai Learner.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .budget import Sensitivity
from .comparison import Comparison, compare
from .context import bounded, contexts, global_, local
from .criterion import (
    criteria,
    fisher,
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
    small_final,
    small_init,
    small_init_small_final,
    snip,
    squared_final,
    synflow,
    taylor,
    updating_magnitude_increase,
    updating_movement,
    updating_movmag,
    wanda,
)
from .granularity import along, block, granularities
from .layer_sensitivity import highest_sparsity, sensitivity
from .n_of_m import blocks, is_nm
from .planned import Plan
from .regularizer import Regularizer
from .report import Report
from .schedule import (
    ac_dc,
    agp,
    between,
    cos,
    dsd,
    during,
    iterative,
    lin,
    one_cycle,
    one_shot,
    raised,
    schedules,
    stepped,
)
from .selection import select_groups
from .semi_structured import SemiStructured, semi_structured_layers, to_semi_structured
from .shrinkable import Shrinkage
from .shrinking import shrink, shrinkage
from .sparse_file import SparseFile, load_sparse, save_sparse
from .sparse_layout import to_sparse_layout
from .sparsifier import Sparsifier
from .statistic import quantities, taken
from .target import register_layer
from .ticket import LotteryTickets, Ticket

if TYPE_CHECKING:
    from .callback import SparsifyCallback
    from .distill import DistillCallback, soft_targets
    from .freeze import FreezeCallback
    from .keep import KeepSparsity
    from .lottery import lottery_ticket
    from .recipe import Recipe
    from .regularize import RegularizeCallback

__version__ = "0.1.0"

# Imported on first use: these need fastai, which the rest does not.
_NEED_FASTAI = {
    "DistillCallback": ".distill",
    "FreezeCallback": ".freeze",
    "KeepSparsity": ".keep",
    "RegularizeCallback": ".regularize",
    "SparsifyCallback": ".callback",
    "lottery_ticket": ".lottery",
    "soft_targets": ".distill",
}

__all__ = [
    "Comparison",
    "DistillCallback",
    "FreezeCallback",
    "KeepSparsity",
    "LotteryTickets",
    "Plan",
    "Recipe",
    "RegularizeCallback",
    "Regularizer",
    "Report",
    "SemiStructured",
    "Sensitivity",
    "Shrinkage",
    "SparseFile",
    "Sparsifier",
    "SparsifyCallback",
    "Ticket",
    "ac_dc",
    "agp",
    "along",
    "between",
    "block",
    "blocks",
    "bounded",
    "compare",
    "contexts",
    "cos",
    "criteria",
    "dsd",
    "during",
    "fisher",
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
    "load_sparse",
    "local",
    "lottery_ticket",
    "magnitude_increase",
    "movement",
    "movement_pruning",
    "movmag",
    "normalized_final",
    "one_cycle",
    "one_shot",
    "quantities",
    "raised",
    "register_layer",
    "save_sparse",
    "schedules",
    "select_groups",
    "semi_structured_layers",
    "sensitivity",
    "shrink",
    "shrinkage",
    "small_final",
    "small_init",
    "small_init_small_final",
    "snip",
    "soft_targets",
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


# These, too: Recipe needs PyYAML, which takes a while.
_ON_FIRST_USE = {**_NEED_FASTAI, "Recipe": ".recipe"}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
