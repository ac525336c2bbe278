"""The public names, except those that need fastai. The first use of one of them imports this module.

It imports torch, which takes a second or two. The command line and its help should not wait for that.
"""

from .axes.budget import bounded as bounded
from .axes.changed_schedule import between as between, during as during, raised as raised, stepped as stepped
from .axes.context import contexts as contexts, global_ as global_, local as local
from .axes.criterion import (
    criteria as criteria,
    lamp as lamp,
    large_final as large_final,
    large_init as large_init,
    large_init_large_final as large_init_large_final,
    magnitude_increase as magnitude_increase,
    movement as movement,
    movmag as movmag,
    normalized_final as normalized_final,
    small_final as small_final,
    small_init as small_init,
    small_init_small_final as small_init_small_final,
    squared_final as squared_final,
    updating_magnitude_increase as updating_magnitude_increase,
    updating_movement as updating_movement,
    updating_movmag as updating_movmag,
)
from .axes.data_criteria import (
    fisher as fisher,
    gate_importance as gate_importance,
    grasp as grasp,
    movement_pruning as movement_pruning,
    obs as obs,
    snip as snip,
    sparsegpt as sparsegpt,
    synflow as synflow,
    taylor as taylor,
    wanda as wanda,
)
from .axes.granularity import along as along, block as block, granularities as granularities
from .axes.n_of_m import blocks as blocks, is_nm as is_nm
from .axes.quantity import quantities as quantities, taken as taken
from .axes.ranking.selection import select_groups as select_groups
from .axes.schedule import (
    ac_dc as ac_dc,
    agp as agp,
    cos as cos,
    dsd as dsd,
    iterative as iterative,
    lin as lin,
    one_cycle as one_cycle,
    one_shot as one_shot,
    schedules as schedules,
)
from .axes.schedule_picture import plot_schedule as plot_schedule
from .export.comparison import compare as compare
from .export.comparison_table import Comparison as Comparison
from .export.csr import to_sparse_layout as to_sparse_layout
from .export.experts import remove_experts as remove_experts
from .export.pretrained_sparse import save_pretrained_sparse as save_pretrained_sparse
from .export.shrink import shrink as shrink, shrinkage as shrinkage
from .export.shrinkage_table import Shrinkage as Shrinkage
from .export.shrunk_file import load_shrunk as load_shrunk, save_shrunk as save_shrunk
from .export.sparse_file import SparseFile as SparseFile, load_sparse as load_sparse, save_sparse as save_sparse
from .export.two_four import (
    SemiStructured as SemiStructured,
    semi_structured_layers as semi_structured_layers,
    to_semi_structured as to_semi_structured,
)
from .gradual.plan_table import Plan as Plan
from .loops.manager import TrainingManager as TrainingManager
from .loops.parts import (
    Distil as Distil,
    Freeze as Freeze,
    Keep as Keep,
    Regularize as Regularize,
    Sparsify as Sparsify,
)
from .loops.quantize_part import Quantize as Quantize
from .model.joint.attention_kinds import register_attention as register_attention
from .model.joint.mlp import register_mlp as register_mlp
from .model.layers import register_layer as register_layer
from .quantization.quantized import Quantized as Quantized, load_quantized as load_quantized
from .quantization.static import quantize as quantize
from .sparsifier.given_masks import from_torch_prune as from_torch_prune
from .sparsifier.report import Report as Report
from .sparsifier.sparsifier import Sparsifier as Sparsifier
from .sparsifier.sparsifiers import Sparsifiers as Sparsifiers
from .training.distillation import Distillation as Distillation
from .training.distillation_loss import distillation_losses as distillation_losses, soft_targets as soft_targets
from .training.feature_losses import (
    attention_transfer as attention_transfer,
    relational as relational,
    similarity as similarity,
)
from .training.regularizer import Regularizer as Regularizer
from .training.sensitivity import highest_sparsity as highest_sparsity, sensitivity as sensitivity
from .training.sensitivity_table import Sensitivity as Sensitivity
from .training.ticket import LotteryTickets as LotteryTickets, Ticket as Ticket
