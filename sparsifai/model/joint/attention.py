"""Attention heads as joint groups: which rows and columns of which projections make up one head.

What makes an attention is declared once for each kind, by the names of its projections:
register_attention(BertAttention, query='self.query', key='self.key', value='self.value', output='output.dense'). All
numbers are read from the shapes of the weights and from one attribute, the number of heads or the size of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...support.listing import in_short
from ..layers import parameter_name
from .groups import FOLLOWER, NO_GROUP, TABLE, JointGroups, Part, Place, sizes_in
from .kinds import Declared, Kind
from .small_attention import SmallShiftedWindowAttention, SmallWindowAttentionV2

# Attributes by which attentions of different libraries keep their sizes.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads", "nhead", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "split_size", "embed_dim")
# Biases of a fused projection without one of its own.
_BIASES = ("q_bias", "k_bias", "v_bias")
_REPEATS = ("num_key_value_groups", "n_rep")


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
    widths: tuple[str, ...] = ()
    joined: bool = False

    @property
    def last(self) -> str:
        """Path of the layer that reads the heads."""
        return self.output

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the projections."""
        return self.query, self.key, self.value, self.output


_ATTENTIONS: Declared[Attention] = Declared("register_attention")


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
    widths: tuple[str, ...] = (),
    joined: bool = False,
) -> None:
    """Declare what makes up the heads of a kind of attention, for granularity 'head' and for `shrink`.

    A path leads from the module to a layer, such as 'self.query', or to a parameter, such as 'in_proj_weight'.
    Projections that are fused in one layer have the same path: query='qkv', key='qkv', value='qkv'. The number of heads
    is read from an attribute such as num_heads or head_dim, the number of key-value heads from the shapes.

    Args:
        kind: A module class, or its full name, such as 'package.module.Class', for a class that is not to be imported;
            the full name may be a glob. Subclasses have the same parts. A kind may be declared several times; the first
            declaration that fits is used, from the latest to the oldest.
        query: Path of the query projection, whose outputs are those of head 0, then of head 1, and so on.
        key: Path of the key projection.
        value: Path of the value projection.
        output: Path of the output projection, whose inputs are the heads.
        interleaved: Whether the outputs of a fused projection are query, key and value of the first head, then those of
            the second. By default, all queries come first, then all keys, then all values.
        per_head: Path of a parameter or buffer -> its axis that has one place per head, for tables of relative
            positions and the like, from which the places of removed heads are cut.
        also: Paths of further layers with outputs for each query head, such as a gate of the attention's output.
        widths: Attributes, besides the usual ones, that keep the number of heads times the size of a head.
        joined: Whether head i of all attentions of this kind at like places of the model is one group, since they share
            one table of positions.

    Raises:
        TypeError: `kind` is not a module class.

    Example:
        >>> class SelfAttention(nn.Module): ...
        >>> register_attention(SelfAttention, query='to_q', key='to_k', value='to_v', output='to_out')
    """
    tables = tuple((per_head or {}).items())
    record = Attention(query, key, value, output, interleaved, tables, tuple(also), tuple(widths), joined)
    _ATTENTIONS.add(kind, record)


def _register(kind: Kind, names: str, **more: Any) -> None:
    """register_attention with the four paths in one string; of three, the first is that of a fused projection."""
    query, *between, output = names.split()
    key, value = between if len(between) == 2 else (query, query) if not between else (between[0], between[0])
    register_attention(kind, query=query, key=key, value=value, output=output, **more)


_TRANSFORMERS = "transformers.models.*Attention*"
_TABLES = {
    "relative_attention_bias.weight": 1,
    "relative_position_bias_table": 1,
    "relative_position_bias.relative_position_bias_table": 1,
    "self.relative_position_bias_table": 1,
    "logit_scale": 0,
    "sinks": 0,
}
_register(_TRANSFORMERS, "query_key_value dense", interleaved=True)
_register(_TRANSFORMERS, "q_lin k_lin v_lin out_lin", widths=("dim",))
_register(_TRANSFORMERS, "qkv_proj o_proj")
_register(_TRANSFORMERS, "qkv proj")
_register(_TRANSFORMERS, "c_attn c_proj")
_register(_TRANSFORMERS, "q_attn c_attn c_proj")
_register(_TRANSFORMERS, "attention.query attention.key attention.value output.dense")
_register(_TRANSFORMERS, "self.query self.key self.value output.dense", per_head=_TABLES)
_register(_TRANSFORMERS, "self.query_proj self.key_proj self.value_proj output.dense",
          also=("self.pos_key_proj", "self.pos_query_proj"))  # fmt: skip
_register(_TRANSFORMERS, "q k v o", per_head=_TABLES, joined=True)
_register(_TRANSFORMERS, "q_proj k_proj v_proj out_proj")
_register(_TRANSFORMERS, "q_proj k_proj v_proj o_proj", per_head=_TABLES)
_register("timm.*Attention*", "qkv proj", per_head=_TABLES, also=("gate",))
for _kind in ("timm.models.swin_transformer_v2.*", "torchvision.models.swin_transformer.ShiftedWindowAttention*",
              SmallWindowAttentionV2, SmallShiftedWindowAttention):  # fmt: skip
    _register(_kind, "qkv proj", per_head={**_TABLES, "cpb_mlp.2.weight": 0})
_register(nn.MultiheadAttention, "q_proj_weight k_proj_weight v_proj_weight out_proj")
_register(nn.MultiheadAttention, "in_proj_weight out_proj")


def find_heads(model: nn.Module) -> list[JointGroups]:
    """The heads of all attentions of a model, in the order of its modules.

    With grouped queries, a key-value head and the query heads that read it are one group. Where all query heads read
    the same key-value head, a group is one query head.

    Args:
        model: The model, without wrappers. Modules of classes that are not declared are taken for attentions if they
            have a number of heads and projections with names that a declared class has; a UserWarning says so.

    Raises:
        ValueError: Attentions that share a table of positions have different numbers of heads.
    """
    found: list[JointGroups] = []
    joined: dict[tuple[str, Attention], list[JointGroups]] = {}
    for name, module, record in _ATTENTIONS.matching(model, _looks_like_attention, "an attention", _read_sizes):
        heads = _heads_of(module, name, record)
        if not record.joined:
            found.append(heads)
            continue
        alike = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        joined.setdefault((alike, record), []).append(heads)
        if len(joined[alike, record]) == 1:
            found.append(heads)
    together = {id(several[0]): _joined(several) for several in joined.values() if len(several) > 1}
    return [together.get(id(each), each) for each in found]


def _looks_like_attention(module: nn.Module) -> bool:
    return _attribute([module], _HEADS + _HEAD_SIZES) is not None


def _attribute(modules: Iterable[nn.Module], names: tuple[str, ...]) -> int | None:
    """The first of some attributes of some modules that is a positive whole number."""
    values = [getattr(module, name, None) for module in modules for name in names]
    return next((each for each in values if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one attention: numbers of heads, and of outputs of the query projection for each."""

    heads: int
    key_value_heads: int
    size: int

    @property
    def queries(self) -> int:
        """Number of query heads that read a key-value head."""
        return self.heads // self.key_value_heads

    @property
    def by_query(self) -> bool:
        """Whether a group is a query head without its key and value, which all query heads share."""
        return self.key_value_heads == 1

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.heads if self.by_query else self.key_value_heads

    @property
    def of_heads(self) -> np.ndarray:
        """For each query head, its group."""
        return np.arange(self.heads) // (self.heads // self.count)

    def outputs(self, record: Attention) -> dict[str, np.ndarray]:
        """For each projection, by its path, the groups of its outputs."""
        query = np.repeat(self.of_heads, self.size)
        alone = self.by_query and self.heads > 1
        key = np.full(self.size, NO_GROUP) if alone else np.repeat(np.arange(self.key_value_heads), self.size)
        if record.interleaved and not self.by_query:
            return {record.query: np.repeat(np.arange(self.count), (self.queries + 2) * self.size)}
        pieces: dict[str, list[np.ndarray]] = {record.query: [query]}
        for path in (record.key, record.value):
            pieces.setdefault(path, []).append(key)
        return {path: np.concatenate(each) for path, each in pieces.items()}


def _holders(module: nn.Module, name: str, record: Attention) -> list[tuple[str, nn.Module]]:
    """The modules that may keep sizes: the attention, and those in it that hold its projections. Names and modules."""
    inside = {path.rpartition(".")[0] for path in (record.query, record.key, record.value, record.output)}
    paths = ["", *sorted(inside - {""})]
    return [(".".join(filter(None, (name, path))), module.get_submodule(path)) for path in paths]


def _read_sizes(module: nn.Module, name: str, record: Attention) -> _Sizes | None:
    """The sizes of an attention; None if projections of the record are not there, or their sizes do not fit."""
    paths = dict.fromkeys((record.query, record.key, record.value))
    output = Place.found(module, name, record.output)
    places = [Place.found(module, name, path) for path in paths]
    if output is None or any(place is None for place in places):
        return None
    width = output.size("in")
    modules = [each for _, each in _holders(module, name, record)]
    size, heads = _attribute(modules, _HEAD_SIZES), _attribute(modules, _HEADS)
    if size is None or width % size:
        if heads is None or width % heads:
            return None
        size = width // heads
    heads = width // size
    of_keys = sum(place.size("out") for place in places if place) - width
    if of_keys <= 0 or of_keys % (2 * size) or heads % (of_keys // (2 * size)):
        return None
    sizes = _Sizes(heads, of_keys // (2 * size), size)
    lengths = [len(groups) for groups in sizes.outputs(record).values()]
    return sizes if lengths == [place.size("out") for place in places if place] else None


def _heads_of(module: nn.Module, name: str, record: Attention) -> JointGroups:
    """The heads of one attention, which fits the record."""
    sizes = _read_sizes(module, name, record)
    assert sizes is not None
    of_query = np.repeat(sizes.of_heads, sizes.size)
    parts = [
        part for path, groups in sizes.outputs(record).items() for part in Place(module, name, path).outputs(groups)
    ]
    parts = [part for part in parts if (part.groups != NO_GROUP).any()]
    parts.append(Place(module, name, record.output).inputs(of_query))
    for path in record.also:
        place = Place.found(module, name, path)
        if place is not None and place.size("out") == len(of_query):
            parts += place.outputs(of_query)
    for path in _BIASES:
        bias = _read(module, path)
        if isinstance(bias, Tensor) and bias.shape == of_query.shape:
            role = FOLLOWER if isinstance(bias, nn.Parameter) else TABLE
            parts.append(Part(parameter_name(name, path), 0, of_query, role))
    for path, axis in record.per_head:
        table = _read(module, path)
        if isinstance(table, Tensor) and table.dim() > axis and table.shape[axis] == sizes.heads:
            parts.append(Part(parameter_name(name, path), axis, sizes.of_heads, TABLE))
    share = sizes.heads // sizes.count
    kept = dict.fromkeys(_HEADS, share) | dict.fromkeys((*_WIDTHS, *record.widths), share * sizes.size)
    kept |= dict.fromkeys(_REPEATS if sizes.by_query else _KEY_VALUE_HEADS, 1)
    return JointGroups(
        name, "head", sizes.count, tuple(parts), sizes_in(_holders(module, name, record), kept, sizes.count)
    )


def _read(module: nn.Module, path: str) -> Any:
    """What is at a path from a module; None if there is nothing."""
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None


def _joined(groups: list[JointGroups]) -> JointGroups:
    """Head i of several attentions as one group."""
    first = groups[0]
    if len({each.count for each in groups}) > 1:
        raise ValueError(
            f"{in_short([each.name for each in groups])} share one table of positions, but have different numbers of "
            "heads, so their heads cannot be pruned together; give all of them the same number"
        )
    parts = tuple(part for each in groups for part in each.parts)
    return JointGroups(
        first.name, first.what, first.count, parts, tuple(size for each in groups for size in each.sizes)
    )
