"""Residual blocks as joint groups: with all its weights zero, a block passes on what it is given, and can be removed.

Whether it does cannot be read from its class, so it is tried out. Blocks that behave otherwise stay dense, such as
those of BERT, which normalize the sum, and those of a ResNet that halve the size of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...support.printable import printable
from ..layers import find_weights, parameter_name
from ..parallel import kind_of
from .entries import DEPTHS, LISTS
from .groups import FOLLOWER, NO_GROUP, WEIGHT, Entries, JointGroups, Part, sizes_in
from .identity import RecordedRun, why_no_identity


@dataclass(eq=False)
class _Candidate:
    """A module that may be a residual block.

    Attributes:
        name: Its name in the model.
        module: The module.
        weights: Names of its weights, which are pruned with it.
        followers: Names of further parameters that have to be zero, too: biases, and entries of norm layers if needed.
        why_not: Why it is no residual block that can be removed; empty if it is.
    """

    name: str
    module: nn.Module
    weights: list[str]
    followers: list[str] = field(default_factory=list)
    why_not: str = ""


def find_blocks(model: nn.Module, example_input: Any = None) -> list[JointGroups]:
    """The residual blocks of a model, list by list in the order of its modules.

    Candidates are modules of the same class in a ModuleList, Sequential or ModuleDict. If one contains others that can
    be removed, those are the blocks.

    Args:
        model: The model, without wrappers.
        example_input: A batch, of which one example is run through the model. Models of transformers that read text
            bring one of their own.

    Returns:
        For each list its blocks as groups; then the candidates that cannot be pruned, with `why_kept`.

    Raises:
        ValueError: The model does not run on the example, or there is none.
    """
    lists = _lists_of(model)
    candidates = _candidates(model, lists)
    if not candidates:
        return []
    run = RecordedRun(model, {each.name: each.module for each in candidates}, example_input)
    values = dict(model.named_parameters(remove_duplicate=False))
    for each in candidates:
        _try_out(each, run, values)
    passing = {each.name: each for each in candidates if not each.why_not}
    blocks = {
        name: each for name, each in passing.items() if not any(other.startswith(f"{name}.") for other in passing)
    }
    found = [
        _groups_of(model, name, entries, blocks) for name, entries in lists.items() if blocks.keys() & set(entries)
    ]
    taken = {part.name for groups in found for part in groups.parts}
    for each in candidates:
        left = [weight for weight in each.weights if weight not in taken] if each.why_not else []
        taken.update(left)
        if left:
            parts = tuple(Part(weight, None, np.zeros(1, np.int64)) for weight in left)
            why = f"{printable(each.name)} ({kind_of(each.module)}) {each.why_not}"
            found.append(JointGroups(each.name, "block", 1, parts, why_kept=why, apart=True))
    return found


def has_zero_candidates(model: nn.Module) -> bool:
    """Whether a module that may be a residual block has weights of zero alone."""
    candidates = _candidates(model, _lists_of(model))
    return any(not any(model.get_parameter(name).any() for name in each.weights) for each in candidates)


def _lists_of(model: nn.Module) -> dict[str, list[str]]:
    """The lists of modules of a model: name of the list -> names of its entries."""
    return {
        name: [parameter_name(name, key) for key in module._modules]
        for name, module in model.named_modules()
        if isinstance(module, LISTS)
    }


def _candidates(model: nn.Module, lists: Mapping[str, Sequence[str]]) -> list[_Candidate]:
    """The modules that may be residual blocks. lists: name of each list -> names of its entries."""
    known = dict(model.named_modules(remove_duplicate=False))  # an entry can be None, or there several times
    modules = {name: known[name] for entries in lists.values() for name in entries if name in known}
    everywhere = Counter(map(type, modules.values()))
    prunable = [
        name
        for name, weight in find_weights(model).items()
        if not (weight.unfit or weight.sources or weight.is_embedding)
    ]
    found = []
    for entries in lists.values():
        entries = [name for name in entries if name in modules]
        here = Counter(type(modules[name]) for name in entries)
        for name in entries:
            kind = type(modules[name])
            is_repeated = here[kind] > 1 or (len(here) == 1 and everywhere[kind] > 1)
            weights = [weight for weight in prunable if weight.startswith(f"{name}.")]
            is_layer = not any(True for _ in modules[name].children())
            if is_repeated and weights and not is_layer and not isinstance(modules[name], LISTS):
                found.append(_Candidate(name, modules[name], weights))
    return found


def _try_out(candidate: _Candidate, run: RecordedRun, values: Mapping[str, Tensor]) -> None:
    """Find out whether a candidate passes on what it is given once its weights are zero, and what else has to be.

    values: Name -> parameter, of all parameters of the model, shared ones under each name.
    """
    calls, inside = run.calls.get(candidate.name, []), f"{candidate.name}."
    own = {id(values[name]): name for name in candidate.weights}
    shared = [own[id(value)] for name, value in values.items() if id(value) in own and not name.startswith(inside)]
    if shared or not calls:
        candidate.why_not = (
            f"shares {printable(shared[0])} with another place" if shared else "is not called on the example input"
        )
        return
    holders = {name.rpartition(".")[0] for name in candidate.weights}
    biases, of_norms = [], []
    for name, value in values.items():
        holder, _, attribute = name.rpartition(".")
        if name.startswith(inside) and name not in candidate.weights:
            if holder in holders and "bias" in attribute and value.dim() in (1, 2):
                biases.append(name)
            elif holder not in holders and value.dim() == 1:
                of_norms.append(name)
    # A norm layer in front of a layer passes nothing on. One behind it, at the end of a branch, adds its bias.
    for followers in (biases, biases + of_norms):
        zeroed = {values[name] for name in candidate.weights + followers}
        why_not = why_no_identity(candidate.module, zeroed, calls, run)
        candidate.why_not = candidate.why_not or why_not
        if not why_not:
            candidate.followers, candidate.why_not = followers, ""
            return


def _groups_of(model: nn.Module, name: str, entries: Sequence[str], blocks: Mapping[str, _Candidate]) -> JointGroups:
    """The blocks of one list. entries: names of the entries of the list. blocks: name -> all blocks of the model."""
    here = [blocks[entry] for entry in entries if entry in blocks]
    numbers = {each.name: number for number, each in enumerate(here)}
    parts = tuple(
        Part(parameter, None, np.array([numbers[each.name]]), role)
        for each in here
        for role, parameters in ((WEIGHT, each.weights), (FOLLOWER, each.followers))
        for parameter in parameters
    )
    owner = name.rpartition(".")[0]
    sizes = sizes_in([(owner, model.get_submodule(owner))], dict.fromkeys(DEPTHS, 1), len(entries))
    listed = Entries(name, np.array([numbers.get(entry, NO_GROUP) for entry in entries]), are_layers=True)
    return JointGroups(name, "block", len(here), parts, sizes, entries=listed, apart=True)
