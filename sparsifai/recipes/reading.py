"""From the content of a recipe to checked steps: variables, epochs, and what each callback is given.

A problem is a ValueError that names the line and the path of keys, and comes before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from ..axes.changed_schedule import between, during, stepped
from ..axes.schedule import Schedule
from ..gradual.plan import MOST_EPOCHS
from ..gradual.ramp import default_schedule
from ..sparsifier.options import (
    check_compensate,
    check_straight_through,
    check_swept,
    is_swept,
    resolve_axes,
    share_of_initial,
)
from ..support.checks import check_count, check_number
from ..support.registry import close_matches
from ..support.work import Work
from .axis_value import REGISTRIES, axis_value
from .expression import Evaluation, work_of_recipe
from .safe_yaml import Located
from .step import APPLICABLE, AXES, CHECKS, OPTIONS, REQUIRED, TIMES, Step

# The keys of a recipe.
KEYS = ("name", "description", "training", "epochs", "variables", "steps", "stages", "results")
# Those of a stage, and those that a recipe with stages has in its stages only.
STAGE_KEYS = ("name", "description", "training", "epochs", "variables", "steps")
ONLY_IN_STAGES = ("training", "epochs", "steps")

MOST_STEPS = 50  # far beyond what a recipe needs
MOST_STAGES = 50

# Keys and positions that lead to a value.
Path = tuple[Hashable, ...]


class Reading:
    """The content of a recipe, read and checked.

    `variables` maps names to numbers, `training` says whether the model is trained, `epochs` is a whole number or None,
    and `steps` is a tuple of `Step`. For a recipe of several parts, `stages` has the reading of each, and the recipe
    has no steps of its own.

    Args:
        content: The dictionary of a recipe.
        source: The same with its lines, for errors. By default every error names line 1.
        stage_of: For a stage, the reading of its recipe, whose variables it has, too. Default None.

    Raises:
        ValueError: The recipe is not valid. The message names the line, the key and what was expected.

    Example:
        >>> reading = Reading({'epochs': 10, 'steps': [{'distil': {'weight': 0.5, 'end': 5}}]})
        >>> reading.arguments(reading.steps[0])['schedule'].__name__
        'during(one_shot, 0, 0.5)'
    """

    def __init__(self, content: Mapping[str, Any], source: Located | None = None, stage_of: Reading | None = None):
        self.content, self.source = content, source or Located(content)
        self._work: Work = work_of_recipe() if stage_of is None else stage_of._work
        known = KEYS if stage_of is None else STAGE_KEYS
        self._check_keys((), content, known, "key", f"the keys of a {'recipe' if stage_of is None else 'stage'}")
        self.variables: dict[str, float] = self._variables({} if stage_of is None else stage_of.variables)
        self.stages = tuple(self._stages())
        self.training, self.epochs = self._training(), self._epochs()
        self.steps = () if self.stages else tuple(self._steps())
        for step in self.steps:
            self.arguments(step)  # an error in them is raised now, not when they are used

    def arguments(self, step: Step) -> dict[str, Any]:
        """The arguments of the callback of a step: axes as functions, and the times as part of one schedule.

        Args:
            step: One of `steps`.

        Returns:
            Name -> value, new for every call.

        Raises:
            ValueError: An option is wrong. The message names the line, the key and what was expected.
        """
        options, path = dict(step.options), ("steps", step.position, step.kind)
        for axis in REGISTRIES:
            if axis in options:
                with self.source.at(*path, axis):
                    options[axis] = axis_value(axis, options[axis])
        start, end = self._times(options, path)
        for name, check in CHECKS.items():
            if name in options:
                with self.source.at(*path, name):
                    options[name] = check(options[name])
        is_timed = bool({*TIMES, "update_every"} & step.options.keys())
        with self.source.at(*path):
            if step.kind == "sparsify":
                _check_together(options)
                if is_timed:
                    options["schedule"] = self._schedule_of_sparsity(options, start, end, path)
                else:
                    options.setdefault("schedule", default_schedule(options.get("straight_through", False)))
            elif step.kind == "freeze":
                options |= {"start": start, "end": end}
            elif step.kind == "quantize":
                options |= {"start": start} if is_timed else {}
            elif is_timed:
                options["schedule"] = during(options.get("schedule", "one_shot"), start, end)
            if step.kind == "distil":
                check_number("weight", options.get("weight", 0.5), 0, 1)
        return options

    @property
    def whole_content(self) -> dict[str, Any]:
        """The content, for a stage with the variables of its recipe, so that it is a recipe of its own."""
        return {**self.content, **({"variables": self.variables} if self.variables else {})}

    # --- Stages -------------------------------------------------------------------------------------------------

    def _stages(self) -> Iterator[Reading]:
        if "stages" not in self.content:
            return
        given = self.content["stages"]
        for key in ONLY_IN_STAGES:
            if key in self.content:
                raise self.source.error((key,), f"a recipe with stages has no {key} of its own; put {key} into a stage")
        if not isinstance(given, list) or not 0 < len(given) <= MOST_STAGES:
            raise self.source.error(
                ("stages",), f"stages must be a list of 1 to {MOST_STAGES} stages, each with steps:"
            )
        for position, stage in enumerate(given):
            if not isinstance(stage, Mapping):
                raise self.source.error(("stages", position), f"a stage must be a mapping with steps:, not {stage!r}")
            yield Reading(stage, self.source.part("stages", position), self)

    def _training(self) -> bool:
        training = self.content.get("training", True)
        if not isinstance(training, bool):
            raise self.source.error(("training",), f"it must be true or false, not {training!r}")
        if not training and self.content.get("epochs") is not None:
            raise self.source.error(("epochs",), "with training: false there are no epochs; leave one of them out")
        return training

    # --- Variables and epochs -----------------------------------------------------------------------------------

    def _variables(self, outer: Mapping[str, float]) -> dict[str, float]:
        given = self.content.get("variables") or {}
        if not isinstance(given, Mapping):
            raise self.source.error(("variables",), f"variables must map names to numbers, not {given!r}")
        known: dict[str, float] = dict(outer)
        evaluation = Evaluation(known, self._work)
        for name, value in given.items():
            path = ("variables", name)
            if not isinstance(name, str) or not name.isidentifier():
                raise self.source.error(path, f"{name!r} is not a name of a variable; use letters, digits and _")
            known[name] = self._computed(value, path, evaluation)
            if isinstance(known[name], bool) or not isinstance(known[name], Real):
                raise self.source.error(
                    path, f"the variable {name} must be a number or an expression in ${{...}}, not {value!r}"
                )
        return known

    def _computed(self, value: Any, path: Path, evaluation: Evaluation) -> Any:
        """A value with its expressions replaced by their values."""
        if isinstance(value, Mapping):
            return {key: self._computed(each, (*path, key), evaluation) for key, each in value.items()}
        if isinstance(value, list):
            return [self._computed(each, (*path, position), evaluation) for position, each in enumerate(value)]
        if isinstance(value, str) and (expression := re.fullmatch(r"\$\{(.*)\}", value, re.DOTALL)):
            with self.source.at(*path):
                return evaluation.of(expression[1])
        return value

    def _epochs(self) -> Any:
        """A whole number, or None."""
        epochs = self._computed(self.content.get("epochs"), ("epochs",), Evaluation(self.variables, self._work))
        if epochs is None:
            return None
        if isinstance(epochs, float) and epochs.is_integer():
            epochs = int(epochs)
        with self.source.at("epochs"):
            return check_count("epochs", epochs, MOST_EPOCHS)

    # --- Steps --------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        given = self.content.get("steps")
        if not isinstance(given, list) or not given:
            raise self.source.error(("steps",), f"steps must be a list with at least one step, of {', '.join(OPTIONS)}")
        if len(given) > MOST_STEPS:
            raise self.source.error(("steps",), f"there are {len(given):,} steps, more than {MOST_STEPS}")
        seen: set[str] = set()
        evaluation = Evaluation(self.variables, self._work)
        for position, step in enumerate(given):
            path: Path = ("steps", position)
            if isinstance(step, str):
                step = {step: {}}
            if not isinstance(step, Mapping) or len(step) != 1:
                raise self.source.error(
                    path, f"a step must be one of {', '.join(OPTIONS)} with its options, not {step!r}"
                )
            ((kind, options),) = step.items()
            self._check_keys(path, step, OPTIONS, "step", "the steps")
            path = (*path, kind)
            if kind in seen and kind in ("keep", "quantize"):
                raise self.source.error(path, f"a second {kind} step; a fit has only one")
            if not self.training and kind not in APPLICABLE:
                raise self.source.error(path, f"{kind} needs training; leave it out, or leave out training: false")
            seen.add(kind)
            options = {} if options is None else options
            if not isinstance(options, Mapping):
                expected = f"options by name, such as {OPTIONS[kind][0]}:" if OPTIONS[kind] else "no options"
                raise self.source.error(path, f"{kind} has {expected}, not {options!r}")
            self._check_keys(path, options, OPTIONS[kind], "option", f"the options of {kind}")
            if (required := REQUIRED.get(kind)) and required not in options:
                raise self.source.error(path, f"{kind} needs the option {required}")
            yield Step(kind, self._computed(options, path, evaluation), position)

    def _check_keys(self, path: Path, given: Mapping, known: Iterable[str], what: str, all_of_them: str) -> None:
        for key in given:
            if key not in known:
                hint = f"; {close_matches(str(key), known)}" if known else ""
                words = ", ".join(known) or "none"
                raise self.source.error((*path, key), f"unknown {what} {key!r}{hint} ({all_of_them}: {words})")

    # --- Times --------------------------------------------------------------------------------------------------

    def _times(self, options: dict[str, Any], path: Path) -> tuple[float, float]:
        """Take `start` and `end` out of the options, as shares of training."""
        key = "end" if "end" in options else "start"
        start = self._share(options.pop("start", "0%"), (*path, "start"))
        end = self._share(options.pop("end", "100%"), (*path, "end"))
        if not start < end <= 1:
            raise self.source.error(
                (*path, key),
                f"start must be before end, and end within training; they are at {start:.4g} and {end:.4g} of training",
            )
        return start, end

    def _share(self, time: Any, path: Path) -> float:
        """A time as a share of training: '75%', or a number of epochs."""
        if isinstance(time, str) and (percentage := re.fullmatch(r"\s*([\d.]+)\s*%\s*", time)):
            with self.source.at(*path):
                return float(percentage[1]) / 100
        if isinstance(time, bool) or not isinstance(time, Real) or not float(time) >= 0:
            raise self.source.error(
                path, f"a time must be a number of epochs, or a share of training such as 75%, not {time!r}"
            )
        if self.epochs is None and time:
            raise self.source.error(
                path,
                f"the time is {time:g} epochs, and the recipe does not say how many there are; give epochs:, or a "
                "share of training such as 75%",
            )
        return float(time) / self.epochs if time else 0.0

    def _schedule_of_sparsity(self, options: dict[str, Any], start: float, end: float, path: Path) -> Schedule:
        schedule, update_every = options.get("schedule", "agp"), options.pop("update_every", None)
        if update_every is not None:
            share = self._share(update_every, (*path, "update_every"))
            if not share:
                raise self.source.error((*path, "update_every"), "update_every must be above 0")
            schedule = stepped(schedule, (end - start) / share)
        return between(schedule, start, end)


def _check_together(options: Mapping[str, Any]) -> None:
    """Check options of `sparsify` that depend on each other."""
    granularity, context, criteria = (options.get(axis, default) for axis, default in AXES.items())
    granularity, context, criterion, _ = resolve_axes(granularity, context, criteria, options.get("pool"))
    changing = options.get("straight_through"), options.get("regrow")
    check_compensate(options.get("compensate"), criterion, *changing)
    if is_swept(criterion):
        check_swept(granularity, context, criterion, options.get("round_to"), options.get("coupled"), *changing)
    share_of_initial(options.get("initial_sparsity", 0.0), options["sparsity"])
    if "drop" in options and "regrow" not in options:
        raise ValueError("drop is given without regrow; add regrow: grad or regrow: random, or leave drop out")
    check_straight_through(*map(options.get, ("straight_through", "decay", "gradient_sparsity", "regrow")))
    if "settle" in options and not options.get("straight_through"):
        raise ValueError("settle is given without straight_through; add straight_through: true, or leave settle out")
