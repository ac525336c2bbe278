"""Which classes are attentions, and how their projections are called.

What makes an attention is declared once for each kind, by the names of its projections:
register_attention(BertAttention, query='self.query', key='self.key', value='self.value', output='output.dense').
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...support.arguments import checks_arguments
from .kinds import Declared, Kind, checked_paths
from .small_attention import SmallShiftedWindowAttention, SmallWindowAttentionV2


@dataclass(frozen=True)
class Attention:
    """The names of the parts of an attention, as paths from its module; arguments of `register_attention`."""

    query: str
    key: str
    value: str
    output: str
    interleaved: bool = False
    per_head: tuple[tuple[str, int], ...] = ()
    also: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    joined: bool = False
    exact: bool = False  # whether `also` and `per_head` have to be there

    @property
    def last(self) -> str:
        """Path of the layer that reads the heads."""
        return self.output

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the projections."""
        return self.query, self.key, self.value, self.output


ATTENTIONS: Declared[Attention] = Declared("register_attention", "attentions")


@checks_arguments
def register_attention(
    kind: Kind,
    *,
    query: str,
    key: str,
    value: str,
    output: str,
    interleaved: bool = False,
    per_head: Mapping[str, int] | None = None,
    also: tuple[str, ...] = (),
    norms: tuple[str, ...] = ("q_norm", "k_norm"),
    widths: tuple[str, ...] = (),
    joined: bool = False,
) -> None:
    """Declare what makes up the heads of a kind of attention, for granularity 'head' and for `shrink`.

    A path leads from the module to a layer, such as 'self.query', or to a parameter, such as 'in_proj_weight'.
    Projections that are fused in one layer have the same path: query='qkv', key='qkv', value='qkv'. The number of heads
    is read from an attribute such as num_heads or head_dim, the number of key-value heads from the shapes.

    A module that lacks one of the declared layers or tables, or has one of another size, is left out with a warning.

    Args:
        kind: A module class, or its full name, such as 'package.module.Class', for a class that is not to be imported;
            the full name may be a glob. Subclasses have the same parts. A kind may be declared several times; the first
            declaration that fits is used, from the latest to the oldest.
        query: Path of the query projection, whose outputs are those of head 0, then of head 1, and so on.
        key: Path of the key projection.
        value: Path of the value projection.
        output: Path of the output projection, whose inputs are the heads.
        interleaved: Whether the outputs of a fused projection are query, key and value of the first head, then those of
            the second. By default, all queries come first, then all keys, then all values. It also allows further
            outputs in each head of a projection by itself, such as those of a gate in the query projection.
        per_head: Path of a parameter or buffer -> its axis that has one place per head, for tables of relative
            positions and the like, from which the places of removed heads are cut.
        also: Paths of further layers with outputs for each query head, such as a gate of the attention's output.
        norms: Paths of norm layers of queries, keys or values, if the module has them. One that normalizes each head by
            itself is no problem; with one over all heads, the attention stays dense, because removing a head would
            change the others.
        widths: Attributes, besides the usual ones, that keep the number of heads times the size of a head.
        joined: Whether head i of all attentions of this kind at like places of the model is one group, since they share
            one table of positions.

    Raises:
        TypeError: `kind` is not a module class, or an argument is no tuple or dictionary where it must be one.
        ValueError: A path is empty or no path, or an axis is not a whole number.

    Example:
        >>> class SelfAttention(nn.Module): ...
        >>> register_attention(SelfAttention, query='to_q', key='to_k', value='to_v', output='to_out')
    """
    per_head = {} if per_head is None else per_head
    checked_paths(
        "register_attention", query=query, key=key, value=value, output=output, also=also, norms=norms, widths=widths,
        per_head=per_head,
    )  # fmt: skip
    tables = tuple(per_head.items())
    for path, axis in tables:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ValueError(f"register_attention: per_head={{{path!r}: {axis!r}}} must give an axis, a whole number")
    record = Attention(
        query, key, value, output, interleaved, tables, tuple(also), tuple(norms), tuple(widths), joined, exact=True
    )
    ATTENTIONS.add(kind, record)


_NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm", "attn_sub_norm")


def _register(
    kind: Kind,
    names: str,
    *,
    per_head: Mapping[str, int] | None = None,
    norms: tuple[str, ...] = _NORMS[:2],
    **more: Any,
) -> None:
    """Declare many classes, which may lack what is in `also` and `per_head`.

    names: The four paths; of two, the first is that of a fused projection, of three, the second that of key and value.
    """
    query, *between, output = names.split()
    key, value = between if len(between) == 2 else (query, query) if not between else (between[0], between[0])
    tables = tuple((per_head or {}).items())
    ATTENTIONS.add(kind, Attention(query, key, value, output, per_head=tables, norms=norms, **more))


_TRANSFORMERS = "transformers.models.*Attention*"
_TABLES = {
    "relative_attention_bias.weight": 1,
    "relative_position_bias_table": 1,
    "relative_position_bias.relative_position_bias_table": 1,
    "self.relative_position_bias_table": 1,
    "logit_scale": 0,
    "sinks": 0,
}
# The record that is registered last is tried first.
_register(_TRANSFORMERS, "query_key_value dense", interleaved=True, norms=_NORMS)
_register(_TRANSFORMERS, "q_lin k_lin v_lin out_lin", widths=("dim",))
_register(_TRANSFORMERS, "qkv_proj o_proj", norms=_NORMS)
_register(_TRANSFORMERS, "Wqkv out_proj")
_register(_TRANSFORMERS, "Wqkv Wo")
_register(_TRANSFORMERS, "qkv proj")
_register(_TRANSFORMERS, "qkv projection")
_register(_TRANSFORMERS, "att_proj out_proj")
_register(_TRANSFORMERS, "Wq Wk Wv dense")
_register(_TRANSFORMERS, "query key value dense")
_register(_TRANSFORMERS, "query key value out_proj")
_register(_TRANSFORMERS, "query key value output")
_register(_TRANSFORMERS, "query key value proj")
_register(_TRANSFORMERS, "query_proj key_proj value_proj out_proj")
_register(_TRANSFORMERS, "q_proj k_proj v_proj dense", norms=_NORMS)
_register(_TRANSFORMERS, "q_proj k_proj v_proj proj", norms=_NORMS)
_register(_TRANSFORMERS, "q_proj k_proj v_proj projection_layer", norms=_NORMS)
_register(_TRANSFORMERS, "linear_q linear_k linear_v linear_out", also=("linear_pos",),
          per_head={"pos_bias_u": 0, "pos_bias_v": 0})  # fmt: skip
_register(_TRANSFORMERS, "c_attn c_proj")
_register(_TRANSFORMERS, "q_attn c_attn c_proj")
_register("transformers.models.gpt_bigcode.*Attention", "c_attn c_proj", interleaved=True)
_register(_TRANSFORMERS, "q_b_proj kv_b_proj o_proj", interleaved=True)
_register(_TRANSFORMERS, "q_proj kv_b_proj o_proj", interleaved=True)
_register(_TRANSFORMERS, "attention.query attention.key attention.value output.dense")
_register(_TRANSFORMERS, "self.query self.key self.value output.dense", per_head=_TABLES,
          also=("self.query_global", "self.key_global", "self.value_global", "self.w2e_query", "self.e2w_query",
                "self.e2e_query"))  # fmt: skip
_register(_TRANSFORMERS, "self.query_proj self.key_proj self.value_proj output.dense",
          also=("self.pos_key_proj", "self.pos_query_proj"))  # fmt: skip
_register(_TRANSFORMERS, "q k v o", per_head=_TABLES, joined=True)
_register(_TRANSFORMERS, "q_proj k_proj v_proj out_proj", norms=_NORMS)
_register(_TRANSFORMERS, "q_proj k_proj v_proj o_proj", norms=_NORMS, interleaved=True)
_register(_TRANSFORMERS, "q_proj k_proj v_proj o_proj", norms=_NORMS, per_head=_TABLES)
_register("timm.*Attention*", "q_proj k_proj v_proj proj", norms=("norm", "q_norm", "k_norm"), also=("gate",))
_register("timm.*Attention*", "qkv proj", norms=("norm", "q_norm", "k_norm"), per_head=_TABLES, also=("gate",))
for _kind in ("timm.models.swin_transformer_v2.*", "torchvision.models.swin_transformer.ShiftedWindowAttention*",
              SmallWindowAttentionV2, SmallShiftedWindowAttention):  # fmt: skip
    _register(_kind, "qkv proj", per_head={**_TABLES, "cpb_mlp.2.weight": 0})
_register(nn.MultiheadAttention, "q_proj_weight k_proj_weight v_proj_weight out_proj")
_register(nn.MultiheadAttention, "in_proj_weight out_proj")
