"""The events of Lightning's Trainer, for its two packages, `lightning` and `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..gradual.gradual_pruning import GradualPruning
from ..loops.manager import TrainingManager
from ..support.arguments import checks_arguments
from ..support.warning import warn
from .given import Given, Reporting
from .replaced_step import ReplacedStep


class LightningEvents(Reporting):
    """Make the model of a Lightning Trainer sparse while it trains.

    The logs have the measured `sparsity` in training and `val_sparsity` after a validation. Zeros hold at every
    forward, validation and checkpoint, and after the last step the sparsity is exactly the one that was asked for.
    A checkpoint has the state of this callback, so `trainer.fit(..., ckpt_path=...)` resumes exactly. ModelCheckpoint
    forgets the best models, and EarlyStopping the best score, of epochs before the masks have their final form.

    Args:
        sparsity: A Recipe, a part of a TrainingManager or a list of parts, or the sparsity.
        *arguments: With a sparsity, the further arguments of sparsifai's SparsifyCallback.
        teacher: A trained model for a recipe with a distil step. Default None.
        loss_func: A loss for criteria that need gradients of the batches of `calibration=`. Default None.
        example_input: A batch, for models that torch.fx cannot trace. Default None.
        **options: With a sparsity, the further arguments of sparsifai's SparsifyCallback by name; with a recipe,
            `calibration`, the batches for its criteria. Names of layers are those of the LightningModule, such as
            'model.0'.

    Attributes:
        manager: The TrainingManager of the present training, or of the last one; None before.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or arguments exclude each other. When a training begins:
            they do not fit the model, the recipe has another number of epochs, the number of steps is not known, or
            the module has several optimizers.

    Example:
        >>> from sparsifai.integrations.lightning import SparsifyCallback
        >>> callback = SparsifyCallback(0.75)
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[callback], **quiet)
        >>> trainer.fit(Module(), loader)
        >>> callback.manager.sparsity
        0.75
    """

    @checks_arguments(of=GradualPruning.of)
    def __init__(
        self,
        sparsity: Any,
        *arguments: Any,
        teacher: nn.Module | None = None,
        loss_func: Any = None,
        example_input: Any = None,
        **options: Any,
    ):
        given = (sparsity, arguments, options, teacher, loss_func, example_input)
        self._given = Given.of("SparsifyCallback", *given)
        self._step: Any = None  # the ReplacedStep of the optimizer, in a training
        self._loaded: Any = None  # what a checkpoint has, until the training begins
        self._has_compared = False  # whether best models and scores are those of the final masks
        self._thresholds: list[tuple[Any, Any]] = []  # EarlyStopping callbacks, and their thresholds

    def loss(self, loss: Tensor, output: Any, inputs: Any) -> Tensor:
        """Add penalties and the loss of a teacher, in `training_step`: return callback.loss(loss, output, inputs).

        Args:
            loss: The loss of the labels.
            output: The output of the model.
            inputs: The inputs of the model: a tensor, a tuple of arguments or a dictionary of keywords.

        Returns:
            The loss to return from `training_step`. Outside of a training, `loss` itself.
        """
        return loss if self._step is None else self.manager.loss(loss, output, inputs)

    # --- Events -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the manager; with a checkpoint, load its state."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"SparsifyCallback: the module has {len(trainer.optimizers)} optimizers, and it cannot know which of "
                "them counts the steps; use manual loops with a TrainingManager for each, or one optimizer"
            )
        steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
        if steps in (float("inf"), -1):
            raise ValueError("SparsifyCallback: the training has no end; pass max_epochs= or max_steps= to the Trainer")
        self._given.check_epochs(
            "SparsifyCallback", epochs if epochs and epochs > 0 and trainer.max_steps < 0 else None
        )
        number = epochs if epochs and epochs > 0 else 1
        numbers = {"epochs": number, "steps_per_epoch": -(-int(steps) // number), "steps": int(steps)}
        optimizer = trainer.optimizers[0]
        loaded, self._loaded = self._loaded or {"manager": None, "has_compared": False}, None
        given = {**numbers, "state": loaded["manager"]}
        self.manager = self._given.manager(TrainingManager, trainer.strategy.model, optimizer, **given)
        self._has_compared = loaded["has_compared"]
        if self.manager.steps_done != trainer.global_step:
            raise ValueError(
                f"SparsifyCallback: the training resumes at step {trainer.global_step} from a checkpoint without a "
                f"SparsifyCallback, or with one at step {self.manager.steps_done}; resume from one that has it"
            )
        self._step = ReplacedStep(optimizer, self.manager)
        self._step.begin()
        self._hold_back(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prepare the forward."""
        if self._step is not None:
            self.manager.prepare()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Collect and mask the gradients, which are unscaled and not clipped yet."""
        if self._step is not None:
            self.manager.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **named: Any) -> None:
        """Log the measured sparsity; note when the masks have their final form; leave no hook on the model."""
        self.manager.release()
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("sparsity", self.manager.sparsity, on_step=True, on_epoch=False)
        self._compare(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep EarlyStopping from comparing with a model that is not sparse yet."""
        self._hold_back(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep EarlyStopping from comparing with a model that is not sparse yet."""
        if self._step is not None:
            self._hold_back(trainer)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the measured sparsity."""
        if self._step is not None:
            pl_module.log("val_sparsity", self.manager.sparsity)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the training exactly."""
        if self._step is None:
            return
        if not self._has_compared:
            self._forget(trainer)
        self._end()
        self.manager.finish()
        if any(_is_checkpoint(each) and not each.best_model_path for each in trainer.callbacks):
            warn(
                "SparsifyCallback: no validation came after the masks had their final form, so ModelCheckpoint has no "
                "best model; validate more often, or end the schedule earlier"
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing on the model and the optimizer."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing on the model and the optimizer."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of this callback."""
        if self.manager is None:
            return {}
        return {"manager": self.manager.state_dict(), "has_compared": self._has_compared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint has, until the training begins.

        Args:
            state: What `state_dict` has returned.
        """
        self._loaded = state or None

    # --- Best models, and the end -------------------------------------------------------------------------------

    def _hold_back(self, trainer: Any) -> None:
        """EarlyStopping begins anew, as long as the masks change."""
        for each in trainer.callbacks:
            if _stops_early(each) and not self._has_compared:
                each.wait_count, each.best_score = 0, each.best_score.new_tensor(float("inf")) * _sign(each)
                if getattr(each, "stopping_threshold", None) is not None:
                    self._thresholds.append((each, each.stopping_threshold))
                    each.stopping_threshold = None
        self._compare(trainer)

    def _compare(self, trainer: Any) -> None:
        """Begin to compare models, once the masks have their final form."""
        if not self._has_compared and self.manager.has_reached_target and self._step is not None:
            self._has_compared = True
            self._forget(trainer)

    def _forget(self, trainer: Any) -> None:
        """Forget the best models and scores of models that were not sparse yet."""
        self._restore_thresholds()
        for each in trainer.callbacks:
            if _is_checkpoint(each):
                each.best_k_models, each.kth_best_model_path, each.best_model_path = {}, "", ""
                each.best_model_score = each.current_score = None
                worst = float("inf" if each.mode == "min" else "-inf")
                each.kth_value = each.kth_value.new_tensor(worst) if isinstance(each.kth_value, Tensor) else worst
            elif _stops_early(each):
                each.wait_count, each.best_score = 0, each.best_score.new_tensor(float("inf")) * _sign(each)

    def _restore_thresholds(self) -> None:
        while self._thresholds:
            callback, threshold = self._thresholds.pop()
            callback.stopping_threshold = threshold

    def _end(self) -> None:
        if self._step is not None:
            self._step.end()
            self._step = None
            self.manager.release()
        self._restore_thresholds()


def _is_checkpoint(callback: Any) -> bool:
    """Whether a callback is a ModelCheckpoint that chooses by a metric."""
    return hasattr(callback, "best_k_models") and getattr(callback, "monitor", None) is not None


def _stops_early(callback: Any) -> bool:
    return hasattr(callback, "wait_count") and isinstance(getattr(callback, "best_score", None), Tensor)


def _sign(callback: Any) -> int:
    return 1 if callback.mode == "min" else -1
