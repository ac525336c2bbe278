"""Recipes of SparseML that several tests read."""

RECIPE = """\
# Variables
num_epochs: 30
lr: 1e-3
target: 0.85

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)

  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
    lr_func: cosine
    init_lr: eval(lr)
    final_lr: 0.0

pruning_modifiers:
  - !GMPruningModifier
    params: ['layer1.0.conv1.weight', 're:layer2.*conv']
    init_sparsity: 0.05
    final_sparsity: eval(target)
    start_epoch: 0.0
    end_epoch: eval(num_epochs * 2 / 3)
    update_frequency: 1.0
    mask_type: unstructured
    leave_enabled: True
"""
MARKDOWN = (
    f"<!--\nLicense: of somebody\n--- not here\n-->\n\n---\n{RECIPE}---\n\n# A net\n\nIt is pruned: [so](x).\n---\n- a"
)
STAGES = """\
__metadata__: {made: by hand}
version: 1.1.0
base: &epochs 40
sparsity_stage:
  share: 0.25
  sparsity_modifiers:
    - !MagnitudePruningModifier
      params: __ALL_PRUNABLE__
      init_sparsity: 0
      final_sparsity: 0.9
      inter_func: linear
      start_epoch: eval(base * share)
      end_epoch: *epochs
      update_frequency: -1
  constant_modifiers: []
  other_modifiers:
next_stage:
  share: 0.5
  next_modifiers:
    - !pytorch.EpochRangeModifier {start_epoch: 0, end_epoch: 'eval(max(base, 12 ** 1) * share)'}
"""


def modifiers(*parameters, name="GMPruningModifier"):
    """A recipe with one modifier on each line, from line 2 on."""
    return "modifiers:\n" + "".join(f"  - !{name} {{start_epoch: 0, end_epoch: 9, {each}}}\n" for each in parameters)
