"""Whether a module passes on what it is given once some of its parameters are zero, found by running it.

The model runs once on an example, and what the modules in question are called with is recorded. Then a copy of each of
them, with zeros, is run by itself on inputs like these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...support.printable import message_of
from ..hooks import hooked
from ..running import check_runs, evaluating, first_example, random_restored, shell_of, untraced, without_fast_path
from ..tensors import is_float, tensors_in

# Up to this fraction of the largest value, a difference is rounding.
_ROUNDING = 1e-6

_NEEDS_EXAMPLE = (
    "granularity 'block': whether a block passes on what it is given is found by running the model once; give "
    "example_input=, a batch"
)

Call = tuple[tuple, dict[str, Any]]  # positional and named inputs


class RecordedRun:
    """A run of a model on one example, and what some of its modules are called with.

    Args:
        model: The model, without wrappers.
        modules: The modules, by name.
        example_input: A batch, of which the first example is taken. None: what the model brings along, as those of
            transformers do that read text.

    Attributes:
        calls: Name of a module -> copies of the inputs of its calls.

    Raises:
        ValueError: The model does not run on the example, or there is none.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], example_input: Any):
        is_given = example_input is not None
        example = example_input if is_given else getattr(model, "dummy_inputs", None)
        if example is None:
            raise ValueError(_NEEDS_EXAMPLE)
        self._model, self._example = model, first_example(example)
        self.calls: dict[str, list[Call]] = {}
        try:
            self._outputs = self._run(before=[(module, self._recorder(name)) for name, module in modules.items()])
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


@torch.no_grad()
def why_no_identity(block: nn.Module, zeroed: Iterable[Tensor], calls: Iterable[Call], run: RecordedRun) -> str:
    """Why a module does not pass on what it is given, once some of its parameters are zero; empty if it does.

    Args:
        block: The module.
        zeroed: Those parameters.
        calls: What it is called with.
        run: The run in which it was.
    """
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
        if (output.shape, output.dtype, output.device) != (given.shape, given.dtype, given.device):
            return "changes the shape or type of what it is given"
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
