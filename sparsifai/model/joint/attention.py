"""Attention heads as joint groups: which rows and columns of which projections make up one head.

The names of the projections are declared in attention_kinds.py. All numbers are read from the shapes of the weights and
from one attribute, the number of heads or the size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...support.listing import in_short
from ...support.warning import warn_each
from ..layers import parameter_name
from .attention_kinds import ATTENTIONS, Attention
from .groups import FOLLOWER, NO_GROUP, TABLE, JointGroups, Part, Place, as_one, merged, number_in, sizes_in

# Attributes by which attentions of different libraries keep their sizes.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads", "nhead", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads")
_HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "split_size", "embed_dim")
# Biases of a fused projection without one of its own.
_BIASES = ("q_bias", "k_bias", "v_bias")
_REPEATS = ("num_key_value_groups", "n_rep")


def find_heads(model: nn.Module, warns: bool = False) -> list[JointGroups]:
    """The heads of all attentions of a model, in the order of its modules.

    With grouped queries, a key-value head and the query heads that read it are one group; a query head of several is
    no group by itself. Where all query heads read the same key-value head, a group is one query head, and the key-value
    head is kept.

    Args:
        model: The model, without wrappers. Modules of classes that are not declared are taken for attentions if they
            have a number of heads and projections with names that a declared class has.
        warns: Whether to warn of classes that were taken for attentions, and of attentions that are left out.

    Raises:
        ValueError: Attentions that share a table of positions have different numbers of heads.
    """
    found: list[JointGroups] = []
    joined: dict[tuple[str, Attention], list[JointGroups]] = {}
    matches = ATTENTIONS.matching(model, _why_unfit, _has_heads, _looks_like_attention)
    for name, module, record in matches.found:
        heads = _heads_of(module, name, record)
        if not record.joined:
            found.append(heads)
            continue
        alike = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        joined.setdefault((alike, record), []).append(heads)
        if len(joined[alike, record]) == 1:
            found.append(heads)
    together = {id(several[0]): _joined(several) for several in joined.values() if len(several) > 1}
    if warns:
        warn_each(ATTENTIONS.notices(model, matches))
    return merged([together.get(id(each), each) for each in found], model)


def _has_heads(module: nn.Module) -> bool:
    return number_in([module], _HEADS + _HEAD_SIZES) is not None


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module should be named if its heads are not found."""
    children = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    weights = sum(Place.found(module, "", name) is not None for name in children)
    if "Attention" in type(module).__name__:
        return weights >= 1
    return weights >= 2 and _has_heads(module)


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

    def outputs(self, record: Attention, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """For each projection, by its path, the groups of its outputs.

        Args:
            record: The paths of the projections.
            sizes: Path -> number of outputs.
        """
        roles: dict[str, list[np.ndarray]] = {}
        keys = np.full(1, NO_GROUP) if self.by_query and self.heads > 1 else np.arange(self.key_value_heads)
        for path, heads in ((record.query, self.of_heads), (record.key, keys), (record.value, keys)):
            roles.setdefault(path, []).append(heads)
        of_outputs = {}
        for path, several in roles.items():
            if record.interleaved and not self.by_query:  # a head by itself, or all of it, in one piece
                several = [np.arange(self.count) if len(several) > 1 else several[0]]
            extent = max(1, sizes[path] // sum(map(len, several)))
            of_outputs[path] = np.repeat(np.concatenate(several), extent)
        return of_outputs


def _holders(module: nn.Module, name: str, record: Attention) -> list[tuple[str, nn.Module]]:
    """The modules that may keep sizes: the attention, and those in it that hold its projections. Names and modules."""
    inside = sorted({path.rpartition(".")[0] for path in record.paths} - {""})
    return [(name, module), *((parameter_name(name, path), module.get_submodule(path)) for path in inside)]


def _read_sizes(module: nn.Module, name: str, record: Attention) -> _Sizes | str:
    """The sizes of an attention, or why it does not fit the record."""
    places = {path: Place.found(module, name, path) for path in record.paths}
    if missing := [path for path, place in places.items() if place is None]:
        return f"it has no layer {missing[0]!r} whose weight has the axes out and in"
    outputs = {path: place.size("out") for path, place in places.items() if place}
    width = Place(module, name, record.output).size("in")
    modules = [each for _, each in _holders(module, name, record)]
    size, heads = number_in(modules, _HEAD_SIZES), number_in(modules, _HEADS)
    if size is None or width % size:
        if heads is None or width % heads:
            return (
                f"it has no attribute such as num_heads or head_dim that divides the {width} inputs of its output, so "
                "set self.num_heads in its __init__"
            )
        size = width // heads
    elif heads is not None and heads * size != width:
        return f"{heads} heads of {size}, as its attributes say, do not make the {width} inputs of its output"
    sizes = _Sizes(width // size, _key_value_heads(record, outputs, width, size), size)
    shown = ", ".join(f"{path}: {outputs[path]}" for path in dict.fromkeys(record.paths[:3]))
    misfit = f"the outputs of its projections ({shown}) do not fit {sizes.heads} heads of {size}"
    if sizes.key_value_heads < 1 or sizes.heads % sizes.key_value_heads:
        return misfit
    lengths = {path: len(groups) for path, groups in sizes.outputs(record, outputs).items()}
    if any(outputs[path] != length for path, length in lengths.items()):
        return misfit
    # A projection with more outputs, such as a gate, has them in an order that only a declaration tells.
    fits = outputs[record.query] == width or record.query in (record.key, record.value)
    if not record.interleaved and not (fits and outputs[record.key] == outputs[record.value]):
        return misfit
    return (_why_incomplete(module, name, record, sizes) if record.exact else "") or sizes


def _why_incomplete(module: nn.Module, name: str, record: Attention, sizes: _Sizes) -> str:
    """Which further layer or table of a record an attention lacks, or has in another size; empty if none."""
    for path in record.also:
        place = Place.found(module, name, path)
        if place is None or place.size("out") % sizes.heads:
            return f"it has no layer {path!r} with outputs for each of its {sizes.heads} heads"
    for path, axis in record.per_head:
        if not _is_per_head(_read(module, path), axis, sizes.heads):
            return f"it has no table {path!r} with {sizes.heads} places along axis {axis}, one for each head"
    return ""


def _is_per_head(table: Any, axis: int, heads: int) -> bool:
    """Whether something is a tensor with one place per head along an axis."""
    return isinstance(table, Tensor) and -table.dim() <= axis < table.dim() and table.shape[axis] == heads


def _key_value_heads(record: Attention, outputs: Mapping[str, int], width: int, size: int) -> int:
    """The number of key-value heads, by the outputs of the projections; 0 if they do not fit."""
    if record.value == record.query:
        more, each = outputs[record.value] - width, 2 * size
    elif record.value == record.key:
        if record.interleaved:  # heads of any size, one for each query head
            return width // size
        more, each = outputs[record.value], 2 * size
    else:
        more, each = outputs[record.value], size
    return 0 if more % each else max(0, more // each)


def _why_unfit(module: nn.Module, name: str, record: Attention) -> str:
    sizes = _read_sizes(module, name, record)
    return sizes if isinstance(sizes, str) else ""


def _heads_of(module: nn.Module, name: str, record: Attention) -> JointGroups:
    """The heads of one attention, which fits the record."""
    sizes = _read_sizes(module, name, record)
    assert isinstance(sizes, _Sizes)
    of_query = np.repeat(sizes.of_heads, sizes.size)
    outputs = {path: Place(module, name, path).size("out") for path in record.paths[:3]}
    of_outputs = sizes.outputs(record, outputs)
    parts = [part for path, groups in of_outputs.items() for part in Place(module, name, path).outputs(groups)]
    parts = [part for part in parts if (part.groups != NO_GROUP).any()]
    parts.append(Place(module, name, record.output).inputs(of_query))
    if isinstance(module, nn.MultiheadAttention):
        parts += _vectors_of_torch(module, name, parts, of_query)
    for path in record.also:
        place = Place.found(module, name, path)
        if place is not None and place.size("out") % sizes.heads == 0:
            parts += place.outputs(np.repeat(sizes.of_heads, place.size("out") // sizes.heads))
    for path in _BIASES:
        bias = _read(module, path)
        if isinstance(bias, Tensor) and bias.shape == of_query.shape:
            role = FOLLOWER if isinstance(bias, nn.Parameter) else TABLE
            parts.append(Part(parameter_name(name, path), 0, of_query, role))
    for path, axis in record.per_head:
        table = _read(module, path)
        if _is_per_head(table, axis, sizes.heads):
            parts.append(Part(parameter_name(name, path), axis % table.dim(), sizes.of_heads, TABLE))
    share = sizes.heads // sizes.count
    kept = dict.fromkeys(_HEADS, share) | dict.fromkeys((*_WIDTHS, *record.widths), share * sizes.size)
    kept |= dict.fromkeys(_REPEATS if sizes.by_query else _KEY_VALUE_HEADS, 1)
    held = sizes_in(_holders(module, name, record), kept, sizes.count)
    return JointGroups(name, "head", sizes.count, tuple(parts), held, _why_kept(module, record, sizes))


def _vectors_of_torch(module: nn.Module, name: str, parts: list[Part], of_query: np.ndarray) -> list[Part]:
    """The vectors of nn.MultiheadAttention that do not stand beside their weights."""
    vectors = []
    bias = parameter_name(name, "in_proj_bias")
    if module.in_proj_bias is not None and all(part.name != bias for part in parts):
        vectors.append(Part(bias, 0, np.tile(of_query, 3), FOLLOWER))
    for attribute in ("bias_k", "bias_v"):
        if getattr(module, attribute) is not None:
            vectors.append(Part(parameter_name(name, attribute), 2, of_query, TABLE))
    return vectors


def _why_kept(module: nn.Module, record: Attention, sizes: _Sizes) -> str:
    """Why the heads of an attention have to stay: a norm layer over all of them."""
    for path in record.norms:
        norm = _read(module, path)
        shapes = [each.shape for each in norm.parameters()] if isinstance(norm, nn.Module) else []
        for heads in {sizes.heads, sizes.key_value_heads} - {1}:
            if any(shape and shape[-1] == heads * sizes.size for shape in shapes):
                return f"its norm layer {path} is over all heads, so a head that is removed changes the others"
    return ""


def _read(module: nn.Module, path: str) -> Any:
    """What is at a path from a module; None if there is nothing."""
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None


def _joined(groups: list[JointGroups]) -> JointGroups:
    """Head i of several attentions as one group."""
    if len({each.count for each in groups}) > 1:
        raise ValueError(
            f"{in_short([each.name for each in groups])} share one table of positions, but have different numbers of "
            "heads, so their heads cannot be pruned together; give all of them the same number"
        )
    return as_one(groups, (part for each in groups for part in each.parts))
