"""Recipes: a sparse training run in one YAML file, whose steps and options have the names of the API.

    epochs: 20
    variables:
      target: 0.9
    steps:
      - sparsify: {sparsity: "${target}", granularity: weight, schedule: agp, start: 2, end: 75%}
      - distil: {weight: 0.5, temperature: 4}

The options of a step are the arguments of the callback of that name. `start` and `end` are epochs, or shares of
training such as 75%; by default a step lasts all of training. A value may be an arithmetic expression of the
variables, in `${...}`. A name of an axis with options is a mapping, such as `schedule: {iterative: 5}`.

A recipe of several parts, one after the other, has `stages` instead of steps. Each has steps and epochs of its own, or
`training: false`, if it is applied at once:

    stages:
      - {name: prune, training: false, steps: [sparsify: {sparsity: 0.5, context: 2:4, criteria: wanda}]}
      - {name: finetune, epochs: 3, steps: [keep]}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from ..gradual.gradual_pruning import GradualPruning
from ..gradual.plan_table import Plan, joined
from ..model.parallel import unwrapped
from ..quantization.layers import planned
from ..sparsifier.sparsifier import Sparsifier
from ..sparsifier.sparsifiers import Sparsifiers
from ..support.arguments import checks_arguments
from ..support.files import write_text
from ..support.foreign_names import ForeignAttributes
from ..support.warning import warn
from .in_loops import RunsInLoops
from .reading import Reading
from .results import results_of
from .safe_yaml import Located, dump_yaml, load_yaml, read_text
from .sparseml.converted import converted
from .sparseml.modifiers import Notice
from .step import Step
from .uses import check_one_part

# What to do instead of `apply`, of a step that needs training.
_FIT = "pass recipe.callbacks() to learn.fit instead"
_INSTEAD_OF_APPLY = {
    "quantize": f"{_FIT}, or leave the step out and call quantize(model, calibration, path) after recipe.apply"
}


class Recipe(RunsInLoops, ForeignAttributes):
    """A sparse training run, described by a file. Printed, it is the text of the file.

    Attributes:
        epochs: Number of epochs, or None if the recipe does not give it.
        variables: Name of a variable -> number.
        steps: The steps, a tuple of `Step`; none for a recipe with stages.
        training: Whether the recipe is for a fit; False if it is applied at once, without training.

    Args:
        content: The recipe as a dictionary, with the keys of a file.
        notices: For a converted recipe: what has no counterpart, with its line. Default none.
        source: The content with the lines of its file, for errors. By default every error names line 1.

    Raises:
        ValueError: The recipe is not valid. The message names the line, the key and what was expected.

    Example:
        >>> recipe = Recipe({'epochs': 10, 'steps': [{'sparsify': {'sparsity': 0.9, 'end': 5}}]})
        >>> recipe.steps[0].options['sparsity']
        0.9
    """

    def __init__(self, content: Mapping[str, Any], notices: Iterable[Notice] = (), *, source: Located | None = None):
        self.content, self.notices = deepcopy(dict(content)), tuple(notices)
        self._reading = Reading(self.content, source)
        self.variables = self._reading.variables
        self.epochs = self._reading.epochs
        self.steps = self._reading.steps
        self.training = self._reading.training

    @property
    def stages(self) -> tuple[Recipe, ...]:
        """The parts of the recipe, each a recipe, to be applied or fitted one after the other; else itself alone.

        Example:
            for stage in recipe.stages:
                if stage.training:
                    learn.fit(stage.epochs, cbs=stage.callbacks())
                else:
                    stage.apply(learn.model, calibration, loss_func)
        """
        return tuple(Recipe(stage.whole_content, source=stage.source) for stage in self._reading.stages) or (self,)

    # --- Files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe from a YAML file. No code in it is run.

        Args:
            path: The file.

        Returns:
            The recipe.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not a valid recipe. The message names the line.
        """
        return cls.loads(read_text(path))

    @classmethod
    def loads(cls, text: str) -> Recipe:
        """Read a recipe from a string of YAML. No code in it is run.

        Args:
            text: The YAML, up to 250,000 characters.

        Returns:
            The recipe.

        Raises:
            ValueError: It is not a valid recipe. The message names the line.

        Example:
            >>> Recipe.loads("epochs: 5\\nsteps: [keep]").epochs
            5
        """
        try:
            source = load_yaml(text)
            if not isinstance(source.value, dict):
                raise ValueError("line 1: a recipe must be a mapping with epochs: and steps:")
            return cls(source.value, source=source)
        except ValueError as error:
            if "Modifier" not in text:
                raise
            raise ValueError(
                f"{error}; convert a recipe of SparseML by Recipe.from_sparseml(path) or `sparsifai convert`"
            ) from None

    @classmethod
    def from_sparseml(cls, path: str | os.PathLike, *, strict: bool = False, epochs: int | None = None) -> Recipe:
        """Convert a recipe of SparseML or llm-compressor. No code in it is run.

        What has no counterpart here is left out and listed in `notices`, with its line. A warning says if something
        that changes the model is lost.

        Args:
            path: The file, YAML or Markdown that begins with YAML.
            strict: Whether it is an error if something that changes the model has no counterpart. Default False.
            epochs: The number of epochs, for a recipe or stages that do not give it. Default None.

        Returns:
            The recipe. Its `notices` say what has no counterpart. A recipe of several stages has `stages`.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not a recipe of SparseML, nothing in it can be converted, nothing is left of its pruning,
                or `strict` forbids a loss.
        """
        return cls(*converted(path, strict, epochs))

    def dumps(self) -> str:
        """Write the recipe as YAML.

        Returns:
            The text.
        """
        return dump_yaml(self.content)

    def save(self, path: str | os.PathLike) -> None:
        """Write the recipe to a YAML file. Comments of a file that it was read from are not written.

        Args:
            path: The file. An existing one is replaced at once.
        """
        write_text(path, self.dumps())

    __str__ = __repr__ = dumps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]

    # --- Use ----------------------------------------------------------------------------------------------------

    def callbacks(self, teacher: Any = None, calibration: Any = None) -> list:
        """Make the callbacks for `learn.fit(recipe.epochs, cbs=recipe.callbacks())`, one per step.

        Args:
            teacher: A trained model or its Learner, for a distil step. Default None.
            calibration: Batches for criteria that need inputs or a loss, and for `compensate`, as of
                SparsifyCallback. Default None, for the batch that is being trained on.

        Returns:
            The callbacks, in the order of the steps.

        Raises:
            ValueError: The recipe has a distil step and no teacher is given, or a callback refuses its arguments.
        """
        return _for_epochs(self.epochs, self._made("callbacks", _callback_classes(), teacher, calibration))

    @checks_arguments
    def apply(
        self,
        model: nn.Module,
        calibration: Iterable | None = None,
        loss_func: Callable | None = None,
        example_input: Any = None,
    ) -> Sparsifier | Sparsifiers:
        """Prune a model to the final sparsity of the recipe at once, without training.

        A quantize step of a recipe with `training: false` is left to `quantize`, with a warning.

        Args:
            model: Any torch model; its weights are changed.
            calibration: Batches for criteria that need data, as in `Sparsifier.calibrate`. Default None.
            loss_func: A loss for criteria that need gradients, as in `Sparsifier.calibrate`. Default None.
            example_input: A batch, for models that torch.fx cannot trace and for `coupled: true`. Default None.

        Returns:
            The Sparsifier of the model; of several sparsify steps, their `Sparsifiers`.

        Raises:
            ValueError: The recipe has a step that needs training, or no sparsify step, two of them prune the same
                layer, or a criterion needs data.

        """
        check_one_part(self._reading, "apply")
        _check_applicable(self)
        made = []
        for step, pruning in self._prunings():
            with self._at(step):
                made.append((pruning, pruning.sparsifier(model, example_input)))
                if calibration is None and made[-1][1].looks_at_data:
                    raise ValueError("the step needs batches; pass calibration=, and loss_func= if it needs gradients")
        sparsifier = made[0][1] if len(made) == 1 else Sparsifiers(each for _, each in made)
        for pruning, each in made:
            if calibration is not None:
                each.calibrate(calibration, loss_func)
            each.sparsify(pruning.final_sparsity)
        return sparsifier

    def plan(self, model: nn.Module, n_iter: int = 100, example_input: Any = None) -> Plan:
        """Show what this recipe would do to a model, by layer and epoch, without data or training.

        Of a recipe with stages, plan each: `[stage.plan(model) for stage in recipe.stages]`.

        Args:
            model: Any torch model; it is not changed.
            n_iter: Number of batches in an epoch. Default 100.
            example_input: A batch, to count FLOPs, and for models that torch.fx cannot trace. Default None.

        Returns:
            The plan; print it for a table.

        Raises:
            ValueError: The recipe has no sparsify step, or it does not fit the model.
        """
        check_one_part(self._reading, "plan")
        plans = []
        for step, pruning in self._prunings():
            with self._at(step):
                if self.training:
                    plans.append(pruning.plan(model, self.epochs or 1, n_iter, example_input))
                else:
                    plans.append(pruning.plan_at_once(model, example_input))
        plan = joined(plans)
        return replace(plan, notes=(*plan.notes, *_notes_on_int8(self, model)))

    def recorded(self, learn: Any, sparsifier: Sparsifier | None = None) -> Recipe:
        """Add the results of a fit: measured sparsity of the model and of each layer, metrics, versions.

        Args:
            learn: A Learner after its fit. Metrics are computed on its validation data.
            sparsifier: The Sparsifier of the fit, whose selected layers are listed. Default: the layers that a
                KeepSparsity of the Learner keeps sparse; without one, all weights with named axes.

        Returns:
            A new recipe, with the key `results`.
        """
        return Recipe({**self.content, "results": results_of(learn, sparsifier)}, self.notices)

    def _prunings(self) -> list[tuple[Step, GradualPruning]]:
        """The sparsify steps, and what each prunes, and when."""
        steps = [step for step in self.steps if step.kind == "sparsify"]
        if not steps:
            raise ValueError("the recipe has no sparsify step; add one, such as - sparsify: {sparsity: 0.9}")
        prunings = []
        for step in steps:
            with self._at(step):
                prunings.append((step, GradualPruning.of(**self._reading.arguments(step))))
        return prunings

    def _at(self, step: Step) -> AbstractContextManager[None]:
        """Errors of the block name the line of a step."""
        return self._reading.source.at("steps", step.position, step.kind)


def _check_applicable(recipe: Recipe) -> None:
    """Refuse steps that need training, and say what is left to be done for those that `apply` does not do."""
    kinds = {step.kind for step in recipe.steps}
    for step in recipe.steps:
        with recipe._at(step):
            if step.kind == "quantize" and not recipe.training:
                call = ", ".join(
                    ["model, calibration, path", *(f"{key}={each!r}" for key, each in step.options.items())]
                )
                if "sparsify" not in kinds:
                    raise ValueError(f"this stage only quantizes; call quantize({call}) instead of apply")
                warn(f"apply prunes and does not quantize; call quantize({call}) after it")
            elif step.kind not in ("sparsify", "keep"):
                raise ValueError(f"{step.kind} needs training; {_INSTEAD_OF_APPLY.get(step.kind, _FIT)}")


def _notes_on_int8(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """What a quantize step does to a model, for its plan."""
    for step in recipe.steps:
        if step.kind == "quantize":
            arguments = recipe._reading.arguments(step)
            with recipe._at(step):
                yield planned(unwrapped(model), **arguments)


def _for_epochs(epochs: int | None, callbacks: list) -> list:
    """Callbacks that warn in a fit of another number of epochs."""
    for callback in callbacks:
        callback.recipe_epochs = epochs
    return callbacks


def _callback_classes() -> dict[str, Callable]:
    """Kind of step -> its callback. They are imported here, as they need fastai, which a plan does not."""
    from ..callbacks import methods as methods  # adds the methods of a Learner
    from ..callbacks.freeze import FreezeCallback
    from ..callbacks.keep import KeepSparsity
    from ..callbacks.sparsify import SparsifyCallback
    from ..quantization.quantize_callback import QuantizeCallback
    from ..training.distill import DistillCallback
    from ..training.regularize import RegularizeCallback

    return {
        "sparsify": SparsifyCallback, "keep": KeepSparsity, "regularize": RegularizeCallback,
        "distil": DistillCallback, "freeze": FreezeCallback,
        "quantize": QuantizeCallback,
    }  # fmt: skip
