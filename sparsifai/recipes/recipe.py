"""Recipes: one file that says how a model is made sparse, in the words of the API.

    epochs: 20
    variables:
      target: 0.9
    steps:
      - sparsify: {sparsity: "${target}", granularity: weight, schedule: agp, start: 2, end: 75%}
      - distil: {weight: 0.5, temperature: 4}

A step is what the callback of its name is told: times are epochs of so many, or shares of training such as 75%; with
one given, the other is the beginning or the end. A value can be an arithmetic expression of the variables, in `${...}`.
A name of an axis with options is a mapping, such as `schedule: {iterative: 5}`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from numbers import Real
from pathlib import Path as FilePath
from typing import Any, NoReturn

from torch import nn

from ..axes.schedule import Schedule, between, during, progress, stepped
from ..callbacks.learner import metric_names, unchanged
from ..callbacks.plan import every_of, plan_of, sparsifier_for
from ..callbacks.plan_table import Plan
from ..model.layers import find_weights
from ..model.parallel import unwrapped
from ..sparsifier.arguments import mapped, resolve_axes, share_of_initial
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.checks import check_count, check_number
from ..support.registry import close_matches
from .axis_value import axis_value
from .expression import evaluate
from .safe_yaml import Located, dump_yaml, load_yaml
from .sparseml.convert import convert
from .sparseml.modifiers import Notice
from .step import AXES, CHECKS, NEEDED, OF_SPARSIFIER, TIMES, WORDS, Step

_TOP = ("name", "description", "epochs", "variables", "steps", "results")


class Recipe:
    """What a recipe says; printed, it is the file.

    content: the plain dictionary of a file. notices: what of a converted recipe has no counterpart, with its line.
    ValueError that names the line, the key and what was expected, if it cannot be followed.

    >>> recipe = Recipe({'epochs': 10, 'steps': [{'sparsify': {'sparsity': 0.9, 'end': 5}}]})
    >>> recipe.steps[0].options['sparsity']
    0.9
    """

    def __init__(self, content: Mapping[str, Any], notices: Iterable[Notice] = (), *, source: Located | None = None):
        self.content, self.notices = deepcopy(dict(content)), tuple(notices)
        self._source = source or Located(self.content)
        self._check_keys((), self.content, _TOP, "a recipe has")
        self.variables = self._variables()
        self.epochs = self._epochs()
        self.steps = tuple(self._steps())
        for step in self.steps:
            self._arguments(step)  # raises what would be raised when it is used

    # --- Files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe; no code in it is run."""
        return cls.loads(FilePath(path).read_text(encoding="utf-8"))

    @classmethod
    def loads(cls, text: str) -> Recipe:
        """Read a recipe from a string."""
        source = load_yaml(text)
        if not isinstance(source.value, dict):
            raise ValueError("line 1: a recipe is a mapping with epochs: and steps:")
        return cls(source.value, source=source)

    @classmethod
    def from_sparseml(cls, path: str | os.PathLike, *, strict: bool = False, epochs: int | None = None) -> Recipe:
        """Read a recipe of SparseML, YAML or Markdown; what has no counterpart is among the `notices`, with its line.

        strict: ValueError if anything is lost. epochs: if the recipe does not say how many there are.
        ValueError, too, if nothing is left.
        """
        content, notices = convert(FilePath(path).read_text(encoding="utf-8"))
        lost = [notice for notice in notices if notice.lost]
        if (strict and lost) or not content["steps"]:
            listed = "\n".join(map(str, lost if strict and lost else notices))
            raise ValueError(
                f"{path}: " + ("what has no counterpart:\n" if lost else "nothing is sparsified:\n") + listed
            )
        if epochs is not None:
            content.setdefault("epochs", epochs)
        return cls(content, notices)

    def dumps(self) -> str:
        """The recipe as YAML."""
        return dump_yaml(self.content)

    def save(self, path: str | os.PathLike) -> None:
        """Write the recipe as YAML; comments of a file that it was read from are not kept."""
        FilePath(path).write_text(self.dumps(), encoding="utf-8")

    __str__ = __repr__ = dumps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]

    # --- Use ----------------------------------------------------------------------------------------------------

    def callbacks(self, teacher: Any = None) -> list:
        """What to give `learn.fit(recipe.epochs, cbs=recipe.callbacks())`. teacher: of a distil step."""
        from ..callbacks.freeze import FreezeCallback
        from ..callbacks.keep import KeepSparsity
        from ..callbacks.sparsify import SparsifyCallback
        from ..training.distill import DistillCallback
        from ..training.regularize import RegularizeCallback

        kinds: dict[str, Callable] = {
            "sparsify": SparsifyCallback, "keep": KeepSparsity, "regularize": RegularizeCallback,
            "distil": DistillCallback, "freeze": FreezeCallback,
        }  # fmt: skip
        made = []
        for step in self.steps:
            arguments = self._arguments(step)
            with self._at("steps", step.position, step.kind):
                if step.kind == "distil":
                    if teacher is None:
                        raise ValueError("distil needs a teacher: recipe.callbacks(teacher=a trained model)")
                    arguments["teacher"] = teacher
                made.append(kinds[step.kind](**arguments))
        return made

    def apply(
        self,
        model: nn.Module,
        calibration: Iterable | None = None,
        loss_func: Callable | None = None,
        example_input: Any = None,
    ) -> Sparsifier:
        """One-shot: make a model as sparse as the recipe ends, without training, and return its Sparsifier.

        calibration, loss_func: as of Sparsifier.calibrate, for criteria that look at data. example_input: as of
        Sparsifier, for models that cannot be traced, and coupled. ValueError if the recipe has
        a step that needs training, or none that sparsifies.
        """
        for step in self.steps:
            if step.kind not in ("sparsify", "keep"):
                with self._at("steps", step.position, step.kind):
                    raise ValueError(f"{step.kind} needs training: give recipe.callbacks() to a fit instead")
        sparsifier, arguments = self._sparsifier(model, example_input)
        if calibration is not None:
            sparsifier.calibrate(calibration, loss_func)
        end = progress(arguments["schedule"], 1.0)
        sparsifier.sparsify(mapped(arguments["sparsity"], lambda fraction: end * fraction))
        return sparsifier

    def recorded(self, learn: Any, sparsifier: Sparsifier | None = None) -> Recipe:
        """The recipe with `results`: measured sparsity of the model and of each layer, metrics, versions.

        learn: a Learner after its fit; metrics are those of its validation data. sparsifier: of the fit; by default
        that which the Learner keeps the zeros of, or all weights with named axes.
        """
        if sparsifier is None:
            sparsifier = getattr(getattr(learn, "keep_sparsity", None), "sparsifier", None)
        model = unwrapped(learn.model)
        report = Report.measure(model, find_weights(model), {}) if sparsifier is None else sparsifier.report()
        with unchanged(learn):
            values = learn.validate() or []
        metrics = dict(zip(metric_names(learn), values, strict=False))
        results = {
            "sparsity": report.selected.sparsity,
            "sparsity_of_model": report.model.sparsity,
            "layers": {row.name: row.count.sparsity for row in report.rows if not row.why_dense},
            "metrics": {name: _finite(value) for name, value in metrics.items()},
            "versions": {name: _version(name) for name in ("sparsifai", "torch", "fastai")},
        }
        return Recipe({**self.content, "results": results}, self.notices)

    def sparsifying(self) -> Step:
        """The step that sparsifies. ValueError if there is none."""
        for step in self.steps:
            if step.kind == "sparsify":
                return step
        raise ValueError("the recipe has no step that sparsifies")

    def plan(self, model: nn.Module, n_iter: int = 100, example_input: Any = None) -> Plan:
        """What a fit with this recipe would do to a model, layer by layer and epoch by epoch, without data or training.

        n_iter: batches in an epoch. example_input: a batch, for FLOPs, and for models that cannot be traced.
        """
        sparsifier, arguments = self._sparsifier(model, example_input)
        epochs = self.epochs or 1
        every = every_of(arguments.get("every"), "regrow" in arguments, epochs * n_iter)
        initial = arguments.get("initial_sparsity", 0.0)
        return plan_of(
            sparsifier, arguments["sparsity"], arguments["schedule"], epochs, n_iter, every, example_input, initial
        )

    def _sparsifier(self, model: nn.Module, example_input: Any = None) -> tuple[Sparsifier, dict[str, Any]]:
        step = self.sparsifying()
        arguments = self._arguments(step)
        words = ("granularity", "context", "criteria", *OF_SPARSIFIER)
        options = {word: arguments[word] for word in words if word in arguments}
        with self._at("steps", step.position, step.kind):
            return sparsifier_for(model, arguments["sparsity"], example_input=example_input, **options), arguments

    # --- What it says -------------------------------------------------------------------------------------------

    def _variables(self) -> dict[str, float]:
        given = self.content.get("variables") or {}
        if not isinstance(given, Mapping):
            self._fail(("variables",), f"variables are names with numbers, not {given!r}")
        known: dict[str, float] = {}
        for name, value in given.items():
            path = ("variables", name)
            if not isinstance(name, str) or not name.isidentifier():
                self._fail(path, f"{name!r} is no name of a variable")
            known[name] = self._worked_out(value, path, known)
            if isinstance(known[name], bool) or not isinstance(known[name], Real):
                self._fail(path, f"the variable {name} is a number or an expression in ${{...}}, not {value!r}")
        return known

    def _worked_out(self, value: Any, path: tuple[Hashable, ...], variables: Mapping[str, Any]) -> Any:
        """A value with its expressions replaced by what they come to."""
        if isinstance(value, Mapping):
            return {key: self._worked_out(each, (*path, key), variables) for key, each in value.items()}
        if isinstance(value, list):
            return [self._worked_out(each, (*path, place), variables) for place, each in enumerate(value)]
        if isinstance(value, str) and (expression := re.fullmatch(r"\$\{(.*)\}", value, re.DOTALL)):
            with self._at(*path):
                return evaluate(expression[1], variables)
        return value

    def _epochs(self) -> Any:
        """A number, or None."""
        epochs = self._worked_out(self.content.get("epochs"), ("epochs",), self.variables)
        if epochs is None:
            return None
        if isinstance(epochs, float) and epochs.is_integer():
            epochs = int(epochs)
        with self._at("epochs"):
            return check_count("epochs", epochs)

    def _steps(self) -> Iterator[Step]:
        given = self.content.get("steps")
        if not isinstance(given, list) or not given:
            self._fail(("steps",), "steps is a list of what is done: sparsify, keep, regularize, distil, freeze")
        seen: set[str] = set()
        for position, step in enumerate(given):
            path: tuple[Hashable, ...] = ("steps", position)
            if isinstance(step, str):
                step = {step: {}}
            if not isinstance(step, Mapping) or len(step) != 1:
                self._fail(path, f"a step is one of {', '.join(WORDS)} with its options, not {step!r}")
            ((kind, options),) = step.items()
            self._check_keys(path, step, WORDS, "a step is")
            if kind in seen and kind in ("sparsify", "keep"):
                self._fail(
                    (*path, kind), f"a second {kind} step: in one fit there is one; give sparsity as "
                    "{pattern: fraction} for layers of different sparsity",
                )  # fmt: skip
            seen.add(kind)
            options = {} if options is None else options
            if not isinstance(options, Mapping):
                self._fail((*path, kind), f"{kind} has options by name, such as {WORDS[kind][:2]}, not {options!r}")
            self._check_keys((*path, kind), options, WORDS[kind], f"{kind} has")
            if (needed := NEEDED.get(kind)) and needed not in options:
                self._fail((*path, kind), f"{kind} needs {needed}")
            yield Step(kind, self._worked_out(options, (*path, kind), self.variables), position)

    def _arguments(self, step: Step) -> dict[str, Any]:
        """What the callback of a step is given: axes as functions, one schedule for when."""
        options, place = dict(step.options), ("steps", step.position, step.kind)
        for axis in ("granularity", "context", "criteria", "schedule", "decay", "regrow"):
            if axis in options:
                with self._at(*place, axis):
                    options[axis] = axis_value("criteria" if axis == "regrow" else axis, options[axis])
        start, end = (
            self._share(options.pop(time, default), (*place, time))
            for time, default in zip(TIMES, ("0%", "100%"), strict=True)
        )
        timed = bool({*TIMES, "update_every"} & step.options.keys())
        if not start < end <= 1:
            key = "end" if "end" in step.options else "start"
            self._fail(
                (*place, key), f"start is before end, and end within training; they are {start:.4g} and {end:.4g} of it"
            )
        for name, check in CHECKS.items():
            if name in options:
                with self._at(*place, name):
                    options[name] = check(options[name])
        with self._at(*place):
            if step.kind == "sparsify":
                given = [options.get(axis, default) for axis, default in AXES.items()]
                resolve_axes(given[0], given[1], given[2], options.get("pool"))
                share_of_initial(options.get("initial_sparsity", 0.0), options["sparsity"])
                if "drop" in options and "regrow" not in options:
                    raise ValueError("drop: nothing says what comes back; give regrow: grad, or random")
                if timed:
                    options["schedule"] = self._schedule_of_sparsity(options, start, end, place)
                else:
                    options.setdefault("schedule", between("agp", 0, 0.75))
            elif step.kind == "freeze":
                options |= {"start": start, "end": end}
            elif timed:
                options["schedule"] = during(options.get("schedule", "one_shot"), start, end)
            if step.kind == "distil":
                check_number("weight", options.get("weight", 0.5), 0, 1)
        return options

    def _schedule_of_sparsity(self, options: dict[str, Any], start: float, end: float, place: tuple) -> Schedule:
        schedule, update_every = options.get("schedule", "agp"), options.pop("update_every", None)
        if update_every is not None:
            share = self._share(update_every, (*place, "update_every"))
            if not share:
                self._fail((*place, "update_every"), "update_every is above 0")
            schedule = stepped(schedule, (end - start) / share)
        return between(schedule, start, end)

    def _share(self, time: Any, path: tuple[Hashable, ...]) -> float:
        """Of training: '75%', or epochs."""
        if isinstance(time, str) and (percentage := re.fullmatch(r"\s*([\d.]+)\s*%\s*", time)):
            with self._at(*path):
                return float(percentage[1]) / 100
        if isinstance(time, bool) or not isinstance(time, Real) or not float(time) >= 0:
            self._fail(path, f"a time is in epochs, or a share of training such as 75%; not {time!r}")
        if self.epochs is None and time:
            self._fail(path, f"{time:g} epochs of how many? give epochs:, or a share of training such as 75%")
        return float(time) / self.epochs if time else 0.0

    # --- Errors -------------------------------------------------------------------------------------------------

    def _check_keys(self, path: tuple[Hashable, ...], given: Mapping, known: Iterable[str], what: str) -> None:
        for key in given:
            if key not in known:
                words = ", ".join(known) or "no options"
                self._fail(
                    (*path, key), f"unknown {key!r}; {close_matches(str(key), known) if known else ''} ({what} {words})"
                )

    def _fail(self, path: tuple[Hashable, ...], message: str) -> NoReturn:
        raise ValueError(f"line {self._source.line(*path)}: {'.'.join(map(str, path))}: {message}")

    @contextmanager
    def _at(self, *path: Hashable) -> Iterator[None]:
        """Tell the line of what is raised."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if str(error).startswith("line "):
                raise
            raise ValueError(f"line {self._source.line(*path)}: {'.'.join(map(str, path))}: {error}") from error


def _finite(value: Any) -> float | None:
    """As a file can hold it."""
    return float(value) if value is not None and isfinite(value) else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
