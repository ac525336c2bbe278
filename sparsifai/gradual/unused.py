"""Notices of arguments that do nothing, of what was asked for in a training."""

from __future__ import annotations

from typing import Any

from ..axes.criterion import criteria, quantities_of
from ..axes.quantity import AVERAGED, quantities
from ..sparsifier.compensation import makes_passes
from ..sparsifier.options import Options
from ..support.registry import name_of
from .ramp import Ramp

# At so many points it is looked at whether an initial sparsity changes a schedule.
_POINTS = 100


def notices_of_unused(ramp: Ramp, options: Options, drop: float, calibration: Any) -> list[str]:
    """What the user should be warned of when arguments were given that do nothing beside the others.

    Args:
        ramp: The sparsity at each point of the training.
        options: The options of the Sparsifier.
        drop: The fraction of the remaining weights that is pruned and regrown per update.
        calibration: The batches that were given, or None.
    """
    notices = []
    points = [point / _POINTS for point in range(_POINTS + 1)]
    if ramp.initial and all(ramp.at(t) == ramp.end == ramp.schedule(t) for t in points):
        notices.append(
            f"initial_sparsity={ramp.initial:g} does nothing: schedule {name_of(ramp.schedule)} begins at the target "
            "sparsity; choose one that rises, such as agp, or leave it out"
        )
    if options.regrow is not None and not drop:
        notices.append(
            f"regrow={criteria.name_of(options.regrow)} does nothing with drop=0: no weight is pruned for another one "
            "to regrow; give a fraction above 0, such as 0.3"
        )
    if calibration is not None and not looks_at_data(options):
        notices.append(
            f"calibration= does nothing: criterion {name_of(options.criteria)} looks at no data; leave it out, or "
            "choose a criterion such as wanda or snip"
        )
    return notices


def looks_at_data(options: Options) -> bool:
    """Whether masks, or the weights that stay, depend on batches of `calibration=`.

    Args:
        options: The options of the Sparsifier.
    """
    moments = {moment for name in quantities_of(options.criteria) for moment in quantities[name].moments}  # type: ignore[attr-defined]
    return bool(moments & {*AVERAGED}) or makes_passes(options)
