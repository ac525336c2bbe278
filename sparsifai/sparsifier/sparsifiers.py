"""Several Sparsifiers of one model, each with layers of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..model.zeros import Count
from ..support.arguments import checks_arguments
from ..support.listing import in_short
from .layer import FROZEN, Layers, level_of, selected
from .model_masks import merged
from .report import Report
from .sparsifier import Sparsifier


class Sparsifiers(Sequence[Sparsifier]):
    """Several Sparsifiers of one model, each with layers of its own, which are masked and measured together.

    Args:
        sparsifiers: The Sparsifiers, at least one.

    Raises:
        ValueError: There are none, they belong to different models, or two of them prune the same layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> several = Sparsifiers([Sparsifier(model, 'row', layers='0'), Sparsifier(model, layers='2')])
        >>> for sparsifier, sparsity in zip(several, (0.5, 0.75)):
        ...     sparsifier.sparsify(sparsity)
        >>> several.sparsity, list(several.masks)
        (0.5833333333333334, ['0.weight', '2.weight'])
    """

    @checks_arguments
    def __init__(self, sparsifiers: Iterable[Sparsifier]):
        self._all = tuple(sparsifiers)
        if not self._all:
            raise ValueError("Sparsifiers: give at least one Sparsifier")
        if any(each.model is not self._all[0].model for each in self._all):
            raise ValueError("Sparsifiers: all of them must be Sparsifiers of the same model")
        check_apart("Sparsifiers", "Sparsifiers", self._all)

    def __getitem__(self, position: Any) -> Any:
        return self._all[position]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Sparsifier]:
        return iter(self._all)

    @property
    def model(self) -> nn.Module:
        """The model, without wrappers."""
        return self._all[0].model

    @property
    def layers(self) -> Layers:
        """Parameter name -> `Layer`: the record of the Sparsifier that prunes the layer, if any does."""
        return layers_of(self._all)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask of every selected layer, as of `Sparsifier`."""
        return {name: mask for each in self._all for name, mask in each.masks.items()}

    @property
    def all_masks(self) -> dict[str, Tensor]:
        """The same, with the biases and norm parameters that are masked with whole outputs."""
        masks: dict[str, Tensor] = {}
        for each in self._all:
            masks = merged(masks, each.all_masks)
        return masks

    @property
    def sparsity(self) -> float:
        """Measured sparsity: zeros over weights of all selected layers."""
        return sparsity_of(self._all)

    @property
    def level(self) -> float:
        """The sparsity that was last asked for, averaged over the weights of the selected layers."""
        return mean_level_of(self._all)

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set the pruned weights to zero, as `Sparsifier.apply_masks`.

        Args:
            model: A copy of the model to apply the masks to instead.
        """
        for each in self._all:
            each.apply_masks(model)

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, as `Sparsifier.mask_gradients`."""
        for each in self._all:
            each.mask_gradients()

    def mask_moments(self, optimizer: Any) -> None:
        """Set the optimizer's moments of pruned weights to zero, as `Sparsifier.mask_moments`.

        Args:
            optimizer: torch's or fastai's, or a wrapper that holds one.
        """
        for each in self._all:
            each.mask_moments(optimizer)

    def report(self) -> Report:
        """Count the zeros of each layer and of the whole model.

        Returns:
            One table of all.
        """
        reports = [each.report() for each in self._all]
        pruned = {row.name: row for report in reports for row in report.rows if not row.why_dense}
        counts = [(row.count.weights, row.count.zeros) for row in pruned.values()]
        what = {report.what for report in reports if report.what}
        return replace(
            reports[0],
            rows=tuple(pruned.get(row.name, row) for row in reports[0].rows),
            selected=Count(*(sum(column) for column in zip(*counts, strict=True))),
            joint={name: groups for report in reports for name, groups in report.joint.items()},
            what=what.pop() if len(what) == 1 else "group",
        )

    def __repr__(self) -> str:
        return f"Sparsifiers({', '.join(map(repr, self._all))})"


def check_apart(operation: str, what: str, sparsifiers: Sequence[Sparsifier], instead: str = "") -> None:
    """Check that no layer, and no bias or norm layer that is masked with one, is pruned by two Sparsifiers.

    Args:
        operation: What is checked, for the error.
        what: What the Sparsifiers belong to, in the plural, for the error.
        sparsifiers: Sparsifiers of one model.
        instead: What else can be done, for the error. Default nothing.

    Raises:
        ValueError: A layer is pruned by two of them.
    """
    seen: set[str] = set()
    for each in sparsifiers:
        waiting = {name for name, layer in each.layers.items() if layer.why_dense == FROZEN}
        own = {*each.all_masks, *waiting}
        if both := [name for name in own if name in seen]:
            raise ValueError(
                f"{operation}: two {what} both prune {in_short(sorted(both))}; give each of them its own layers with "
                f"layers= or exclude={instead}"
            )
        seen |= own


def sparsity_of(sparsifiers: Sequence[Sparsifier]) -> float:
    """The measured sparsity of the selected layers of several Sparsifiers."""
    if len(sparsifiers) == 1:
        return sparsifiers[0].sparsity
    for each in sparsifiers:
        _ = each.sparsity  # raises what was found in scores on a GPU
    return Count.of(*(layer.parameter for layer in selected(layers_of(sparsifiers)).values())).sparsity


def mean_level_of(sparsifiers: Sequence[Sparsifier]) -> float:
    """The sparsity that was last asked for, averaged over the weights of all selected layers."""
    return level_of(selected(layers_of(sparsifiers)).values())


def layers_of(sparsifiers: Iterable[Sparsifier]) -> Layers:
    """Parameter name -> `Layer`, in the order of the model: selected, if a Sparsifier prunes it."""
    layers: dict[str, Any] = {}
    for each in sparsifiers:
        for name, layer in each.layers.items():
            if name not in layers or layer.is_selected:
                layers[name] = layer
    return layers
