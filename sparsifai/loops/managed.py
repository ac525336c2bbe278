"""A model in sparse training: what a TrainingManager is made of, what is measured of it, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.norms import check_fused_norms
from ..model.parallel import unwrapped
from ..sparsifier.notices import LARGE_PART, notices_of_starved
from ..sparsifier.options import highest
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..sparsifier.sparsifiers import Sparsifiers, check_apart, sparsity_of
from ..support.arguments import checks_arguments
from ..support.checks import check_count
from ..support.table import percent
from ..support.warning import warn
from .kept_zeros import KeptZeros
from .making import check_parts, check_steps, gradual_of
from .parts import Acting, Distil, Keep, Part, Sparsify
from .quantize_part import Quantizing


class ManagedTraining:
    """A model, its optimizer, the parts of its training, and how far it has come. TrainingManager says more."""

    @checks_arguments
    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *parts: Part,
        epochs: int,
        steps_per_epoch: int,
        steps: int | None = None,
        loss_func: Callable | None = None,
        example_input: Any = None,
        state: Mapping[str, Any] | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"TrainingManager: model must be a torch.nn.Module, not {type(model).__name__}")
        self.epochs = check_count("TrainingManager: epochs", epochs)
        self.steps_per_epoch = check_count("TrainingManager: steps_per_epoch", steps_per_epoch)
        whole = self.epochs * self.steps_per_epoch
        self.steps = whole if steps is None else check_count("TrainingManager: steps", steps, whole)
        check_parts(parts)
        check_steps(model, optimizer)
        check_fused_norms(model)
        self.model, self.optimizer, self.steps_done = model, optimizer, 0
        self._is_prepared = self._has_loss = self._is_closed = self._has_begun = False
        prunings = [part.pruning for part in parts if isinstance(part, Sparsify)]
        self._gradual = [gradual_of(pruning, model, optimizer, loss_func, example_input) for pruning in prunings]
        check_apart("TrainingManager", "Sparsify parts", self.sparsifiers)
        # The loss of the labels has a smaller share beside a teacher, a penalty has not.
        ordered = sorted(parts, key=lambda part: not isinstance(part, Distil))
        acting = (part.acting(model, optimizer, loss_func, example_input) for part in ordered)
        self._acting: list[Acting] = [each for each in acting if each is not None]
        self._zeros = KeptZeros(model, optimizer, self._gradual)
        if state is not None:
            self.load_state_dict(state)
            return
        if any(isinstance(part, Keep) for part in parts) or any(highest(each.ramp.sparsity) for each in prunings):
            self._zeros.recover(example_input)
        elif not prunings and (sparsity := self.sparsity) > LARGE_PART:
            warn(
                f"TrainingManager: {percent(sparsity)} of the weights are zero, and this training does not keep them "
                "so; add Keep() to keep them"
            )
        for each in self._gradual:
            each.go_to(0.0)
        self._zeros.enforce()
        self.prepare()

    @property
    def sparsifiers(self) -> list[Sparsifier]:
        """The Sparsifiers of the model, one for each `Sparsify` part."""
        return [each.sparsifier for each in self._gradual]

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done >= self.steps

    @property
    def has_reached_target(self) -> bool:
        """Whether the masks stay as they are until the end, and rounding for int8, if asked for, has begun.

        A best model should be looked for from here on only.
        """
        return self._has_final_masks and all(each.is_final for each in self._acting)

    @property
    def _has_final_masks(self) -> bool:
        return all(each.is_final(self.steps_done, self.steps) for each in self._gradual)

    def prepare(self) -> None:
        """Put on the model what its next forward needs: call it to go on after `release`. A step does it, too."""
        if self.is_done:
            self._close()
        elif not self._is_closed:
            for each in self._acting:
                each.before_forward(self.steps_done / self.steps)

    def _close(self) -> None:
        for each in self._acting:
            each.end()
        if not self._is_closed:
            self._is_closed = True
            for sparsifier in self.sparsifiers:
                for notice in notices_of_starved(sparsifier.layers, sparsifier.ranking.options.context):
                    warn(notice)
            for each in self._acting:
                each.warn_at_the_end()

    @contextmanager
    def fake_quantized(self) -> Iterator[None]:
        """Have the model round as in training with `Quantize`, in evaluation mode, too, inside a `with` block.

        Raises:
            ValueError: There is no `Quantize` part, or no step was trained with rounding yet.
        """
        quantizing = next((each for each in self._acting if isinstance(each, Quantizing)), None)
        if quantizing is None:
            raise ValueError("fake_quantized: the manager has no Quantize part; pass one when you make it")
        with quantizing.fake_quantized():
            yield

    # --- What is measured, and the state ------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of everything that is kept at zero, False where it is."""
        return dict(self._zeros.masks)

    @property
    def sparsity(self) -> float:
        """Measured sparsity: zeros over weights of the layers that are pruned or kept sparse."""
        return sparsity_of(self.sparsifiers) if self._gradual else self.report().selected.sparsity

    def report(self) -> Report:
        """Count the zeros of each layer and of the whole model.

        Returns:
            A table; its `plot` draws it.
        """
        if self._gradual:
            return Sparsifiers(self.sparsifiers).report()
        return Report.of(unwrapped(self.model), self.masks or None)

    def state_dict(self) -> dict[str, Any]:
        """Collect what another manager of the same model and parts needs to resume exactly.

        Save it beside the states of the model and the optimizer, after a step.

        Returns:
            The position, masks, dense weights, collected quantities and random states; for torch.save.
        """
        return {
            "steps_done": self.steps_done,
            "steps": self.steps,
            "sparsifiers": [each.state() for each in self._gradual],
            "parts": [(each.name, each.state()) for each in self._acting],
            "others": {name: mask.clone() for name, mask in self._zeros.others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned. Load the states of the model and the optimizer, too.

        Make the manager before you load the states of the model and the optimizer, or pass the state to it when you
        make it: else it could prune the model that was loaded.

        Args:
            state: What `state_dict` returned, of a manager with the same parts, epochs and steps.

        Raises:
            ValueError: It is no such state, or it is that of other parts or another number of steps.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise ValueError("load_state_dict: give what TrainingManager.state_dict() returned")
        if (own := _made_of(self.state_dict())) != (its := _made_of(state)):
            raise ValueError(
                f"load_state_dict: the state is of {its}, and this manager of {own}; make it with the same arguments"
            )
        check_count("load_state_dict: steps_done + 1", state["steps_done"] + 1, self.steps + 1)
        for each, of_each in zip(self._gradual, state["sparsifiers"], strict=True):
            each.load(of_each)
        for acting, (_, of_part) in zip(self._acting, state["parts"], strict=True):
            acting.load(of_part)
        self._zeros.keep(dict(state["others"]))
        self._zeros.apply()
        self.steps_done = state["steps_done"]
        self._is_prepared, self._has_loss, self._is_closed = False, False, False
        self._has_begun = True  # what there is to warn of was said when the training began
        self.prepare()


def _made_of(state: Mapping[str, Any]) -> str:
    """What a state is a state of."""
    names = [name for name, _ in state["parts"]]
    return f"{state['steps']} steps, {len(state['sparsifiers'])} Sparsify parts and {names}"
