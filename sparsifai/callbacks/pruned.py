"""What SparsifyCallback has pruned in its fits so far, and the zeros of others that it never revives."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..gradual.gradual_sparsifier import adopted
from ..model.parallel import process_group_of, unwrapped
from ..sparsifier.model_masks import merged, prunes
from ..sparsifier.notices import notices_of_starved
from ..sparsifier.sparsifier import Sparsifier
from .display import notify
from .keep import KeepSparsity


@dataclass(eq=False)
class Pruned:
    """The Sparsifier of a SparsifyCallback. It lasts over fits, as long as its zeros are kept in between.

    Attributes:
        sparsifier: The Sparsifier of the model.
        reached: The level that was last asked for, as a fraction of the target sparsity.
        others: Parameter name -> mask of the zeros that the Sparsifier did not prune itself, such as those of earlier
            fits. They are never revived.
        layers: Names of the layers that were ranked at the last mask update.
        is_resumed: Whether its state was loaded, until a fit begins with it.
    """

    sparsifier: Sparsifier
    reached: float = 0.0
    others: dict[str, Tensor] = field(default_factory=dict)
    layers: set[str] = field(init=False)
    is_resumed: bool = False

    def __post_init__(self) -> None:
        self.layers = set(self.sparsifier.masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask of everything that is to be kept at zero."""
        return merged(self.sparsifier.all_masks, self.others)

    def tell_of_starved(self, learn: Any) -> None:
        """Tell the user of layers in which hardly any weights are left."""
        for notice in notices_of_starved(self.sparsifier.layers, self.sparsifier.ranking.options.context):
            notify(learn, notice, matters=True)

    def is_kept_on(self, learn: Any) -> bool:
        """Whether the Sparsifier belongs to the model of this Learner, and its zeros were kept since the last fit."""
        is_its_model = self.sparsifier.model is unwrapped(learn.model)
        return is_its_model and any(prunes(each.masks, self.sparsifier.masks) for each in learn._grab_cbs(KeepSparsity))

    def take_in(self, kept: Mapping[str, Tensor], learn: Any, apart: Container[str] = ()) -> None:
        """Count the zeros that are kept on a Learner as pruned. With regrow=, those that it can regrow become its own.

        Args:
            kept: Parameter name -> mask of these zeros.
            learn: The Learner.
            apart: Names of what other SparsifyCallbacks of the fit prune, whose zeros are theirs. Default none.
        """
        sparsifier = self.sparsifier
        kept = {name: mask for name, mask in kept.items() if name not in apart}
        self.others = {name: mask for name, mask in self.others.items() if name not in apart}
        sparsifier.apply_masks()  # this also moves its masks to where the model is
        own = sparsifier.all_masks
        others = {name: mask | ~own[name].to(mask.device) if name in own else mask for name, mask in kept.items()}
        self.others = merged(self.others, {name: mask for name, mask in others.items() if not mask.all()})
        sparsifier.ranking = replace(sparsifier.ranking, process_group=process_group_of(learn.model))
        sparsifier.all_masks.add(self.others)
        if sparsifier.ranking.options.regrow is not None:
            regrowing = adopted(sparsifier, self.others)
            self.others = {name: mask for name, mask in self.others.items() if name not in regrowing}
