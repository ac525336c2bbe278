"""What a recipe can be used for: one fit, pruning at once, or neither, if it has stages."""

from __future__ import annotations

from .reading import Reading

# What to do with each stage of a recipe instead of calling a method of the recipe.
_FIT_OR_APPLY = "learn.fit(stage.epochs, cbs=stage.callbacks()) if stage.training else stage.apply(learn.model)"
_IN_A_LOOP = "stage.manager(model, optimizer, steps_per_epoch) if stage.training else stage.apply(model)"
_FOR_EACH_STAGE = {"plan": "print(stage.plan(model))", "parts": _IN_A_LOOP, "manager": _IN_A_LOOP}


def check_one_part(reading: Reading, method: str) -> None:
    """Refuse what cannot be asked of a recipe that has stages.

    Args:
        reading: The recipe.
        method: The method that is called.

    Raises:
        ValueError: The recipe has stages.
    """
    if reading.stages:
        raise ValueError(
            f"the recipe has {len(reading.stages)} stages; call {method} for each: for stage in recipe.stages: "
            f"{_FOR_EACH_STAGE.get(method, _FIT_OR_APPLY)}"
        )


def check_fit(reading: Reading, method: str) -> None:
    """Refuse what cannot be asked of a recipe that is not for one fit.

    Args:
        reading: The recipe.
        method: The method that is called.

    Raises:
        ValueError: The recipe has stages, or is applied without training.
    """
    check_one_part(reading, method)
    if not reading.training:
        raise ValueError("the recipe has training: false; call recipe.apply(model) instead of a fit")
