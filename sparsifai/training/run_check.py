"""Checks of what a file of lottery tickets holds, before anything of it is used.

Every error names the entry. Only plain tensors, numbers, texts and containers of them pass, and no more of these than a
function that visits all of them can bear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import unwrapped
from ..model.tensors import computable

# Limits of the values in an optimizer's state, and of how deep they are nested.
MOST_VALUES = 2**20
DEEPEST = 12

_TICKET = {"masks", "sparsity", "metrics", "controls", "start"}
_RUN = {"settings", "initial", "optimizer", "trained", "sparsifier", "random"}
_OTHER_MODEL = (
    "the ticket belongs to another model, with other names or shapes in its state_dict; pass a model that is built "
    "like the one that the ticket was found with"
)


def check_tickets(state: Any) -> None:
    """Check the tickets of a file.

    Args:
        state: What `LotteryTickets.state` should have returned.

    Raises:
        ValueError: It is something else. The message names the entry.
    """
    _check_keys(state, "the file", {"tickets", "metric", "start"}, others=True)
    if not isinstance(state["metric"], str):
        raise _wrong("metric", state["metric"], "a text")
    check_values(state["start"], "start")
    if not isinstance(state["tickets"], list):
        raise _wrong("tickets", state["tickets"], "a list")
    for number, ticket in enumerate(state["tickets"]):
        where = f"tickets[{number}]"
        _check_keys(ticket, where, _TICKET)
        for name, mask in _items(ticket["masks"], f"{where}.masks"):
            check_mask(mask, f"{where}.masks[{name!r}]")
        _check_number(ticket["sparsity"], f"{where}.sparsity", 0, 1)
        _check_metrics(ticket["metrics"], f"{where}.metrics")
        for name, metrics in _items(ticket["controls"], f"{where}.controls"):
            _check_metrics(metrics, f"{where}.controls[{name!r}]")


def check_run(run: Any) -> None:
    """Check the kinds of what is saved to resume a run. Whether it fits the model is checked by `check_fits`.

    Args:
        run: What `LotteryRun.save` should have written under "run".

    Raises:
        ValueError: It is something else. The message names the entry.
    """
    _check_keys(run, "run", _RUN)
    for name, text in _items(run["settings"], "run.settings"):
        if not isinstance(text, str):
            raise _wrong(f"run.settings[{name!r}]", text, "a text")
    _check_keys(run["initial"], "run.initial", {"model", "optimizer"})
    check_values(run["initial"]["model"], "run.initial.model")
    check_values(run["trained"], "run.trained")
    check_plain(run["initial"]["optimizer"], "run.initial.optimizer")
    check_plain(run["optimizer"], "run.optimizer")
    check_plain(run["sparsifier"], "run.sparsifier")
    _check_keys(run["sparsifier"], "run.sparsifier", {"masks", "levels", "statistics", "rng"}, others=True)
    masks = run["sparsifier"]["masks"]
    for name, mask in _items(masks, "run.sparsifier.masks"):
        check_mask(mask, f"run.sparsifier.masks[{name!r}]")
    levels = dict(_items(run["sparsifier"]["levels"], "run.sparsifier.levels"))
    if list(levels) != list(masks):
        raise ValueError("run.sparsifier.levels has other names than run.sparsifier.masks")
    for name, level in levels.items():
        _check_number(level, f"run.sparsifier.levels[{name!r}]", 0, 1)
    check_plain(run["random"], "run.random")


def check_order(tickets: Sequence[Any], rounds: int, masks: Mapping[str, Tensor]) -> None:
    """Check that the tickets are those of the rounds of one run, in their order.

    Args:
        tickets: The tickets, the dense net first.
        rounds: How many rounds the run has.
        masks: The masks after the last pruning.

    Raises:
        ValueError: There are none or too many, their masks have other names, or a ticket keeps a weight that an earlier
            one has pruned.
    """
    if not 1 <= len(tickets) <= rounds + 1:
        raise ValueError(f"tickets has {len(tickets)} entries, for a dense net and {rounds} rounds")
    for number, ticket in enumerate(tickets):
        if list(ticket.masks) != list(masks):
            raise ValueError(f"tickets[{number}].masks has other names than run.sparsifier.masks")
        for name, mask in ticket.masks.items():
            later = tickets[number + 1].masks.get(name) if number + 1 < len(tickets) else masks[name]
            if later is None or later.shape != mask.shape or (later & ~mask).any():
                raise ValueError(f"tickets[{number}].masks[{name!r}] has pruned weights that a later mask keeps")
    if any(not torch.equal(mask, masks[name]) for name, mask in tickets[-1].masks.items()):
        raise ValueError(f"tickets[{len(tickets) - 1}].masks are not those of run.sparsifier.masks")


def check_fits(
    model: nn.Module, values: Any, where: str, masks: Mapping[str, Any] | None = None, finite: bool = True
) -> None:
    """Check that a state_dict and masks fit a model.

    Args:
        model: The model.
        values: The state_dict.
        where: Name of the state_dict, for messages.
        masks: Parameter name -> mask. Default none.
        finite: Whether inf and NaN among the parameters are an error. Default True.

    Raises:
        ValueError: A name, shape or dtype differs, a parameter is not finite, or a mask is none.
    """
    plain = unwrapped(model)
    own = plain.state_dict()
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    check_values(values, where)
    for name in [*own, *values]:
        mine, given = _shape_of(own, name), _shape_of(values, name)
        if mine != given:
            raise ValueError(f"{_OTHER_MODEL}: {name!r} has the shape {given} in {where} and {mine} in the model")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        if value.dtype != own[name].dtype:
            raise ValueError(
                f"{where}[{name!r}] is {_short(value.dtype)}, and {_short(own[name].dtype)} in the model; convert the "
                f"model first, with model.to({value.dtype})"
            )
        if finite and name in parameters and not _is_finite(value):
            raise ValueError(f"{where}[{name!r}] has values that are inf or NaN")
    for name, mask in _items({} if masks is None else masks, "masks"):
        check_mask(mask, f"masks[{name!r}]")
        if name not in parameters:
            raise ValueError(f"masks[{name!r}] belongs to no parameter of {type(plain).__name__}")
        shape = tuple(parameters[name].shape)
        if mask.dim() > len(shape) or any(
            size not in (1, length) for size, length in zip(mask.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(f"masks[{name!r}] has the shape {tuple(mask.shape)}, and its parameter {shape}")


def check_values(values: Any, where: str) -> None:
    """Check that this is a state_dict of plain tensors, and plain values beside them."""
    for name, value in _items(values, where):
        check_plain(value, f"{where}[{name!r}]")


def check_mask(mask: Any, where: str) -> None:
    """Check that this is a plain bool tensor."""
    if not isinstance(mask, Tensor):
        raise _wrong(where, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{where} is a tensor of {_short(mask.dtype)}, and a mask is bool; convert it with .bool() if it holds 0 "
            "and 1 only"
        )
    _check_tensor(mask, where)


def check_plain(value: Any, where: str) -> None:
    """Check that this is a plain tensor, a number, a text, or containers of them that are not too large or too deep."""
    left, waiting = MOST_VALUES, [(value, 0)]
    while waiting:
        each, depth = waiting.pop()
        if isinstance(each, Tensor):
            _check_tensor(each, where)
        elif isinstance(each, (Mapping, list, tuple)):
            left -= len(each)
            if left < 0 or depth == DEEPEST:
                raise ValueError(f"{where} has more than {MOST_VALUES:,} values, or is nested deeper than {DEEPEST}")
            if isinstance(each, Mapping) and not all(isinstance(key, (str, int)) for key in each):
                raise ValueError(f"{where} has keys that are neither texts nor whole numbers")
            waiting += [(inner, depth + 1) for inner in (each.values() if isinstance(each, Mapping) else each)]
        elif not isinstance(each, (type(None), bool, int, float, str, complex)):
            raise _wrong(where, each, "a tensor, a number, a text, or a container of them")


# --- Helpers --------------------------------------------------------------------------------------------------------


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where} is of type {type(value).__name__}, and should be {expected}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_keys(value: Any, where: str, keys: set[str], others: bool = False) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a dictionary")
    missing = sorted(keys - value.keys())
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}")
    more = [] if others else [key for key in value if key not in keys]
    if more:
        raise ValueError(f"{where} has the unknown entry {str(more[0])[:100]!r}")


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    """The entries of a dictionary whose keys are names."""
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a dictionary")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where} has a name of type {type(key).__name__}; names are texts")
        if len(key) > 1000:
            raise ValueError(f"{where} has the name {key[:50]!r}..., which has {len(key):,} characters")
    return list(value.items())


def _check_metrics(metrics: Any, where: str) -> None:
    for name, value in _items(metrics, where):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(f"{where}[{name!r}]", value, "a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{where}[{name!r}] is a whole number of more than 64 bits")


def _check_number(value: Any, where: str, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(where, value, "a number")
    if not low <= value <= high:
        raise ValueError(f"{where} is {str(value)[:50]}, and should be from {low} to {high}")


def _check_tensor(value: Tensor, where: str) -> None:
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        raise ValueError(
            f"{where} is a {type(value).__name__} of {_short(value.dtype)} in the layout {value.layout} on "
            f"{value.device}; only plain tensors with values are used"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{where} has more elements than are stored")


def _shape_of(values: Mapping[str, Any], name: str) -> Any:
    """The shape of an entry, or what else it is."""
    value = values.get(name)
    return tuple(value.shape) if isinstance(value, Tensor) else ("absent" if name not in values else "none")


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool(torch.isfinite(computable(value)).all())
