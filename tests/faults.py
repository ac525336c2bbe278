"""Faults at every line of the library: an error is raised where a line begins, as an interrupt would be."""

import copy
import sys
from pathlib import Path

import torch

import sparsifai

PACKAGE = str(Path(sparsifai.__file__).parent)


class Fault:
    """Runs an action and raises an error where its n-th line of the library begins.

    Attributes:
        places: File and line of each line of the library that began before.
        place: File and line where the error was raised; None if the action ended before.
    """

    def __init__(self, number=None, error=KeyboardInterrupt):
        self.number, self.error, self.places, self.place = number, error, [], None

    def __call__(self, action):
        earlier = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return action()
        finally:
            sys.settrace(earlier)

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self.place is None:
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) == self.number:
                self.place = self.places[-1]
                raise self.error
        return self._trace


def places_of(action):
    """File and line of each line of the library that an action runs through."""
    fault = Fault()
    fault(action)
    return fault.places


def state_of(sparsifier, optimizer=None):
    """All that an update changes, by name, in tensors and numbers of their own; weights by what the masks keep."""
    masks = dict(sparsifier.all_masks)
    state = {"rng": sparsifier.collected.source.rng.get_state(), "layers": list(sparsifier.collected.source.layers)}
    state |= {f"mask of {name}": mask for name, mask in masks.items()}
    state |= {f"level of {name}": layer.level for name, layer in sparsifier.layers.items()}
    dense = sparsifier._dense
    # Where weights are kept, the parameters have the values. As long as nothing is pruned, nothing need be kept beside.
    state["dense"] = {name: torch.where(masks[name], 0, value) for name, value in dense.values.items()
                      if not masks[name].all()}  # fmt: skip
    state["trained"], state["settled"] = dense.trained, sparsifier._dense.is_settled
    for name, parameter in sparsifier.model.named_parameters():
        value = parameter.detach()
        state[name] = torch.where(masks[name], value, 0) if name in masks else value
        entries = {} if optimizer is None else optimizer.state.get(parameter, {})
        state |= {f"{entry} of {name}": value for entry, value in entries.items()}
    for kind, collected in (("criterion", sparsifier.collected), ("regrowth", sparsifier._regrowth)):
        if collected is not None:
            state[kind] = {**collected.state(), "unreached": collected.unreached, "left out": collected.left_out}
    return copy.deepcopy(state)


def unzeroed(sparsifier):
    """Names of the parameters that have a masked value that is not zero."""
    pairs = [(name, sparsifier.model.get_parameter(name), mask) for name, mask in sparsifier.all_masks.items()]
    return [name for name, parameter, mask in pairs if (parameter.detach().masked_fill(mask, 0) != 0).any()]
