"""Ways to train sparse: lottery tickets, penalties, teachers, sensitivity.

The modules that hold losses of the registry of distillation are imported here, before any other module of this folder.
"""

from . import distillation_loss, feature_losses  # noqa: F401
