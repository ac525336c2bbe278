"""Residual blocks as joint groups: with all its weights zero, a block passes on what it is given, and can be removed.

Whether it does cannot be read from its class, so it is tried out. The model runs once, and each block with its weights
at zero is run by itself on inputs like those that it got. Blocks that behave otherwise stay dense, such as those of
BERT, which normalize the sum, and those of a ResNet that halve the size of the image.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...support.printable import message_of, printable
from ..hooks import hooked
from ..layers import find_weights, parameter_name
from ..parallel import kind_of
from ..running import check_runs, evaluating, first_example, random_restored, shell_of, untraced, without_fast_path
from ..tensors import is_float, tensors_in
from .entries import DEPTHS, LISTS
from .groups import FOLLOWER, NO_GROUP, WEIGHT, Entries, JointGroups, Part, sizes_in

# Up to this fraction of the largest value, a difference is rounding.
_ROUNDING = 1e-6

_NEEDS_EXAMPLE = (
    "granularity 'block': whether a block passes on what it is given is found by running the model once; give "
    "example_input=, a batch"
)

Call = tuple[tuple, dict[str, Any]]  # positional and named inputs


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
        For each list its blocks as groups; then the candidates that cannot be pruned, with `why_dense`.

    Raises:
        ValueError: The model does not run on the example, or there is none.
    """
    lists = {
        name: [parameter_name(name, key) for key, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, LISTS)
    }
    candidates = _candidates(model, lists)
    if not candidates:
        return []
    run = _Run(model, candidates, example_input)
    for each in candidates:
        _try_out(each, run)
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
            found.append(JointGroups(each.name, "block", 1, parts, why_dense=why, apart=True))
    return found


def _candidates(model: nn.Module, lists: Mapping[str, Sequence[str]]) -> list[_Candidate]:
    """The modules that may be residual blocks. lists: name of each list -> names of its entries."""
    modules = {name: model.get_submodule(name) for entries in lists.values() for name in entries}
    everywhere = Counter(map(type, modules.values()))
    prunable = [
        name
        for name, weight in find_weights(model).items()
        if not (weight.unfit or weight.sources or weight.is_embedding)
    ]
    found = []
    for entries in lists.values():
        here = Counter(type(modules[name]) for name in entries)
        for name in entries:
            kind = type(modules[name])
            is_repeated = here[kind] > 1 or (len(here) == 1 and everywhere[kind] > 1)
            weights = [weight for weight in prunable if weight.startswith(f"{name}.")]
            is_layer = not any(True for _ in modules[name].children())
            if is_repeated and weights and not is_layer and not isinstance(modules[name], LISTS):
                found.append(_Candidate(name, modules[name], weights))
    return found


class _Run:
    """A run of the model on one example, and what its candidates are called with.

    Args:
        model: The model, without wrappers.
        candidates: The candidates.
        example_input: A batch, or None.

    Attributes:
        values: Name -> parameter, of all parameters of the model, shared ones under each name.
        calls: Name of a candidate -> copies of the inputs of its calls.
    """

    def __init__(self, model: nn.Module, candidates: Iterable[_Candidate], example_input: Any):
        is_given = example_input is not None
        example = example_input if is_given else getattr(model, "dummy_inputs", None)
        if example is None:
            raise ValueError(_NEEDS_EXAMPLE)
        self._model, self._example = model, first_example(example)
        self.values = dict(model.named_parameters(remove_duplicate=False))
        self.calls: dict[str, list[Call]] = {}
        try:
            self._outputs = self._run(before=[(each.module, self._recorder(each.name)) for each in candidates])
        except ValueError as error:
            if is_given:
                raise
            raise ValueError(_NEEDS_EXAMPLE) from error

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            self.calls.setdefault(name, []).append(copy.deepcopy((inputs, named)))

        return record

    @torch.no_grad()
    def _run(self, **hooks: Any) -> list[Tensor]:
        """The outputs of the model, with hooks on some modules."""
        with evaluating(self._model), untraced(self._model), without_fast_path(), hooked(**hooks):
            return tensors_in(check_runs(self._model, self._example))

    def reads_others(self, block: nn.Module) -> bool:
        """Whether the model reads more of what a block puts out than the first tensor."""

        def spoil(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
            leaves, form = tree_flatten(output)
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            for place in places[1:]:
                leaves[place] = torch.full_like(leaves[place], float("nan") if is_float(leaves[place]) else 1)
            return tree_unflatten(leaves, form)

        try:
            outputs = self._run(after=[(block, spoil)])
        except ValueError:
            return True
        return not all(map(torch.equal, outputs, self._outputs))


def _try_out(candidate: _Candidate, run: _Run) -> None:
    """Find out whether a candidate passes on what it is given once its weights are zero, and what else has to be."""
    values, calls = run.values, run.calls.get(candidate.name, [])
    inside = f"{candidate.name}."
    own = {id(values[name]): name for name in candidate.weights}
    shared = [own[id(value)] for name, value in values.items() if id(value) in own and not name.startswith(inside)]
    if shared or not calls:
        candidate.why_not = f"shares {printable(shared[0])}" if shared else "is not called on the example input"
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
        why_not = _why_no_identity(candidate.module, zeroed, calls, run)
        candidate.why_not = candidate.why_not or why_not
        if not why_not:
            candidate.followers, candidate.why_not = followers, ""
            return


@torch.no_grad()
def _why_no_identity(block: nn.Module, zeroed: Iterable[Tensor], calls: Iterable[Call], run: _Run) -> str:
    """Why a block does not pass on what it is given, once some of its parameters are zero; empty if it does."""
    shell = shell_of(block, {each: torch.zeros_like(each) for each in zeroed})
    for call in calls:
        leaves, form = tree_flatten(call)
        place = next((place for place, leaf in enumerate(leaves) if is_float(leaf)), None)
        if place is None:
            return "has no inputs of floats"
        given = _others_like(leaves[place])
        leaves[place] = given.clone()  # the block may work in place
        inputs, named = tree_unflatten(leaves, form)
        try:
            with random_restored(shell), without_fast_path():
                output, *others = [leaf for leaf in tree_leaves(shell(*inputs, **named)) if isinstance(leaf, Tensor)]
        except Exception as error:  # the code of a user's class can raise anything
            return f"cannot be run with weights of zero ({message_of(error)})"
        if output.shape != given.shape:
            return "changes the shape of what it is given"
        if not torch.allclose(output, given, rtol=0, atol=_ROUNDING * float(given.abs().max())):
            return "does not pass on what it is given once its weights are zero"
        known = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        passes_others_on = all(any(torch.equal(other, leaf) for leaf in known) for other in others)
        if not passes_others_on and run.reads_others(block):
            return "also computes what is read elsewhere"
    return ""


def _others_like(values: Tensor) -> Tensor:
    """Values like those that a block is given, but not normalized: drawn from them, and scaled down at random.

    What is never negative, as behind a ReLU, stays so.
    """
    generator = torch.Generator().manual_seed(0)
    factors = (0.5 + 0.5 * torch.rand(values.shape, generator=generator)).to(values.device, values.dtype)
    if not values.numel() or values.min() == values.max():
        return factors
    drawn = torch.randint(values.numel(), values.shape, generator=generator).to(values.device)
    return values.flatten()[drawn] * factors


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
