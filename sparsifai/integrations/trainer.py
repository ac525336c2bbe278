"""Sparse training by transformers' Trainer: a TrainerCallback.

    Trainer(model, arguments, train_dataset=data, callbacks=[SparsifyCallback(0.9, context="erk")])

Trainer has no event between the backward pass and the clipping of gradients. So, for each forward of training, a hook
is put on the model, which removes itself. It has the gradients masked when the backward pass ends, and adds penalties
and a teacher to the loss that the model has computed. The step of the optimizer is replaced for one step only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..gradual.gradual_pruning import GradualPruning
from ..loops.quantize_part import Quantize
from ..model.parallel import unwrapped
from ..sparsifier.masking import is_masked_zero, masked_parameters
from ..support.arguments import checks_arguments
from ..support.files import write_whole
from ..support.warning import warn
from .given import Given, Reporting
from .replaced_step import ReplacedStep
from .scaled import AcceleratedManager, call_after_backward, trained

# The file of a checkpoint with the state of this callback.
STATE = "sparsify_callback.pt"


class SparsifyCallback(Reporting, TrainerCallback):
    """Make the model of a Trainer sparse while it trains.

    The logs have the measured `sparsity`, beside the loss, and `eval_sparsity` after an evaluation. Zeros hold at every
    forward, evaluation and checkpoint, and after the last step the sparsity is exactly the one that was asked for.
    A checkpoint has the file `sparsify_callback.pt`, from which `resume_from_checkpoint` resumes exactly. The choice of
    the best model and EarlyStoppingCallback ignore evaluations before the masks have their final form.

    Args:
        sparsity: A Recipe, a part of a TrainingManager or a list of parts, or the sparsity.
        *arguments: With a sparsity, the further arguments of sparsifai's SparsifyCallback.
        teacher: A trained model for a recipe with a distil step. Default None.
        loss_func: For criteria that need gradients of the batches of `calibration=`, a function of (output, batch).
            Default: the loss that the model has computed.
        example_input: A batch, for models that torch.fx cannot trace. Default None.
        resume_from: The folder of the checkpoint to resume from, if it is not in the `output_dir` of the Trainer.
            Default None.
        **options: With a sparsity, the further arguments of sparsifai's SparsifyCallback by name; with a recipe,
            `calibration`, the batches for its criteria.

    Attributes:
        manager: The TrainingManager of the present training, or of the last one; None before.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is unknown or out of range, or arguments exclude each other. When a training begins:
            they do not fit the model, or the recipe has another number of epochs.

    Example:
        >>> from sparsifai.integrations.trainer import SparsifyCallback
        >>> callback = SparsifyCallback(0.75)
        >>> trainer = Trainer(bert, arguments, train_dataset=data, callbacks=[callback])
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
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
        resume_from: str | os.PathLike | None = None,
        **options: Any,
    ):
        given = (sparsity, arguments, options, teacher, loss_func or _loss_of, example_input)
        if not hasattr(TrainerCallback, "on_pre_optimizer_step"):
            raise ImportError("SparsifyCallback needs a newer transformers, with TrainerCallback.on_pre_optimizer_step")
        self._given = Given.of("SparsifyCallback", *given)
        self._resume_from = resume_from
        self._has_compared = False  # whether an evaluation with the final masks was compared
        self._model: Any = None
        self._optimizer: Any = None
        self._hook: Any = None  # that of the next forward
        self._step: Any = None  # the ReplacedStep of the last step

    # --- Events of the Trainer ----------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **rest):
        """Make the manager; with a checkpoint, load its state."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise TypeError(
                "SparsifyCallback: the Trainer has no optimizer that accelerate has prepared, but "
                f"{type(optimizer).__name__}, as with DeepSpeed; train without it, or use a loop of your own with "
                "TrainingManager"
            )
        if getattr(args, "torch_compile", False) and any(isinstance(part, Quantize) for part in self._given.parts):
            raise ValueError(
                "SparsifyCallback: a compiled model does not run what Quantize puts around its layers; leave out "
                "torch_compile=True"
            )
        self.close()  # what an interrupted training has left
        epochs = args.num_train_epochs if args.max_steps <= 0 else None
        self._given.check_epochs("SparsifyCallback", epochs)
        number = max(1, state.num_train_epochs)
        numbers = {"epochs": number, "steps_per_epoch": -(-state.max_steps // number), "steps": state.max_steps}
        owner = getattr(optimizer, "_sparsified_by", None)
        if owner is not None:
            raise ValueError(
                "two SparsifyCallbacks in one Trainer would undo each other; use one with several parts, or remove the "
                "other with trainer.remove_callback(...), after its close() if its training was interrupted"
            )
        saved = self._saved(args, state, model) if state.global_step else {"manager": None}
        given = {**numbers, "state": saved["manager"]}
        self.manager = self._given.manager(AcceleratedManager, model, optimizer, **given)
        self._model, self._optimizer, self._has_compared = model, optimizer, bool(saved.get("has_compared"))
        optimizer._sparsified_by = self

    def on_step_begin(self, args, state, control, **rest):
        """Prepare and hook the next forward of training."""
        self.manager.prepare()
        self._hook_forward()

    def on_substep_end(self, args, state, control, **rest):
        """Hook the next forward of training."""
        self._hook_forward()

    def on_pre_optimizer_step(self, args, state, control, **rest):
        """Put masks and dense weights around the next step of the optimizer."""
        self._step = ReplacedStep(self._optimizer, self.manager, once=True)
        self._step.begin()

    def on_step_end(self, args, state, control, **rest):
        """Leave no hook on the model that may be evaluated and saved now."""
        self.manager.release()

    def on_log(self, args, state, control, logs=None, **rest):
        """Add the measured sparsity to the logs; forget the best metric of models that are not sparse yet."""
        if self.manager is None or logs is None:
            return
        is_evaluation = any(name.startswith("eval_") for name in logs)
        name = "eval_sparsity" if is_evaluation else "sparsity"
        logs[name] = self.manager.sparsity
        if state.log_history:
            state.log_history[-1][name] = logs[name]
        if self._optimizer is not None and not self._has_compared:
            # An evaluation is logged before anyone compares it, and the last log comes before the best model is loaded.
            state.best_metric = state.best_model_checkpoint = None
            if hasattr(state, "best_global_step"):
                state.best_global_step = None
            self._has_compared = is_evaluation and self.manager.has_reached_target
            if "train_loss" in logs and args.load_best_model_at_end:
                warn(
                    "SparsifyCallback: no evaluation came after the masks had their final form, so the last model is "
                    "kept instead of the best one; evaluate more often, or end the schedule earlier"
                )

    def on_save(self, args, state, control, **rest):
        """Save the state of the manager in the checkpoint."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and not args.save_only_model and os.path.isdir(folder):
            saved = {"manager": self.manager.state_dict(), "has_compared": self._has_compared}
            saved["masks"] = self.manager.masks
            write_whole(os.path.join(folder, STATE), lambda file: torch.save(saved, file))

    def on_train_end(self, args, state, control, **rest):
        """End the training exactly."""
        self.manager.finish()
        self.close()

    def close(self) -> None:
        """Leave nothing on the model and the optimizer. The next training calls it after one that was interrupted."""
        if self._optimizer is not None:
            self._unhook()
            if self._step is not None:
                self._step.end()
            del self._optimizer._sparsified_by
            self._optimizer, self._model = None, None
            self.manager.release()

    # --- A forward of training, and a checkpoint ----------------------------------------------------------------

    def _hook_forward(self) -> None:
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
            self._unhook()
            return self._after_forward(inputs, named, output) if trained(module) else None

        self._unhook()
        # It is called, and removes itself, also if the forward fails.
        self._hook = unwrapped(self._model).register_forward_hook(hook, with_kwargs=True, always_call=True)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_forward(self, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
        """Add to the loss of the model; and have the gradients masked, if a step follows the backward."""
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor) and loss.requires_grad:
            share = _share_of(named)
            given = {name: each for name, each in named.items() if name not in ("labels", "num_items_in_batch")}
            mean = loss / share
            added = self.manager.loss(mean, output, given or inputs)
            if added is not mean:
                changed = {**output, "loss": added * share}
                output = type(output)(**changed) if isinstance(output, ModelOutput) else changed
        if self._optimizer.gradient_state.sync_gradients:
            call_after_backward(output, self.manager.before_step)
        return output

    def _saved(self, args: Any, state: Any, model: nn.Module) -> dict[str, Any]:
        """What the checkpoint has, from which the model was loaded."""
        folders = [self._resume_from, args.resume_from_checkpoint]
        folders += [os.path.join(args.output_dir, f"checkpoint-{state.global_step}")]
        paths = [os.path.join(each, STATE) for each in folders if isinstance(each, (str, os.PathLike))]
        path = next((each for each in paths if os.path.isfile(each)), None)
        if path is None:
            raise ValueError(
                f"SparsifyCallback: the training resumes at step {state.global_step}, but there is no {paths[-1]}; "
                "pass resume_from=, the folder of the checkpoint"
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["manager"]["steps_done"] != state.global_step or not _has_zeros(model, saved["masks"]):
            raise ValueError(
                f"SparsifyCallback: {path} is that of another training, because it is of step "
                f"{saved['manager']['steps_done']}, or the model has no zeros where it says so; pass resume_from=, the "
                "folder of the checkpoint that is resumed"
            )
        return saved


def _has_zeros(model: nn.Module, masks: Any) -> bool:
    """Whether a model is zero where it is masked."""
    return is_masked_zero(masked_parameters(unwrapped(model), dict(masks)))


def _share_of(named: Mapping[str, Any]) -> Any:
    """The part that a batch has in the loss of a step: Trainer may divide by the labels of several batches."""
    labels, number = named.get("labels"), named.get("num_items_in_batch")
    return 1.0 if number is None or labels is None else labels.ne(-100).sum().clamp(min=1) / number


def _loss_of(output: Any, batch: Any) -> Tensor:
    """The loss that the model has computed, of a batch with labels."""
    return output["loss"]
