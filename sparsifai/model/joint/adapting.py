"""What classes need, beside smaller weights, to work with fewer heads or neurons; and which cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import nn

from ..layers import full_name_of
from .groups import JointGroups
from .small_attention import SmallMultiheadAttention, SmallShiftedWindowAttention, SmallWindowAttentionV2

# Widths of stacked experts are multiples of this: grouped products want rows of 16 bytes, of 2 bytes per weight too.
_EXPERT_MULTIPLE = 8


def why_not_removed(model: nn.Module, groups: JointGroups) -> str:
    """Why groups of a module cannot be removed, though its masks are trained like any others; mostly empty.

    Args:
        model: The model.
        groups: Its joint groups.
    """
    module: Any = model.get_submodule(groups.name)
    if groups.what != "head":
        return ""
    if fnmatchcase(full_name_of(type(module)), "transformers.models.*.Bloom*Attention"):
        return "the model computes the slopes of alibi for the heads that it has at first"
    known = nn.MultiheadAttention.forward, SmallMultiheadAttention.forward
    if isinstance(module, nn.MultiheadAttention) and type(module).forward not in known:
        return f"{type(module).__name__} has a forward of its own, in which the width is fixed"
    return ""


def multiple_of(model: nn.Module, groups: JointGroups) -> int:
    """The number that the groups which remain are a multiple of.

    Args:
        model: The model.
        groups: Its joint groups.
    """
    is_stacked = groups.what == "neuron" and any(attrgetter(part.name)(model).dim() == 3 for part in groups.parts)
    return _EXPERT_MULTIPLE if is_stacked and groups.count % _EXPERT_MULTIPLE == 0 else 1


def adapt(model: nn.Module, groups: JointGroups) -> None:
    """Make modules work with their smaller weights, where their classes cannot.

    Args:
        model: The model.
        groups: The joint groups of a module, or of several that share a parameter, some of which have been removed.
    """
    for name in dict.fromkeys([groups.name, *(size.module for size in groups.sizes)]):
        _adapt(model, groups, model.get_submodule(name))


def _adapt(model: nn.Module, groups: JointGroups, module: nn.Module) -> None:
    """Make one module work with its smaller weights."""
    if groups.what == "head":
        for pattern, function in _ADAPTED.items():
            if any(fnmatchcase(full_name_of(kind), pattern) for kind in type(module).__mro__):
                function(module)
                break
    if isinstance(module, SmallMultiheadAttention):
        for encoder in model.modules():
            # It would hand its layers a nested tensor, which only torch's fast path can read.
            if isinstance(encoder, nn.TransformerEncoder) and any(part is module for part in encoder.modules()):
                encoder.use_nested_tensor = False


def _becomes(kind: type[nn.Module]) -> Callable[[Any], None]:
    def take_over(module: Any) -> None:
        module.__class__ = kind

    return take_over


def _own_config(attention: Any) -> None:
    """Give an attention that reads its numbers of heads from the config of the model one of its own."""
    queries = attention.o_proj.in_features // attention.head_dim
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = queries
    attention.config.num_key_value_heads = queries // attention.num_key_value_groups


# Full name of a class, a glob -> what makes a module of it work with fewer heads.
_ADAPTED: dict[str, Callable[[Any], None]] = {
    "torch.nn.modules.activation.MultiheadAttention": SmallMultiheadAttention.take_over,
    "torchvision.models.swin_transformer.ShiftedWindowAttention*": _becomes(SmallShiftedWindowAttention),
    "timm.models.swin_transformer_v2.WindowAttention": _becomes(SmallWindowAttentionV2),
    "transformers.models.phi3.*Attention": _own_config,
    "transformers.models.phi4_multimodal.*Attention": _own_config,
}
