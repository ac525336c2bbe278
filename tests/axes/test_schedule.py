import math
import pickle

import pytest

from sparsifai.axes.schedule import agp, between, cos, dsd, iterative, lin, one_cycle, one_shot, progress, schedules

# t, and the values by hand from the published formulas.
CLOSED_FORMS = {
    "one_shot": {0: 1, 0.25: 1, 1: 1},
    "lin": {0: 0, 0.25: 0.25, 0.7: 0.7, 1: 1},
    "cos": {0: 0, 0.25: (1 - math.sqrt(0.5)) / 2, 0.5: 0.5, 1: 1},
    "agp": {0: 0, 0.25: 1 - 27 / 64, 0.5: 7 / 8, 1: 1},
    "one_cycle": {0: (1 + math.e**-8) / (1 + math.e**6), 3 / 7: (1 + math.e**-8) / 2, 1: 1},
    "iterative": {0: 0, 0.01: 1 / 3, 1 / 3: 1 / 3, 0.34: 2 / 3, 0.9: 1, 1: 1},
    "ac_dc": {0: 0, 0.09: 0, 0.1: 1, 0.149: 1, 0.15: 0, 0.2: 1, 0.7: 1, 0.749: 1, 0.75: 0, 0.849: 0, 0.85: 1, 1: 1},
    "dsd": {0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.5, 1: 0},
}


@pytest.mark.parametrize("name", schedules)
def test_closed_forms(name):
    for t, expected in CLOSED_FORMS[name].items():
        assert schedules[name](t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in schedules if name not in ("dsd", "ac_dc")])
def test_rises_and_ends_at_exactly_one(name):
    values = [progress(schedules[name], step / 500) for step in range(501)]
    assert values == sorted(values)
    assert values[-1] == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 100])
def test_iterative_takes_n_equal_steps_whatever_floats_do(n):
    schedule = iterative(n)
    for step in range(1, n + 1):
        assert schedule(step / n) == step / n
    assert len({schedule(step / 1000) for step in range(1001)}) == n + 1


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "3"])
def test_iterative_refuses_what_is_no_number_of_steps(n):
    with pytest.raises(ValueError, match="n is the number of steps, a whole number from 1 on"):
        iterative(n)


def test_between_moves_a_schedule_into_a_part_of_training():
    moved = between("agp", 0.2, 0.8)
    assert [moved(t) for t in (0, 0.1, 0.2)] == [0, 0, 0]
    assert moved(0.5) == pytest.approx(7 / 8)
    assert [moved(t) for t in (0.8, 0.9, 1)] == [1, 1, 1]
    assert between(one_shot, 0.3, 1)(0.29) == 0
    assert between(one_shot, 0.3, 1)(0.3) == 1
    assert between(between(lin, 0.5, 1), 0, 0.5)(0.375) == pytest.approx(0.5)


def test_between_continues_with_the_last_value():
    assert between(dsd, 0.2, 0.6)(0.9) == 0


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.1), (float("nan"), 1)])
def test_between_refuses_an_empty_or_outside_part(start, end):
    with pytest.raises(ValueError, match="needs 0 <= start < end <= 1"):
        between(lin, start, end)


def test_schedules_can_be_pickled():
    for schedule in (*schedules.values(), between(iterative(4), 0.1, 0.9)):
        restored = pickle.loads(pickle.dumps(schedule))
        assert [restored(step / 7) for step in range(8)] == [schedule(step / 7) for step in range(8)]


def test_own_functions_are_schedules():
    def squared(t):
        return t * t

    assert schedules.resolve(squared) is squared
    schedules.register(squared)
    try:
        assert schedules.resolve("squared")(0.5) == 0.25
    finally:
        del schedules._functions["squared"]


def test_schedules_that_leave_the_unit_interval_are_refused_at_once():
    with pytest.raises(ValueError, match=r"schedule too_much gives 1.2 at t=0.6; a schedule must return the share"):

        @schedules.register
        def too_much(t):
            return 2 * t

    assert "too_much" not in schedules
    with pytest.raises(ValueError, match="gives nan at t=0"):
        schedules.resolve(lambda t: float("nan"))
    with pytest.raises(ValueError, match="gives -1.0 at t=0"):
        schedules.resolve(lambda t: t - 1)


def test_rounding_at_the_ends_is_forgiven_and_clamped():
    assert progress(lambda t: 1 + 1e-9, 1) == 1.0
    assert progress(lambda t: -1e-9, 0) == 0.0


def test_the_registered_functions_are_those_that_are_exported():
    assert [schedules[name] for name in ("one_shot", "lin", "cos", "agp", "one_cycle", "dsd")] == [
        one_shot, lin, cos, agp, one_cycle, dsd,
    ]  # fmt: skip


@pytest.mark.fastai
def test_fastai_annealers_are_schedules():
    fastai_schedule = pytest.importorskip("fastai.callback.schedule", reason="these are fastai's own")
    assert schedules.resolve(fastai_schedule.SchedCos(0, 1))(0.5) == pytest.approx(0.5)
    assert progress(fastai_schedule.SchedPoly(0, 1, 2), 0.5) == 0.25
    combined = fastai_schedule.combine_scheds(
        [0.3, 0.7], [fastai_schedule.SchedNo(0, 0), fastai_schedule.SchedLin(0, 1)]
    )
    assert progress(combined, 1) == 1
