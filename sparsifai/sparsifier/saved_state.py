"""Reads the saved state of a Sparsifier: all of it is checked and built before any of it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..axes.quantity import AVERAGED, STORED
from ..model.tensors import widened
from ..support.printable import printable
from ..support.registry import name_of
from .collection import CollectedQuantities
from .dense_weights import DenseWeights
from .layer import Layer, Layers
from .regrowth import Regrowth

# What to do if a state has other layers, or values of other shapes.
_SAME_MODEL = "use the same model, granularity, layers and exclude as when it was saved, and freeze the same layers"

# What to do if a value is of a kind that no Sparsifier saves.
_DAMAGED = "give what state_dict() returned; the file may be damaged, or another one"

# A state may have been saved before or after a model was cast from one of these to another.
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# No count of batches or of inputs is as high.
_MOST = 2**63


@dataclass(frozen=True)
class SavedState:
    """What a saved state says.

    Attributes:
        layers: Parameter name -> the record of the layer, with the saved mask and level.
        quantities: The attributes of the criterion's quantities.
        of_regrowth: The attributes of the regrowth; empty without regrow=.
        random: State of the random generator, on the CPU.
        of_dense: The attributes of the dense weights; empty without straight_through.
    """

    layers: dict[str, Layer]
    quantities: dict[str, Any]
    of_regrowth: dict[str, Any]
    random: Tensor
    of_dense: dict[str, Any]


def read_state(
    state: Any,
    layers: Layers,
    collected: CollectedQuantities,
    regrowth: Regrowth | None,
    dense: DenseWeights,
) -> SavedState:
    """Read a state for a Sparsifier, and change nothing.

    Args:
        state: The state, as `Sparsifier.state_dict` returns it.
        layers: The selected layers of the Sparsifier.
        collected: Its criterion and quantities.
        regrowth: Its regrowth, or None.
        dense: Its dense weights, which are none without straight_through.

    Raises:
        ValueError: The state is not that of a Sparsifier with these layers, quantities and regrowth.
    """
    parts = ("masks", "levels", "statistics", "rng")
    if not isinstance(state, Mapping) or not set(parts) <= state.keys():
        raise ValueError(
            "load_state_dict: the state lacks the masks, levels, statistics or rng of a Sparsifier; give what "
            "state_dict() returned"
        )
    options = {"regrowth": ("regrow=", regrowth), "straight_through": ("straight_through=True", dense.decay)}
    for part, (option, value) in options.items():
        if (part in state) != (value is not None):
            raise ValueError(
                f"load_state_dict: only one of the state and this Sparsifier has {option}; use the same "
                f"{option.partition('=')[0]}= as when the state was saved"
            )
    _check_known("the state", state, (*parts, "regrowth", "straight_through"))
    masks, levels = _table("masks", state["masks"]), _table("levels", state["levels"])
    for what, given, form in (("mask", masks, _form_of_mask), ("level", levels, lambda layer: "a number")):
        _check_layers(what, given, {name: form(layer) for name, layer in layers.items()})
    read = {
        name: layer.with_mask(_mask(f"mask of {name}", masks[name], layer), _level(name, levels[name]))
        for name, layer in layers.items()
    }
    quantities, of_regrowth = _quantities("statistics", state["statistics"], layers, collected), {}
    if regrowth is not None:
        of_regrowth = _quantities("regrowth", state["regrowth"], layers, regrowth)
        used = _table("used masks", state["regrowth"]["used"])
        _check_layers("used mask", {**masks, **used}, {name: _form_of_mask(layer) for name, layer in layers.items()})
        of_regrowth["used"] = {name: _mask(f"used mask of {name}", mask, layers[name]) for name, mask in used.items()}
    of_dense = {} if dense.decay is None else _dense_weights(state["straight_through"], read, dense)
    return SavedState(read, quantities, of_regrowth, _random(state["rng"]), of_dense)


def _quantities(what: str, saved: Any, layers: Layers, collected: CollectedQuantities) -> dict[str, Any]:
    """The attributes of collected quantities, as they were saved."""
    parts: tuple[str, ...] = ("stored", "counts", "begins")
    if not isinstance(saved, Mapping) or not set(parts) <= saved.keys():
        raise ValueError(
            f"load_state_dict: the {what} of the state are not those of a Sparsifier, which have {', '.join(parts)}; "
            f"{_DAMAGED}"
        )
    if isinstance(collected, Regrowth):
        parts += ("used",)
        if "used" not in saved:
            raise ValueError("load_state_dict: the state lacks the weights that were ever used; save it with regrow=")
    _check_known(what, saved, parts)
    fixed, means = collected.at(*STORED), collected.at(*AVERAGED)
    tables = _table(f"quantities of {what}", saved["stored"])
    _check_quantities(tables, fixed, {*fixed, *means}, collected)
    stored = {
        quantity: _values(quantity, _table(quantity, values), layers, collected, is_mean=quantity not in fixed)
        for quantity, values in tables.items()
    }
    tables = _table(f"counts of {what}", saved["counts"])
    _check_quantities(tables, (), means, collected)
    counts = {quantity: _counts(quantity, values, stored.get(quantity, {})) for quantity, values in tables.items()}
    begins = saved["begins"]
    if not isinstance(begins, (list, tuple, set)) or not all(isinstance(each, str) for each in begins):
        raise _wrong(f"begins of {what}", begins, "a list of quantities")
    _check_quantities(begins, (), means, collected)
    unreached: dict[str, set[str]] = {quantity: set() for quantity in stored if quantity in means}
    return {"stored": stored, "counts": counts, "begins": set(begins), "unreached": unreached}


@torch.inference_mode(False)
@torch.no_grad()
def _dense_weights(saved: Any, layers: Layers, dense: DenseWeights) -> dict[str, Any]:
    """The attributes of the dense weights, as they were saved.

    Args:
        saved: The part of the state.
        layers: The selected layers, as the state leaves them.
        dense: The dense weights of the Sparsifier.
    """
    what, parts = "straight_through", ("values", "trained", "settled")
    if not isinstance(saved, Mapping) or not set(parts) <= saved.keys():
        raise ValueError(f"load_state_dict: the {what} of the state lacks {', '.join(parts)} of it; {_DAMAGED}")
    _check_known(what, saved, parts)
    if not isinstance(saved["settled"], bool):
        raise _wrong(f"settled of {what}", saved["settled"], "True or False")
    values, trained = _table("dense weights", saved["values"]), _table("trained masks", saved["trained"])
    if saved["settled"] and (values or trained):
        raise ValueError(f"load_state_dict: the {what} of the state is settled, but has dense weights; {_DAMAGED}")
    of_all = {**{name: layer.mask for name, layer in layers.items()}, **dense.masks.followers_of(layers)}
    # Where nothing is pruned, nothing need be kept; where zeros were recovered, nothing is known.
    needed = {name for name, mask in of_all.items() if values and not mask.all()}
    read = {}
    for name in (*values, *sorted(needed - values.keys())):
        value, here = values.get(name), dense.model.get_parameter(name).detach() if name in of_all else None
        part = f"dense weight of {printable(name)}"
        if value is None or here is None or _form(value) != _form(here):
            raise _differs(part, _form(value), _form(here))
        if value.dtype not in (here.dtype, *_FLOATS):
            raise _differs(part, f"of {value.dtype}", f"of {here.dtype}")
        _check_scorable(part, value)
        # In memory of its own and in the memory order of the weight.
        read[name] = torch.empty_like(here).copy_(value.detach())
    _check_layers("trained mask", trained, {name: _form_of_mask(layers[name]) for name in trained if name in layers})
    masks = {name: _mask(f"trained mask of {name}", mask, layers[name]) for name, mask in trained.items()}
    return dense.changed(read, masks, saved["settled"])


def _values(
    quantity: str, values: Mapping[str, Any], layers: Layers, collected: CollectedQuantities, is_mean: bool
) -> dict[str, Tensor]:
    """A stored quantity of each layer. A mean over batches can be missing for some layers."""
    present = collected.stored.get(quantity, {})
    known = {name: _form(value) for name, value in present.items() if name in layers}
    for name in values:
        if name not in layers:
            raise ValueError(
                f"load_state_dict: the state has quantities of {printable(name)}, which is not selected here; use the "
                "same layers and exclude as when it was saved"
            )
    if not is_mean:
        _check_layers(quantity, values, {name: known.get(name, "numbers") for name in layers})
    read = {}
    for name, value in values.items():
        what = f"{quantity} of {name}"
        if not _has_values(value) or _form(value) != known.get(name, _form(value)):
            raise _differs(what, _form(value), known.get(name, "numbers"))
        here = present[name].dtype if name in known else torch.float32
        if value.dtype not in (here, *(_FLOATS if here in _FLOATS else ())):
            raise _differs(what, f"of {value.dtype}", f"of {here}")
        _check_scorable(what, value)
        read[name] = value.detach().to(layers[name].parameter.device)
    return read


def _counts(quantity: str, counts: Any, stored: Mapping[str, Tensor]) -> dict[str, int]:
    """How many batches, or values, are in the mean of each layer."""
    read = {}
    for name, count in _table(f"counts of {quantity}", counts).items():
        if name not in stored:
            raise ValueError(
                f"load_state_dict: the state counts batches of {quantity} of {printable(name)}, but has no value of "
                f"it; {_DAMAGED}"
            )
        if isinstance(count, bool) or not isinstance(count, Integral) or not 0 <= int(count) < _MOST:
            raise _wrong(f"count of {quantity} of {printable(name)}", count, "a whole number, 0 or more")
        read[name] = int(count)
    return read


# --- Single values ----------------------------------------------------------------------------------------------------


def _mask(what: str, mask: Any, layer: Layer) -> Tensor:
    """A mask of a layer, in memory of its own and in the memory order of the weight."""
    if _form(mask) != _form_of_mask(layer):
        raise _differs(what, _form(mask), _form_of_mask(layer))
    read = layer.mask_of(layer.grouping.gather(mask).clone())
    if not torch.equal(read, mask.to(read.device)):
        raise ValueError(
            f"load_state_dict: the {what} prunes parts of groups in the state, which this granularity keeps or prunes "
            f"as a whole; {_SAME_MODEL}"
        )
    return read


def _level(name: str, level: Any) -> float:
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1:
        raise _wrong(f"level of {printable(name)}", level, "a number from 0 to 1")
    return float(level)


def _random(state: Any) -> Tensor:
    """The state of a random generator, on the CPU."""
    if _has_values(state) and state.dtype == torch.uint8:
        generator, random = torch.Generator(), state.detach().cpu().contiguous()
        try:
            generator.set_state(random)
            if torch.equal(generator.get_state(), random):
                return random
        except (RuntimeError, TypeError):  # it has another size, or numbers that no generator has
            pass
    raise ValueError(f"load_state_dict: the rng of the state is no RNG state of this version of torch; {_DAMAGED}")


def _check_scorable(what: str, value: Tensor) -> None:
    if widened(value).isnan().any():
        raise ValueError(
            f"load_state_dict: {what} has NaN in the state, which cannot be scored; load a state from before training "
            "has diverged"
        )


def _has_values(value: Any) -> bool:
    """Whether a value is a dense tensor with values."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized


# --- Names and forms --------------------------------------------------------------------------------------------------


def _table(what: str, table: Any) -> dict[str, Any]:
    """A mapping from names, as a dictionary."""
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise _wrong(what, table, "a dictionary by name")
    return dict(table)


def _check_known(what: str, table: Mapping[Any, Any], known: Iterable[str]) -> None:
    if unknown := [name for name in table if name not in known]:
        raise ValueError(f"load_state_dict: {what} has the unknown part {unknown[0]!r:.80}; {_DAMAGED}")


def _check_layers(what: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Check that a state has a value for each layer. known: layer name -> form of the value here."""
    for name in sorted(known.keys() ^ given.keys()):
        raise _differs(f"{what} of {printable(name)}", _form(given.get(name)), known.get(name, "absent"))


def _check_quantities(
    given: Iterable[str], needed: Iterable[str], known: Iterable[str], collected: CollectedQuantities
) -> None:
    """Check that a state has the quantities of a criterion."""
    if not set(needed) <= set(given) <= set(known):
        raise ValueError(
            f"load_state_dict: the state has the quantities {sorted(given)}, the criterion "
            f"{name_of(collected.criterion)} needs {sorted(known)}; use the same criterion"
        )


def _form(value: Any) -> str:
    """Kind and shape of an entry, for comparison and for messages."""
    if isinstance(value, Tensor):
        kind = "bools" if value.dtype == torch.bool else "numbers"
        return f"{kind if _has_values(value) else 'a tensor without plain values'} of the shape {tuple(value.shape)}"
    return "absent" if value is None else "a number" if isinstance(value, Real) else type(value).__name__


def _form_of_mask(layer: Layer) -> str:
    return f"bools of the shape {tuple(layer.mask.shape)}"


def _differs(what: str, there: str, here: str) -> ValueError:
    return ValueError(f"load_state_dict: the {what} is {there} in the state and {here} here; {_SAME_MODEL}")


def _wrong(what: str, value: Any, expected: str) -> ValueError:
    shown = f"{value!r:.80}" if isinstance(value, (str, Real, type(None))) else type(value).__name__
    return ValueError(f"load_state_dict: the {what} must be {expected}, not {shown}; {_DAMAGED}")
